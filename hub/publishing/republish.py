"""
`aligngpt republish`: a checkpoint in the authors' format becomes a model on the Hub that loads: downloaded, converted,
compared with answers that their code gave, published with its plain LLaVA. Each step that was done is kept.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligngpt_shared.files import read_json
from aligngpt_shared.references import is_hub_id

from ..folders import stays_inside
from .model import LLAVA_BRANCH, add_hub_arguments, describe, hub_settings, publish


MOST_TOKENS = 128
_FIELDS = {
    "image": (str, type(None)),
    "question": (str,),
    "answer": (str,),
    "max_new_tokens": (int,),
    "ids": (list, type(None)),
}


@dataclass(frozen=True)
class Recorded:
    """A question and what the authors' code answered, greedily."""

    row: int
    image: Path | None
    question: str
    answer: str
    max_new_tokens: int
    ids: tuple[int, ...] | None = None


def read_recorded(path: Path) -> list[Recorded]:
    """
    Recorded answers: JSON lines of `question`, `answer`, and where there are any `image` (a file in the folder of
    `path`), `max_new_tokens` (where the answer was cut) and `ids` (the answer's tokens without EOS, compared instead of
    its text: decoders differ in pieces of characters).

    Raises:
        ValueError: naming file, row and field.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--answers {path} cannot be read: {error}") from error
    found = [_recorded(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ValueError(f"--answers {path} holds no row: one JSON object a line, with question and answer.")
    return found


def _recorded(path: Path, number: int, line: str) -> Recorded:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {type(row).__name__}, not an object with question and answer.")
    if unknown := sorted(row.keys() - _FIELDS.keys()):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; there are {', '.join(_FIELDS)}.")
    values = {"image": None, "ids": None, "max_new_tokens": MOST_TOKENS, **row}
    for name, kinds in _FIELDS.items():
        if name not in values or type(values[name]) not in kinds:
            raise ValueError(f"{where}: {name} is {values.get(name)!r}; it must be {kinds[0].__name__}.")
    if values["max_new_tokens"] < 1:
        raise ValueError(f"{where}: max_new_tokens is {values['max_new_tokens']}; it must be at least 1.")
    ids = values["ids"]
    if ids is not None and not all(type(token) is int for token in ids):
        raise ValueError(f"{where}: ids must be a list of whole numbers.")
    image = None
    if values["image"] is not None:
        image = path.parent / values["image"]
        if not image.is_file() or not stays_inside(image, path.parent):
            raise ValueError(f"{where}: image {str(values['image'])[:60]!r} is no file in the folder of {path.name}.")
    limit = values["max_new_tokens"]
    return Recorded(number, image, values["question"], values["answer"], limit, None if ids is None else tuple(ids))


def compare_answers(folder: Path, recorded: Sequence[Recorded], device: str | None = None) -> list[dict[str, Any]]:
    """
    Asks a model what was asked, greedily, a question at a time.

    Args:
        folder: of the model.
        recorded: what was asked and answered.
        device: `None` is a GPU where there is one.

    Returns:
        `row`, `answer` and `recorded` of those that differ.
    """
    import torch
    from tqdm.auto import tqdm

    from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

    from .example import ask

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AlignGPTForConditionalGeneration.from_pretrained(folder).to(device).eval()
    processor = AlignGPTProcessor.from_pretrained(folder)
    different = []
    for each in tqdm(recorded, desc="recorded answers", unit="answer", disable=len(recorded) < 2):
        image = processor.read_image(each.image, allow_urls=False) if each.image else None
        new = ask(model, processor, image, each.question, each.max_new_tokens)
        answer = processor.tokenizer.decode(new, skip_special_tokens=True)
        made = [token for token in new.tolist() if token != processor.tokenizer.eos_token_id]
        same = answer.strip() == each.answer.strip() if each.ids is None else made == list(each.ids)
        if not same:
            different.append({"row": each.row, "answer": answer.strip(), "recorded": each.answer.strip()})
    return different


def converted(args: argparse.Namespace) -> Path:
    """
    The converted model in `args.output`, made now or left by an earlier try.

    Raises:
        ValueError: the folder holds something else; or as `convert_checkpoint`.
    """
    from ..original.convert import convert_checkpoint
    from ..original.format import ORIGINAL_FOLDER
    from ..original.locate import locate

    output = Path(args.output)
    kept = output / ORIGINAL_FOLDER / "config.json"
    if kept.is_file():
        source = locate(args.checkpoint, "checkpoint")
        if kept.read_bytes() != ((source if source.is_dir() else source.parent) / "config.json").read_bytes():
            raise ValueError(f"{output} holds the conversion of another checkpoint: give another --output.")
        print(f"{output} holds the converted model: not converted again.")
        return output
    convert_checkpoint(
        args.checkpoint,
        output,
        vision_tower=args.vision_tower,
        base_llm=args.base_llm,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
    )
    print(f"converted into {output}")
    return output


def original_parts(folder: Path, given: Sequence[str | None]) -> list[str]:
    """Hub ids of language model and tower: those given, else those that the authors' config names."""
    from ..original.format import ORIGINAL_FOLDER

    config = read_json(folder / ORIGINAL_FOLDER / "config.json")
    named = (config.get("_name_or_path"), config.get("mm_vision_tower"))
    found = [name if name and is_hub_id(name) else other for name, other in zip(given, named, strict=True)]
    return [name for name in found if isinstance(name, str) and is_hub_id(name)]


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt republish`."""
    parser.add_argument("--checkpoint", required=True, help="in the authors' format: folder or Hub id")
    parser.add_argument("--output", required=True, help="folder for the converted model; kept, and used again")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="what the authors' code answered, as JSON lines")
    parser.add_argument(
        "--min-equal",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the recorded answers that must be equal (default: %(default)s; below it nothing is sent)",
    )
    parser.add_argument("--vision-tower", help="folder or Hub id of the vision tower (default: what the config names)")
    parser.add_argument("--base-llm", help="folder or Hub id of the language model, for a tokenizer that is not there")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    parser.add_argument("--max-shard-size", default="5GB", help="greatest size of a weight file (%(default)s)")
    parser.add_argument("--device", help="where the answers are made (default: a GPU where there is one)")
    parser.add_argument(
        "--llava-level",
        type=int,
        metavar="LEVEL",
        help=f"level of the plain LLaVA in the branch {LLAVA_BRANCH!r} (default: the top one)",
    )
    parser.add_argument("--no-llava", action="store_true", help="publish the AlignGPT alone")
    parser.add_argument("--license", metavar="NAME", help="the whole model's licence, by the Hub's name for it")
    parser.add_argument("--language", action="append", metavar="CODE", help="what it was trained on, default: en")
    add_hub_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `aligngpt republish`; the exit code."""
    from .upload import check_repo_id

    check_repo_id(args.repo_id)
    if not 0 <= args.min_equal <= 1:
        raise ValueError(f"--min-equal is {args.min_equal}; it must lie from 0 to 1.")
    if args.no_llava and args.llava_level is not None:
        raise ValueError("--llava-level has no effect with --no-llava: leave one out.")
    recorded = read_recorded(args.answers) if args.answers else []
    folder = converted(args)
    if recorded:
        different = compare_answers(folder, recorded, args.device)
        equal = len(recorded) - len(different)
        print(f"{equal} of {len(recorded)} recorded answers are the model's.")
        if equal < args.min_equal * len(recorded):
            first = different[0]
            raise ValueError(
                f"{args.answers}, line {first['row']}: the model answers {first['answer'][:80]!r}, recorded is "
                f"{first['recorded'][:80]!r}. Nothing was sent; {folder} stays. --min-equal takes a smaller share."
            )
    else:
        print("not compared with recorded answers: give them with --answers.")
    level = True if args.llava_level is None else args.llava_level
    upload = publish(
        folder,
        args.repo_id,
        base_models=original_parts(folder, (args.base_llm, args.vision_tower)),
        with_llava=False if args.no_llava else level,
        **hub_settings(args),
    )
    if upload is not None:
        print(describe(upload))
    return 0
