"""Verdicts of the judge in plain values, for `aligngpt judge`."""

from typing import Any

import torch


def judge_texts(
    model, processor, images: list, texts: list[str], question: str | None = None, sentences: bool = False
) -> list[dict[str, Any]]:
    """
    How well texts fit their images; one batch.

    Args:
        model, processor: a loaded AlignGPT.
        images, texts, question: see [`AlignGPTProcessor.judge_inputs`].
        sentences: judge each sentence, too.

    Returns:
        For each text `text`, `mean_level` (0 to N - 1), `probabilities` of the N levels and, where asked for,
        `sentences`: each `text` and `mean_level`.

    Raises:
        ValueError: a text cannot be judged, or the model's likelihoods are not finite.
    """
    inputs = processor.judge_inputs(images, texts, question, sentences).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    found = model.judge(**inputs)
    if not torch.isfinite(found.mean_level).all():
        raise ValueError("The model gave likelihoods that are not finite: its weights are damaged.")
    verdicts = []
    for row, text in enumerate(texts):
        verdict: dict[str, Any] = {
            "text": text,
            "mean_level": round(found.mean_level[row].item(), 4),
            "probabilities": [round(value, 4) for value in found.probabilities[row].tolist()],
        }
        if sentences:
            pieces, levels = processor.split_sentences(text), found.part_mean_level[row].tolist()
            verdict["sentences"] = [
                {"text": piece.strip(), "mean_level": round(level, 4)}
                for piece, level in zip(pieces, levels, strict=False)
            ]
        verdicts.append(verdict)
    return verdicts
