"""Preference tuning: what the gate reads, what trains, levels of rows, layouts, the command, and what is refused."""

import json

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from demo_model import save_demo_model
from PIL import Image as PILImage

from aligngpt_trainers import AlignGPTDPOConfig, AlignGPTDPOTrainer, load_preferences
from aligngpt_trainers.commands import cli
from aligngpt_trainers.preferences.dpo_trainer import AlignGPTPreferenceCollator
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


def ramp(turn: int) -> PILImage.Image:
    return PILImage.linear_gradient("L").resize((64, 64)).convert("RGB").rotate(30 * turn)


def pairs(number: int = 6, **more) -> list[dict]:
    questions = ["what is it?", "what is in the picture?", "how many things are there?"]
    return [
        {
            "image": ramp(i),
            "question": questions[i % 3],
            "chosen": "a whale and a balloon",
            "rejected": "three robots in the snow",
            **more,
        }
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_demo_model(tmp_path_factory.mktemp("dpo") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "training_stage": "instruct"}))
    return folder


def loaded(folder, context="first_turn"):
    model = AlignGPTForConditionalGeneration.from_pretrained(folder)
    processor = AlignGPTProcessor.from_pretrained(folder)
    model.config.gate_context = processor.gate_context = context
    return model, processor


def settings(path, **more) -> AlignGPTDPOConfig:
    values = {"use_cpu": True, "report_to": [], "save_strategy": "no", "per_device_train_batch_size": 3}
    return AlignGPTDPOConfig(str(path), **{**values, "logging_steps": 1, **more})


@pytest.mark.parametrize("context", ["first_turn", "prompt"])
def test_both_answers_have_the_vector_of_their_prompt(folder, context):
    model, processor = loaded(folder, context)
    rows = load_preferences(pairs())
    batch = AlignGPTPreferenceCollator(processor=processor)([rows[i] for i in range(6)])
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    with torch.no_grad():
        chosen, rejected = model.eval()(**inputs).align_weights.chunk(2)
    torch.testing.assert_close(chosen, rejected, rtol=0, atol=1e-6)
    # and that of generation, which sees the prompt alone
    for i in range(6):
        content = [{"type": "image"}, {"type": "text", "text": rows[i]["prompt"][0]["content"]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        asked = processor(text=text, images=rows[i]["images"], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(model(**asked).align_weights[0], chosen[i], rtol=0, atol=1e-5)


def test_logps_of_an_answer_are_those_of_generation(folder, tmp_path):
    model, processor = loaded(folder)
    rows = load_preferences(pairs())
    trainer = AlignGPTDPOTrainer(model, settings(tmp_path), rows, processing_class=processor)
    batch = AlignGPTPreferenceCollator(processor=processor)([rows[0]])
    chosen, _ = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    question = [{"type": "image"}, {"type": "text", "text": rows[0]["prompt"][0]["content"]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    asked = processor(text=text, images=rows[0]["images"], add_special_tokens=False, return_tensors="pt")
    completion = batch["input_ids"][0][batch["completion_mask"][0].bool()]
    total, ids = 0.0, asked["input_ids"]
    for token in completion:
        inputs = {**asked, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits = trainer.ref_model.eval()(**inputs).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    assert chosen.item() == pytest.approx(total, abs=2e-4)


def test_trains_what_stage_2_trains_and_prefers(folder, tmp_path):
    model, processor = loaded(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = load_preferences(pairs(12))
    args = settings(tmp_path, learning_rate=1e-3, max_steps=8, warmup_steps=0, lr_scheduler_type="constant")
    trainer = AlignGPTDPOTrainer(model, args, rows, processing_class=processor)
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name.split(".")[1] if name.startswith("model.") else name for name in before}
    changed = {
        (name.split(".")[1] if name.startswith("model.") else name.split(".")[0])
        for name in before
        if not torch.equal(before[name], after[name])
    }
    assert {"language_model", "multi_modal_projector", "align_gate"} <= changed <= moved | {"lm_head"}
    assert "vision_tower" not in changed and "align_embeddings" not in changed
    logs = [log for log in trainer.state.log_history if "rewards/margins" in log]
    assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"] + 0.1, logs
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_levels_of_rows_reach_the_model(folder):
    model, processor = loaded(folder)
    rows = load_preferences([{**row, "align_level": i % 8} for i, row in enumerate(pairs())], num_align_levels=8)
    batch = AlignGPTPreferenceCollator(processor=processor)([rows[i] for i in range(6)])
    assert batch["align_level"].tolist() == [0, 1, 2, 3, 4, 5] * 2
    with torch.no_grad():
        weights = model.eval()(**{k: v for k, v in batch.items() if k != "completion_mask"}).align_weights
    assert weights.argmax(1).tolist() == [0, 1, 2, 3, 4, 5] * 2


def test_layouts_give_the_same_rows(tmp_path):
    own = load_preferences(pairs(2))
    trls = [
        {
            "images": [row["image"]],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": row["rejected"]}]}],
        }
        for row in pairs(2)
    ]
    again = load_preferences(trls)
    text = Value("string")
    stored = Dataset.from_list(
        pairs(2), features=Features({"image": Image(), "question": text, "chosen": text, "rejected": text})
    )
    stored.save_to_disk(str(tmp_path / "stored"))
    third = load_preferences(str(tmp_path / "stored"))
    for rows in (again, third):
        assert rows.features == own.features and rows.features["images"] == List(Image())
        for mine, theirs in zip(own, rows, strict=True):
            assert mine["images"][0].tobytes() == theirs["images"][0].tobytes()
            mine.pop("images"), theirs.pop("images")
            assert mine == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": ""}, "row 1: chosen is empty"),
        ({"rejected": "a whale and a balloon"}, "row 1: chosen and rejected are equal"),
        ({"question": None}, "row 1: found .*accepted are"),
        ({"image": "gone.png"}, "row 1: no such image file 'gone.png'"),
        ({"align_level": 8}, "row 1: align_level is 8"),
        ({"question": "is <image> or <image> brighter?"}, "row 1: several images stand among its words"),
    ],
)
def test_bad_pairs_are_named(change, message):
    rows = pairs(3)
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        load_preferences(rows, num_align_levels=8)


def test_a_model_of_stage_1_is_refused(folder, tmp_path):
    model, processor = loaded(folder)
    model.config.training_stage = "pretrain"
    with pytest.raises(ValueError, match="stage 1 alone"):
        AlignGPTDPOTrainer(model, settings(tmp_path), load_preferences(pairs()), processing_class=processor)


def test_the_command_writes_a_model_that_loads(folder, tmp_path, capsys):
    rows = []
    for i, row in enumerate(pairs()):
        row.pop("image").save(tmp_path / f"{i}.png")
        rows.append({**row, "image": f"{i}.png"})
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    words = f"dpo --model {folder} --dataset {tmp_path / 'pairs.json'} --output_dir {tmp_path / 'out'} --use_cpu true"
    words += " --max_steps 2 --per_device_train_batch_size 2 --save_strategy no --report_to none --logging_steps 1"
    assert cli.main(words.split()) == 0
    assert "dpo: 6 pairs, 2 steps, loss 0.69" in capsys.readouterr().out
    again = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "out")
    AlignGPTProcessor.from_pretrained(tmp_path / "out").validate_with(again.config)
    assert again.config.training_stage == "instruct"
    assert cli.main(words.split()) == 2
    assert "holds a finished model" in capsys.readouterr().err
