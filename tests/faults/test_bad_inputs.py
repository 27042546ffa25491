"""A corpus of bad inputs over every command: each ends in one line that names the thing, and leaves nothing behind."""

import json
import re
import shutil
from pathlib import Path

import pytest
from demo_model import save_demo_model
from PIL import Image

from aligngpt_playground import parts_path
from aligngpt_trainers.commands.cli import COMMANDS, main


STAGES = "--language_model {llm} --vision_tower {clip} --dataset pairs.json --use_cpu true --output_dir run"
TRAIN = f"pretrain {STAGES} --max_steps 1 --save_strategy no"
SCORE = "score --dataset pairs.json --scorer {clip} --output out"
THEIRS = r"theirs\w* is in the authors' format: convert it with `aligngpt convert --checkpoint theirs"
HALF = "a ramp \ud83d"  # of a surrogate pair
# A command line, and what its one line says. `{llm}`, `{clip}`, `{model}` are small real ones.
CORPUS = [
    ("", None),
    ("trian", "unknown command 'trian'; did you mean 'train'|unknown command 'trian'"),
    ("--no-such", "unknown command"),
    # ---- recipes ----
    ("recipes vicuna-70b", "no recipe 'vicuna-70b'"),
    ("recipes ../../etc", "no recipe"),
    ("recipes --list", "unrecognized arguments: --list"),
    # ---- init ----
    ("init", "required: .*llm"),
    ("init --llm gone --vision_tower {clip} --output out", "language model 'gone': its config cannot be read"),
    ("init --llm {llm} --vision_tower gone --output out", "vision tower 'gone': its config cannot be read"),
    ("init --llm {clip} --vision_tower {clip} --output out", "language model"),
    ("init --llm {llm} --vision_tower {llm} --output out", "vision tower|image_seq_length|hidden|image_size"),
    ("init --llm {llm} --vision_tower {clip} --output full", "output 'full' exists"),
    ("init --llm {llm} --vision_tower {clip} --output out --chat_template latin", "chat_template='latin'"),
    ("init --llm {llm} --vision_tower {clip} --output out --num_align_levels 1", "num_align_levels=1"),
    ("init --llm {llm} --vision_tower {clip} --output out --num_align_levels many", "invalid int value: 'many'"),
    ("init --llm {llm} --vision_tower {clip} --output out --dtype int8", "invalid choice: 'int8'"),
    ("init --llm {llm} --vision_tower {clip} --output out --config_overrides 7", "expected a mapping"),
    ("init --llm {llm} --vision_tower {clip} --output out --config_overrides {{gate:1}}", "unknown field 'gate:1'"),
    ("init --llm {llm} --vision_tower {clip} --output out --llm_revision main", "has no effect on the folder"),
    ("init --llm {llm} --vision_tower {clip} --output out --accelerate_config ddp", "works in one process"),
    # ---- score ----
    ("score", "required"),
    ("score --dataset pairs.json --output out", "Give a scorer, or from_column"),
    (SCORE.replace("pairs.json", "gone.json"), "gone.json: no such file"),
    (SCORE.replace("pairs.json", "broken.json"), "broken.json, record 1: not valid JSON"),
    (SCORE.replace("pairs.json", "trailing.json"), "trailing.json, record 1: not valid JSON .*trailing garbage"),
    (SCORE.replace("pairs.json", "commas.json"), "commas.json, record 1: not valid JSON"),
    (SCORE.replace("pairs.json", "glued.json"), "glued.json, record 1: not valid JSON"),
    (SCORE.replace("pairs.json", "object.json"), "object.json: expected a list of records"),
    (SCORE.replace("pairs.json", "numbers.json"), "numbers.json: expected a list of records"),
    (SCORE.replace("pairs.json", "empty.json"), "empty.json"),
    (SCORE.replace("pairs.json", "latin.jsonl"), "latin.jsonl: 1 of 1 rows .*\n  row 0: .* not UTF-8 text .byte 0xe9"),
    (SCORE.replace("pairs.json", "lines.jsonl"), "lines.jsonl, line 2: not valid JSON"),
    (SCORE.replace("pairs.json", "fields.csv"), "row 1: fields.csv, line 3: 3 fields where the header has 2"),
    (SCORE.replace("pairs.json", "quote.csv"), "row 1: quote.csv, line 3: a quote is not closed"),
    (SCORE.replace("pairs.json", "twice.csv"), "twice.csv: the header names 'caption' twice"),
    (SCORE.replace("pairs.json", "deep.json"), "row 1: deep.json, record 1: lists or objects nested too deeply"),
    (SCORE.replace("pairs.json", "half.json"), r"row 1: message 1: not UTF-8 text .\\ud83d, half of a character"),
    (SCORE.replace("pairs.json", "notes.txt"), "notes.txt: unknown kind of file"),
    (SCORE.replace("pairs.json", "fake.parquet"), "fake.parquet: not readable as parquet"),
    (SCORE.replace("pairs.json", "gone_image.json"), "no such image file"),
    (SCORE.replace("pairs.json", "thin.json"), "one side may be at most 100 times the other"),
    (SCORE.replace("pairs.json", "eps.json"), "a format that is not accepted"),
    (SCORE.replace("pairs.json", "address.json"), "web address|no such image file"),
    (SCORE.replace("{clip}", "gone"), "gone"),
    (SCORE.replace("{clip}", "{llm}"), "llama|CLIP|scorer"),
    (SCORE + " --binning thirds", "binning must be one of"),
    (SCORE + " --edges 0 1", "belong together"),
    (SCORE + " --binning edges --edges a b", "neither numbers nor an existing"),
    (SCORE + " --batch_size 0", "batch_size must be at least 1"),
    (SCORE + " --min_score nan", "min_score must be a number"),
    (SCORE + " --num_workers -1", "num_workers must not be negative"),
    (SCORE + " --num_align_levels 0", "num_align_levels"),
    (SCORE + " --sampling some", "sampling must be one of"),
    (SCORE + " --samples_per_level 3", "no effect without"),
    (SCORE + " --dtype int4", "dtype must be one of"),
    (SCORE + " --device tpu9", "device='tpu9' is none that torch knows"),
    (SCORE + " --on_bad_row ignore", "on_bad_row must be one of"),
    (SCORE.replace("--output out", "--output full"), "full"),
    (SCORE + " --accelerate_config zero9", "neither a file nor one of"),
    # ---- pretrain, instruct ----
    ("pretrain", "dataset is missing"),
    ("pretrain --dataset pairs.json --use_cpu true", "language_model and vision_tower missing"),
    (TRAIN.replace("--dataset pairs.json", ""), "dataset is missing"),
    (TRAIN.replace("pairs.json", "no_levels.json"), "align_level"),
    (TRAIN.replace("pairs.json", "level_9.json"), "align_level=9"),
    (TRAIN.replace("pairs.json", "level_text.json"), "level|similarity"),
    (TRAIN.replace("pairs.json", "two_users.json"), "row 1|turn"),
    (TRAIN.replace("pairs.json", "deep.json"), "row 1: deep.json, record 1: lists or objects nested too deeply"),
    (TRAIN.replace("pairs.json", "page.json"), "row 1: image cannot be read .*page.png.* leave such rows out"),
    (TRAIN.replace("pairs.json", "deep.json") + " --streaming true --shuffle_buffer 0", "row 1: deep.json, record 1"),
    (TRAIN.replace("pairs.json", "no_answer.json"), "row 1|empty|answer"),
    (TRAIN.replace("pairs.json", "two_images.json"), "placeholder|images"),
    (TRAIN.replace("pairs.json", "placeholder.json"), "<align>|placeholder"),
    (TRAIN + " --learning_rate .inf", "learning_rate=inf cannot be|could not convert|invalid float"),
    (TRAIN + " --learning_rate inf", "learning_rate=inf cannot be"),
    (TRAIN + " --image_token_penalty -1", "image_token_penalty=-1.0 cannot be"),
    (TRAIN + " --learning_rate nan", "learning_rate=nan is not a number"),
    (TRAIN + " --learning_rate -1", "learning_rate=-1.0 cannot be"),
    (TRAIN + " --learning_rate fast", "invalid float value: 'fast'"),
    (TRAIN + " --gradient_accumulation_steps -1", "gradient_accumulation_steps=-1 cannot be"),
    (TRAIN + " --per_device_train_batch_size 0", "per_device_train_batch_size=0 cannot be"),
    (TRAIN.replace("--max_steps 1", "--max_steps 0"), "max_steps=0 cannot be"),
    (TRAIN + " --num_train_epochs -1", "num_train_epochs=-1.0 cannot be"),
    (TRAIN + " --max_length 3", "more than max_length"),
    (TRAIN + " --seed -1", "seed=-1 cannot be"),
    (TRAIN + " --lr_scheduler_type zigzag", "zigzag"),
    (TRAIN + " --optim sgdd", "sgdd"),
    (TRAIN + " --group_by colour", "group_by|invalid choice"),
    (TRAIN + " --image_aspect_ratio wide", "image_aspect_ratio|invalid choice"),
    (TRAIN + " --packing true", "packing=True has no effect"),
    (TRAIN + " --push_to_hub true", "push_to_hub would upload"),
    (TRAIN + " --dtype bfloat16 --bf16 false", "needs bf16"),
    (TRAIN + " --eval_strategy steps", "needs eval_dataset"),
    (TRAIN + " --streaming true --max_steps -1", "streaming needs max_steps"),
    (TRAIN + " --use_peft true", "stage|LoRA|adapter|peft"),
    (TRAIN + " --report_to wandb", "wandb has no key: run `wandb login`"),
    (TRAIN + " --resume_from_checkpoint gone", "there is no such folder"),
    (TRAIN + " --resume_from_checkpoint full", "is damaged"),
    (TRAIN + " --lerning_rate 1", "did you mean '--learning_rate'"),
    (TRAIN + " --config gone.yaml", "no such file, and no recipe"),
    (TRAIN + " --config list.yaml", "must hold settings"),
    (TRAIN + " --config twice.yaml", "stands twice"),
    (TRAIN + " --config norway.yaml", "truth values|YAML reads"),
    (TRAIN + " --config tab.yaml", "not valid YAML"),
    (TRAIN.replace("--output_dir run", "--output_dir {model}"), "holds a finished model"),
    (TRAIN.replace("--output_dir run", "--output_dir file.txt"), "file.txt|exists"),
    ("instruct --dataset mix.json --use_cpu true --output_dir run", "model is missing"),
    ("instruct --model gone --dataset mix.json --use_cpu true --output_dir run", "gone"),
    ("instruct --model full --dataset mix.json --use_cpu true --output_dir run", "config.json"),
    ("instruct --model {model} --dataset mix.json --use_cpu true --output_dir {model}", "is model itself"),
    ("instruct --model {llm} --dataset mix.json --use_cpu true --output_dir run", "config of a llama model"),
    ("instruct --model {model} --dataset mix.json --use_cpu true --align_mode best", "align_mode|choice"),
    ("instruct --model {model} --dataset mix.json --use_cpu true --default_align_level 3", "has no effect"),
    ("instruct --model {model} --dataset mix.json --use_cpu true --output_dir run --vision_tower x", "unknown setting"),
    ("check", "Neither model nor language_model"),
    (f"check {STAGES} --images some", "a number of rows, or `all`"),
    (f"check {STAGES} --batches 0", "--batches 0: at least 1"),
    (f"check {STAGES} --align_mode gate", "unknown setting --align_mode"),
    ("check --model gone --dataset mix.json", "its config cannot be read"),
    # ---- merge, chat ----
    ("merge", "required"),
    ("merge --output out", "one of them"),
    ("merge --checkpoint {model} --output out", "no sharded checkpoint"),
    ("merge --adapter gone --output out", "gone"),
    ("merge --adapter {model} --output out", "adapter_config.json"),
    ("chat --model nowhere --question x", "nowhere cannot be loaded"),
    ("chat --model gone --question hi", "gone"),
    ("chat --model {llm} --question hi", "config of a llama model"),
    ("levels --model {clip} --data mix.json", "config of a clip model"),
    ("chat --model {model} --image gone.png --question hi", "there is no file 'gone.png'"),
    ("chat --model {model} --image notes.txt --question hi", "a format that is not accepted"),
    ("chat --model {model} --image thin.png --question hi", "one side may be at most 100 times"),
    ("chat --model {model} --align-level 9 --question hi", "alignment level 9 is not in 0..7"),
    ("chat --model {model} --dtype int8", "invalid choice: 'int8'"),
    # ---- convert ----
    ("convert", "required"),
    ("convert --checkpoint gone --output out", "gone"),
    ("convert --checkpoint full --output out", "config.json"),
    ("convert --checkpoint {model} --output out", "config.json|not supported|format"),
    ("convert --checkpoint {llm} --output out", "config.json|not supported|mm_"),
    ("convert --checkpoint {llm} --output full", "full|not empty|config"),
    ("convert --checkpoint {model} --output out --dtype int8", "invalid choice"),
    ("convert --checkpoint {model} --output out --to-original --dtype float32", "no effect with --to-original"),
    # ---- publish, space ----
    ("publish", "required"),
    ("publish gone --repo-id user/name", "gone"),
    ("publish {model} --repo-id name/with/slashes", "name/with/slashes|USER/NAME|repo"),
    ("publish {model} --repo-id 'a b'", "repo|USER/NAME"),
    ("publish full --repo-id user/name --dry-run", "config.json|missing|not fit"),
    ("publish-data", "required"),
    ("publish-data gone --repo-id user/name", "gone"),
    ("publish-data {model} --repo-id user/name --dry-run", "alignment.json"),
    ("space out", "required|--model"),
    ("space full --model user/name", "full"),
    ("space out --model 'a b c'", "a b c|Hub id"),
    # ---- demo, serve, evaluate, levels ----
    ("demo --model gone", "no such folder"),
    ("demo --model full", "no config.json"),
    ("demo --model {llm}", "config of a llama model"),
    ("serve", "required: --model"),
    ("serve --model gone", "no such folder"),
    ("serve --model {model} --port 99999", "'99999' is no port"),
    ("serve --model {model} --port http", "'http' is no port"),
    ("evaluate", "model|required|tasks"),
    ("evaluate --model {model} --tasks vqa9 --output out", "vqa9"),
    ("evaluate --model {model} --tasks pope --output out --batch-size 0", "batch"),
    ("serve --model {model} --backend vllm", "needs vLLM: pip install"),
    ("serve --model {model} --vllm-options=--x", "no effect without --backend vllm"),
    ("export", "required: --model"),
    ("export --model gone --output out", "neither a folder here nor a Hub id"),
    ("export --model {llm} --output out", "config of a llama model"),
    ("export --model {model} --output full", "output 'full' exists"),
    ("export --model {model} --output out --align-level 8", "align level 8 is not in 0..7"),
    ("export --model {model} --output out --align-level best", "--align-level best: give a level"),
    ("export --model {model} --output out --align-level calibrated", "needs --data"),
    ("export --model {model} --output out --data gone.json", "gone.json"),
    ("export --model {model} --output out --limit 0", "--limit is 0"),
    ("levels", "--data is missing"),
    ("levels --data mix.json", "--model is missing"),
    ("levels --model {model} --data gone", "gone"),
    ("levels --model {model} --data broken.json", "broken.json, record 1: not valid JSON"),
    ("levels --model {model} --data mix.json --limit 0", "must be at least 1"),
    ("levels --model {model} --data mix.json --correct nowhere", "write MODULE:FUNCTION"),
    ("levels --answers gone.jsonl", "gone.jsonl cannot be read"),
    ("levels --answers notes.txt", "no answer of `aligngpt evaluate`"),
    # ---- a model in the authors' format, wherever one of this format is asked for ----
    ("chat --model theirs --question hi", THEIRS),
    ("chat --model theirs_phi --question hi", THEIRS),
    ("serve --model theirs", THEIRS),
    ("serve --model theirs_phi", THEIRS),
    ("demo --model theirs", THEIRS),
    ("publish theirs --repo-id user/name --dry-run", THEIRS),
    ("publish theirs --repo-id user/name --dry-run --example a.png hi", THEIRS),
    ("export --model theirs --output out", THEIRS),
    ("levels --model theirs --data mix.json", THEIRS),
    ("evaluate --model theirs --tasks pope --output out", THEIRS),
    ("instruct --model theirs --dataset mix.json --use_cpu true --output_dir run", THEIRS),
    (SCORE.replace("{clip}", "theirs"), THEIRS),
]  # fmt: skip


