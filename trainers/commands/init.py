"""`aligngpt init`: a fresh model from a language model and a vision tower, saved as a folder like any other."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from aligngpt_shared.files import new_folder
from aligngpt_shared.weights import read_weights
from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import assemble

from ..storage.folders import at_revision, local_copy
from .arguments import DTYPES
from .settings import nearest, parse_settings


@dataclass
class InitArguments:
    """`aligngpt init`."""

    llm: str = field(
        metadata={
            "aliases": ["--language_model", "--language-model"],
            "help": "Causal language model with its tokenizer: folder or Hub id.",
        }
    )
    vision_tower: str = field(metadata={"help": "CLIP or SigLIP model, or a vision tower: folder or Hub id."})
    output: str = field(metadata={"help": "Folder for the fresh model; must not exist."})
    llm_revision: str | None = field(
        default=None,
        metadata={
            "aliases": ["--language_model_revision", "--language-model-revision"],
            "help": "Revision of a language model on the Hub.",
        },
    )
    vision_tower_revision: str | None = field(default=None, metadata={"help": "Revision of a vision tower on the Hub."})
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": f"Conversation format: {', '.join(CHAT_TEMPLATES)}. Default: recognised from the language model."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Pixels of an image's side, a multiple of the tower's patches: fewer are fewer tokens. The tower's "
            "position embeddings are interpolated. Default: the tower's own size."
        },
    )
    num_align_levels: int = field(default=8, metadata={"help": "Size of the level table (paper: 8)."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the saved weights.", "choices": list(DTYPES)})
    config_overrides: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'More fields of AlignGPTConfig, such as {"vision_scales": [1, 2, 3]}.'}
    )
    seed: int = field(default=0, metadata={"help": "Of projector, level table and gate."})


def checked_overrides(overrides: dict[str, Any] | str | None) -> dict[str, Any]:
    """
    Fields of AlignGPTConfig that a user may set for a fresh model; the config itself takes any name without a word.

    Args:
        overrides: a mapping, or on the command line its text in YAML or JSON.

    Raises:
        ValueError: no mapping, or a name that is none of the fields.
    """
    if isinstance(overrides, str):
        text = overrides
        try:
            overrides = yaml.safe_load(text)
        except yaml.YAMLError:
            overrides = text
        if not isinstance(overrides, dict):
            raise ValueError(f"config_overrides: expected a mapping such as '{{gate_hidden_size: 128}}', not {text!r}.")
    set_by_assembly = {"self", "vision_config", "text_config", "image_token_id", "align_token_id", "kwargs"}
    known = [name for name in inspect.signature(AlignGPTConfig.__init__).parameters if name not in set_by_assembly]
    for name in overrides or {}:
        if name not in known:
            raise ValueError(f"config_overrides: unknown field {name!r}{nearest(name, known)}.")
    return dict(overrides or {})


def init_command(argv: Sequence[str]) -> None:
    """
    `aligngpt init`: assembles, saves and describes a fresh model.

    Raises:
        ValueError: unusable settings, parts that do not go together, or an `output` that exists.
    """
    (args,) = parse_settings(
        "aligngpt init",
        (InitArguments,),
        argv,
        "Assemble a fresh model from a language model and a vision tower: weights, placeholder tokens, templates.",
    )
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype={args.dtype!r} is not one of {', '.join(DTYPES)}.")
    llm = at_revision(args.llm, args.llm_revision, "llm")
    tower = at_revision(args.vision_tower, args.vision_tower_revision, "vision_tower")
    with new_folder(args.output) as beside:
        try:
            model, processor = assemble(
                llm,
                tower,
                chat_template=args.chat_template,
                image_size=args.image_size,
                num_align_levels=args.num_align_levels,
                dtype=getattr(torch, args.dtype),
                seed=args.seed,
                **checked_overrides(args.config_overrides),
            )
        except SafetensorError:
            for part in (llm, tower):
                read_weights(local_copy(part))  # says which file
            raise
        model.save_pretrained(beside, max_shard_size="5GB")
        processor.save_pretrained(beside)
    print(describe_model(model, processor))
    print(f"saved to {args.output}\nNext: aligngpt pretrain --model {args.output} --dataset SCORED --output_dir OUT")


def describe_model(model: AlignGPTForConditionalGeneration, processor: AlignGPTProcessor) -> str:
    """Sizes of the parts, chat template and image tokens of a model, in a few lines."""
    config, inner = model.config, model.model
    parts = {
        f"language model ({config.text_config.model_type})": [inner.language_model, model.lm_head],
        f"vision tower ({config.vision_config.model_type})": [inner.vision_tower],
        "projector": [inner.multi_modal_projector],
        "level embeddings": [inner.align_embeddings],
        "gate": [inner.align_gate],
    }
    lines, counted = [], set()
    for name, modules in parts.items():
        # tied weights stand in two modules
        own = {id(p): p.numel() for module in modules for p in module.parameters() if id(p) not in counted}
        counted |= own.keys()
        lines.append(f"{name:<40}{sum(own.values()):>16,} parameters")
    names = [name for name, template in CHAT_TEMPLATES.items() if template == processor.chat_template]
    size = getattr(config.vision_config, "image_size", "?")
    vocabulary = f"{len(processor.tokenizer):,} tokens, padded to {config.text_config.vocab_size:,}"
    lines += [
        f"{'image tokens (image_seq_length)':<40}{config.image_seq_length:>16,} for an image of {size} pixels",
        f"{'alignment levels':<40}{config.num_align_levels:>16,}",
        f"{'vocabulary':<40}{vocabulary:>16}",
        f"{'chat template':<40}{names[0] if names else 'own':>16}",
    ]
    return "\n".join(lines)
