"""A stage built without its weights, on the meta device: enough for rows, tokens and memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import add_placeholder_tokens, padded_vocabulary_size
from modeling_aligngpt.chat_templates import select_chat_template

from .arguments import ModelArguments, PretrainModelArguments


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
    rows = train._rows(
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
    revision = getattr(args, "language_model_revision", None)
    tokenizer = AutoTokenizer.from_pretrained(args.language_model, revision=revision)
    text_config = AutoConfig.from_pretrained(args.language_model, revision=revision)
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(text_config).get_output_embeddings()
    text_config = text_config.get_text_config()
    vision_config = AutoConfig.from_pretrained(args.vision_tower, revision=getattr(args, "vision_tower_revision", None))
    vision_config = getattr(vision_config, "vision_config", vision_config)
    image_token_id, align_token_id = add_placeholder_tokens(tokenizer)
    text_config.vocab_size = max(padded_vocabulary_size(len(tokenizer)), text_config.vocab_size)
    overrides = dict(args.config_overrides or {})
    if args.num_align_levels is not None:
        overrides["num_align_levels"] = args.num_align_levels
    if "siglip" in vision_config.model_type:
        overrides.setdefault("vision_feature_select_strategy", "full")
    config = AlignGPTConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        align_token_id=align_token_id,
        lm_head_bias=head.bias is not None,
        **{"align_mode": "level", **overrides},
    )
    template = CHAT_TEMPLATES[args.chat_template or select_chat_template(tokenizer)]
    processor = AlignGPTProcessor.from_parts(
        tokenizer, config, vision_tower=args.vision_tower, chat_template=template, do_pad=False
    )
    return _empty(config, args.dtype), processor
