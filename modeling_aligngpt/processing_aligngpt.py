"""
Processor of AlignGPT: images and text in, `input_ids`, `attention_mask` and `pixel_values` out.

Written for transformers 5; additions for 4.57 are in `compat_v4.py`.
"""

import inspect
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase, TextInput

from .base_aligngpt import refuse_misspelt
from .compat_v4 import IS_TRANSFORMERS_4, ProcessorBase
from .images_aligngpt import (
    DROPPED,
    LIMITS,
    TRANSPARENCIES,
    ImageLimits,
    output_size,
    pair_of,
    pil_image_processor,
    portable_image_processor_config,
    read_image,
    shortened,
    to_8_bit,
)


# U+2060 WORD JOINER: has no width, and no tokenizer joins over it
BREAK = "\u2060"
# how a template says what it writes between a placeholder and the text behind it
SET_SUFFIX = "{%- set image_suffix = '{}' -%}"


class AlignGPTProcessor(ProcessorBase):
    r"""
    Puts an image processor and a tokenizer together.

    In the text, each `<image>` becomes `image_seq_length` copies of itself, and `<align>` is set right behind BOS
    (first where the text has none) if the row has an image and lacks it.

    Args:
        image_processor: any of transformers'; [`LlavaImageProcessor`] as the authors do it (`do_pad=True` pads to a
            square with the mean colour, stage 2 and inference; `do_pad=False` crops, stage 1).
        tokenizer: of the language model, with both placeholders added as special tokens.
        chat_template (`str`, *optional*): a Jinja template.
        image_token (`str`): the placeholder of an image.
        align_token (`str`): the placeholder of the alignment vector.
        image_seq_length (`int`): positions that an image takes, the model's `config.image_seq_length`.
        image_suffix (`str`): written between a placeholder or BOS and the text behind it. `" "` gives the authors' ids
            for Llama's sentencepiece tokenizers, which mark the start of a text that way.
        transparency (`str`): what stands where an image is transparent: `"white"`, as new models have it, or
            the hidden colours (`"dropped"`: the authors' way, and that of processors saved by 0.1.0, which name none).

    Raises:
        ValueError: a placeholder is not one token of the tokenizer, or `transparency` is unknown.
    """

    text_kwargs = {"return_token_type_ids": False}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<image>",
        align_token="<align>",
        image_seq_length=576,
        image_suffix="",
        transparency=DROPPED,
    ):
        if transparency not in TRANSPARENCIES:
            raise ValueError(f"transparency={transparency!r} is not one of {', '.join(TRANSPARENCIES)}.")
        self.transparency = transparency
        self.image_token = image_token
        self.align_token = align_token
        self.image_seq_length = image_seq_length
        self.image_suffix = image_suffix
        self.image_token_id = single_token_id(tokenizer, image_token)
        self.align_token_id = single_token_id(tokenizer, align_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        *,
        align_level: int | Sequence[int] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: images (PIL, numpy, tensor, path, URL, base64): one, a list in reading order, or a list per row.
                Arrays are read by [`~images_aligngpt.to_8_bit`], and left as they are with `do_rescale=False`.
            text: one prompt or several. A prompt that brings its BOS along gets no second one.
            align_level (*optional*): for the model, one for all rows or one for each; returned as `(batch,)`.
            kwargs: of tokenizer and image processor, flat or as `text_kwargs` and `images_kwargs`.

        Returns:
            `input_ids` and `attention_mask` `(batch, sequence)`; `pixel_values` `(images, 3, height, width)`, all
            images of the batch in reading order, if there are any.

        Raises:
            ValueError: images and placeholders differ, an image cannot be read, or truncation cuts placeholders.
            TypeError: an argument that looks like a misspelling of another.
        """
        refuse_misspelt(AlignGPTProcessor.__call__, kwargs, argument_names(self.image_processor))
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:  # type: ignore[misc]
                raise ValueError(f"{type(self).__name__} takes images and text, not {name}: leave `{name}` out.")
        if text is not None and not _mentions(kwargs, "add_special_tokens"):  # type: ignore[arg-type]
            text = self._without_second_bos(text, kwargs)  # type: ignore[arg-type]
        output = super().__call__(images=images, text=text, **kwargs)
        if align_level is not None and text is not None:
            output["align_level"] = a_level_per_row(align_level, output["input_ids"])
        return output

    def apply_chat_template(  # type: ignore[override]
        self, conversation, chat_template=None, sanitize_control_tokens: bool = True, align_level=None, **kwargs
    ):
        """
        As transformers', for texts that stay text: see [`control_tokens`].

        Args:
            conversation: messages, or a list of conversations.
            chat_template (`str`, *optional*): another template than the processor's, or the name of one of several.
            sanitize_control_tokens (`bool`): `False` lets control tokens in messages act as such.
            align_level (*optional*): as of [`~AlignGPTProcessor.__call__`].

        Raises:
            ValueError: tools (or documents), which the template does not write.
            TypeError: an argument that looks like a misspelling of another.
        """
        refuse_misspelt(AlignGPTProcessor.apply_chat_template, kwargs, argument_names(self.image_processor))
        for name in ("tools", "documents"):
            if kwargs.get(name) and name not in (self._template_of(chat_template) or ""):
                raise ValueError(f"The chat template has no place for {name}: leave `{name}` out.")
        given = kwargs if IS_TRANSFORMERS_4 else dict(kwargs.get("processor_kwargs") or {})
        # a template writes BOS itself, or its conversations have none
        more = {} if _mentions({**kwargs, **given}, "add_special_tokens") else {"add_special_tokens": False}
        given |= more if align_level is None else {**more, "align_level": align_level}
        kwargs |= {} if IS_TRANSFORMERS_4 else {"processor_kwargs": given}
        conversation = getattr(conversation, "messages", conversation)
        if sanitize_control_tokens and conversation:
            batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
            chats = [self.sanitize(chat, chat_template) for chat in (conversation if batched else [conversation])]
            conversation = chats if batched else chats[0]
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def _template_of(self, chat_template: str | None) -> str | None:
        own = self.chat_template
        templates = own if isinstance(own, dict) else {"default": own}
        return templates.get(chat_template or "default", chat_template)

    def sanitize(self, messages, chat_template: str | None = None) -> list[dict]:
        """Messages without control tokens in their texts; a message that is not a mapping is returned unchanged."""
        messages = getattr(messages, "messages", messages)
        if not all(isinstance(message, dict) for message in messages):
            return messages
        tokens = control_tokens(self.tokenizer, self._template_of(chat_template))
        return sanitized(list(messages), tokens, self.image_token)

    @property
    def _bos(self) -> str | None:
        # some ChatML tokenizers name the start of a turn as BOS
        return None if self.tokenizer.bos_token == "<|im_start|>" else self.tokenizer.bos_token

    def _without_second_bos(self, text, kwargs: dict):
        """Keeps a tokenizer that adds BOS from adding one to rows that already begin with it."""
        bos = self._bos
        rows = [text] if isinstance(text, str) else text
        if not bos or not any(isinstance(row, str) and row.startswith(bos) for row in rows):
            return text
        if all(isinstance(row, str) and row.startswith(bos) for row in rows):
            kwargs["add_special_tokens"] = False
            return text
        adds_bos = self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return [row.removeprefix(bos) if adds_bos and isinstance(row, str) else row for row in rows]

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Reads every image, naming the one that cannot be read; no images at all become `None`."""
        if images is not None:
            images = self._read_images(images, {**kwargs, **(kwargs.get("images_kwargs") or {})})
        # what is read already is passed on as it is
        _, text, videos, audio = super().prepare_inputs_layout(text=text, videos=videos, audio=audio, **kwargs)
        return images, text, videos, audio

    def _read_images(self, images, settings: dict):
        """A list of images, or one list per row if the input was nested; `None` if there is none."""
        if not isinstance(images, (list, tuple)):
            images = [images]
        if not any(isinstance(row, (list, tuple)) or row is None for row in images):
            images = _one_by_one(images)
            return [self._read_image(image, f"image {i}", settings) for i, image in enumerate(images)] or None
        rows = []
        for index, row in enumerate(images):
            row = [] if row is None else _one_by_one(row if isinstance(row, (list, tuple)) else [row])
            rows.append([self._read_image(image, f"row {index}, image {i}", settings) for i, image in enumerate(row)])
        return rows if any(rows) else None

    def _read_image(self, image, where: str, settings: dict):
        is_array = hasattr(image, "shape")
        if is_array and settings.get("do_rescale") is False:
            return image  # not of 0 to 255, as the caller says: nothing but the image processor is to touch it
        source = f" ({shortened(image)})" if isinstance(image, (str, os.PathLike)) else ""
        try:
            if is_array and settings.get("input_data_format") is not None:
                return to_8_bit(image)  # the image processor is told where its channels are
            return self.read_image(image)
        except Exception as error:
            raise ValueError(
                f"{where}{source}: the image cannot be read ({type(error).__name__}: {str(error)[:200]}); "
                "repair the file or leave the row out."
            ) from error

    def read_image(self, image, limits: ImageLimits = LIMITS, allow_urls: bool = True) -> Image.Image:
        """One image as the model sees it before resizing; see [`~images_aligngpt.read_image`]."""
        return read_image(image, limits, allow_urls, self.transparency)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Checks that every row has as many images as placeholders (in total where images are a flat list)."""
        if isinstance(text, list) and all(isinstance(row, str) for row in text):
            check_image_counts(images, text, self.image_token)
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def replace_image_token(self, image_inputs: dict | None = None, image_idx: int = 0, **kwargs) -> str:
        """What an image's placeholder becomes."""
        return self.image_token * self.image_seq_length

    def get_text_with_replacements(self, text, images_replacements=(), videos_replacements=(), audio_replacements=()):
        """
        Expands the placeholders and sets `<align>` and `image_suffix` where they belong.

        Returns the rows, and for each row what was replaced (`type`, `span`, `new_span`, `text`, `replacement`), by
        which transformers moves the spans of assistant masks.
        """
        found = super().get_text_with_replacements(list(text), list(images_replacements), [], [])[1]
        rows = [self._lay_out(row, images) for row, images in zip(text, found, strict=True)]
        return [row for row, _ in rows], [replaced for _, replaced in rows]

    def _lay_out(self, row: str, images: list[dict]) -> tuple[str, list[dict]]:
        edits = [(*image["span"], image["replacement"], "image") for image in images]
        head = len(self._bos) if self._bos and row.startswith(self._bos) else 0
        starts = [end for _, end, _, _ in edits]
        if row.startswith(self.align_token, head):
            head += len(self.align_token)
        elif images and self.align_token not in row:
            edits.append((head, head, self.align_token, "text"))
            starts.append(head)
        if head:
            starts.append(head)
        if self.image_suffix:
            no_text = tuple(self.tokenizer.get_added_vocab())
            # the suffix belongs to the text behind it: an answer that begins there is supervised from the suffix on
            starts = [start for start in starts if start < len(row) and not row.startswith(no_text, start)]
            for start in () if self._has_suffix(row, head, starts) else set(starts):
                edits.append((start, start + 1, self.image_suffix + row[start], "text"))
        return apply_edits(row, edits)

    def _has_suffix(self, row: str, head: int, starts: list[int]) -> bool:
        """
        Whether a chat template has written `image_suffix` in front of the texts that begin at `starts`; only a
        template writes BOS or `<align>`, and all but "plain" write text or a token of their own behind them.
        """
        if not head or row.startswith(self.image_token, head):
            return False
        # a user's text may begin with a space, too: without text at the head, the processor's own template decides
        written = head in starts or SET_SUFFIX.replace("{}", self.image_suffix) in (self._template_of(None) or "")
        return written and all(row.startswith(self.image_suffix, start) for start in starts)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Positions that images of these sizes take (for vLLM)."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    @property
    def unused_input_names(self) -> list[str]:
        """Names that some tokenizers return and the model does not take."""
        return ["token_type_ids"]

    @property
    def model_input_names(self) -> list[str]:
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return [name for name in dict.fromkeys(names) if name not in self.unused_input_names]

    def validate_with(self, config) -> None:
        """
        Checks that processor and model belong together.

        Args:
            config ([`AlignGPTConfig`]): of the model.

        Raises:
            ValueError: size of the images, positions of an image or placeholder ids differ, or a token has no row in
                the embeddings.
        """
        size, wanted_size = output_size(self.image_processor), pair_of(config.input_image_size)
        if size is not None and wanted_size is not None and size != wanted_size:
            raise ValueError(
                f"The image processor gives images of {size[0]}x{size[1]}, the vision tower takes {wanted_size[0]}x"
                f"{wanted_size[1]} (its image_size, times the largest of vision_scales): set size and crop_size of the "
                "image processor to it."
            )
        for name in ("image_seq_length", "image_token_id", "align_token_id"):
            own, wanted = getattr(self, name), getattr(config, name)
            if own != wanted:
                raise ValueError(
                    f"{name} is {own} in the processor and {wanted} in the config: load both from one checkpoint."
                )
        rows = config.text_config.vocab_size
        if max(self.image_token_id, self.align_token_id) >= rows:
            raise ValueError(
                f"The placeholders have ids up to {max(self.image_token_id, self.align_token_id)}, but the embeddings "
                f"have {rows} rows: resize the embeddings to the tokenizer's length."
            )

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        image_backend = kwargs.pop("image_backend", "pil")
        args = () if processor_dict is None else (processor_dict,)
        parts = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # torchvision's resize differs by up to 0.29 a value from what released weights were trained on
        return [pil_image_processor(parts[0]) if image_backend == "pil" else parts[0], *parts[1:]]

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        Saves the processor so that transformers 4.57 and 5 both load it, with the code it is made of.

        `auto_map` goes into `processor_config.json` and `tokenizer_config.json`; image processors are stored under
        their plain name, without `Fast` or `Pil`.
        """
        before = {id(part): getattr(part, "auto_map", None) for part in (self, self.image_processor)}
        hub_names = ("repo_id", "commit_message", "private", "revision", "create_pr")
        hub = {name: kwargs.pop(name) for name in hub_names if name in kwargs}
        files = super().save_pretrained(save_directory, **kwargs)
        for part in (self, self.image_processor):  # transformers leaves its mark on them
            if before[id(part)] is None:
                part.__dict__.pop("auto_map", None)
        if (Path(save_directory) / "tokenizer.json").is_file():
            rewrite_json(Path(save_directory) / "tokenizer_config.json", portable_tokenizer_config)
        own = Path(save_directory) / "processor_config.json"
        rewrite_json(own, lambda config: portable_image_processor_config(config.get("image_processor") or {}))
        rewrite_json(own.with_name("preprocessor_config.json"), portable_image_processor_config)
        if push_to_hub:
            hub.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(**hub, token=kwargs.get("token"))
        return files


def _one_by_one(images) -> list:
    """A list of images, arrays of four dimensions taken apart."""
    return [image for each in images for image in (each if getattr(each, "ndim", 0) == 4 else [each])]


def _mentions(kwargs: dict, name: str) -> bool:
    return name in kwargs or any(name in (kwargs.get(group) or {}) for group in ("text_kwargs", "common_kwargs"))


def single_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of `token`; a ValueError if the tokenizer does not read it as one token."""
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != token:
        raise ValueError(
            f"The tokenizer has no token {token!r}: add it with "
            f"tokenizer.add_special_tokens({{'additional_special_tokens': [{token!r}]}})."
        )
    return ids[0]


def argument_names(image_processor) -> tuple[str, ...]:
    """What may be given flat to a processor or its chat template: arguments of tokenizer, image processor, template."""
    kinds = (*ProcessingKwargs.__annotations__.values(), getattr(image_processor, "valid_kwargs", None))
    names = [name for kind in kinds for name in getattr(kind, "__annotations__", ())]
    template = inspect.signature(ProcessorMixin.apply_chat_template).parameters
    return (*ProcessingKwargs.__annotations__, *names, *template)


def a_level_per_row(align_level, input_ids):
    """`(batch,)` levels, of the type of `input_ids`: tensor, array or list."""
    levels = np.asarray(align_level) if np.ndim(align_level) else np.full(len(input_ids), align_level)
    if isinstance(input_ids, torch.Tensor):
        return torch.from_numpy(levels)
    return levels if isinstance(input_ids, np.ndarray) else levels.tolist()


def check_image_counts(images, text: list[str], image_token: str) -> None:
    """Raises a ValueError unless each row has as many images as placeholders, or all rows where `images` are flat."""
    placeholders = [row.count(image_token) for row in text]
    rule = f"the number of {image_token} tokens in the prompts should be the same as the number of images"
    remedy = f"write one {image_token} for each image."
    nested = bool(images) and isinstance(images[0], (list, tuple))
    if nested and len(images) != len(placeholders):
        raise ValueError(f"{len(images)} rows of images for {len(placeholders)} prompts: {rule}; {remedy}")
    if nested or not images:
        counts = [len(row) for row in images] if images else [0] * len(placeholders)
        for row, (wanted, given) in enumerate(zip(placeholders, counts, strict=True)):
            if wanted != given:
                raise ValueError(f"Row {row}: {rule}, but it has {wanted} and {given} images; {remedy}")
    elif sum(placeholders) != len(images):
        raise ValueError(
            f"Rows 0 to {len(placeholders) - 1}: {rule}, but they have {sum(placeholders)} "
            f"({', '.join(map(str, placeholders))}) and {len(images)} images; {remedy}"
        )


def apply_edits(row: str, edits: list[tuple[int, int, str, str]]) -> tuple[str, list[dict]]:
    """`row` with each `(start, end, replacement, type)` carried out, and the record of it."""
    pieces, records, last, length = [], [], 0, 0
    for start, end, replacement, kind in sorted(edits, key=lambda edit: edit[:2]):
        pieces += [row[last:start], replacement]
        placed = length + start - last
        length, last = placed + len(replacement), end
        record = {"type": kind, "span": (start, end), "new_span": (placed, length)}
        records.append({**record, "text": row[start:end], "replacement": replacement})
    return "".join([*pieces, row[last:]]), records


def portable_tokenizer_config(config: dict) -> None:
    """Names by which both generations read `tokenizer.json` as it is (a family's class may rebuild parts of it)."""
    if "AutoTokenizer" not in config.get("auto_map", {}):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only"):  # of one load, not of the tokenizer
        config.pop(name, None)


def rewrite_json(path: Path, change) -> None:
    """Applies `change` to a JSON file, if it exists, in one step."""
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


# ---- control tokens that users write (`</s>`, `<image>`) are broken by an invisible character and so stay text ----
# transformers 5 can do so too (`sanitize_control_tokens`), but not beside assistant masks, not without tokenizing, and
# not on 4.57; a text must be the same ids in training and when the model is asked.


def control_tokens(tokenizer, chat_template: str | None) -> re.Pattern:
    """The control tokens: special tokens, and added tokens that the chat template writes."""
    own = chat_template or ""
    added = tokenizer.added_tokens_decoder.values()
    found = {t.content for t in added if t.special or (t.content in own and not t.content.isspace())}
    found |= set(tokenizer.all_special_tokens)
    # a token of one character cannot be broken, and is one that people write (CLIP's tokenizers pad with "!")
    found = {token for token in found if len(token) > 1}
    # the longest first, so that a token wins over one inside of it
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or "(?!)")


def as_text(text: str, tokens: re.Pattern) -> str:
    """`text` with its control tokens broken."""
    return tokens.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)


def sanitized(messages: list[dict[str, Any]], tokens: re.Pattern, placeholder: str) -> list[dict[str, Any]]:
    """
    Messages with control tokens in their texts broken. In string content, `placeholder` is kept, since nothing else can
    say there where an image stands; in a list of parts it is text.
    """

    def cleaned(content):
        if isinstance(content, str):
            return placeholder.join(as_text(piece, tokens) for piece in content.split(placeholder))
        if not isinstance(content, (list, tuple)):
            return content
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
            for part in content
        ]
        return [
            {**part, "text": as_text(text, tokens)} if isinstance(text, str) else part
            for part, text in zip(content, texts, strict=True)
        ]

    return [{**each, "content": cleaned(each["content"])} if "content" in each else each for each in messages]


AlignGPTProcessor.register_for_auto_class()

__all__ = ["BREAK", "SET_SUFFIX", "AlignGPTProcessor", "control_tokens", "sanitized"]
