"""Preference pairs and prompts from any source, as TRL's trainers take them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from tqdm.auto import tqdm

from ..data.conversations import ROW_ERRORS, BadRow, reason_of
from ..data.records import check_text, encode_images
from ..data.sources import Broken, open_source


LAYOUTS = (
    "`prompt`, `chosen`, `rejected` with `images` (TRL's), or `question`, `chosen`, `rejected` with `image` (RLAIF-V's)"
)
_TEXTS = List({"role": Value("string"), "content": Value("string")})


def load_preferences(
    source: Any,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    image_folder: str | Path | None = None,
    num_align_levels: int | None = None,
) -> Dataset:
    """
    Rows `images`, `prompt`, `chosen`, `rejected` (chat messages), and `align_level` where the source has it.

    Args:
        source: a file, folder, Hub id or data set, as for [`~data.load.read_rows`].
        split, name, revision: of a data set.
        image_folder: what relative image paths start from; by default the folder of the file.
        num_align_levels: the model's, to check levels by.

    Raises:
        ValueError: naming the row: another layout, an empty text, answers that are equal, an image that is not there.
    """
    title, rows = _read(
        source, (split, name, revision), image_folder, partial(_pair, num_align_levels=num_align_levels)
    )
    features: dict[str, Any] = {"images": List(Image()), "prompt": _TEXTS, "chosen": _TEXTS, "rejected": _TEXTS}
    _add_where_all_have(features, "align_level", Value("int64"), rows, title)
    return Dataset.from_list([{key: row[key] for key in features} for row in rows], features=Features(features))


def load_prompts(
    source: Any,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    image_folder: str | Path | None = None,
    num_align_levels: int | None = None,
) -> Dataset:
    """
    Rows `images`, `prompt` (chat messages) and, where every row has them, `answer` and `align_level`: what GRPO asks
    and rewards, and at which level.

    Args:
        source: a file, folder, Hub id or data set, as for [`~data.load.read_rows`], with `prompt` or `question`, and
            `images` or `image`.
        split, name, revision: of a data set.
        image_folder: what relative image paths start from; by default the folder of the file.
        num_align_levels: the model's, to check levels by.

    Raises:
        ValueError: naming the row: no prompt, an empty one, an image that is not there.
    """
    title, rows = _read(
        source, (split, name, revision), image_folder, partial(_prompt, num_align_levels=num_align_levels)
    )
    features: dict[str, Any] = {"images": List(Image()), "prompt": _TEXTS}
    _add_where_all_have(features, "answer", Value("string"), rows, title)
    _add_where_all_have(features, "align_level", Value("int64"), rows, title)
    return Dataset.from_list([{key: row[key] for key in features} for row in rows], features=Features(features))


def _add_where_all_have(features: dict[str, Any], column: str, kind: Value, rows: list[dict], title: str) -> None:
    """Adds a column that not every source has, but then all its rows."""
    values = [row[column] for row in rows]
    if all(value is None for value in values):
        return
    if None in values:
        raise ValueError(f"{title}, row {values.index(None)}: no {column}, which other rows have.")
    features[column] = kind


def _read(
    source: Any, where: tuple, image_folder: str | Path | None, read: Callable[..., dict[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """The name of a source and its rows, each read by a function of the record and the folder of its images."""
    opened, folder = open_source(source, *where)
    title = str(source) if isinstance(source, (str, Path)) else "the data set"
    if isinstance(opened, Dataset):
        for column in ("images", "image"):
            if column in opened.column_names:
                kind = List(Image(decode=False)) if column == "images" else Image(decode=False)
                opened = opened.cast_column(column, kind)
    rows = []
    for number, record in enumerate(tqdm(opened, desc="Reading rows", unit="row", delay=2)):
        try:
            if isinstance(record, Broken):
                raise BadRow(record.problem)
            rows.append(read(record, image_folder or folder))
        except ROW_ERRORS as error:
            raise ValueError(f"{title}, row {number}: {reason_of(error)}.") from error
    if not rows:
        raise ValueError(f"{title}: no rows.")
    return title, rows


def _prompt(record: dict[str, Any], folder: Path | str | None, num_align_levels: int | None) -> dict[str, Any]:
    question = record.get("prompt") if record.get("prompt") is not None else record.get("question")
    if question is None:
        raise BadRow(f"found {', '.join(sorted(record))}; a prompt is `prompt` or `question`")
    images, problems = encode_images(record, folder, check=True)
    if problems:
        raise BadRow("; ".join(problems))
    if not images:
        raise BadRow("no image, without which there is no level to learn from")
    prompt = _messages(question, "user")
    if [message["role"] for message in prompt] != ["user"] or not prompt[0]["content"].strip():
        raise BadRow("the prompt is not one message of the user")
    answer = record.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise BadRow(f"answer is {answer!r}, not a text")
    check_text(answer or "", "answer")
    level = _level(record, num_align_levels)
    return {"images": images, "prompt": prompt, "answer": answer, "align_level": level}


def _pair(record: dict[str, Any], folder: Path | str | None, num_align_levels: int | None) -> dict[str, Any]:
    question = record.get("prompt") if record.get("prompt") is not None else record.get("question")
    if question is None or record.get("chosen") is None or record.get("rejected") is None:
        raise BadRow(f"found {', '.join(sorted(record))}; accepted are {LAYOUTS}")
    images, problems = encode_images(record, folder, check=True)
    if problems:
        raise BadRow("; ".join(problems))
    prompt = _messages(question, "user")
    answers = {name: _messages(record[name], "assistant") for name in ("chosen", "rejected")}
    if not prompt or prompt[-1]["role"] != "user":
        raise BadRow("the prompt does not end with the user's message")
    if answers["chosen"] == answers["rejected"]:
        raise BadRow("chosen and rejected are equal: nothing can be preferred")
    for name, messages in (("prompt", prompt), *answers.items()):
        if not all(message["content"].strip() for message in messages):
            raise BadRow(f"{name} is empty")
    return {"images": images, "prompt": prompt, **answers, "align_level": _level(record, num_align_levels)}


def _level(record: dict[str, Any], num_align_levels: int | None) -> int | None:
    level = record.get("align_level")
    if level is not None and (type(level) is not int or not 0 <= level < (num_align_levels or level + 1)):
        raise BadRow(f"align_level is {level!r}, which the model does not have")
    return level


def _messages(value: Any, role: str) -> list[dict[str, str]]:
    """A text, or messages whose contents are texts or lists of parts; TRL places the images itself."""
    if isinstance(value, str):
        check_text(value, role)
        return [{"role": role, "content": _without_places(value)}]
    found = []
    for message in value:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join("<image>" if part.get("type") == "image" else part.get("text") or "" for part in content)
        check_text(content, message["role"])
        found.append({"role": message["role"], "content": _without_places(content)})
    return found


def _without_places(text: str) -> str:
    """A text without `<image>`: TRL puts as many images in front of the first question as the row has."""
    *before, _ = pieces = text.split("<image>")
    if len(before) > 1 and "".join(before).strip():
        raise BadRow("several images stand among its words, and TRL can only put them in front: leave the row out")
    return "".join(pieces).strip()
