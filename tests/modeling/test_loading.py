"""
A saved folder in fresh processes, where nothing of ours is installed: with this transformers, and with 4.57.

4.57 is installed beside the tests (`pip install --target`, no dependencies but tokenizers and huggingface_hub) and kept
in pytest's cache. `ALIGNGPT_TRANSFORMERS_4` may name a folder that holds it already.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zygote
from modeling import fresh_process
from modeling.test_assembly import save_language_model, save_tower
from modeling.tiny import make_batch, randomize, row, tiny_model
from safetensors.torch import load_file
from transformers import __version__ as version

import modeling_aligngpt
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import assemble
from modeling_aligngpt.base_aligngpt import UNQUANTIZED


TRANSFORMERS_4 = ["transformers==4.57.6", "tokenizers>=0.22,<0.23", "huggingface_hub>=0.34,<1"]
GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
ROOT = str(Path(modeling_aligngpt.__file__).parents[1])
# the largest difference of a logit that is still the same number
TOLERANCE = 1e-5


def run_fresh(args, folder: Path, transformers_4: Path | None = None, path=()):
    """A Python process with an empty Hub cache, no network, no terminal, and its own working directory."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANS"))}
    search = [str(part) for part in (transformers_4, *path) if part]
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(search), "TOKENIZERS_PARALLELISM": "false"}
    if str(args[0]).endswith(".py") and not search:
        return zygote.run_file(args[0], [*map(str, args[1:])], environment=environment, folder=folder, timeout=300)
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def read_report(saved: Path, folder: Path, transformers_4: Path | None = None):
    """Report, tensors and folder of `fresh_process.py`."""
    output = folder / "output"
    result = run_fresh([fresh_process.__file__, saved, output], folder / "elsewhere", transformers_4)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((output / "report.json").read_text()), load_file(output / "tensors.safetensors"), output


