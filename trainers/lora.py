"""
LoRA (arXiv 2106.09685) and QLoRA (arXiv 2305.14314) for stage 2, by peft and bitsandbytes: settings, and an
adapter's folder read back.

Low-rank matrices go into the linear layers of the language model alone. Projector and gate are small and new, so they
train whole and are saved with the adapter; vision tower, level table and language-model head stay as stage 1 left them.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from aligngpt_shared.references import is_hub_id
from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.base_aligngpt import UNQUANTIZED


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import BitsAndBytesConfig

TRAINED_WHOLE = ("multi_modal_projector", "align_gate")
ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class LoraArguments:
    """Adapters instead of whole weights; the names are those of TRL's `ModelConfig`."""

    use_peft: bool = field(default=False, metadata={"help": "Stage 2: train LoRA adapters of the language model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters, divided by their rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Linear layers of the language model with an adapter, such as q_proj v_proj. Default: all."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Divide lora_alpha by the root of the rank."})
    use_dora: bool = field(default=False, metadata={"help": "Decompose updates into magnitude and direction (DoRA)."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the frozen language model in four bits (needs bitsandbytes)."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Kind of four-bit numbers.", "choices": ["nf4", "fp4"]}
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the quantisation's constants too."})


def check_lora(args: LoraArguments, stage: str) -> None:
    """
    Refuses adapter settings that cannot have an effect.

    Raises:
        ValueError: naming the settings.
    """
    changed = [item.name for item in fields(LoraArguments) if getattr(args, item.name) != item.default]
    if changed and stage == "pretrain":
        raise ValueError(
            f"{', '.join(changed)} has no place in stage 1: only projector and level embeddings train there, and the "
            "language model is frozen as it is. Use it in `aligngpt instruct`."
        )
    if changed and not args.use_peft:
        raise ValueError(f"{', '.join(changed)} needs use_peft: set it to true, or leave the others out.")
    if args.use_peft and (args.lora_r < 1 or args.lora_alpha < 1 or not 0 <= args.lora_dropout < 1):
        raise ValueError(
            f"lora_r={args.lora_r}, lora_alpha={args.lora_alpha}, lora_dropout={args.lora_dropout}: rank and alpha "
            "start at 1, dropout lies from 0 to below 1."
        )


def lora_targets(model: AlignGPTForConditionalGeneration, names: Iterable[str] | None = None) -> str:
    """
    Regular expression for the linear layers of the language model alone.

    A list of names would also reach the vision tower, whose layers are called `q_proj` too, and peft's `all-linear`
    the projector and the gate besides.

    Args:
        model: whose layers are named.
        names: last parts of the layers' names; all linear layers when `None`.

    Raises:
        ValueError: a name that no linear layer of the language model has.
    """
    modules = model.model.language_model.named_modules()
    linear = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    chosen = linear if names is None or list(names) == ["all-linear"] else set(names)
    if unknown := sorted(chosen - linear):
        raise ValueError(
            f"lora_target_modules: the language model has no linear layers called {', '.join(unknown)}; it has "
            f"{', '.join(sorted(linear))}."
        )
    return rf".*\blanguage_model\..*\.({'|'.join(sorted(chosen))})"


def lora_config(args: LoraArguments, model: AlignGPTForConditionalGeneration) -> "LoraConfig | None":
    """What peft is to do with `model`; `None` without `use_peft`."""
    if not args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        target_modules=lora_targets(model, args.lora_target_modules),
        modules_to_save=list(TRAINED_WHOLE),
        bias="none",
    )


def quantization_config(args: LoraArguments, bf16: bool) -> "BitsAndBytesConfig | None":
    """
    Four bits for the language model's linear layers and nothing else; `None` without `load_in_4bit`.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if not args.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ImportError('load_in_4bit needs bitsandbytes: `pip install ".[qlora]"` in a checkout.')
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        llm_int8_skip_modules=list(UNQUANTIZED),
    )


def settle_adapter(model: "PeftModel") -> None:
    """
    What a freshly wrapped model still lacks: whole modules train in float32, where small updates are not swallowed,
    and the config forgets the four bits, so that the adapter is not tied to them.
    """
    base = model.get_base_model()
    in_four_bits = getattr(base, "is_loaded_in_4bit", False)
    for name, parameter in model.named_parameters():
        # TRL has the adapters in bfloat16 where the rest is quantised, and ZeRO-3 gathers parameters of one dtype alone
        kept = (in_four_bits and "modules_to_save" not in name) or is_deepspeed_zero3_enabled()
        if parameter.requires_grad and not kept:
            parameter.data = parameter.data.float()
    config = base.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def base_of(adapter: str | os.PathLike, base: str | os.PathLike | None = None, base_revision: str | None = None) -> str:
    """
    Folder or Hub id of an adapter's base model: the one given, or the one that its config names.

    Raises:
        ValueError: no adapter folder, or no AlignGPT there.
    """
    from peft import PeftConfig

    folder = Path(adapter)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{adapter} holds no {ADAPTER_CONFIG}: give what `aligngpt instruct` with use_peft wrote.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{adapter} holds no config.json, which says what the adapter was trained for.")
    remedy = "name where it is now with --base (in Python: base)"
    found = str(base or PeftConfig.from_pretrained(folder).base_model_name_or_path or "")
    if not is_hub_id(found) and not os.path.isdir(found):
        raise ValueError(f"{adapter}: its base model {found!r} is not there; {remedy}.")
    try:
        # a folder's relative path may look like a Hub id
        AlignGPTConfig.get_config_dict(found, revision=base_revision)
    except OSError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"{adapter}: its base model {found!r} cannot be read ({reason}); {remedy}.") from error
    return found


def load_adapter(
    adapter: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    base_revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    **kwargs: Any,
) -> tuple["PeftModel", AlignGPTProcessor]:
    """
    An adapter on its base model, in the mode that it was trained for.

    The base's own config would say `align_mode="level"`, as stage 1 left it; the adapter's folder holds the right one.

    Args:
        adapter: folder written by `aligngpt instruct` with `use_peft`.
        base: folder or Hub id of the base model, where it is not where it was.
        base_revision: of a base on the Hub.
        dtype: of the base's weights; `"auto"` is the base's own.
        kwargs: for the base's `from_pretrained`, such as `quantization_config`.

    Returns:
        The model in eval mode, and its processor.

    Raises:
        ValueError: no adapter folder, no base there, or an adapter that does not fit it.
    """
    from peft import PeftModel

    folder, base = Path(adapter), base_of(adapter, base, base_revision)
    config = AlignGPTConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if dtype == "auto":
        # not that of the adapter's config, which says how the base was loaded for training
        dtype = AlignGPTConfig.from_pretrained(base, revision=base_revision).dtype or torch.float32
    model, info = AlignGPTForConditionalGeneration.from_pretrained(
        base, revision=base_revision, config=config, dtype=dtype, output_loading_info=True, **kwargs
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
        raise ValueError(
            f"{base} is not the base of {adapter}: weights missing or of other shapes, such as {wrong[0]}."
        )
    loaded = PeftModel.from_pretrained(model, str(folder))
    return loaded.eval(), AlignGPTProcessor.from_pretrained(folder)
