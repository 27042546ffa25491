"""`aligngpt export --format gguf`: the file of the image side, read back by llama.cpp's own library."""

import json
import shutil

import gguf
import numpy as np
import pytest
from engines.make_models import TOKENIZER, save_sentencepiece_model
from modeling.tiny import LLAMA, SIGLIP, randomize
from safetensors.torch import load_file
from transformers.utils.chat_template_utils import render_jinja_template

from aligngpt_hub.engines.gguf_mmproj import check_convertible, write_mmproj
from aligngpt_trainers.commands import cli
from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.new_processor import processor_from_parts


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    save_sentencepiece_model(folder / "model")
    words = ["export", "--model", str(folder / "model"), "--output", str(folder / "out"), "--format", "gguf"]
    assert cli.main(words) == 0
    return folder / "out"


def fields(path) -> dict:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


def test_what_llama_cpp_reads_is_the_towers(exported):
    known = fields(exported / "mmproj.gguf")
    config = json.loads((exported / "config.json").read_text())
    vision = config["vision_config"]
    assert known["general.architecture"] == "clip" and known["general.type"] == "mmproj"
    assert known["clip.projector_type"] == "mlp" and known["clip.has_vision_encoder"] is True
    # the hidden state but one is behind so many layers, and nothing runs behind it
    assert known["clip.vision.feature_layer"] == [1] and known["clip.vision.block_count"] == 1
    for name, value in (
        ("image_size", vision["image_size"]),
        ("patch_size", vision["patch_size"]),
        ("embedding_length", vision["hidden_size"]),
        ("feed_forward_length", vision["intermediate_size"]),
        ("attention.head_count", vision["num_attention_heads"]),
        ("projection_dim", config["text_config"]["hidden_size"]),
    ):
        assert known[f"clip.vision.{name}"] == value, name
    assert known["clip.vision.attention.layer_norm_epsilon"] == pytest.approx(vision["layer_norm_eps"])
    settings = json.loads((exported / "processor_config.json").read_text())["image_processor"]
    assert known["clip.vision.image_mean"] == pytest.approx(settings["image_mean"])
    assert known["clip.vision.image_std"] == pytest.approx(settings["image_std"])
    assert known["clip.use_gelu"] is False, "CLIP's quick GELU"


def test_weights_are_those_of_the_llava(exported):
    weights = load_file(exported / "model.safetensors")
    tower = "vision_tower.vision_model."
    expected = {
        "v.class_embd": f"{tower}embeddings.class_embedding",
        "v.patch_embd.weight": f"{tower}embeddings.patch_embedding.weight",
        "v.position_embd.weight": f"{tower}embeddings.position_embedding.weight",
        "v.pre_ln.weight": f"{tower}pre_layrnorm.weight",
        "v.blk.0.attn_out.weight": f"{tower}encoder.layers.0.self_attn.out_proj.weight",
        "v.blk.0.ffn_up.weight": f"{tower}encoder.layers.0.mlp.fc1.weight",
        "v.blk.0.ffn_down.bias": f"{tower}encoder.layers.0.mlp.fc2.bias",
        "v.blk.0.ln2.weight": f"{tower}encoder.layers.0.layer_norm2.weight",
        "mm.0.weight": "multi_modal_projector.linear_1.weight",
        "mm.2.bias": "multi_modal_projector.linear_2.bias",
    }
    found = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(exported / "mmproj.gguf").tensors}
    # 16 of a layer, 4 in front (with pre_ln twice), 4 of the projector; no second layer, no last norm
    assert len(found) == 25 and not [name for name in found if "blk.1" in name or "post" in name]
    for name, key in expected.items():
        np.testing.assert_array_equal(found[name].reshape(weights[key].shape), weights[key].numpy(), err_msg=name)


def test_the_template_marks_images_as_llama_cpp_does(exported):
    template = (exported / "llama_cpp.jinja").read_text()
    content = "<__media__>\nwhat is it?"
    prompt = render_jinja_template(
        [[{"role": "user", "content": content}]], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )[0][0]
    # its tokenizer writes the spaces behind special tokens itself
    assert prompt.startswith("<s><align>A chat") and prompt.endswith("USER: <__media__>\nwhat is it? ASSISTANT:")


