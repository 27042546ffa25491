"""A tiny language model, a tiny CLIP and rows of coloured squares: real parts, small enough to train in seconds."""

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
IMAGE_SIZE, PATCH_SIZE, NUM_LEVELS = 32, 8, 4
MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})


def draw_image(colour: str, size: tuple[int, int] = (40, 32), seed: int = 0) -> PILImage.Image:
    """A noisy image of one colour; `size` is (width, height)."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    return PILImage.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def message(role: str, text: str | None = None, images: int = 0) -> dict:
    parts = [{"type": "image", "text": None}] * images + ([{"type": "text", "text": text}] if text else [])
    return {"role": role, "content": parts}


def to_dataset(rows: list[dict]) -> Dataset:
    features = {"images": List(Image()), "messages": MESSAGES}
    if "align_level" in rows[0]:
        features["align_level"] = Value("int64")
    return Dataset.from_list(rows, features=Features(features))


def pair_rows(number: int) -> list[dict]:
    """Stage-1 rows: an image, its caption and a level."""
    names = list(COLOURS)
    return [
        {
            "images": [draw_image(names[i % 4], seed=i)],
            "messages": [message("user", images=1), message("assistant", f"a {names[i % 4]} square number {i}")],
            "align_level": i % NUM_LEVELS,
        }
        for i in range(number)
    ]


def conversation_rows(number: int) -> list[dict]:
    """Stage-2 rows: one turn, two turns, two images and no image, in turn."""
    rows = []
    for i in range(number):
        colour = list(COLOURS)[i % 4]
        first = [message("user", f"what colour is it {i}?", images=1), message("assistant", colour)]
        second = [message("user", "and the shape?"), message("assistant", "a square")]
        images = [draw_image(colour, seed=i)]
        if i % 4 == 1:
            first += second
        elif i % 4 == 2:
            first[0], images = message("user", "compare them", images=2), [*images, draw_image("red", (20, 50), i)]
        elif i % 4 == 3:
            first, images = [message("user", f"name a colour {i}"), message("assistant", f"{colour} it is")], []
        rows.append({"images": images, "messages": first})
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    texts = [
        part["text"] or ""
        for row in pair_rows(8) + conversation_rows(8)
        for m in row["messages"]
        for part in m["content"]
    ]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "USER: ASSISTANT: the assistant gives helpful answers"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def save_parts(folder):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )
    language_model.save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": 64, "max_position_embeddings": 16},
            vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
            projection_dim=8,
        )
    )
    clip.save_pretrained(folder / "clip")
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(folder / "clip")
    return folder / "language_model", folder / "clip"


def settings(config_class: type, output_dir, **overrides):
    """Settings for a run of seconds."""
    values = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 3,
    }
    return config_class(**{**values, **overrides})


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], model) -> set[str]:
    """The modules, by their place in `AlignGPTModel` or the head, of which at least one bit changed."""
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    return {name.removeprefix("model.").split(".")[0] for name in changed}


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]
