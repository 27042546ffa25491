"""
What a rebuilding of the code is held to: models saved by commit 72fbf4d (0.1.0), and what they, both stages, the
scoring, the cards and the commands' help gave then. `test_frozen.py` compares.

    python tests/frozen.py help cards losses scores    write today's over what is frozen; any of the four
    python tests/frozen.py models                      made the models and their answers, once, at that commit

Models and answers are never made again: what users have saved loads and answers alike. The other four may change on
purpose, and then in the commit that changes them.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset, Image, List, Value
from modeling.tiny import randomize
from stage_parts import conversation_rows, losses, message, pair_rows, save_parts, settings, to_dataset

from aligngpt_hub.publishing.card import write_card
from aligngpt_hub.publishing.run_records import read_records
from aligngpt_playground.world import make_pairs, parts_path
from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)
from aligngpt_trainers.commands.cli import COMMANDS, main
from aligngpt_trainers.data.load import load_rows
from aligngpt_trainers.lora import load_adapter
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import assemble


FROZEN = Path(__file__).parent / "fixtures" / "frozen"
MODELS = ("fresh", "stage1", "gate", "level", "mean", "stream", "lora")
LEVELS, STEPS, LEARNING_RATE = 4, 6, 2e-3
STAGES = {
    "pretrain": (AlignGPTPretrainTrainer, AlignGPTPretrainConfig, "fresh", "pairs"),
    "instruct": (AlignGPTInstructTrainer, AlignGPTInstructConfig, "stage1", "conversations"),
}
EVALUATION = {
    "date": "2024-05-29",
    "seed": 0,
    "results": [
        {"task": "pope", "dataset": "lmms-lab/POPE", "split": "test", "metric": "accuracy", "value": 86.0}
        | {"task_version": 1, "num_samples": 9000, "paper_7b": 86.0, "paper_13b": 86.2}
    ],
}


def read(name: str) -> Any:
    return json.loads((FROZEN / name).read_text(encoding="utf-8"))


def write(name: str, value: Any) -> None:
    (FROZEN / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, str]:
    """What the last digits of a sum depend on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().partition("\n\n")[0].splitlines() if cpu.is_file() else []
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines)
    kind = [facts.get(name, "?") for name in ("vendor_id", "cpu family", "model", "stepping")]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"processor": " ".join(kind), "capability": capability, "torch": torch.__version__}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows(name: str) -> Dataset:
    """The frozen rows `pairs`, `conversations` or `world`."""
    with tempfile.TemporaryDirectory() as cache:
        return Dataset.from_parquet(str(FROZEN / f"{name}.parquet"), cache_dir=cache, keep_in_memory=True)


# ---- models and their answers ----


def load(name: str):
    """A frozen model in eval mode, and its processor."""
    folder = FROZEN / name
    if name == "lora":
        return load_adapter(folder, base=FROZEN / "stage1")
    model = AlignGPTForConditionalGeneration.from_pretrained(folder)
    return model.eval(), AlignGPTProcessor.from_pretrained(folder)


