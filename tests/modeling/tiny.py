"""Tiny AlignGPT models with random weights large enough to matter, and rows for them."""

import torch

from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration


PAD, BOS, EOS, IMAGE, ALIGN, VOCABULARY = 0, 1, 2, 60, 61, 64
IMAGE_SIZE, PATCH_SIZE = 8, 4
SEQ_LENGTH = (IMAGE_SIZE // PATCH_SIZE) ** 2
TOP_LEVEL = 7
IMAGE_TOKENS = [IMAGE] * SEQ_LENGTH

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "projection_dim": 16,
}
SIGLIP = {name: value for name, value in CLIP.items() if name != "projection_dim"}
SIGLIP["model_type"] = "siglip_vision_model"
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def tiny_config(text_config=None, vision_config=None, **kwargs) -> AlignGPTConfig:
    """An AlignGPTConfig of tiny parts; `text_config` updates `LLAMA`."""
    kwargs = {"align_mode": "gate", "gate_hidden_size": 8, **kwargs}
    return AlignGPTConfig(
        vision_config=dict(vision_config or CLIP),
        text_config={**LLAMA, **(text_config or {})},
        image_token_id=IMAGE,
        align_token_id=ALIGN,
        **kwargs,
    )


def randomize(model, seed: int = 0):
    """Draws all but the norms' weights afresh, wide enough that each part moves the logits; returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith(("bias", "class_embedding")):
                std = 0.5 if "align_" in name or "embed" in name else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def tiny_model(text_config=None, vision_config=None, seed: int = 0, **kwargs) -> AlignGPTForConditionalGeneration:
    """A tiny model; `kwargs` are fields of AlignGPTConfig."""
    return randomize(AlignGPTForConditionalGeneration(tiny_config(text_config, vision_config, **kwargs)), seed)


def row(*text: int, images: int = 1, before: tuple[int, ...] = ()) -> list[int]:
    """BOS, `<align>` if there is an image, text before, images, text behind."""
    return [BOS] + [ALIGN] * bool(images) + list(before) + IMAGE_TOKENS * images + list(text)


def num_images(ids: list[int]) -> int:
    return ids.count(IMAGE) // SEQ_LENGTH


def draw_images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def make_batch(rows: list[list[int]], side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """Padded rows with their positions and images (one draw for each image, in reading order)."""
    length = max(map(len, rows))
    pads = [[PAD] * (length - len(ids)) for ids in rows]

    def padded(values: list[list[int]]) -> torch.Tensor:
        pairs = zip(values, pads, strict=True)
        return torch.tensor([pad + value if side == "left" else value + pad for value, pad in pairs])

    attention_mask = padded([[1] * len(ids) for ids in rows])
    batch = {
        "input_ids": padded(rows),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
    }
    if count := sum(map(num_images, rows)):
        batch["pixel_values"] = draw_images(count, seed)
    return batch


def prompts(rows: list[list[int]], side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """As `make_batch`, for `generate`: padded on the left, without positions."""
    batch = make_batch(rows, side, seed)
    batch.pop("position_ids")
    return batch


MIXED_ROWS = [
    row(5, 6, 7, 8, before=(9, 10)),
    row(11, 12, images=2, before=(13,)),
    row(14, 15, 16, 17, 18, images=0),
]
