"""Runs every benchmark script in one process, small: `python run_scripts.py BENCHMARKS OUTPUT`."""

import importlib
import sys
from pathlib import Path


SMALL = ["--scale", "tiny", "--repeats", "2", "--warmup", "1"]
WORKS = ["prefill", "decode", "stage1", "stage2"]
SCRIPTS = {
    "overhead": [*SMALL, "--tokens", "2", "--text", "8", "--answer", "4", "--batch", "2", "--work", *WORKS],
    "loading": ["--scale", "tiny", "--repeats", "1", "--warmup", "0", "--contender", "remote", "llava"],
    "decoding": [*SMALL, "--tokens", "4", "--text", "8", "--batch", "2", "--backend", "eager"],
    "batching": ["--rows", "16", "--batch", "4", "--repeats", "1", "--warmup", "0", "--prompts", "9", "--tokens", "3"],
    "seven_billion": [*SMALL, "--tokens", "2", "--text", "8", "--batch", "2", "--turns", "1", "--peak-tflops", "0.1"],
    "scaling": ["--models", "7B"],
}


def main(benchmarks: str, output: str) -> None:
    sys.path.insert(0, benchmarks)
    for name, arguments in SCRIPTS.items():
        path = Path(output) / f"{name}.json"
        if name == "scaling":  # reads what the script before it has measured
            arguments = [*arguments, "--measured", str(Path(output) / "seven_billion.json")]
        print(f"## {name}", flush=True)
        importlib.import_module(name).main([*arguments, "--output", str(path)])


if __name__ == "__main__":
    main(*sys.argv[1:])
