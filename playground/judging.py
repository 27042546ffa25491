"""How well a model's levels judge captions of held-out images, beside its teacher's score: for the report."""

import random
from pathlib import Path
from typing import Any

from .captions import KINDS, draw_caption
from .evaluate import SavedModel, save_image, scenes_of
from .measures import judge_captions, score_captions


def evaluate_judge(
    model: str | Path, scorer: str | Path, data: str | Path, folder: str | Path, examples: int = 4
) -> dict[str, Any]:
    """The judge on held-out captions of all kinds.

    Args:
        model: folder of a stage-1 model.
        scorer: folder of the CLIP model that its training levels were cut from.
        data: folder of pairs, whose held-out images are the examples'.
        folder: folder that gets the example images.
        examples: images whose captions of each kind are shown with their levels.

    Returns:
        `number` of captions, `rows` (`name`, and AUCs `true from untrue`, `exact from wrong`), and `examples` (`image`,
        `captions`: `kind`, `text`, `level`).
    """
    from datasets import load_from_disk

    saved = SavedModel(model)
    heldout = load_from_disk(str(data))["heldout"]
    number = max(len(heldout), len(KINDS))
    judged = judge_captions(saved, None, number)
    rows = [
        {"name": "the model's mean level", **judged["judge"]},
        {"name": "the CLIP score it learned from", **score_captions(str(scorer), number)},
        {"name": "its likelihood a token", **judged["likelihood"]},
    ]
    shown = []
    for index, (image, scene) in enumerate(zip(heldout["image"][:examples], scenes_of(heldout), strict=False)):
        rng = random.Random(index)
        texts = [draw_caption(scene, kind, rng) for kind in KINDS]
        verdict = saved.model.judge(**saved.processor.judge_inputs([image] * len(texts), texts))
        captions = [
            {"kind": kind, "text": text, "level": level}
            for kind, text, level in zip(KINDS, texts, verdict.mean_level.tolist(), strict=True)
        ]
        shown.append({"image": save_image(image, folder, f"judged-{index}"), "captions": captions})
    return {"number": number, "rows": rows, "examples": shown}
