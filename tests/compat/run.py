"""
`make compat`: one saved model on every transformers release that the core promises to run on, each in an environment
of its own, and a table of what came out.

    python tests/compat/run.py [--versions 4.57.6 5.24.0] [--page benchmarks/compat.md]

The releases are found on the package index: the newest patch of 4.57, of every 5.x minor from 5.18 on, and of whatever
is newer than the core's bound, which is tried and reported without failing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file


TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))
from parity.golden import GOLDEN, TENSOR_FILES, our_batch, read  # noqa: E402


FIRST_MINOR, CORE_BELOW = 18, 6
LOGITS_TOLERANCE, SAME_TOLERANCE = 1e-4, 1e-5
COLUMNS = (
    "transformers",
    "loads by",
    "parity: largest difference",
    "greedy ids",
    "batches",
    "pipeline",
    "beams",
    "warns",
)
PAGE = """\
# Releases of transformers

```bash
make compat   # some minutes: one environment after another
```

One folder, the authors' recorded checkpoint converted by `aligngpt convert`, in a fresh environment for each release,
with transformers alone and no network: loaded by every Auto class there is, its logits compared with the authors'
recorded ones (tolerance 1e-4), greedy ids, logits of mixed batches and of a level by hand, three beams and the
pipeline's texts with those of the newest release here, and what transformers warns of as deprecated (but for what it
does itself: 4.57's name `AutoModelForVision2Seq`, an argument that the pipeline of 5.18 and 5.19 passes on). Beams have
one image a prompt: with several, 4.57 is wrong by itself.

{table}
{problems}
{tested_with}.
"""


def promised_versions() -> list[str]:
    """Releases to try, oldest first, from the package index."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True)
    newest: dict[tuple[int, int], Version] = {}
    for version in map(Version, json.loads(result.stdout)["versions"]):
        minor = version.major, version.minor
        wanted = (
            minor == (4, 57) or (version.major == 5 and version.minor >= FIRST_MINOR) or version.major >= CORE_BELOW
        )
        if wanted and not version.is_prerelease and version > newest.get(minor, Version("0")):
            newest[minor] = version
    return [str(newest[minor]) for minor in sorted(newest)]


def save_model(folder: Path) -> tuple[Path, Path]:
    """The authors' recorded checkpoint, converted; and their prompts as inputs."""
    from aligngpt_hub.original.convert import convert_checkpoint
    from modeling_aligngpt import AlignGPTConfig

    saved = convert_checkpoint(GOLDEN / "checkpoint", folder / "saved")
    config = AlignGPTConfig.from_pretrained(saved)
    inputs = {}
    for name in sorted(file for file in TENSOR_FILES if file.startswith("infer_")):
        for key, value in our_batch(read(name), config).inputs().items():
            inputs[f"{name}.{key}"] = value.contiguous()
    save_file(inputs, folder / "reference.safetensors")
    return saved, folder / "reference.safetensors"


def install_torch(folder: Path) -> Path:
    """torch alone, at the tested version, which all environments share."""
    pin = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group()
    _run([sys.executable, "-m", "pip", "install", "--quiet", "--target", folder / "torch", pin])
    return folder / "torch"


