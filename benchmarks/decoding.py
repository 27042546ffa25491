"""
Decoding with a static cache and `torch.compile(fullgraph=True)` beside the dynamic cache, AlignGPT and LLaVA.

    python benchmarks/decoding.py                                 # 5M weights, one core
    python benchmarks/decoding.py --device cuda --scale 1b --dtype bfloat16
    python benchmarks/decoding.py --backend aot_eager             # where there is no C++ compiler

The compiled step is `generate`'s own (`cache_implementation="static"`): transformers compiles the decode step with
`fullgraph=True`, so that a break in the graph, at `<align>` or anywhere, would be an error. `decoding.md` has figures.
"""

import argparse
import time
from typing import Any

import common
import torch
from common import Contender
from pairs import SCALES, make_pair, make_rows
from transformers.generation import CompileConfig


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser, "decoding", repeats=7, scales=["small", *(name for name in SCALES if name != "small")])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--backend", default="inductor", help="of torch.compile, default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--text", type=int, default=62, help="words of a prompt, default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer, default: %(default)s")
    args = parser.parse_args(argv)
    device, dtype = common.start(args), getattr(torch, args.dtype)
    facts = common.machine(args)
    common.print_header(facts)
    records = {batch: measure(batch, args, device, dtype) for batch in args.batch}
    rows = []
    for batch, record in records.items():
        for name, seconds in record["seconds"].items():
            middle = common.quartiles(seconds)[1]
            rows.append(
                [
                    batch,
                    name,
                    f"{1000 * middle / args.tokens:.2f}",
                    f"{batch * args.tokens / middle:.0f}",
                    common.spread(record["ratios"][name]) if name in record["ratios"] else "",
                    f"{record['compile_seconds'][name]:.0f}" if name in record["compile_seconds"] else "",
                ]
            )
    columns = [
        "batch",
        "contender",
        "ms a step",
        "tokens/s",
        "over AlignGPT's dynamic cache (quartiles)",
        "s to compile",
    ]
    common.print_table(columns, rows)
    common.write_json(args.output, {"machine": facts, "scale": args.scale, "dtype": args.dtype, "batches": records})


def measure(batch: int, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    torch.compiler.reset()
    model, llava = make_pair(args.scale, device, dtype)
    rows = make_rows(model.config, batch, args.text, 1, device, dtype)
    search = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
    # one graph for the shapes of a step; `reduce-overhead`, CUDA graphs, is transformers' own choice on a GPU
    options = {"mode": "reduce-overhead"} if args.backend == "inductor" and device.type == "cuda" else {}
    compiled = CompileConfig(fullgraph=True, dynamic=False, backend=args.backend, **options)
    compiled._compile_all_devices = True
    static: dict[str, Any] = {"cache_implementation": "static"}
    calls = {
        "AlignGPT, dynamic cache": lambda: model.generate(**rows.ours, **search),
        "AlignGPT, static cache": lambda: model.generate(**rows.ours, **search, **static, disable_compile=True),
        "AlignGPT, static cache, compiled": lambda: model.generate(
            **rows.ours, **search, **static, compile_config=compiled
        ),
        "LLaVA, dynamic cache": lambda: llava.generate(**rows.llava, **search),
        "LLaVA, static cache, compiled": lambda: llava.generate(
            **rows.llava, **search, **static, compile_config=compiled
        ),
    }
    compile_seconds, answers = {}, {}
    for name, call in calls.items():
        begin = time.perf_counter()
        answers[name] = call()
        if "compiled" in name:
            compile_seconds[name] = time.perf_counter() - begin
    measured = common.interleave(
        {name: Contender(call) for name, call in calls.items()}, device, args.repeats, args.warmup, args.clock
    )
    first = next(iter(calls))
    # random weights in half precision have ties: only exact arithmetic must agree
    names = [name for name in calls if name.startswith("AlignGPT")]
    same = all(torch.equal(answers[name], answers[first]) for name in names)
    if dtype == torch.float32 and not same:
        raise SystemExit("The static cache or the compiled step gave other tokens than the dynamic cache.")
    ratios = {name: measured.ratio(name, first) for name in calls if name != first}
    return {"seconds": measured.seconds, "ratios": ratios, "compile_seconds": compile_seconds, "same_tokens": same}


if __name__ == "__main__":
    main()
