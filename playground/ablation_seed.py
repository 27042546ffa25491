"""One seed of the ablation: its world, its models of stage 1, and stage 2 of every variant with its figures."""

import contextlib
import io
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligngpt_shared.files import new_folder, write_json

from .evaluate import SavedModel, caption_table, question_table, questions_of, scenes_of
from .world import parts_path, write_world


@dataclass(frozen=True)
class PretrainVariant:
    """A stage 1.

    Args:
        num_align_levels: N.
        levels: `"score"`: cut from the scores; `"shuffled"`: the same levels dealt out at random, so that there are as
            many of each and none says anything; `"none"`: no `<align>` token in any row, as in LLaVA.
        keep: share of the pairs, the best by score, that is trained on (as many steps as with all of them).
    """

    num_align_levels: int = 8
    levels: str = "score"
    keep: float = 1.0


@dataclass(frozen=True)
class Variant:
    """A row of the table: a stage 1 (a key of `PRETRAINS`) and the alignment vector of stage 2."""

    name: str
    pretrain: str
    align_mode: str
    group: str


PRETRAINS = {
    "levels-8": PretrainVariant(8),
    "none": PretrainVariant(8, levels="none"),
    "filtered": PretrainVariant(8, levels="none", keep=0.5),
    "shuffled-8": PretrainVariant(8, levels="shuffled"),
    "levels-4": PretrainVariant(4),
    "levels-6": PretrainVariant(6),
    "levels-10": PretrainVariant(10),
}
VARIANTS = (
    Variant("gate + global, N = 8", "levels-8", "gate", "method"),
    Variant("no alignment", "none", "global", "baseline"),
    Variant("best half by score", "filtered", "global", "baseline"),
    Variant("local only", "levels-8", "local", "vector"),
    Variant("global only", "levels-8", "global", "vector"),
    Variant("mean of all levels", "levels-8", "mean", "vector"),
    Variant("random level table", "levels-8", "random", "control"),
    Variant("shuffled levels", "shuffled-8", "gate", "control"),
    Variant("N = 4", "levels-4", "gate", "number"),
    Variant("N = 6", "levels-6", "gate", "number"),
    Variant("N = 10", "levels-10", "gate", "number"),
)
"""The first is the paper's method, which the others are compared with."""


@dataclass(frozen=True)
class Settings:
    """What the figures depend on; a folder holds runs of one of these."""

    pairs: int
    pretrain_steps: int
    conversations: int
    heldout: int
    batch_size: int = 32
    pretrain_learning_rate: float = 1e-2
    instruct_learning_rate: float = 1e-3
    parts: str = "package"


def run_path(output: Path, seed: int, variant: Variant) -> Path:
    """Where a finished run is kept."""
    slug = "".join(char if char.isalnum() else "-" for char in variant.name).replace("---", "-")
    return output / f"seed-{seed}" / "runs" / f"{slug}.json"


