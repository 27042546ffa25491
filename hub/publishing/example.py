"""An image and the model's own answer about it, for the head of its card."""

from pathlib import Path

import torch
from PIL import Image

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


IMAGE = "assets/example.png"
LARGEST_SIDE, MOST_TOKENS = 512, 128


def ask(
    model: AlignGPTForConditionalGeneration,
    processor: AlignGPTProcessor,
    image: Image.Image | None,
    question: str,
    max_new_tokens: int,
) -> torch.Tensor:
    """The tokens `(T,)` of a greedy answer, about an image or about none."""
    content = [] if image is None else [{"type": "image", "image": image}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    if image is not None:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :]


def answer_example(folder: Path, image: str, question: str, output: Path) -> dict[str, str]:
    """
    Asks the model about an image, greedily, and keeps the image, made small.

    Args:
        folder: of the model; after stage 1 a caption is made and the question passed over.
        image: a file; whoever names it answers for its licence.
        question: what is asked.
        output: folder that gets `IMAGE`.

    Returns:
        `image`, `question` and `answer`.

    Raises:
        ValueError, OSError: the image cannot be read.
    """
    processor = AlignGPTProcessor.from_pretrained(folder)
    shown = processor.read_image(image, allow_urls=False)
    model = AlignGPTForConditionalGeneration.from_pretrained(folder).eval()
    ids = ask(model, processor, shown, question, MOST_TOKENS)
    answer = processor.tokenizer.decode(ids, skip_special_tokens=True)
    small = shown.copy()
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    (output / IMAGE).parent.mkdir(parents=True, exist_ok=True)
    small.save(output / IMAGE, "PNG")
    return {"image": IMAGE, "question": question, "answer": " ".join(answer.split()) or "(no answer)"}