def questions() -> dict[str, tuple[list, list[dict]]]:
    """Images and conversation of each question."""
    images = [row["images"][0] for row in rows("pairs").select(range(2))]

    first = [message("user", "what is it?", images=1), message("assistant", "a square")]
    between = [{"type": "text", "text": "this"}, {"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    clear = images[0].copy()
    clear.putalpha(images[1].convert("L").resize(clear.size))
    return {
        "image alone": (images[:1], [message("user", images=1)]),
        "question": (images[:1], [message("user", "what colour is it?", images=1)]),
        "two images": (images, [message("user", "compare them", images=2)]),
        "images between texts": (images, [{"role": "user", "content": between}]),
        "transparent image": ([clear], [message("user", "what colour is it?", images=1)]),
        "second turn": (images[1:], [*first, message("user", "and the colour?")]),
        "no image": ([], [message("user", "name a colour")]),
    }


def answers(name: str) -> dict[str, Any]:
    """What a frozen model says: prompt, greedy answer, some logits behind the prompt, what each level contributes."""
    model, processor = load(name)
    found = {}
    with one_thread(), torch.no_grad():
        for title, (images, messages) in questions().items():
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(images=images or None, text=text, return_tensors="pt")
            for level in (None, 0, LEVELS - 1) if title == "question" else (None,):
                given = {} if level is None else {"align_level": level}
                output = model(**inputs, **given)
                ids = model.generate(**inputs, **given, max_new_tokens=8, do_sample=False)
                length = inputs["input_ids"].shape[1]
                found[title if level is None else f"{title}, level {level}"] = {
                    "prompt": inputs["input_ids"][0].tolist(),
                    "answer": ids[0, length:].tolist(),
                    "logits": output.logits[0, -1, ::32].tolist(),
                    "shares": output.align_weights[0].tolist(),
                }
    return found


def make_models() -> None:
    """Makes rows, models and answers; refused where they are."""
    if (FROZEN / "answers.json").exists():
        raise SystemExit("The frozen models stay as they are.")
    FROZEN.mkdir(parents=True, exist_ok=True)
    os.chdir(FROZEN)
    to_dataset(pair_rows(16)).to_parquet("pairs.parquet")
    conversations = to_dataset([{**row, "align_level": i % LEVELS} for i, row in enumerate(conversation_rows(16))])
    conversations.to_parquet("conversations.parquet")
    drawn = [{"image": row["image"], "caption": row["caption"]} for row in make_pairs(256)]
    Dataset.from_list(drawn).cast_column("image", Image()).to_parquet("world.parquet")
    scored = score()
    write("alignment.json", scored["record"])

    with tempfile.TemporaryDirectory() as parts:
        model, processor = assemble(*save_parts(Path(parts)), num_align_levels=LEVELS, gate_hidden_size=16, seed=0)
    # wide enough that images, levels and words move the answers
    randomize(model)
    model.save_pretrained("fresh")
    processor.save_pretrained("fresh")
    sources = {"language_model": "lmsys/vicuna-7b-v1.5", "vision_tower": "openai/clip-vit-large-patch14-336"}
    first = stage("pretrain", "stage1", rows("pairs"), {"sources": {**sources, "dataset": "world"}})
    second = {"sources": {"model": "stage1", "dataset": "liuhaotian/LLaVA-Instruct-150K"}}
    stage("instruct", "gate", rows("conversations"), {"pretrain": first, "alignment": scored["record"], **second})
    write("gate/evaluation_results.json", EVALUATION)
    for mode in ("level", "mean"):
        stage("instruct", mode, rows("conversations"), align_mode=mode)
    with tempfile.TemporaryDirectory() as shards:
        for number in range(2):
            rows("conversations").shard(2, number).to_parquet(f"{shards}/{number}.parquet")
        stream = load_rows(shards, streaming=True, shuffle_buffer=0)
        stage("instruct", "stream", stream, group_by="none", accelerator_config={"dispatch_batches": False})
    load("stream")[0].save_pretrained("stream", max_shard_size="60KB")
    Path("stream", "model.safetensors").unlink()
    words = {"model": "stage1", "dataset": "conversations.parquet", "output_dir": "lora", "max_steps": 3}
    words |= {"per_device_train_batch_size": 4, "learning_rate": LEARNING_RATE, "save_strategy": "no"}
    words |= dict.fromkeys(("use_peft", "use_cpu", "disable_tqdm"), "true")
    assert main(["instruct", *(f"--{name}={value}" for name, value in words.items())]) == 0
    for name in MODELS:
        for path in (FROZEN / name).iterdir():
            # the code beside a model is this package's
            if path.suffix == ".py" or path.name == "trainer_state.json":
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
    write("answers.json", {name: answers(name) for name in MODELS})


def stage(kind: str, output: str, data: Any, extra: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Three steps of a stage; the folder `output` is written, the summary returned."""
    trainer_class, config_class, start, _ = STAGES[kind]
    with one_thread():
        config = settings(config_class, output, learning_rate=LEARNING_RATE, **options)
        trainer = trainer_class(start, config, data)
        trainer.train()
        return trainer.save_final(extra)


# ---- losses ----


def six_losses(kind: str) -> list[float]:
    """The losses of a stage's first six steps from a frozen model on frozen rows, one thread."""
    trainer_class, config_class, start, data = STAGES[kind]
    with one_thread(), tempfile.TemporaryDirectory() as output:
        config = settings(config_class, output, max_steps=STEPS, learning_rate=LEARNING_RATE)
        trainer = trainer_class(str(FROZEN / start), config, rows(data))
        trainer.train()
        return losses(trainer)


def make_losses() -> dict[str, Any]:
    return {"machine": machine(), **{kind: six_losses(kind) for kind in STAGES}}


# ---- scores ----


def score() -> dict[str, Any]:
    """256 pairs of the small world, scored by its CLIP and cut into eight levels by equal widths."""
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        words = ["--dataset", FROZEN / "world.parquet", "--scorer", parts_path("clip"), "--output", f"{folder}/scored"]
        words += ["--num_align_levels", 8, "--binning", "uniform", "--device", "cpu", "--num_workers", 0]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["score", *map(str, words)]) == 0
        scored = Dataset.load_from_disk(f"{folder}/scored", keep_in_memory=True)
        record = json.loads(Path(folder, "scored", "alignment.json").read_text())
    return {"scores": scored["clip_score"][:], "levels": scored["align_level"][:], "record": record}


def make_scores() -> dict[str, Any]:
    found = score()
    return {"edges": found["record"]["edges"], "scores": found["scores"], "levels": found["levels"]}


# ---- cards ----


def cards() -> dict[str, str]:
    """The card of the frozen gate model, and of the frozen scores."""
    with tempfile.TemporaryDirectory() as folder:
        files = {path.name: path for path in (FROZEN / "gate").iterdir()}
        licences = {"lmsys/vicuna-7b-v1.5": "llama2"}
        example = {"image": "example.png", "question": "What is it?", "answer": "A square."}
        write_card(
            read_records(files), Path(folder), "user/model", licences=licences, tag="v1", example=example, licence="mit"
        )
        model = Path(folder, "README.md").read_text(encoding="utf-8")
        found = read("scores.json")
        table = rows("world")
        scored = Dataset.from_dict(
            {
                "images": [[image] for image in table["image"]],
                "messages": [
                    [
                        {"role": "user", "content": [{"type": "image", "text": None}]},
                        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
                    ]
                    for caption in table["caption"]
                ],
                "clip_score": found["scores"],
                "align_level": found["levels"],
            }
        )
        for column, kind in (("images", List(Image())), ("clip_score", Value("float32"))):
            scored = scored.cast_column(column, kind)
        scored.save_to_disk(f"{folder}/scored")
        shutil.copy(FROZEN / "alignment.json", f"{folder}/scored")
        words = ["--repo-id", "user/pairs", "--license", "cc-by-sa-4.0", "--source", "someone/pairs", "--dry-run"]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main(["publish-data", f"{folder}/scored", *words]) == 0
        data = said.getvalue().partition("README.md:\n\n")[2].partition("\ndry run:")[0]
    return {"model.md": model, "data.md": data}


# ---- help ----


def help_of(command: str | None = None) -> str:
    """What `aligngpt COMMAND --help` prints on a terminal of 110 columns."""
    said = io.StringIO()
    words = [command, "--help"] if command else ["--help"]
    with mock.patch.dict(os.environ, {"COLUMNS": "110"}), contextlib.redirect_stdout(said):
        try:
            main(words)
        except SystemExit as end:
            assert not end.code, words
    return "\n".join(line.rstrip() for line in said.getvalue().strip().splitlines()) + "\n"


def helps() -> dict[str, str]:
    return {"aligngpt.txt": help_of(), **{f"{name}.txt": help_of(name) for name in COMMANDS}}


# ---- the command ----


def write_texts(folder: str, texts: dict[str, str]) -> None:
    shutil.rmtree(FROZEN / folder, ignore_errors=True)
    (FROZEN / folder).mkdir()
    for name, text in texts.items():
        (FROZEN / folder / name).write_text(text, encoding="utf-8")


UPDATES = {
    "models": make_models,
    "losses": lambda: write("losses.json", make_losses()),
    "scores": lambda: write("scores.json", make_scores()),
    "cards": lambda: write_texts("cards", cards()),
    "help": lambda: write_texts("help", helps()),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=list(UPDATES))
    for what in parser.parse_args(sys.argv[1:]).what:
        UPDATES[what]()
