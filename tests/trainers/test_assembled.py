"""`aligngpt init` puts a model together on disk: the same files as `assemble` and `save_pretrained` make."""

import json
import re

import pytest
import torch
from local_hub.client import run_command
from local_hub.server import HubServer
from modeling.test_assembly import save_language_model, save_tower
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from aligngpt_trainers.commands import cli
from aligngpt_trainers.storage import assembled
from aligngpt_trainers.storage.assembled import write_assembled
from modeling_aligngpt import AlignGPTForConditionalGeneration
from modeling_aligngpt.assembly import assemble


FAMILIES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral"},
    "phi with a head bias": {"model_type": "phi", "partial_rotary_factor": 0.5},
    "qwen2": {"model_type": "qwen2"},
    "gemma": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
    "opt": {"model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16, "do_layer_norm_before": True},
}


def assert_same_folder(one, other):
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in sorted(names - {"model.safetensors"}):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name].dtype != theirs[name].dtype] == []
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.fixture
def in_memory(monkeypatch):
    """How often a model was assembled in memory."""
    calls = []
    monkeypatch.setattr(assembled, "assemble", lambda *args, **kwargs: calls.append(args) or assemble(*args, **kwargs))
    return calls


@pytest.mark.parametrize(
    ("kind", "dtype"), [("clip", torch.float32), ("siglip tower", torch.bfloat16)], ids=["clip", "siglip in bfloat16"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_folder_without_holding_it(tmp_path, in_memory, family, kind, dtype):
    language_model = save_language_model(tmp_path / "lm", **FAMILIES[family])
    tower = save_tower(tmp_path / "tower", kind)
    model, processor = assemble(language_model, tower, dtype=dtype, num_align_levels=6, seed=3)
    model.save_pretrained(tmp_path / "memory")
    processor.save_pretrained(tmp_path / "memory")
    (tmp_path / "disk").mkdir()
    written, _ = write_assembled(
        language_model, tower, tmp_path / "disk", dtype=dtype, num_align_levels=6, seed=3, max_shard_size="5GB"
    )
    assert not in_memory and {value.device.type for value in written.parameters()} == {"meta"}
    assert_same_folder(tmp_path / "disk", tmp_path / "memory")
    AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "disk")


@pytest.mark.parametrize("kind", ["clip", "siglip tower"])
def test_another_image_size_without_holding_it(tmp_path, in_memory, kind, capsys):
    language_model, tower = save_language_model(tmp_path / "lm"), save_tower(tmp_path / "tower", kind)
    model, processor = assemble(language_model, tower, dtype=torch.bfloat16, image_size=20)
    model.save_pretrained(tmp_path / "memory")
    processor.save_pretrained(tmp_path / "memory")
    words = ["--llm", str(language_model), "--vision-tower", str(tower), "--output", str(tmp_path / "disk")]
    assert cli.main(["init", *words, "--image-size", "20"]) == 0
    assert not in_memory
    assert_same_folder(tmp_path / "disk", tmp_path / "memory")
    assert re.search(r"image tokens \(image_seq_length\) +25 for an image of 20 pixels", capsys.readouterr().out)


def test_a_language_model_in_half_precision_and_several_files(tmp_path, in_memory):
    """The padded rows are the mean in the dtype that is asked for, not in the stored one."""
    folder = save_language_model(
        tmp_path / "lm", generation_config=GenerationConfig(bos_token_id=256, eos_token_id=257, max_new_tokens=7)
    )
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    (folder / "model.safetensors").unlink(missing_ok=True)
    tower = save_tower(tmp_path / "tower", "clip tower")
    model, processor = assemble(folder, tower)
    model.save_pretrained(tmp_path / "memory")
    processor.save_pretrained(tmp_path / "memory")
    (tmp_path / "disk").mkdir()
    write_assembled(folder, tower, tmp_path / "disk")
    assert not in_memory
    assert_same_folder(tmp_path / "disk", tmp_path / "memory")
    (tmp_path / "sharded").mkdir()
    write_assembled(folder, tower, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    loaded = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "sharded").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("write", [True, False], ids=["on disk", "in memory"])
def test_vicunas_generation_config(tmp_path, write):
    """A temperature, and no `do_sample`: transformers refuses to save that."""
    folder, tower = save_language_model(tmp_path / "lm"), save_tower(tmp_path / "tower", "clip tower")
    settings = {"eos_token_id": 257, "pad_token_id": -1, "max_length": 4096, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "model").mkdir()
    if write:
        write_assembled(folder, tower, tmp_path / "model")
    else:
        assemble(folder, tower)[0].save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert not saved.keys() & {"temperature", "top_p", "do_sample", "max_length"}
    assert saved["max_new_tokens"] == 1024 and saved["pad_token_id"] >= 0


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_weights_in_another_form_are_assembled_in_memory(tmp_path, in_memory, family):
    """GPT-NeoX's files call the head otherwise than its class does, Mixtral's hold each expert apart."""
    text = {"model_type": family, **({"num_local_experts": 2, "num_experts_per_tok": 1} if family == "mixtral" else {})}
    language_model, tower = save_language_model(tmp_path / "lm", **text), save_tower(tmp_path / "tower", "clip")
    stored = load_file(language_model / "model.safetensors").keys()
    own = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(language_model)).state_dict().keys()
    (tmp_path / "disk").mkdir()
    write_assembled(language_model, tower, tmp_path / "disk")
    # which of the two it is, is transformers' and changes with its version
    assert bool(in_memory) == (not own <= stored)
    model, _ = assemble(language_model, tower)
    loaded = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "disk").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def renamed(folder, new_name):
    """Gives every weight of a folder another name; those that get none are left out."""
    path = folder / "model.safetensors"
    weights = {new_name(key): value for key, value in load_file(path).items()}
    save_file({key: value for key, value in weights.items() if key is not None}, path, {"format": "pt"})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "_orig_mod.module."])
