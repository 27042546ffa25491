"""
The paper's ablations (section 4.4) end to end on the small world: scored, both stages, saved, asked. Each is one value.
"""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from aligngpt_playground.world import parts_path, write_world
from aligngpt_trainers.commands.cli import main
from modeling_aligngpt import AlignGPTProcessor


COMMON = ["--use_cpu", "true", "--gradient_checkpointing", "false", "--save_strategy", "no", "--disable_tqdm", "true"]
COMMON += ["--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3"]
MODES = ["gate", "local", "global", "mean", "fixed", "random"]


def run(*words: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(word) for word in words]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Pairs, conversations and held-out images of the small world, and the shipped parts."""
    folder = tmp_path_factory.mktemp("world")
    write_world(
        folder / "data", pairs=40, conversations=24, heldout_pairs=4, heldout_conversations=4, seed=0, progress=False
    )
    return folder


@pytest.fixture(scope="module")
def stage_1(world):
    """Folder of stage 1 by number of levels."""
    folders = {}
    for levels in (8, 4):
        scored, output = world / f"scored-{levels}", world / f"pretrain-{levels}"
        run("score", "--dataset", world / "data" / "pairs", "--scorer", parts_path("clip"), "--device", "cpu",
            "--output", scored, "--num_align_levels", levels)  # fmt: skip
        run("pretrain", "--language_model", parts_path("llama"), "--vision_tower", parts_path("clip"), "--dataset",
            scored, "--num_align_levels", levels, "--output_dir", output, *COMMON)  # fmt: skip
        folders[levels] = output
    return folders


@pytest.mark.parametrize(("mode", "levels"), [*((mode, 8) for mode in MODES), ("gate", 4)])
def test_each_ablation_is_one_value(world, stage_1, tmp_path, mode, levels):
    changed = ["--align_mode", mode, *(["--default_align_level", "2"] if mode == "fixed" else [])]
    run("instruct", "--model", stage_1[levels], "--dataset", world / "data" / "conversations", "--output_dir", tmp_path,
        *COMMON, *changed)  # fmt: skip
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert (summary["align_mode"], summary["num_align_levels"], summary["steps"]) == (mode, levels, 2)
    assert all(0 < loss < 20 for _, loss in summary["loss_curve"])

    model = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True).eval()
    table = model.model.align_embeddings.weight
    assert model.config.align_mode == mode and table.shape[0] == levels
    before = AutoModelForImageTextToText.from_pretrained(stage_1[levels], trust_remote_code=True)
    assert torch.equal(before.model.align_embeddings.weight, table) == (mode != "random")
    gates = [m.model.align_gate.linear_2.weight for m in (before, model)]
    assert torch.equal(*gates) == (mode in ("global", "mean", "fixed"))

    processor = AlignGPTProcessor.from_pretrained(tmp_path)
    row = load_from_disk(world / "data" / "conversations")["train"][0]
    inputs = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": "what?"}],
            }
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    embedded = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        weights = model(**inputs).align_weights[0]
    found = embedded[0][0, (inputs["input_ids"][0] == model.config.align_token_id)]
    expected = {
        "gate": weights[:-1] @ table[:-1] + table[-1],
        "random": weights[:-1] @ table[:-1] + table[-1],
        "local": weights[:-1] @ table[:-1],
        "global": table[-1],
        "mean": table[:-1].mean(0) + table[-1],
        "fixed": table[2],
    }[mode]
    torch.testing.assert_close(found, expected[None], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights @ table, expected, rtol=1e-4, atol=1e-6)
    if mode in ("gate", "local", "random"):
        assert weights.shape == (levels,) and float(weights[:-1].sum()) == pytest.approx(1, abs=1e-5)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_stage_2_on_each_rows_own_level(world, stage_1, tmp_path):
    """Beyond the paper: conversations are scored, and each trains the model at its own level."""
    conversations, scored = world / "data" / "conversations", tmp_path / "scored"
    run("score", "--dataset", conversations, "--scorer", parts_path("clip"), "--device", "cpu", "--conversations",
        "true", "--output", scored)  # fmt: skip
    run("instruct", "--model", stage_1[8], "--dataset", scored, "--output_dir", tmp_path / "out", *COMMON,
        "--align_mode", "level")  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.align_mode == "level" and model.config.training_stage == "instruct"
    before = AutoModelForImageTextToText.from_pretrained(stage_1[8], trust_remote_code=True)
    # neither gate nor level table has a say in it, or learns from it
    for module in ("align_gate", "align_embeddings"):
        for ours, theirs in zip(
            getattr(model.model, module).parameters(), getattr(before.model, module).parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)
    processor = AlignGPTProcessor.from_pretrained(tmp_path / "out")
    rows = load_from_disk(str(scored))
    inputs = processor(images=rows[0]["images"], text="<image>\nwhat?", return_tensors="pt")
    asked = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert asked.align_weights.tolist() == [[0.0] * 7 + [1.0]], "the top level is asked for"


def test_stage_2_keeps_the_gate_that_it_found(world, stage_1, tmp_path):
    run("instruct", "--model", stage_1[8], "--dataset", world / "data" / "conversations", "--output_dir", tmp_path,
        *COMMON)  # fmt: skip
    kept = load_file(tmp_path / "gate_before.safetensors")
    before = AutoModelForImageTextToText.from_pretrained(stage_1[8], trust_remote_code=True).model.align_gate
    after = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True).model.align_gate
    assert kept.keys() == before.state_dict().keys()
    assert all(torch.equal(kept[name], value) for name, value in before.state_dict().items())
    assert any(not torch.equal(kept[name], value) for name, value in after.state_dict().items())


def test_levels_of_rows_reach_the_batch_and_lack_in_none_with_an_image(world, stage_1, tmp_path):
    from aligngpt_trainers import AlignGPTInstructConfig, AlignGPTInstructTrainer

    rows = load_from_disk(str(world / "data" / "conversations"))["train"].select(range(4))
    text = {"role": "user", "content": [{"type": "text", "text": "two and two?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "four"}]}
    mixed = [
        *({"images": row["images"], "messages": row["messages"], "align_level": i} for i, row in enumerate(rows)),
        {"images": [], "messages": [text, answer], "align_level": None},
    ]
    args = AlignGPTInstructConfig(str(tmp_path), use_cpu=True, align_mode="level", per_device_train_batch_size=5,
                                  group_by="none", report_to="none", max_length=256)  # fmt: skip
    trainer = AlignGPTInstructTrainer(str(stage_1[8]), args, Dataset.from_list(mixed))
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch["align_level"].tolist()) == [0, 1, 2, 3, 7]
    mixed[2]["align_level"] = None
    with pytest.raises(ValueError, match='Row 2 has no `align_level`, which align_mode="level" needs'):
        AlignGPTInstructTrainer(str(stage_1[8]), args, Dataset.from_list(mixed))
