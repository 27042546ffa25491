"""Settings of the commands `pretrain` and `instruct` beside those of the trainers: which model, which rows."""

from dataclasses import dataclass, field
from typing import Any

from modeling_aligngpt import CHAT_TEMPLATES

from ..lora import LoraArguments


DTYPES = ("float32", "bfloat16")


@dataclass
class DataArguments:
    """Where the rows come from; see [`load_rows`]."""

    dataset: str | None = field(
        default=None,
        metadata={
            "aliases": ["--dataset_name", "--dataset-name"],
            "help": "Rows to train on: JSON(L), CSV or parquet file, folder of `save_to_disk`, or Hub id. Required.",
        },
    )
    dataset_split: str | None = field(
        default=None,
        metadata={
            "aliases": ["--dataset_train_split", "--dataset-train-split"],
            "help": "Split; default: train, or the only one.",
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub data set."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Rows to evaluate on (see `eval_strategy`)."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of `eval_dataset`."})
    image_folder: str | None = field(
        default=None, metadata={"help": "What relative image paths start from; default: the folder of the file."}
    )
    columns: dict[str, str] | str | None = field(
        default=None, metadata={"help": "The data's names of columns by ours, `image=img,text=alt`, or a mapping."}
    )
    on_bad_row: str = field(
        default="raise",
        metadata={
            "help": "Rows that cannot be used: `raise` or `skip` (left out, counted).",
            "choices": ["raise", "skip"],
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the rows on the way, without a local copy (needs max_steps)."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Rows of a stream among which the next one is drawn; 0 keeps their order."}
    )


@dataclass
class ModelArguments(LoraArguments):
    """Which model is trained and how it is loaded."""

    model: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model_name_or_path", "--model-name-or-path"],
            "help": "An AlignGPT: folder or Hub id, such as stage 1's output_dir. Required.",
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a model on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of the loaded weights. With `bfloat16` (needs bf16) only what trains is kept in float32.",
            "choices": list(DTYPES),
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention, such as `sdpa`, `flash_attention_2`, `eager`."}
    )


@dataclass
class PretrainModelArguments(ModelArguments):
    """`language_model` and `vision_tower` that a fresh one is assembled from, or `model`."""

    model: str | None = field(
        default=None,
        metadata={"help": "An AlignGPT to train on: folder or Hub id; instead of language_model and vision_tower."},
    )
    language_model: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model_name_or_path", "--model-name-or-path"],
            "help": "Causal language model to start from: folder or Hub id. Required, with vision_tower.",
        },
    )
    language_model_revision: str | None = field(
        default=None, metadata={"help": "Revision of a language model on the Hub; pin it for runs to be repeated."}
    )
    vision_tower: str | None = field(
        default=None, metadata={"help": "CLIP or SigLIP model, or its vision tower: folder or Hub id."}
    )
    vision_tower_revision: str | None = field(
        default=None, metadata={"help": "Revision of a vision tower on the Hub; pin it for runs to be repeated."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": f"Conversation format: {', '.join(CHAT_TEMPLATES)}. Default: recognised from the language model."
        },
    )
    num_align_levels: int | None = field(
        default=None, metadata={"help": "Size of the level table of a fresh model (paper: 8)."}
    )
    config_overrides: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More fields of AlignGPTConfig for a fresh model, as a mapping."}
    )