def test_names_under_a_wrappers_prefix_are_the_same_model(tmp_path, in_memory, prefix):
    language_model, tower = save_language_model(tmp_path / "lm"), save_tower(tmp_path / "tower", "clip")
    plain, _ = assemble(language_model, tower)
    renamed(language_model, lambda key: prefix + key)
    (tmp_path / "disk").mkdir()
    write_assembled(language_model, tower, tmp_path / "disk")
    assert not in_memory
    loaded = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "disk").state_dict()
    held = assemble(language_model, tower)[0].state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, loaded[name]) and torch.equal(value, held[name]), name


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("new_name", "said"),
    [
        (lambda key: None if key == NORM else key, rf"lacks 1 weights of a llama \({NORM}\)"),
        (lambda key: None if key == "lm_head.weight" else key, r"lacks 1 weights of a llama \(lm_head.weight\)"),
        (lambda key: f"elsewhere.{key}", r"lacks 21 weights of a llama \(lm_head.weight, model.embed_tokens.weight, "),
    ],
    ids=["one weight", "the head", "all under an unknown prefix"],
)
def test_a_language_model_that_lacks_weights_is_refused(tmp_path, capsys, new_name, said):
    language_model, tower = save_language_model(tmp_path / "lm"), save_tower(tmp_path / "tower", "clip")
    renamed(language_model, new_name)
    words = ["init", "--llm", str(language_model), "--vision_tower", str(tower), "--output", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_named_and_leaves_nothing(tmp_path, capsys):
    language_model, tower = save_language_model(tmp_path / "lm"), save_tower(tmp_path / "tower", "clip")
    weights = language_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    words = ["init", "--llm", str(language_model), "--vision_tower", str(tower), "--output", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_describes_what_it_wrote(tmp_path, capsys):
    language_model, tower = save_language_model(tmp_path / "lm"), save_tower(tmp_path / "tower", "clip")
    words = ["init", "--llm", str(language_model), "--vision_tower", str(tower), "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    size = sum(value.numel() for value in load_file(tmp_path / "out" / "model.safetensors").values())
    counts = [int(line.split()[-2].replace(",", "")) for line in said.splitlines() if line.endswith("parameters")]
    assert sum(counts) == size
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_from_the_hub_and_again_from_its_cache_without_a_network(tmp_path):
    save_language_model(tmp_path / "lm")
    save_tower(tmp_path / "tower", "clip")
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("models", "some/llm", tmp_path / "lm")
        hub.add_repo("models", "some/tower", tmp_path / "tower")
        words = ["init", "--llm", "some/llm", "--vision_tower", "some/tower", "--output"]
        result = run_command(hub, *words, tmp_path / "one", home=tmp_path / "home")
        assert result.returncode == 0, result.stderr[-3000:]
    # the server is gone
    result = run_command(hub, *words, tmp_path / "other", home=tmp_path / "home", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_folder(tmp_path / "one", tmp_path / "other")
