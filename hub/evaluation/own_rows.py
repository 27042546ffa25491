"""`aligngpt evaluate --data FILE`: answers to questions of one's own beside the known ones. It needs no lmms-eval."""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from aligngpt_hub.metrics import vqa_accuracy
from aligngpt_shared.files import write_json
from aligngpt_shared.locks import lock, lock_of
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

from .store import AnswerStore, hash_weights


MAX_NEW_TOKENS = 128


def evaluate_rows(args: argparse.Namespace, source: str) -> int:
    """
    Asks what stands before each row's first answer, keeps the answers in `OUTPUT/answers.jsonl`, and writes exact match
    and VQA accuracy, in percent, to `OUTPUT/scores.json`: of all rows, and of those of each level (the row's
    `align_level`, or the one that the gate weighs most).
    """
    rows = list(_questions(args.load_rows(source), args.limit))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AlignGPTForConditionalGeneration.from_pretrained(
        args.model, revision=args.revision, dtype=args.dtype, attn_implementation=args.attn_implementation
    )
    model = model.to(device).eval()
    processor = AlignGPTProcessor.from_pretrained(args.model, revision=args.revision)
    model.config.align_mode = args.align_mode or model.config.align_mode
    commit = getattr(model.config, "_commit_hash", None)
    identity = {
        "model": Path(args.model).resolve().name if Path(args.model).is_dir() else args.model,
        "revision": commit,
        "weights": None if commit else hash_weights(args.model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "align_level": args.align_level,
        "align_mode": model.config.align_mode,
    }
    output = args.output or Path("runs/evaluate") / identity["model"].replace("/", "--")
    with lock(lock_of(output)):
        if args.overwrite:
            (output / "answers.jsonl").unlink(missing_ok=True)
        store = AnswerStore(output / "answers.jsonl", identity)
        missing = [row for row in rows if store.get(row["key"]) is None]
        size = args.batch_size or 1
        for start in tqdm(range(0, len(missing), size), desc="answers"):
            for row in _answered(model, processor, missing[start : start + size], args.align_level):
                store.add(row)
        kept = [store.rows[row["key"]] for row in rows]
        scores = {"data": Path(source).name, **identity, **_scores(kept)}
        levels = sorted({row["level"] for row in kept if row["level"] is not None})
        scores["by_level"] = {at: _scores([row for row in kept if row["level"] == at]) for at in levels}
        write_json(output / "scores.json", scores)
    print(f"{'level':<8}{'rows':>8}{'exact match':>14}{'VQA accuracy':>14}")
    for name, found in [("all", scores), *scores["by_level"].items()]:
        print(f"{name!s:<8}{found['rows']:>8}{found['exact_match']:>14.1f}{found['vqa_accuracy']:>14.1f}")
    print(f"written to {output}")
    return 0


def _questions(rows, limit: int | None) -> Iterator[dict[str, Any]]:
    """What is asked of each row: `chat`, `images`, the known answer (`reference`), the row's `level`."""
    for number, row in enumerate(rows.select(range(min(limit or len(rows), len(rows))))):
        messages = row["messages"]
        place = next((at for at, message in enumerate(messages) if message["role"] == "assistant"), 0)
        if not place:
            raise ValueError(f"Row {number} holds no question with its answer.")
        chat = [
            {
                "role": message["role"],
                # parts without the columns of other kinds
                "content": [{name: value for name, value in part.items() if value} for part in message["content"]],
            }
            for message in messages[:place]
        ]
        asked = {"chat": chat, "reference": _text(messages[place]), "level": row.get("align_level")}
        key = hashlib.sha256(json.dumps([number, asked]).encode()).hexdigest()[:20]
        count = sum(part["type"] == "image" for message in chat for part in message["content"])
        yield {"key": key, "images": (row.get("images") or [])[:count], **asked}


def _text(message: dict[str, Any]) -> str:
    return "".join(part.get("text") or "" for part in message["content"])


def _answered(model, processor, rows: list[dict], align_level: int | None) -> Iterator[dict[str, Any]]:
    texts = processor.apply_chat_template([row["chat"] for row in rows], add_generation_prompt=True, tokenize=False)
    images = [processor.read_image(image, allow_urls=False) for row in rows for image in row["images"]]
    inputs = processor(
        text=texts,
        images=images or None,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    ).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    steered = {} if align_level is None else {"align_level": align_level}
    with torch.inference_mode():
        output = model.generate(
            **inputs, **steered, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True
        )
    answers = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for row, text, answer, weights in zip(rows, texts, answers, output.align_weights.float().tolist(), strict=True):
        level = row["level"]
        if level is None and row["images"]:
            # beside the gate's choice the top level is always there
            level = weights.index(max(weights[:-1])) if any(weights[:-1]) else len(weights) - 1
        yield {
            "key": row["key"],
            "prompt": text,
            "answer": answer.strip(),
            "reference": row["reference"],
            "align_weights": [round(weight, 6) for weight in weights],
            "level": level,
        }


def _scores(rows: list[dict[str, Any]]) -> dict[str, float]:
    equal = [_plain(row["answer"]) == _plain(row["reference"]) for row in rows]
    accuracy = vqa_accuracy([row["answer"] for row in rows], [row["reference"] for row in rows])["accuracy"]
    return {
        "rows": len(rows),
        "exact_match": round(100 * sum(equal) / len(rows), 4),
        "vqa_accuracy": round(100 * accuracy, 4),
    }


def _plain(text: str) -> str:
    """Case, spaces and a final full stop make no difference."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()
