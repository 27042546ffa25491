"""
Each recipe, read by the command's own parser, drives a tiny model of the same architecture through both stages: train,
save, load, answer. The settings of the paper's own models are compared with the paper's.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from aligngpt_trainers.commands.arguments import DataArguments, ModelArguments, PretrainModelArguments
from aligngpt_trainers.commands.cli import main
from aligngpt_trainers.commands.settings import parse_settings
from aligngpt_trainers.instruct_config import AlignGPTInstructConfig
from aligngpt_trainers.lora import load_adapter
from aligngpt_trainers.pretrain_config import AlignGPTPretrainConfig
from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.chat_templates import with_suffix

from .families import LANGUAGE_MODELS, VISION_TOWERS, save_language_model, save_vision_tower


RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = sorted(path.parent.name for path in RECIPES.glob("*/pretrain.yaml"))
ADAPTERS = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.glob("*/instruct_*.yaml"))
# Settings that a run of seconds on a CPU changes; the learning rates and whatever else is left are the recipe's.
QUICK = {
    "use_cpu": "true",
    "max_steps": "2",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "1",
    "dataloader_num_workers": "0",
    "logging_steps": "1",
    "save_strategy": "no",
    "disable_tqdm": "true",
}


def settings(name: str) -> dict:
    return yaml.safe_load((RECIPES / name).read_text())


def run(command: str, recipe: str, **changes) -> int:
    words = [f"--{key}={value}" for key, value in {**QUICK, **changes}.items()]
    return main(["--debug", command, "--config", str(RECIPES / recipe), *words])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs with levels, and LLaVA's JSON with an image folder, as the recipes expect them."""
    folder = tmp_path_factory.mktemp("data")
    colours = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}
    images = {name: PILImage.new("RGB", (40, 30), colour) for name, colour in colours.items()}
    (folder / "images").mkdir()
    for name, image in images.items():
        image.save(folder / "images" / f"{name}.png")
    part = {"type": Value("string"), "text": Value("string")}
    messages = List({"role": Value("string"), "content": List(part)})
    features = Features({"images": List(Image()), "messages": messages, "align_level": Value("int64")})
    rows = [
        {
            "images": [image],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"a {name} image"}]},
            ],
            "align_level": 2 * number + 1,
        }
        for number, (name, image) in enumerate(images.items())
    ]
    Dataset.from_list(rows, features=features).save_to_disk(folder / "scored")
    alignment = {"method": "uniform", "edges": [0.1, 0.2], "counts": [4], "scorer": "clip", "rows": {"read": 4}}
    (folder / "scored" / "alignment.json").write_text(json.dumps(alignment))
    records = [
        {
            "id": name,
            "image": f"{name}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat colour is it?"},
                {"from": "gpt", "value": name},
            ],
        }
        for name in images
    ]
    text_only = [{"from": "human", "value": "name a colour"}, {"from": "gpt", "value": "red, say"}]
    (folder / "mix.json").write_text(json.dumps([*records, {"id": "text", "conversations": text_only}]))
    return folder


@pytest.fixture(scope="module")
def stage1(data, tmp_path_factory):
    """Stage 1 of a recipe's model, trained once: `stage1("vicuna-7b")` is its folder."""
    parts, trained = tmp_path_factory.mktemp("parts"), tmp_path_factory.mktemp("stage1")

    def tiny(name: str, save) -> str:
        folder = parts / name.replace("/", "--")
        return str(folder if folder.exists() else save(name, folder))

    def train(model: str) -> Path:
        folder = trained / model
        if not folder.exists():
            recipe = settings(f"{model}/pretrain.yaml")
            language_model = tiny(recipe["language_model"], save_language_model)
            vision_tower = tiny(recipe["vision_tower"], save_vision_tower)
            changes = {"language_model": language_model, "vision_tower": vision_tower, "dataset": data / "scored"}
            assert run("pretrain", f"{model}/pretrain.yaml", **changes, output_dir=folder) == 0
        return folder

    return train


