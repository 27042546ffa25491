"""
Tiny stand-ins for the checkpoints that the recipes name: the same config class, attention and tokenizer style, random
weights. What is said of each checkpoint here is what its own `config.json` and `tokenizer_config.json` say.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)


IMAGE_SIZE, PATCH_SIZE = 28, 14
COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LLAMA_3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>{{ m['content'] }}<|eot_id|>{% endfor %}"
)
MISTRAL = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
GEMMA = "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"


@dataclass(frozen=True)
class Family:
    """A language model's kind: config, special tokens (unk, bos, eos, pad by name), tokenizer style and template."""

    model_type: str
    template: str
    config: dict = field(default_factory=dict)
    special: dict = field(default_factory=dict)
    extra_tokens: tuple[str, ...] = ()
    sentencepiece: bool = False
    own_template: str | None = None


LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
LANGUAGE_MODELS = {
    "lmsys/vicuna-7b-v1.5": Family(
        "llama", "vicuna_v1", {"num_key_value_heads": 4}, {**LLAMA_TOKENS, "pad_token": "<unk>"}, sentencepiece=True
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": Family(
        "llama",
        "llama_3",
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|start_header_id|>", "<|end_header_id|>"),
        own_template=LLAMA_3,
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": Family(
        "mistral",
        "mistral",
        {"num_key_value_heads": 2, "sliding_window": None},
        LLAMA_TOKENS,
        sentencepiece=True,
        own_template=MISTRAL,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Family(
        "qwen2",
        "chatml",
        {"num_key_value_heads": 2, "bos_token_id": None},
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_start|>",),
        own_template=CHATML,
    ),
    "google/gemma-7b-it": Family(
        "gemma",
        "gemma",
        {"num_key_value_heads": 4, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
        {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        ("<start_of_turn>", "<end_of_turn>"),
        sentencepiece=True,
        own_template=GEMMA,
    ),
    "microsoft/phi-2": Family(
        "phi",
        "vicuna_v1",
        {"hidden_size": 40, "partial_rotary_factor": 0.4, "resid_pdrop": 0.1},
        {"unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Family(
        "llama",
        "chatml",
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {
            "unk_token": "<|endoftext|>",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
        },
        own_template=CHATML,
    ),
}
LANGUAGE_MODELS |= {
    "Qwen/Qwen3-8B": Family(
        "qwen3",
        "chatml",
        {"num_key_value_heads": 2, "head_dim": 16, "bos_token_id": None},
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_start|>",),
        own_template=CHATML,
    ),
    "HuggingFaceTB/SmolLM3-3B": Family(
        "smollm3",
        "chatml",
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        ("<|im_start|>",),
        own_template=CHATML,
    ),
    "meta-llama/Llama-3.2-3B-Instruct": Family(
        "llama",
        "llama_3",
        {
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 128,
            },
        },
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|start_header_id|>", "<|end_header_id|>"),
        own_template=LLAMA_3,
    ),
    "google/gemma-3-1b-it": Family(
        "gemma3_text",
        "gemma",
        {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, "sliding_window": 8},
        {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        ("<start_of_turn>", "<end_of_turn>"),
        sentencepiece=True,
        own_template=GEMMA,
    ),
}
LANGUAGE_MODELS["lmsys/vicuna-13b-v1.5"] = LANGUAGE_MODELS["lmsys/vicuna-7b-v1.5"]
VISION_TOWERS = {
    "openai/clip-vit-large-patch14-336": "clip_vision_model",
    "openai/clip-vit-base-patch16": "clip_vision_model",
    "google/siglip-so400m-patch14-384": "siglip_vision_model",
    # of fixed size: SigLIP's own class
    "google/siglip2-so400m-patch14-384": "siglip_vision_model",
    "facebook/dinov3-vitl16-pretrain-lvd1689m": "dinov3_vit",
}


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A small tokenizer of the family's style: SentencePiece's metaspace in front of words, or bytes."""
    special = list(dict.fromkeys([*family.special.values(), *family.extra_tokens]))
    tokenizer = Tokenizer(models.BPE(unk_token=family.special.get("unk_token") if family.sentencepiece else None))
    if family.sentencepiece:
        # as SentencePiece is trained: no token holds the end of a word and the next one
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=[*alphabet, "\n", " "], show_progress=False
    )
    texts = [
        "what colour is it? a red square, a blue square",
        "USER: compare them ASSISTANT: yes [INST] [/INST] user\n",
    ]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **family.special)
    fast.chat_template = family.own_template
    return fast


def save_language_model(name: str, folder: Path) -> Path:
    """A tiny language model of the family of the checkpoint `name`, with its tokenizer."""
    family = LANGUAGE_MODELS[name]
    tokenizer = make_tokenizer(family)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    values = {**COMMON, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 512, **family.config}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **values)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_vision_tower(name: str, folder: Path) -> Path:
    """A tiny CLIP or SigLIP, both halves, or DINOv3 as the checkpoint `name` has them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 16}
    vision = {**sizes, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    if VISION_TOWERS[name] == "clip_vision_model":
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
        crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop).save_pretrained(folder)
    elif VISION_TOWERS[name] == "dinov3_vit":
        AutoModel.from_config(AutoConfig.for_model("dinov3_vit", **vision, num_register_tokens=4)).save_pretrained(
            folder
        )
        # as the checkpoint has it: a class that needs torchvision
        values = {"image_processor_type": "DINOv3ViTImageProcessorFast", "resample": 2, "rescale_factor": 1 / 255}
        values |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        values["size"] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
    else:
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder
