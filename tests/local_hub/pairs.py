"""Small scored data sets, as `aligngpt score` writes them."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, List, Value
from modeling.fresh_process import draw_image


MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
ALIGNMENT = {
    "method": "uniform",
    "num_align_levels": 2,
    "edges": [0.1, 0.3, 0.5],
    "counts": [4, 8],
    "mean_scores": [0.2, 0.4],
    "scorer": "openai/clip-vit-large-patch14-336",
    "revision": "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
    "rows": {"read": 15, "scored": 12, "unreadable_images": 2, "below_min_score": 1, "captions_cut": 0},
}


def rows(count: int, folder: Path | None = None) -> dict[str, list]:
    """Columns as scoring writes them; with a folder the images stay in files there."""
    columns: dict[str, list] = {"id": [f"pair-{n}" for n in range(count)], "images": [], "messages": []}
    for number in range(count):
        image = draw_image(number)
        if folder is not None:
            image.save(folder / f"{number}.png")
        columns["images"].append([image] if folder is None else [str(folder / f"{number}.png")])
        columns["messages"].append(
            [
                {"role": "user", "content": [{"type": "image", "text": None}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"ramp number {number}"}]},
            ]
        )
    columns["clip_score"] = [0.1 + 0.4 * number / count for number in range(count)]
    columns["align_level"] = [int(score >= 0.3) for score in columns["clip_score"]]
    return columns


def features(images) -> Features:
    kinds = {"id": Value("string"), "images": images, "messages": MESSAGES}
    return Features({**kinds, "clip_score": Value("float32"), "align_level": Value("int64")})


def save(folder: Path, data: Dataset | DatasetDict, alignment: dict | None = ALIGNMENT) -> Path:
    data.save_to_disk(folder)
    if alignment is not None:
        (folder / "alignment.json").write_text(json.dumps(alignment))
    return folder
