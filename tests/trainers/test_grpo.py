"""Tuning by rewards: what the gate reads while answers are scored, what trains, and what is refused."""

import json

import pytest
import torch
from datasets import Dataset
from demo_model import save_demo_model
from PIL import Image as PILImage

from aligngpt_trainers import AlignGPTGRPOConfig, AlignGPTGRPOTrainer
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_demo_model(tmp_path_factory.mktemp("grpo") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "training_stage": "instruct"}))
    return folder


def rows(number: int = 4) -> Dataset:
    gray = PILImage.linear_gradient("L").resize((64, 64)).convert("RGB")
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"what is in picture {i}?"}],
                "images": [gray.rotate(30 * i)],
            }
            for i in range(number)
        ]
    )


def shorter(completions, **kwargs) -> list[float]:
    return [-float(len(completion[0]["content"])) for completion in completions]


def trainer_for(folder, path, dataset=None, **more) -> AlignGPTGRPOTrainer:
    values = {"use_cpu": True, "report_to": [], "save_strategy": "no", "per_device_train_batch_size": 4}
    values |= {"num_generations": 2, "max_completion_length": 6, "max_steps": 1, "logging_steps": 1, "beta": 0.0}
    config = AlignGPTGRPOConfig(str(path), **{**values, **more})
    model = AlignGPTForConditionalGeneration.from_pretrained(folder)
    return AlignGPTGRPOTrainer(
        model,
        shorter,
        config,
        rows() if dataset is None else dataset,
        processing_class=AlignGPTProcessor.from_pretrained(folder),
    )


def test_scored_answers_are_read_as_they_were_made(folder, tmp_path):
    """In every forward pass with labels the gate sees the prompt alone, and gives generation's weights."""
    trainer = trainer_for(folder, tmp_path)
    seen, asked = [], []

    def note(module, args, kwargs):
        if kwargs.get("labels") is not None:
            asked.append(kwargs)

    def keep(module, args, kwargs, output):
        if len(seen) < len(asked):
            seen.append((asked[-1], kwargs["prompt_mask"], output.align_weights.detach()))

    # TRL's fused head replaces the model's own forward, and hands everything else to the inner model
    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.model.model.register_forward_hook(keep, with_kwargs=True)
    trainer.train()
    assert seen
    for kwargs, read, _ in seen:
        labels, mask = kwargs["labels"], kwargs["attention_mask"].bool()
        assert torch.equal(read.bool(), (labels == -100) & mask)
    # weights of the prompt alone, by the model as it was loaded: the first pass is before any step
    kwargs, _, weights = seen[0]
    prompt = (kwargs["labels"] == -100) & kwargs["attention_mask"].bool()
    model = AlignGPTForConditionalGeneration.from_pretrained(folder).eval()
    for row in range(len(weights)):
        ids = kwargs["input_ids"][row][prompt[row]][None]
        alone = model(input_ids=ids, pixel_values=kwargs["pixel_values"][row : row + 1]).align_weights
        torch.testing.assert_close(weights[row : row + 1], alone, atol=1e-5, rtol=0)


def test_the_modules_of_stage_2_train(folder, tmp_path):
    trainer = trainer_for(folder, tmp_path, learning_rate=1e-3, max_steps=2)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert any("language_model" in name for name in moved)
    assert not [name for name in moved if "vision_tower" in name or "align_embeddings" in name]
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert log and all(entry["reward"] <= 0 for entry in log)


def test_what_cannot_be_tuned_is_refused(folder, tmp_path):
    answered = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
    gray = PILImage.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="Row 0: its prompt holds an answer"):
        trainer_for(folder, tmp_path, Dataset.from_list([{"prompt": answered, "images": [gray]}]))
    model = AlignGPTForConditionalGeneration.from_pretrained(folder)
    model.config.training_stage = "pretrain"
    config = AlignGPTGRPOConfig(
        str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=4, num_generations=2
    )
    processor = AlignGPTProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="stage 1 alone"):
        AlignGPTGRPOTrainer(model, shorter, config, rows(), processing_class=processor)
    with pytest.raises(ValueError, match="processing_class is missing"):
        AlignGPTGRPOTrainer(model, shorter, config, rows())
