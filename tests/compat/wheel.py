"""
`make wheel`: what a user gets. The built wheel (and the sdist) in a fresh environment outside the repository, nothing
pinned but torch, on the newest releases that its own bounds admit: first without extras, what the core promises; then
both stages and the rest of the quickstart, small; README's Python blocks on their outcome; `publish --dry-run`, `serve`
and `demo`.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path


ROOT = Path(__file__).parents[2]
QUICKSTART = ["--pairs", "96", "--conversations", "64", "--heldout", "16", "--max-steps", "3"]
SHOWN = ("transformers", "trl", "datasets", "accelerate", "peft", "gradio", "huggingface_hub", "pillow")


def run(command: list, cwd: Path, **variables: str) -> str:
    """Runs a command outside of the repository's reach; its output, which is printed when it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    kept.pop("PIP_CONSTRAINT", None)
    print(f"$ {' '.join(Path(str(word)).name if word is command[0] else str(word) for word in command)}", flush=True)
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "2", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        print(result.stdout[-6000:])
        raise SystemExit(f"failed with status {result.returncode}")
    return result.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist; setuptools has nothing to warn of."""
    said = run([sys.executable, "-m", "build", "--outdir", folder, ROOT], ROOT)
    warned = [line for line in said.splitlines() if "Warning" in line or "absent from the `packages`" in line]
    if warned:
        raise SystemExit("the build warns:\n" + "\n".join(warned))
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def make_environment(folder: Path) -> Path:
    """A fresh virtual environment with torch at the tested version; its bin folder."""
    run([sys.executable, "-m", "venv", folder], folder.parent)
    torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group()
    install(folder / "bin", torch)
    return folder / "bin"


def install(bin_folder: Path, *wanted: str | Path) -> None:
    """Installs what is wanted as pip finds it."""
    pip = [bin_folder / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, *wanted], bin_folder)


def python_blocks(text: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def answers_on(command: list, address: str, cwd: Path) -> None:
    """Starts a server and waits until it answers."""
    print(f"$ {command[0].name} {' '.join(map(str, command[1:]))}", flush=True)
    log = (cwd / "server.log").open("w")
    process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(120):
            if process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(address, timeout=5) as answer:
                    assert answer.status == 200
                return
            except OSError:
                time.sleep(1)
        raise SystemExit(f"{address} does not answer:\n{(cwd / 'server.log').read_text()[-4000:]}")
    finally:
        process.terminate()
        process.wait(timeout=30)


def use_the_core(bin_folder: Path, work: Path) -> None:
    """What needs no extra, where none is installed."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf")}
    aligngpt, golden = bin_folder / "aligngpt", ROOT / "tests" / "fixtures" / "golden"
    tower = ["--vision-tower", golden / "clip-vit-tiny"]
    run([aligngpt, "convert", "--checkpoint", golden / "checkpoint", *tower, "--output", "converted"], work, **offline)
    question = ["--image", golden / "images" / "img0.png", "--question", "what is it?"]
    print(run([aligngpt, "chat", *question], work, **offline).splitlines()[-1])
    run([aligngpt, "space", "space", "--model", "user/name", "--revision", "0" * 40], work, **offline)


def use_everything(bin_folder: Path, work: Path) -> None:
    """The documented way in an empty directory, with small sizes."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf")}
    aligngpt = bin_folder / "aligngpt"
    shown = run([bin_folder / "python", "-m", "aligngpt_playground", "quickstart", *QUICKSTART], work, **offline)
    print("\n".join(shown.splitlines()[-14:]))
    (work / "readme.py").write_text(python_blocks((ROOT / "README.md").read_text()))
    print(run([bin_folder / "python", "readme.py"], work, **offline))
    question = ["--image", "runs/quickstart/images/level-0.png", "--question", "what is the background?"]
    model = "runs/quickstart/instruct"
    print(run([aligngpt, "chat", "--model", model, *question], work, **offline))
    levels = ["--data", "runs/quickstart/data/conversations", "--limit", "4", "--output", "runs/levels"]
    run([aligngpt, "levels", "--model", model, *levels], work, **offline)
    run([aligngpt, "publish", model, "--repo-id", "user/name", "--dry-run"], work, **offline)
    recipes = run([aligngpt, "recipes"], work)
    assert "vicuna-7b" in recipes and "zero2" in recipes, recipes
    run([aligngpt, "recipes", "vicuna-7b", "--copy", "mine"], work)
    port = "18765"
    server = [aligngpt, "serve", "--model", model, "--port", port]
    answers_on(server, f"http://127.0.0.1:{port}/health", work)
    answers_on([aligngpt, "demo", "--model", model, "--port", port], f"http://127.0.0.1:{port}/", work)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, sdist = build(folder / "dist")
        work = folder / "empty"
        work.mkdir()
        bin_folder = make_environment(folder / "newest")
        install(bin_folder, wheel)
        use_the_core(bin_folder, work)
        install(bin_folder, f"{wheel}[train,demo,playground]")
        listed = run([bin_folder / "python", "-m", "pip", "list", "--format", "freeze"], folder).splitlines()
        print(" ".join(line for line in listed if line.partition("==")[0].replace("-", "_") in SHOWN), flush=True)
        run([bin_folder / "python", "-m", "pip", "check"], folder)
        use_everything(bin_folder, work)
        install(bin_folder, "--no-deps", "--force-reinstall", sdist)
        assert "vicuna-7b" in run([bin_folder / "aligngpt", "recipes"], work)
    print("1 passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
