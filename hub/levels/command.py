"""
`aligngpt levels`: what the alignment levels do in a model, as HTML and JSON.

Rows with questions tell how the gate mixes the levels, by type of question; rows with images are captioned at every
level, and each measure of the captions is tested for a trend over the levels.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aligngpt_shared.files import write_json
from aligngpt_shared.locks import lock, lock_of


RESULTS_NAME, REPORT_NAME = "levels.json", "levels.html"


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--model", help="an AlignGPT: folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[NAME=]SOURCE",
        help="rows with questions or images: a file in any of training's layouts, a folder or Hub id of rows with "
        "messages and images, or image; may be repeated",
    )
    parser.add_argument("--image-folder", help="what relative image paths of a file start from (default: its folder)")
    # the reader of training's files, from the command line, which knows both packages
    parser.set_defaults(load_rows=None)
    parser.add_argument("--split", help="split of the data (default: heldout, test, validation or train)")
    parser.add_argument(
        "--answers",
        action="append",
        default=[],
        metavar="FILE",
        help="answers that `aligngpt evaluate` kept (answers-TASK.jsonl): their gate weights, by benchmark",
    )
    parser.add_argument("--captions", action="store_true", help="caption the images of rows with questions too")
    parser.add_argument("--scorer", help="CLIP or SigLIP model for CLIP score and self-retrieval: folder or Hub id")
    parser.add_argument(
        "--correct", metavar="MODULE:FUNCTION", help="`(caption, row) -> {name: bool}`: what is right in a caption"
    )
    parser.add_argument(
        "--before", metavar="STAGE1", help="folder of the model before stage 2, where the model's folder does not tell"
    )
    parser.add_argument(
        "--steering", type=int, default=64, metavar="N", help="questions answered at every level (default: 64; 0: none)"
    )
    parser.add_argument("--prompt", default="Describe the image concisely.", help="asked for captions after stage 2")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest caption (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each data set")
    parser.add_argument("--examples", type=int, default=4, help="images shown with all captions (default: 4)")
    parser.add_argument("--output", type=Path, default=Path("runs/levels"), help="folder to write (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", help="cpu, cuda (default: the GPU where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of the permutation tests")


def run(args: argparse.Namespace) -> int:
    """`aligngpt levels`."""
    if not args.data and not args.answers:
        raise ValueError("--data is missing: give rows with questions or images, or --answers of an evaluation.")
    if args.data and args.model is None:
        raise ValueError("--model is missing: give an AlignGPT, folder or Hub id.")
    for name in ("limit", "batch_size", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if args.steering < 0:
        raise ValueError(f"--steering is {args.steering}; it must be at least 0.")
    correct = _function(args.correct)
    from .report import write_report

    with lock(lock_of(args.output)):
        results = probe(args, correct)
        images = results.pop("images")
        write_report(args.output / REPORT_NAME, results, images)
        write_json(args.output / RESULTS_NAME, results)
    print(describe(results))
    print(f"Report: {args.output / REPORT_NAME}   figures: {args.output / RESULTS_NAME}")
    return 0


def _function(name: str | None) -> Callable | None:
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--correct {name}: write MODULE:FUNCTION of something installed ({error}).") from error


def probe(args: argparse.Namespace, correct: Callable | None) -> dict[str, Any]:
    """Everything that the report shows: `gate` and `captions` (each None without data for it), and the `images`."""
    from . import statistics
    from .probe import LevelProbe, read_answers
    from .truth import compare_gates, gates_to_compare, steering

    weights: list[list[float]] = []
    groups: list[str] = []
    numbers: list[int] = []  # of images; what comes from answers counts as one
    for path in args.answers:
        found, names = read_answers(path)
        weights += found
        groups += names
        numbers += [0] * len(names)
    names_of_parts = ("model", "align_mode", "num_align_levels", "gate", "gates", "steering", "captions")
    results: dict[str, Any] = dict.fromkeys(names_of_parts)
    others: list[Any] = []
    has_before = False
    images: list = []
    if args.data:
        loaded = LevelProbe(args.model, args.revision, args.dtype, args.device, args.batch_size)
        results |= {
            "model": Path(args.model).resolve().name if Path(args.model).is_dir() else args.model,
            "revision": getattr(loaded.model.config, "_commit_hash", None),
            "training_stage": loaded.model.config.training_stage,
            "align_mode": loaded.model.config.align_mode,
            "num_align_levels": loaded.num_align_levels,
        }
        rows, questions = _read_data(args, loaded.is_pretrained_only)
        if questions and loaded.model.config.uses_gate:
            has_before, gates = gates_to_compare(loaded, args.before, args.model, args.seed)
            asked = [(text, shown) for _, text, shown, *_ in questions]
            found, others = loaded.gate_weights(asked, [] if args.answers else gates)
            weights += found
            groups += [group for *_, group, _ in questions]
            numbers += [number for number, *_ in questions]
        if chosen := _spread(questions, args.steering):
            asked = [(text, shown, answer) for _, text, shown, _, answer in chosen]
            results["steering"] = steering(loaded, asked, args.max_new_tokens)
        if rows:
            results["captions"], images = _probe_captions(args, loaded, rows, correct)
    if weights:
        if len({len(row) for row in weights}) > 1:
            raise ValueError("The gate weights are of models with different numbers of levels: report them apart.")
        results["gate"] = statistics.by_group(weights, groups, numbers, args.seed)
        results["gates"] = compare_gates(results["gate"]["share"], others, groups, has_before)
        results["num_align_levels"] = results["num_align_levels"] or len(weights[0]) + 1
    if not weights and results["captions"] is None and results["steering"] is None:
        raise ValueError("The data holds neither a question about an image nor an image.")
    return {**results, "seed": args.seed, "images": images}


def _spread(items: list, number: int) -> list:
    """At most `number` of the items, evenly spread."""
    if len(items) <= number:
        return items
    return [items[i * len(items) // number] for i in range(number)]


def _read_data(args: argparse.Namespace, captions_only: bool) -> tuple[list[dict], list[tuple]]:
    """Rows to caption, and questions: (number of the image, question, images, group, answer if known)."""
    from .probe import image_of, load_split, questions_of

    rows: list[dict] = []
    questions: list[tuple] = []
    number = 0
    for each in args.data:
        name, source = _named(each)
        if args.load_rows is not None and Path(source).is_file():
            found = args.load_rows(source, image_folder=args.image_folder)
        else:
            found = load_split(source, args.split)
        for row in found.select(range(min(args.limit or len(found), len(found)))):
            number += 1
            asked = [] if captions_only or not row.get("messages") else list(questions_of(row, name))
            questions += [(number, *question) for question in asked]
            if image_of(row) is not None and (args.captions or not asked):
                rows.append(row)
    return rows, questions


def _probe_captions(args: argparse.Namespace, loaded, rows: list[dict], correct: Callable | None) -> tuple[dict, list]:
    from . import statistics
    from .probe import DualEncoder, caption_measures, image_of

    images = [loaded.processor.read_image(image_of(row), allow_urls=False) for row in rows]
    captions = loaded.captions(images, args.prompt, args.max_new_tokens)
    encoder = DualEncoder(args.scorer, args.device) if args.scorer else None
    measures = caption_measures(captions, images, rows, encoder, correct)
    trends = [{"name": name, **statistics.trend(values, args.seed)} for name, values in measures.items()]
    return {
        "number": len(rows),
        "prompt": None if loaded.is_pretrained_only else args.prompt,
        "scorer": args.scorer and Path(args.scorer).name,
        "measures": trends,
        "examples": [{"by_level": texts} for texts in captions[: args.examples]],
    }, images[: args.examples]


def _named(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    return (name, source) if equals else (Path(text).name, text)


def describe(results: dict[str, Any]) -> str:
    """The figures for the terminal."""
    from . import statistics

    lines = []
    if gate := results["gate"]:
        levels = range(len(gate["all"]["mean"]))
        lines.append(f"{'gate weights':<20}{'number':>8}  " + "".join(f"{level:>14}" for level in levels))
        for row in [*gate["groups"], gate["all"]]:
            cells = [f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(row["mean"], row["spread"], strict=True)]
            lines.append(f"{row['name'][:19]:<20}{row['number']:>8}  " + "".join(f"{cell:>14}" for cell in cells))
        if gate["share"] is not None:
            lines.append(f"Between the groups lies {gate['share']:.1%} of the weights' variance (p = {gate['p']:.4f}).")
    if gates := results.get("gates"):
        lines.append(statistics.verdict(gates))
    if steered := results.get("steering"):
        lines.append(f"{steered['any']:.1%} of {steered['number']} questions are answered differently by some level.")
        cells = "".join(f"{share:>8.3f}" for share in steered["different"])
        lines.append(f"{'not its own answer':<18}{cells}")
        if steered["loss"]:
            cells = "".join(f"{loss:>8.3f}" for loss in steered["loss"])
            lines.append(f"{'loss of answers':<18}{cells}   by itself {steered['own_loss']:.3f}")
    if captions := results["captions"]:
        levels = range(results["num_align_levels"])
        head = "".join(f"{level:>8}" for level in levels)
        lines.append(f"{'captions at level':<18}{head}{'Spearman':>10}{'Kendall':>9}{'p':>9}")
        for row in captions["measures"]:
            cells = "".join(f"{mean:>8.3f}" for mean in row["mean"])
            lines.append(f"{row['name']:<18}{cells}{row['spearman']:>10.2f}{row['kendall']:>9.2f}{row['p']:>9.4f}")
    return "\n".join(lines)
