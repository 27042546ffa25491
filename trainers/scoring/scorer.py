"""How well an image and a text agree: scores from a dual encoder.

Scores are cosine similarities of CLIP-like models (paper, section 3.1); `cut_levels` makes levels of them, and stage 1
learns an embedding for each level.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from .config import DTYPES
from .levels import METHODS, cut_levels


__all__ = ["METHODS", "PairPreprocessor", "PairScorer", "cut_levels"]


class PairPreprocessor:
    """Images and texts -> tensors of a dual encoder. Holds no weights, so data-loader workers can have it.

    Args:
        scorer: folder or Hub id of a CLIP- or SigLIP-like model.
        config: its configuration.
        revision: its revision on the Hub.
        by_parts: texts that are longer than the text model takes are split between sentences, and not cut.
    """

    def __init__(self, scorer: str, config: Any, revision: str | None = None, by_parts: bool = False):
        self.by_parts = by_parts
        # the PIL backend, whatever is installed: the torchvision one gives other pixels, so other scores
        self.image_processor = AutoImageProcessor.from_pretrained(scorer, revision=revision, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(scorer, revision=revision)
        text_config = getattr(config, "text_config", config)
        self.max_length = min(text_config.max_position_embeddings, self.tokenizer.model_max_length)
        # SigLIP was trained on texts padded to the full length, without a mask
        self.is_siglip = config.model_type.startswith("siglip")

    def __call__(self, images: list, texts: list[str]) -> tuple[dict[str, Any], dict[str, Any], list[bool]]:
        """(image inputs, text inputs, whether each text was cut) of `batch` RGB images and texts.

        Texts are cut at the text model's length: 77 tokens for CLIP. With `by_parts` the text inputs hold `rows`
        `(parts,)`, the text that each part belongs to, and what is cut is a sentence of more than that length.
        """
        image_inputs = dict(self.image_processor(images=images, return_tensors="pt"))
        rows = None
        if self.by_parts:
            parts = [self.split(text) for text in texts]
            rows = [row for row, pieces in enumerate(parts) for _ in pieces]
            texts = [piece for pieces in parts for piece in pieces]
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
        if rows is not None:
            text_inputs["rows"] = torch.tensor(rows)
            cut = [any(c for c, r in zip(cut, rows, strict=True) if r == row) for row in range(len(images))]
        return image_inputs, text_inputs, cut

    def split(self, text: str) -> list[str]:
        """The text whole where it fits, else runs of its sentences that do."""
        pieces: list[str] = []
        for sentence in _sentences(text):
            joined = f"{pieces[-1]}{sentence}" if pieces else sentence
            if pieces and len(self.tokenizer(joined, verbose=False)["input_ids"]) > self.max_length:
                pieces.append(sentence.lstrip())
            else:
                pieces[-1:] = [joined]
        return pieces

    def describe(self) -> dict[str, Any]:
        """What is done to images and texts, for the record: size, crop, mean, deviation, filter, text length."""
        names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
        names += ("do_normalize", "image_mean", "image_std", "do_convert_rgb")
        settings = {key: value for key, value in self.image_processor.to_dict().items() if key in names}
        return {
            "image_processor": type(self.image_processor).__name__,
            **{key: settings[key] for key in names if settings.get(key) is not None},
            "max_text_tokens": self.max_length,
            "pad_text_to": self.max_length if self.is_siglip else None,
            **({"long_texts": "mean of their parts"} if self.by_parts else {}),
        }


class PairScorer:
    """Cosine similarity of images and texts under any CLIP- or SigLIP-like dual encoder.

    Args:
        scorer: folder or Hub id; needs the weights, the image processor and the tokenizer.
        revision: the revision on the Hub.
        dtype: of the weights: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: bfloat16 on a GPU, else float32.
        device: by default the GPU where there is one.
        by_parts: the score of a text that is longer than the text model takes is the mean of its parts' scores.

    Raises:
        ValueError: for a model that is no dual encoder or lacks a part, an unknown dtype.
    """

    def __init__(
        self,
        scorer: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        by_parts: bool = False,
    ):
        self.by_parts = by_parts
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
        self.name = str(scorer)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype == "auto":
            dtype = "float32" if self.device.type == "cpu" else "bfloat16"
        self.dtype = getattr(torch, dtype)
        self._load(revision)

    def _load(self, revision: str | None) -> None:
        try:
            self.model, loading = AutoModel.from_pretrained(
                self.name, revision=revision, dtype=self.dtype, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"scorer {self.name!r} cannot be loaded: {error}") from error
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            raise ValueError(
                f"scorer {self.name!r} is a {type(self.model).__name__}: it must encode images and texts into one "
                "space, as CLIPModel and SiglipModel do."
            )
        if loading["missing_keys"]:
            raise ValueError(
                f"scorer {self.name!r} lacks {len(loading['missing_keys'])} weights of {type(self.model).__name__}, "
                f"e.g. {min(loading['missing_keys'])}: it is not a complete dual encoder."
            )
        self.model.to(self.device).eval()
        try:
            self.preprocess = PairPreprocessor(self.name, self.model.config, revision, self.by_parts)
        except (OSError, ValueError) as error:
            raise ValueError(f"scorer {self.name!r} lacks its image processor or tokenizer: {error}") from error

    @torch.inference_mode()
    def score(self, image_inputs: dict[str, Any], text_inputs: dict[str, Any]) -> torch.Tensor:
        """[batch] float32 cosine similarities of prepared images and texts, pair by pair, still on the device."""
        image_features = _features(self.model.get_image_features(**self._to_device(image_inputs)))
        texts = self._to_device(text_inputs)
        rows = texts.pop("rows", None)
        text_features = _features(self.model.get_text_features(**texts))
        if rows is None:
            return torch.nn.functional.cosine_similarity(image_features, text_features, dim=-1)
        similarity = torch.nn.functional.cosine_similarity(image_features[rows], text_features, dim=-1)
        return similarity.new_zeros(len(image_features)).index_add(0, rows, similarity) / rows.bincount()

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
            "preprocessing": self.preprocess.describe(),
        }

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in inputs.items()
        }


def _sentences(text: str) -> list[str]:
    """The sentences of a text, each with the space in front of it; joined they are the text."""
    return [piece for piece in re.split(r"(?<=[.!?;\n])(?=\s)", text) if piece] or [text]


def _features(output: Any) -> torch.Tensor:
    """[batch, width] float32."""
    return output.pooler_output.float()


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
