"""Tiny CLIP and SigLIP models with real tokenizers, and pairs on disk, for the tests of scoring."""

import json
import subprocess
import sys

import numpy as np
import sentencepiece
import torch
from PIL import Image as PILImage
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTokenizer,
)

from aligngpt_trainers.scoring.run import ScoreConfig


WORDS = ["a", "red", "blue", "green", "kite", "dog", "boat", "over", "under", "near", "the", "bay", "hill"]
IMAGE_SIZE = 16


def save_clip(folder):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=77)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(vocab),
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_siglip(folder):
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=50,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=24)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 50, "max_position_embeddings": 24, "projection_size": 32},
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 8},
    )
    torch.manual_seed(0)
    model = SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-2.0)
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_scorers(folder):
    """`{"clip": folder, "siglip": folder}`."""
    return {"clip": save_clip(folder / "clip"), "siglip": save_siglip(folder / "siglip")}


def make_pairs(count, seed=0):
    """Images of several sizes and captions of several lengths, some beyond what the text models take."""
    rng = np.random.default_rng(seed)
    images, texts = [], []
    for i in range(count):
        low = rng.integers(0, 255, (3 + i % 4, 5, 3), dtype=np.uint8)
        images.append(PILImage.fromarray(low).resize((20 + i % 5, 18 + i % 7)))
        texts.append(" ".join(rng.choice(WORDS, 2 + i % 6 if i % 9 else 40)))
    return images, texts


def write_pairs(folder, count=50):
    """(path of a JSONL file, its images, its captions) of pairs on disk."""
    images, texts = make_pairs(count)
    (folder / "pictures").mkdir()
    with (folder / "pairs.jsonl").open("w") as file:
        for i, (image, text) in enumerate(zip(images, texts, strict=True)):
            image.save(folder / "pictures" / f"{i}.png")
            file.write(json.dumps({"id": i, "image": f"pictures/{i}.png", "caption": text}) + "\n")
    return str(folder / "pairs.jsonl"), images, texts


def config(pairs, scorers, output, **options):
    """Settings of a run of seconds."""
    return ScoreConfig(
        dataset=pairs[0],
        scorer=scorers["clip"],
        output=str(output),
        device="cpu",
        **{"batch_size": 8, "shard_size": 16, "num_align_levels": 4, **options},
    )


# Scores with the settings in argv[1]; each batch's size goes into the file argv[2] (+ rank) before it is scored, after
# which the model takes argv[3] seconds longer. argv[4] limits the size of files from then on.
CHILD = """
import json, os, resource, sys, time
from aligngpt_trainers.scoring.scorer import PairScorer
from aligngpt_trainers.scoring.run import ScoreConfig, score_dataset
settings, log, seconds, file_size = json.loads(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
score = PairScorer.score
def logged(self, image_inputs, text_inputs):
    with open(log + os.environ.get("RANK", ""), "a") as file:
        file.write(f"{len(image_inputs['pixel_values'])}\\n")
    time.sleep(seconds)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    return score(self, image_inputs, text_inputs)
PairScorer.score = logged
try:
    score_dataset(ScoreConfig(**settings))
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
"""


def child_command(settings: ScoreConfig, log, seconds: float = 0.0, file_size: int = 0) -> list[str]:
    """A command that scores with these settings in a process of its own."""
    given = {name: value for name, value in vars(settings).items() if value is not None}
    return [sys.executable, "-c", CHILD, json.dumps(given), str(log), str(seconds), str(file_size)]


def start_child(*args, **options) -> subprocess.Popen:
    """Starts `child_command`."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(child_command(*args, **options), **silent)


def run_child(*args, **options) -> subprocess.CompletedProcess:
    """Runs `child_command` to its end."""
    return subprocess.run(child_command(*args, **options), capture_output=True, text=True, timeout=120, check=False)
