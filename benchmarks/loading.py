"""
`from_pretrained` of AlignGPT beside LLaVA: time and memory of the same weights, each load in a process of its own.

    python benchmarks/loading.py                          # 60M weights
    python benchmarks/loading.py --scale 7b --dtype bfloat16 --repeats 3      # 14 GB on disk, twice
    python benchmarks/loading.py --device cuda --scale 1b --dtype bfloat16    # straight onto the GPU

What is measured and what came out: `loading.md`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from pairs import SCALES, make_pair


# run by a fresh interpreter: imports first, then the load alone is timed
LOAD = """
import json, os, resource, sys, threading, time
import torch, transformers
from transformers import AutoModelForImageTextToText
folder, name, device, ours, clock = sys.argv[1:]
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
kwargs = {"device_map": device} if device != "cpu" else {}
if name == "llava":
    from transformers import LlavaForConditionalGeneration as loader
elif name == "aligngpt":
    sys.path.insert(0, ours)
    from modeling_aligngpt import AlignGPTForConditionalGeneration as loader
else:
    loader, kwargs = AutoModelForImageTextToText, {**kwargs, "trust_remote_code": True}
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama

def anonymous():
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

def watch():
    while not done.is_set():
        seen[0] = max(seen[0], anonymous())
        done.wait(0.005)

if device != "cpu":
    torch.zeros(1, device=device)
seen, done = [0], threading.Event()
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
now = time.process_time if clock == "cpu" else time.perf_counter
begin = now()
model = loader.from_pretrained(folder, **kwargs)
if device != "cpu":
    torch.cuda.synchronize()
took = now() - begin
seen[0] = max(seen[0], anonymous())
done.set()
watcher.join()
total = sum(p.numel() * p.element_size() for p in model.parameters())
checksum = float(sum(p.detach().sum(dtype=torch.float64) for p in model.parameters()))  # every page is read here
print(json.dumps({
    "seconds": took, "host": seen[0] - before, "weights": total, "checksum": checksum,
    "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "gpu": torch.cuda.max_memory_allocated() if device != "cpu" else 0,
}))
"""
CONTENDERS = {"aligngpt": "AlignGPT, package installed", "remote": "AlignGPT, trust_remote_code", "llava": "LLaVA"}


def save_pair(folder: Path, scale: str, dtype: torch.dtype) -> None:
    model, llava = make_pair(scale, torch.device("cpu"), dtype)
    model.save_pretrained(folder / "aligngpt")
    llava.save_pretrained(folder / "llava")


def load(folder: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    saved = folder / ("llava" if name == "llava" else "aligngpt")
    package = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", LOAD, str(saved), name, args.device, package, args.clock]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder, check=False)
    if result.returncode:
        raise RuntimeError(f"loading {name} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scales = ["medium", *(name for name in SCALES if name != "medium")]
    common.add_arguments(parser, "loading", repeats=9, scales=scales)
    parser.add_argument("--contender", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--folder", type=Path, help="where the weights are written for the run; default: a temporary one"
    )
    args = parser.parse_args(argv)
    common.start(args)
    facts = common.machine(args)
    common.print_header(facts)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        save_pair(folder, args.scale, getattr(torch, args.dtype))
        loads: dict[str, list[dict[str, Any]]] = {name: [] for name in (*args.contender, "llava")}
        for number in range(-args.warmup, args.repeats):  # the first rounds bring the files into the page cache
            for name in loads if number % 2 == 0 else reversed(loads):
                record = load(folder, name, args)
                if number >= 0:
                    loads[name].append(record)
    report(loads, facts, args)


def report(loads: dict[str, list[dict[str, Any]]], facts: dict[str, Any], args: argparse.Namespace) -> None:
    seconds = common.Measured({name: [record["seconds"] for record in records] for name, records in loads.items()})
    checksums = {record["checksum"] for name, records in loads.items() if name != "llava" for record in records}
    assert len(checksums) <= 1, "the same folder gave different weights"
    rows, ratios = [], {}
    for name, records in loads.items():
        middle = {key: statistics.median(record[key] for record in records) for key in records[0]}
        against = {key: statistics.median(record[key] for record in loads["llava"]) for key in records[0]}
        ratios[name] = seconds.ratio(name, "llava")
        rows.append(
            [
                CONTENDERS[name],
                common.milliseconds(middle["seconds"]),
                "" if name == "llava" else common.spread(ratios[name]),
                common.megabytes(middle["weights"]),
                common.megabytes(middle["host"]),
                common.megabytes(middle["resident"]),
                "" if name == "llava" else f"{middle['resident'] / against['resident']:.3f}",
                common.megabytes(middle["gpu"]) if middle["gpu"] else "",
            ]
        )
    columns = [
        "contender",
        "ms (median)",
        "over LLaVA's (quartiles)",
        "weights MB",
        "anonymous MB at the peak",
        "resident MB at the peak, once read",
        "over LLaVA's",
        "GPU MB at the peak",
    ]
    common.print_table(columns, rows)
    content = {"machine": facts, "scale": args.scale, "dtype": args.dtype, "loads": loads, "ratios": ratios}
    common.write_json(args.output, content)


if __name__ == "__main__":
    main()