@pytest.fixture(scope="session")
def transformers_4(request, tmp_path_factory) -> Path:
    """A folder with transformers 4.57 to put in front of the import path."""
    if given := os.environ.get("ALIGNGPT_TRANSFORMERS_4"):
        return Path(given)
    cache = getattr(request.config, "cache", None)
    folder = Path(cache.mkdir("transformers-4")) if cache else tmp_path_factory.mktemp("transformers-4")
    done = folder / "-".join(TRANSFORMERS_4).translate(str.maketrans("<>=,", "____"))
    if not done.exists():
        partial = folder / f"{done.name}.{os.getpid()}.partial"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        result = subprocess.run([*command, *TRANSFORMERS_4], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            assert "No matching distribution" in result.stderr or "connection" in result.stderr.lower(), result.stderr
            # a machine without an index cannot have 4.57; CI has one, and there a skip would hide what is promised
            stop = pytest.fail if os.environ.get("CI") else pytest.skip
            stop(f"pip reaches no index with transformers 4.57: {result.stderr.strip().splitlines()[-1]}")
        if done.exists():  # another process was faster
            shutil.rmtree(partial)
        else:
            os.replace(partial, done)
    return done


def build(kind: str, folder: Path) -> Path:
    """A saved model and processor, weights wide enough that each part shows in the logits."""
    if kind == "llama, clip":
        model, processor = assemble(GOLDEN / "base_llm", GOLDEN / "clip-vit-tiny", align_mode="gate", do_pad=True)
    else:
        text = {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
        language_model = save_language_model(folder / "language model", **text)
        tower = save_tower(folder / "tower", "siglip tower")
        model, processor = assemble(language_model, tower, align_mode="gate", vision_scales=[1, 2])
    randomize(model)
    model.save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.fixture(scope="module", params=["llama, clip", "llama tied, siglip at two scales"])
def saved(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def here(saved):
    """What this process computes, the package being installed."""
    model = AlignGPTForConditionalGeneration.from_pretrained(saved)
    return fresh_process.run_model(model, AlignGPTProcessor.from_pretrained(saved))


@pytest.fixture(scope="module")
def fresh(saved, tmp_path_factory):
    return read_report(saved, tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def fresh_4(saved, transformers_4, tmp_path_factory):
    return read_report(saved, tmp_path_factory.mktemp("fresh 4"), transformers_4)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.shape == other.shape and tensor.dtype == other.dtype, name
        limit = TOLERANCE if tensor.is_floating_point() else 0
        assert (tensor - other).abs().max() <= limit, name


def check_classes(report: dict, expected: set[str]):
    assert report["ours"] == []
    assert report["classes"].keys() == expected
    for module, name in report["classes"].values():
        assert module.startswith("transformers_modules.") and name.startswith("AlignGPT")
    named = {name: parts[1] for name, parts in report["classes"].items()}
    assert named.pop("AutoModel") == "AlignGPTModel"
    assert (named.pop("AutoConfig"), named.pop("AutoProcessor")) == ("AlignGPTConfig", "AlignGPTProcessor")
    assert set(named.values()) == {"AlignGPTForConditionalGeneration"}


def test_the_prompts_tell_models_apart(here):
    """What the comparisons below rest on: prompts, images and levels matter."""
    assert (here["one.logits"] - here["one.steered"]).abs().max() > 0.1
    assert (here["one.logits"] - here["two.logits"]).abs().max() > 0.1
    assert torch.equal(here["text.logits"], here["text.steered"])
    assert here["batch.pixel_values"].shape[0] == 3 and here["batch.input_ids"].shape[0] == 3


def test_fresh_process(fresh, here):
    report, tensors, _ = fresh
    assert report["transformers"] == version
    autos = {"AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoConfig", "AutoProcessor"}
    check_classes(report, autos)
    assert_same(tensors, here)


def test_transformers_4(fresh_4, here):
    report, tensors, _ = fresh_4
    assert report["transformers"] == "4.57.6"
    autos = {"AutoModel", "AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoConfig", "AutoProcessor"}
    check_classes(report, autos)
    assert_same(tensors, here)


def test_the_pipeline(fresh, fresh_4, saved, here):
    answers = fresh[0]["pipeline"]
    tokenizer = AlignGPTProcessor.from_pretrained(saved).tokenizer
    assert answers == fresh_4[0]["pipeline"]
    written = tokenizer.batch_decode(here["one.answer"], skip_special_tokens=True)
    assert [text.strip() for text in answers["plain"]] == [text.strip() for text in written]
    assert {name: len(texts) for name, texts in answers.items()} == {
        "chat": 1, "two images": 1, "turns": 1, "batch": 2, "plain": 1, "text alone": 1
    }  # fmt: skip
    assert answers["batch"] == answers["chat"] + answers["two images"]
    assert all(isinstance(text, str) and text for texts in answers.values() for text in texts)


@pytest.mark.parametrize("generation", ["5", "4"])
def test_saved_again_by_remote_code(generation, here, request, tmp_path):
    """A user's own copy, written without our package by either generation, is the same model."""
    resaved = request.getfixturevalue("fresh" if generation == "5" else "fresh_4")[2] / "resaved"
    names = {path.name for path in resaved.iterdir()}
    code = {"modeling_aligngpt.py", "configuration_aligngpt.py", "processing_aligngpt.py", "compat_v4.py"}
    code |= {"base_aligngpt.py", "generation_aligngpt.py", "images_aligngpt.py"}
    assert {name for name in names if name.endswith(".py")} == code  # nothing that only makes models
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    model = AlignGPTForConditionalGeneration.from_pretrained(resaved)
    assert_same(fresh_process.run_model(model, AlignGPTProcessor.from_pretrained(resaved)), here)
    if generation == "4":
        _, tensors, _ = read_report(resaved, tmp_path)
        assert_same(tensors, here)


VISION2SEQ = """
import sys
from modeling_aligngpt import AutoModelForVision2Seq
for kwargs in ({}, {"trust_remote_code": True}):
    model = AutoModelForVision2Seq.from_pretrained(sys.argv[1], **kwargs)
    print(type(model).__name__, model.num_parameters())
"""


@pytest.mark.parametrize("generation", ["5", "4"])
def test_vision2seq_of_the_package(generation, tmp_path, request):
    installed = request.getfixturevalue("transformers_4") if generation == "4" else None
    model = tiny_model()
    model.save_pretrained(tmp_path / "saved")
    result = run_fresh(["-c", VISION2SEQ, tmp_path / "saved"], tmp_path / "elsewhere", installed, path=[ROOT])
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.splitlines() == [f"AlignGPTForConditionalGeneration {model.num_parameters()}"] * 2


@pytest.mark.parametrize("explicit", [False, True])
def test_four_bits_leave_the_gate_alone(tmp_path, explicit):
    """A gate has one input for each image token: 4 here, 729 with SigLIP, and kernels take multiples of 64."""
    from transformers import BitsAndBytesConfig

    model = tiny_model({"hidden_size": 64, "intermediate_size": 128})
    model.save_pretrained(tmp_path / "whole")
    skip = {"llm_int8_skip_modules": list(UNQUANTIZED)} if explicit else {}
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **skip
    )
    four = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "whole", quantization_config=settings)
    assert explicit or settings.llm_int8_skip_modules is None
    four.save_pretrained(tmp_path / "four")
    saved = json.loads((tmp_path / "four" / "config.json").read_text())["quantization_config"]
    assert saved["llm_int8_skip_modules"] == list(UNQUANTIZED)
    again = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "four")
    batch = make_batch([row(5, 6, 7)])
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, four(**batch).logits)
        assert torch.equal(again.model.align_gate.linear_1.weight, model.model.align_gate.linear_1.weight)
    kinds = {name: type(module).__name__ for name, module in again.named_modules()}
    assert kinds["model.language_model.layers.0.mlp.up_proj"] == "Linear4bit"
    assert kinds["model.align_gate.linear_1"] == kinds["lm_head"] == "Linear"
