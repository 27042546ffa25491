"""
When a batch without an image runs a dummy image through tower, projector, gate and level table.

Processes that train together meet in collective operations: FSDP2 and ZeRO-3 gather the weights of a module when it
runs, DDP waits for a gradient of every parameter. Where one process has images and another has text alone, the second
would not take part, and both would wait forever. A process that trains alone needs no dummy and runs none.

Our trainers do it by themselves; with a plain `Trainer` or TRL's, add [`DummyImageCallback`].
"""

import inspect

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.cache_utils import Cache


class DummyImageCallback(TrainerCallback):
    """Runs a dummy image for batches of text alone, for the time of a training; see this module."""

    def __init__(self):
        self._handle = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._handle = add_dummy_images(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def on_train_end(self, args, state, control, **kwargs):
        if self._handle is not None:
            self._handle.remove()


def add_dummy_images(model: nn.Module):
    """
    Registers the dummy in front of an AlignGPT with a head.

    Args:
        model ([`AlignGPTForConditionalGeneration`]): before or after it is wrapped.

    Returns:
        A handle, whose `remove()` takes it away.
    """

    def before(inner: nn.Module, args: tuple, kwargs: dict):
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        # `generate` hands in an empty dict where there was no image to encode
        if kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs"):
            return None
        cache: Cache | None = kwargs.get("cache") or kwargs.get("past_key_values")
        if (cache is not None and cache.get_seq_length() > 0) or not needs_dummy_image(inner):
            return None
        input_ids, inputs_embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        # weights are gathered in one order everywhere: `generate`, which brings a cache, encodes images before anything
        # else; `forward` embeds the words first
        features = dummy_features(inner) if cache is not None else None
        if inputs_embeds is None:
            inputs_embeds = inner.get_input_embeddings()(input_ids)
        level = kwargs.get("align_level")
        kwargs["inputs_embeds"] = run_dummy_image(inner, input_ids, inputs_embeds, level, features)
        kwargs["input_ids"] = None
        return (), kwargs

    names = list(inspect.signature(model.base_model.forward).parameters)
    return model.base_model.register_forward_pre_hook(before, with_kwargs=True)


def needs_dummy_image(model: nn.Module) -> bool:
    """
    Whether `model` (an `AlignGPTModel`) has to run its image side for a batch without an image: several processes
    train, or its weights are sharded (then evaluation gathers them, too).
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if torch.distributed.get_world_size() == 1:
        return False
    return (model.training and torch.is_grad_enabled()) or _is_sharded(model)


def _is_sharded(model: nn.Module) -> bool:
    """Whether running the image side gathers weights. What FSDP2 has gathered already is a plain tensor here."""
    parts = (model.vision_tower, model.multi_modal_projector, model.align_gate, model.align_embeddings)
    parameters = (parameter for part in parts for parameter in part.parameters())
    # `ds_id` marks a parameter of ZeRO-3, `device_mesh` a DTensor
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") for parameter in parameters)


def dummy_features(model: nn.Module) -> torch.Tensor:
    """A black image, encoded and projected: `(1, S, D)`."""
    size = model.config.input_image_size
    height, width = (size, size) if isinstance(size, int) else size
    device = next(model.multi_modal_projector.parameters()).device
    features = model.get_image_features(torch.zeros(1, 3, height, width, device=device, dtype=model.dtype))
    return torch.stack(tuple(features.pooler_output))


def run_dummy_image(
    model: nn.Module,
    input_ids: torch.LongTensor | None,
    inputs_embeds: torch.FloatTensor,
    align_level: int | torch.LongTensor | None,
    features: torch.Tensor | None = None,
) -> torch.FloatTensor:
    """
    Runs a black image like a real one and returns `inputs_embeds` `(B, T, D)`, bit for bit, with a graph that
    goes through all that the image met and gives it gradients of zero.
    """
    features_ISD = dummy_features(model) if features is None else features
    features_ISD = features_ISD.to(inputs_embeds.device, inputs_embeds.dtype)
    first_row = torch.zeros(1, dtype=torch.long, device=inputs_embeds.device)
    vectors_BD, _ = model.get_align_vectors(
        features_ISD, first_row, inputs_embeds, input_ids=input_ids, align_level=align_level
    )
    for values in (features_ISD, vectors_BD):
        # an empty sum and not zero times a full one, which would be NaN where half precision overflows
        inputs_embeds = inputs_embeds + values.flatten()[:0].sum()
    return inputs_embeds
