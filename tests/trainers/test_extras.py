"""What a command says when a package is missing or of another version; help in groups; other names of settings."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from aligngpt_trainers.commands import extras
from aligngpt_trainers.commands.arguments import DataArguments, ModelArguments, PretrainModelArguments
from aligngpt_trainers.commands.cli import COMMANDS, main
from aligngpt_trainers.commands.settings import check_settings
from aligngpt_trainers.instruct_config import AlignGPTInstructConfig
from aligngpt_trainers.pretrain_config import AlignGPTPretrainConfig


ROOT = Path(__file__).parents[2]


def said(capsys, *words: str) -> str:
    assert main(list(words)) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and "Traceback" not in line
    return line


@pytest.fixture
def versions(monkeypatch):
    """Makes packages missing (`None`) or of another version."""
    real = importlib.metadata.version

    def pretend(**changed):
        def version(name: str) -> str:
            if name in changed:
                if changed[name] is None:
                    raise importlib.metadata.PackageNotFoundError(name)
                return changed[name]
            return real(name)

        monkeypatch.setattr(extras, "version", version)

    return pretend


def test_every_extra_that_is_named_exists():
    provided = importlib.metadata.metadata("aligngpt").get_all("Provides-Extra")
    assert {*extras.EXTRAS.values(), *extras.LOGGERS} <= set(provided)
    assert set(extras.EXTRAS) <= set(COMMANDS)
    core = {"torch", "transformers", "pillow", "psutil", "sentencepiece", "protobuf"}
    assert core == {part.name for part in extras.requirements_of(None)}
    assert {"trl", "datasets", "peft"} <= {part.name for part in extras.requirements_of("train")}
    assert "bitsandbytes" in {part.name for part in extras.requirements_of("qlora")}


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [("pretrain", "datasets", "train"), ("score", "trl", "train"), ("serve", "uvicorn", "serve"),
     ("demo", "gradio", "demo"),
     ("levels", "peft", "train"), ("evaluate", "evaluate", "eval"), ("publish", "detect-secrets", "train")],
)  # fmt: skip
def test_a_missing_package_names_its_extra(command, missing, extra, versions, capsys):
    versions(**{missing: None})
    line = said(capsys, command, "--help")
    assert f"`aligngpt {command}` needs {missing}" in line and "not installed" in line
    assert f'pip install ".[{extra}]" in a checkout' in line


@pytest.mark.parametrize(("found", "command"), [("6.0.0", "instruct"), ("4.57.6", "pretrain"), ("5.17.0", "chat")])
def test_another_transformers_is_named_with_its_range(found, command, versions, capsys):
    versions(transformers=found)
    line = said(capsys, command, "--help")
    assert f"({found} is installed)" in line and "transformers >=" in line and "<" in line


def test_the_core_takes_what_the_trainers_do_not(versions, capsys):
    versions(transformers="5.99.0")
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "usage: aligngpt convert" in capsys.readouterr().out


CORE_ALONE = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None  # as where it is not installed
from aligngpt_trainers.commands.cli import main
checkpoint, tower, image, folder = sys.argv[2:]
model, sha = f"{folder}/model", "0" * 40
assert main(["convert", "--checkpoint", checkpoint, "--vision-tower", tower, "--output", model]) == 0
assert main(["chat", "--model", model, "--image", image, "--question", "what is it?", "--max-new-tokens", "4"]) == 0
assert main(["space", f"{folder}/space", "--model", "user/model", "--revision", sha]) == 0
"""


def closure(wanted: list[str], found: frozenset[str] = frozenset()) -> frozenset[str]:
    """Names of packages and of all that they ask for."""
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found = closure(importlib.metadata.requires(name) or [], found | {name})
    return found


