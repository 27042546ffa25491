"""How well a picture and a text agree: scores from a dual encoder, and the cut of scores into alignment levels.

Scores are cosine similarities of CLIP-like models (paper, section 3.1); stage 1 learns an embedding for each level.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer


METHODS = ("uniform", "quantile", "edges")


def cut_levels(
    scores: Sequence[float] | np.ndarray,
    num_align_levels: int | None = None,
    method: str = "uniform",
    edges: Sequence[float] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts scores into levels.

    The paper ranks the pairs by score and divides them at "equally spaced intervals"; the authors' release holds
    finished levels and no code that made them. `"uniform"` is the literal reading and the default: intervals of one
    width between the lowest and the highest score, so that a level means the same distance everywhere and levels at
    both ends hold few pairs. `"quantile"` puts equally many pairs into each level. `"edges"` applies the edges of an
    earlier run, so that a level keeps its meaning across data sets scored by the same model.

    A level holds its lower edge and not its upper one; the top level holds both. With `"edges"`, scores below the
    first edge get level 0 and scores above the last one the top level.

    Args:
        scores: [num_pairs], finite.
        num_align_levels: N; by default 8, or what `edges` say.
        method: `"uniform"`, `"quantile"` or `"edges"`.
        edges: [N + 1], rising; for `"edges"` alone.

    Returns:
        levels: [num_pairs] int64, 0 (worst aligned) to N - 1.
        edges: [N + 1] float64.
        counts: [N] int64, pairs in each level.

    Raises:
        ValueError: no scores, a score that is not finite, all scores equal, ties that leave a quantile no room,
            unusable edges.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"Scores must be a non-empty list of numbers; got the shape {values.shape}.")
    broken = np.flatnonzero(~np.isfinite(values))
    if len(broken):
        raise ValueError(
            f"{len(broken)} of {len(values)} scores are not finite, the first in row {broken[0]} ({values[broken[0]]})"
            ": leave these rows out before cutting levels."
        )
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    if (edges is None) == (method == "edges"):
        raise ValueError('Give `edges` with method="edges", and only there.')
    bounds = (
        _check_edges(edges, num_align_levels)
        if edges is not None
        else _make_edges(values, 8 if num_align_levels is None else num_align_levels, method)
    )
    levels = np.searchsorted(bounds[1:-1], values, side="right").astype(np.int64)
    return levels, bounds, np.bincount(levels, minlength=len(bounds) - 1)


def _check_edges(edges: Sequence[float] | np.ndarray, num_align_levels: int | None) -> np.ndarray:
    bounds = np.asarray(edges, dtype=np.float64)
    if bounds.ndim != 1 or len(bounds) < 3 or not np.isfinite(bounds).all() or (np.diff(bounds) <= 0).any():
        raise ValueError(f"edges must be at least three finite numbers, each above the one before; got {edges}.")
    if num_align_levels is not None and num_align_levels != len(bounds) - 1:
        levels = len(bounds) - 1
        raise ValueError(f"{len(bounds)} edges make {levels} levels, but num_align_levels is {num_align_levels}.")
    return bounds


def _make_edges(values: np.ndarray, num_align_levels: int, method: str) -> np.ndarray:
    if num_align_levels < 2:
        raise ValueError(f"num_align_levels must be at least 2, not {num_align_levels}.")
    if values.min() == values.max():
        raise ValueError(
            f"All {len(values)} scores are {values[0]}: they cannot be cut into levels. Check scorer and captions."
        )
    if method == "uniform":
        bounds = np.linspace(values.min(), values.max(), num_align_levels + 1)
    else:
        bounds = np.quantile(values, np.linspace(0, 1, num_align_levels + 1))
    if (np.diff(bounds) <= 0).any():
        raise ValueError(
            f"{num_align_levels} {method} levels do not fit these {len(values)} scores: neighbouring edges coincide, "
            'because too many scores are equal. Use fewer levels, or method="uniform".'
        )
    return bounds


class PairPreprocessor:
    """Pictures and texts -> tensors of a dual encoder. Holds no weights, so data-loader workers can have it.

    Args:
        scorer: folder or Hub id of a CLIP- or SigLIP-like model.
        config: its configuration.
        revision: its revision on the Hub.
    """

    def __init__(self, scorer: str, config: Any, revision: str | None = None):
        # the PIL backend, whatever is installed: the torchvision one gives other pixels, so other scores
        self.image_processor = AutoImageProcessor.from_pretrained(scorer, revision=revision, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(scorer, revision=revision)
        text_config = getattr(config, "text_config", config)
        self.max_length = min(text_config.max_position_embeddings, self.tokenizer.model_max_length)
        # SigLIP was trained on texts padded to the full length, without a mask
        self.is_siglip = config.model_type.startswith("siglip")

    def __call__(self, images: list, texts: list[str]) -> tuple[dict[str, Any], dict[str, Any], list[bool]]:
        """(picture inputs, text inputs, whether each text was cut) of `batch` RGB pictures and texts.

        Texts are cut at the text model's length: 77 tokens for CLIP.
        """
        image_inputs = dict(self.image_processor(images=images, return_tensors="pt"))
        text_inputs = self.tokenizer(
            texts,
            padding="max_length" if self.is_siglip else True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        if text_inputs.encodings:
            cut = [bool(encoding.overflowing) for encoding in text_inputs.encodings]
        else:  # a tokenizer written in Python
            cut = [len(ids) > self.max_length for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        text_inputs = dict(text_inputs)
        if self.is_siglip:
            text_inputs.pop("attention_mask", None)
        return image_inputs, text_inputs, cut


class PairScorer:
    """Cosine similarity of pictures and texts under any CLIP- or SigLIP-like dual encoder.

    Args:
        scorer: folder or Hub id; needs the weights, the image processor and the tokenizer.
        revision: the revision on the Hub.
        dtype: of the weights: `"float32"`, `"bfloat16"` or `"float16"`.
        device: by default the GPU where there is one.

    Raises:
        ValueError: for a model that is no dual encoder or lacks a part, an unknown dtype.
    """

    def __init__(self, scorer: str, *, revision: str | None = None, dtype: str = "float32", device: str | None = None):
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype!r}.")
        self.name, self.dtype = str(scorer), getattr(torch, dtype)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.model, loading = AutoModel.from_pretrained(
                self.name, revision=revision, dtype=self.dtype, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"scorer {self.name!r} cannot be loaded: {error}") from error
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            raise ValueError(
                f"scorer {self.name!r} is a {type(self.model).__name__}: it must encode pictures and texts into one "
                "space, as CLIPModel and SiglipModel do."
            )
        if loading["missing_keys"]:
            raise ValueError(
                f"scorer {self.name!r} lacks {len(loading['missing_keys'])} weights of {type(self.model).__name__}, "
                f"e.g. {min(loading['missing_keys'])}: it is not a complete dual encoder."
            )
        self.model.to(self.device).eval()
        try:
            self.preprocess = PairPreprocessor(self.name, self.model.config, revision)
        except (OSError, ValueError) as error:
            raise ValueError(f"scorer {self.name!r} lacks its image processor or tokenizer: {error}") from error

    @torch.inference_mode()
    def score(self, image_inputs: dict[str, Any], text_inputs: dict[str, Any]) -> np.ndarray:
        """[batch] float32 cosine similarities of prepared pictures and texts, pair by pair."""
        image_features = _features(self.model.get_image_features(**self._to_device(image_inputs)))
        text_features = _features(self.model.get_text_features(**self._to_device(text_inputs)))
        return torch.nn.functional.cosine_similarity(image_features, text_features, dim=-1).cpu().numpy()

    def score_pairs(self, images: list, texts: list[str]) -> np.ndarray:
        """[batch] float32 cosine similarities of RGB pictures and texts, pair by pair."""
        return self.score(*self.preprocess(images, texts)[:2])

    def identity(self) -> dict[str, Any]:
        """What makes the scores: the model's name, Hub revision or weights' hash, dtype and preprocessing."""
        revision = getattr(self.model.config, "_commit_hash", None)
        folder = Path(self.name)
        return {
            "scorer": self.name if revision else folder.resolve().name,
            "revision": revision,
            "sha256": _hash_weights(folder) if folder.is_dir() else None,
            "architecture": type(self.model).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "image_processor": type(self.preprocess.image_processor).__name__,
            "max_text_tokens": self.preprocess.max_length,
        }

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in inputs.items()
        }


def _features(output: Any) -> torch.Tensor:
    """[batch, width] float32: transformers 5 returns an output object here, transformers 4 the tensor itself."""
    return (output if isinstance(output, torch.Tensor) else output.pooler_output).float()


def _hash_weights(folder: Path) -> str:
    """SHA-256 over a local model's weights, configuration, image processor and tokenizer files."""
    digest = hashlib.sha256()
    suffixes = {".safetensors", ".bin", ".json", ".txt", ".model"}
    for path in sorted(path for path in folder.iterdir() if path.suffix in suffixes):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
