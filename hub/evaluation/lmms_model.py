"""
An AlignGPT as lmms-eval runs it (`--model aligngpt`). Model arguments, besides lmms-eval's own:

    pretrained=ID,revision=SHA,dtype=bfloat16,align_level=7,align_mode=gate,attn_implementation=sdpa,answers=FILE.jsonl

`answers` keeps each answer with its prompt and gate weights as soon as it is there; a run that was stopped and is
started again answers what is missing.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from modeling_aligngpt import ALIGN_MODES, AlignGPTForConditionalGeneration, AlignGPTProcessor


DTYPES = ("auto", "float32", "bfloat16", "float16")
# of a task's generation settings, what `generate` takes; the others are of other models
_GENERATION = ("max_new_tokens", "min_new_tokens", "num_beams", "temperature", "top_p", "top_k", "repetition_penalty")


class AlignGPTLmms(lmms):
    """
    See the module.

    Args:
        pretrained (`str`): folder or Hub id. revision (`str`, *optional*): branch, tag or commit on the Hub.
        dtype (`str`): of the weights. device (`str`, *optional*): the GPU where there is one.
        batch_size (`int`): prompts answered at once.
        align_level (`int`, *optional*): 0-based level that every answer is steered to.
        align_mode (`str`, *optional*): the alignment vector, in place of what the model's config says.
        attn_implementation (`str`, *optional*): as in transformers.
        answers (`str`, *optional*): a JSON-lines file that keeps the answers; see the module.

    Raises:
        ValueError: unknown or impossible arguments, or a file of answers that were given in another way.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        align_level: int | None = None,
        align_mode: str | None = None,
        attn_implementation: str | None = None,
        answers: str | None = None,
        **kwargs,
    ):
        super().__init__()
        if kwargs:
            raise ValueError(f"unknown model argument(s) of aligngpt: {', '.join(sorted(kwargs))}.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")
        if align_mode is not None and align_mode not in ALIGN_MODES:
            raise ValueError(f"align_mode={align_mode!r} is not one of {', '.join(ALIGN_MODES)}.")
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        revision = None if revision is None else str(revision)
        self.model = AlignGPTForConditionalGeneration.from_pretrained(
            pretrained,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
        )
        self.model.to(self.device).eval()
        self.processor = AlignGPTProcessor.from_pretrained(pretrained, revision=revision)
        config = self.model.config
        self.processor.validate_with(config)
        levels = config.num_align_levels
        if align_level is not None and not 0 <= align_level < levels:
            raise ValueError(f"align_level={align_level} is not in 0..{levels - 1}, the model's levels (0-based).")
        self.align_level = align_level
        config.align_mode = align_mode or config.align_mode
        self.identity = {
            "model": pretrained if not Path(pretrained).is_dir() else Path(pretrained).resolve().name,
            "revision": getattr(config, "_commit_hash", None),
            "weights": None if getattr(config, "_commit_hash", None) else hash_weights(pretrained),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "align_level": align_level,
            "align_mode": config.align_mode,
            # of each answer's `align_weights`
            "num_align_levels": levels,
        }
        self.store: AnswerStore | None = None
        if answers:
            self.keep_answers(answers)

    def keep_answers(self, path: str | os.PathLike):
        """Keep answers in a file from now on, and take those that it holds already."""
        self.store = AnswerStore(path, self.identity, self._rank)

    def clean(self):
        """Nothing: lmms-eval would drop the weights after each task."""

    # ---- answering ----

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests; prompts of like length share a batch."""
        answers: list[str | None] = [None] * len(requests)
        waiting: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            known = self.store.get(request_key(request)) if self.store else None
            if known is None:
                settings = json.dumps(request.args[2], sort_keys=True, default=str)
                waiting.setdefault(settings, []).append(index)
            else:
                answers[index] = known["answer"]
        total = sum(map(len, waiting.values()))
        bar = tqdm(total=len(requests), initial=len(requests) - total, desc="answers", disable=self._rank != 0)
        for indices in waiting.values():
            # the longest first: what does not fit into memory fails at once
            indices.sort(key=lambda index: -len(requests[index].args[0]))
            for chosen in _chunks(indices, self.batch_size):
                for index, row in zip(chosen, self._answer([requests[index] for index in chosen]), strict=True):
                    answers[index] = row["answer"]
                    if self.store:
                        self.store.add(row)
                bar.update(len(chosen))
        bar.close()
        return [answer or "" for answer in answers]

    def _answer(self, requests: Sequence[Instance]) -> list[dict[str, Any]]:
        """One batch: for each request what is kept of it."""
        chats, images = [], []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            messages, found = read_messages(doc_to_messages(self.task_dict[task][split][doc_id]))
            chats.append(messages)
            images += found
        texts = self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        # the templates write BOS themselves
        inputs = self.processor(
            text=texts,
            images=images or None,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        settings, stops = generation_settings(requests[0].args[2])
        if self.align_level is not None:
            settings["align_level"] = self.align_level
        with torch.inference_mode():
            output = self.model.generate(**inputs, **settings, return_dict_in_generate=True)
        ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        written = self.processor.batch_decode(ids, skip_special_tokens=True)
        rows = []
        for request, text, answer, weights in zip(
            requests, texts, written, output.align_weights.float().tolist(), strict=True
        ):
            for stop in stops:
                answer = answer.split(stop)[0]
            rows.append(
                {
                    "key": request_key(request),
                    "task": request.args[4],
                    "doc_id": request.args[3],
                    "prompt": text,
                    "answer": answer.strip(),
                    "align_weights": [round(weight, 6) for weight in weights],
                }
            )
        return rows

    def loglikelihood(self, requests):
        raise NotImplementedError("aligngpt answers prompts; tasks that compare likelihoods are not supported.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("aligngpt answers single prompts; tasks of several rounds are not supported.")


def generation_settings(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's generation settings as `generate` takes them (greedy unless it samples), and the texts that end one."""
    settings = {name: given[name] for name in _GENERATION if given.get(name) is not None}
    settings.setdefault("max_new_tokens", 1024)
    settings["do_sample"] = bool(given.get("do_sample")) and settings.get("temperature", 1) > 0
    if not settings["do_sample"]:
        for name in ("temperature", "top_p", "top_k"):
            settings.pop(name, None)
    until = given.get("until") or []
    return settings, [until] if isinstance(until, str) else list(until)


