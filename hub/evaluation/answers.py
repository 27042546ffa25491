"""Answers of any AnsweringLmms to lmms-eval's requests, kept on disk as they come."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from .store import AnswerStore


# of a task's generation settings, what `generate` takes; the others are of other models
_GENERATION = ("max_new_tokens", "min_new_tokens", "num_beams", "temperature", "top_p", "top_k", "repetition_penalty")


class AnsweringLmms(lmms):
    """
    What lmms-eval calls, for whoever answers: subclasses set `identity` (how answers are given), `batch_size`,
    `accelerator`, and have `answer_batch`. A run that was stopped and is started again answers what is missing.
    """

    is_simple = False
    batch_size: int
    identity: dict[str, Any]
    accelerator: Any
    store: AnswerStore | None = None

    def answer_batch(self, requests: Sequence[Instance]) -> Iterator[dict[str, Any]]:
        """For each request, in any order as answers come, the row of [`answer_row`]."""
        raise NotImplementedError

    def keep_answers(self, path: str | os.PathLike):
        """Keeps answers in a file from now on, and reuses those it already holds."""
        self.store = AnswerStore(path, self.identity, self.rank)

    def clean(self):
        """Does nothing: lmms-eval calls it to drop the weights after each task."""

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
        bar = tqdm(total=len(requests), initial=len(requests) - total, desc="answers", disable=self.rank != 0)
        for indices in waiting.values():
            # the longest first: what does not fit into memory fails at once
            indices.sort(key=lambda index: -len(requests[index].args[0]))
            for chosen in _chunks(indices, self.batch_size):
                places: dict[str, list[int]] = {}
                for index in chosen:
                    places.setdefault(request_key(requests[index]), []).append(index)
                for row in self.answer_batch([requests[index] for index in chosen]):
                    answers[places[row["key"]].pop()] = row["answer"]
                    if self.store:
                        self.store.add(row)
                    bar.update()
        bar.close()
        return [answer or "" for answer in answers]

    def loglikelihood(self, requests):
        raise NotImplementedError("aligngpt answers prompts; tasks that compare likelihoods are not supported.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("aligngpt answers single prompts; tasks of several rounds are not supported.")

    def messages_of(self, request: Instance) -> tuple[list[dict[str, Any]], list]:
        """A request's messages as chat templates take them, and its images in reading order."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        return read_messages(doc_to_messages(self.task_dict[task][split][doc_id]))


def answer_row(
    request: Instance, prompt: str, answer: str, stops: Sequence[str], weights: list[float] | None
) -> dict[str, Any]:
    """What is kept of an answer, cut where a stop text begins."""
    for stop in stops:
        answer = answer.split(stop)[0]
    return {
        "key": request_key(request),
        "task": request.args[4],
        "doc_id": request.args[3],
        "prompt": prompt,
        "answer": answer.strip(),
        "align_weights": None if weights is None else [round(weight, 6) for weight in weights],
    }


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


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
