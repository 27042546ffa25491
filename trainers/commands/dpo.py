"""`aligngpt dpo`: preference tuning of a model after stage 2."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from aligngpt_shared.locks import lock, lock_of
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

from ..dpo_config import AlignGPTDPOConfig
from ..dpo_trainer import AlignGPTDPOTrainer
from ..lora import lora_config
from ..preferences import load_preferences
from .arguments import ModelArguments
from .settings import parse_settings


@dataclass
class PreferenceArguments:
    """Where the preference pairs come from; see [`~preferences.load_preferences`]."""

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
    for name, value in (("model", model_args.model), ("dataset", data_args.dataset)):
        if not value:
            raise ValueError(f"{name} is missing: give --{name}.")
    output = Path(config.output_dir)
    if (output / "config.json").exists() or (output / "adapter_config.json").exists():
        raise ValueError(f"output_dir {output} holds a finished model: choose another one.")
    dtype = getattr(torch, model_args.dtype)
    model = AlignGPTForConditionalGeneration.from_pretrained(
        model_args.model, revision=model_args.model_revision, dtype=dtype
    )
    processor = AlignGPTProcessor.from_pretrained(model_args.model, revision=model_args.model_revision)
    rows = load_preferences(
        data_args.dataset,
        split=data_args.dataset_split,
        name=data_args.dataset_config,
        revision=data_args.dataset_revision,
        image_folder=data_args.image_folder,
        num_align_levels=model.config.num_align_levels,
    )
    trainer = AlignGPTDPOTrainer(
        model, config, rows, processing_class=processor, peft_config=lora_config(model_args, model)
    )
    with lock(lock_of(output)):
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        trainer.save_model(str(output))
    if config.should_log:
        logs = [log for log in trainer.state.log_history if "loss" in log]
        change = f"loss {logs[0]['loss']:.3f} -> {logs[-1]['loss']:.3f}, " if logs else ""
        print(f"dpo: {len(rows):,} pairs, {trainer.state.global_step} steps, {change}saved to {output}", flush=True)
