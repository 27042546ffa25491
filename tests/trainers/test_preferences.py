"""The scripts of docs/preferences.md: TRL's own DPO and GRPO on a model of ours, whole and by adapters."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image, List
from demo_model import save_demo_model
from PIL import Image as PILImage
from safetensors.torch import load_file

from aligngpt_trainers.commands import cli
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


SCRIPTS = Path(__file__).parents[2] / "docs" / "examples"
TINY = "--max_steps 2 --per_device_train_batch_size 2 --use_cpu --bf16 false --report_to none --save_strategy no"
TINY += " --learning_rate 1e-3 --warmup_steps 0"
GRPO = " --num_generations 2 --max_completion_length 6"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model after stage 2 and rows for both trainers."""
    folder = tmp_path_factory.mktemp("preferences")
    config = json.loads((save_demo_model(folder / "model") / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "training_stage": "instruct"}))
    gray = PILImage.linear_gradient("L").resize((64, 64)).convert("RGB")
    rows = [
        {
            "images": [gray.rotate(30 * i)],
            "prompt": [{"role": "user", "content": f"what is in picture {i}?"}],
            "chosen": [{"role": "assistant", "content": "a whale and a balloon"}],
            "rejected": [{"role": "assistant", "content": "three robots in the snow"}],
            "answer": "a whale",
        }
        for i in range(4)
    ]
    (folder / "rows").mkdir()
    Dataset.from_list(rows).cast_column("images", List(Image())).to_parquet(folder / "rows" / "train.parquet")
    return folder


def run(name: str, world: Path, output: Path, *more: str) -> None:
    spec = importlib.util.spec_from_file_location(f"example_{name}", SCRIPTS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = f"--model_name_or_path {world / 'model'} --dataset_name {world / 'rows'} --output_dir {output} {TINY}"
    script.main([*(words + (GRPO if name == "grpo" else "")).split(), *more])


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_the_modules_of_stage_2_train(world, tmp_path, name):
    run(name, world, tmp_path)
    before = AlignGPTForConditionalGeneration.from_pretrained(world / "model").state_dict()
    model = AlignGPTForConditionalGeneration.from_pretrained(tmp_path)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    parts = {key.removeprefix("model.").partition(".")[0] for key in moved}
    assert {"language_model", "multi_modal_projector"} <= parts, parts
    assert not parts & {"vision_tower", "align_embeddings"}
    AlignGPTProcessor.from_pretrained(tmp_path).validate_with(model.config)


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_adapters_go_into_the_language_model_alone(world, tmp_path, name):
    run(name, world, tmp_path, "--use_peft")
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert any("language_model" in key and "lora_A" in key for key in names)
    whole = {key for key in names if "lora_" not in key}
    assert whole and all("multi_modal_projector" in key or "align_gate" in key for key in whole)
    assert not [key for key in names if "vision_tower" in key]


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_the_old_commands_name_the_page(name, capsys):
    assert cli.main([name, "--model", "x"]) == 2
    assert "docs/preferences.md" in capsys.readouterr().err
