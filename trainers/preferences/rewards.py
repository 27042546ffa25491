"""Rewards for GRPO by name: the levels as a judge (experimental), equality with a reference, any function."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


REWARDS = ("judge", "exact_match")
JUDGE_BATCH = 16


def text_of(message: Any) -> str:
    """A text, or that of chat messages."""
    if isinstance(message, str):
        return message
    contents = [turn["content"] for turn in message]
    parts = [
        content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
        for content in contents
    ]
    return "\n".join(parts).strip()


def exact_match(completions: list, answer: list[str], **kwargs) -> list[float]:
    """1 where an answer is its row's `answer`, spaces at the ends aside, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(text_of(completion).strip() == expected.strip()) for completion, expected in pairs]


class JudgeReward:
    """
    Experimental: the mean level that [`~AlignGPTForConditionalGeneration.judge`] gives each answer, divided by the top
    one. 0 for an empty answer.

    Args:
        model: folder or Hub id of an AlignGPT, best one after stage 1, which reads answers as captions; one after
            stage 2 on rows' own levels reads the prompt too. It stays as it is.
        revision: of the Hub id.
        device: where it runs.

    Example:
        ```python
        AlignGPTGRPOTrainer(model, JudgeReward("runs/vicuna-7b/pretrain"), config, rows, processing_class=processor)
        ```
    """

    __name__ = "judge"

    def __init__(self, model: str, revision: str | None = None, device: str | torch.device | None = None):
        self.processor = AlignGPTProcessor.from_pretrained(model, revision=revision)
        self.model = AlignGPTForConditionalGeneration.from_pretrained(model, revision=revision)
        self.model.eval().requires_grad_(False)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(device)
        self.reads_prompt = self.model.config.judges_answers

    def __call__(self, prompts: list, completions: list, images: list, **kwargs) -> list[float]:
        rewards = [0.0] * len(completions)
        texts = [text_of(completion).strip() for completion in completions]
        # texts of one prompt are judged in one batch, since its question is one setting
        by_question: dict[str | None, list[int]] = {}
        for row, text in enumerate(texts):
            if text:
                question = text_of(prompts[row][-1:]) if self.reads_prompt else None
                by_question.setdefault(question, []).append(row)
        top = self.model.config.num_align_levels - 1
        for question, rows in by_question.items():
            for start in range(0, len(rows), JUDGE_BATCH):
                batch = rows[start : start + JUDGE_BATCH]
                # one image is what a judge reads
                pictured = [images[row][0] for row in batch]
                inputs = self.processor.judge_inputs(pictured, [texts[row] for row in batch], question)
                verdict = self.model.judge(**inputs.to(self.model.device))
                for row, level in zip(batch, verdict.mean_level.tolist(), strict=True):
                    rewards[row] = level / top
        return rewards


def load_reward(name: str, reward_model: str | None, device: str | torch.device | None = None) -> Callable:
    """
    A reward by its name: `judge` (with `reward_model`), `exact_match`, or a dotted path such as `my_rewards.brevity`
    of a function as GRPOTrainer takes it.

    Raises:
        ValueError: no such name, or no model to judge with.
    """
    if name == "judge":
        if not reward_model:
            raise ValueError("reward_funcs: judge needs a model to judge with: give --reward_model, one after stage 1.")
        return JudgeReward(reward_model, device=device)
    if name == "exact_match":
        return exact_match
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function) if module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs: {name} cannot be imported ({error}).") from error
    if found is None:
        raise ValueError(f"reward_funcs: there is no {name!r}; there are {', '.join(REWARDS)}, or a dotted path.")
    return found
