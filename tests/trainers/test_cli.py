"""The `aligngpt` command: both stages and a question in a row, and the errors that a user meets."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
import zygote
from local_hub.server import HubServer
from safetensors.torch import load_file, save_file
from stage_parts import NUM_LEVELS, conversation_rows, draw_image, pair_rows, to_dataset

from aligngpt_trainers.commands.arguments import DataArguments, PretrainModelArguments
from aligngpt_trainers.commands.cli import COMMANDS, main
from aligngpt_trainers.commands.train import run_records
from aligngpt_trainers.storage.folders import find_record
from modeling_aligngpt import AlignGPTForConditionalGeneration
from modeling_aligngpt.assembly import assemble


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    to_dataset(pair_rows(16)).save_to_disk(folder / "pairs")
    to_dataset(conversation_rows(16)).save_to_disk(folder / "conversations")
    draw_image("red").save(folder / "red.png")
    return folder


@pytest.fixture
def recipe(parts, data, tmp_path):
    """Writes a YAML file of stage-1 settings, changed by `changes`; None leaves a key out."""

    def write(**changes) -> str:
        values = {
            "language_model": str(parts[0]),
            "vision_tower": str(parts[1]),
            "dataset": str(data / "pairs"),
            "num_align_levels": NUM_LEVELS,
            "config_overrides": {"gate_hidden_size": 16},
            "output_dir": str(tmp_path / "stage1"),
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(path)

    return write


def failure(capsys, *words: str) -> str:
    """The one line that a failing command prints."""
    assert main(list(words)) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.strip().splitlines()[-1]


def test_both_stages_and_a_question(recipe, data, tmp_path, capsys):
    assert main(["pretrain", "--config", recipe(), "--num_train_epochs", "2"]) == 0
    shown = capsys.readouterr().out
    assert "pretrain: 16 rows, 4 steps of 8, loss " in shown and "trained 1,728 of " in shown
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    words = ["instruct", "--model", str(stage1), "--dataset", str(data / "conversations"), "--output_dir", str(stage2)]
    words += ["--per_device_train_batch_size=8", "--use_cpu", "true", "--logging-steps", "1", "--learning_rate", "1e-3"]
    words += ["--save_strategy", "no", "--disable_tqdm", "true", "--align_mode", "gate"]
    assert main(words) == 0
    assert "instruct: 16 rows, 2 steps of 8, loss " in capsys.readouterr().out
    summaries = [json.loads((folder / "training_summary.json").read_text()) for folder in (stage1, stage2)]
    assert [s["stage"] for s in summaries] == ["pretrain", "instruct"]
    assert summaries[1]["sources"] == {"dataset": "conversations", "model": "stage1"}
    assert summaries[0]["sources"]["language_model"] == "language_model"
    assert str(tmp_path) not in json.dumps(summaries)
    first, second = (AlignGPTForConditionalGeneration.from_pretrained(folder) for folder in (stage1, stage2))
    assert torch.equal(first.model.align_embeddings.weight, second.model.align_embeddings.weight)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    words = ["chat", "--model", str(stage2), "--image", str(data / "red.png"), "--question", "what colour is it?"]
    assert main([*words, "--show-weights", "--max-new-tokens", "4"]) == 0
    assert '1.000  ██████████████████████████████  (global; align_mode "gate")' in capsys.readouterr().out


def test_continues_where_it_stopped(recipe, tmp_path, capsys):
    path = recipe(save_strategy="steps", save_steps=1, max_steps=1)
    assert main(["pretrain", "--config", path]) == 0
    line = failure(capsys, "pretrain", "--config", path, "--max_steps", "2")
    assert "holds checkpoints of an earlier run" in line and "resume_from_checkpoint=auto" in line
    line = failure(capsys, "pretrain", "--config", path, "--max_steps", "2", "--resume_from_checkpoint", "auto")
    assert "checkpoint-1 cannot be continued with other settings: max_steps was 1 and is 2" in line
    assert main(["pretrain", "--config", path, "--resume_from_checkpoint", "auto"]) == 0
    assert "(resumed)" in capsys.readouterr().out
    summary = json.loads((tmp_path / "stage1" / "training_summary.json").read_text())
    assert summary["steps"] == 1 and summary["resumed"]


def test_a_finished_model_can_be_trained_on(recipe, stage1_folder, tmp_path, capsys):
    only_fresh = dict.fromkeys(("language_model", "vision_tower", "num_align_levels", "config_overrides"))
    assert main(["pretrain", "--config", recipe(model=str(stage1_folder), max_steps=1, **only_fresh)]) == 0
    capsys.readouterr()
    line = failure(capsys, "pretrain", "--config", recipe(model=str(stage1_folder)), "--overwrite", "true")
    assert "language_model, vision_tower, num_align_levels, config_overrides has no effect" in line


def test_unaligned_models_are_refused_in_one_line(assembled, data, tmp_path, capsys):
    for part in assembled:
        part.save_pretrained(tmp_path / "fresh")
    words = [
        "instruct",
        "--model",
        str(tmp_path / "fresh"),
        "--dataset",
        str(data / "conversations"),
        "--use_cpu",
        "true",
    ]
    line = failure(capsys, *words, "--output_dir", str(tmp_path / "out"))
    assert line.startswith("error: This model has not been through stage 1") and "allow_unaligned" in line


def test_rows_without_levels_point_to_score(recipe, data, capsys):
    line = failure(capsys, "pretrain", "--config", recipe(dataset=str(data / "conversations")))
    assert line.startswith("error: Row 0 has no `align_level`") and "aligngpt score" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lerning_rate": 1e-3}, "unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"save_strategy": False}, 'save_strategy is False here, because YAML reads yes, no.*save_strategy: "no"'),
        ({"max_length": "long"}, "max_length is 'long'; a number is expected"),
        ({"max_steps": 1.5}, "max_steps is 1.5; a whole number is expected"),
        ({"use_cpu": "maybe"}, "use_cpu is 'maybe'; write true or false"),
        ({"output_dir": ["a", "b"]}, "output_dir takes a single value, not a list"),
        ({"dataset": {"path": "a"}}, "dataset takes a single value, not a mapping"),
        ({"dataset": None}, "dataset is missing"),
        ({"vision_tower": None}, "vision_tower missing"),
        ({"on_overlong": "shrug"}, "on_overlong='shrug' is not one of error, drop, truncate"),
        ({"dtype": "bfloat16"}, "dtype=bfloat16 needs bf16"),
        ({"chat_template": "vicuna"}, "chat_template='vicuna' is not one of"),
        ({"dataset": "/nowhere/pairs.json"}, "/nowhere/pairs.json: no such file or folder"),
        ({"eval_strategy": "steps"}, "eval_strategy=steps needs eval_dataset"),
    ],
)
def test_settings_fail_with_a_remedy(recipe, capsys, changes, words):
    path = recipe(**changes)
    line = failure(capsys, "pretrain", "--config", path)
    assert re.search(words, line), line


def test_scientific_notation_and_empty_values(recipe, tmp_path, capsys):
    """YAML 1.1 reads 1e-3 as text; an empty value is null."""
    path = tmp_path / "short.yaml"
    path.write_text(
        f"dataset: {tmp_path}\nmodel: a/b\nlearning_rate: 1e-3\nmax_length:\noutput_dir: x\nuse_cpu: true\n"
    )
    from aligngpt_trainers import AlignGPTInstructConfig
    from aligngpt_trainers.commands.settings import parse_settings
    from aligngpt_trainers.commands.train import DataArguments, ModelArguments

    kinds = (ModelArguments, DataArguments, AlignGPTInstructConfig)
    model_args, _, args = parse_settings("x", kinds, ["--config", str(path), "--learning-rate", "2e-4"])
    assert (model_args.model, args.learning_rate, args.max_length) == ("a/b", 2e-4, None)
    assert parse_settings("x", kinds, [f"--config={path}"])[2].learning_rate == 1e-3
    path.write_text("use_cpu: true\nmodel: a\nmodel: b\n")
    assert "line 3: the key 'model' stands twice" in failure(capsys, "pretrain", "--config", str(path))
    path.write_text("- model\n")
    assert "must hold settings" in failure(capsys, "pretrain", "--config", str(path))
    path.write_text("model: [\n")
    assert main(["pretrain", "--config", str(path)]) == 2
    assert "is not valid YAML" in capsys.readouterr().err
    path.write_text("bf16:\nlearning_rate:\n")
    assert "learning_rate has no value" in failure(capsys, "instruct", "--config", str(path))
    assert "there is no such file" in failure(capsys, "pretrain", "--config", str(tmp_path / "gone.yaml"))


def test_unknown_words_name_the_nearest(capsys):
    assert failure(capsys, "pretain") == "error: unknown command 'pretain'; did you mean 'pretrain'?"
    line = failure(capsys, "instruct", "--lerning_rate", "1")
    assert "unknown setting --lerning_rate; did you mean '--learning_rate'?" in line
    assert "invalid" in failure(capsys, "instruct", "--learning_rate", "fast")


@pytest.mark.parametrize(
    ("stage", "flag", "words"),
    [
        ("pretrain", "--data_path", "--dataset"),
        ("pretrain", "--tune-mm-mlp-adapter", "the stage decides what trains"),
        ("pretrain", "--mm_use_im_start_end", "leave it out"),
        ("instruct", "--pretrain_mm_mlp_adapter", "--model STAGE1"),
        ("instruct", "--mm_projector_lr", "--projector_learning_rate"),
        ("instruct", "--model_max_length", "--max_length"),
        ("instruct", "--lora_enable", "--use_peft"),
    ],
)
def test_flags_of_llava_are_answered_with_ours(capsys, stage, flag, words):
    line = failure(capsys, stage, flag, "1")
    assert line.startswith(f"error: unknown setting {flag}; ") and words in line


def test_every_answer_to_a_flag_is_a_setting_of_ours():
    from aligngpt_trainers.commands.foreign_flags import ELSEWHERE
    from aligngpt_trainers.commands.settings import check_settings
    from aligngpt_trainers.commands.train import STAGES

    valid = {
        name.lstrip("-")
        for stage, (_, kinds, _) in STAGES.items()
        for name in check_settings(stage, kinds, [])[0]._option_string_actions
    }
    assert {name for name in ELSEWHERE.values() if " " not in name} <= valid
    assert valid.isdisjoint(ELSEWHERE)


def test_some_commands_have_words_of_their_own(capsys):
    assert "required: --model" in failure(capsys, "serve")
    assert failure(capsys, "chat", "--model", "x", "--colour", "y").startswith("error: unrecognized arguments")


def test_debug_shows_the_traceback(capsys, monkeypatch):
    assert main(["--debug", "instruct", "--lerning_rate", "1"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("ALIGNGPT_DEBUG", "1")
    assert main(["instruct", "--lerning_rate", "1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_every_command_has_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert f"aligngpt {command}" in capsys.readouterr().out


def test_help_needs_no_heavy_import():
    code = "import sys; from aligngpt_trainers.commands.cli import main; main(['--help']); "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and all(command in done.stdout for command in COMMANDS)
    done = subprocess.run([sys.executable, "-m", "aligngpt_trainers"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage: aligngpt" in done.stdout


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_is_named_in_one_line(stage1_folder, tmp_path, capsys, workers):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "q7", "image": "broken.png", "conversations": turns}]))
    words = ["instruct", "--model", str(stage1_folder), "--dataset", str(tmp_path / "rows.json"), "--use_cpu", "true"]
    words += ["--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", workers]
    line = failure(capsys, *words)
    assert line.startswith("error: row ") and "broken.png" in line
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("hyphens", [False, True])
def test_init_assembles_what_pretrain_takes(parts, recipe, tmp_path, capsys, hyphens):
    vision = "--vision-tower" if hyphens else "--vision_tower"
    words = ["init", "--llm", str(parts[0]), vision, str(parts[1]), "--output", str(tmp_path / "fresh")]
    words += ["--num-align-levels" if hyphens else "--num_align_levels", str(NUM_LEVELS), "--dtype", "float32"]
    words += ["--config-overrides" if hyphens else "--config_overrides", '{"gate_hidden_size": 16}']
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert re.search(r"language model \(llama\) +\d", shown) and re.search(
        r"vision tower \(clip_vision_model\) +\d", shown
    )
    assert re.search(r"image_seq_length\) +16 for an image of 32 pixels", shown)
    assert re.search(r"chat template +vicuna_v1", shown)
    model = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "fresh")
    expected, _ = assemble(*parts, num_align_levels=NUM_LEVELS, gate_hidden_size=16, seed=0)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    # every parameter is counted once
    numbers = [int(text.replace(",", "")) for text in re.findall(r"([\d,]+) parameters", shown)]
    assert sum(numbers) == sum(parameter.numel() for parameter in model.parameters())
    assert {"modeling_aligngpt.py", "chat_template.jinja"} <= {path.name for path in (tmp_path / "fresh").iterdir()}

    only_fresh = dict.fromkeys(("language_model", "vision_tower", "num_align_levels", "config_overrides"))
    once = {"max_steps": 1, "seed": 0}
    assert main(["pretrain", "--config", recipe(model=str(tmp_path / "fresh"), **once, **only_fresh)]) == 0
    assert main(["pretrain", "--config", recipe(output_dir=str(tmp_path / "direct"), **once)]) == 0
    # one step from either start is the same step
    folders = (tmp_path / "stage1", tmp_path / "direct")
    ours, theirs = (AlignGPTForConditionalGeneration.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_init_fails_with_a_remedy_and_leaves_nothing(parts, tmp_path, capsys):
    words = ["init", "--language_model", str(parts[0]), "--vision_tower", str(parts[1]), "--output"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert "exists: choose another folder" in failure(capsys, *words, str(tmp_path / "taken"))
    words.append(str(tmp_path / "fresh"))
    assert "unknown field 'gate_size'" in failure(capsys, *words, "--config_overrides", '{"gate_size": 8}')
    assert "config_overrides: expected a mapping" in failure(capsys, *words, "--config_overrides", "gate_size")
    assert "llm_revision='main' has no effect on the folder" in failure(capsys, *words, "--llm_revision", "main")
    assert "chat_template='vicuna' is not one of" in failure(capsys, *words, "--chat_template", "vicuna")
    assert "invalid choice: 'float16'" in failure(capsys, *words, "--dtype", "float16")
    assert "required: --vision_tower" in failure(capsys, "init", "--llm", "x", "--output", "y")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_revision_of_the_hub_is_kept(parts, tmp_path):
    """Of two commits the pinned one is loaded. The Hub is a server on this machine."""
    other = shutil.copytree(parts[0], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("model", "user/llm", other)
        pinned = hub.commits("model", "user/llm")[0].sha
        hub.commit_folder("model", "user/llm", parts[0])
        words = ["init", "--llm", "user/llm", "--llm-revision", pinned, "--vision-tower", str(parts[1])]
        code = "import sys; from aligngpt_trainers.commands.cli import main; sys.exit(main(sys.argv[1:]))"
        done = zygote.run(code, [*words, "--output", str(tmp_path / "fresh")], hub.env(), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    model = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "fresh", dtype=torch.float32)
    expected = weights["model.norm.weight"].bfloat16().float()
    assert torch.equal(model.model.language_model.norm.weight.detach(), expected)
    args = PretrainModelArguments(language_model="user/llm", language_model_revision=pinned, vision_tower="user/clip")
    sources = run_records("pretrain", args, DataArguments(dataset="user/pairs"))["sources"]
    assert (sources["language_model"], sources["language_model_revision"]) == ("user/llm", pinned)


def test_records_are_handed_on(recipe, data, tmp_path, capsys):
    """Scores -> stage 1 -> stage 2 -> stage 2 again: the last model still says how its levels were made."""
    scored = shutil.copytree(data / "pairs", tmp_path / "scored")
    facts = {"method": "quantile", "counts": [4, 4, 4, 4], "scorer": "clip", "rows": {"read": 16}}
    (scored / "alignment.json").write_text(json.dumps({**facts, "versions": {"torch": "x"}}))
    assert main(["pretrain", "--config", recipe(dataset=str(scored), max_steps=1)]) == 0
    words = ["--dataset", str(data / "conversations"), "--use_cpu", "true", "--max_steps", "1", "--save_strategy", "no"]
    for start, end in (("stage1", "stage2"), ("stage2", "again")):
        folders = ["--model", str(tmp_path / start), "--output_dir", str(tmp_path / end)]
        assert main(["instruct", *folders, *words]) == 0
    summaries = {name: json.loads((tmp_path / name / "training_summary.json").read_text()) for name in
                 ("stage1", "stage2", "again")}  # fmt: skip
    assert summaries["stage1"]["alignment"] == facts
    for name in ("stage2", "again"):
        assert summaries[name]["pretrain"] == summaries["stage1"]
        assert "pretrain" not in summaries[name]["pretrain"]
    (tmp_path / "stage1" / "training_summary.json").write_text("{broken")
    assert find_record(str(tmp_path / "stage1"), "training_summary.json") is None
    assert find_record("nobody/nothing", "training_summary.json") is None


def test_streams_need_a_number_of_steps(recipe, capsys):
    assert "streaming needs max_steps" in failure(capsys, "pretrain", "--config", recipe(streaming=True))
    assert main(["pretrain", "--config", recipe(streaming=True, max_steps=2, shuffle_buffer=4)]) == 0
    assert "2 steps of 8" in capsys.readouterr().out


def test_a_full_disk_is_a_sentence_for_every_library(monkeypatch, capsys):
    """tokenizers raises a bare Exception, safetensors an error of its own; anything else keeps its traceback."""
    from safetensors import SafetensorError

    from aligngpt_trainers.commands import cli

    for error in (Exception("No space left on device (os error 28)"), SafetensorError("I/O error")):
        monkeypatch.setattr(cli, "_run", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert cli.main(["score"]) == 2
        assert capsys.readouterr().err == f"error: {error}\n"
    monkeypatch.setattr(cli, "_run", lambda *_: (_ for _ in ()).throw(KeyError("a")))
    with pytest.raises(KeyError):
        cli.main(["score"])


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_error(unbuffered):
    """`aligngpt --help | head -3`: the pipe is closed before all of it is written."""
    command = [sys.executable, "-m", "aligngpt_trainers", "--help"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 141 and said == ""
