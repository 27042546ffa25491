"""`aligngpt judge` (experimental): the mean level of texts, from the likelihood of each at every alignment level."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aligngpt_shared.files import write_file
from aligngpt_shared.locks import lock, lock_of


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--model", required=True, help="an AlignGPT, best one after stage 1: folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--image", action="append", default=[], help="an image file; with --text, may be repeated")
    parser.add_argument("--text", action="append", default=[], help="the text about it, one for each --image")
    parser.add_argument("--data", help="rows with an image and a text, in any of training's layouts")
    parser.add_argument("--split", help="split of the data (default: as training takes it)")
    # the reader of training's files, from the command line, which knows both packages
    parser.set_defaults(load_rows=None)
    parser.add_argument(
        "--question",
        help="what the texts answer (default: they are captions; after stage 2 on rows' levels, their rows' questions)",
    )
    parser.add_argument("--sentences", action="store_true", help="judge each sentence, too")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument("--batch-size", type=int, default=16, help="rows at once (default: %(default)s)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    parser.add_argument("--output", type=Path, help="JSON lines to write, one for each row")


def run(args: argparse.Namespace) -> int:
    """Run `aligngpt judge`; the exit code."""
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise ValueError("--batch-size and --limit must be at least 1.")
    if bool(args.data) == bool(args.image or args.text):
        raise ValueError("Give --data, or --image and --text.")
    if len(args.image) != len(args.text):
        raise ValueError(f"{len(args.image)} --image and {len(args.text)} --text: each text is judged by one image.")
    if args.data and args.output is None:
        raise ValueError("--data needs --output: a file for the verdicts.")
    pairs = _pairs(args)
    if not args.output:
        for verdict in _judge(args, pairs):
            print(describe(verdict))
        return 0
    with lock(lock_of(args.output)):
        verdicts = list(_judge(args, pairs))
        write_file(args.output, "".join(json.dumps(verdict, ensure_ascii=False) + "\n" for verdict in verdicts))
    mean = sum(verdict["mean_level"] for verdict in verdicts) / len(verdicts)
    print(f"Judged {len(verdicts)} texts, mean level {mean:.2f}; verdicts in {args.output}")
    return 0


def _pairs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows `image`, `text`, `question`, `row`."""
    from modeling_aligngpt.images_aligngpt import read_image

    if not args.data:
        for image in args.image:
            read_image(image)  # refused before the model is loaded, whose processor reads it in its own way
        return [
            {"row": row, "image": image, "text": text, "question": args.question}
            for row, (image, text) in enumerate(zip(args.image, args.text, strict=True))
        ]
    rows = args.load_rows(args.data, split=args.split)
    found = []
    for number, row in enumerate(rows.select(range(min(args.limit or len(rows), len(rows))))):
        texts = {message["role"]: _text(message) for message in reversed(row["messages"])}
        if len(row["images"]) == 1 and texts.get("assistant"):
            question = args.question or texts.get("user") or None
            found.append({"row": number, "image": row["images"][0], "text": texts["assistant"], "question": question})
    if not found:
        raise ValueError(f"{args.data} has no row with one image and an answer.")
    return found


def _text(message: dict[str, Any]) -> str:
    return "".join(part.get("text") or "" for part in message["content"]).strip()


def _judge(args: argparse.Namespace, pairs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from tqdm.auto import tqdm

    from ..verdicts import judge_texts
    from .probe import LevelProbe

    probe = LevelProbe(args.model, args.revision, args.dtype, args.device, args.batch_size)
    is_caption = not probe.model.config.judges_answers and args.question is None
    # rows of one question make a batch; a caption has none
    order = sorted(range(len(pairs)), key=lambda i: ("" if is_caption else pairs[i]["question"] or "", i))
    verdicts: dict[int, dict[str, Any]] = {}
    start = 0
    with tqdm(total=len(pairs), desc="texts", disable=len(pairs) <= args.batch_size) as progress:
        while start < len(order):
            question = None if is_caption else pairs[order[start]]["question"]
            batch = [
                i for i in order[start : start + args.batch_size] if is_caption or pairs[i]["question"] == question
            ]
            found = judge_texts(
                probe.model,
                probe.processor,
                [pairs[i]["image"] for i in batch],
                [pairs[i]["text"] for i in batch],
                question,
                args.sentences,
            )
            verdicts |= {i: {"row": pairs[i]["row"], **verdict} for i, verdict in zip(batch, found, strict=True)}
            start += len(batch)
            progress.update(len(batch))
    for i in range(len(pairs)):
        yield verdicts[i]


def describe(verdict: dict[str, Any]) -> str:
    """A verdict for the terminal."""
    top = len(verdict["probabilities"]) - 1
    lines = [f"level {verdict['mean_level']:.2f} of {top}   {verdict['text']}"]
    lines += [f"  {sentence['mean_level']:>5.2f}   {sentence['text']}" for sentence in verdict.get("sentences", [])]
    shares = "  ".join(f"{level}: {share:.2f}" for level, share in enumerate(verdict["probabilities"]))
    return "\n".join([*lines, f"  p(level)   {shares}"])