def test_the_core_alone_converts_talks_and_makes_a_space(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = {Requirement(line).name for lines in project["optional-dependencies"].values() for line in lines}
    left_out = {canonicalize_name(name) for name in optional} - closure(project["dependencies"]) - {"aligngpt"}
    distributions = importlib.metadata.packages_distributions()
    modules = [name for name, of in distributions.items() if {canonicalize_name(item) for item in of} & left_out]
    assert {"accelerate", "datasets", "detect_secrets", "gradio", "trl"} <= set(modules)
    golden = ROOT / "tests" / "fixtures" / "golden"
    parts = [golden / "checkpoint", golden / "clip-vit-tiny", golden / "images" / "img0.png", tmp_path]
    words = [sys.executable, "-c", CORE_ALONE, " ".join(modules), *map(str, parts)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "model" / "model.safetensors").is_file() and (tmp_path / "space" / "app.py").is_file()


def test_a_space_that_is_sent_needs_what_looks_for_secrets(versions, capsys):
    versions(**{"detect-secrets": None})
    assert 'pip install ".[train]"' in said(capsys, "space", "out", "--model", "user/model", "--push")


def test_a_logger_that_is_missing_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    words = ["pretrain", "--language_model", "x", "--vision_tower", "y", "--dataset", "z", "--use_cpu", "true"]
    line = said(capsys, *words, "--output_dir", str(tmp_path), "--report_to", "wandb")
    assert "report_to: wandb needs the package wandb: pip install wandb." in line


def shown(capsys, *words: str) -> str:
    with pytest.raises(SystemExit):
        main(list(words))
    return capsys.readouterr().out


def test_help_shows_ours_first_in_groups_and_all_on_demand(capsys):
    text = shown(capsys, "pretrain", "--help")
    order = [text.index(f"\n{group}:") for group in ("model", "data", "alignment", "training", "LoRA")]
    assert order == sorted(order)
    assert "--accelerate_config NAME|FILE" in text and "--help-all" in text
    assert "--language_model LANGUAGE_MODEL, --model_name_or_path" in text and "Required" in text
    assert "--torchdynamo" not in text and "--adam_beta1" not in text
    everything = shown(capsys, "pretrain", "--help-all")
    assert "TRL and transformers:" in everything and "--adam_beta1" in everything
    assert len(text.splitlines()) < 200 < len(everything.splitlines())
    scored = shown(capsys, "score", "--help")
    assert scored.count("(required)") == 2 and "--accelerate_config" in scored
    assert "--accelerate_config" not in shown(capsys, "init", "--help")


def test_names_of_other_scripts(tmp_path):
    """`model_name_or_path` and `dataset_name`, on the command line and in YAML; both at once are refused."""
    kinds = {"pretrain": (PretrainModelArguments, DataArguments, AlignGPTPretrainConfig)}
    kinds["instruct"] = (ModelArguments, DataArguments, AlignGPTInstructConfig)
    for stage, field in (("pretrain", "language_model"), ("instruct", "model")):
        parser, words = check_settings(stage, kinds[stage], ["--model_name_or_path", "a", "--dataset-name", "b"])
        parsed = parser.parse_args(words)
        assert (getattr(parsed, field), parsed.dataset) == ("a", "b")
        recipe = tmp_path / f"{stage}.yaml"
        recipe.write_text("model_name_or_path: a\ndataset_name: b\n")
        parser, words = check_settings(stage, kinds[stage], ["--config", str(recipe)])
        parsed = parser.parse_args(words)
        assert (getattr(parsed, field), parsed.dataset) == ("a", "b")
        recipe.write_text("dataset: a\ndataset_name: b\n")
        with pytest.raises(ValueError, match="dataset and dataset_name are one setting"):
            check_settings(stage, kinds[stage], ["--config", str(recipe)])


IMPORTS = """
import sys
# the libraries have their own ways on Windows; here they may use what there is
import accelerate, bitsandbytes, datasets, fastapi, gradio, lmms_eval.api.model, peft, psutil, torch, transformers, trl
import uvicorn
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
import importlib, pkgutil
for package in ("modeling_aligngpt", "aligngpt_trainers", "aligngpt_hub", "aligngpt_playground", "aligngpt_recipes"):
    found = importlib.import_module(package)
    for module in pkgutil.walk_packages(found.__path__, f"{package}."):
        # the last two need vLLM, which has an environment of its own
        if ".space." not in module.name and not module.name.endswith(("__main__", ".vllm_model", ".vllm_processor")):
            importlib.import_module(module.name)
print("imported")
"""


def test_nothing_at_import_needs_unix():
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.stdout.strip().endswith("imported"), result.stderr[-2000:]


def test_recipes_are_found_by_name_listed_and_copied(tmp_path, capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert "vicuna-7b" in listed and "instruct_qlora" in listed and "zero3" in listed
    assert main(["recipes", "qwen3-8b/pretrain"]) == 0
    assert "google/siglip2-so400m-patch14-384" in capsys.readouterr().out
    assert main(["recipes", "vicuna-7b", "--copy", str(tmp_path)]) == 0
    assert (tmp_path / "vicuna-7b" / "pretrain.yaml").is_file()
    capsys.readouterr()
    assert "exists" in said(capsys, "recipes", "vicuna-7b", "--copy", str(tmp_path))
    assert "there is no recipe 'vicuna-8b'" in said(capsys, "recipes", "vicuna-8b")
    assert "did you mean 'vicuna-7b/pretrain'" in said(capsys, "check", "--config", "vicuna-7b/pretrian")
