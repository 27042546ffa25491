"""
Models for the engines' checks: one whose levels change every answer, one with a sentencepiece tokenizer, and with
`--more` other towers, families of language models and ways to mix levels.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1]))

from demo_model import save_demo_model
from modeling.tiny import randomize

from aligngpt_shared.files import new_folder
from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTConfig, AlignGPTForConditionalGeneration
from modeling_aligngpt.new_processor import processor_from_parts


TOKENIZER = Path(__file__).parents[1] / "fixtures" / "golden" / "base_llm"


# tower, language model and config of further models; the first has a tower without class token, the second two scales
MORE = {
    "siglip-mistral": ({"model_type": "siglip_vision_model"}, {"model_type": "mistral"}, {}),
    "s2-qwen2-local": ({}, {"model_type": "qwen2"}, {"vision_scales": [1, 2], "align_mode": "local"}),
    "clip-gemma-global": ({}, {"model_type": "gemma", "head_dim": 32}, {"align_mode": "global"}),
    "siglip-qwen3-mean": (
        {"model_type": "siglip_vision_model"},
        {"model_type": "qwen3", "head_dim": 32},
        {"align_mode": "mean"},
    ),
    # vLLM runs this language model by transformers' class
    "clip-phi": ({}, {"model_type": "phi", "partial_rotary_factor": 0.5}, {"lm_head_bias": True}),
}


def save_sentencepiece_model(folder: Path, vision: dict | None = None, text: dict | None = None, **values) -> None:
    """A tiny Vicuna with random weights: its chat template writes what the processor would edit."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["<image>", "<align>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.unk_token
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AlignGPTConfig(
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 32, "patch_size": 8, **(vision or {})},
        text_config={
            "model_type": "llama",
            **sizes,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 1024,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **(text or {}),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        align_token_id=tokenizer.convert_tokens_to_ids("<align>"),
        gate_context="first_turn",
        **values,
    )
    torch.manual_seed(0)
    model = randomize(AlignGPTForConditionalGeneration(config))
    processor = processor_from_parts(tokenizer, config, chat_template=CHAT_TEMPLATES["vicuna_v1"], do_pad=True)
    assert processor.image_suffix == " "
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_level_model(folder: Path) -> None:
    """The demo's model, whose levels change every answer; without the settings of generation that vLLM lacks."""
    save_demo_model(folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("min_new_tokens", "exponential_decay_length_penalty"):
        settings.pop(name)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main(output: Path, more: bool) -> None:
    makers = {"levels": save_level_model, "sentencepiece": save_sentencepiece_model}
    for name, (vision, text, values) in MORE.items() if more else ():
        makers[name] = partial(save_sentencepiece_model, vision=vision, text=text, **values)
    for name, save in makers.items():
        with new_folder(output / name, replace=True) as beside:
            save(beside)
    print(f"{len(makers)} models in {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--more" in sys.argv)
