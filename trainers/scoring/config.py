"""The settings of `aligngpt score`."""

import json
import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from aligngpt_shared.records import ALIGNMENT

from .levels import METHODS, QUANTILES, checked_quantiles


logger = logging.getLogger(__name__)

SAMPLING = ("all", "balanced")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ScoreConfig:
    """Settings of `aligngpt score`.

    The score of a pair is the cosine similarity of its image and its caption under the scorer, or what a column of
    the data holds; levels are cut from the scores by `binning` (see `levels.cut_levels`).
    """

    dataset: str = field(
        metadata={
            "aliases": ["--dataset_name", "--dataset-name"],
            "help": "A LLaVA JSON/JSONL, CSV, TSV or parquet file, a folder, or a Hub id of image-text pairs.",
        }
    )
    output: str = field(metadata={"help": "Folder to write: a data set for `load_from_disk` and alignment.json."})
    scorer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the dual encoder (CLIP, SigLIP, VisionTextDualEncoder) that scores."},
    )
    from_column: str | None = field(
        default=None,
        metadata={
            "help": "In place of a scorer: a column of numbers that the rows have already (a rating, another tool's "
            "similarity); `a.b` reaches into nested ones, of a list the mean is taken."
        },
    )
    lower_is_better: bool = field(
        default=False, metadata={"help": "With from_column: small numbers are good; clip_score holds them negated."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split; by default train, or the only one."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub data set."})
    image_folder: str | None = field(
        default=None, metadata={"help": "What relative image paths start from; by default the data file's folder."}
    )
    columns: dict[str, str] | str | None = field(
        default=None, metadata={"help": "The data's names of columns by ours, `image=img,text=alt`, or a mapping."}
    )
    conversations: bool = field(
        default=False,
        metadata={
            "help": "Score conversations of stage 2: all answers of a row by its image, long ones in parts; rows "
            "without an image are kept and have no level."
        },
    )
    on_bad_row: str = field(
        default="raise",
        metadata={"help": "raise: refuse unusable rows and images; skip: leave them out, count and list them."},
    )
    scorer_revision: str | None = field(default=None, metadata={"help": "Revision of a scorer on the Hub."})
    num_align_levels: int | None = field(
        default=None, metadata={"help": "Number of alignment levels N; by default 8, or what `edges` say."}
    )
    binning: str = field(
        default="uniform",
        metadata={
            "help": "uniform: intervals of equal width between the lowest and the highest score; robust: between two "
            "`quantiles`; quantile: equally many pairs; values: whole numbers as they are (1 to 5 are five levels); "
            "edges: those of `edges`."
        },
    )
    quantiles: list[float] | None = field(
        default=None,
        metadata={
            "help": "For binning=robust: between which quantiles the intervals lie, by default 0.01 0.99; scores "
            "outside go to the end levels."
        },
    )
    edges: list[str] | None = field(
        default=None,
        metadata={"help": "For binning=edges: the N+1 edges, or the alignment.json (or folder) of an earlier run."},
    )
    min_score: float | None = field(
        default=None, metadata={"help": "Leave out pairs that score below this, before the levels are cut."}
    )
    keep: float | None = field(
        default=None,
        metadata={
            "help": "Share of the scored pairs to keep, the best by score (0.5: the better half); they have the levels "
            "that the cut of all pairs gives."
        },
    )
    sampling: str = field(
        default="all",
        metadata={"help": "all: every pair; balanced: equally many pairs of each level, drawn without replacement."},
    )
    samples_per_level: int | None = field(
        default=None,
        metadata={"help": "For sampling=balanced: pairs to keep of each level; by default what the smallest holds."},
    )
    seed: int = field(default=0, metadata={"help": "Of the draw of sampling=balanced."})
    batch_size: int = field(default=128, metadata={"help": "Pairs encoded at once."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Of the scorer: float32, bfloat16, float16; auto: bfloat16 on a GPU, float32 on a CPU."},
    )
    device: str | None = field(default=None, metadata={"help": "By default the GPU where there is one, else cpu."})
    num_workers: int | None = field(
        default=None, metadata={"help": "Processes that decode images, for each process that scores."}
    )
    shard_size: int = field(default=2048, metadata={"help": "Pairs after which progress is kept."})
    embed_images: bool = field(
        default=True, metadata={"help": "Copy the images into the output; false keeps their paths."}
    )
    json_output: str | None = field(
        default=None, metadata={"help": "Also write this LLaVA JSON file, the level as `similarity`."}
    )
    parquet_output: str | None = field(
        default=None,
        metadata={
            "help": "Also write this parquet file: columns `images` and `messages` as TRL reads them, with scores."
        },
    )
    as_text: bool = field(
        default=False,
        metadata={
            "help": "In json_output and parquet_output, also write the level as text behind the image (`fit: 7`): for "
            "trainers and models that know no levels. Ask them with the top level."
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace an existing output, and kept progress of other settings."}
    )

    def __post_init__(self):
        choices = {"on_bad_row": ("raise", "skip"), "sampling": SAMPLING, "binning": METHODS, "dtype": DTYPES}
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, not {getattr(self, name)!r}.")
        if (self.scorer is None) == (self.from_column is None):
            raise ValueError("Give a scorer, or from_column where the rows have a score already: one of the two.")
        if self.as_text and not (self.json_output or self.parquet_output):
            raise ValueError("as_text changes json_output and parquet_output alone: give one of them.")
        if self.lower_is_better and self.from_column is None:
            raise ValueError("lower_is_better has no effect without from_column.")
        if (self.edges is not None) != (self.binning == "edges"):
            raise ValueError("`edges` and `binning: edges` belong together: give both or neither.")
        if self.binning == "robust":
            self.quantiles = checked_quantiles(QUANTILES if self.quantiles is None else self.quantiles)
        elif self.quantiles is not None:
            raise ValueError("quantiles have no effect without `binning: robust`.")
        for name in ("batch_size", "shard_size", "samples_per_level"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if self.samples_per_level is not None and self.sampling != "balanced":
            raise ValueError("samples_per_level has no effect without `sampling: balanced`.")
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise ValueError(f"min_score must be a number, not {self.min_score}.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep must be a share above 0 and at most 1, not {self.keep}.")
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError:
                raise ValueError(f"device={self.device!r} is none that torch knows: cpu, cuda, cuda:1, ...") from None
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, but is {self.num_workers}.")


def read_edges(config: ScoreConfig) -> tuple[list[float] | None, dict | None]:
    """(the edges as numbers, the record of the earlier run that they come from, if any)."""
    if config.edges is None:
        return None, None
    given = [config.edges] if isinstance(config.edges, (str, os.PathLike)) else list(config.edges)
    try:
        return [float(edge) for edge in given], None
    except (TypeError, ValueError):
        path = Path(given[0])
    path = path / ALIGNMENT if path.is_dir() else path
    if len(given) > 1 or not path.is_file():
        raise ValueError(f"edges {config.edges!r}: neither numbers nor an existing {ALIGNMENT}.")
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        return [float(edge) for edge in earlier["edges"]], earlier
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"edges: {path} is no {ALIGNMENT} of an earlier run ({type(error).__name__}: {error})."
        ) from error


def warn_of_other_scorer(earlier: dict | None, identity: dict):
    """Edges mean something only for the scorer that made the scores they were cut from."""
    if earlier is None:
        return
    if Path(str(earlier.get("scorer"))).name != Path(str(identity["scorer"])).name:
        logger.warning("The edges were made by scorer %s, not %s.", earlier.get("scorer"), identity["scorer"])
        return
    for name in ("sha256", "revision", "dtype", "preprocessing"):
        if earlier.get(name) and identity[name] and earlier[name] != identity[name]:
            logger.warning("The edges were made by the same scorer with another %s.", name)
