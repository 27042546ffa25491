"""
The levels as a judge of texts. Experimental: nothing shows yet that it tells true texts from untrue ones better than
the score that the levels were cut from.

After stage 1, a model has seen texts of each level beside their images. So the likelihoods of one text at all levels
give it a mean level: under a flat prior, p(level | image, text) is proportional to p(text | image, level). Form and
length do not cancel out: where texts of low levels are worded otherwise, the wording alone moves the level.

Shape suffixes: B rows, T positions, N levels, P parts of a text.
"""

import re
from dataclasses import dataclass

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import ModelOutput

from .checks_aligngpt import refuse_misspelt
from .compat_v4 import IS_TRANSFORMERS_4
from .configuration_aligngpt import AlignGPTConfig


@dataclass
class AlignGPTJudgement(ModelOutput):
    """
    Args:
        log_likelihoods (`torch.FloatTensor` of shape `(B, N)`): of the whole text at each level, in nats.
        probabilities (`(B, N)`): of each level, given image and text.
        mean_level (`(B,)`): their mean, 0 to N - 1: higher fits better.
        num_tokens (`(B,)`): tokens of the text.
        part_probabilities (`(B, P, N)`, *optional*), part_mean_level (`(B, P)`, *optional*): the same of each part
            (sentence), given the parts in front of it; zeros where a row has fewer.
    """

    log_likelihoods: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    mean_level: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    part_probabilities: torch.Tensor | None = None
    part_mean_level: torch.Tensor | None = None


class AlignGPTJudgeMixin:
    """`judge`, for a model with `get_image_features`, `model` and `logits_of`."""

    config: AlignGPTConfig

    @torch.no_grad()
    def judge(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        parts: torch.Tensor | None = None,
        **kwargs,
    ) -> AlignGPTJudgement:
        """
        Experimental: the mean level of texts beside their images; [`AlignGPTProcessor.judge_inputs`] makes the
        arguments. The images are encoded once, the language model runs N times.

        Args:
            input_ids, attention_mask (`(B, T)`), pixel_values: as in `forward`; every row has an image.
            labels (`(B, T)`): the ids of the text that is judged, -100 elsewhere.
            parts (`(B, T)`, *optional*): the part that each token of the text belongs to, from 0.

        Raises:
            ValueError: a row without an image, or without a text. TypeError: another argument.
        """
        refuse_misspelt(AlignGPTJudgeMixin.judge, kwargs)
        if kwargs:
            raise TypeError(f"judge has no argument {next(iter(kwargs))!r}: it takes what judge_inputs returns.")
        judged_BT = labels[:, 1:] != -100
        num_tokens_B = judged_BT.sum(1)
        if bool((num_tokens_B == 0).any()):
            raise ValueError(f"Row {int(num_tokens_B.argmin())} has no text to judge: every label is -100.")
        has_image_B = (input_ids == self.config.image_token_id).any(1)
        if not bool(has_image_B.all()):
            raise ValueError(f"Row {int(has_image_B.int().argmin())} has no image that its text could be judged by.")
        image_outputs = self.get_image_features(pixel_values)  # type: ignore[attr-defined]
        by_level = []
        for level in range(self.config.num_align_levels):
            outputs = self.model(  # type: ignore[attr-defined]
                input_ids=input_ids,
                attention_mask=attention_mask,
                mm_encoder_outputs={"image": image_outputs},
                align_level=level,
                use_cache=False,
            )
            logits = self.logits_of(outputs.last_hidden_state[:, :-1][judged_BT])  # type: ignore[attr-defined]
            found = -torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][judged_BT], reduction="none")
            scores_BT = torch.zeros(judged_BT.shape, dtype=torch.float32, device=found.device)
            scores_BT[judged_BT] = found
            by_level.append(scores_BT)
        scores_BTN = torch.stack(by_level, dim=-1)
        scores_BN = scores_BTN.sum(1)
        judgement = AlignGPTJudgement(log_likelihoods=scores_BN, num_tokens=num_tokens_B)
        judgement.probabilities = scores_BN.softmax(-1)
        judgement.mean_level = self._mean_level(judgement.probabilities)
        if parts is not None:
            parts_BT = parts[:, 1:].clamp(min=0)
            number = int(parts_BT[judged_BT].max()) + 1
            rows_BPT = torch.nn.functional.one_hot(parts_BT, number).to(scores_BTN.dtype).transpose(1, 2)
            rows_BPT = rows_BPT * judged_BT.unsqueeze(1)
            exists_BP1 = (rows_BPT.sum(-1) > 0).unsqueeze(-1)
            judgement.part_probabilities = (rows_BPT @ scores_BTN).softmax(-1) * exists_BP1
            judgement.part_mean_level = self._mean_level(judgement.part_probabilities)
        return judgement

    def _mean_level(self, probabilities: torch.Tensor) -> torch.Tensor:
        return probabilities @ torch.arange(probabilities.shape[-1], device=probabilities.device).to(probabilities)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the space in front of it; joined they are the text."""
    return [piece for piece in re.split(r"(?<=[.!?;\n])(?=\s)", text) if piece] or [text]


def part_numbers(tokenizer, text: str, count: int) -> list[int]:
    """
    The sentence of each of the `count` tokens that a template made of `text`: its own tokens, one or more in front
    (a space) and behind (the end of the answer).
    """
    ends, position = [], 0
    for piece in split_sentences(text):
        position += len(piece)
        ends.append(position)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    numbers = [next((i for i, end in enumerate(ends) if start < end), len(ends) - 1) for start, _ in offsets]
    return (numbers + [len(ends) - 1] * count)[:count]


def judge_inputs(
    processor, images: list, texts: list[str], question: str | None, return_parts: bool, plain_template: str
) -> BatchFeature:
    """See [`AlignGPTProcessor.judge_inputs`]; `plain_template` is that of stage 1."""
    if IS_TRANSFORMERS_4:
        raise ValueError("Judging texts needs transformers 5.18 or later: 4.57 does not tell answers from prompts.")
    if empty := [row for row, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"Text {empty[0]} is empty: there is nothing to judge.")
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts: each text is judged by one image.")
    asked = [] if question is None else [{"type": "text", "text": question}]
    chats = [
        [
            {"role": "user", "content": [{"type": "image", "image": image}, *asked]},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
        for image, text in zip(images, texts, strict=True)
    ]
    template = {"chat_template": plain_template} if question is None else {}
    batch = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
        return_assistant_tokens_mask=True,
        **template,
    )
    answers = torch.as_tensor(batch.pop("assistant_masks")).bool()
    batch.pop("prompt_mask", None)  # levels are given: no gate reads anything
    batch["labels"] = batch["input_ids"].masked_fill(~answers, -100)
    if return_parts:
        batch["parts"] = torch.full_like(batch["labels"], -1)
        for row, text in enumerate(texts):
            numbers = part_numbers(processor.tokenizer, text, int(answers[row].sum()))
            batch["parts"][row, answers[row]] = torch.tensor(numbers)
    return batch


__all__ = ["AlignGPTJudgeMixin", "AlignGPTJudgement", "judge_inputs", "part_numbers", "split_sentences"]
