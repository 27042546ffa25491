"""Held-out rows answered during training: what is written, logged and reported, in both stages."""

import json
from pathlib import Path

import pytest
import torch
from stage_parts import NUM_LEVELS, conversation_rows, pair_rows, settings, to_dataset

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)
from aligngpt_trainers.eval_callback import append_records, forget_later_records, generate_answers


EVALUATE = {"eval_strategy": "steps", "eval_steps": 2, "eval_generations": 4, "eval_generation_tokens": 8}
WEIGHTS = {f"eval_align_weight_{level}" for level in range(NUM_LEVELS - 1)}


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def instruct(model, folder, held_out=None, callbacks=None, generation_metrics=None, **overrides):
    args = settings(AlignGPTInstructConfig, folder, **{**EVALUATE, "max_steps": 4, **overrides})
    return AlignGPTInstructTrainer(
        str(model),
        args,
        to_dataset(conversation_rows(8)),
        eval_dataset=held_out or to_dataset(conversation_rows(8)),
        callbacks=callbacks,
        generation_metrics=generation_metrics,
    )


def test_stage_2_logs_answers_and_gate_weights(stage1_folder, tmp_path):
    trainer = instruct(stage1_folder, tmp_path, generation_metrics=lambda records: {"words": float(len(records))})
    trainer.train()
    logs = trainer.summary()["eval"]
    assert [log["step"] for log in logs] == [2, 4]
    for log in logs:
        assert log.keys() >= WEIGHTS and log["eval_words"] == 4.0
        assert sum(log[name] for name in WEIGHTS) == pytest.approx(1, abs=1e-5)
        assert 0 <= log["eval_answer_match"] <= 1
    lines = lines_of(tmp_path)
    # spread over the rows; the last has no image and so no weights
    assert [(line["step"], line["row"]) for line in lines] == [(step, row) for step in (2, 4) for row in (0, 2, 4, 7)]
    assert [line["align_weights"] is None for line in lines[:4]] == [False, False, False, True]
    assert lines[0]["reference"] == "red" and lines[1]["reference"] == "blue"
    assert lines[0]["prompt"].endswith("what colour is it 0? ASSISTANT:") and "<image>" not in lines[0]["prompt"]


def test_the_answers_are_generates_own_and_the_match_is_exact(stage1_folder, tmp_path):
    """A model that has learned its rows by heart is found to."""
    rows = conversation_rows(8)
    trainer = instruct(stage1_folder, tmp_path, to_dataset(rows), eval_strategy="no", max_steps=60)
    trainer.train()
    metrics = trainer.evaluate()
    records = lines_of(tmp_path)
    assert metrics["eval_answer_match"] == sum(r["match"] for r in records) / 4 >= 0.5
    processor, model = trainer.processing_class, trainer.model.eval()
    for record in records:
        row = rows[record["row"]]
        prompt = processor.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        inputs = processor(images=row["images"] or None, text=prompt, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert record["answer"] == answer and record["match"] == (answer == record["reference"])
        if record["align_weights"] is not None:
            expected = model(**inputs).align_weights[0]
            torch.testing.assert_close(torch.tensor(record["align_weights"]), expected, rtol=1e-5, atol=1e-6)


def test_stage_1_captions_at_the_top_level(stage1_folder, tmp_path):
    args = settings(AlignGPTPretrainConfig, tmp_path, **EVALUATE, max_steps=2)
    rows = pair_rows(8)
    trainer = AlignGPTPretrainTrainer(str(stage1_folder), args, to_dataset(rows), eval_dataset=to_dataset(rows[:4]))
    trainer.train()
    log = trainer.summary()["eval"][0]
    assert "eval_answer_match" in log and not WEIGHTS & log.keys()
    lines = lines_of(tmp_path)
    assert [line["reference"] for line in lines] == [
        f"a {c} square number {i}" for i, c in enumerate(("red", "green", "blue", "yellow"))
    ]
    batch = trainer.data_collator(rows[:1])
    begin = int((batch["labels"][0] != -100).nonzero()[0])
    inputs = {"input_ids": batch["input_ids"][:, :begin], "pixel_values": batch["pixel_values"]}
    by_hand = trainer.model.eval().generate(**inputs, max_new_tokens=8, do_sample=False, align_level=NUM_LEVELS - 1)
    assert (
        lines[0]["answer"]
        == trainer.processing_class.tokenizer.decode(by_hand[0, begin:], skip_special_tokens=True).strip()
    )


def test_several_and_streamed_held_out_sets(stage1_folder, tmp_path):
    held_out = {"seen": to_dataset(conversation_rows(4)), "new": to_dataset(conversation_rows(6)).to_iterable_dataset()}
    trainer = instruct(stage1_folder, tmp_path, held_out, eval_generations=3, max_steps=2)
    trainer.train()
    keys = {key for log in trainer.summary()["eval"] for key in log}
    assert {"eval_seen_answer_match", "eval_new_answer_match", "eval_new_align_weight_0"} <= keys
    found = {
        name: [line["row"] for line in lines_of(tmp_path) if line["data"] == name] for name in ("eval_seen", "eval_new")
    }
    assert found == {"eval_seen": [0, 1, 3], "eval_new": [0, 1, 2]}


def test_the_model_trains_on_as_before(stage1_folder, tmp_path):
    """Generation leaves mode, settings and checkpointing alone."""
    trainer = instruct(stage1_folder, tmp_path, gradient_checkpointing=True)
    generation_config = trainer.model.generation_config.to_dict()
    trainer.model.train()
    generate_answers(trainer, trainer.eval_dataset, 2, 3)
    assert trainer.model.training and trainer.model.generation_config.to_dict() == generation_config
    assert trainer.model.model.language_model.gradient_checkpointing is False  # from `train` on
    trainer.train()
    assert trainer.state.global_step == 4


def test_the_file_of_a_run_that_goes_on(tmp_path):
    path = tmp_path / "generations.jsonl"
    for step in (2, 4, 6):
        append_records(path, [{"answer": f"Bär {step}"}], step=step)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 8, "ans')  # cut off
    forget_later_records(path, 4)
    assert [line["answer"] for line in lines_of(tmp_path)] == ["Bär 2", "Bär 4"]
    forget_later_records(path, 0)
    assert lines_of(tmp_path) == []
    forget_later_records(tmp_path / "none.jsonl", 3)
