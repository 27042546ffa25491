"""Tuning by rewards: what the gate reads while answers are scored, what trains, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from demo_model import save_demo_model
from PIL import Image as PILImage

from aligngpt_trainers import AlignGPTGRPOConfig, AlignGPTGRPOTrainer, JudgeReward, load_prompts
from aligngpt_trainers.commands import cli
from aligngpt_trainers.lora import LoraArguments, lora_config
from aligngpt_trainers.preferences.rewards import exact_match, load_reward
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


def trainer_for(folder, path, dataset=None, lora=False, **more) -> AlignGPTGRPOTrainer:
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
        peft_config=lora_config(LoraArguments(use_peft=lora), model),
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


def test_the_model_before_is_read_alike(folder, tmp_path):
    """With a price on leaving it: before any step nothing has been left, whatever the gate could have read."""
    trainer = trainer_for(folder, tmp_path, beta=0.1, num_iterations=2, max_steps=4, learning_rate=1e-3)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert abs(kl[0]) < 1e-6 < max(kl[1:]), kl


@pytest.mark.parametrize("lora", [False, True])
def test_levels_of_rows_reach_answers_and_their_scores(folder, tmp_path, lora):
    """Through TRL's shuffles and splits each row keeps its level: in generation, in scoring, in every training step."""
    levels = [0, 3, 7, 5]
    data = rows().add_column("align_level", levels)
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_iterations": 2}
    trainer = trainer_for(folder, tmp_path, data, lora, beta=0.1, **steps)
    level_of = {}
    for row in range(4):
        text = trainer.processing_class.apply_chat_template(data[row]["prompt"], add_generation_prompt=True)
        number = trainer.processing_class.tokenizer(f"picture {row}?", add_special_tokens=False)["input_ids"]
        assert f"picture {row}?" in text
        level_of[tuple(number)] = levels[row]

    def expected(ids: list[int]) -> int:
        found = [
            level
            for number, level in level_of.items()
            if any(tuple(ids[at : at + len(number)]) == number for at in range(len(ids)))
        ]
        assert len(found) == 1
        return found[0]

    made, scored = [], []
    generate = trainer.model.generate

    def note_generation(**kwargs):
        made.extend(zip(kwargs["input_ids"].tolist(), kwargs["align_level"].tolist(), strict=True))
        return generate(**kwargs)

    def note_scoring(module, args, kwargs):
        if kwargs.get("labels") is not None:
            scored.extend(zip(kwargs["input_ids"].tolist(), kwargs["align_level"].tolist(), strict=True))

    trainer.model.generate = note_generation
    # behind the hook that hands levels over
    base = trainer.model.get_base_model() if lora else trainer.model
    base.register_forward_pre_hook(note_scoring, with_kwargs=True)
    trainer.train()
    assert len(made) == 8 and len(scored) > 8
    assert [level for _, level in made] == [expected(ids) for ids, _ in made]
    assert [level for _, level in scored] == [expected(ids) for ids, _ in scored]
    assert {level for _, level in scored} == set(levels)


def test_levels_that_the_model_lacks_are_refused(folder, tmp_path):
    for levels, message in (
        ([0, 8, 0, 0], "Row 1: align_level is 8; the model has 0 to 7"),
        ([0, 1, 2, None], "Row 3"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_for(folder, tmp_path, rows().add_column("align_level", levels))
    with pytest.raises(ValueError, match="leave use_vllm"):
        trainer_for(folder, tmp_path, rows().add_column("align_level", [0] * 4), use_vllm=True)


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


def prompts(tmp_path, number: int = 4, **more) -> str:
    written = []
    for i in range(number):
        PILImage.linear_gradient("L").resize((64, 64)).convert("RGB").rotate(20 * i).save(tmp_path / f"{i}.png")
        written.append({"image": f"{i}.png", "question": f"what is in picture {i % 2}?", **more})
    (tmp_path / "prompts.json").write_text(json.dumps(written))
    return str(tmp_path / "prompts.json")


@pytest.mark.parametrize("reads_prompt", [False, True])
def test_the_judge_rewards_as_the_command_judges(folder, tmp_path, reads_prompt):
    """Each answer's reward is the mean level of `judge` for it alone; an empty answer gets nothing."""
    if reads_prompt:
        shutil.copytree(folder, folder := tmp_path / "by-level")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "align_mode": "level"}))
    judge = JudgeReward(str(folder))
    assert judge.reads_prompt is reads_prompt
    data = load_prompts(prompts(tmp_path))
    texts = ["a whale", "", "three robots in the snow", "a cat and a dog"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = judge(prompts=data["prompt"], completions=completions, images=data["images"], trainer_state=None)
    processor = AlignGPTProcessor.from_pretrained(folder)
    model = AlignGPTForConditionalGeneration.from_pretrained(folder).eval()
    for row, text in enumerate(texts):
        if text:
            question = f"what is in picture {row % 2}?" if reads_prompt else None
            alone = model.judge(**processor.judge_inputs(data[row]["images"], [text], question)).mean_level.item() / 7
            assert rewards[row] == pytest.approx(alone, abs=1e-5)
    assert rewards[1] == 0 and len({round(reward, 6) for reward in rewards}) > 2
    assert exact_match(completions, [" a whale ", "x", "robots", "a cat and a dog"]) == [1.0, 0.0, 0.0, 1.0]


def test_the_command_trains_by_the_judge(folder, tmp_path, capsys):
    words = f"grpo --model {folder} --dataset {prompts(tmp_path)} --output_dir {tmp_path / 'out'} --use_cpu true"
    words += f" --reward_model {folder} --max_steps 2 --per_device_train_batch_size 4 --num_generations 2"
    words += " --max_completion_length 6 --save_strategy no --report_to none --logging_steps 1 --learning_rate 1e-3"
    assert cli.main(words.split()) == 0, capsys.readouterr().err
    assert "grpo: 4 prompts, 2 steps, reward 0." in capsys.readouterr().out
    again = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "out")
    before = AlignGPTForConditionalGeneration.from_pretrained(folder)
    assert not torch.equal(again.lm_head.weight, before.lm_head.weight)
    assert cli.main(words.split()) == 2
    assert "holds a finished model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "row 1: found image; a prompt is"),
        ({"question": [{"role": "assistant", "content": "a cat"}]}, "row 1: the prompt is not one message of the user"),
        ({"image": "gone.png"}, "row 1: no such image file .*gone.png.*image_folder"),
        ({"image": None}, "row 1: no image"),
        ({"answer": "a cat"}, "row 0: no answer, which other rows have"),
        ({"align_level": 3}, "row 0: no align_level, which other rows have"),
        ({"align_level": 8}, "row 1: align_level is 8, which the model does not have"),
    ],
)
def test_bad_prompts_are_named(change, message, tmp_path):
    path = Path(prompts(tmp_path))
    written = json.loads(path.read_text())
    written[1] = {key: value for key, value in {**written[1], **change}.items() if value is not None}
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=message):
        load_prompts(str(path), num_align_levels=8)


def test_rewards_are_found_by_name():
    assert load_reward("exact_match", None) is exact_match
    assert load_reward("os.path.basename", None)("a/b") == "b"
    for name, message in (("fame", "no 'fame'"), ("os.gone", "cannot be imported"), ("judge", "give --reward_model")):
        with pytest.raises(ValueError, match=message):
            load_reward(name, None)
