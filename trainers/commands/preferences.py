"""`aligngpt dpo` and `aligngpt grpo`: a model after stage 2 learns from preference pairs, or from rewards."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aligngpt_shared.locks import lock, lock_of
from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor

from ..lora import lora_config
from ..preferences.dpo_config import AlignGPTDPOConfig
from ..preferences.dpo_trainer import AlignGPTDPOTrainer
from ..preferences.grpo import AlignGPTGRPOConfig, AlignGPTGRPOTrainer
from ..preferences.pairs import load_preferences, load_prompts
from ..preferences.rewards import load_reward
from .arguments import ModelArguments
from .settings import parse_settings


@dataclass
class PreferenceArguments:
    """Where the preference pairs come from; see [`~pairs.load_preferences`]."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Pairs: JSON(L) or parquet file, folder of `save_to_disk`, or Hub id. Required."},
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split; default: train, or the only one."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub data set."})
    image_folder: str | None = field(
        default=None, metadata={"help": "What relative image paths start from; default: the folder of the file."}
    )


@dataclass
class RewardArguments:
    """What answers are rewarded for; see [`~rewards.load_reward`]."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["judge"],
        metadata={
            "help": "Rewards, added up: judge (experimental: the mean level that reward_model gives the answer), "
            "exact_match (with the row's `answer`), or dotted paths of functions."
        },
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "The judge: an AlignGPT after stage 1, folder or Hub id."}
    )


def dpo_command(argv: Sequence[str]) -> None:
    """
    `aligngpt dpo`. The model folder is written as `aligngpt instruct` writes it.

    Raises:
        ValueError: unusable settings, model or pairs.
    """
    kinds = (ModelArguments, PreferenceArguments, AlignGPTDPOConfig)
    model_args, data_args, config = parse_settings(
        "aligngpt dpo", kinds, argv, "Tune a model on preference pairs (DPO), from the output of `aligngpt instruct`."
    )
    _check(model_args, data_args, config)
    rows = load_preferences(data_args.dataset, **_where(data_args), num_align_levels=_num_align_levels(model_args))
    model, processor = _load(model_args)
    trainer = AlignGPTDPOTrainer(
        model, config, rows, processing_class=processor, peft_config=lora_config(model_args, model)
    )
    _train(trainer, config)
    if config.should_log:
        logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        change = f"loss {logs[0]:.3f} -> {logs[-1]:.3f}, " if logs else ""
        _tell("dpo", f"{len(rows):,} pairs, {trainer.state.global_step} steps, {change}", config)


def grpo_command(argv: Sequence[str]) -> None:
    """
    `aligngpt grpo`. The model folder is written as `aligngpt instruct` writes it.

    Raises:
        ValueError: unusable settings, model, prompts or rewards.
    """
    kinds = (ModelArguments, PreferenceArguments, RewardArguments, AlignGPTGRPOConfig)
    model_args, data_args, reward_args, config = parse_settings(
        "aligngpt grpo",
        kinds,
        argv,
        "Tune a model by rewards of its answers (GRPO), from the output of `instruct`.",
    )
    _check(model_args, data_args, config)
    device = config.device
    rewards = [load_reward(name, reward_args.reward_model, device) for name in reward_args.reward_funcs]
    rows = load_prompts(data_args.dataset, **_where(data_args), num_align_levels=_num_align_levels(model_args))
    if "exact_match" in reward_args.reward_funcs and "answer" not in rows.column_names:
        raise ValueError(f"reward_funcs: exact_match needs rows with `answer`, which {data_args.dataset} lacks.")
    model, processor = _load(model_args)
    trainer = AlignGPTGRPOTrainer(
        model, rewards, config, rows, processing_class=processor, peft_config=lora_config(model_args, model)
    )
    _train(trainer, config)
    if config.should_log:
        logs = [log["reward"] for log in trainer.state.log_history if "reward" in log]
        change = f"reward {logs[0]:.3f} -> {logs[-1]:.3f}, " if logs else ""
        _tell("grpo", f"{len(rows):,} prompts, {trainer.state.global_step} steps, {change}", config)


def _check(model_args: ModelArguments, data_args: PreferenceArguments, config: Any) -> None:
    for name, value in (("model", model_args.model), ("dataset", data_args.dataset)):
        if not value:
            raise ValueError(f"{name} is missing: give --{name}.")
    output = Path(config.output_dir)
    if (output / "config.json").exists() or (output / "adapter_config.json").exists():
        raise ValueError(f"output_dir {output} holds a finished model: choose another one.")


def _num_align_levels(model_args: ModelArguments) -> int:
    """By the config alone: rows are checked before any weights are read."""
    return AlignGPTConfig.from_pretrained(model_args.model, revision=model_args.model_revision).num_align_levels


def _load(model_args: ModelArguments) -> tuple[AlignGPTForConditionalGeneration, AlignGPTProcessor]:
    dtype = getattr(torch, model_args.dtype)
    model = AlignGPTForConditionalGeneration.from_pretrained(
        model_args.model, revision=model_args.model_revision, dtype=dtype
    )
    return model, AlignGPTProcessor.from_pretrained(model_args.model, revision=model_args.model_revision)


def _where(data_args: PreferenceArguments) -> dict[str, Any]:
    return {
        "split": data_args.dataset_split,
        "name": data_args.dataset_config,
        "revision": data_args.dataset_revision,
        "image_folder": data_args.image_folder,
    }


def _train(trainer: Any, config: Any) -> None:
    output = Path(config.output_dir)
    with lock(lock_of(output)):
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        trainer.save_model(str(output))


def _tell(command: str, done: str, config: Any) -> None:
    output = config.output_dir
    print(f"{command}: {done}saved to {output}\nNext: aligngpt chat --model {output} --image IMAGE", flush=True)
