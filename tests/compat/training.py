"""
The second half of `make compat`: both stages, a checkpoint that is continued, a dry publishing and an answer on the
last four minors of transformers and of TRL, the newest included.

    python tests/compat/training.py [--pairs 5.24.0:1.16.0 ...] [--page benchmarks/compat-training.md]

The releases are found on the package index. Each pair is installed in front of the environment that runs this, without
its requirements but for those that transformers checks at import; everything else stays at the tested version.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parents[2]
MINORS = 4
STEPS = ("init", "pretrain", "instruct", "continued", "publish", "answer")
PAGE = """\
# Training on other releases of transformers and TRL

```bash
make compat   # some minutes: one pair after another
```

A tiny model is made, trained for a few steps in both stages by the commands of the documentation, its second stage
stopped at a checkpoint and continued, published in a dry run, and asked. Each row is one pair of releases in front of
the tested environment. The losses of both stages are those of the newest pair unless the last column says otherwise.

{table}

TRL 1.15 asks for Triton, also where there is no GPU: its `SFTTrainer` fails on a CPU, so the package leaves it out.

Python {python}, CPU; commit {commit}, {date}.
"""
PROBE = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import transformers, trl
from aligngpt_trainers.commands.cli import main

work, done = Path({work!r}), []
report = {{"transformers": transformers.__version__, "trl": trl.__version__, "done": done}}

def losses(folder):
    history = json.loads((sorted((work / folder).glob("checkpoint-*"))[-1] / "trainer_state.json").read_text())
    return [round(entry["loss"], 5) for entry in history["log_history"] if "loss" in entry]

def run(name, *words):
    code = main([str(word) for word in words])
    assert not code, f"{{name}}: status {{code}}"
    done.append(name)

common = ["--use_cpu", "true", "--report_to", "none", "--dataloader_num_workers", 0, "--logging_steps", 1]
common += ["--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 3, "--seed", 1]
common += ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--dtype", "float32"]
common += ["--bf16", "false", "--disable_tqdm", "true"]
try:
    run("init", "init", "--llm", {llm!r}, "--vision_tower", {tower!r}, "--dtype", "float32", "--output", work / "fresh")
    run("pretrain", "pretrain", "--model", work / "fresh", "--dataset", {pairs!r}, "--output_dir", work / "one",
        "--max_steps", 4, *common)
    two = ["--model", work / "one", "--dataset", {conversations!r}, "--output_dir", work / "two", *common]
    run("instruct", "instruct", *two, "--max_steps", 4)
    whole = losses("two")
    import shutil
    shutil.rmtree(work / "two" / "checkpoint-4")
    for path in (work / "two").iterdir():
        if path.is_file():
            path.unlink()
    run("continued", "instruct", *two, "--max_steps", 4, "--resume_from_checkpoint", work / "two" / "checkpoint-2")
    assert losses("two") == whole, (losses("two"), whole)
    report["losses"] = losses("one") + whole
    run("publish", "publish", work / "two", "--repo-id", "user/name", "--dry-run")
    run("answer", "chat", "--model", work / "two", "--image", {image!r}, "--question", "what is it?")
except BaseException as error:
    import traceback
    last = traceback.extract_tb(error.__traceback__)[-1]
    report["failed"] = f"{{type(error).__name__}}: {{str(error)[:300]}} ({{Path(last.filename).name}}:{{last.lineno}})"
    traceback.print_exc()
Path({report!r}).write_text(json.dumps(report))
"""


