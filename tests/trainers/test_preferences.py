"""The scripts of docs/preferences.md: TRL's own DPO and GRPO on a model of ours, whole and by adapters."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image, List
from demo_model import save_demo_model
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from aligngpt_trainers.commands import cli
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


SCRIPTS = Path(__file__).parents[2] / "docs" / "examples"
TINY = "--max_steps 2 --per_device_train_batch_size 2 --use_cpu --bf16 false --report_to none --save_strategy no"
TINY += " --learning_rate 1e-3 --warmup_steps 0"
GRPO = " --num_generations 2 --max_completion_length 6"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model after stage 2 and rows for both trainers."""
    folder = tmp_path_factory.mktemp("preferences")
    config = json.loads((save_demo_model(folder / "model") / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "training_stage": "instruct"}))
    gray = PILImage.linear_gradient("L").resize((64, 64)).convert("RGB")
    rows = [
        {
            "images": [gray.rotate(30 * i)],
            "prompt": [{"role": "user", "content": f"what is in picture {i}?"}],
            "chosen": [{"role": "assistant", "content": "a whale and a balloon"}],
            "rejected": [{"role": "assistant", "content": "three robots in the snow"}],
            "answer": "a whale",
        }
        for i in range(4)
    ]
    (folder / "rows").mkdir()
    Dataset.from_list(rows).cast_column("images", List(Image())).to_parquet(folder / "rows" / "train.parquet")
    return folder


def run(name: str, world: Path, output: Path, *more: str) -> None:
    spec = importlib.util.spec_from_file_location(f"example_{name}", SCRIPTS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = f"--model_name_or_path {world / 'model'} --dataset_name {world / 'rows'} --output_dir {output} {TINY}"
    script.main([*(words + (GRPO if name == "grpo" else "")).split(), *more])


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_the_modules_of_stage_2_train(world, tmp_path, name):
    run(name, world, tmp_path)
    before = AlignGPTForConditionalGeneration.from_pretrained(world / "model").state_dict()
    model = AlignGPTForConditionalGeneration.from_pretrained(tmp_path)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    parts = {key.removeprefix("model.").partition(".")[0] for key in moved}
    assert {"language_model", "multi_modal_projector"} <= parts, parts
    assert not parts & {"vision_tower", "align_embeddings"}
    AlignGPTProcessor.from_pretrained(tmp_path).validate_with(model.config)


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_adapters_go_into_the_language_model_alone(world, tmp_path, name):
    run(name, world, tmp_path, "--use_peft")
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert any("language_model" in key and "lora_A" in key for key in names)
    whole = {key for key in names if "lora_" not in key}
    assert whole and all("multi_modal_projector" in key or "align_gate" in key for key in whole)
    assert not [key for key in names if "vision_tower" in key]


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_the_old_commands_name_the_page(name, capsys):
    assert cli.main([name, "--model", "x"]) == 2
    assert "docs/preferences.md" in capsys.readouterr().err


# ---- what the gate reads in TRL's own trainers: the prompt alone, without a line of ours ----


def watched(world: Path):
    """A model, its processor, and a list that gets the levels' shares of every pass that sees images."""
    model = AutoModelForImageTextToText.from_pretrained(world / "model")
    seen: list[torch.Tensor] = []

    def keep(module, args, output):
        if output.align_weights is not None:
            seen.append(output.align_weights.detach())

    model.model.register_forward_hook(keep)
    return model, AutoProcessor.from_pretrained(world / "model"), seen


def rows_of(world: Path, *columns: str) -> Dataset:
    return Dataset.from_parquet(str(world / "rows" / "train.parquet")).select_columns(["images", *columns])


def shares_when_asked(world: Path, number: int) -> torch.Tensor:
    """Of the first rows' prompts alone, each by itself."""
    model, processor, seen = watched(world)
    for row in rows_of(world, "prompt").select(range(number)):
        content = [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=row["images"], add_special_tokens=False, return_tensors="pt")
        model.generate(**inputs, max_new_tokens=1)
    return torch.cat(seen)


def quiet(kind: type, path: Path, **more):
    settings = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 4, "max_length": 96} if kind is not GRPOConfig else {}
    return kind(str(path), **{**settings, **sizes, "train_sampling_strategy": "sequential", **more})


def test_sft_as_trl_ships_it(world, tmp_path):
    model, processor, seen = watched(world)
    talks = [
        {"images": row["images"], "messages": [*row["prompt"], *row["chosen"], *row["prompt"], *row["rejected"]]}
        for row in rows_of(world, "prompt", "chosen", "rejected")
    ]
    rows = Dataset.from_list(talks).cast_column("images", List(Image()))
    config = quiet(SFTConfig, tmp_path, assistant_only_loss=True, max_length=160)
    SFTTrainer(model, config, train_dataset=rows, processing_class=processor).train()
    torch.testing.assert_close(seen[0], shares_when_asked(world, 4), rtol=0, atol=1e-5)


def test_dpo_as_trl_ships_it(world, tmp_path):
    model, processor, seen = watched(world)
    rows = rows_of(world, "prompt", "chosen", "rejected")
    DPOTrainer(model, args=quiet(DPOConfig, tmp_path), train_dataset=rows, processing_class=processor).train()
    chosen, rejected = seen[0].chunk(2)
    torch.testing.assert_close(chosen, rejected, rtol=0, atol=1e-6)
    torch.testing.assert_close(chosen, shares_when_asked(world, 4), rtol=0, atol=1e-5)


def test_grpo_as_trl_ships_it(world, tmp_path):
    model, processor, seen = watched(world)
    more = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6}
    config = quiet(GRPOConfig, tmp_path, **more)

    def short(completions, **columns):
        return [-float(len(completion[0]["content"])) for completion in completions]

    rows = rows_of(world, "prompt")
    trainer = GRPOTrainer(model, reward_funcs=short, args=config, train_dataset=rows, processing_class=processor)
    trainer.train()
    asked = shares_when_asked(world, 4)
    # answers made, then scored, in an order of TRL's; nothing has been learned yet
    assert len(seen) > 1
    for weights in torch.cat(seen):
        assert (weights - asked).abs().max(1).values.min() < 1e-5
