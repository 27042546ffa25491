"""`aligngpt chat`: questions about images in the terminal, answered word by word."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligngpt_shared.printing import printable


if TYPE_CHECKING:
    import torch

HELP = """\
commands: /image FILE  one more image, with the next question
          /reset       forget the conversation and its images
          /level K     steer to alignment level K (0-based); /level alone: what the model does by itself
          /weights     show the gate's weights of the last question
          /quit        leave"""

BAR_WIDTH = 30


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--model",
        required=True,
        help="an AlignGPT: folder or Hub id (default: the quickstart's in runs/, else `playground`, which is trained)",
    )
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    parser.add_argument("--question", help="ask this once and leave; without it the chat is interactive")
    parser.add_argument("--align-level", type=int, metavar="K", help="steer to one alignment level (0-based)")
    parser.add_argument("--show-weights", action="store_true", help="show how the gate mixes the local levels")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest word")
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")


class Chat:
    """
    A conversation with a model.

    Args:
        model, processor: a loaded AlignGPT.
        align_level (`int`, *optional*): 0-based level to steer to; `None`: what `config.align_mode` says.
        max_new_tokens (`int`), temperature (`float`): of the answers.
    """

    def __init__(self, model, processor, align_level: int | None = None, max_new_tokens=256, temperature: float = 0.0):
        self.model, self.processor = model, processor
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.set_level(align_level)
        self.reset()

    def reset(self):
        self.messages: list[dict[str, Any]] = []
        self.images: list = []
        self.waiting: list = []
        self.weights: list[float] | None = None

    def set_level(self, align_level: int | None):
        levels = self.model.config.num_align_levels
        if align_level is not None and not 0 <= align_level < levels:
            raise ValueError(f"alignment level {align_level} is not in 0..{levels - 1}, the model's levels (0-based).")
        self.align_level = align_level

    def add_image(self, path: str):
        """An image that goes with the next question; ValueError when it cannot be read."""
        from ..data.images import load_image

        self.waiting.append(load_image(path, transparency=self.processor.transparency))

    def ask(self, question: str, stream: bool = True) -> str:
        """The answer, printed while it is made when `stream`; the turn joins the conversation."""
        import torch
        from transformers import TextStreamer

        class PrintableStreamer(TextStreamer):
            """Prints the answer while it is made; what a model writes doesn't command the terminal."""

            def on_finalized_text(self, text: str, stream_end: bool = False):
                super().on_finalized_text(printable(text), stream_end)

        content = [{"type": "image"} for _ in self.waiting] + [{"type": "text", "text": question}]
        images, messages = self.images + self.waiting, [*self.messages, {"role": "user", "content": content}]
        inputs = self._inputs(messages, images)
        steering = {} if self.align_level is None else {"align_level": self.align_level}
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                **steering,
                max_new_tokens=self.max_new_tokens,
                return_dict_in_generate=True,
                streamer=PrintableStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
                if stream
                else None,
                **({"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}),
            )
        self.weights = output.align_weights[0].float().tolist() if "pixel_values" in inputs else None
        answer_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
        answer = self.processor.tokenizer.decode(answer_ids, skip_special_tokens=True).strip()
        if not answer:
            # an empty turn would be one that no conversation has
            if stream:
                print("(no answer)")
            return answer
        self.images, self.waiting = images, []
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer

    def _inputs(self, messages: list[dict[str, Any]], images: list) -> "dict[str, torch.Tensor]":
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # the template writes BOS itself
        inputs = self.processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False)
        inputs = inputs.to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def describe_weights(self) -> str:
        """What each level contributed to the last answer as bars, a line a level."""
        if self.weights is None:
            return "no image so far: nothing to weigh."
        lines = [
            f"level {level}  {weight:5.3f}  {'█' * round(weight * BAR_WIDTH)}".rstrip()
            for level, weight in enumerate(self.weights)
        ]
        if self.align_level is not None:
            source = f"steered to level {self.align_level}"
        else:
            source = f'align_mode "{self.model.config.align_mode}"'
        return "\n".join([*lines[:-1], f"{lines[-1]}  (global; {source})"])


def run(args: argparse.Namespace):
    """`aligngpt chat`."""
    import torch
    from transformers import set_seed

    from aligngpt_shared.weights import find_weight_files
    from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

    if os.path.isfile(os.path.join(args.model, "adapter_config.json")):
        raise ValueError(
            f"{args.model} holds an adapter, not a whole model: `aligngpt merge --adapter {args.model} --output DIR` "
            "makes one."
        )
    find_weight_files(Path(args.model))  # an index that leads elsewhere is refused
    set_seed(args.seed)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    try:
        model = AlignGPTForConditionalGeneration.from_pretrained(args.model, dtype=dtype).eval()
    except OSError as error:
        raise ValueError(f"--model {args.model} cannot be loaded ({str(error).strip().splitlines()[0]}).") from error
    if torch.cuda.is_available():
        model.to("cuda")
    processor = AlignGPTProcessor.from_pretrained(args.model)
    processor.validate_with(model.config)
    chat = Chat(model, processor, args.align_level, args.max_new_tokens, args.temperature)
    for path in args.image:
        chat.add_image(path)
    if args.question is not None:
        chat.ask(args.question)
        if args.show_weights:
            print(chat.describe_weights())
        return
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                _command(chat, line)
            elif line:
                chat.ask(line)
                if args.show_weights:
                    print(chat.describe_weights())
        except ValueError as error:
            print(printable(f"error: {error}"))


def _command(chat: Chat, line: str):
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/image" and value:
        chat.add_image(value)
    elif name == "/reset":
        chat.reset()
    elif name == "/level":
        chat.set_level(int(value) if value else None)
    elif name == "/weights":
        print(chat.describe_weights())
    else:
        print(HELP)