def test_the_vocabulary_comes_along_or_is_asked_for(exported, tmp_path, capsys):
    assert not (exported / "tokenizer.model").exists()
    words = ["export", "--model", str(exported.parent / "model"), "--output", str(tmp_path / "a"), "--format", "gguf"]
    assert cli.main(words) == 0
    assert "First copy the language model's tokenizer.model" in capsys.readouterr().out
    model = tmp_path / "model"
    shutil.copytree(exported.parent / "model", model)
    (model / "original").mkdir()
    shutil.copyfile(TOKENIZER / "tokenizer.model", model / "original" / "tokenizer.model")
    assert cli.main(["export", "--model", str(model), "--output", str(tmp_path / "b"), "--format", "gguf"]) == 0
    said = capsys.readouterr().out
    assert "First copy" not in said and "puts CLIP's class token behind the patches" in said
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == (TOKENIZER / "tokenizer.model").read_bytes()


def test_half_precision_is_for_matrices(exported, tmp_path):
    before = (exported / "mmproj.gguf").read_bytes()
    write_mmproj(exported, "float16")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(exported / "mmproj.gguf").tensors}
    (exported / "mmproj.gguf").write_bytes(before)
    assert kinds["mm.0.weight"] == kinds["v.blk.0.attn_q.weight"] == "F16"
    assert {kinds[name] for name in ("mm.0.bias", "v.patch_embd.weight", "v.position_embd.weight")} == {"F32"}


def test_siglip_has_neither_class_token_nor_first_norm(exported, tmp_path):
    processor = AlignGPTProcessor.from_pretrained(exported.parent / "model")
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "align")}
    text = {**LLAMA, "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    config = AlignGPTConfig(vision_config=SIGLIP, text_config=text, gate_hidden_size=8, **ids)
    randomize(AlignGPTForConditionalGeneration(config)).save_pretrained(tmp_path / "siglip")
    parts = processor_from_parts(tokenizer, config, chat_template=processor.chat_template, do_pad=True)
    parts.save_pretrained(tmp_path / "siglip")
    words = ["export", "--model", str(tmp_path / "siglip"), "--output", str(tmp_path / "out"), "--format", "gguf"]
    assert cli.main(words) == 0
    known = fields(tmp_path / "out" / "mmproj.gguf")
    assert known["clip.use_gelu"] is True and known["clip.vision.feature_layer"] == [2]
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "mmproj.gguf").tensors}
    assert not names & {"v.class_embd", "v.pre_ln.weight"} and {"v.patch_embd.bias", "v.blk.1.ln1.bias"} <= names
    assert all(name.startswith(("v.", "mm.")) for name in names)


def test_what_llama_cpp_cannot_run_is_refused_before_anything_is_written(exported, tmp_path, capsys):
    config = json.loads((exported / "config.json").read_text())
    settings = json.loads((exported / "processor_config.json").read_text())["image_processor"]
    for part, field, value, reason in (
        (config["text_config"], "model_type", "qwen2", "a LLaVA on qwen2"),
        (config["vision_config"], "model_type", "dinov2", "the tower dinov2"),
        (config["vision_config"], "hidden_act", "relu", "activation relu"),
        (config, "vision_feature_select_strategy", "full", "class token"),
        (settings, "do_pad", False, "images that are cropped"),
    ):
        before, part[field] = part[field], value
        with pytest.raises(ValueError, match=reason):
            check_convertible(config, settings)
        part[field] = before
    check_convertible(config, settings)

    save_sentencepiece_model(tmp_path / "model")
    processor = AlignGPTProcessor.from_pretrained(tmp_path / "model")
    processor.image_processor.do_pad = False
    processor.save_pretrained(tmp_path / "model")
    words = ["export", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--format", "gguf"]
    assert cli.main(words) == 2
    assert "llama.cpp lacks images that are cropped" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
