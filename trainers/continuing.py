"""
Settings that a continued run must share with the stopped one: `run_settings.json` in every checkpoint.

Data, seed, schedule and the global batch decide what is learned at a step, so another value is refused by name. What
may change (processes, batch and accumulation at the same product, saving, logging) is said and kept with its step.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import IterableDataset


SETTINGS_NAME = "run_settings.json"
SCHEDULE = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "projector_learning_rate",
    "align_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
)
OPTIMIZER = ("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
ROWS = ("seed", "data_seed", "max_length", "on_overlong", "image_aspect_ratio", "group_by")
METHOD = ("align_mode", "default_align_level", "gate_context")
FIXED = (*SCHEDULE, *OPTIMIZER, *ROWS, *METHOD)
FREE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "save_steps", "save_strategy"),
    *("save_total_limit", "logging_steps", "eval_strategy", "eval_steps", "bf16", "fp16", "gradient_checkpointing"),
)
ROWS_LOOKED_AT = 256


class ContinuationError(ValueError):
    """A run cannot be continued with these settings."""


def settings_of(trainer: Any) -> dict[str, Any]:
    """What is kept of a run's settings, as plain values."""
    args = trainer.args
    return {
        "fixed": {
            "stage": trainer.stage,
            **{name: _plain(getattr(args, name)) for name in FIXED if hasattr(args, name)},
            # what the setting, which may be left open, came to
            "gate_context": trainer.model.config.gate_context,
            "global batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "training rows": _fingerprint(trainer.train_dataset),
            "sharding": _sharding(trainer),
        },
        "free": {**{name: _plain(getattr(args, name)) for name in FREE}, "processes": args.world_size},
        "changes": trainer.setting_changes,
    }


def write_settings(trainer: Any, folder: Path) -> None:
    (folder / SETTINGS_NAME).write_text(json.dumps(settings_of(trainer), indent=1), encoding="utf-8")


def compare_settings(trainer: Any, checkpoint: str | None) -> list[dict[str, Any]]:
    """
    What has changed since a checkpoint, of what may: all changes of the run so far, each with its step.

    Raises:
        ContinuationError: what must not change has; names it with both values and the remedy.
    """
    path = Path(checkpoint or ".") / SETTINGS_NAME
    if checkpoint is None or not path.is_file():
        return []
    before, now = json.loads(path.read_text(encoding="utf-8")), settings_of(trainer)
    different = [
        f"{name} was {before['fixed'][name]} and is {value}"
        for name, value in now["fixed"].items()
        if name in before["fixed"] and before["fixed"][name] != value
    ]
    if different:
        raise ContinuationError(
            f"{Path(checkpoint).name} cannot be continued with other settings: {'; '.join(different)}. Give it the "
            "same ones (processes x batch x accumulation may be split otherwise), or start anew in another output_dir."
        )
    number = Path(checkpoint).name.rpartition("-")[2]
    step = int(number) if number.isdigit() else None
    changed = [
        {"step": step, "setting": name, "before": before["free"].get(name), "after": value}
        for name, value in now["free"].items()
        if name in before["free"] and before["free"][name] != value
    ]
    return [*before.get("changes", []), *changed]


def _sharding(trainer: Any) -> str:
    """
    How the optimizer's state lies in a checkpoint. transformers goes on without the state where it finds none of its
    own kind, and DeepSpeed's belongs to so many processes.
    """
    if trainer.is_deepspeed_enabled:
        return f"DeepSpeed over {trainer.args.world_size} processes"
    if trainer.saves_shards:
        return "FSDP with sharded checkpoints"
    return "FSDP" if trainer.is_fsdp_enabled else "none"


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _fingerprint(rows: Any) -> str:
    """Number of rows, and a digest of some of them, taken evenly: their tokens, texts and levels, not their images."""
    if rows is None or isinstance(rows, IterableDataset):
        return "a stream"
    columns = [name for name in rows.column_names if name in ("id", "align_level", "token_ids", "messages", "length")]
    step = max(1, len(rows) // ROWS_LOOKED_AT)
    looked = rows.select(range(0, len(rows), step)).select_columns(columns).with_format(None)
    digest = hashlib.sha256(json.dumps(looked[:], sort_keys=True, default=str).encode())
    return f"{len(rows)} rows, {digest.hexdigest()[:16]}"
