"""A LoRA adapter merged into its base on disk: the base's weights pass through memory one at a time."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig

from aligngpt_shared.weights import read_weights, save_model
from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration

from .folders import local_copy


ADAPTER_NAME = "default"


def write_merged(
    adapter: Path,
    base: str | os.PathLike,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> int | None:
    """
    Writes the whole model of an adapter and its base; each layer is merged by peft, with the values of its weight.

    Args:
        adapter: folder with the adapter and the config of what it was trained for.
        base: folder or Hub id of the base model.
        folder: where to write.
        dtype: of the written weights; `None` is the base's own.
        max_shard_size: greatest size of a weight file.

    Returns:
        The number of parameters; `None`, with nothing written, where the base's files are no AlignGPT's with these
        layers, or the adapter changes more than linear layers: load both (`load_adapter`), which says what is wrong.

    Raises:
        ValueError: a merged weight is not finite; a weight file that cannot be read.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    base = local_copy(base)
    config = AlignGPTConfig.from_pretrained(adapter)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = dtype or AlignGPTConfig.from_pretrained(base).dtype or torch.float32
    config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype
    with torch.device("meta"):
        model = AlignGPTForConditionalGeneration(config).to(dtype)
    parameters = {name: value.shape for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        parameters.pop("lm_head.weight", None)
    weights = read_weights(base)
    if {name: value.shape for name, value in weights.items()} != parameters:
        return None
    # peft puts an adapter where its layer is, in its dtype: here, in weights that take no room
    empty = {name: torch.zeros(()).expand(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)
    adapted = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu", low_cpu_mem_usage=True)
    for name in parameters:
        weights.change(name, lambda value: value.to(dtype))
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for key, value in module.modules_to_save[ADAPTER_NAME].state_dict().items():
                weights.put(f"{name}.{key}", value.to(dtype))
        elif isinstance(module, BaseTunerLayer):
            if f"{name}.weight" not in weights or any(getattr(module, "lora_bias", {None: True}).values()):
                return None
            weights.change(f"{name}.weight", _merging(module, name))
    whole = _whole(config, base, dtype)
    save_model(whole, weights, folder, max_shard_size)
    return sum(value.numel() for value in weights.values())


def _merging(layer, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes a base's weight the merged one; the layer is as before afterwards."""

    def merge(value: torch.Tensor) -> torch.Tensor:
        if value.is_meta:
            return value
        inner = layer.get_base_layer()
        empty, inner.weight = inner.weight, torch.nn.Parameter(value, requires_grad=False)
        try:
            layer.merge(safe_merge=True, adapter_names=[ADAPTER_NAME])
            return inner.weight.detach()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        finally:
            inner.weight = empty
            layer.merged_adapters.clear()

    return merge


def _whole(config: AlignGPTConfig, base: Path, dtype: torch.dtype) -> AlignGPTForConditionalGeneration:
    """The model that is saved, without its weights."""
    with torch.device("meta"):
        model = AlignGPTForConditionalGeneration(config).to(dtype)
    if (base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base)
    return model
