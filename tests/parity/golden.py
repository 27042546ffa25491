"""
Reference outputs of the authors' implementation, as inputs of ours.

A golden folder holds `manifest.json` (what each file and tensor is), `tensors/`, `json/`, `images/`, and the weights.
Every size comes from there, so another folder of the same layout can be named in `ALIGNGPT_GOLDEN`.
Letters in shapes: B rows, T their positions (an image is one id, -200), L positions with the image's tokens in
place, M images, V their vocabulary, R rows of their output.
"""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from aligngpt_hub.original.format import to_our_key


GOLDEN = Path(os.environ.get("ALIGNGPT_GOLDEN") or Path(__file__).parents[1] / "fixtures" / "golden")
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
VOCAB_SIZE = MANIFEST["about"]["llama"]["vocab_size"]
TENSOR_FILES = tuple(Path(name).stem for name in MANIFEST["tensors"])
IMAGE_ID = -200
IGNORED = -100
CLEAR_MARGIN = 1e-3

# The manifest words its tolerances; these are the figures in it.
TOLERANCES = {
    "logits": 1e-4,
    "logits_lse": 1e-4,
    "logits_margin": 2e-4,  # a difference of two logits
    "embeds_head": 1e-5,
    "loss": 1e-5,
    "pixel_values": 1e-5,
    "pad": 1e-5,
    "square": 1e-5,
    "vision_features": 1e-4,
    "image_embeds": 1e-4,
    "gate_dots": 1e-4,
    "gate_logits": 1e-4,
    "gate_weights": 1e-5,
    "text_mean": 1e-6,
    "align_vector": 1e-5,
}
GRAD_TOLERANCE = 1e-5
AFTER_TOLERANCE = 1e-4


def read(name: str) -> dict[str, torch.Tensor]:
    """The tensors of `tensors/<name>.safetensors`."""
    return load_file(GOLDEN / "tensors" / f"{name}.safetensors")


def read_json(name: str):
    """The content of `json/<name>.json`."""
    return json.loads((GOLDEN / "json" / f"{name}.json").read_text(encoding="utf-8"))


def draw_image(name: str) -> Image.Image:
    """An image of `images/`, in RGB as the authors read it."""
    with Image.open(GOLDEN / "images" / name) as image:
        return image.convert("RGB")


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, name: str, tolerance: float | None = None):
    """Greatest absolute difference within the tolerance, with a message that says what and by how much."""
    tolerance = TOLERANCES[name] if tolerance is None else tolerance
    assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    if theirs.numel():
        difference = (ours.double() - theirs.double()).abs().max().item()
        assert difference <= tolerance, f"{name}: differs by {difference:.2e}, allowed {tolerance:.0e}"


@dataclass
class Batch:
    """Rows in our form, right-padded: `<align>` behind BOS and `<image>` repeated where their row had -200."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None
    has_image: list[bool]

    def inputs(self) -> dict[str, torch.Tensor]:
        """What `forward` and `generate` take beside labels."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.pixel_values is None else {**inputs, "pixel_values": self.pixel_values}


def _expand_row(ids: list[int], labels: list[int], config) -> tuple[list[int], list[int]]:
    """One of their rows without padding -> ours; a row without an image stays as it is."""
    if IMAGE_ID not in ids:
        return ids, labels
    new_ids, new_labels = [], []
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        repeat = config.image_seq_length if token == IMAGE_ID else 1
        new_ids += [config.image_token_id if token == IMAGE_ID else token] * repeat
        new_labels += [IGNORED if token == IMAGE_ID else label] * repeat
        if position == 0:
            new_ids.append(config.align_token_id)
            new_labels.append(IGNORED)
    return new_ids, new_labels


def our_batch(tensors: dict[str, torch.Tensor], config) -> Batch:
    """
    Their batch as ours.

    Args:
        tensors: of one file: `input_ids` [B, T] with -200 for an image; `attention_mask` [B, T] and `labels` [B, T]
            (absent at inference); `pixel_values` [B, 3, S, S], zeros for a row without an image (absent without any).
        config: our model's config.
    """
    ids = tensors["input_ids"]
    mask = tensors.get("attention_mask", torch.ones_like(ids)).bool()
    labels = tensors.get("labels", torch.full_like(ids, IGNORED))
    rows = [
        _expand_row(ids_row[mask_row].tolist(), labels_row[mask_row].tolist(), config)
        for ids_row, labels_row, mask_row in zip(ids, labels, mask, strict=True)
    ]
    has_image = [config.image_token_id in row for row, _ in rows]
    pixel_values = tensors["pixel_values"][torch.tensor(has_image)] if any(has_image) else None
    length = max(len(row) for row, _ in rows)
    return Batch(
        input_ids=torch.tensor([row + [0] * (length - len(row)) for row, _ in rows]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in rows]),
        labels=torch.tensor([row + [IGNORED] * (length - len(row)) for _, row in rows]),
        pixel_values=pixel_values,
        has_image=has_image,
    )


