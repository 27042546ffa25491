"""What stops a run: losses and gradients that are not finite, with the rows named and the weights kept."""

import re

import pytest
import torch
from stage_parts import conversation_rows, message, moved, pair_rows, settings, snapshot, to_dataset
from transformers import TrainerCallback

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)
from aligngpt_trainers.guards import NonFiniteError, take_row
from modeling_aligngpt import AlignGPTForConditionalGeneration


BAD_WORD = "q"


def poison_word(model, processor, word: str = BAD_WORD):
    """Every row that holds the word has an infinite embedding in it."""
    (token,) = processor.tokenizer(word, add_special_tokens=False)["input_ids"]
    model.get_input_embeddings().weight.data[token] = float("inf")


def rows_with_bad_word(number: int, *bad: int) -> list[dict]:
    rows = conversation_rows(number)
    for index in bad:
        rows[index]["messages"] = [message("user", f"name it {BAD_WORD} {BAD_WORD}"), message("assistant", "red")]
        rows[index]["images"] = []
    return rows


@pytest.mark.parametrize("steps", [1, 2])
def test_stage_1_names_the_rows_of_a_nan(assembled, tmp_path, steps):
    """The rows with the word, of the batch they came in, and no others."""
    model, processor = assembled
    poison_word(model, processor)
    rows = pair_rows(16)
    bad = (3, 6, 12)
    for index in bad:
        rows[index]["messages"][1] = message("assistant", f"a {BAD_WORD} {BAD_WORD}")
    trainer = AlignGPTPretrainTrainer(
        model,
        settings(
            AlignGPTPretrainConfig,
            tmp_path,
            per_device_train_batch_size=8 // steps,
            gradient_accumulation_steps=steps,
            train_sampling_strategy="sequential",
        ),
        to_dataset(rows),
        processing_class=processor,
    )
    before = snapshot(model)
    with pytest.raises(
        NonFiniteError, match=r"The loss is NaN or infinite at step 1: .* no complete checkpoint yet"
    ) as error:
        trainer.train()
    named = re.findall(r"row (\d+)", str(error.value))
    assert named == [str(index) for index in bad if index < 8 // steps]
    # nan equals nan nowhere
    changed = {
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(before[name].nan_to_num(), tensor.nan_to_num())
    }
    assert not changed


def test_stage_2_names_ids_and_keeps_the_last_checkpoint(stage1_folder, tmp_path):
    dataset = to_dataset(rows_with_bad_word(16, 10)).add_column("id", [f"item-{index}" for index in range(16)])
    args = settings(
        AlignGPTInstructConfig,
        tmp_path,
        group_by="none",
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
    )
    trainer = AlignGPTInstructTrainer(str(stage1_folder), args, dataset)
    poison_word(trainer.model, trainer.processing_class)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    assert re.search(r"at step 3: .*It comes from: row 10 \(id 'item-10'\)\. ", str(error.value))
    assert "last complete checkpoint is checkpoint-2" in str(error.value)
    assert "resume_from_checkpoint=auto" in str(error.value)
    saved = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    # what was saved is what the stopped trainer still holds: the third step changed nothing
    infinite = {name for name, tensor in saved.items() if not tensor.isfinite().all()}
    assert infinite == {"model.language_model.embed_tokens.weight"}
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, saved[name])


def test_rows_of_unknown_place_are_named_by_their_answer(stage1_folder, tmp_path):
    args = settings(AlignGPTInstructConfig, tmp_path)
    trainer = AlignGPTInstructTrainer(str(stage1_folder), args, to_dataset(conversation_rows(4)))
    poison_word(trainer.model, trainer.processing_class)
    batch = trainer.data_collator(rows_with_bad_word(6, 1))
    assert "row_index" not in batch
    with pytest.raises(NonFiniteError, match="It comes from: the row with the answer ' red</s>'"):
        trainer.compute_loss(trainer.model.train(), batch)


def test_a_gradient_that_is_not_finite_stops_too(assembled, pairs, tmp_path):
    """The loss is finite, its gradient is not: all rows of the step are named."""

    class Poison(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            raise AssertionError("the optimizer would step")

    model, processor = assembled
    args = settings(AlignGPTPretrainConfig, tmp_path, train_sampling_strategy="sequential")
    trainer = AlignGPTPretrainTrainer(model, args, pairs, processing_class=processor, callbacks=[Poison()])
    model.model.multi_modal_projector.linear_2.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=r"gradient is NaN or infinite.*: row 0; row 1; row 2; row 3\. "):
        trainer.train()


def test_a_healthy_run_is_not_stopped(assembled, pairs, tmp_path):
    model, processor = assembled
    trainer = AlignGPTPretrainTrainer(
        model, settings(AlignGPTPretrainConfig, tmp_path), pairs, processing_class=processor
    )
    before = snapshot(model)
    trainer.train()
    assert moved(before, model) == {"multi_modal_projector", "align_embeddings"}
    assert trainer.finite_guard.batches == []


def test_a_row_of_a_batch_alone(stage1_folder, conversations, tmp_path):
    trainer = AlignGPTInstructTrainer(str(stage1_folder), settings(AlignGPTInstructConfig, tmp_path), conversations)
    rows = conversation_rows(5)
    batch = trainer.data_collator(rows)
    for index, row in enumerate(rows):
        alone, taken = trainer.data_collator([row]), take_row(batch, index, trainer.model.config)
        assert ("pixel_values" in taken) == bool(row["images"])
        if row["images"]:
            assert torch.equal(taken["pixel_values"], alone["pixel_values"])
        assert torch.equal(taken["input_ids"][:, : alone["input_ids"].shape[1]], alone["input_ids"])
        torch.testing.assert_close(trainer.model(**taken).loss, trainer.model(**alone).loss, rtol=1e-5, atol=1e-6)
