"""`aligngpt init`: what it writes, says and refuses."""

import json
import re

import pytest
import torch
from local_hub.client import run_command
from local_hub.server import HubServer
from modeling.test_assembly import save_language_model, save_tower
from safetensors.torch import load_file, save_file

from aligngpt_trainers.commands import cli
from modeling_aligngpt import AlignGPTForConditionalGeneration
from modeling_aligngpt.assembly import assemble


def renamed(folder, new_name):
    """Gives every weight of a folder another name; those that get none are left out."""
    path = folder / "model.safetensors"
    weights = {new_name(key): value for key, value in load_file(path).items()}
    save_file({key: value for key, value in weights.items() if key is not None}, path, {"format": "pt"})


def test_vicunas_generation_config(tmp_path):
    """A temperature, and no `do_sample`: transformers refuses to save that."""
    folder, tower = save_language_model(tmp_path / "lm"), save_tower(tmp_path / "tower", "clip tower")
    settings = {"eos_token_id": 257, "pad_token_id": -1, "max_length": 4096, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assemble(folder, tower)[0].save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert not saved.keys() & {"temperature", "top_p", "do_sample", "max_length"}
    assert saved["max_new_tokens"] == 1024 and saved["pad_token_id"] >= 0


@pytest.mark.parametrize("kind", ["clip", "siglip tower"])
def test_another_image_size(tmp_path, kind, capsys):
    language_model, tower = save_language_model(tmp_path / "lm"), save_tower(tmp_path / "tower", kind)
    words = ["--llm", str(language_model), "--vision-tower", str(tower), "--output", str(tmp_path / "disk")]
    assert cli.main(["init", *words, "--image-size", "20"]) == 0
    assert re.search(r"image tokens \(image_seq_length\) +25 for an image of 20 pixels", capsys.readouterr().out)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "_orig_mod.module."])
def test_names_under_a_wrappers_prefix_are_the_same_model(tmp_path, prefix):
    language_model, tower = save_language_model(tmp_path / "lm"), save_tower(tmp_path / "tower", "clip")
    plain = assemble(language_model, tower)[0].state_dict()
    renamed(language_model, lambda key: prefix + key)
    held = assemble(language_model, tower)[0].state_dict()
    assert all(torch.equal(value, held[name]) for name, value in plain.items())


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
    AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "out")
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
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
