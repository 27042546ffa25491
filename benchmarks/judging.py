"""
How well models tell true texts about an image from false ones, on benchmarks in the layouts they are published in.

    python benchmarks/judging.py --benchmark sugarcrepe.json --images val2017 \\
        --scorer clip:openai/clip-vit-large-patch14-336 --scorer likelihood:llava-hf/llava-1.5-7b-hf \\
        --scorer debiased:llava-hf/llava-1.5-7b-hf --scorer judge:runs/pretrain --output judging.json

| layout | rows | figure |
|---|---|---|
| SugarCrepe | `filename`, `caption`, `negative_caption` | share of rows whose true caption stands higher |
| Winoground | `image_0`, `image_1`, `caption_0`, `caption_1` | text, image and group score |
| SeeTRUE | `image`, `text` (or `caption`), `label` 0 or 1 | AUC |
| FOIL | `annotations` of `image_id`, `caption`, `foil` | AUC |
| VL-RewardBench | `image`, `query`, `response` (two), `human_ranking` (0: best) | share of rows ranked as people did |

Scorers: `clip` (any dual encoder), `judge` (an AlignGPT's mean level: experimental), `likelihood` (mean log-likelihood
a token), `whole` (of the whole text), `debiased` (of the whole text, less `--alpha` times that without the image); the
last three take any `AutoModelForImageTextToText`. Where the texts of a row differ in form, form alone may decide:
`length` (fewer words stand higher) is always printed beside the models.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


QUESTION = "Describe the image."


@dataclass
class Item:
    """A text about an image that is scored, and the question it answers (None: it is a caption)."""

    image: Any
    text: str
    question: str | None = None


@dataclass
class Case:
    """Items of a row, and what their scores should be: each pair of `better` is (index that wins, index that loses)."""

    items: list[Item]
    better: list[tuple[int, int]]
    label: int | None = None


# ---- layouts ----


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of JSON (a list, or a dict of rows), JSON lines or parquet."""
    if path.suffix == ".parquet":
        from datasets import load_dataset

        return list(load_dataset("parquet", data_files=str(path), split="train"))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    data = json.loads(text)
    if isinstance(data, dict):
        data = data["annotations"] if "annotations" in data else list(data.values())
    return data


def sugarcrepe(row: dict[str, Any]) -> Case:
    return Case([Item(row["filename"], row["caption"]), Item(row["filename"], row["negative_caption"])], [(0, 1)])


def winoground(row: dict[str, Any]) -> Case:
    items = [Item(row[f"image_{i}"], row[f"caption_{t}"]) for i in (0, 1) for t in (0, 1)]
    # first the texts of each image, then the images of each text
    return Case(items, [(0, 1), (3, 2), (0, 2), (3, 1)])


def seetrue(row: dict[str, Any]) -> Case:
    return Case([Item(row["image"], row.get("text") or row["caption"])], [], int(row["label"]))


def foil(row: dict[str, Any]) -> Case:
    image = row.get("file_name") or f"COCO_val2014_{int(row['image_id']):012d}.jpg"
    return Case([Item(image, row["caption"])], [], int(not row["foil"]))


def vl_rewardbench(row: dict[str, Any]) -> Case:
    items = [Item(row["image"], text, row["query"]) for text in row["response"]]
    first, second = row["human_ranking"]
    return Case(items, [(0, 1) if first < second else (1, 0)])


LAYOUTS: dict[str, tuple[set[str], Callable[[dict[str, Any]], Case]]] = {
    "SugarCrepe": ({"filename", "caption", "negative_caption"}, sugarcrepe),
    "Winoground": ({"image_0", "image_1", "caption_0", "caption_1"}, winoground),
    "VL-RewardBench": ({"image", "query", "response", "human_ranking"}, vl_rewardbench),
    "FOIL": ({"image_id", "caption", "foil"}, foil),
    "SeeTRUE": ({"image", "label"}, seetrue),
}


def read_cases(path: Path, limit: int | None = None) -> tuple[str, list[Case]]:
    """
    The layout of a benchmark and its cases.

    Raises:
        ValueError: the rows have no known layout.
    """
    rows = read_rows(path)[:limit]
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    for name, (fields, case) in LAYOUTS.items():
        if fields <= rows[0].keys():
            return name, [case(row) for row in rows]
    known = "; ".join(f"{name}: {', '.join(sorted(fields))}" for name, (fields, _) in LAYOUTS.items())
    raise ValueError(f"{path} has rows with {', '.join(sorted(rows[0]))}, which is no known layout ({known}).")


def open_image(image: Any, folder: Path | None) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    path = Path(image) if folder is None else folder / image
    with Image.open(path) as opened:
        return opened.convert("RGB")


# ---- scorers: lists of images, texts and questions -> one number each ----


class Clip:
    def __init__(self, model: str):
        from aligngpt_trainers.scoring.scorer import PairScorer

        self.scorer = PairScorer(model)

    def __call__(self, images: list, items: list[Item]) -> list[float]:
        prepared = self.scorer.preprocess(images, [item.text for item in items])
        return self.scorer.score(*prepared[:2]).tolist()


class Judge:
    """Mean level of a caption: p(level | image, text) is proportional to p(text | image, level), one pass for each."""

    def __init__(self, model: str):
        from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

        self.model = AlignGPTForConditionalGeneration.from_pretrained(model).eval()
        self.processor = AlignGPTProcessor.from_pretrained(model)

    @torch.no_grad()
    def __call__(self, images: list, items: list[Item]) -> list[float]:
        from modeling_aligngpt import CHAT_TEMPLATES

        chats = [
            [
                {"role": "user", "content": [{"type": "image", "image": image}]},
                {"role": "assistant", "content": [{"type": "text", "text": item.text}]},
            ]
            for image, item in zip(images, items, strict=True)
        ]
        inputs = self.processor.apply_chat_template(
            chats,
            chat_template=CHAT_TEMPLATES["plain"],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
            return_assistant_tokens_mask=True,
        )
        answers = torch.as_tensor(inputs.pop("assistant_masks")).bool()[:, 1:]
        ids, levels = inputs["input_ids"][:, 1:, None], range(self.model.config.num_align_levels)
        found = []
        for level in levels:
            logits = self.model(**inputs, align_level=level).logits[:, :-1].float()
            found.append((logits.log_softmax(-1).gather(2, ids)[..., 0] * answers).sum(1))
        probabilities = torch.stack(found, 1).softmax(1)
        return (probabilities @ torch.arange(float(len(levels)))).tolist()


class Likelihood:
    """Log-likelihood of a text as the answer to its question.

    Args:
        model: any `AutoModelForImageTextToText`.
        whole: sum over the tokens, not their mean.
        alpha: of the likelihood without the image, which is taken off.
    """

    def __init__(self, model: str, whole: bool = False, alpha: float = 0.0):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        self.model = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True).eval()
        self.whole, self.alpha = whole, alpha

    def __call__(self, images: list, items: list[Item]) -> list[float]:
        return [self.score(image, item) for image, item in zip(images, items, strict=True)]

    def score(self, image: Image.Image, item: Item) -> float:
        found = self.log_likelihood(image, item)
        return found - self.alpha * self.log_likelihood(None, item) if self.alpha else found

    @torch.no_grad()
    def log_likelihood(self, image: Image.Image | None, item: Item) -> float:
        content = [{"type": "image"}] if image is not None else []
        content.append({"type": "text", "text": item.question or QUESTION})
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        given = {"images": [image]} if image is not None else {}
        before = self.processor(text=[prompt], return_tensors="pt", **given)["input_ids"].shape[1]
        inputs = self.processor(text=[f"{prompt}{item.text}"], return_tensors="pt", **given)
        logits = self.model(**inputs).logits[0, before - 1 : -1].float()
        found = logits.log_softmax(-1).gather(1, inputs["input_ids"][0, before:, None])
        return float(found.sum() if self.whole or self.alpha else found.mean())


def make_scorer(named: str, alpha: float) -> Callable[[list, list[Item]], list[float]]:
    """`KIND:MODEL` -> scorer."""
    kind, _, model = named.partition(":")
    makers: dict[str, Callable[[str], Any]] = {
        "clip": Clip,
        "judge": Judge,
        "likelihood": Likelihood,
        "whole": lambda folder: Likelihood(folder, whole=True),
        "debiased": lambda folder: Likelihood(folder, alpha=alpha),
    }
    if kind not in makers or not model:
        raise ValueError(f"--scorer {named} is not KIND:MODEL with a kind of {', '.join(makers)}.")
    return makers[kind](model)


# ---- figures ----


def auc(values: list[float], labels: list[int]) -> float:
    """Share of pairs of a true and a false text in which the true one stands higher; ties count half."""
    good, bad = (np.array([v for v, label in zip(values, labels, strict=True) if label == kind]) for kind in (1, 0))
    if not len(good) or not len(bad):
        raise ValueError("an AUC needs true and false texts.")
    differences = good[:, None] - bad
    return float((differences > 0).mean() + 0.5 * (differences == 0).mean())


def figures(layout: str, cases: list[Case], scores: list[list[float]]) -> dict[str, float]:
    """What the benchmark reports."""
    if cases[0].label is not None:
        return {"AUC": auc([values[0] for values in scores], [int(case.label or 0) for case in cases])}
    won = [
        [values[best] > values[other] for best, other in case.better]
        for case, values in zip(cases, scores, strict=True)
    ]
    if layout != "Winoground":
        return {"accuracy": float(np.mean([row[0] for row in won]))}
    text, image = (np.array([all(row[part]) for row in won]) for part in (slice(0, 2), slice(2, 4)))
    return {"text": float(text.mean()), "image": float(image.mean()), "group": float((text & image).mean())}


def batches(cases: list[Case], size: int) -> Iterator[list[Item]]:
    items = [item for case in cases for item in case.items]
    for start in range(0, len(items), size):
        yield items[start : start + size]


def score_cases(
    cases: list[Case], scorer: Callable[[list, list[Item]], list[float]], folder: Path | None, size: int
) -> list[list[float]]:
    """The scores of each case's items."""
    from tqdm.auto import tqdm

    found: list[float] = []
    total = -(-sum(len(case.items) for case in cases) // size)
    for batch in tqdm(batches(cases, size), total=total, desc="judging"):
        found += scorer([open_image(item.image, folder) for item in batch], batch)
    values = iter(found)
    return [[next(values) for _ in case.items] for case in cases]


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", type=Path, required=True, help="a file in one of the layouts")
    parser.add_argument("--images", type=Path, help="folder of the images that rows name")
    parser.add_argument("--scorer", action="append", default=[], metavar="KIND:MODEL", help="may be repeated")
    parser.add_argument("--alpha", type=float, default=1.0, help="of `debiased` (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first N rows")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, help="JSON file with figures and scores")
    args = parser.parse_args(argv)
    layout, cases = read_cases(args.benchmark, args.limit)
    scores = {"length": [[-float(len(item.text.split())) for item in case.items] for case in cases]}
    for named in args.scorer:
        scores[named] = score_cases(cases, make_scorer(named, args.alpha), args.images, args.batch_size)
    results = {name: figures(layout, cases, values) for name, values in scores.items()}
    columns = list(next(iter(results.values())))
    print(f"{layout}, {len(cases)} rows\n\n| scorer | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, row in results.items():
        print(f"| {name} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |")
    if args.output:
        args.output.write_text(json.dumps({"layout": layout, "figures": results, "scores": scores}, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
