"""The whole way in one command: data, scores and levels, both stages, held-out figures, loading back, a report.

Everything is done by the `aligngpt` commands and classes that a model of seven billion parameters is trained with; only
the parts are tiny. The output folder is complete: it holds data, parts and recipes, and the printed commands can be
repeated in it.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .evaluate import Accuracy, evaluate_captions, evaluate_questions, format_table, save_image, score_answer
from .report import RESULTS_NAME, write_report
from .sprites import ATTRIBUTION
from .world import parts_path


TARGETS = {"Captions that name the main object": 0.70, "Questions answered right": 0.65}
NUM_STEPS = 9
KIND = "aligngpt quickstart"
HISTOGRAM_BARS = 40

PROGRAM = """\
from transformers import pipeline

ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
for image, question in questions:
    content = [{"type": "image", "url": image}, {"type": "text", "text": question}]
    message = {"role": "user", "content": content}
    print(ask(text=[message], max_new_tokens=32, return_full_text=False)[0]["generated_text"])
"""
"""What a Hub user writes; `folder` and `questions` are set before."""
# around it: arguments in; answers (which may hold newlines) and the names of our own modules, if any, out
_BEFORE = (
    "import json, sys\nfolder, questions = json.loads(sys.argv[1])\nanswers, show = [], print\nprint = answers.append\n"
)
_AFTER = 'show(json.dumps([answers, [name for name in sys.modules if name.split(".")[0] in {ours!r}]]))\n'
_OURS = ("modeling_aligngpt", "aligngpt_trainers", "aligngpt_hub", "aligngpt_playground")


class StepError(Exception):
    """A step of the quickstart failed; the message says which, and why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m aligngpt_playground quickstart`."""
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder to write (%(default)s)")
    parser.add_argument("--pairs", type=int, default=4400, help="image-caption pairs of stage 1 (%(default)s)")
    parser.add_argument("--conversations", type=int, default=3000, help="conversations of stage 2 (%(default)s)")
    parser.add_argument("--heldout", type=int, default=256, help="held-out images of either kind (%(default)s)")
    parser.add_argument("--parts", type=Path, help="folder with clip/ and llama/ to use instead of the package's own")
    parser.add_argument("--max-steps", type=int, help="stop each stage after so many steps, for a trial")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn world (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the quickstart; returns the exit status: 0, or 1 with a sentence on standard error when a step fails."""
    # everything is local: nothing may wait for a network that is not there
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # GNU OpenMP threads that wait keep their core busy: with another program on it, training takes three times as long
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        for name in ("pairs", "conversations", "heldout", "max_steps"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise StepError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        args.parts = args.parts and args.parts.absolute()
        with _output_folder(args.output) as folder:
            results = _run_steps(args, folder)
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; {args.output} is as it was before", file=sys.stderr)
        return 130
    print(describe(results))
    print(f"\nReport: {args.output / 'report.html'}   figures: {args.output / RESULTS_NAME}")
    return 0


# ---- the output folder ----


@contextmanager
def _output_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output`, which is also the working directory; it takes `output`'s place when all went well."""
    output = Path(os.path.abspath(output))
    if output.exists() and not output.is_dir():
        raise StepError(f"{output} is a file; give a folder with --output")
    if output.is_dir() and any(output.iterdir()) and not _is_quickstart(output):
        raise StepError(f"{output} holds something other than an earlier quickstart; give another folder with --output")
    before = os.getcwd()
    beside = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        beside = output.with_name(f".{output.name}.{os.getpid()}.partial")
        beside.mkdir()
        os.chdir(beside)
        yield beside
        os.chdir(before)
        replaced = beside.with_suffix(".replaced")
        if output.exists():
            os.replace(output, replaced)
        os.replace(beside, output)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise StepError(f"the folder {output} cannot be written: {error}") from error
    finally:
        os.chdir(before)
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _is_quickstart(folder: Path) -> bool:
    """Whether an earlier quickstart has written this folder: nothing else may be replaced."""
    try:
        return json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8")).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def _remove_leftovers(output: Path) -> None:
    """Delete what runs that were killed have left beside `output`; runs that still go on are left alone."""
    import psutil

    for path in output.parent.glob(f".{output.name}.*.partial"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            shutil.rmtree(path, ignore_errors=True)


# ---- steps ----


class Steps:
    """Runs steps one after the other, says what they are and keeps their times."""

    def __init__(self, total: int):
        self.total, self.done, self.started = total, [], time.perf_counter()

    @contextmanager
    def step(self, name: str, command: str | None = None) -> Iterator[None]:
        """Time the block; any error in it becomes a `StepError` that names the step."""
        number = len(self.done) + 1
        print(f"\n[{number}/{self.total}] {name}" + (f"\n$ {command}" if command else ""), flush=True)
        started = time.perf_counter()
        try:
            yield
        except StepError as error:
            raise StepError(f"step {number} of {self.total} ({name}) failed: {error}") from error
        except ImportError as error:
            remedy = 'pip install ".[train,playground]" in a checkout'
            raise StepError(f"step {number} of {self.total} ({name}) failed: {error}; {remedy}") from error
        except Exception as error:
            raise StepError(
                f"step {number} of {self.total} ({name}) failed: {type(error).__name__}: {error}"
            ) from error
        seconds = time.perf_counter() - started
        self.done.append({"name": name, "command": command, "seconds": round(seconds, 2)})
        print(f"    {seconds:.1f} s", flush=True)

    def aligngpt(self, name: str, *words: str) -> None:
        """Run an `aligngpt` command in this process, as the shell command that is printed would do."""
        from aligngpt_trainers.commands import cli

        with self.step(name, shlex.join(["aligngpt", *words])):
            if status := cli.main(words):
                raise StepError(f"`aligngpt {words[0]}` ended with status {status}; its message stands above")


def _run_steps(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All steps, in `folder`; returns what results.json holds."""
    steps = Steps(NUM_STEPS)
    limit = [] if args.max_steps is None else ["--max_steps", str(args.max_steps)]
    results: dict[str, Any] = {"kind": KIND, "machine": f"{os.cpu_count()} CPU cores", "attribution": ATTRIBUTION}

    with steps.step("Load the libraries, lay out parts and recipes"):
        _quiet_libraries()
        _copy_parts(folder, args.parts)
    _draw_world(args, steps)
    steps.aligngpt("Score the pairs with CLIP, cut the scores into levels", "score", "--config", "recipes/score.yaml")
    steps.aligngpt("Stage 1: pre-training", "pretrain", "--config", "recipes/pretrain.yaml", *limit)
    with steps.step("Caption held-out images with the stage-1 model, at several levels"):
        results["captions"] = evaluate_captions("pretrain", "data/pairs", folder="images")
    steps.aligngpt("Stage 2: instruction tuning", "instruct", "--config", "recipes/instruct.yaml", *limit)
    with steps.step("Ask about held-out images, before and after stage 2"):
        results |= evaluate_questions("instruct", "data/conversations", folder="images", before="pretrain")
    with steps.step("Load the saved folder in a fresh process, as from the Hub"):
        results["loaded_back"] = _load_back("instruct", results["questions"]["examples"])
    with steps.step("Write the report"):
        results |= _read_runs()
        reached = (results["captions"]["rows"][0]["accuracy"], results["questions"]["overall"]["accuracy"])
        results["targets"] = [
            {"name": name, "value": value, "target": target, "met": value >= target}
            for value, (name, target) in zip(reached, TARGETS.items(), strict=True)
        ]
        packages = ("torch", "transformers", "trl", "datasets", "accelerate")
        results["versions"] = {"python": platform.python_version(), **{name: version(name) for name in packages}}
        _write_results(results, steps)
    # once more with the time of this last step
    _write_results(results, steps)
    return results


def _write_results(results: dict[str, Any], steps: Steps) -> None:
    results["steps"] = steps.done
    results["seconds"] = round(time.perf_counter() - steps.started, 2)
    Path(RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_report(".")


def _quiet_libraries() -> None:
    """Import what is slow to import, and silence what would bury the progress."""
    import datasets
    from transformers.utils import logging

    import aligngpt_trainers.commands.train  # noqa: F401

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # the value that TRL itself sets
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")


def _copy_parts(folder: Path, parts: Path | None) -> None:
    """Tiny parts and recipes into the output folder, so that every command in it is complete."""
    for name in ("clip", "llama"):
        source = parts_path(name) if parts is None else parts / name
        if not (source / "config.json").is_file():
            raise StepError(f"{source} holds no model; --parts takes a folder with clip/ and llama/")
        shutil.copytree(source, folder / "parts" / name)
    shutil.copytree(Path(__file__).parent / "recipes", folder / "recipes")
    (folder / "images").mkdir()


def _draw_world(args: argparse.Namespace, steps: Steps) -> None:
    from .world import write_world

    numbers = {
        "pairs": args.pairs,
        "conversations": args.conversations,
        "heldout_pairs": args.heldout,
        "heldout_conversations": args.heldout,
        "seed": args.seed,
    }
    options = [word for name, n in numbers.items() for word in (f"--{name.replace('_', '-')}", str(n))]
    command = shlex.join(["python", "-m", "aligngpt_playground", "make", "--output", "data", *options])
    with steps.step("Draw images, captions and conversations", command):
        try:
            written = write_world("data", **numbers)
        except (OSError, ValueError) as error:
            raise StepError(str(error)) from error
        print(", ".join(f"{name}: {n} rows" for name, n in written.items()), "written to data")


def _load_back(model_folder: str, examples: list[dict[str, Any]], number: int = 3) -> dict[str, Any]:
    """Ask again in a process that knows transformers alone."""
    asked = examples[:number]
    words = json.dumps([model_folder, [[example["image"], example["question"]] for example in asked]])
    program = _BEFORE + PROGRAM + _AFTER.format(ours=_OURS)
    print(f"$ python - <<END\n{PROGRAM}END", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        # a cache of its own, so that the folder's code is what runs
        environment = {**os.environ, "HF_MODULES_CACHE": cache, "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [sys.executable, "-c", program, words], capture_output=True, text=True, env=environment, check=False
        )
    if done.returncode:
        raise StepError(f"the fresh process ended with status {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    given, ours = json.loads(done.stdout.strip().splitlines()[-1])
    if ours:
        raise StepError(f"the fresh process has imported {', '.join(ours)}: it was to run on the saved folder alone")
    answers = []
    for example, answer in zip(asked, map(str.strip, given), strict=True):
        kept = {name: example[name] for name in ("image", "shows", "question", "expected")}
        answers.append({**kept, "answer": answer, "right": score_answer(answer, example["expected"])})
        print(f"    {example['question']} {answer}   (expected: {example['expected']})")
        if answer != (before := example["answer"]):
            raise StepError(f"{example['question']!r}: the answer here was {before!r}, in a fresh process {answer!r}")
    return {"program": PROGRAM, "answers": answers}


def _read_runs() -> dict[str, Any]:
    """What the commands recorded: levels and scores, losses, numbers of parameters."""
    from datasets import load_from_disk

    record = json.loads(Path("scored/alignment.json").read_text(encoding="utf-8"))
    rows = load_from_disk("scored")
    scores, levels = rows["clip_score"][:], rows["align_level"][:]
    low, high = min(scores), max(scores)
    width = max((high - low) / HISTOGRAM_BARS, 1e-9)
    counts = [0] * HISTOGRAM_BARS
    for score in scores:
        counts[min(int((score - low) / width), HISTOGRAM_BARS - 1)] += 1
    examples = []
    for level in range(record["num_align_levels"]):
        row = rows[levels.index(level)] if level in levels else None
        examples.append(
            row
            and {
                "image": save_image(row["images"][0], "images", f"level-{level}"),
                "caption": row["messages"][-1]["content"][0]["text"],
                "score": row["clip_score"],
            }
        )
    summaries = {
        stage: json.loads(Path(stage, "training_summary.json").read_text(encoding="utf-8"))
        for stage in ("pretrain", "instruct")
    }
    return {
        "levels": {
            "edges": record["edges"],
            "counts": record["counts"],
            "histogram": {"low": low, "high": high, "counts": counts},
            "examples": examples,
        },
        "losses": {stage: summary["loss_curve"] for stage, summary in summaries.items()},
        "parameters": {
            "all": summaries["instruct"]["parameters"],
            "trained_in_pretrain": summaries["pretrain"]["trained_parameters"],
            "trained_in_instruct": summaries["instruct"]["trained_parameters"],
        },
    }


# ---- what is printed at the end ----


def describe(results: dict[str, Any]) -> str:
    """Tables, captions at the lowest and the highest level, targets and times, for the terminal."""
    captions, questions = results["captions"], results["questions"]
    lowest, highest = captions["by_level"][0], captions["by_level"][-1]
    rows = [Accuracy(**row) for row in (*questions["rows"], questions["overall"])]
    parts = [
        format_table("Captions after stage 1", [Accuracy(**row) for row in captions["rows"]]),
        "\n".join([format_table("Questions after stage 2", rows), *(f"  {note}" for note in questions["notes"])]),
        f"The same {captions['number']} images at level {lowest['level']}: "
        + ", ".join(f"{row['name']} {row['accuracy']:.3f}" for row in lowest["rows"]),
    ]
    for example in captions["examples"][:3]:
        first, last = example["by_level"][0], example["by_level"][-1]
        parts.append(
            f"It shows {example['shows']}\n  level {lowest['level']}: {first}\n  level {highest['level']}: {last}"
        )
    lines = [f"{step['seconds']:>7.1f} s  {step['name']}" for step in results["steps"]]
    parts.append("\n".join([*lines, f"{results['seconds']:>7.1f} s  altogether"]))
    for target in results["targets"]:
        state = "met" if target["met"] else "MISSED"
        parts.append(f"{target['name']}: {target['value']:.3f}, target {target['target']:.2f} {state}")
    return "\n\n" + "\n\n".join(parts)