def answer(model, processor, image: Path) -> list[int]:
    """New ids of a greedy answer about an image."""
    content = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[PILImage.open(image)], text=[text], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_both_stages(name, stage1, data, tmp_path, capsys):
    recipe = settings(f"{name}/pretrain.yaml")
    family, first = LANGUAGE_MODELS[recipe["language_model"]], stage1(name)
    words = {"model": first, "dataset": data / "mix.json", "image_folder": data / "images"}
    assert run("instruct", f"{name}/instruct.yaml", **words, output_dir=tmp_path / "stage2") == 0
    shown = capsys.readouterr().out
    assert "instruct: 5 rows" in shown and "2 steps of 2" in shown
    model, report = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "stage2", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AlignGPTProcessor.from_pretrained(tmp_path / "stage2")
    config = model.config
    assert (config.text_config.model_type, config.vision_config.model_type) == (
        family.model_type,
        VISION_TOWERS[recipe["vision_tower"]],
    )
    assert (config.align_mode, config.training_stage, config.num_align_levels) == ("gate", "instruct", 8)
    # the recipe names what would be recognised by itself
    suffix = processor.image_suffix
    assert processor.chat_template == with_suffix(CHAT_TEMPLATES[family.template], suffix, processor.tokenizer)
    ids = answer(model, processor, data / "images" / "red.png")
    assert len(ids) == 3 and not {config.image_token_id, config.align_token_id} & set(ids)

    summaries = [json.loads((folder / "training_summary.json").read_text()) for folder in (first, tmp_path / "stage2")]
    expected = [settings(f"{name}/{stage}.yaml")["learning_rate"] for stage in ("pretrain", "instruct")]
    assert [summary["learning_rate"] for summary in summaries] == expected
    assert [summary["image_aspect_ratio"] for summary in summaries] == ["square", "pad"]
    assert all(torch.isfinite(torch.tensor(summary["loss_last"])) for summary in summaries)
    # the records of stage 1 and of the scores are handed on
    assert summaries[1]["pretrain"]["steps"] == 2
    assert summaries[1]["pretrain"]["alignment"]["counts"] == [4]
    assert summaries[1]["pretrain"]["sources"]["language_model"] == recipe["language_model"].replace("/", "--")

    scales = (recipe.get("config_overrides") or {}).get("vision_scales", [1])
    width = model.model.multi_modal_projector.linear_1.in_features
    assert width == config.vision_config.hidden_size * len(scales)
    assert config.image_seq_length == processor.image_seq_length == 4


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, stage1, data, tmp_path, capsys):
    recipe = settings(name)
    words = {"dataset": data / "mix.json", "image_folder": data / "images", "output_dir": tmp_path / "adapter"}
    assert run("instruct", name, model=stage1(Path(name).parent.name), **words) == 0
    assert "instruct: 5 rows" in capsys.readouterr().out
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (recipe["lora_r"], recipe["lora_alpha"])
    assert sorted(adapter["modules_to_save"]) == ["align_gate", "multi_modal_projector"]
    model, processor = load_adapter(tmp_path / "adapter")
    assert model.get_base_model().config.align_mode == "gate"
    assert len(answer(model, processor, data / "images" / "red.png")) == 3


@pytest.mark.parametrize("name", ["vicuna-7b", "vicuna-13b"])
def test_settings_are_the_papers(name):
    """Section 4.1 and the authors' scripts: what decides the outcome, both stages."""
    shared = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0}
    shared |= {"max_length": 2048, "bf16": True, "gradient_checkpointing": True, "optim": "adamw_torch_fused"}
    stages = {
        "pretrain": (AlignGPTPretrainConfig, PretrainModelArguments, 1e-3, 256, "square", "none"),
        "instruct": (AlignGPTInstructConfig, ModelArguments, 2e-5, 128, "pad", "modality_length"),
    }
    for stage, (config_class, model_class, learning_rate, batch, aspect, group_by) in stages.items():
        words = ["--config", str(RECIPES / name / f"{stage}.yaml"), "--use_cpu", "true"]
        model_args, _, config = parse_settings("x", (model_class, DataArguments, config_class), words)
        assert {key: getattr(config, key) for key in shared} == shared
        # twice over the better half of the pairs: as many updates
        assert config.num_train_epochs == {"pretrain": 2, "instruct": 1}[stage]
        assert config.learning_rate == learning_rate
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps * 8 == batch
        assert (config.image_aspect_ratio, config.group_by) == (aspect, group_by)
        if stage == "pretrain":
            assert model_args.vision_tower == "openai/clip-vit-large-patch14-336"
            assert model_args.num_align_levels == 8 and not model_args.config_overrides
        else:
            assert (config.align_mode, model_args.use_peft) == ("gate", False)


def test_every_recipe_is_tried_and_documented():
    tried = {f"{name}/{stage}.yaml" for name in MODELS for stage in ("pretrain", "instruct")} | set(ADAPTERS)
    assert {
        str(path.relative_to(RECIPES)) for path in RECIPES.glob("*/*.yaml") if path.parent.name != "accelerate"
    } == tried
    for folder in sorted({path.parent for path in RECIPES.glob("*/pretrain.yaml")}):
        text = (folder / "README.md").read_text()
        named = re.findall(r"--config (\S+/\w+)", text)
        assert {f"{name}.yaml" for name in named} == {f"{folder.name}/{path.name}" for path in folder.glob("*.yaml")}
        assert set(re.findall(r"--accelerate_config (\w+)", text)) <= {
            path.stem for path in (RECIPES / "accelerate").glob("*.yaml")
        }
        # what stage 2 starts from is what stage 1 wrote
        for stage2 in folder.glob("instruct*.yaml"):
            recipe = settings(f"{folder.name}/{stage2.name}")
            assert recipe["model"] == settings(f"{folder.name}/pretrain.yaml")["output_dir"]


@pytest.mark.parametrize("name", [f"{name}/{stage}.yaml" for name in MODELS for stage in ("pretrain", "instruct")])
def test_a_misspelt_key_is_refused(name, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text((RECIPES / name).read_text() + "learning_rat: 1.0e-3\n")
    assert main([Path(name).stem, "--config", str(path)]) == 2
    assert "unknown setting 'learning_rat'; did you mean 'learning_rate'?" in capsys.readouterr().err
