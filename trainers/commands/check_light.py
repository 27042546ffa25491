"""A stage built without its weights, on the meta device: enough for rows, tokens and memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import plan
from modeling_aligngpt.new_processor import processor_from_parts

from .arguments import ModelArguments, PretrainModelArguments
from .init import checked_overrides


if TYPE_CHECKING:
    from .train import StageRun


def build_light(stage: str, argv: Sequence[str], prog: str) -> "StageRun":
    """As [`~train.build_stage`], but no weights are read; the trainer can do everything but run its model."""
    from . import train

    trainer_class, kinds, description = train.STAGES[stage]
    model_args, data_args, config = train.parse_settings(prog, kinds, argv, description)
    train._check_run(stage, model_args, data_args, config)
    if train._is_fresh(stage, model_args):
        model, processor = _assemble(model_args)
    else:
        model, processor = _load(model_args)
    streaming = {"streaming": True, "shuffle_buffer": data_args.shuffle_buffer, "seed": config.seed}
    rows = train.rows_of(
        data_args, data_args.dataset, data_args.dataset_split, **(streaming if data_args.streaming else {})
    )
    adapter = train.lora_config(model_args, model)
    trainer = trainer_class(model, config, rows, processing_class=processor, peft_config=adapter)
    return train.StageRun(trainer, config, model_args, data_args, {})


def _empty(config: AlignGPTConfig, dtype: str) -> AlignGPTForConditionalGeneration:
    with torch.device("meta"):
        model = AlignGPTForConditionalGeneration(config)
    model.tie_weights()
    model.hf_device_map = {"": "meta"}  # as after loading there: the trainer does not move it then
    return model.to(getattr(torch, dtype))


def _load(args: ModelArguments) -> tuple[AlignGPTForConditionalGeneration, AlignGPTProcessor]:
    config = AlignGPTConfig.from_pretrained(args.model, revision=args.model_revision)
    return _empty(config, args.dtype), AlignGPTProcessor.from_pretrained(args.model, revision=args.model_revision)


def _assemble(args: PretrainModelArguments) -> tuple[AlignGPTForConditionalGeneration, AlignGPTProcessor]:
    """The config that [`assemble`] would make, from the parts' configs and tokenizer alone."""
    overrides = checked_overrides(args.config_overrides)
    if args.num_align_levels is not None:
        overrides["num_align_levels"] = args.num_align_levels
    config, tokenizer, template = plan(
        args.language_model,
        args.vision_tower,
        language_model_revision=args.language_model_revision,
        vision_tower_revision=args.vision_tower_revision,
        chat_template=args.chat_template,
        **overrides,
    )
    processor = processor_from_parts(
        tokenizer, config, vision_tower=args.vision_tower, chat_template=CHAT_TEMPLATES[template], do_pad=False
    )
    return _empty(config, args.dtype), processor
