"""
The image side of an exported LLaVA as a file that llama.cpp reads (`--mmproj`). The language model is converted from
the same folder by llama.cpp's own `convert_hf_to_gguf.py`, which knows no CLIP tower.
"""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .llava import weight_files


MMPROJ = "mmproj.gguf"
TEMPLATE = "llama_cpp.jinja"
MEDIA_MARKER = "<__media__>"
"""What llama.cpp puts into a message where an image stands."""
VOCABULARY = "tokenizer.model"
LANGUAGE_MODELS = ("llama", "mistral")
"""Families whose LLaVA llama.cpp's converter takes for what they are."""
# the activation of the tower -> llama.cpp's `use_gelu` (its other one is CLIP's quick GELU)
_GELU = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}
# parts of names: ours -> GGUF's
_NAMES = (
    ("multi_modal_projector.linear_1.", "mm.0."),
    ("multi_modal_projector.linear_2.", "mm.2."),
    ("vision_tower.vision_model.", "v."),
    ("embeddings.class_embedding", "class_embd"),
    ("embeddings.patch_embedding", "patch_embd"),
    ("embeddings.position_embedding", "position_embd"),
    ("pre_layrnorm", "pre_ln"),
    ("encoder.layers.", "blk."),
    ("layer_norm", "ln"),
    ("self_attn.out_proj", "attn_out"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("mlp.fc1", "ffn_up"),
    ("mlp.fc2", "ffn_down"),
)


def check_convertible(config: dict[str, Any], image_processor: dict[str, Any]) -> None:
    """
    Refuses what llama.cpp would run otherwise than transformers does.

    Args:
        config, image_processor: of the LLaVA.

    Raises:
        ValueError: naming what this model has and llama.cpp lacks.
        ImportError: the package gguf is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("Writing GGUF needs the package gguf: pip install gguf.")
    text, vision = config["text_config"], config["vision_config"]
    lacks = []
    if text["model_type"] not in LANGUAGE_MODELS:
        lacks.append(f"a LLaVA on {text['model_type']} (it takes {' and '.join(LANGUAGE_MODELS)})")
    if vision["model_type"] not in ("clip_vision_model", "siglip_vision_model"):
        lacks.append(f"the tower {vision['model_type']} (it takes CLIP and SigLIP)")
    if vision.get("hidden_act") not in _GELU:
        lacks.append(f"the tower's activation {vision.get('hidden_act')}")
    if config.get("projector_hidden_act") != "gelu":
        lacks.append(f"the projector's activation {config.get('projector_hidden_act')}")
    if vision["model_type"] == "clip_vision_model" and config["vision_feature_select_strategy"] != "default":
        lacks.append("image tokens of the tower's class token")
    if not image_processor.get("do_pad"):
        lacks.append("images that are cropped: it pads them to a square, as after stage 2")
    if lacks:
        raise ValueError(f"llama.cpp lacks {'; '.join(lacks)}: no {MMPROJ} can be written.")


def write_mmproj(folder: Path, dtype: str = "float16") -> Path:
    """
    Writes `mmproj.gguf` into the folder of a LLaVA.

    Args:
        folder: what `write_llava` wrote.
        dtype: of matrices, "float16" or "float32"; vectors and the patches' convolution are float32.

    Raises:
        ValueError, ImportError: see [`check_convertible`].
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    check_convertible(config, settings)
    import gguf

    vision = config["vision_config"]
    # hidden state 0 is the tower's input: so many layers run
    layers = config["vision_feature_layer"] % (vision["num_hidden_layers"] + 1)
    beside = folder / f".{MMPROJ}.partial"
    writer = gguf.GGUFWriter(str(beside), "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == "float16" else gguf.LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_image_mean(settings["image_mean"])
    writer.add_vision_image_std(settings["image_std"])
    writer.add_vision_use_gelu(_GELU[vision["hidden_act"]])
    writer.add_array("clip.vision.feature_layer", [layers])
    for name, value in _tensors(folder, layers):
        half = dtype == "float16" and value.ndim == 2 and "embd" not in name
        writer.add_tensor(name, value.to(torch.float16 if half else torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(beside, folder / MMPROJ)
    return folder / MMPROJ


def write_template(folder: Path, template: str) -> None:
    """
    Writes `llama_cpp.jinja`: the model's chat template with llama.cpp's marker of an image. Its tokenizer writes the
    spaces behind special tokens itself, which transformers needs in the template (`image_suffix`).
    """
    marked = template.replace("default('<image>')", f"default('{MEDIA_MARKER}')")
    # a tag of transformers'
    marked = re.sub(r"\{%-? (?:end)?generation -?%\}", "", marked)
    marked = re.sub(r"(set (?:image|head)_suffix) = ' '", r"\1 = ''", marked)
    (folder / TEMPLATE).write_text(marked, encoding="utf-8")


def copy_vocabulary(source: Path, folder: Path) -> str | None:
    """
    Brings the language model's `tokenizer.model` along, without which llama.cpp's converter guesses how a sentencepiece
    tokenizer splits words.

    Returns:
        What the user has to do where the model's folder does not hold it.
    """
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if not tokenizer["model"].get("byte_fallback"):
        return None
    for place in (source / VOCABULARY, source / "original" / VOCABULARY):
        if place.is_file():
            shutil.copyfile(place, folder / VOCABULARY)
            return None
    return f"First copy the language model's {VOCABULARY} into the folder: without it llama.cpp splits words otherwise."


def notes(config: dict[str, Any]) -> list[str]:
    """What llama.cpp does otherwise than transformers, in sentences."""
    said = [
        "llama.cpp resizes images by its own code: of images of another size than the tower's, pixels differ a little."
    ]
    if config["vision_config"]["model_type"] == "clip_vision_model":
        said.append(
            "llama.cpp puts CLIP's class token behind the patches and not in front (seen in llama-cpp-python 0.3.36): "
            "each patch gets its neighbour's position, and answers differ. With a SigLIP tower they are the same."
        )
    return said


def _tensors(folder: Path, layers: int):
    """Names of GGUF and values of tower and projector; layers that nothing reads are left out."""
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                if not key.startswith(("vision_tower.", "multi_modal_projector.")):
                    continue
                if ".post_layernorm." in key or ".head." in key:
                    continue
                if ".layers." in key and int(key.split(".layers.")[1].split(".")[0]) >= layers:
                    continue
                name = key
                for ours, theirs in _NAMES:
                    name = name.replace(ours, theirs)
                yield name, opened.get_tensor(key)
