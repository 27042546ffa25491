"""What the benchmarks share: contenders taking turns, peak memory, the machine, tables, JSON, and the model pairs."""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile


@dataclass
class Contender:
    """
    One way to do a piece of work.

    Args:
        run: the timed part; takes what `prepare` returned, if there is one.
        prepare: the part before it, untimed, at each repeat.
    """

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        return self.run() if self.prepare is None else self.run(self.prepare())


@dataclass
class Measured:
    """Seconds of each repeat, by contender, in the order of the rounds; and peak bytes where they were taken."""

    seconds: dict[str, list[float]]
    peak: dict[str, int] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> dict[str, float]:
        """Median and quartiles of `name` over `other`, round by round, so that a slow moment meets both."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]
        low, middle, high = quartiles(ratios)
        return {"median": middle, "low": low, "high": high}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def add_arguments(parser: argparse.ArgumentParser, name: str, repeats: int, scales: Sequence[str]) -> None:
    """The options that all scripts share."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda, default: %(default)s")
    parser.add_argument("--scale", choices=scales, default=scales[0], help="sizes of the models, default: %(default)s")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds, default: %(default)s")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before that count for nothing")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on a CPU, default: %(default)s")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="`cpu` counts this process's own time: for a machine that others use, and one thread",
    )
    parser.add_argument("--output", type=Path, default=Path(f"{name}.json"), help="JSON, default: %(default)s")


def start(args: argparse.Namespace) -> torch.device:
    """Prepares torch for a measurement and returns the device."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch sees no GPU here.")
    if args.clock == "cpu" and (args.device != "cpu" or args.threads != 1):
        raise SystemExit("--clock cpu tells the time of one thread on a CPU: leave --device and --threads alone.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch.device(args.device)


def now(device: torch.device, clock: str = "wall") -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if clock == "cpu" else time.perf_counter()


@contextmanager
def collected():
    """Garbage collected before, and none during: a collection would hit whoever is on."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleave(
    contenders: dict[str, Contender], device: torch.device, repeats: int, warmup: int = 2, clock: str = "wall"
) -> Measured:
    """Times contenders in turns, every second round in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warmup, repeats):
        for name in contenders if number % 2 == 0 else reversed(contenders):
            contender = contenders[name]
            prepared = () if contender.prepare is None else (contender.prepare(),)
            with collected():
                begin = now(device, clock)
                contender.run(*prepared)
                took = now(device, clock) - begin
            del prepared
            if number >= 0:
                seconds[name].append(took)
    return Measured(seconds)


def peak_bytes(contender: Contender, device: torch.device) -> int:
    """
    Most bytes that a run, `prepare` included, holds on the device beyond what was held before. On a CPU torch's own
    allocations are added up from its profile, so that the figure repeats to the byte.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _no_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        contender()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _no_stderr():
    """torch's profiler writes a line at each start and stop, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions, command, commit and date."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": git.stdout.strip() or None,
        "date": date.today().isoformat(),
    }


def print_header(facts: dict[str, Any]) -> None:
    where = facts["gpu"] or f"{facts['cores']} cores of {facts['cpu']}, load {facts['load'] or 0:.1f}"
    print(f"{where}; torch {facts['torch']}, transformers {facts['transformers']}")
    print(f"{facts['command']}; commit {facts['commit']}, {facts['date']}\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table, as the pages have it."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()


def write_json(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
    print(f"Figures in {path}.")


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}" if seconds < 1 else f"{1000 * seconds:.0f}"


def megabytes(count: float) -> str:
    return f"{count / 2**20:.1f}"


def spread(ratio: dict[str, float]) -> str:
    """`0.998 (0.991 to 1.003)`: median and quartiles."""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
