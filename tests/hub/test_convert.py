"""The authors' checkpoints to ours and back: exactness, every file layout, and what is refused."""

import argparse
import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from convert_parts import CHECKPOINT, NORM, TOWER, WEIGHTS, load_bin, reconfigure, refused, rewrite
from huggingface_hub import save_torch_state_dict
from parity.golden import GOLDEN, VOCAB_SIZE, read_json
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionModel, GenerationConfig

from aligngpt_hub.original import convert
from aligngpt_hub.original.convert import convert_checkpoint
from aligngpt_hub.original.export import export_original
from aligngpt_hub.original.format import is_buffer, open_checkpoint, to_original_key, to_our_key
from modeling_aligngpt.assembly import assemble
from modeling_aligngpt.chat_templates import CHAT_TEMPLATES, with_suffix
from modeling_aligngpt.modeling_aligngpt import AlignGPTForConditionalGeneration
from modeling_aligngpt.processing_aligngpt import AlignGPTProcessor


STAGE1, BASE_LLM = GOLDEN / "stage1", GOLDEN / "base_llm"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the finetuned checkpoint that a test may change; its tower lies beside it."""
    shutil.copytree(TOWER, tmp_path / TOWER.name)
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def load(folder: Path) -> AlignGPTForConditionalGeneration:
    return AlignGPTForConditionalGeneration.from_pretrained(folder)


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    """Equal keys, dtypes and bits of weights and stored constants; equal bytes of every other file."""
    one, other = open_checkpoint(ours), open_checkpoint(theirs)
    assert one.is_stage1 == other.is_stage1
    assert one.weights.keys() == other.weights.keys() and one.buffers.keys() == other.buffers.keys()
    read = [(key, one.weights.read(key), other.weights.read(key)) for key in other.weights]
    for key, mine, original in (*read, *((key, one.buffers[key], value) for key, value in other.buffers.items())):
        assert mine.dtype == original.dtype, key
        assert torch.equal(mine, original), key
    for file in theirs.iterdir():
        if file.suffix in (".json", ".model") and not file.name.endswith(".index.json"):
            assert (ours / file.name).read_bytes() == file.read_bytes(), file.name


# --- the way there and back ------------------------------------------------------------------------------------------


def sharded_safetensors(folder: Path) -> None:
    save_torch_state_dict(load_bin(folder / WEIGHTS), folder, max_shard_size="300KB", metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def sharded_bin(folder: Path) -> None:
    weights = load_bin(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_torch_state_dict(weights, folder, max_shard_size="300KB", safe_serialization=False)
    assert len(list(folder.glob("pytorch_model-*.bin"))) > 2


def single_safetensors(folder: Path) -> None:
    save_file(load_bin(folder / WEIGHTS), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()


def torch_format_before_1_6(folder: Path) -> None:
    torch.save(load_bin(folder / WEIGHTS), folder / WEIGHTS, _use_new_zipfile_serialization=False)


def without_tower(folder: Path) -> None:
    rewrite(folder, lambda weights: [weights.pop(key) for key in list(weights) if key.startswith("vision_tower.")])


def half_precision(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({k: v.to(torch.bfloat16) for k, v in weights.items()}))
    reconfigure(folder, torch_dtype="bfloat16")


def mixed_precision(folder: Path) -> None:
    def change(weights):
        for key, value in weights.items():
            weights[key] = value.to(torch.bfloat16 if key.startswith("mm_projector") else torch.float16)

    rewrite(folder, change)


LAYOUTS = (
    lambda folder: None,
    single_safetensors,
    sharded_safetensors,
    sharded_bin,
    torch_format_before_1_6,
    without_tower,
    half_precision,
    mixed_precision,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__.replace("<lambda>", "as_released"))
def test_round_trip_of_a_finetuned_model(layout, checkpoint, tmp_path):
    layout(checkpoint)
    ours = convert_checkpoint(checkpoint, tmp_path / "ours", max_shard_size="400KB")
    assert (ours / "model.safetensors.index.json").is_file()
    back = export_original(ours, tmp_path / "back", max_shard_size="400KB")
    assert (back / "model.safetensors.index.json").is_file()
    assert_same_checkpoint(back, checkpoint)
    again = convert_checkpoint(back, tmp_path / "again", vision_tower=TOWER)
    first, second = load(ours).state_dict(), load(again).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_round_trip_of_stage_1(tmp_path):
    ours = convert_checkpoint(STAGE1, tmp_path / "ours", base_llm=BASE_LLM, vision_tower=TOWER)
    back = export_original(ours, tmp_path / "back")
    assert_same_checkpoint(back, STAGE1)
    assert load_bin(back / "mm_projector_align.bin").keys() == load_bin(STAGE1 / "mm_projector_align.bin").keys()


def test_keys_of_the_format():
    for key in read_json("checkpoint_keys"):
        assert to_original_key(to_our_key(key)) == key
    with pytest.raises(ValueError, match=r"somewhere\.else"):
        to_our_key("somewhere.else")
    with pytest.raises(ValueError, match="optimizer"):
        to_original_key("optimizer.state")


# --- what a converted model is ---------------------------------------------------------------------------------------


def test_finetuned_model(checkpoint, tmp_path):
    ours = convert_checkpoint(checkpoint, tmp_path / "ours")
    model, processor, theirs = load(ours), AlignGPTProcessor.from_pretrained(ours), load_bin(CHECKPOINT / WEIGHTS)
    config = model.config
    assert (config.align_mode, config.training_stage, config.gate_context) == ("gate", "instruct", "sequence")
    assert config.vision_feature_layer == json.loads((CHECKPOINT / "config.json").read_text())["mm_vision_select_layer"]
    assert config.num_align_levels == len(theirs["align_indicators.indicator_embs"])
    assert config.gate_hidden_size == len(theirs["gated_weight_layer.mlp.0.bias"])
    assert config.text_config.vocab_size % 64 == 0
    assert config.text_config.vocab_size >= VOCAB_SIZE + 2
    parameters = model.state_dict()
    for key, value in theirs.items():
        if "inv_freq" not in key:
            assert torch.equal(parameters[to_our_key(key)][: len(value)], value), key
    head = parameters["lm_head.weight"]
    mean = theirs["lm_head.weight"].mean(0)
    assert torch.allclose(head[VOCAB_SIZE:], mean.expand(len(head) - VOCAB_SIZE, -1), atol=1e-6)
    assert processor.image_processor.do_pad
    assert processor.chat_template == with_suffix(CHAT_TEMPLATES["vicuna_v1"], " ", processor.tokenizer)
    assert processor.tokenizer.pad_token == "<unk>"
    ids = processor.tokenizer.convert_tokens_to_ids(["<image>", "<align>"])
    assert ids == [config.image_token_id, config.align_token_id] == [VOCAB_SIZE, VOCAB_SIZE + 1]
    generation = GenerationConfig.from_pretrained(ours)
    assert set(ids) <= set(generation.suppress_tokens)
    assert (generation.bos_token_id, generation.eos_token_id, generation.max_new_tokens) == (1, 2, 1024)


def test_a_generation_config_that_transformers_would_not_save(checkpoint, tmp_path):
    settings = {"eos_token_id": 2, "max_length": 4096, "temperature": 0.9, "top_p": 0.6}  # Vicuna 1.5's
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    ours = convert_checkpoint(checkpoint, tmp_path / "ours")
    saved = json.loads((ours / "generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["max_new_tokens"]) == (2, 1024)
    assert not saved.keys() & {"temperature", "top_p", "max_length"}


def test_stage_1_model(tmp_path):
    ours = convert_checkpoint(STAGE1, tmp_path / "ours", base_llm=BASE_LLM, vision_tower=TOWER)
    model, processor = load(ours), AlignGPTProcessor.from_pretrained(ours)
    assert (model.config.align_mode, model.config.training_stage) == ("level", "pretrain")
    assert model.config.default_align_level is None  # the top one
    assert not processor.image_processor.do_pad
    assert processor.chat_template == with_suffix(CHAT_TEMPLATES["plain"], " ", processor.tokenizer)
    base = load_bin(BASE_LLM / WEIGHTS)
    parameters = model.state_dict()
    for key, value in {**base, **load_bin(STAGE1 / "mm_projector_align.bin")}.items():
        if "inv_freq" not in key:
            assert torch.equal(parameters[to_our_key(key)][: len(value)], value), key
    twice = load(convert_checkpoint(STAGE1 / "mm_projector_align.bin", tmp_path / "twice", base_llm=BASE_LLM))
    assert all(torch.equal(value, parameters[key]) for key, value in twice.state_dict().items()), "gate included"


def test_unk_in_a_text_is_no_padding(checkpoint, tmp_path):
    ours = convert_checkpoint(checkpoint, tmp_path / "ours")
    model, processor = load(ours), AlignGPTProcessor.from_pretrained(ours)
    text = "a <unk> b"
    rows = processor(text=[text, text + " and so on"], padding=True, return_tensors="pt")
    unknown = processor.tokenizer.unk_token_id
    assert unknown in rows["input_ids"][1]
    assert rows["attention_mask"][1].all()
    alone = processor(text=text, return_tensors="pt")
    assert alone["attention_mask"].all()
    logits = model(**alone).logits
    without = model(input_ids=alone["input_ids"][alone["input_ids"] != unknown][None]).logits
    assert not torch.allclose(logits[0, -1], without[0, -1], atol=1e-4)
    length = alone["input_ids"].shape[1]
    assert torch.allclose(model(**rows).logits[0, :length], logits[0], atol=1e-5)


@pytest.mark.parametrize(("dtype", "kept"), [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_dtype(dtype, kept, checkpoint, tmp_path):
    half_precision(checkpoint)
    ours = convert_checkpoint(checkpoint, tmp_path / "ours", dtype=dtype)
    assert {str(p.dtype) for p in load(ours).parameters()} == {f"torch.{kept}"}
    assert json.loads((ours / "config.json").read_text())["dtype"] == kept


def test_mixed_dtypes_lose_nothing_and_are_reported(checkpoint, tmp_path, caplog):
    mixed_precision(checkpoint)
    ours = convert_checkpoint(checkpoint, tmp_path / "ours")
    assert "mixes dtypes (bfloat16, float16)" in caplog.text
    stored = load_file(ours / "model.safetensors")
    for key, value in load_bin(checkpoint / WEIGHTS).items():
        found = value if is_buffer(key) else stored[to_our_key(key)][: len(value)]
        assert found.dtype == value.dtype and torch.equal(found, value), key
    # loaded as most of it is stored
    assert {p.dtype for p in load(ours).parameters()} == {torch.float16}


def test_images_as_the_config_says(checkpoint, tmp_path):
    reconfigure(checkpoint, image_aspect_ratio="square", mm_vision_select_layer=-1)
    ours = convert_checkpoint(checkpoint, tmp_path / "ours", chat_template="llama_2", gate_context="sequence")
    processor = AlignGPTProcessor.from_pretrained(ours)
    assert not processor.image_processor.do_pad
    assert processor.chat_template == with_suffix(CHAT_TEMPLATES["llama_2"], " ", processor.tokenizer)
    config = load(ours).config
    assert (config.vision_feature_layer, config.gate_context) == (-1, "sequence")


def test_images_at_several_scales(checkpoint, tmp_path):
    weight = load_bin(checkpoint / WEIGHTS)["mm_projector.0.weight"]
    wide = torch.cat([weight, 0.5 * weight.flip(1)], dim=1)
    rewrite(checkpoint, lambda weights: weights.update({"mm_projector.0.weight": wide}))
    size = json.loads((TOWER / "config.json").read_text())
    size = size.get("vision_config", size)["image_size"]
    reconfigure(checkpoint, use_s2=True, s2_scales=f"{size},{2 * size}", mm_hidden_size=wide.shape[1])
    ours = convert_checkpoint(checkpoint, tmp_path / "ours")
    model, processor = load(ours), AlignGPTProcessor.from_pretrained(ours)
    assert model.config.vision_scales == [1, 2]
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, wide)
    assert processor.image_processor.crop_size["height"] == 2 * size
    assert_same_checkpoint(export_original(ours, tmp_path / "back"), checkpoint)
    assembled = AlignGPTForConditionalGeneration(model.config)
    assembled.save_pretrained(tmp_path / "assembled")
    processor.save_pretrained(tmp_path / "assembled")
    derived = export_original(tmp_path / "assembled", tmp_path / "derived", tokenizer=BASE_LLM, vision_tower="tower")
    fields = json.loads((derived / "config.json").read_text())
    assert (fields["use_s2"], fields["s2_scales"]) == (True, f"{size},{2 * size}")
    assert fields["mm_hidden_size"] == wide.shape[1]


@pytest.mark.parametrize("sizes", ["96,144", "48,100", [96]])
def test_scales_that_do_not_fit_the_tower(sizes, checkpoint):
    reconfigure(checkpoint, use_s2=True, s2_scales=sizes)
    refused(checkpoint, "smallest must be the tower's image_size 48")


def test_no_path_of_this_machine_is_written(checkpoint, tmp_path):
    ours = convert_checkpoint(checkpoint, tmp_path / "ours")
    for file in ours.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file.name


def test_tower_from_a_dual_encoder(checkpoint, tmp_path):
    tower = CLIPVisionModel.from_pretrained(TOWER)
    text = CLIPTextConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    both = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=tower.config.to_dict(), projection_dim=16))
    inner = getattr(tower, "vision_model", tower)
    both.vision_model.load_state_dict(inner.state_dict())
    both.save_pretrained(tmp_path / "both")
    shutil.copy(TOWER / "preprocessor_config.json", tmp_path / "both")
    without_tower(checkpoint)
    ours = load(convert_checkpoint(checkpoint, tmp_path / "ours", vision_tower=tmp_path / "both"))
    for key, value in inner.state_dict().items():
        assert torch.equal(ours.model.vision_tower.state_dict()[key], value), key


def test_tied_embeddings(tmp_path):
    base = Path(shutil.copytree(BASE_LLM, tmp_path / "base"))
    rewrite(base, lambda weights: weights.pop("lm_head.weight"))
    reconfigure(base, tie_word_embeddings=True)
    model = load(convert_checkpoint(STAGE1, tmp_path / "ours", base_llm=base, vision_tower=TOWER))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight[:VOCAB_SIZE], load_bin(base / WEIGHTS)["model.embed_tokens.weight"])


def test_parts_named_by_hub_id(tmp_path, monkeypatch):
    """Ids are resolved by the Hub client: here from its cache, as on a machine without a network."""
    for name, folder in (("lab/llm", BASE_LLM), ("lab/tower", TOWER), ("lab/aligngpt", CHECKPOINT)):
        repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / "0123")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    by_id = load(convert_checkpoint("lab/aligngpt", tmp_path / "by_id", vision_tower="lab/tower")).state_dict()
    by_path = load(convert_checkpoint(CHECKPOINT, tmp_path / "by_path", vision_tower=TOWER)).state_dict()
    assert all(torch.equal(by_id[key], value) for key, value in by_path.items())
    convert_checkpoint(STAGE1, tmp_path / "stage1", base_llm="lab/llm", vision_tower="lab/tower")
    with pytest.raises(ValueError, match="lab/absent"):
        convert_checkpoint(STAGE1, tmp_path / "absent", base_llm="lab/absent")


# --- a model of ours that never was theirs ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_export_of_an_assembled_model(stage, tmp_path):
    model, processor = assemble(BASE_LLM, TOWER, align_mode="level" if stage == 1 else "gate", do_pad=stage == 2)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    back = export_original(tmp_path / "model", tmp_path / "back", tokenizer=BASE_LLM, vision_tower="clip")
    shutil.copytree(TOWER, tmp_path / "clip")
    theirs = json.loads((back / "config.json").read_text())
    reference = json.loads(((STAGE1 if stage == 1 else CHECKPOINT) / "config.json").read_text())
    bookkeeping = {"_name_or_path", "architectures", "mm_vision_tower", "transformers_version", "mm_projector_lr"}
    # transformers writes the language model's class into the stage-1 config, and has no field for an unused rate
    for field in reference.keys() - bookkeeping - {"tokenizer_model_max_length"}:
        assert theirs[field] == reference[field], field
    assert theirs["mm_vision_tower"] == "clip"
    if stage == 1:
        assert sorted(path.name for path in back.iterdir()) == ["config.json", "mm_projector_align.bin"]
    else:
        assert (
            read_json("checkpoint_keys").keys()
            == {**open_checkpoint(back).weights, **open_checkpoint(back).buffers}.keys()
        )
        inv_freq = load_bin(CHECKPOINT / WEIGHTS)["model.layers.0.self_attn.rotary_emb.inv_freq"]
        assert torch.equal(open_checkpoint(back).buffers["model.layers.0.self_attn.rotary_emb.inv_freq"], inv_freq)
    again = load(convert_checkpoint(back, tmp_path / "again", base_llm=BASE_LLM)).state_dict()
    for key, value in model.state_dict().items():
        if stage == 2 or "align_gate" not in key:
            assert torch.equal(again[key], value), key


def test_export_after_another_stage(tmp_path):
    """A record of the conversion does not outlive the stage that it speaks of."""
    ours = convert_checkpoint(STAGE1, tmp_path / "ours", base_llm=BASE_LLM, vision_tower=TOWER)
    reconfigure(ours, training_stage="instruct", align_mode="gate")
    back = export_original(ours, tmp_path / "back", tokenizer=BASE_LLM, vision_tower=str(TOWER))
    assert not open_checkpoint(back).is_stage1


def test_export_names_what_it_lacks(tmp_path):
    model, processor = assemble(BASE_LLM, TOWER, align_mode="gate")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="--vision-tower"):
        export_original(tmp_path / "model", tmp_path / "back")
    with pytest.raises(ValueError, match="--base-llm"):
        export_original(tmp_path / "model", tmp_path / "back", vision_tower="clip")
    with pytest.raises(ValueError, match="no AlignGPT model in this format"):
        export_original(CHECKPOINT, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [NORM, "mm_projector.2.bias", "align_indicators.indicator_embs", "gated_weight_layer.mlp.0.weight"],
)
def test_missing_weight(key, checkpoint):
    rewrite(checkpoint, lambda weights: weights.pop(key))
    refused(checkpoint, f"missing: .*{key}")


def test_surplus_weight(checkpoint):
    rewrite(checkpoint, lambda weights: weights.update({"mm_projector.4.weight": torch.zeros(2)}))
    refused(checkpoint, "surplus: mm_projector.4.weight")


def test_misshapen_weight(checkpoint):
    rewrite(checkpoint, lambda weights: weights.update({NORM: torch.zeros(3)}))
    refused(checkpoint, rf"of another shape: {NORM} \[3\] instead of")


def test_weights_that_are_no_floats(checkpoint):
    rewrite(checkpoint, lambda w: w.update({NORM: torch.ones(w[NORM].shape, dtype=torch.int8)}))
    refused(checkpoint, f"not floating: {NORM}")


def test_all_problems_are_named_at_once(checkpoint):
    def change(weights):
        del weights["mm_projector.0.bias"]
        weights["mm_projector.9.bias"] = torch.zeros(1)

    rewrite(checkpoint, change)
    refused(checkpoint, r"missing: mm_projector.0.bias; surplus: mm_projector.9.bias")


def test_constants_are_no_weights(checkpoint, tmp_path):
    name = "vision_tower.vision_tower.vision_model.embeddings.position_ids"
    rewrite(checkpoint, lambda weights: weights.update({name: torch.arange(4)[None]}))
    back = export_original(convert_checkpoint(checkpoint, tmp_path / "ours"), tmp_path / "back")
    assert_same_checkpoint(back, checkpoint)


def test_wrong_language_model(tmp_path):
    base = Path(shutil.copytree(BASE_LLM, tmp_path / "base"))
    rewrite(base, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing: model.layers.1.mlp.up_proj.weight"):
        convert_checkpoint(STAGE1, tmp_path / "ours", base_llm=base, vision_tower=TOWER)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mm_projector_type", "linear"),
        ("mm_use_im_start_end", True),
        ("mm_use_im_patch_token", True),
        ("image_aspect_ratio", "anyres"),
        ("mm_vision_select_feature", "cls"),
        ("use_s2", "maybe"),
        ("model_type", "llava"),
        ("model_type", "aligngpt_unheard_of"),
    ],
)
def test_config_that_asks_for_something_else(field, value, checkpoint):
    reconfigure(checkpoint, **{field: value})
    refused(checkpoint, f"{field}={value!r}")


def test_converted_checkpoint_is_not_converted_again(checkpoint, tmp_path):
    ours = convert_checkpoint(checkpoint, tmp_path / "first")
    refused(ours, "Already converted")


class Harmful:
    """Would create a file when unpickled."""

    def __reduce__(self):
        return exec, ("open('pwned', 'w').close()",)


def test_pickle_that_runs_code(checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (checkpoint / WEIGHTS).unlink()
    torch.save({"mm_projector.0.weight": Harmful()}, checkpoint / WEIGHTS)
    refused(checkpoint, "is refused: it holds more than tensors")
    with open(checkpoint / WEIGHTS, "wb") as file:
        pickle.dump(Harmful(), file)
    refused(checkpoint, WEIGHTS)
    assert not (tmp_path / "pwned").exists()


def test_damaged_files(checkpoint, tmp_path):
    whole = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused(checkpoint, f"{WEIGHTS} cannot be read")
    torch.save([torch.zeros(2)], checkpoint / WEIGHTS)
    refused(checkpoint, "no flat dict of tensors")
    (checkpoint / WEIGHTS).write_bytes(whole)
    sharded_safetensors(checkpoint)
    shard = sorted(checkpoint.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    refused(checkpoint, f"{shard.name} cannot be read")
    shard.unlink()
    refused(checkpoint, f"names files that are not there: {shard.name}")
    (checkpoint / "config.json").write_text("{")
    refused(checkpoint, "config.json cannot be read as JSON")
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "holds no config.json")


def test_missing_parts(checkpoint, tmp_path):
    refused(checkpoint, "chat_template='vicuna'", chat_template="vicuna")
    refused(checkpoint, "gate_context='all'", gate_context="all")
    refused(checkpoint, "dtype='int8'", dtype="int8")
    with pytest.raises(ValueError, match="nowhere"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "ours")
    shutil.rmtree(tmp_path / TOWER.name)
    refused(checkpoint, "vision tower .*--vision-tower")
    (checkpoint / WEIGHTS).unlink()
    refused(checkpoint, "holds no weights", vision_tower=TOWER)
    with pytest.raises(ValueError, match="--base-llm"):
        convert_checkpoint(shutil.copytree(STAGE1, tmp_path / "stage1"), tmp_path / "ours", vision_tower=TOWER)


def test_tokenizer_comes_from_the_language_model_where_the_checkpoint_has_none(checkpoint, tmp_path):
    for file in checkpoint.glob("*token*"):
        file.unlink()
    refused(checkpoint, "--base-llm")
    ours = convert_checkpoint(checkpoint, tmp_path / "ours", base_llm=BASE_LLM)
    assert len(AlignGPTProcessor.from_pretrained(ours).tokenizer) == VOCAB_SIZE + 2


def test_output_in_use(checkpoint, tmp_path):
    output = tmp_path / "used"
    output.mkdir()
    convert_checkpoint(checkpoint, output)  # empty: taken
    with pytest.raises(ValueError, match="exists: choose another folder"):
        convert_checkpoint(checkpoint, output)
    with pytest.raises(ValueError, match="exists: choose another folder"):
        export_original(output, output)
    assert load(output) is not None


# --- the command -----------------------------------------------------------------------------------------------------


def parse(*arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.mark.parametrize("stage", [1, 2])
def test_the_next_command_after_the_way_back_works(stage, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    convert_checkpoint(STAGE1 if stage == 1 else checkpoint, "ours", base_llm=BASE_LLM, vision_tower=TOWER)
    shutil.move(TOWER.name, "moved")
    assert convert.run(parse("--checkpoint", "ours", "--to-original", "--output", "back")) == 0
    words = capsys.readouterr().out.splitlines()[-1].partition("aligngpt convert ")[2].split()
    named = {"DIR": "again", "LLM": str(BASE_LLM), "TOWER": "moved"}
    assert convert.run(parse(*(named.get(word, word) for word in words))) == 0
    first, second = load(Path("ours")).state_dict(), load(Path("again")).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_command_both_ways(checkpoint, tmp_path, capsys):
    assert convert.run(parse("--checkpoint", checkpoint, "--output", tmp_path / "ours", "--dtype", "bfloat16")) == 0
    assert load(tmp_path / "ours").dtype == torch.bfloat16
    assert str(tmp_path / "ours") in capsys.readouterr().out
    arguments = (
        "--checkpoint",
        STAGE1,
        "--base-llm",
        BASE_LLM,
        "--vision-tower",
        TOWER,
        "--output",
        tmp_path / "stage1",
    )
    assert convert.run(parse(*arguments)) == 0
    assert convert.run(parse("--checkpoint", tmp_path / "stage1", "--to-original", "--output", tmp_path / "back")) == 0
    assert_same_checkpoint(tmp_path / "back", STAGE1)
    with pytest.raises(ValueError, match="no effect"):
        convert.run(parse("--checkpoint", "a", "--output", "b", "--to-original", "--gate-context", "first_turn"))