def make_environment(folder: Path, version: str, torch_folder: Path, pillow: str) -> Path:
    """A virtual environment with one transformers and what it brings; returns its Python."""
    _run([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    (next(folder.glob("lib/python*")) / "site-packages" / "torch_of_all.pth").write_text(f"{torch_folder}\n")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", f"transformers=={version}"]
    _run([*command, pillow, "jinja2", "sentencepiece", "protobuf"])
    return python


def _run(command: list, **options) -> subprocess.CompletedProcess:
    result = subprocess.run(
        list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True, **options
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr[-3000:]}")
    return result


def probe(python: Path, saved: Path, reference: Path, output: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Report and tensors of `probe.py` in an environment without a network."""
    kept = ("PATH", "LANG", "TMPDIR", "HOME")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HF_HOME": str(output / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    output.mkdir(parents=True)
    _run([python, Path(__file__).with_name("probe.py"), saved, reference, output], cwd=output, env=environment)
    return json.loads((output / "report.json").read_text()), load_file(output / "tensors.safetensors")


def difference_to_the_authors(tensors: dict[str, torch.Tensor]) -> float:
    """Largest difference of a logit from the recorded ones, over all prompts."""
    largest = 0.0
    for name in (file for file in TENSOR_FILES if file.startswith("infer_")):
        theirs = read(name)
        rows, positions = theirs["logits_index"].T
        ours = tensors[f"parity.{name}.logits"][theirs["row_source"]][rows, positions][
            ..., : theirs["logits"].shape[-1]
        ]
        largest = max(largest, float((ours - theirs["logits"]).abs().max()))
    return largest


def compare(report: dict, tensors: dict, first_report: dict, first: dict) -> tuple[list[str], list[str]]:
    """A row of the table, and what is wrong with it."""
    wrong = [f"{name}: {text}" for name, text in report["failed"].items()]
    difference = difference_to_the_authors(tensors) if "answer" not in report["failed"] else float("nan")
    if not difference <= LOGITS_TOLERANCE:
        wrong.append(f"parity: logits differ from the authors' by {difference:.1e}")

    def same(part: str) -> bool:
        names = [name for name in first if re.search(part, name)]
        for name in names:
            limit = SAME_TOLERANCE if first[name].is_floating_point() else 0
            given = tensors.get(name)
            if given is None or given.shape != first[name].shape or (given - first[name]).abs().max() > limit:
                wrong.append(f"{name} is not that of transformers {first_report['transformers']}")
                return False
        return bool(names)

    cells = [same(r"^parity\..*\.greedy$"), same(r"^answers\.")]
    cells += [report.get("pipeline") == first_report.get("pipeline") and "pipeline" in report, same("^beams$")]
    if not cells[2] and "pipeline" not in report["failed"]:
        wrong.append("pipeline: other answers")
    wrong += [f"warns: {text}" for text in report["deprecations"]]
    marks = ["equal" if cell else "**other**" for cell in cells]
    loads = f"{len(report.get('auto_classes', []))} Auto classes" if "load" not in report["failed"] else "**fails**"
    row = [report["transformers"], loads, f"{difference:.1e}", *marks, str(len(report["deprecations"]))]
    return row, wrong


def page(rows: list[list[str]], problems: dict[str, list[str]]) -> str:
    commit = _run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]).stdout.strip()
    found = "".join(f"- {version}: {text}\n" for version, texts in problems.items() for text in texts)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows))
    tested_with = f"Python {sys.version.split()[0]}, torch {torch.__version__}, CPU; commit {commit}, {date.today()}"
    return PAGE.format(table=table, problems=f"\n{found}" if found else "", tested_with=tested_with)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--versions", nargs="+", help="default: all that are promised, from the index")
    parser.add_argument("--pillow", default="pillow", help="another release of pillow, such as pillow==10.0.0")
    parser.add_argument("--page", type=Path, help="write the page here")
    args = parser.parse_args()
    versions = args.versions or promised_versions()
    print(f"transformers {', '.join(versions)}", flush=True)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved, reference = save_model(folder)
        torch_folder = install_torch(folder)
        for version in versions:
            python = make_environment(folder / version, version, torch_folder, args.pillow)
            results[version] = probe(python, saved, reference, folder / "output" / version)
            print(f"  {version}: {results[version][0]['failed'] or 'ran'}", flush=True)
            shutil.rmtree(folder / version)
    inside = [version for version in versions if Version(version).major < CORE_BELOW]
    first_report, first = results[inside[-1]]
    rows, problems = [], {}
    for version, (report, tensors) in results.items():
        row, wrong = compare(report, tensors, first_report, first)
        rows.append(row)
        if wrong:
            problems[version] = wrong
    text = page(rows, problems)
    print(text)
    if args.page is not None:
        args.page.write_text(text)
    red = [version for version in problems if version in inside]
    print(f"{len(inside) - len(red)} passed, {len(red)} failed")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
