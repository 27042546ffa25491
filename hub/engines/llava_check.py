"""Checks of an export: its logits equal the model's at the same vector, and what the vector costs against the gate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.images_aligngpt import pil_image_processor


# weights up to this many bytes run as a whole
LARGEST_WHOLE, CHECKED_LAYERS = 2 * 2**30, 2
PROBE_QUESTIONS = ("What is in the image?", "How many things are there, and where?")


@dataclass(frozen=True)
class Talk:
    """A conversation about images: chat messages with placeholders, ending with an answer."""

    images: list[Image.Image]
    messages: list[dict[str, Any]]

    @property
    def first_question(self) -> list[dict[str, Any]]:
        """The messages in front of the first answer."""
        answer = next(index for index, message in enumerate(self.messages) if message["role"] == "assistant")
        return self.messages[:answer]


def talks_of(rows: Sequence[dict[str, Any]]) -> list[Talk]:
    """
    The rows with an image and an answer, as training reads them.

    Raises:
        ValueError: there are none.
    """
    found = []
    for row in rows:
        messages = [
            {"role": message["role"], "content": [_part(part) for part in message["content"]]}
            for message in row["messages"]
        ]
        if row.get("images") and any(message["role"] == "assistant" for message in messages):
            found.append(Talk(list(row["images"]), messages))
    if not found:
        raise ValueError("The data has no row with an image and an answer: give conversations about images.")
    return found


def _part(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}


def _batches(talks: Sequence[Talk], size: int, name: str) -> Iterator[Sequence[Talk]]:
    for start in tqdm(range(0, len(talks), size), desc=name, unit="batch", disable=len(talks) <= size):
        yield talks[start : start + size]


def _questions(processor, talks: Sequence[Talk]):
    texts = [
        processor.apply_chat_template(talk.first_question, tokenize=False, add_generation_prompt=True) for talk in talks
    ]
    return processor(
        text=texts,
        images=[talk.images for talk in talks],
        padding=True,
        padding_side="left",
        add_special_tokens=False,  # the templates write BOS themselves
        return_tensors="pt",
    )


def mean_level_weights(model, processor: AlignGPTProcessor, talks: Sequence[Talk], batch_size: int = 16) -> list[float]:
    """Mean over the first questions of what each level contributes, `(N,)`."""
    total, count = torch.zeros(model.config.num_align_levels), 0
    for batch in _batches(talks, batch_size, "gate"):
        with torch.inference_mode():
            weights = model(**_on(model, _questions(processor, batch)), logits_to_keep=1).align_weights
        total += weights.float().sum(0).cpu()
        count += len(weights)
    return (total / count).tolist()


def check_equal(source: Path, folder: Path, weights: Sequence[float], tolerance: float = 1e-3) -> dict[str, float]:
    """
    Runs the export and its source model, with the levels at `weights`, on two prompts with noise as images. Of a large
    model two layers run (`LARGEST_WHOLE`): the others are copied as they are, under names made by the same rule.

    Args:
        source, folder: the AlignGPT and the export. weights (`(N,)`): of the levels.
        tolerance: largest difference of logits, as a share of their largest; 20 times as much below float32.

    Returns:
        `largest_difference` and `largest_logit`.

    Raises:
        ValueError: prompt ids or logits differ.
    """
    processor, plain_processor = AlignGPTProcessor.from_pretrained(source), load_processor(folder)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (96, 128, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    prompts = []
    for question in PROBE_QUESTIONS:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        talk = Talk([image], [{"role": "user", "content": content}, {"role": "assistant", "content": []}])
        ours, theirs = _questions(processor, [talk]), _questions(plain_processor, [talk])
        if ours["input_ids"].tolist() != theirs["input_ids"].tolist():
            raise ValueError(f"The export tokenises {question!r} differently: it is not the same model.")
        prompts.append((ours, theirs))
    depth, stored = _check_depth(source), AlignGPTConfig.from_pretrained(source).dtype or torch.float32
    # one after the other: both at once may be more than fits into memory
    model = _load(AlignGPTForConditionalGeneration, source, depth)
    with torch.no_grad():  # the vector as a level of its own
        table = model.model.align_embeddings.weight
        # rounded as the export stores it
        table[0] = (torch.tensor(weights) @ table.float()).to(stored).to(table.dtype)
    with torch.inference_mode():
        expected = [model(**_on(model, ours), align_level=0).logits.float() for ours, _ in prompts]
    del model
    plain = _load(LlavaForConditionalGeneration, folder, depth)
    with torch.inference_mode():
        given = [plain(**_on(plain, theirs)).logits.float() for _, theirs in prompts]
    del plain
    worst = max((one - other).abs().max().item() for one, other in zip(expected, given, strict=True))
    largest = max(one.abs().max().item() for one in expected)
    if worst > largest * tolerance * (1 if stored == torch.float32 else 20):
        raise ValueError(f"The export's logits differ by {worst:g} (the largest is {largest:g}): it is not the same.")
    return {"largest_difference": worst, "largest_logit": largest}


def _check_depth(source: Path) -> int | None:
    """How many layers of the language model the check runs; `None` is all of them."""
    size = sum(file.stat().st_size for file in source.glob("model*.safetensors"))
    return None if size <= LARGEST_WHOLE else CHECKED_LAYERS


def _load(model_class: type, folder: Path, depth: int | None):
    """A model in float32, or one with its first layers alone; the weights of the others stay on disk."""
    if depth is None:
        return model_class.from_pretrained(folder, dtype=torch.float32).eval()
    config = model_class.config_class.from_pretrained(folder)
    text, count = config.text_config, config.text_config.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == count:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = min(depth, count)
    model, report = model_class.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}.")
    return model.eval()


def compare(source: Path, folder: Path, talks: Sequence[Talk], batch_size: int = 16, tokens: int = 32) -> dict:
    """
    What the constant vector costs against the gate, on conversations.

    Returns:
        `rows`; `same_answers`, the share of first answers that are equal, greedy, up to `tokens` tokens; `loss` and
        `loss_of_the_gate`, mean cross-entropy of the answers' tokens.
    """
    model = AlignGPTForConditionalGeneration.from_pretrained(source).eval()
    processor = AlignGPTProcessor.from_pretrained(source)
    own_answers, own_loss = _answers_and_loss(model, processor, talks, batch_size, tokens, "gate")
    del model
    plain = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    answers, loss = _answers_and_loss(plain, load_processor(folder), talks, batch_size, tokens, "export")
    same = sum(mine == theirs for mine, theirs in zip(own_answers, answers, strict=True)) / len(talks)
    return {"rows": len(talks), "same_answers": same, "loss": loss, "loss_of_the_gate": own_loss}


def _answers_and_loss(model, processor, talks, batch_size: int, tokens: int, name: str) -> tuple[list[str], float]:
    answers: list[str] = []
    total = count = 0.0
    for batch in _batches(talks, batch_size, name):
        inputs = _on(model, _questions(processor, batch))
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answers += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for talk in batch:
            loss, number = _loss(model, processor, talk)
            total, count = total + loss, count + number
    return answers, total / max(count, 1)


def _loss(model, processor, talk: Talk) -> tuple[float, int]:
    """Summed cross-entropy of the first answer, and its tokens; the gate reads what stands in front of it."""
    images = iter(talk.images)
    answered = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(images)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in talk.messages[: len(talk.first_question) + 1]
    ]
    inputs = processor.apply_chat_template(
        answered, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    answer = torch.as_tensor(inputs.pop("assistant_masks"))[0, 1:].bool()
    target = inputs["input_ids"][0, 1:][answer]
    with torch.inference_mode():
        logits = model(**_on(model, inputs)).logits[0, :-1].float().cpu()[answer]
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum").item(), len(target)


def load_processor(folder: Path):
    """The export's processor, resizing by PIL as ours does."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = pil_image_processor(processor.image_processor)
    return processor


def _on(model, inputs):
    inputs = inputs.to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs
