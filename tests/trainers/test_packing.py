"""Rows packed for the language model: losses and gradients are those of the padded batch, row by row and run by run."""

import json

import pytest
import torch
from safetensors.torch import load_file
from stage_parts import conversation_rows, pair_rows, settings, to_dataset
from transformers import AutoConfig

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)
from aligngpt_trainers.commands import cli
from aligngpt_trainers.packing import RowPacking, check_packing, lay_out
from modeling_aligngpt import AlignGPTForConditionalGeneration


STAGES = {
    "pretrain": (AlignGPTPretrainTrainer, AlignGPTPretrainConfig, pair_rows),
    "instruct": (AlignGPTInstructTrainer, AlignGPTInstructConfig, conversation_rows),
}


def trainer_of(stage, folder, output, **overrides):
    kind, config, rows = STAGES[stage]
    overrides = {"max_steps": 3, "per_device_train_batch_size": 6, **overrides}
    return kind(str(folder), settings(config, output, **overrides), to_dataset(rows(12)))


def test_every_row_has_one_place_and_lines_are_of_like_length():
    generator = torch.Generator().manual_seed(0)
    for rows in (2, 7, 16):
        lengths = torch.randint(1, 50, (rows,), generator=generator).tolist()
        lines = lay_out(lengths, -(-rows // 2))
        assert sorted(row for line in lines for row in line) == list(range(rows))
        loads = [sum(lengths[row] for row in line) for line in lines]
        assert max(loads) - min(loads) <= max(lengths)
        assert lay_out(lengths, 1) == [sorted(range(rows), key=lambda row: -lengths[row])]


@pytest.mark.parametrize("one_line", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_losses_of_rows_and_gradients_are_those_of_the_padded_batch(stage, stage1_folder, tmp_path, one_line):
    trainer = trainer_of(stage, stage1_folder, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(6)])
    batch.pop("row_index", None)
    assert (batch["attention_mask"] == 0).any() and ("pixel_values" in batch)
    model = trainer.model.train()

    def run():
        model.zero_grad()
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        by_row = losses.sum(1) / (labels != -100).sum(1)
        by_row.sum().backward()
        gradients = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
        return by_row.detach(), gradients

    expected, gradients = run()
    packing = RowPacking(model.model.language_model, one_line)
    found, packed_gradients = run()
    assert packing.positions[0] < packing.positions[1], "nothing was packed"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert packed_gradients.keys() == gradients.keys() and gradients
    for name, value in gradients.items():
        torch.testing.assert_close(packed_gradients[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_packed_run_is_the_padded_run(stage, stage1_folder, tmp_path, checkpointing):
    runs = {}
    for name, packed in (("padded", False), ("packed", True)):
        trainer = trainer_of(
            stage,
            stage1_folder,
            tmp_path / name,
            pack_rows=packed,
            gradient_checkpointing=checkpointing,
            optim="sgd",
            logging_steps=1,
        )
        trainer.train()
        trainer.save_final()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs[name] = log, load_file(tmp_path / name / "model.safetensors")
    assert all("positions_left" not in entry for entry in runs["padded"][0])
    assert all(0.3 < entry["positions_left"] < 1 for entry in runs["packed"][0])
    losses = [[entry["loss"] for entry in log] for log, _ in runs.values()]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # what is watched sees the batch as it is
    gates = [[entry.get("padding") for entry in log] for log, _ in runs.values()]
    assert gates[0] == gates[1]
    for name, value in runs["padded"][1].items():
        torch.testing.assert_close(runs["packed"][1][name], value, rtol=0, atol=1e-6, msg=name)


def test_a_batch_without_padding_and_evaluation_stay_as_they_are(stage1_folder):
    model = AlignGPTForConditionalGeneration.from_pretrained(stage1_folder)
    packing = RowPacking(model.model.language_model, one_line=False)
    ids = torch.tensor([[1, 7, 8, 9], [1, 9, 8, 7]])
    mask = torch.ones_like(ids)
    model.train()
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    mask[1, 2:] = 0
    model.eval()
    evaluated = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert packing.positions == [8, 8] and whole.shape == evaluated.shape


def test_families_that_cannot_be_packed_are_refused(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    check_packing(AutoConfig.for_model("llama", **sizes, intermediate_size=48))
    # positions by distance, whatever the position ids say
    with pytest.raises(ValueError, match="pack_rows: bloom does not keep rows of a line apart"):
        check_packing(AutoConfig.for_model("bloom", **sizes))
    with pytest.raises(ValueError, match="leave out torch_compile"):
        settings(AlignGPTInstructConfig, tmp_path, pack_rows=True, torch_compile=True)
    with pytest.raises(ValueError, match=r"padding_free=True has no effect here.*pack_rows"):
        settings(AlignGPTInstructConfig, tmp_path, padding_free=True)


def test_the_command_takes_it(tmp_path, stage1_folder):
    to_dataset(conversation_rows(8)).save_to_disk(tmp_path / "rows")
    words = ["instruct", f"--model={stage1_folder}", f"--dataset={tmp_path / 'rows'}", "--max_length=512"]
    words += [f"--output_dir={tmp_path / 'out'}", "--max_steps=2", "--pack_rows", "--use_cpu", "--bf16=false"]
    words += [
        "--per_device_train_batch_size=4",
        "--logging_steps=1",
        "--gradient_checkpointing=false",
        "--report_to=none",
    ]
    assert cli.main(words) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["positions_left"] < 1 for entry in history if "loss" in entry] == [True, True]
