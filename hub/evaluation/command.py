"""`aligngpt evaluate`: one's own questions, or the paper's benchmarks by lmms-eval with LLaVA-1.5's prompts."""

import argparse
import importlib.util
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

from aligngpt_shared.locks import lock, lock_of


INSTALL = 'pip install ".[eval]" && pip install --no-deps lmms-eval==0.7.3, in a checkout'


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--model", help="an AlignGPT: folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--tasks", default="paper", help="paper (the twelve), or names with commas (default: paper)")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and leave")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N samples of each benchmark")
    parser.add_argument("--output", type=Path, help="folder of the results (default: runs/evaluate/MODEL)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="prompts answered at once (default: 1, of a server 32)"
    )
    parser.add_argument(
        "--backend",
        choices=("transformers", "vllm"),
        default="transformers",
        help="vllm: vLLM's server, started for the while (default: %(default)s)",
    )
    parser.add_argument(
        "--server", metavar="URL", help="a server that runs (aligngpt serve, vLLM), up to /v1, in place of a backend"
    )
    parser.add_argument("--server-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with its key")
    parser.add_argument(
        "--vllm-python", default=sys.executable, metavar="PATH", help="Python of the environment that has vLLM"
    )
    parser.add_argument("--vllm-options", default="", help="further options of vLLM's server, as in a shell")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU where there is one)")
    parser.add_argument("--attn-implementation", help="attention, such as sdpa or flash_attention_2")
    parser.add_argument("--align-level", type=int, metavar="K", help="steer every answer to one level (0-based)")
    parser.add_argument("--align-mode", help="alignment vector in place of the model's own, such as global")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FILE",
        help="your own questions, as for training; TASK=FOLDER: a benchmark's data from there, may be repeated",
    )
    parser.set_defaults(load_rows=None)
    parser.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible server of the judge, up to /v1")
    parser.add_argument("--judge-model", metavar="NAME", help="name of the judge there, such as gpt-4-0613")
    parser.add_argument(
        "--judge-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with its key (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of going on")


def run(args: argparse.Namespace) -> int:
    """`aligngpt evaluate`."""
    from .tasks import BENCHMARKS, select

    if args.list:
        for benchmark in BENCHMARKS:
            paper = [f"{value:g}" if value is not None else "-" for value in (benchmark.paper_7b, benchmark.paper_13b)]
            print(f"{benchmark.task:<18}{benchmark.title:<15}paper 7B {paper[0]:<8}13B {paper[1]:<8}{benchmark.note}")
        return 0
    if args.model is None and args.server is None:
        raise ValueError("--model is missing: give an AlignGPT, folder or Hub id.")
    _check_server(args)
    benchmarks = select(args.tasks)
    own = [each for each in args.data if "=" not in each]
    for name in ("limit", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if own:
        if len(args.data) > 1 or args.server or args.backend != "transformers":
            raise ValueError(f"--data {own[0]}: your own questions are asked alone, and by the model here.")
        from .own_rows import evaluate_rows

        return evaluate_rows(args, own[0])
    data = _read_data(args.data, {benchmark.task for benchmark in benchmarks})
    judge = _judge(args)
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError(f"lmms-eval is missing, by which benchmarks are run: {INSTALL}")
    # lmms-eval looks for a tokenizer server and telemetry nowhere; its log would bury the progress
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet()
    from .runner import run_benchmarks

    with _answering(args) as lm:
        output = args.output or Path("runs/evaluate") / lm.identity["model"].replace("/", "--")
        return _run(args, lm, benchmarks, output, data, judge, run_benchmarks)


def _run(args, lm, benchmarks, output: Path, data, judge, run_benchmarks) -> int:
    with lock(lock_of(output)) if lm.rank == 0 else nullcontext():
        results = run_benchmarks(
            lm,
            benchmarks,
            output,
            limit=args.limit,
            data=data,
            judge=judge,
            seed=args.seed,
            overwrite=args.overwrite,
        )
    if lm.rank == 0 and results.content["results"]:
        print(results.describe())
        print(f"written to {results.path}")
    return 0


@contextmanager
def _answering(args: argparse.Namespace):
    """Who answers: the model here, or a server."""
    if args.backend == "transformers" and args.server is None:
        from .lmms_model import AlignGPTLmms

        yield AlignGPTLmms(
            args.model,
            revision=args.revision,
            dtype=args.dtype,
            device=args.device,
            batch_size=args.batch_size or 1,
            align_level=args.align_level,
            align_mode=args.align_mode,
            attn_implementation=args.attn_implementation,
        )
        return
    from .server_model import ServerLmms, vllm_server

    asked = {"align_level": args.align_level, "batch_size": args.batch_size or 32, "key_env": args.server_key_env}
    if args.server is not None:
        yield ServerLmms(args.server, args.model, **asked)
        return
    words = ["--model", args.model, "--dtype", args.dtype]
    words += ["--revision", args.revision] if args.revision else []
    words += [f"--vllm-options={args.vllm_options}"] if args.vllm_options else []
    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model.replace("/", "--")
    log = (args.output or Path("runs/evaluate") / name) / "evaluation" / "vllm.log"
    with vllm_server(args.vllm_python, words, log) as url:
        yield ServerLmms(url, args.model, **asked)


def _check_server(args: argparse.Namespace) -> None:
    """Raises a ValueError for options that a server cannot take."""
    if args.server is None and args.backend == "transformers":
        return
    if args.server is not None and args.backend != "transformers":
        raise ValueError("--server and --backend vllm exclude each other: a server that runs, or one that is started.")
    where = "--server" if args.server is not None else "--backend vllm"
    here_alone = {"--device": args.device, "--align-mode": args.align_mode}
    here_alone["--attn-implementation"] = args.attn_implementation
    if args.server is not None:
        here_alone |= {"--dtype": None if args.dtype == "auto" else args.dtype, "--revision": args.revision}
    for name, value in here_alone.items():
        if value is not None:
            raise ValueError(f"{name} has no effect with {where}: the server decides it. Leave it out.")


def _read_data(pairs: list[str], tasks: set[str]) -> dict[str, str]:
    data = {}
    for pair in pairs:
        task, _, folder = pair.partition("=")
        if not folder or task not in tasks:
            raise ValueError(f"--data {pair}: write TASK=FOLDER with one of the tasks that run ({', '.join(tasks)}).")
        if not Path(folder).is_dir():
            raise ValueError(f"--data {pair}: there is no such folder.")
        data[task] = folder
    return data


def _judge(args: argparse.Namespace):
    from .judge import JudgeServer

    if (args.judge_url is None) != (args.judge_model is None):
        raise ValueError("--judge-url and --judge-model belong together: give both or neither.")
    if args.judge_url is None:
        return None
    return JudgeServer(args.judge_url, args.judge_model, os.environ.get(args.judge_key_env, ""))


def _quiet():
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