def in_their_order(rows: torch.Tensor, tensors: dict[str, torch.Tensor], fill) -> torch.Tensor:
    """
    Our rows [B, T', ...] in the order and at the length [R, L, ...] of their output.

    Their rows with images come first, and every row is cut or padded to the length of these.
    """
    length = tensors["out_attention_mask"].shape[1]
    rows = rows[tensors["row_source"]][:, :length]
    padding = [0, 0] * (rows.ndim - 2) + [0, length - rows.shape[1]]
    return torch.nn.functional.pad(rows, padding, value=fill)


def cut_labels(batch: Batch, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Our labels, ignored from their output's length on: those tokens are not in their loss (but in their gate)."""
    labels = batch.labels.clone()
    labels[:, tensors["out_attention_mask"].shape[1] :] = IGNORED
    return labels


@contextmanager
def original_vocabulary(model):
    """Within: logits of the rows that were added for placeholders and padding are -inf, so softmax leaves them out."""

    def mask_added(module, args, logits):
        added = torch.arange(logits.shape[-1], device=logits.device) >= VOCAB_SIZE
        return logits.masked_fill(added, float("-inf"))

    handle = model.lm_head.register_forward_hook(mask_added)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Seen:
    """What passed inside the model, call by call."""

    vision_features: list[torch.Tensor]
    image_embeds: list[torch.Tensor]
    gate_dots: list[torch.Tensor]
    gate_logits: list[torch.Tensor]
    inputs_embeds: list[torch.Tensor]
    text_mean: list[tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def watch(model):
    """Within: record projector, gate, text mean and the embeddings that the language model is given."""
    seen = Seen([], [], [], [], [], [])
    inner = model.model

    def at_projector(module, args, output):
        seen.vision_features.append(args[0].detach())
        seen.image_embeds.append(output.detach())

    def at_gate(module, args, output):
        seen.gate_dots.append(args[0].detach())
        seen.gate_logits.append(output.detach())

    def at_language_model(module, args, kwargs):
        seen.inputs_embeds.append(kwargs["inputs_embeds"].detach())

    compute_mean = inner.get_prompt_mean

    def at_mean(*args, **kwargs):
        mean, count = compute_mean(*args, **kwargs)
        seen.text_mean.append((mean.detach(), count.detach()))
        return mean, count

    handles = [
        inner.multi_modal_projector.register_forward_hook(at_projector),
        inner.align_gate.register_forward_hook(at_gate),
        inner.language_model.register_forward_pre_hook(at_language_model, with_kwargs=True),
    ]
    inner.get_prompt_mean = at_mean
    try:
        yield seen
    finally:
        del inner.get_prompt_mean
        for handle in handles:
            handle.remove()


def original_value(name: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    The tensor that a golden name speaks of, on their vocabulary.

    Args:
        name: their parameter name, or `<parameter>_rownorm` for the L2 norms of a matrix's rows.
        values: our parameter names -> values or gradients.
    """
    parameter = name.removesuffix("_rownorm")
    if parameter == "embed_tokens":
        parameter = "model.embed_tokens.weight"
    key = to_our_key(parameter)
    value = values[key].detach()
    if "embed_tokens" in parameter or "lm_head" in parameter:
        value = value[:VOCAB_SIZE]
    return value.norm(dim=-1) if name.endswith("_rownorm") else value


def set_trainable(model, their_names: list[str]) -> list[torch.nn.Parameter]:
    """Let exactly the parameters that they train require gradients; returns these."""
    ours = {to_our_key(name) for name in their_names}
    named = dict(model.named_parameters())
    assert ours <= named.keys(), f"not in our model: {sorted(ours - named.keys())}"
    for name, parameter in named.items():
        parameter.requires_grad_(name in ours)
    return [named[name] for name in sorted(ours)]


def train(model, batch: Batch, their_names: list[str], learning_rate: float, steps: int, **kwargs):
    """
    AdamW on one batch (betas 0.9 and 0.999, eps 1e-8, no decay, no clipping, constant rate), as recorded.

    Returns:
        losses before each step and after the last (steps + 1), and the gradients' total norm at each step.
    """
    parameters = set_trainable(model, their_names)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    losses, grad_norms = [], []
    with original_vocabulary(model):
        for _ in range(steps):
            loss = model(**batch.inputs(), labels=batch.labels, **kwargs).loss
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            grad_norms.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())
            optimizer.step()
        with torch.no_grad():
            losses.append(model(**batch.inputs(), labels=batch.labels, **kwargs).loss.item())
    return losses, grad_norms
