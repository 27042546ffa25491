"""What the ablation compares: kinds of stage 1, of instruction data, and of the alignment vector of stage 2."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PretrainVariant:
    """A stage 1.

    Args:
        num_align_levels: N.
        levels: `"score"`: cut from the scores; `"shuffled"`: the same levels dealt out at random, so that there are as
            many of each and none says anything; `"none"`: no `<align>` token in any row, as in LLaVA.
        keep: share of the pairs, the best by score, that is trained on (as many steps as with all of them).
        binning: how levels are cut, see `cut_levels`.
        scorer: what scores the pairs: `"clip"`; `"truth"`, the kind of caption that was drawn, which nobody has outside
            such a world: what better scores could be worth at most; the model of a stage 1, the judge, by its key in
            `PRETRAINS`; or `"clip+"` and such a key: both scores added (`aligngpt score --add_score`).
    """

    num_align_levels: int = 8
    levels: str = "score"
    keep: float = 1.0
    binning: str = "uniform"
    scorer: str = "clip"


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Args:
        name: shown.
        pretrain: its stage 1, a key of `PRETRAINS`.
        align_mode: the alignment vector of stage 2.
        group: what it is for.
        data: instruction data: `"clean"` (questions, all answered rightly) or `"noisy"` (descriptions that fit their
            images to different degrees, which nothing in the prompt tells).
        keep: share of the noisy rows, the best by score, that is trained on (as many steps as with all of them).
        scorer: of the noisy rows, as in `PretrainVariant`.
        without_level: share of the rows that are trained on without an alignment vector, as a model that is to answer
            without its condition as well would be.
    """

    name: str
    pretrain: str
    align_mode: str
    group: str
    data: str = "clean"
    keep: float = 1.0
    scorer: str = "clip"
    without_level: float = 0.0


PRETRAINS = {
    "levels-8": PretrainVariant(8),
    "none": PretrainVariant(8, levels="none"),
    "filtered": PretrainVariant(8, levels="none", keep=0.5),
    "shuffled-8": PretrainVariant(8, levels="shuffled"),
    "quantile-8": PretrainVariant(8, binning="quantile"),
    "judged-8": PretrainVariant(8, scorer="levels-8"),
    "judged-filtered": PretrainVariant(8, levels="none", keep=0.5, scorer="levels-8"),
    "added-8": PretrainVariant(8, scorer="clip+levels-8"),
    "added-filtered": PretrainVariant(8, levels="none", keep=0.5, scorer="clip+levels-8"),
    "levels-4": PretrainVariant(4),
    "levels-6": PretrainVariant(6),
    "levels-10": PretrainVariant(10),
}
VARIANTS = (
    Variant("gate + global, N = 8", "levels-8", "gate", "method"),
    Variant("no alignment", "none", "global", "baseline"),
    Variant("best half by CLIP", "filtered", "global", "baseline"),
    Variant("best half by the judge", "judged-filtered", "global", "judge"),
    Variant("levels by the judge", "judged-8", "gate", "judge"),
    Variant("best half by CLIP and the judge", "added-filtered", "global", "judge"),
    Variant("levels by CLIP and the judge", "added-8", "gate", "judge"),
    Variant("quantile levels", "quantile-8", "gate", "number"),
    Variant("shuffled levels", "shuffled-8", "gate", "control"),
    Variant("local only", "levels-8", "local", "vector"),
    Variant("global only", "levels-8", "global", "vector"),
    Variant("mean of all levels", "levels-8", "mean", "vector"),
    Variant("random level table", "levels-8", "random", "control"),
    Variant("N = 4", "levels-4", "gate", "number"),
    Variant("N = 6", "levels-6", "gate", "number"),
    Variant("N = 10", "levels-10", "gate", "number"),
    Variant("noisy: gate + global", "levels-8", "gate", "method", "noisy"),
    Variant("noisy: no alignment", "none", "global", "baseline", "noisy"),
    Variant("noisy: global only", "levels-8", "global", "vector", "noisy"),
    Variant("noisy: each row's level", "levels-8", "level", "scored", "noisy"),
    Variant("noisy: each row's quantile level", "quantile-8", "level", "scored", "noisy"),
    Variant("noisy: each row's level, N = 4", "levels-4", "level", "scored", "noisy"),
    Variant("noisy: each row's level, N = 10", "levels-10", "level", "scored", "noisy"),
    Variant("noisy: best half by CLIP", "levels-8", "gate", "baseline", "noisy", 0.5),
    Variant("noisy: level of the best half", "levels-8", "level", "scored", "noisy", 0.5),
    Variant("noisy: level by the judge", "levels-8", "level", "judge", "noisy", scorer="levels-8"),
    Variant("noisy: best half by the judge", "levels-8", "gate", "judge", "noisy", 0.5, "levels-8"),
    Variant("noisy: level by CLIP and the judge", "levels-8", "level", "judge", "noisy", scorer="clip+levels-8"),
    Variant("noisy: best half by CLIP and the judge", "levels-8", "gate", "judge", "noisy", 0.5, "clip+levels-8"),
    Variant("noisy: level by the truth", "levels-8", "level", "truth", "noisy", scorer="truth"),
    Variant("noisy: best half by the truth", "levels-8", "gate", "truth", "noisy", 0.5, "truth"),
    Variant("noisy: each row's level, a fifth without", "levels-8", "level", "scored", "noisy", without_level=0.2),
)
"""The first of each kind of data is the paper's method, which the others are compared with."""


@dataclass(frozen=True)
class Settings:
    """What the figures depend on; a folder holds runs of one of these.

    Args:
        pairs, pretrain_steps, pretrain_learning_rate, image_token_penalty: of stage 1.
        conversations, instruct_learning_rate: of stage 2.
        heldout: images of either kind that are captioned and asked about.
        batch_size: rows of a step.
        instruct_batch_size: rows of a step of stage 2, which sees as many rows in all; 0: as in stage 1.
        parts: name of the folder with the tiny parts.
        instruct_epochs: how often stage 2 sees its rows.
        lora_r: rank of LoRA adapters of the language model in stage 2; 0 trains it whole.
        bf16: products in bfloat16.
    """

    pairs: int
    pretrain_steps: int
    conversations: int
    heldout: int
    batch_size: int = 32
    instruct_batch_size: int = 0
    instruct_epochs: int = 1
    pretrain_learning_rate: float = 4e-3
    image_token_penalty: float = 0.1
    instruct_learning_rate: float = 1e-3
    parts: str = "package"
    lora_r: int = 0
    bf16: bool = False


def run_path(output: Path, seed: int, variant: Variant) -> Path:
    """Where a finished run is kept."""
    slug = "-".join("".join(char if char.isalnum() else " " for char in variant.name).split())
    return output / f"seed-{seed}" / "runs" / f"{slug}.json"
