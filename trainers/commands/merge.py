"""`aligngpt merge`: a LoRA adapter and its base, or the parts of a sharded checkpoint, become a model of its own."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import merge_fsdp_weights
from transformers import GenerationConfig

from aligngpt_shared.files import new_folder
from aligngpt_shared.records import SUMMARY
from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor

from ..lora import base_of, load_adapter
from ..storage.manifest import damage
from ..storage.saved_model import check_saved
from .settings import parse_settings


MERGE_DTYPES = ("auto", "float32", "bfloat16")
# folder of a checkpoint that holds the processes' parts of the weights, as accelerate names it
WEIGHTS = "pytorch_model_fsdp_0"


@dataclass
class MergeArguments:
    """`aligngpt merge`."""

    output: str = field(metadata={"help": "Folder for the whole model; must not exist."})
    adapter: str | None = field(
        default=None, metadata={"help": "Adapter folder: what `aligngpt instruct` with use_peft wrote."}
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "Instead: a checkpoint that a run under FSDP with SHARDED_STATE_DICT saved."}
    )
    base: str | None = field(default=None, metadata={"help": "Base model, where it is not where it was."})
    base_revision: str | None = field(default=None, metadata={"help": "Revision of a base model on the Hub."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Of the written weights; `auto`: the base's own.", "choices": list(MERGE_DTYPES)},
    )


def merge_command(argv: Sequence[str]) -> None:
    """
    `aligngpt merge`: adapter and base become a model of its own, which needs neither peft nor the base; or the parts
    of a sharded checkpoint do.

    Raises:
        ValueError: unusable settings or folders.
    """
    (args,) = parse_settings(
        "aligngpt merge",
        (MergeArguments,),
        argv,
        "Merge a LoRA adapter into its base, or a sharded checkpoint's parts: a model folder like any other.",
    )
    if (args.adapter is None) == (args.checkpoint is None):
        raise ValueError("Give --adapter, or --checkpoint: one of them.")
    if args.checkpoint is not None:
        if args.base or args.base_revision or args.dtype != "auto":
            raise ValueError("--base, --base_revision and --dtype belong to --adapter, not to --checkpoint.")
        size = consolidate(args.checkpoint, args.output)
        print(f"{args.checkpoint} made whole: {size:,} parameters; saved to {args.output}")
        print(f"Next: aligngpt chat --model {args.output} --image IMAGE")
        return
    if args.dtype not in MERGE_DTYPES:
        raise ValueError(f"dtype={args.dtype!r} is not one of {', '.join(MERGE_DTYPES)}.")
    with new_folder(args.output) as beside:
        base = base_of(args.adapter, args.base, args.base_revision)
        size = merge_adapter(args, beside)
        AlignGPTProcessor.from_pretrained(args.adapter).save_pretrained(beside)
        copy_summary(Path(args.adapter), beside, base)
    print(f"merged {args.adapter} into {base}: {size:,} parameters; saved to {args.output}")
    print(f"Next: aligngpt chat --model {args.output} --image IMAGE")


def consolidate(checkpoint: str | os.PathLike, output: str | os.PathLike) -> int:
    """
    Writes the model of a sharded checkpoint as a folder like any other, by accelerate; needs no GPU.

    Args:
        checkpoint: what a run under FSDP with SHARDED_STATE_DICT has saved.
        output: folder to write; must not exist.

    Returns:
        Number of parameters.

    Raises:
        ValueError: it is no such checkpoint, or damaged; names the file.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / WEIGHTS / ".metadata").is_file():
        raise ValueError(f"{checkpoint} is no sharded checkpoint: it has no {WEIGHTS}/.metadata.")
    if wrong := damage(checkpoint):
        raise ValueError(f"{checkpoint} is damaged: {wrong}. Take an earlier checkpoint.")
    config = AlignGPTConfig.from_pretrained(checkpoint)
    with new_folder(output) as beside:
        merge_fsdp_weights(str(checkpoint / WEIGHTS), str(beside))
        config.save_pretrained(beside)
        model = AlignGPTForConditionalGeneration.from_pretrained(beside, dtype=config.dtype or "auto")
        if (checkpoint / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint)
        (beside / "model.safetensors").unlink()
        model.save_pretrained(beside)
        AlignGPTProcessor.from_pretrained(checkpoint).save_pretrained(beside)
        check_saved(beside)
    return sum(parameter.numel() for parameter in model.parameters())


def merge_adapter(args: MergeArguments, folder: Path) -> int:
    """Merges by peft and saves the whole model; the number of its parameters."""
    adapted, _ = load_adapter(args.adapter, base=args.base, base_revision=args.base_revision, dtype=args.dtype)
    merged = adapted.merge_and_unload(safe_merge=True)
    # modules that trained in float32 beside a base in bfloat16
    merged.to(merged.get_input_embeddings().weight.dtype)
    merged.save_pretrained(folder)
    return sum(parameter.numel() for parameter in merged.parameters())


def copy_summary(source: Path, target: Path, base: str) -> None:
    """The training summary of an adapter, with a note that it was merged, for the whole model's folder."""
    path = source / SUMMARY
    if not path.is_file():
        return
    summary = json.loads(path.read_text(encoding="utf-8"))
    summary["merged"] = {"adapter": source.name, "base": Path(base).name if os.path.exists(base) else base}
    (target / path.name).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
