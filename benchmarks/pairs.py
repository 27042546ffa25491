"""AlignGPT and transformers' own LLaVA made of the very same modules, and rows of the same tokens for both."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration


PAD, BOS, EOS, IMAGE, ALIGN, FIRST_TEXT = 0, 1, 2, 3, 4, 5

_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_CLIP_L_336 = {**_CLIP_L, "image_size": 336, "patch_size": 14}
# language model and vision tower by `--scale`; all but "tiny" have the paper's 576 positions an image
SCALES = {
    "tiny": (
        {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2},
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"image_size": 16, "patch_size": 4},
    ),
    # 5 million weights, for one core
    "small": (
        {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "layers": 4, "heads": 4},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"image_size": 48, "patch_size": 2},
    ),
    # 60 million weights and a tower that is not negligible
    "medium": (
        {"vocab_size": 8192, "hidden_size": 640, "intermediate_size": 1728, "layers": 10, "heads": 10},
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
        | {"image_size": 336, "patch_size": 14},
    ),
    # the size of TinyLlama, with the paper's tower
    "1b": (
        {"vocab_size": 32064, "hidden_size": 2048, "intermediate_size": 5632, "layers": 22, "heads": 32},
        _CLIP_L_336,
    ),
    "7b": (
        {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32},
        _CLIP_L_336,
    ),
    "13b": (
        {"vocab_size": 32064, "hidden_size": 5120, "intermediate_size": 13824, "layers": 40, "heads": 40},
        _CLIP_L_336,
    ),
}


def make_config(scale: str, **kwargs) -> AlignGPTConfig:
    text, vision = SCALES[scale]
    text_config = {
        "model_type": "llama",
        "vocab_size": text["vocab_size"],
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "num_key_value_heads": text["heads"],
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return AlignGPTConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config=text_config,
        image_token_id=IMAGE,
        align_token_id=ALIGN,
        **{"align_mode": "gate", **kwargs},
    )


def llava_config(config: AlignGPTConfig) -> LlavaConfig:
    return LlavaConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=IMAGE,
        projector_hidden_act=config.projector_hidden_act,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_seq_length=config.image_seq_length,
    )


def make_pair(
    scale: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[AlignGPTForConditionalGeneration, LlavaForConditionalGeneration]:
    """Both models on the device, random weights; LLaVA has AlignGPT's own tower, projector, language model and head."""
    config = make_config(scale)
    with torch.device("meta"):
        model = AlignGPTForConditionalGeneration(config)
        llava = LlavaForConditionalGeneration(llava_config(config))
    draw_weights(model, device, dtype)
    llava.model.vision_tower = model.model.vision_tower
    llava.model.language_model = model.model.language_model
    llava.lm_head = model.lm_head
    ours, theirs = model.model.multi_modal_projector, llava.model.multi_modal_projector
    theirs.linear_1, theirs.linear_2 = ours.linear_1, ours.linear_2
    for made in (model, llava):
        made.generation_config.pad_token_id = PAD
        made.generation_config.suppress_tokens = None
    return model.eval(), llava.eval()


def draw_weights(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Materialises a model made on the meta device, without ever holding a second copy."""
    model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "class_embedding" in name:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for module in model.modules():
            if getattr(module, "position_ids", None) is not None:
                module.position_ids.copy_(torch.arange(module.position_ids.shape[-1]).expand(1, -1))
            if getattr(module, "inv_freq", None) is not None:
                fresh = type(module)(module.config)
                module.inv_freq.copy_(fresh.inv_freq)
                module.original_inv_freq.copy_(fresh.inv_freq)
    model.tie_weights()


@dataclass
class Rows:
    """One batch for both models: LLaVA has one more word where AlignGPT has `<align>`."""

    ours: dict[str, torch.Tensor]
    llava: dict[str, torch.Tensor]
    labels: torch.Tensor
    levels: torch.Tensor

    @property
    def positions(self) -> int:
        return self.labels.numel()


def make_rows(config: AlignGPTConfig, batch: int, text: int, answer: int, device, dtype=torch.float32) -> Rows:
    """`batch` rows of BOS, `<align>`, an image, `text` words of which the last `answer` are supervised."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(FIRST_TEXT, config.text_config.vocab_size, (batch, text + 1), generator=generator)
    image = torch.full((batch, config.image_seq_length), IMAGE)
    begin, align = torch.full((batch, 1), BOS), torch.full((batch, 1), ALIGN)
    ours = torch.cat([begin, align, image, words[:, 1:]], dim=1).to(device)
    llava = torch.cat([begin, words[:, :1], image, words[:, 1:]], dim=1).to(device)
    labels = ours.clone()
    labels[:, : labels.shape[1] - answer] = -100
    size = config.input_image_size
    pixel_values = torch.randn(batch, 3, size, size, generator=generator).to(device, dtype)
    shared = {"attention_mask": torch.ones_like(ours), "pixel_values": pixel_values}
    levels = torch.randint(0, config.num_align_levels, (batch,), generator=generator).to(device)
    return Rows({"input_ids": ours, **shared}, {"input_ids": llava, **shared}, labels, levels)