def run_seed(
    seed: int,
    variants: tuple[Variant, ...],
    settings: Settings,
    output: str,
    parts: str | None,
    keep: bool = False,
    after_run: Callable[[], None] | None = None,
) -> None:
    """All variants of a seed that are not there yet."""
    import datasets
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = Path(output) / f"seed-{seed}"
    for variant in variants:
        path = run_path(Path(output), seed, variant)
        if path.is_file():
            continue
        world = _world(folder, seed, settings, parts)
        model = _pretrained(folder, variant.pretrain, seed, settings, world, parts)
        result = _instruct(model, variant, seed, settings, world)
        write_json(path, {"variant": variant.name, "seed": seed, **result})
        if after_run:
            after_run()
    if not keep:
        for name in ("pretrain", "world"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _world(folder: Path, seed: int, settings: Settings, parts: str | None) -> Path:
    """The seed's pairs with scores and its conversations, and held-out rows that all seeds share."""
    from aligngpt_trainers import ScoreConfig, score_dataset

    world = folder / "world"
    if not world.is_dir():
        with new_folder(world, replace=True) as beside:
            write_world(beside / "data", settings.pairs, settings.conversations, 1, 1, seed, progress=False)
            write_world(beside / "heldout", 1, 1, settings.heldout, settings.heldout, seed=0, progress=False)
            with _silent():
                score_dataset(
                    ScoreConfig(
                        dataset=str(beside / "data" / "pairs"),
                        dataset_split="train",
                        scorer=str(_part(parts, "clip")),
                        output=str(beside / "scored"),
                        batch_size=256,
                        device="cpu",
                    )
                )
    return world


def _part(parts: str | None, name: str) -> Path:
    return Path(parts) / name if parts else parts_path(name)


def stage_one_rows(scored, variant: PretrainVariant, seed: int):
    """Scored pairs as a stage 1 takes them: levels cut anew into N, dealt out at random, or only the best pairs.

    Args:
        scored: data set with `clip_score`.
        variant: what is asked for.
        seed: of the shuffle.
    """
    import numpy as np

    from aligngpt_trainers.scoring.scorer import cut_levels

    scores = np.asarray(scored["clip_score"][:])
    levels, _, _ = cut_levels(scores, variant.num_align_levels)
    if variant.levels == "shuffled":
        levels = np.random.default_rng(seed).permutation(levels)
    rows = scored.remove_columns("align_level").add_column("align_level", levels.tolist())
    if variant.keep < 1:
        best = np.argsort(-scores, kind="stable")[: round(variant.keep * len(scores))]
        # written out, because a selection is encoded again at every step
        rows = rows.select(np.sort(best)).flatten_indices()
    return rows


def _pretrained(folder: Path, name: str, seed: int, settings: Settings, world: Path, parts: str | None) -> Path:
    """Folder of a stage-1 model, trained unless it is there, with its figures in `captions.json`."""
    from datasets import load_from_disk

    from aligngpt_trainers import AlignGPTPretrainConfig, AlignGPTPretrainTrainer
    from modeling_aligngpt.assembly import assemble

    output, variant = folder / "pretrain" / name, PRETRAINS[name]
    if (output / "captions.json").is_file():
        return output
    rows = stage_one_rows(load_from_disk(str(world / "scored")), variant, seed)
    model, processor = assemble(
        _part(parts, "llama"), _part(parts, "clip"), num_align_levels=variant.num_align_levels, seed=seed
    )
    config = AlignGPTPretrainConfig(
        output_dir=str(output),
        max_steps=settings.pretrain_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=settings.pretrain_learning_rate,
        adam_beta2=0.98,
        **_common(seed),
    )
    seconds = time.perf_counter()
    with _silent():
        trainer = AlignGPTPretrainTrainer(model, config, rows, processing_class=processor)
        if variant.levels == "none":
            trainer.data_collator = _Without(trainer.data_collator, model.config.align_token_id)
        trainer.train()
        trainer.save_final()
    seconds = time.perf_counter() - seconds
    heldout = load_from_disk(str(world / "heldout" / "pairs"))["heldout"]
    asked = _Loaded(trainer.model, processor, variant.levels == "none")
    # the top level is the model's default: captions as exact as it can
    captions, scenes = asked.caption(heldout["image"][:]), scenes_of(heldout)
    measures = {row.name: row.accuracy for row in caption_table(captions, scenes, scenes)}
    words = sum(len(text.split()) for text in captions) / len(captions)
    write_json(output / "captions.json", {**measures, "words": words, "seconds": seconds})
    return output


def _instruct(model_folder: Path, variant: Variant, seed: int, settings: Settings, world: Path) -> dict[str, Any]:
    """Stage 2 and its held-out figures."""
    from datasets import load_from_disk

    from aligngpt_trainers import AlignGPTInstructConfig, AlignGPTInstructTrainer
    from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

    without = PRETRAINS[variant.pretrain].levels == "none"
    model = AlignGPTForConditionalGeneration.from_pretrained(model_folder, dtype="float32")
    processor = AlignGPTProcessor.from_pretrained(model_folder)
    heldout = load_from_disk(str(world / "heldout" / "conversations"))["heldout"]
    config = AlignGPTInstructConfig(
        output_dir=str(world / "unused"),
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=settings.instruct_learning_rate,
        align_mode=variant.align_mode,
        **_common(seed),
    )
    rows, seconds = load_from_disk(str(world / "data" / "conversations"))["train"], time.perf_counter()
    with _silent():
        trainer = AlignGPTInstructTrainer(model, config, rows, eval_dataset=heldout, processing_class=processor)
        if without:
            trainer.data_collator = _Without(trainer.data_collator, model.config.align_token_id)
        trainer.train()
        seconds = time.perf_counter() - seconds
        loss = trainer.evaluate()["eval_loss"]
        steered = None if without else _loss_by_level(trainer)
    asked = [(row["images"][0], question) for row in heldout for question in questions_of(row)]
    questions = [question for _, question in asked]
    answers, weights = _Loaded(trainer.model, processor, without).answer(
        [image for image, _ in asked], [question.question for question in questions]
    )
    table, overall = question_table(answers, questions, questions)
    gated = variant.align_mode in ("gate", "local", "random") and not without
    columns = list(zip(*weights, strict=True)) if gated else []
    return {
        "questions": {row.name: row.accuracy for row in [*table, overall]},
        "loss": loss,
        "loss_by_level": steered,
        "captions": json.loads((model_folder / "captions.json").read_text(encoding="utf-8")),
        "gate": [{"mean": _mean(column), "spread": _spread(column)} for column in columns],
        "align_norm": _align_norm(trainer.model),
        "seconds": round(seconds, 2),
    }


def _loss_by_level(trainer) -> list[float]:
    """Held-out loss when the alignment vector is one row of the table, for each row: how much the vector matters."""
    config, losses = trainer.model.config, []
    before = config.align_mode, config.default_align_level
    try:
        for level in range(config.num_align_levels):
            config.align_mode, config.default_align_level = "fixed", level
            losses.append(trainer.evaluate()["eval_loss"])
    finally:
        config.align_mode, config.default_align_level = before
    return losses


def _align_norm(model) -> dict[str, float]:
    """Length of the level table's rows beside that of the words' embeddings."""
    table = model.model.align_embeddings.weight.detach()
    words = model.get_input_embeddings().weight.detach()
    spread = (table - table.mean(0)).norm(dim=1).mean()
    return {
        "levels": float(table.norm(dim=1).mean()),
        "levels_about_their_mean": float(spread),
        "words": float(words.norm(dim=1).mean()),
    }


def _common(seed: int) -> dict[str, Any]:
    return {
        "max_length": 256,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


# ---- rows without the token ----


def without_token(batch: dict[str, Any], token_id: int) -> dict[str, Any]:
    """A batch with the one `token_id` of each row taken out of everything that has a column for each token."""
    ids = batch["input_ids"]
    keep = ids != token_id
    if bool(((~keep).sum(1) != 1).any()):
        raise ValueError(f"each row must hold the token {token_id} once; they hold it {(~keep).sum(1).tolist()} times")
    return {
        name: value[keep].view(len(ids), -1) if value.shape[:2] == ids.shape else value for name, value in batch.items()
    }


class _Without:
    """A collator or processor whose batches hold no `<align>`: what LLaVA reads."""

    def __init__(self, inner, token_id: int):
        self.inner, self.token_id = inner, token_id

    def __call__(self, *args, **kwargs):
        batch = self.inner(*args, **kwargs)
        kept = without_token(batch, self.token_id)
        return type(batch)(kept) if not isinstance(batch, dict) else kept

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


class _Loaded(SavedModel):
    """A model in memory that captions and answers."""

    def __init__(self, model, processor, without: bool, batch_size: int = 128):
        self.model, self.batch_size = model.eval(), batch_size
        self.processor = _Without(processor, model.config.align_token_id) if without else processor


# ---- small helpers ----


def _mean(values) -> float:
    return sum(values) / len(values)


def _spread(values) -> float:
    center = _mean(values)
    return (sum((value - center) ** 2 for value in values) / len(values)) ** 0.5


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what the commands print from standing between the progress."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