def newest_minors(package: str) -> list[str]:
    """The newest patch of each of the last minors within pyproject.toml's bounds, oldest first, from the index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = map(Requirement, project["optional-dependencies"]["train"])
    bounds = next(requirement.specifier for requirement in wanted if requirement.name == package)
    command = [sys.executable, "-m", "pip", "index", "versions", package, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True)
    newest: dict[tuple[int, int], Version] = {}
    for version in map(Version, json.loads(result.stdout)["versions"]):
        minor = version.major, version.minor
        if version in bounds and version > newest.get(minor, Version("0")):
            newest[minor] = version
    return [str(newest[minor]) for minor in sorted(newest)][-MINORS:]


def all_pairs() -> Iterator[tuple[str, str]]:
    """Each transformers with the newest TRL, and each TRL with the newest transformers."""
    transformers, trl = newest_minors("transformers"), newest_minors("trl")
    yield transformers[-1], trl[-1]
    yield from ((version, trl[-1]) for version in reversed(transformers[:-1]))
    yield from ((transformers[-1], version) for version in reversed(trl[:-1]))


def install(folder: Path, transformers: str, trl: str) -> None:
    """Both releases, and the tokenizers that this transformers asks for."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*pip, f"transformers=={transformers}", f"trl=={trl}"], check=True, stdin=subprocess.DEVNULL)
    needed = subprocess.run(
        [sys.executable, "-c", "import transformers"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    if needed.returncode:
        metadata = next(folder.glob("transformers-*.dist-info")) / "METADATA"
        lines = metadata.read_text(encoding="utf-8").splitlines()
        wanted = [
            line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist: ") and "extra" not in line
        ]
        checked = [line for line in wanted if line.startswith(("tokenizers", "huggingface", "safetensors"))]
        subprocess.run([*pip, *checked], check=True, stdin=subprocess.DEVNULL)


def prepare(folder: Path) -> dict[str, str]:
    """Data of the small world, an image, and the parts' folders."""
    from datasets import Dataset

    from aligngpt_playground import parts_path
    from aligngpt_playground.scenes import draw_scenes, render
    from aligngpt_playground.world import make_conversations, make_pairs

    pairs = [{**row, "align_level": number % 8} for number, row in enumerate(make_pairs(24))]
    Dataset.from_list(pairs).save_to_disk(str(folder / "pairs"))
    Dataset.from_list(make_conversations(24)).save_to_disk(str(folder / "conversations"))
    render(next(iter(draw_scenes(1, 0))), 0).save(folder / "image.png")
    parts = {"llm": str(parts_path("llama")), "tower": str(parts_path("clip"))}
    data = {name: str(folder / name) for name in ("pairs", "conversations")}
    return {**parts, **data, "image": str(folder / "image.png")}


def try_pair(folder: Path, given: dict[str, str], transformers: str, trl: str) -> dict:
    """The report of one pair; without one, what its process printed last."""
    folder.mkdir()
    install(folder / "packages", transformers, trl)
    report = folder / "report.json"
    script = PROBE.format(tests=str(ROOT), work=str(folder), report=str(report), **given)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**kept, "PYTHONPATH": str(folder / "packages"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, cwd=folder, capture_output=True, text=True)
    if not report.is_file():
        return {"transformers": transformers, "trl": trl, "done": [], "failed": ran.stderr.strip()[-400:]}
    found = json.loads(report.read_text())
    if "failed" in found:
        print(ran.stderr[-3000:], flush=True)
    return found


def page(reports: list[dict]) -> str:
    rows = [["transformers", "TRL", *STEPS, "losses"], ["---"] * (len(STEPS) + 3)]
    for report in reports:
        marks = ["ran" if step in report["done"] else "**failed**" for step in STEPS]
        same = report.get("losses") == reports[0].get("losses")
        rows.append([report["transformers"], report["trl"], *marks, "equal" if same else str(report.get("losses"))])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return PAGE.format(table=table, python=sys.version.split()[0], commit=commit, date=date.today())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", nargs="+", help="TRANSFORMERS:TRL; default: found on the index")
    parser.add_argument("--page", type=Path, help="write the page here")
    args = parser.parse_args()
    pairs = [tuple(pair.split(":")) for pair in args.pairs] if args.pairs else list(all_pairs())
    reports = []
    with tempfile.TemporaryDirectory() as name:
        given = prepare(Path(name))
        for transformers, trl in pairs:
            folder = Path(name) / f"{transformers}-{trl}"
            reports.append(try_pair(folder, given, transformers, trl))
            shutil.rmtree(folder)
            print(f"transformers {transformers}, trl {trl}: {reports[-1].get('failed') or 'ran'}", flush=True)
    text = page(reports)
    print(text)
    if args.page is not None:
        args.page.write_text(text, encoding="utf-8")
    red = [report for report in reports if "failed" in report]
    print(f"{len(reports) - len(red)} passed, {len(red)} failed")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
