"""Scoring: its rate beside the bare model, its growth with the number of pairs, and the cut of very many scores.

    python benchmarks/scoring.py                       # all three parts, about 20 minutes on two cores
    python benchmarks/scoring.py --device cuda --pairs 16384 --batch-size 256
    python benchmarks/scoring.py --part growth --sizes 1000 4000 16000

Prints tables and writes `scoring.json`. What is measured and how: `scoring.md`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


PARTS = ("ratio", "growth", "binning")
WORDS = ("a", "the", "red", "blue", "small", "large", "dog", "kite", "boat", "house", "on", "under", "near", "field")


def main():
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="scoring.json", help="where the figures go")
    parser.add_argument("--scorer", help="ratio: folder or Hub id; by default the size of ViT-B/32, random weights")
    parser.add_argument("--pairs", type=int, default=768, help="ratio: pairs of one measurement")
    parser.add_argument("--batch-size", type=int, default=64, help="ratio: pairs encoded at once")
    parser.add_argument("--repeats", type=int, default=4, help="ratio: measurements of either contender")
    parser.add_argument(
        "--threads", type=int, help="ratio: threads of the model; by default 1 on a CPU, the other cores decode"
    )
    parser.add_argument("--workers", type=int, help="ratio: processes that decode; by default one for each core left")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000, 100_000], help="growth")
    parser.add_argument("--scores", type=int, default=100_000_000, help="binning: simulated scores")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": describe_machine(args.device), "command": " ".join(sys.argv)}
    for part in args.part:
        result[part] = globals()[f"measure_{part}"](args)
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nFigures in {args.output}.")


def describe_machine(device: str) -> dict[str, Any]:
    """Hardware, versions, commit and date."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
        "date": date.today().isoformat(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_own_process(function: Any, *args: Any) -> Any:
    """The result of a function in a fresh process, so that memory and caches are its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def write_images(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """JPEG files of soft noise with some detail: about as many bytes as a photograph of that size."""
    random = np.random.default_rng(0)
    folder.mkdir()
    names = []
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = random.normal(0, 6, (size[1], size[0], 3))
        image = Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))
        image.save(folder / f"{i}.jpg", quality=88)
        names.append(f"{folder.name}/{i}.jpg")
    return names


def write_pairs(path: Path, images: list[str], count: int):
    """A JSONL file of pairs; images are used again where there are fewer of them."""
    random = np.random.default_rng(1)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            caption = " ".join(random.choice(WORDS, int(random.integers(6, 16))))
            record = {"id": str(i), "image": images[i % len(images)], "caption": f"{caption} {i}"}
            file.write(json.dumps(record) + "\n")


def save_scorer(folder: Path) -> str:
    """A CLIP of the size of ViT-B/32 with random weights and a tokenizer of single letters."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [*letters, *(letter + "</w>" for letter in letters), *(word + "</w>" for word in WORDS)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    tokenizer = CLIPTokenizer(vocab=ids, merges=[], model_max_length=77)
    config = CLIPConfig()  # the defaults are ViT-B/32
    for name in ("eos", "bos", "pad"):
        setattr(config.text_config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure_ratio(args: argparse.Namespace) -> dict[str, Any]:
    """Pairs per second of scoring from JPEG files and of the bare model on tensors in memory, in turn."""
    threads = args.threads or (1 if args.device == "cpu" else torch.get_num_threads())
    cores = usable_cores()
    workers = (
        args.workers if args.workers is not None else max(1, min(16, cores - (threads if args.device == "cpu" else 1)))
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images", min(args.pairs, 1024), (640, 480))
        write_pairs(folder / "pairs.jsonl", images, args.pairs)
        scorer = args.scorer or save_scorer(folder / "scorer")
        settings = {
            "dataset": str(folder / "pairs.jsonl"),
            "scorer": scorer,
            "output": str(folder / "out"),
            "device": args.device,
            "batch_size": args.batch_size,
            "num_workers": workers,
        }
        kilobytes = sum(path.stat().st_size for path in (folder / "images").iterdir()) / len(images) / 1000
        found = in_own_process(_time_ratio, settings, threads, args.repeats)
    bare, scored = (statistics.median(found[key]) for key in ("bare", "scoring"))
    ratios = [b / s for b, s in zip(found["bare"], found["scoring"], strict=True)]
    result = {
        **found,
        "pairs": args.pairs,
        "batch_size": args.batch_size,
        "threads": threads,
        "workers": workers,
        "kilobytes_per_image": kilobytes,
        "bare_pairs_per_second": args.pairs / bare,
        "scoring_pairs_per_second": args.pairs / scored,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    print(
        f"\n{args.pairs} pairs, batches of {args.batch_size}, {threads} thread(s), {workers} worker(s), {args.device}"
    )
    print("| | pairs/s (median) | seconds, lowest to highest | own CPU seconds (median) | memory, MB |")
    print("|---|---|---|---|---|")
    for title, key, rate in (("bare model", "bare", bare), ("scoring", "scoring", scored)):
        spread = f"{min(found[key]):.2f} to {max(found[key]):.2f}"
        own = statistics.median(found["own_cpu_seconds"][key])
        print(f"| {title} | {args.pairs / rate:.1f} | {spread} | {own:.2f} | {found['memory'][key]:.0f} |")
    print(f"| ratio | **{result['ratio']:.3f}** | {min(ratios):.3f} to {max(ratios):.3f} | | |")
    print(f"decoding and preparing alone: {found['prepare_seconds_per_pair'] * 1000:.1f} ms a pair on one core")
    return result


def _time_ratio(settings: dict[str, Any], threads: int, repeats: int) -> dict[str, Any]:
    import shutil

    from aligngpt_trainers.data.load import read_rows
    from aligngpt_trainers.scoring.config import ScoreConfig
    from aligngpt_trainers.scoring.processes import Processes
    from aligngpt_trainers.scoring.scorer import PairScorer
    from aligngpt_trainers.scoring.shards import score_blocks
    from aligngpt_trainers.scoring.source import Batches, WholeSource

    torch.set_num_threads(threads)
    config = ScoreConfig(**settings)
    scorer = PairScorer(config.scorer, device=config.device)
    source = WholeSource(*read_rows(config.dataset), config.shard_size)
    batches = Batches(source, scorer.preprocess, scorer.dtype)
    start = time.perf_counter()
    prepared = [batches[span]["inputs"][:2] for span in source.spans(set(), config.batch_size, 0, 1)]
    prepare = (time.perf_counter() - start) / source.total
    prepared = [
        {name: value.to(scorer.device) for part in inputs for name, value in part.items()} for inputs in prepared
    ]
    cuda = scorer.device.type == "cuda"

    @torch.inference_mode()
    def bare():
        for inputs in prepared:
            scorer.model(**inputs).logits_per_image.diagonal()

    def scoring():
        folder = Path(settings["output"])
        folder.mkdir()
        score_blocks(source, scorer, config, Processes(config.device), folder, set())
        shutil.rmtree(folder)

    seconds: dict[str, list[float]] = {"bare": [], "scoring": []}
    own: dict[str, list[float]] = {"bare": [], "scoring": []}
    memory: dict[str, float] = {}
    for repeat in range(repeats + 1):  # the first warms up
        for name, run in (("bare", bare), ("scoring", scoring)):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start, used = time.perf_counter(), time.process_time()
            with Watch() as watch:
                run()
                if cuda:
                    torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
                own[name].append(time.process_time() - used)
                memory[name] = torch.cuda.max_memory_allocated() / 1e6 if cuda else watch.peak
    return {**seconds, "own_cpu_seconds": own, "memory": memory, "prepare_seconds_per_pair": prepare}


class Watch:
    """Samples this process's own (anonymous) resident memory, and its children's, while a block runs.

    Attributes:
        samples: MB of the process, ten a second.
        peak: their highest.
        children: highest sum of the children's, MB.
    """

    def __enter__(self):
        import psutil

        self.samples, self.children = [anonymous_memory("self")], 0.0
        self._stop, me = threading.Event(), psutil.Process()

        def look():
            while not self._stop.wait(0.1):
                self.samples.append(anonymous_memory("self"))
                self.children = max(self.children, sum(anonymous_memory(child.pid) for child in me.children()))

        self._thread = threading.Thread(target=look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any):
        self._stop.set()
        self._thread.join()
        self.samples.append(anonymous_memory("self"))

    @property
    def peak(self) -> float:
        return max(self.samples)


def anonymous_memory(process: int | str) -> float:
    """MB of memory that is the process's own; files that the system maps and can drop are not counted."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon")), 0.0)


def measure_growth(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of the whole command for rising numbers of pairs, with a straight line fitted."""
    import aligngpt_playground

    scorer = Path(aligngpt_playground.__file__).parent / "parts" / "clip"
    result: dict[str, Any] = {"scorer": "the playground's CLIP"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images", 500, (96, 72))
        for streaming in (False, True):
            rows = []
            for size in sorted(args.sizes):
                write_pairs(folder / "pairs.jsonl", images, size)
                settings = {
                    "dataset": str(folder / "pairs.jsonl"),
                    "scorer": str(scorer),
                    "output": str(folder / f"out-{streaming}-{size}"),
                    "device": args.device,
                    "streaming": streaming,
                }
                rows.append({"pairs": size, **in_own_process(_time_growth, settings)})
            result["streaming" if streaming else "whole"] = {"runs": rows, **_fit(rows)}
            _print_growth(
                "streaming: true" if streaming else "a data set as a whole",
                result["streaming" if streaming else "whole"],
            )
    return result


def _time_growth(settings: dict[str, Any]) -> dict[str, float]:
    from aligngpt_trainers.scoring import run as scoring
    from aligngpt_trainers.scoring.config import ScoreConfig

    score_blocks, moments = scoring.score_blocks, {}

    def timed(*args):
        start = time.perf_counter()
        with Watch() as watch:
            score_blocks(*args)
        settled = watch.samples[len(watch.samples) // 4 :] if len(watch.samples) > 8 else watch.samples
        moments.update(
            scoring_seconds=time.perf_counter() - start,
            scoring_memory_first=settled[0],
            scoring_memory_last=settled[-2] if len(settled) > 1 else settled[-1],
            scoring_memory_peak=watch.peak,
            workers_memory_peak=watch.children,
        )

    scoring.score_blocks = timed
    start = time.perf_counter()
    with Watch() as watch:
        scoring.score_dataset(ScoreConfig(**settings))
    return {"seconds": time.perf_counter() - start, **moments, "memory_peak": watch.peak}


def _fit(rows: list[dict[str, float]]) -> dict[str, float]:
    """Least squares of seconds over pairs, weighted so that each size counts by its relative error."""
    pairs, seconds = (np.array([row[key] for row in rows]) for key in ("pairs", "scoring_seconds"))
    if len(rows) < 2:
        return {}
    slope, start = np.polyfit(pairs, seconds, 1, w=1 / seconds)
    fitted = start + slope * pairs
    last, first = rows[-1], rows[0]
    return {
        "seconds_to_start": float(start),
        "pairs_per_second": float(1 / slope),
        "r_squared": float(1 - ((seconds - fitted) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()),
        "largest_deviation": float(np.max(np.abs(fitted / seconds - 1))),
        "memory_bytes_per_pair": (last["memory_peak"] - first["memory_peak"]) * 1e6 / (last["pairs"] - first["pairs"]),
    }


def _print_growth(title: str, found: dict[str, Any]):
    print(f"\n{title}")
    print(
        "| pairs | scoring, s | pairs/s | whole command, s | MB while scoring: settled, end, peak | peak of all, MB |"
    )
    print("|---|---|---|---|---|---|")
    for row in found["runs"]:
        memory = ", ".join(f"{row[f'scoring_memory_{name}']:.0f}" for name in ("first", "last", "peak"))
        rate = row["pairs"] / row["scoring_seconds"]
        print(
            f"| {row['pairs']:,} | {row['scoring_seconds']:.1f} | {rate:.0f} | {row['seconds']:.1f} | {memory} | "
            f"{row['memory_peak']:.0f} |"
        )
    if "r_squared" in found:
        print(
            f"fit: {found['seconds_to_start']:.2f} s + pairs / {found['pairs_per_second']:.0f} a second, R2 "
            f"{found['r_squared']:.5f}, largest deviation {found['largest_deviation']:.1%}; "
            f"{found['memory_bytes_per_pair']:.0f} bytes of memory a pair"
        )


def measure_binning(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of cutting simulated scores into 8 levels."""
    result = {"scores": args.scores}
    print(f"\n{args.scores:,} scores into 8 levels")
    print("| method | seconds | memory of the scores, MB | highest while cutting, MB |\n|---|---|---|---|")
    for method in ("uniform", "quantile", "edges"):
        found = result[method] = in_own_process(_time_binning, method, args.scores)
        print(f"| {method} | {found['seconds']:.1f} | {found['scores']:.0f} | {found['peak']:.0f} |")
    return result


def _time_binning(method: str, count: int) -> dict[str, float]:
    from aligngpt_trainers.scoring.levels import cut_levels

    before = anonymous_memory("self")
    random = np.random.default_rng(0)
    scores = random.standard_normal(count, dtype=np.float32)
    scores *= 0.05
    scores += 0.25
    held = anonymous_memory("self") - before
    edges = [0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5] if method == "edges" else None
    start = time.perf_counter()
    with Watch() as watch:
        _, _, counts = cut_levels(scores, 8, method, edges)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "scores": held, "peak": watch.peak - before, "counts": counts.tolist()}


if __name__ == "__main__":
    main()