def read_messages(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list]:
    """lmms-eval's messages as chat templates take them, and their images in reading order."""
    chat, images = [], []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(part["url"])
                parts.append({"type": "image"})
            elif part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                raise ValueError(f"The task's prompt holds {part['type']!r}: AlignGPT reads images and text.")
        chat.append({"role": message["role"], "content": parts})
    return chat, images


def request_key(request: Instance) -> str:
    """What tells a request from all others: task, document, prompt and generation settings."""
    context, _, settings, doc_id, task, split = request.args
    text = json.dumps([task, split, doc_id, context, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def hash_weights(folder: str | os.PathLike) -> str:
    """SHA-256 over a local model's weights and configuration."""
    digest = hashlib.sha256()
    for path in sorted([*Path(folder).glob("*.safetensors"), Path(folder) / "config.json"]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class AnswerStore:
    """
    Answers in a JSON-lines file: a line that says how they were given, then one for each.

    Args:
        path: the file; processes after the first write beside it (`FILE.rank1`), and all read all.
        identity: how the answers are given.
        rank: of this process.

    Raises:
        ValueError: the file holds answers given in another way, or is no such file.
    """

    def __init__(self, path: str | os.PathLike, identity: dict[str, Any], rank: int = 0):
        base = Path(path)
        self.path = base if rank == 0 else base.with_name(f"{base.name}.rank{rank}")
        self.rows: dict[str, dict[str, Any]] = {}
        self.written: set[str] = set()
        for file in (base, *sorted(base.parent.glob(f"{base.name}.rank*"))):
            if file.is_file():
                self._read(file, identity, own=file == self.path)
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")

    def _read(self, file: Path, identity: dict[str, Any], own: bool):
        lines = file.read_text(encoding="utf-8").split("\n")
        if own and lines[-1]:
            # the last line of a run that was killed while it wrote
            file.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
        rows = [json.loads(line) for line in lines[:-1]]
        before = rows[0].get("identity") if rows else identity
        if before != identity:
            changed = sorted(name for name in identity if (before or {}).get(name) != identity[name])
            raise ValueError(
                f"{file.name} holds answers with another {', '.join(changed)}: "
                "give another output folder, or overwrite."
            )
        self.rows |= {row["key"]: row for row in rows[1:]}
        if own:
            self.written = {row["key"] for row in rows[1:]}

    def get(self, key: str) -> dict[str, Any] | None:
        """The kept row of a request."""
        return self.rows.get(key)

    def add(self, row: dict[str, Any]):
        """Keep a row, on disk at once."""
        self.rows[row["key"]] = row
        self.written.add(row["key"])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def merge(self):
        """Takes over what other processes have written, once they are done."""
        for file in sorted(self.path.parent.glob(f"{self.path.name}.rank*")):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
            for row in rows:
                if row["key"] not in self.written:
                    self.add(row)
            file.unlink()


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
