"""`training_summary.json`: what a run did, with what settings and on what machine, in plain values."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import is_peft_model

from .rows import stream_totals


# whose versions a run depends on
PACKAGES = ("aligngpt", "torch", "transformers", "trl", "datasets", "accelerate")


def summarize(trainer: Any) -> dict[str, Any]:
    """What a run did, in plain values: counts, losses, time and the settings that made it."""
    args, config, record = trainer.args, trainer.model.config, trainer.record
    history = trainer.state.log_history
    curve = [[log["step"], log["loss"]] for log in history if "loss" in log]
    waste = 1 - record["attended"] / record["positions"] if record.get("positions") else None
    return {
        "stage": trainer.stage,
        "align_mode": config.align_mode,
        "gate_context": config.gate_context,
        "num_align_levels": config.num_align_levels,
        **trainer.row_counts,
        **stream_totals(trainer.train_dataset, "train"),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes,
        "trained_parameters": trainer.trained_parameters(),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "loss_first": curve[0][1] if curve else None,
        "loss_last": curve[-1][1] if curve else None,
        "loss_curve": curve,
        "eval": [log for log in history if any(key.startswith("eval_") for key in log)],
        "train_seconds": round(record.get("seconds", 0.0), 2),
        "resumed": trainer.resumed_from is not None,
        "setting_changes": trainer.setting_changes,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "max_length": args.max_length,
        "image_aspect_ratio": args.image_aspect_ratio,
        "positions": int(record.get("positions", 0)),
        "padding_waste": None if waste is None else round(waste, 4),
        "hyperparameters": describe_hyperparameters(trainer),
        "hardware": describe_hardware(trainer),
        "peak_memory": peak_memory(trainer),
        "versions": {
            name: version(name) for name in ("aligngpt", "torch", "transformers", "trl", "datasets", "accelerate")
        },
    }


def describe_hyperparameters(trainer: Any) -> dict[str, Any]:
    """The settings that decide what is learned."""
    args = trainer.args
    values = {
        "learning_rate": args.learning_rate,
        "projector_learning_rate": args.projector_learning_rate,
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "adam_betas": [args.adam_beta1, args.adam_beta2],
        "adam_epsilon": args.adam_epsilon,
        "max_grad_norm": args.max_grad_norm,
        "num_train_epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": trainer.accelerator.num_processes,
        "dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "max_length": args.max_length,
        "group_by": args.group_by,
        "gradient_checkpointing": bool(args.gradient_checkpointing),
        "image_aspect_ratio": args.image_aspect_ratio,
        "seed": args.seed,
    }
    if getattr(args, "align_learning_rate", None) is not None:  # a setting of stage 1 alone
        values["align_learning_rate"] = args.align_learning_rate
    if is_peft_model(trainer.model):
        adapter = trainer.model.active_peft_config
        values["lora"] = {
            name: getattr(adapter, name)
            for name in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")
            if hasattr(adapter, name)
        }
    return values


def describe_hardware(trainer: Any) -> dict[str, Any]:
    """Kind and number of devices."""
    device = trainer.args.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = _cpu_name(), None
    hardware = {"device": device.type, "name": name, "processes": trainer.accelerator.num_processes}
    if memory is not None:
        hardware["memory_gb"] = round(memory / 1e9, 1)
    else:
        hardware["threads"] = torch.get_num_threads()
    return hardware


def peak_memory(trainer: Any) -> int:
    """Bytes: of a GPU the most that tensors took, else the most that the process took (from its start)."""
    if trainer.args.device.type == "cuda":
        return torch.cuda.max_memory_allocated(trainer.args.device)
    try:
        import resource  # Unix alone
    except ImportError:
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
