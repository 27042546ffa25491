"""Rows of the small world: pairs for stage 1, conversations for stage 2, and their folders on disk."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from aligngpt_shared.files import new_folder

from .captions import KINDS, draw_caption
from .questions import draw_questions
from .scenes import SPLITS, draw_scenes, render


# held-out images that are written as files, too
SHOWN = 8
KIND_WEIGHTS = {"exact": 8, "partial": 4, "loose": 2, "wrong": 3, "unrelated": 3}


def _check_number(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def make_pairs(
    n: int, seed: int = 0, split: str = "train", kinds: Sequence[str] | None = None, progress: bool = False
) -> list[dict[str, Any]]:
    """Draw image-caption pairs of graded alignment.

    Args:
        n: how many.
        seed: the same seed gives the same rows.
        split: `"train"` or `"heldout"`; the two share no scene, whatever the seeds.
        kinds: draw these kinds of caption (of `KINDS`) equally often; by default all, mostly exact ones.
        progress: show a progress bar.

    Returns:
        Rows `image` (RGB, 64 x 64), `caption`, `kind` (one of `KINDS`), `scene` (JSON, see `Scene.from_json`).

    Raises:
        ValueError: `n`, `split` or a kind is out of range.
    """
    _check_number("n", n, 0)
    for kind in kinds or ():
        if kind not in KINDS:
            raise ValueError(f"caption kind is {kind!r}; it must be one of {KINDS}")
    weights = dict.fromkeys(kinds, 1) if kinds else KIND_WEIGHTS
    rng = random.Random(f"pairs/{split}/{seed}")
    rows = []
    for scene in tqdm(draw_scenes(n, seed, split), total=n, desc=f"pairs ({split})", disable=not progress):
        kind = rng.choices(tuple(weights), weights=tuple(weights.values()))[0]
        caption, image = draw_caption(scene, kind, rng), render(scene, rng.random())
        rows.append({"image": image, "caption": caption, "kind": kind, "scene": scene.to_json()})
    return rows


def make_conversations(
    n: int, seed: int = 0, split: str = "train", turns: int = 6, progress: bool = False
) -> list[dict[str, Any]]:
    """Draw images with questions and answers, several turns each.

    Args:
        n: how many images.
        seed: the same seed gives the same rows.
        split: `"train"` or `"heldout"`; the two share no scene, whatever the seeds.
        turns: the most questions per image; they are of different types.
        progress: show a progress bar.

    Returns:
        Rows `images` (one RGB image), `messages` (chat messages, the first user message holds the image), `types`
        (the type of each question, of `QUESTION_TYPES`), `scene` (JSON).

    Raises:
        ValueError: `n`, `turns` or `split` is out of range.
    """
    _check_number("n", n, 0)
    _check_number("turns", turns, 1)
    rng = random.Random(f"conversations/{split}/{seed}")
    rows = []
    for scene in tqdm(draw_scenes(n, seed, split), total=n, desc=f"conversations ({split})", disable=not progress):
        questions = draw_questions(scene, turns, rng)
        messages: list[dict[str, Any]] = []
        for question in questions:
            content = [{"type": "text", "text": question.question}]
            if not messages:
                content.insert(0, {"type": "image", "text": None})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        rows.append(
            {
                "images": [render(scene, rng.random())],
                "messages": messages,
                "types": [question.type for question in questions],
                "scene": scene.to_json(),
            }
        )
    return rows


def parts_path(part: str) -> Path:
    """Folder of a tiny pretrained part that comes with the package.

    Args:
        part: `"clip"` (scorer and vision tower) or `"llama"` (language model).

    Raises:
        ValueError: there is no such part.
        FileNotFoundError: the installation lacks the weights.
    """
    if part not in ("clip", "llama"):
        raise ValueError(f"part is {part!r}; it must be 'clip' or 'llama'")
    folder = Path(__file__).parent / "parts" / part
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} holds no weights; train them with `python -m aligngpt_playground train-parts --part {part} "
            f"--output {folder}`"
        )
    return folder


def _features() -> dict[str, Any]:
    from datasets import Features, Image, List, Value

    text = Value("string")
    content = List({"type": text, "text": text})
    return {
        "pairs": Features({"image": Image(), "caption": text, "kind": text, "scene": text}),
        "conversations": Features(
            {
                "images": List(Image()),
                "messages": List({"role": text, "content": content}),
                "types": List(text),
                "scene": text,
            }
        ),
    }


def write_world(
    output: str | os.PathLike,
    pairs: int = 8000,
    conversations: int = 8000,
    heldout_pairs: int = 512,
    heldout_conversations: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, int]:
    """Write pairs and conversations, each a `datasets` folder with the splits `train` and `heldout`.

    Args:
        output: a folder; `output/pairs`, `output/conversations` and `output/images` (the first held-out images, as
            files) are replaced, each when it is complete.
        pairs, conversations: rows of the training split.
        heldout_pairs, heldout_conversations: rows of the held-out split.
        seed: seeds everything.
        progress: show progress bars.

    Returns:
        Rows written, for example `{"pairs/train": 8000, ...}`.
    """
    from datasets import Dataset, DatasetDict

    numbers = {
        "pairs": dict(zip(SPLITS, (pairs, heldout_pairs), strict=True)),
        "conversations": dict(zip(SPLITS, (conversations, heldout_conversations), strict=True)),
    }
    features, written = _features(), {}
    for name, make in (("pairs", make_pairs), ("conversations", make_conversations)):
        splits = {
            split: Dataset.from_list(make(n, seed, split, progress=progress), features=features[name], split=split)
            for split, n in numbers[name].items()
        }
        folder = Path(output) / name
        with new_folder(folder, replace=True) as beside:
            DatasetDict(splits).save_to_disk(str(beside))
        written |= {f"{name}/{split}": n for split, n in numbers[name].items()}
    # a few held-out scenes as files, to ask a model about
    shown = make_conversations(min(SHOWN, heldout_conversations), seed=seed, split="heldout", progress=False)
    with new_folder(Path(output, "images"), replace=True) as beside:
        for number, row in enumerate(shown):
            row["images"][0].save(beside / f"{number}.png")
    return written