def conversation(question: str = "<image>", answer: str = "a ramp", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": "a.png", "similarity": 3, "conversations": turns, **more}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with small real parts and many files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("world")
    save_demo_model(folder / "model")
    ramp = Image.linear_gradient("L").resize((64, 48))
    ramp.save(folder / "a.png")
    Image.new("1", (5000, 1)).save(folder / "thin.png")
    (folder / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, kind in (("theirs", "aligngpt"), ("theirs_phi", "aligngpt_phi")):
        # of 7B: to build it by mistake would show
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model_type": kind, "mm_vision_tower": "openai/clip"}))
    (folder / "full").mkdir()
    (folder / "full" / "notes.md").write_text("mine")
    whole = json.dumps(conversation())
    texts = {
        "pairs.json": f"[{whole}, {whole}]",
        "mix.json": f"[{whole}, {whole}]",
        "broken.json": f"[{whole}, {{",
        "fields.csv": "image,caption\na.png,a ramp\na.png,a ramp, grey\n",
        "quote.csv": 'image,caption\na.png,a ramp\na.png,"a ramp\na.png,a ramp\n',
        "twice.csv": "image,caption,caption\na.png,a ramp,a ramp\n",
        "deep.json": f'[{whole}, {{"image": "a.png", "caption": {"[" * 100_000}{"]" * 100_000}}}]',
        "half.json": f"[{whole}, {json.dumps(conversation(answer=HALF))}]",
        "cut.jsonl": f"{{\n{whole}\n",
        "page.json": f"[{whole}, {json.dumps(conversation(image='page.png'))}]",
        "trailing.json": f"[{whole}] [{whole}]",
        "commas.json": f"[{whole},, {whole}]",
        "glued.json": f"[{whole} {whole}]",
        "object.json": whole,
        "numbers.json": "[1, 2]",
        "empty.json": "",
        "lines.jsonl": f"{whole}\n{{\n",
        "notes.txt": "no data",
        "fake.parquet": "no parquet",
        "gone_image.json": json.dumps([conversation(image="gone.png")]),
        "thin.json": json.dumps([conversation(image="thin.png")]),
        "eps.json": json.dumps([conversation(image="a.eps")]),
        "address.json": json.dumps([conversation(image="http://127.0.0.1:9/a.png")]),
        "no_levels.json": json.dumps([{k: v for k, v in conversation().items() if k != "similarity"}] * 2),
        "level_9.json": json.dumps([conversation(similarity=9)] * 2),
        "level_text.json": json.dumps([conversation(similarity="high")] * 2),
        "two_users.json": json.dumps([conversation(conversations=[{"from": "human", "value": "<image>"}] * 2)]),
        "no_answer.json": json.dumps([conversation(answer="")]),
        "two_images.json": json.dumps([conversation(question="<image><image>")]),
        "placeholder.json": json.dumps([conversation(answer="an <align> token")]),
        "list.yaml": "- a\n",
        "twice.yaml": "seed: 1\nseed: 2\n",
        "norway.yaml": "save_strategy: no\n",
        "tab.yaml": "seed:\t[1\n",
        "file.txt": "a file",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.jsonl").write_bytes(b'{"image": "a.png", "caption": "caf\xe9"}\n')
    (folder / "page.png").write_text("<html>")
    return folder


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("line", "message"), CORPUS, ids=[line[:70] or "nothing" for line, _ in CORPUS])
def test_one_line_says_what_is_wrong(line, message, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = listing(world)
    names = {"llm": parts_path("llama"), "clip": parts_path("clip"), "model": world / "model"}
    words = [word.strip("'").format(**names) for word in re.findall(r"'[^']*'|\S+", line)]
    if message is None:
        assert main(words) == 0
        return
    assert main(words) == 2
    error = capsys.readouterr().err
    # a list of rows may follow the line
    (begin,) = [found.start() for found in re.finditer(r"^error: ", error, re.MULTILINE)]
    said = error[begin:]
    assert "Traceback" not in said, error
    assert re.search(message, said), said
    # scores that were made before a bad row are kept, and said to be
    shutil.rmtree(world / "out.partial", ignore_errors=True)
    assert listing(world) == before, "something was left behind"


def test_every_command_is_in_the_corpus():
    assert {line.split()[0] for line, _ in CORPUS if line} >= set(COMMANDS)
    assert len(CORPUS) >= 150


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_skip_trains_on_the_other_rows(world, monkeypatch, tmp_path, streaming):
    """An image that cannot be decoded, half a character, and a record nested too deeply, each in a row of its own."""
    monkeypatch.chdir(world)
    # each file holds a good row, too
    rows = [(world / name).read_text()[1:-1] for name in ("page.json", "half.json", "deep.json")]
    (tmp_path / "rows.json").write_text(f"[{', '.join(rows)}]")
    names = {"llm": parts_path("llama"), "clip": parts_path("clip")}
    line = TRAIN.replace("pairs.json", str(tmp_path / "rows.json")).replace(" run", f" {tmp_path / 'run'}")
    words = f"{line.format(**names)} --image_folder {world} --on_bad_row skip --streaming {streaming}".split()
    # a stream that is shorter than an accumulation would never come to its first step
    assert main([*words, "--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "1"]) == 0
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    # a stream counts what it has read so far, the beginning of the next pass included
    assert summary["train_rows_left_out"] == (summary["train_rows_read"] if streaming == "true" else 3)
    assert streaming == "true" or (summary["train_rows"], summary["train_rows_unusable"]) == (3, 3)
