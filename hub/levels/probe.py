"""What a model does at each alignment level: captions of images, gate weights of questions, and their scores."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.images_aligngpt import read_image


GROUP_COLUMNS = ("type", "question_type", "category")
SPLITS = ("heldout", "test", "validation", "train")


class LevelProbe:
    """
    A loaded model.

    Args:
        model: folder or Hub id. revision, dtype, device: as in transformers.
        batch_size: rows at once.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int = 16,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = AlignGPTForConditionalGeneration.from_pretrained(
            model, revision=revision, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
        self.model.to(self.device).eval()
        self.processor = AlignGPTProcessor.from_pretrained(model, revision=revision)
        self.processor.validate_with(self.model.config)
        self.batch_size = batch_size

    @property
    def num_align_levels(self) -> int:
        return self.model.config.num_align_levels

    @property
    def is_pretrained_only(self) -> bool:
        """Whether the model has been through stage 1 alone, whose prompt is the image."""
        return self.model.config.training_stage == "pretrain"

    def captions(self, images: Sequence, prompt: str, max_new_tokens: int) -> list[list[str]]:
        """
        Greedy captions at every level, `[images][levels]`: of stage 1's format after stage 1, else the answer to
        `prompt`.
        """
        levels = range(self.num_align_levels)
        rows = [(image, level) for image in images for level in levels]
        plain = self.is_pretrained_only
        content = [{"type": "image"}] + ([] if plain else [{"type": "text", "text": prompt}])
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            **({"chat_template": CHAT_TEMPLATES["plain"]} if plain else {}),
        )
        written: list[str] = []
        for batch in _batches(rows, self.batch_size, "captions"):
            inputs = self._inputs([text] * len(batch), [[image] for image, _ in batch])
            with torch.inference_mode():
                ids = self.model.generate(
                    **inputs,
                    align_level=torch.tensor([level for _, level in batch], device=self.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                )
            answers = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            # stage 1 ends a caption with a line break
            written += [(answer.split("\n")[0] if plain else answer).strip() for answer in answers]
        width = self.num_align_levels
        return [written[start : start + width] for start in range(0, len(written), width)]

    def gate_weights(
        self, questions: Sequence[tuple[str, Sequence]], others: Sequence[torch.nn.Module] = ()
    ) -> tuple[list[list[float]], list[np.ndarray]]:
        """
        Gate weights of (question, images), `[questions][N - 1]`, and those that each of `others`, gates like the
        model's, gives for what the model's own gate reads, `(questions, N - 1)`.
        """
        weights: list[list[float]] = []
        read: list[torch.Tensor] = []
        hook = self.model.model.align_gate.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        foreign: list[list[torch.Tensor]] = [[] for _ in others]
        for batch in _batches(questions, self.batch_size, "questions"):
            inputs = self._inputs(self._texts(batch), [list(shown) for _, shown in batch])
            with torch.inference_mode():
                weights += self.model(**inputs, logits_to_keep=1).align_weights[:, :-1].float().tolist()
                numbers = [len(shown) for _, shown in batch]
                for found, gate in zip(foreign, others, strict=True):
                    of_images = gate(read[-1]).float().softmax(-1)
                    # a row with several images gets the mean of their weights
                    found += [each.mean(0) for each in of_images.split(numbers)]
            read.clear()
        hook.remove()
        return weights, [torch.stack(found).cpu().numpy() for found in foreign]

    def answers(self, questions: Sequence[tuple[str, Sequence]], level: int | None, max_new_tokens: int) -> list[str]:
        """Greedy answers to (question, images), as the model gives them by itself or at a level."""
        written: list[str] = []
        name = "own answers" if level is None else f"answers at level {level}"
        for batch in _batches(questions, self.batch_size, name):
            inputs = self._inputs(self._texts(batch), [list(shown) for _, shown in batch])
            steered = {} if level is None else {"align_level": level}
            with torch.inference_mode():
                ids = self.model.generate(**inputs, **steered, max_new_tokens=max_new_tokens, do_sample=False)
            written += self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in written]

    def losses(self, question: str, shown: Sequence, answer: str) -> tuple[list[float], int]:
        """Loss of an answer (sum over its tokens) at each level and, last, as the model mixes them; its tokens."""
        content = [{"type": "image", "image": shown[0]}, {"type": "text", "text": question}]
        chat = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        inputs = self.processor.apply_chat_template(
            [chat], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        ).to(self.device)
        answers = torch.as_tensor(inputs.pop("assistant_masks"), device=self.device).bool()
        inputs["labels"] = inputs["input_ids"].masked_fill(~answers, -100)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        tokens = int(answers[:, 1:].sum())
        with torch.inference_mode():
            found = [self.model(**inputs, align_level=level).loss for level in range(self.num_align_levels)]
            # the gate reads what stands in front of the answer, whatever its context
            found.append(self.model(**inputs, prompt_mask=inputs["labels"] == -100).loss)
        return [float(loss) * tokens for loss in found], tokens

    def _texts(self, questions: Sequence[tuple[str, Sequence]]) -> list[str]:
        chats = [
            [{"role": "user", "content": [{"type": "image"}] * len(shown) + [{"type": "text", "text": question}]}]
            for question, shown in questions
        ]
        return self.processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)

    def _inputs(self, texts: list[str], images: list[list]):
        inputs = self.processor(
            text=texts,
            images=images,
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the templates write BOS themselves
            return_tensors="pt",
        ).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs


class DualEncoder:
    """
    A CLIP- or SigLIP-like model that puts images and texts into one space.

    Args:
        scorer: folder or Hub id.
        device, batch_size: as above.
    """

    def __init__(self, scorer: str, device: str | None = None, batch_size: int = 64):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.model = AutoModel.from_pretrained(scorer).to(self.device).eval()
            self.image_processor = AutoImageProcessor.from_pretrained(scorer, backend="pil")
            self.tokenizer = AutoTokenizer.from_pretrained(scorer)
        except (OSError, ValueError) as error:
            raise ValueError(f"--scorer {scorer} cannot be loaded: {error}") from error
        if not hasattr(self.model, "get_text_features"):
            raise ValueError(
                f"--scorer {scorer} is a {type(self.model).__name__}: a CLIP- or SigLIP-like one is needed."
            )
        text_config = getattr(self.model.config, "text_config", self.model.config)
        self.max_length = min(text_config.max_position_embeddings, self.tokenizer.model_max_length)
        self.padding = "max_length" if self.model.config.model_type.startswith("siglip") else True
        self.batch_size = batch_size

    def images(self, images: Sequence) -> np.ndarray:
        """[images, width] of unit length."""

        def encode(batch):
            inputs = self.image_processor(images=[read_image(image) for image in batch], return_tensors="pt")
            return self.model.get_image_features(**inputs.to(self.device))

        return self._encode(images, encode, "images")

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, width] of unit length."""

        def encode(batch):
            inputs = self.tokenizer(
                list(batch), padding=self.padding, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            inputs.pop("token_type_ids", None)
            if self.padding == "max_length":
                inputs.pop("attention_mask", None)
            return self.model.get_text_features(**inputs.to(self.device))

        return self._encode(texts, encode, "texts")

    def _encode(self, items: Sequence, encode: Callable, name: str) -> np.ndarray:
        found = []
        for batch in _batches(items, self.batch_size, name):
            with torch.inference_mode():
                output = encode(batch)
            features = output if isinstance(output, torch.Tensor) else output.pooler_output
            found.append(torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy())
        return np.concatenate(found)


def caption_measures(
    captions: list[list[str]],
    images: Sequence,
    rows: Sequence[dict[str, Any]],
    encoder: DualEncoder | None,
    correct: Callable[[str, dict[str, Any]], dict[str, bool]] | None,
) -> dict[str, np.ndarray]:
    """
    Measures of captions, each [images, levels]: `words`; with an encoder `CLIP score` (cosine) and `self-retrieval`
    (1 where the caption finds its own image first among all, as in NoC, arXiv 2212.13563); with `correct` what that
    says.
    """
    levels = len(captions[0])
    measures: dict[str, np.ndarray] = {
        "words": np.array([[len(text.split()) for text in of_image] for of_image in captions], dtype=float)
    }
    if encoder is not None:
        shown = encoder.images(images)
        written = encoder.texts([text for of_image in captions for text in of_image])
        similarity = written.reshape(len(captions), levels, -1) @ shown.T  # [images, levels, images]
        own = np.arange(len(captions))
        measures["CLIP score"] = similarity[own, :, own]
        others = similarity.copy()
        others[own, :, own] = -np.inf
        # of equal ones the own image comes last: a caption that fits all finds none
        measures["self-retrieval"] = (measures["CLIP score"] > others.max(-1)).astype(float)
    if correct is not None:
        judged = [[correct(text, row) for text in of_image] for of_image, row in zip(captions, rows, strict=True)]
        for name in judged[0][0]:
            measures[name] = np.array([[float(each[name]) for each in of_image] for of_image in judged])
    return measures


# ---- rows ----


def load_split(source: str, split: str | None = None):
    """
    Rows of a `save_to_disk` folder, a folder or file that `load_dataset` reads, or a Hub id.

    Raises:
        ValueError: it cannot be loaded, or there is no such split.
    """
    import datasets

    path = Path(source)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(source)
        else:
            found = datasets.load_dataset(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {source} cannot be loaded ({type(error).__name__}: {error}).") from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    chosen = split or next((name for name in SPLITS if name in found), None) or next(iter(found))
    if chosen not in found:
        raise ValueError(f"--data {source} has no split {chosen!r} but {', '.join(found)}.")
    return found[chosen]


def questions_of(row: dict[str, Any], name: str) -> Iterable[tuple[str, Sequence, str, str | None]]:
    """(question, images, group, answer if any) of a conversation: each user turn alone, with the row's images."""
    images, messages = row.get("images") or [], row["messages"]
    asked = [(message, answer) for message, answer in zip(messages, [*messages[1:], {}], strict=True)
             if message["role"] == "user"]  # fmt: skip
    kinds = row.get("types") or []
    own = next((str(row[column]) for column in GROUP_COLUMNS if row.get(column) is not None), name)
    for turn, (message, answer) in enumerate(asked):
        text = _text_of(message)
        if text and images:
            told = _text_of(answer) if answer.get("role") == "assistant" else None
            yield text, images, str(kinds[turn]) if turn < len(kinds) else own, told


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    parts = [{"text": content}] if isinstance(content, str) else content
    return "".join(part.get("text") or "" for part in parts)


def image_of(row: dict[str, Any]):
    """The image of a row with `image` or one of `images`; None when there is none."""
    return row["image"] if row.get("image") is not None else next(iter(row.get("images") or []), None)


def read_answers(path: str | Path) -> tuple[list[list[float]], list[str]]:
    """
    Gate weights and task names of the answers that `aligngpt evaluate` kept (`answers-TASK.jsonl`).

    Raises:
        ValueError: no such file, or a line that is no answer.
    """
    weights, names = [], []
    # files of before all N shares were kept hold the local levels alone, and do not say how many levels there are
    local = None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--answers {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if "server" in row.get("identity", {}):
                raise ValueError("a server gave these, which tells no weights: answer with --backend transformers")
            if "identity" in row:
                levels = row["identity"].get("num_align_levels")
                local = None if levels is None else levels - 1
                continue
            weights.append([float(weight) for weight in row["align_weights"]][:local])
            names.append(row["task"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--answers {path}, line {number}: no answer of `aligngpt evaluate` ({error}).") from error
    return weights, names


def _batches(items: Sequence, size: int, name: str) -> Iterable[Sequence]:
    for start in tqdm(range(0, len(items), size), desc=name, unit="batch"):
        yield items[start : start + size]
