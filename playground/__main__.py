"""`python -m aligngpt_playground`: the quickstart, the small world's data, its tiny parts' training."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import quickstart
from .sprites import ATTRIBUTION


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m aligngpt_playground", description=__doc__, epilog=ATTRIBUTION)
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser(
        "quickstart", help="the whole way on the small world: data, both stages, figures, report"
    )
    quickstart.add_arguments(whole)
    make = commands.add_parser("make", help="write pairs and conversations as datasets folders")
    make.add_argument("--output", required=True, help="folder that gets pairs/ and conversations/")
    make.add_argument("--pairs", type=int, default=8000, help="training pairs (default: %(default)s)")
    make.add_argument("--conversations", type=int, default=8000, help="training conversations (default: %(default)s)")
    make.add_argument("--heldout-pairs", type=int, default=512, help="held-out pairs (default: %(default)s)")
    make.add_argument(
        "--heldout-conversations", type=int, default=256, help="held-out conversations (default: %(default)s)"
    )
    make.add_argument("--seed", type=int, default=0)
    commands.add_parser("parts", help="where the tiny CLIP and language model of the package are")
    train = commands.add_parser("train-parts", help="train the tiny CLIP or Llama from nothing")
    train.add_argument("--part", required=True, choices=("clip", "llama"))
    train.add_argument("--output", required=True, help="model folder to write")
    train.add_argument("--steps", type=int, help="of CLIP: optimiser steps (default: as the shipped part)")
    train.add_argument("--share", type=float, help="of the Llama: share of the steps of its courses (default: all)")
    train.add_argument("--batch-size", type=int)
    train.add_argument("--learning-rate", type=float)
    train.add_argument("--seed", type=int, default=0)
    hard = commands.add_parser("hard", help="a model on the harder questions: absent objects, two hops, attributes")
    hard.add_argument("--model", default="gate", help="a folder of stage 2, or gate or steering: the package's own")
    hard.add_argument("--images", type=int, default=512, help="held-out images (default: %(default)s)")
    hard.add_argument("--align-level", type=int, help="level that every answer is steered to (default: the model's)")
    hard.add_argument("--seed", type=int, default=0)
    hard.add_argument("--output", help="JSON file with the figures and all answers")
    models = commands.add_parser("train-models", help="train the two models that come with the package")
    models.add_argument("--output", required=True, help="folder for what training changed; replaced")
    models.add_argument("--pairs", type=int, default=3600, help="pairs of stage 1 (default: %(default)s)")
    models.add_argument("--rows", type=int, default=3000, help="rows of each stage 2 (default: %(default)s)")
    models.add_argument("--seed", type=int, default=0)
    return parser


def _hard(args: argparse.Namespace) -> str:
    """`hard`: the table."""
    from aligngpt_shared.files import write_json

    from .evaluate import Accuracy, format_table
    from .hard_questions import evaluate_hard
    from .trained import MODELS, trained_model

    model = trained_model(args.model) if args.model in MODELS else args.model
    found = evaluate_hard(model, args.images, args.seed, args.align_level)
    if args.output:
        write_json(Path(args.output), found)
    yes = ", ".join(f"{kind} {share:.2f}" for kind, share in found["yes_share"].items())
    rows = [Accuracy(**row) for row in [*found["rows"], found["overall"]]]
    return f"{format_table('Harder questions', rows)}\n\nShare of yes: {yes}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parsed = build_parser().parse_args(argv)
    args = vars(parsed)
    command = args.pop("command")
    if command == "quickstart":
        return quickstart.run(parsed)
    try:
        if command == "hard":
            print(_hard(parsed))
        elif command == "make":
            from .world import write_world

            written = write_world(**args)
            print(", ".join(f"{name}: {n} rows" for name, n in written.items()), "written to", args["output"])
        elif command == "parts":
            from .world import parts_path

            print(f"--vision_tower, --scorer: {parts_path('clip')}\n--llm: {parts_path('llama')}")
        elif command == "train-models":
            from .trained import train_models

            print(json.dumps(train_models(**args)))
        else:
            from .train_parts import train_part

            figures = train_part(**{name: value for name, value in args.items() if value is not None})
            print(json.dumps(figures))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
