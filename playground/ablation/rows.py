"""The rows of an ablation's seed: its world with scores, and what each variant trains on."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aligngpt_shared.files import new_folder

from ..captions import DESCRIBE, KINDS
from ..world import make_pairs, parts_path, write_world
from .variants import PretrainVariant, Settings, Variant


BOTH = "clip+"
NOISY_SEED = 500
"""Added to the seed of a world for its noisy descriptions, which are about other images than its pairs."""


def make_world(folder: Path, seed: int, settings: Settings, parts: str | None) -> Path:
    """The seed's pairs with scores and its instruction data, and held-out rows that all seeds share."""
    from datasets import Dataset

    world = folder / "world"
    if not world.is_dir():
        with new_folder(world, replace=True) as beside:
            write_world(beside / "data", settings.pairs, settings.conversations, 1, 1, seed, progress=False)
            write_world(beside / "heldout", 1, 1, settings.heldout, settings.heldout, seed=0, progress=False)
            noisy = Dataset.from_list(make_pairs(settings.conversations, NOISY_SEED + seed))
            noisy.save_to_disk(str(beside / "data" / "noisy"))
            for name in ("pairs", "noisy"):
                score(beside / "data" / name, part(parts, "clip"), beside / f"scored-{name}")
    return world


def part(parts: str | None, name: str) -> Path:
    return Path(parts) / name if parts else parts_path(name)


def score(dataset: Path, scorer: Path, output: Path) -> Path:
    """Scores a folder of pairs, unless that is done."""
    from aligngpt_trainers import ScoreConfig, score_dataset

    if not output.is_dir():
        split = "train" if (dataset / "dataset_dict.json").is_file() else None
        config = ScoreConfig(
            dataset=str(dataset),
            dataset_split=split,
            scorer=str(scorer),
            output=str(output),
            batch_size=256 if scorer.name == "clip" else 64,
            device="cpu",
        )
        with silent():
            score_dataset(config)
    return output


def truly_scored(drawn, scored):
    """Scored rows with what the world knows of them in place of their scores: the kind of each caption, exact the best.

    Args:
        drawn: rows with `caption` and `kind`, or a `DatasetDict` with them in `train`.
        scored: the same rows in the same order with `clip_score`.

    Raises:
        ValueError: the rows are others.
    """
    drawn = drawn["train"] if isinstance(drawn, dict) else drawn
    if drawn["caption"][:] != [row[-1]["content"][0]["text"] for row in scored["messages"][:]]:
        raise ValueError("the scored rows are not those that were drawn: their captions differ")
    scores = [1 - KINDS.index(kind) / (len(KINDS) - 1) for kind in drawn["kind"][:]]
    return scored.remove_columns("clip_score").add_column("clip_score", scores)


def added_scores(by_clip, judged, pairs: tuple[Any, Any] | None = None):
    """Rows with the mean of two scores, each standardised: what `aligngpt score --add_score` writes.

    Args:
        by_clip, judged: the same rows with `clip_score` of either.
        pairs: two such sets that the rows are standardised by; by default their own.
    """
    from aligngpt_trainers.scoring.combine import earlier_scores, standardized_mean

    facts = None if pairs is None else standardized_mean(*map(earlier_scores, pairs))[1]
    scores, _ = standardized_mean(earlier_scores(by_clip), earlier_scores(judged), facts)
    return judged.remove_columns("clip_score").add_column("clip_score", scores)


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
    levels, _, _ = cut_levels(scores, variant.num_align_levels, variant.binning)
    if variant.levels == "shuffled":
        levels = np.random.default_rng(seed).permutation(levels)
    rows = scored.remove_columns("align_level").add_column("align_level", levels.tolist())
    return best_rows(rows, variant.keep)


def best_rows(scored, keep: float):
    """The share `keep` of scored rows with the highest scores, in their order."""
    import numpy as np

    if keep == 1:
        return scored
    scores = np.asarray(scored["clip_score"][:])
    best = np.argsort(-scores, kind="stable")[: round(keep * len(scores))]
    # written out, because a selection is encoded again at every step
    return scored.select(np.sort(best)).flatten_indices()


def noisy_rows(scored, variant: Variant, pairs_scored, num_align_levels: int, binning: str):
    """Scored descriptions as conversations; their levels are cut at the edges of stage 1's pairs.

    Args:
        scored: data set of descriptions with `clip_score`.
        variant: of stage 2; `keep` is applied.
        pairs_scored: the pairs of stage 1 with scores of the same scorer.
        num_align_levels, binning: how stage 1 cut them.
    """
    import numpy as np

    from aligngpt_trainers.scoring.scorer import cut_levels

    _, edges, _ = cut_levels(np.asarray(pairs_scored["clip_score"][:]), num_align_levels, binning)
    levels, _, _ = cut_levels(np.asarray(scored["clip_score"][:]), method="edges", edges=edges)
    messages = [
        [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": DESCRIBE}]},
            {"role": "assistant", "content": [{"type": "text", "text": row[-1]["content"][0]["text"]}]},
        ]
        for row in scored["messages"][:]
    ]
    rows = scored.remove_columns(["messages", "align_level"]).add_column("messages", messages)
    return best_rows(rows.add_column("align_level", levels.tolist()), variant.keep)


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


class Without:
    """A collator or processor whose batches hold no `<align>`: what LLaVA reads."""

    def __init__(self, inner, token_id: int):
        self.inner, self.token_id = inner, token_id

    def __call__(self, *args, **kwargs):
        batch = self.inner(*args, **kwargs)
        kept = without_token(batch, self.token_id)
        return type(batch)(kept) if not isinstance(batch, dict) else kept

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


class SometimesWithout:
    """A collator some of whose rows hold no `<align>`, drawn anew for each batch.

    Args:
        inner: makes the batches.
        processor: whose `<align>` and padding it is.
        share: of the rows, by chance.
        seed: of the draw.
    """

    def __init__(self, inner, processor, share: float, seed: int):
        import torch

        self.inner, self.share, self.rng = inner, share, torch.Generator().manual_seed(seed)
        self.token_id = processor.align_token_id
        self.padding = {"input_ids": processor.tokenizer.pad_token_id, "labels": -100}

    def __call__(self, rows):
        import torch

        batch = self.inner(rows)
        ids = batch["input_ids"]
        for row in torch.nonzero(torch.rand(len(ids), generator=self.rng) < self.share).flatten().tolist():
            keep = ids[row] != self.token_id
            for name, value in batch.items():
                if value.shape[:2] == ids.shape:
                    shorter = value[row][keep]
                    value[row] = torch.nn.functional.pad(
                        shorter, (0, len(keep) - len(shorter)), value=self.padding.get(name, 0)
                    )
        return batch

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep what the commands print from standing between the progress."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
