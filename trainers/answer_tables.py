"""Images with the answers of an evaluation, as tables where a run reports to (W&B, trackio, TensorBoard)."""

import importlib
from typing import Any

import numpy as np
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from .data.images import load_image


logger = logging.get_logger(__name__)

MOST_ROWS, MOST_PIXELS = 32, 336
"""Of a table, and of the longer side of its images."""
COLUMNS = ("image", "prompt", "reference", "answer", "match", "align_weights")


def report_answers(trainer: Any, records: list[dict[str, Any]], rows: list[dict[str, Any]], name: str) -> None:
    """
    Sends a table of answers to every tracker of a run that shows images; called in the process that reports.

    Args:
        trainer: the `StageTrainer`.
        records: of [`~eval_callback.generate_answers`].
        rows: the data set's, one for each record; their first image is shown.
        name: of the table, such as `eval`.
    """
    shown: list[list[Any]] | None = None
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, (TensorBoardCallback, TrackioCallback, WandbCallback)):
            continue
        shown = shown or [_shown(record, row) for record, row in zip(records, rows, strict=True)][:MOST_ROWS]
        try:
            _send(callback, shown, f"{name}_answers", trainer.state.global_step)
        except Exception as error:  # a tracker that fails must not stop a run
            logger.warning(f"{type(callback).__name__} could not take the answers: {error}")


def _shown(record: dict[str, Any], row: dict[str, Any]) -> list[Any]:
    images = row.get("images") or []
    image = load_image(images[0], row=record["row"]).convert("RGB") if images else None
    if image is not None:
        image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    weights = record["align_weights"]
    told = "" if weights is None else " ".join(f"{weight:.2f}" for weight in weights)
    return [image, record["prompt"], record["reference"], record["answer"], record["match"], told]


def _send(callback: Any, shown: list[list[Any]], name: str, step: int) -> None:
    if isinstance(callback, TensorBoardCallback):
        if callback.tb_writer is None:
            return
        for index, (image, prompt, reference, answer, match, told) in enumerate(shown):
            if image is not None:
                callback.tb_writer.add_image(f"{name}/{index}", np.asarray(image), step, dataformats="HWC")
            text = f"**{prompt}**\n\n{answer}\n\nreference: {reference} ({'equal' if match else 'other'})\n\n{told}"
            callback.tb_writer.add_text(f"{name}/{index}", text, step)
        return
    library = importlib.import_module("wandb" if isinstance(callback, WandbCallback) else "trackio")
    data = [[None if image is None else library.Image(image), *rest] for image, *rest in shown]
    table = library.Table(columns=list(COLUMNS), data=data)
    # the step of W&B is the one it counts itself; the run's stands beside it, as transformers' callback has it
    more = {"train/global_step": step} if isinstance(callback, WandbCallback) else {}
    library.log({name: table, **more}, **({} if more else {"step": step}))
