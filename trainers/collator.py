"""Turns images and conversations into batches; cut answers and broken images never pass silently."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from jinja2 import TemplateError
from transformers import ProcessorMixin
from transformers.data.data_collator import DataCollatorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from modeling_aligngpt.chat_templates import CHAT_TEMPLATES
from modeling_aligngpt.processing_aligngpt import control_tokens, sanitized

from .data.conversations import BadRow, refuse_foreign
from .data.images import load_image


STAGES = ("pretrain", "instruct")
ON_OVERLONG = ("error", "drop", "truncate")
IGNORE_INDEX = -100
# Column that the trainers add: the position in the data set, for error messages.
ROW_INDEX_COLUMN = "row_index"
# What `encode` makes of a row; the trainers keep it beside the rows.
TOKENS_COLUMN, SUPERVISED_COLUMN = "token_ids", "supervised"


@dataclass
class AlignGPTDataCollator(DataCollatorMixin):
    """
    Makes a batch of rows `{"images": [...], "messages": [...], "align_level": int}`; rows may bring the result of
    [`encode`] along (`token_ids`, `supervised`) in place of `messages`.

    Exactly the `{% generation %}` parts of the chat template are supervised: in stage 1 ("plain" template) the caption
    and its newline, in stage 2 every assistant turn with its EOS. Padding is on the right.

    Args:
        processor (`AlignGPTProcessor`): renders, tokenizes and prepares images.
        stage (`str`): `"pretrain"` (rows need `align_level`) or `"instruct"`.
        max_length (`int`, *optional*): most tokens of a row, image tokens included; `None` for no limit.
        on_overlong (`str`): what a row longer than `max_length` does: `"error"` and `"drop"` raise here (the trainers
            leave such rows out before), `"truncate"` cuts the end, never an image token nor the whole answer.
        num_align_levels (`int`, *optional*): levels must be below it; needed where rows have levels.
        use_levels (`bool`, *optional*): whether rows bring their own level; default: in `"pretrain"` alone. In
            `"instruct"` rows without images need none.
        chat_template (`str`, *optional*): default: "plain" for `"pretrain"`, the processor's own for `"instruct"`.
        pad_to_multiple_of (`int`, *optional*): round batch lengths up to a multiple of it.
        emit_row_index (`bool`): give `row_index` of shape `(batch,)`, for rows that have one, so that a trainer can say
            which rows a batch was made of; it must take it out before the model sees the batch.

    Returns, when called with a list of rows:
        `input_ids`, `attention_mask`, `labels` (-100: not supervised), each of shape
        `(batch, length)`; `pixel_values` of shape `(images of the batch, 3, height, width)` in reading order, absent
        without images; in stage 1 `align_level` of shape `(batch,)`.

    Raises:
        ValueError: naming the row, for a missing or impossible level, an unreadable image, placeholders that do not
            match the images, an empty or missing answer, or a row that is too long.
    """

    processor: ProcessorMixin
    stage: str
    max_length: int | None = 2048
    on_overlong: str = "error"
    num_align_levels: int | None = None
    use_levels: bool | None = None
    chat_template: str | None = None
    pad_to_multiple_of: int | None = None
    emit_row_index: bool = False
    return_tensors: str = "pt"

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage={self.stage!r} is not one of {', '.join(STAGES)}.")
        if self.on_overlong not in ON_OVERLONG:
            raise ValueError(f"on_overlong={self.on_overlong!r} is not one of {', '.join(ON_OVERLONG)}.")
        if self.use_levels is None:
            self.use_levels = self.stage == "pretrain"
        if self.use_levels and self.num_align_levels is None:
            raise ValueError(f'stage="{self.stage}" needs num_align_levels: the size of the model\'s level table.')
        if self.chat_template is None:
            own = self.processor.chat_template
            own = own.get("default") if isinstance(own, dict) else own
            self.chat_template = CHAT_TEMPLATES["plain"] if self.stage == "pretrain" else own
        if self.chat_template is None:
            raise ValueError("The processor has no chat template: assemble the model with one (chat_template=...).")
        # once, and not for every row: the tokenizer takes a millisecond to list them
        self.control_tokens = control_tokens(self.processor.tokenizer, self.chat_template)

    def torch_call(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        levels = [self.check_level(row) for row in rows] if self.use_levels else None
        if TOKENS_COLUMN not in rows[0]:
            rows = [{**row, **encoded} for row, encoded in zip(rows, self.encode(rows), strict=True)]
        images = [self._load_images(row) for row in rows]
        token_ids, supervised = zip(*map(self._expand, rows, map(len, images)), strict=True)
        width = max(map(len, token_ids))
        if self.pad_to_multiple_of is not None:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(rows), width), self.processor.tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, (ids, answer) in enumerate(zip(token_ids, supervised, strict=True)):
            ids = torch.from_numpy(ids)
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            labels[index, : len(ids)] = ids.masked_fill(~torch.from_numpy(answer), IGNORE_INDEX)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if any(images):
            flat = [image for of_row in images for image in of_row]
            batch["pixel_values"] = self.processor.image_processor(flat, return_tensors="pt")["pixel_values"]
        if levels is not None:
            batch["align_level"] = torch.tensor(levels)
        if self.emit_row_index and all(row.get(ROW_INDEX_COLUMN) is not None for row in rows):
            batch[ROW_INDEX_COLUMN] = torch.tensor([row[ROW_INDEX_COLUMN] for row in rows])
        return batch

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
        """
        Tokens of rows without opening an image: what `processor.apply_chat_template` gives, with each image still
        one `<image>`, so that it can be kept beside the rows.

        Returns:
            For each row `token_ids` (int32) and `supervised` (bool), both of shape `(tokens,)`.
        """
        texts, spans = self._render(rows, [self.check_messages(row) for row in rows])
        image_token = self.processor.image_token
        count = sum(text.count(image_token) for text in texts)
        texts, replaced = self.processor.get_text_with_replacements(texts, [image_token] * count)
        # the templates write BOS themselves
        tokens = self.processor.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        encoded = []
        for row, ids, offsets, row_spans, edits in zip(
            rows, tokens["input_ids"], tokens["offset_mapping"], spans, replaced, strict=True
        ):
            starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
            edit_ends = [edit["span"][1] for edit in edits]
            gained = [0, *(edit["new_span"][1] - edit["span"][1] for edit in edits)]
            supervised = np.zeros(len(ids), dtype=bool)
            for span in row_spans:
                begin, end = (char + gained[bisect.bisect_right(edit_ends, char)] for char in span)
                supervised |= (starts < end) & (ends > begin)
            if not supervised.any():
                raise ValueError(f"{describe_row(row)}: its chat template marks no answer with {{% generation %}}.")
            encoded.append({TOKENS_COLUMN: np.asarray(ids, dtype=np.int32), SUPERVISED_COLUMN: supervised})
        return encoded

    def measure(self, encoded: dict[str, Sequence]) -> tuple[int, int]:
        """
        Length of an encoded row with its images expanded, and the smallest `max_length` that keeps every image token
        and the first supervised one.
        """
        ids, supervised = np.asarray(encoded[TOKENS_COLUMN]), np.asarray(encoded[SUPERVISED_COLUMN])
        is_image = ids == self.processor.image_token_id
        widths = np.where(is_image, self.processor.image_seq_length, 1).cumsum()
        last_needed = max(int(supervised.argmax()), int(is_image.nonzero()[0].max(initial=0)))
        return int(widths[-1]), int(widths[last_needed])

    def check_level(self, row: dict[str, Any]) -> int:
        """The row's 0-based alignment level; the top one for a conversation without images, which reads none."""
        level = row.get("align_level")
        if level is None and self.stage == "instruct" and not _has_image(row):
            return self.num_align_levels - 1
        if level is None:
            needed_by = "stage 1" if self.stage == "pretrain" else 'align_mode="level"'
            raise ValueError(
                f"{describe_row(row)} has no `align_level`, which {needed_by} needs: run `aligngpt score` on the data "
                "set first and train on what it writes."
            )
        if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level < self.num_align_levels:
            raise ValueError(
                f"{describe_row(row)} has align_level={level!r}, which is not an integer in "
                f"0..{self.num_align_levels - 1}: score with num_align_levels={self.num_align_levels}, the model's "
                "number of levels, or build the model with more."
            )
        return level

    def check_messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row's conversation as lists of parts without `None` fields, as the templates take it; checked."""
        messages = row.get("messages")
        if not messages:
            raise ValueError(f"{describe_row(row)} has no `messages`.")
        try:
            refuse_foreign(row, ("messages",))
        except BadRow as error:
            raise ValueError(f"{describe_row(row)} {error}.") from None
        tokens = (self.processor.image_token, self.processor.align_token)
        checked, images, answers = [], 0, 0
        for turn, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
            parts = [{key: value for key, value in part.items() if value is not None} for part in parts]
            for part in parts:
                if any(token in part.get("text", "") for token in tokens):
                    raise ValueError(
                        f"{describe_row(row)}, message {turn}: the text contains {tokens[0]} or {tokens[1]}, which are "
                        'placeholders: write an image as {"type": "image"}, and take the word out of the text.'
                    )
            images += sum(part.get("type") == "image" for part in parts)
            answers += role == "assistant"
            checked.append({"role": role, "content": parts})
        checked = sanitized(checked, self.control_tokens, self.processor.image_token)
        if not answers:
            raise ValueError(f"{describe_row(row)} has no assistant message: nothing in it can be learned.")
        if self.stage == "pretrain" and images != 1:
            raise ValueError(
                f"{describe_row(row)} has {images} images: stage 1 learns from pairs of one image and its "
                "caption; leave the row out."
            )
        return checked

    def _render(self, rows: Sequence[dict[str, Any]], conversations: list) -> tuple[list[str], list]:
        """Texts of conversations and the character spans of their answers; an error of the template names the row."""
        settings = {
            "chat_template": self.chat_template,
            "return_assistant_tokens_mask": True,
            **self.processor.tokenizer.special_tokens_map,
        }
        try:
            return render_jinja_template(conversations, **settings)
        except TemplateError as error:
            for row, conversation in zip(rows, conversations, strict=True):
                try:
                    render_jinja_template([conversation], **settings)
                except TemplateError as error_of_row:
                    raise ValueError(f"{describe_row(row)}: {error_of_row}") from error
            raise

    def _load_images(self, row: dict[str, Any]) -> list[PIL.Image.Image]:
        """The row's images; the trainers leave them encoded up to here, so that an error can name the row."""
        name = row.get("id", row.get(ROW_INDEX_COLUMN))
        return [load_image(image, name, self.processor.transparency) for image in row.get("images") or []]

    def _expand(self, row: dict[str, Any], num_images: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int64) and supervised positions (bool) with `image_seq_length` tokens an image, within `max_length`."""
        ids = np.asarray(row[TOKENS_COLUMN], dtype=np.int64)
        is_image = ids == self.processor.image_token_id
        if is_image.sum() != num_images:
            raise ValueError(
                f"{describe_row(row)} has {num_images} image(s) in `images` and {is_image.sum()} "
                '{"type": "image"} placeholder(s) in `messages`: they must be as many.'
            )
        length, needed = self.measure(row)
        if self.max_length is not None and length > self.max_length:
            if self.on_overlong != "truncate":
                raise ValueError(overlong_message(describe_row(row), length, self.max_length))
            if needed > self.max_length:
                raise ValueError(
                    f"{describe_row(row)} has {length} tokens: cut at max_length={self.max_length} it would lose image "
                    "tokens or its whole answer. Raise max_length."
                )
        repeats = np.where(is_image, self.processor.image_seq_length, 1)
        supervised = np.repeat(np.asarray(row[SUPERVISED_COLUMN], dtype=bool), repeats)
        return np.repeat(ids, repeats)[: self.max_length], supervised[: self.max_length]


def _has_image(row: dict[str, Any]) -> bool:
    """Whether a row, or its texts alone, holds an image."""
    contents = [message.get("content") for message in row.get("messages") or []]
    parts = [part for content in contents if not isinstance(content, str) for part in content or []]
    return bool(row.get("images")) or any(part.get("type") == "image" for part in parts)


def describe_row(row: dict[str, Any]) -> str:
    """How errors name a row: its `id`, its position in the data set, or the beginning of its text."""
    if row.get("id") is not None:
        return f"Row with id {row['id']!r}"
    if row.get(ROW_INDEX_COLUMN) is not None:
        return f"Row {row[ROW_INDEX_COLUMN]}"
    for message in row.get("messages") or []:
        content = message.get("content")
        parts = [{"text": content}] if isinstance(content, str) else content or []
        for part in parts:
            if part.get("text"):
                return f"The row that begins {part['text'][:60]!r}"
    return "A row without text"


def overlong_message(name: str, length: int, max_length: int) -> str:
    return (
        f"{name} has {length} tokens, more than max_length={max_length}: its answer would be cut. Raise max_length, or "
        'set on_overlong to "drop" (leave such rows out) or "truncate" (cut the end of the answer).'
    )
