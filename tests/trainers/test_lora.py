"""LoRA and QLoRA: what trains, what is saved, that it comes back, and that merging changes nothing."""

import json
import re
import shutil

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file
from stage_parts import conversation_rows, draw_image, to_dataset
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, TrainerCallback

from aligngpt_trainers.commands.arguments import LoraArguments
from aligngpt_trainers.commands.cli import main
from aligngpt_trainers.commands.train import build_stage
from aligngpt_trainers.lora import check_lora, load_adapter, lora_targets, quantization_config
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


@pytest.fixture(scope="module")
def words(stage1_folder, tmp_path_factory):
    """Settings of a short stage 2 with adapters, without `output_dir`."""
    data = tmp_path_factory.mktemp("data") / "conversations"
    to_dataset(conversation_rows(16)).save_to_disk(data)
    values = {
        "model": stage1_folder,
        "dataset": data,
        "use_cpu": "true",
        "use_peft": "true",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_steps": 3,
        "save_strategy": "no",
        "disable_tqdm": "true",
    }
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def adapter(words, tmp_path_factory):
    """The folder of a trained adapter."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    assert main(["instruct", *words, f"--output_dir={folder}"]) == 0
    return folder


def make_inputs(processor) -> dict[str, torch.Tensor]:
    content = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[draw_image("red")], text=[text], return_tensors="pt")


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


def test_only_adapters_projector_and_gate_train(words, stage1_folder, tmp_path):
    run = build_stage("instruct", [*words, f"--output_dir={tmp_path}", "--projector_learning_rate=1e-3"])
    model, before = run.trainer.model, load_file(stage1_folder / "model.safetensors")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    low_rank = {name for name in trained if "lora_" in name}
    assert all("language_model.layers." in name for name in low_rank)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "base_layer" in name]
    assert len(low_rank) == 2 * len(linear) == 2 * 2 * 7  # A and B of 7 layers in 2 blocks
    whole = trained - low_rank
    assert all("modules_to_save.default" in name for name in whole) and len(whole) == 8
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in whole} == {
        "multi_modal_projector",
        "align_gate",
    }
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    run.run()
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(start[name], tensor)}
    assert moved == trained
    groups = {group["lr"] for group in run.trainer.optimizer.param_groups}
    assert groups == {1e-2, 1e-3}
    # the base under the adapter is stage 1's, bit for bit
    base = model.get_base_model().state_dict()
    assert torch.equal(base["model.align_embeddings.weight"], before["model.align_embeddings.weight"])
    assert torch.equal(base["lm_head.weight"], before["lm_head.weight"])


def test_the_folder_holds_what_is_needed(adapter):
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "training_summary.json"} <= names
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja", "modeling_aligngpt.py"} <= names
    assert not {"model.safetensors", "training_args.bin", "README.md"} & names
    config = json.loads((adapter / "config.json").read_text())
    assert (config["align_mode"], config["training_stage"]) == ("gate", "instruct")
    summary = json.loads((adapter / "training_summary.json").read_text())
    assert summary["pretrain"]["stage"] == "pretrain"
    assert summary["hyperparameters"]["lora"]["r"] == 16


def test_loads_as_the_stage_left_it(words, adapter, tmp_path):
    run = build_stage("instruct", [*words, f"--output_dir={tmp_path}"])
    run.run()
    trained = run.trainer.model.eval()
    loaded, processor = load_adapter(tmp_path)
    inputs = make_inputs(processor)
    torch.testing.assert_close(logits(loaded, inputs), logits(trained, inputs), rtol=0, atol=1e-6)
    weights = [model(**inputs).align_weights for model in (loaded, trained)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_loads_with_peft_alone(adapter, stage1_folder):
    """What a user without this package writes: the base with the adapter's config, then the adapter."""
    ours, processor = load_adapter(adapter)
    inputs = make_inputs(processor)
    config = AutoConfig.from_pretrained(adapter, trust_remote_code=True)
    base = AutoModelForImageTextToText.from_pretrained(stage1_folder, config=config, trust_remote_code=True)
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    torch.testing.assert_close(logits(theirs, inputs), logits(ours, inputs), rtol=0, atol=1e-6)
    automatic = AutoPeftModel.from_pretrained(adapter, import_allowlist=["modeling_aligngpt"]).eval()
    # peft reads the base's config, in which the gate is off: see docs/training.md
    assert automatic.get_base_model().config.align_mode == "level"
    automatic.get_base_model().config.align_mode = "gate"
    torch.testing.assert_close(logits(automatic, inputs), logits(ours, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_merged_is_the_same_model(adapter, tmp_path, capsys, dtype):
    words = ["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged"), "--dtype", dtype]
    assert main(words) == 0
    assert "parameters; saved to" in capsys.readouterr().out
    model, report = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    adapted, processor = load_adapter(adapter)
    inputs = make_inputs(processor)
    torch.testing.assert_close(logits(model, inputs), logits(adapted, inputs), rtol=0, atol=2e-6)
    assert model.config.align_mode == "gate"
    loaded = AlignGPTProcessor.from_pretrained(tmp_path / "merged")
    assert loaded.chat_template == processor.chat_template
    summary = json.loads((tmp_path / "merged" / "training_summary.json").read_text())
    assert summary["merged"] == {"adapter": "adapter", "base": summary["sources"]["model"]}
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "modeling_aligngpt.py" in names and not any(name.startswith("adapter") for name in names)
    assert main(words) == 2
    assert "exists: choose another folder" in capsys.readouterr().err
    # a merged model is trained on and asked like any other
    shown = ["chat", "--model", str(tmp_path / "merged"), "--question", "name a colour", "--max-new-tokens", "2"]
    assert main(shown) == 0


def test_a_failed_merge_leaves_nothing(adapter, tmp_path, capsys):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    settings = json.loads((broken / "adapter_config.json").read_text())
    # the second may be an id on the Hub, which does not know it either
    for gone in (str(tmp_path / "gone"), "runs/pretrain"):
        settings["base_model_name_or_path"] = gone
        (broken / "adapter_config.json").write_text(json.dumps(settings))
        assert main(["merge", "--adapter", str(broken), "--output", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"its base model {gone!r}" in said and "name where it is now with --base" in said
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    assert main(["merge", "--adapter", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert main(["merge", "--adapter", str(broken), "--base", base, "--output", str(tmp_path / "out")]) == 0


def test_continues_where_it_stopped(words, tmp_path):
    """Dropout draws from the state that a checkpoint keeps, so the rest is the same bit for bit."""

    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    saving = [word for word in words if not word.startswith(("--save_strategy", "--max_steps"))]
    saving += ["--save_strategy=steps", "--save_steps=2", "--max_steps=4"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    build_stage("instruct", [*saving, f"--output_dir={whole}"]).run()
    stopped = build_stage("instruct", [*saving, f"--output_dir={parted}"])
    stopped.trainer.add_callback(StopAt())
    stopped.trainer.train()
    shutil.rmtree(parted / "checkpoint-3", ignore_errors=True)
    assert main(["instruct", *saving, f"--output_dir={parted}", "--resume=auto"]) == 0
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parted))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_settings_without_effect_are_refused(words, stage1_folder, tmp_path, capsys):
    def failure(*command: str) -> str:
        assert main([*command, f"--output_dir={tmp_path / 'out'}"]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    line = failure("pretrain", "--model", str(stage1_folder), "--dataset=x", "--use_cpu=true", "--use_peft=true")
    assert "use_peft has no place in stage 1" in line
    line = failure("instruct", "--model", str(stage1_folder), "--dataset=x", "--use_cpu=true", "--lora_r=8")
    assert "lora_r needs use_peft" in line
    assert "has no linear layers called q_prj; it has" in failure("instruct", *words, "--lora_target_modules", "q_prj")
    assert "rank and alpha start at 1" in failure("instruct", *words, "--lora_r=0")
    assert 'align_mode="random" draws the level table afresh' in failure("instruct", *words, "--align_mode=random")


def test_an_adapter_is_no_model_to_start_from(words, adapter, tmp_path, capsys):
    others = [word for word in words if not word.startswith("--model=")]
    assert main(["instruct", *others, f"--model={adapter}", f"--output_dir={tmp_path}"]) == 2
    assert "holds an adapter: make a whole model of it with `aligngpt merge" in capsys.readouterr().err


def test_targets_stay_in_the_language_model(assembled):
    model, _ = assembled
    for names in (None, ["q_proj", "v_proj"], ["all-linear"]):
        pattern = re.compile(lora_targets(model, names))
        hit = {name for name, _ in model.named_modules() if pattern.fullmatch(name)}
        assert len(hit) == (4 if names and len(names) == 2 else 14)
        assert all(name.startswith("model.language_model.layers.") for name in hit)
    # the vision tower has layers of these names too: what a plain list would have hit
    assert any(name.endswith("q_proj") for name, _ in model.model.vision_tower.named_modules())


def test_no_adapter_is_the_default():
    check_lora(LoraArguments(), "pretrain")
    check_lora(LoraArguments(), "instruct")
    assert quantization_config(LoraArguments(), bf16=True) is None


def test_qlora(words, stage1_folder, tmp_path):
    """Four bits on the CPU: the language model's layers alone, and the adapter merges into the unquantised base."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="QLoRA's extra is not installed")
    settings = ["--load_in_4bit=true", "--use_bnb_nested_quant=true", "--bf16=true", "--dtype=bfloat16"]
    run = build_stage("instruct", [*words, *settings, f"--output_dir={tmp_path / 'qlora'}"])
    base = run.trainer.model.get_base_model()
    four_bits = {name for name, module in base.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(four_bits) == 14 and all(".language_model.layers." in name for name in four_bits)
    assert base.lm_head.weight.dtype == base.model.align_embeddings.weight.dtype == torch.bfloat16
    whole = [parameter for name, parameter in base.named_parameters() if "modules_to_save" in name]
    assert len(whole) == 8 and all(parameter.dtype == torch.float32 for parameter in whole)
    start = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    summary = run.run()
    assert all(torch.isfinite(torch.tensor(loss)) for _, loss in summary["loss_curve"])
    for name, parameter in base.named_parameters():
        assert torch.equal(start[name], parameter) != parameter.requires_grad, name
    assert "quantization_config" not in json.loads((tmp_path / "qlora" / "config.json").read_text())
    assert main(["merge", "--adapter", str(tmp_path / "qlora"), "--output", str(tmp_path / "merged")]) == 0
    merged = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "merged")
    adapted, processor = load_adapter(tmp_path / "qlora")
    inputs = make_inputs(processor)
    torch.testing.assert_close(logits(merged, inputs), logits(adapted, inputs), rtol=0, atol=2e-6)
    # and it stands on a four-bit base again, as it was trained
    again, _ = load_adapter(
        tmp_path / "qlora",
        dtype=torch.bfloat16,
        quantization_config=quantization_config(LoraArguments(use_peft=True, load_in_4bit=True), True),
    )
    again = {
        n for n, module in again.get_base_model().named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert again == four_bits
