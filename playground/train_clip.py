"""Train the tiny CLIP of `parts/clip`: the scorer of stage 1 and the vision tower of both stages.

Three terms: CLIP's symmetric contrastive loss (Radford et al. 2021) on scenes with captions of graded detail; captions
with one false fact as additional negatives (NegCLIP, Yuksekgonul et al. 2023), without which the scorer is blind to
places; and a region-word term (in the manner of RegionCLIP, Zhong et al. 2022) on the layer that the language model is
fed from: the cosine between a patch and learned vectors, thrown away afterwards, tells the word of what covers the
patch and its quadrant. Cosines, not a free linear layer, because they leave no room in the patch for anything else: a
projector then learns the way to words in few steps. Without the quadrant, a linear probe finds it at chance (31 %).
"""

import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from aligngpt_shared.files import new_folder

from .captions import KINDS, draw_caption
from .optimizer import build_optimizer
from .scenes import BACKGROUNDS, GRID, IMAGE_SIZE, PLACES, draw_scene, draw_scenes, render
from .sprites import OBJECTS


MAX_TEXT_TOKENS = 40
FEATURE_LAYER = -2
REGION_WORDS = (*BACKGROUNDS, *OBJECTS)
PATCH_PLACES = [2 * (row // (GRID // 2)) + column // (GRID // 2) for row in range(GRID) for column in range(GRID)]
_CAPTION_KINDS = random.Random(0).choices(("exact", "partial", "loose"), weights=(6, 3, 1), k=1000)


def build_tokenizer(vocab_size: int = 1200, seed: int = 0) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned on captions of training scenes."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng = random.Random(seed)
    texts = [
        draw_caption(scene, kind, rng) for scene in draw_scenes(8000, seed) for kind in ("exact", "partial", "loose")
    ]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *(left + right for left, right in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=merges, model_max_length=MAX_TEXT_TOKENS
    )


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A fresh CLIPModel: 64 px images in 16 patches of 16 px."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 160,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "max_position_embeddings": MAX_TEXT_TOKENS,
            "pad_token_id": tokenizer.pad_token_id,
            **ids,
        },
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
        },
        projection_dim=128,
    )
    config._attn_implementation = "eager"  # at 17 tokens twice as fast backwards as the fused kernel on a CPU
    return CLIPModel(config)


def build_image_processor() -> CLIPImageProcessor:
    """The image processor of the tower."""
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_convert_rgb=True
    )


class SceneBatches(torch.utils.data.Dataset):
    """Batch `i` is drawn from (seed, i): endless, reproducible, and never a held-out scene.

    Items: images uint8 [batch, 64, 64, 3], token ids of captions followed by captions with a false fact for every
    second image [batch * 3 / 2, length], region labels [batch, 16].
    """

    def __init__(self, tokenizer: CLIPTokenizer, steps: int, batch_size: int, seed: int):
        self.tokenizer, self.steps, self.batch_size, self.seed = tokenizer, steps, batch_size, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"clip/{self.seed}/{step}")
        scenes = [draw_scene(rng) for _ in range(self.batch_size)]
        texts = [draw_caption(scene, rng.choice(_CAPTION_KINDS), rng) for scene in scenes]
        texts += [draw_caption(scene, "wrong", rng) for scene in scenes[::2]]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return {
            "images": torch.from_numpy(np.stack([np.asarray(render(scene, rng.random())) for scene in scenes])),
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "regions": torch.tensor([[REGION_WORDS.index(word) for word in scene.cells()] for scene in scenes]),
        }


def normalise(images: torch.Tensor, processor: CLIPImageProcessor) -> torch.Tensor:
    """Images uint8 [n, H, W, 3] -> pixel values float [n, 3, H, W], as the image processor makes them."""
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (processor.image_mean, processor.image_std))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


class RegionHead(nn.Module):
    """Patches [..., hidden] -> logits of words and of quadrants: cosines to learned vectors over a temperature."""

    def __init__(self, hidden_size: int, temperature: float = 0.05):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(len(REGION_WORDS) + len(PLACES), hidden_size))
        self.temperature = temperature

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unit = nn.functional.normalize(patches.float(), dim=-1)
        cosines = unit @ nn.functional.normalize(self.vectors, dim=-1).T
        return (cosines / self.temperature).split([len(REGION_WORDS), len(PLACES)], dim=-1)


def _features(model: CLIPModel, pixel_values: torch.Tensor, tokens: dict[str, torch.Tensor]):
    seen = model.vision_model(pixel_values=pixel_values, output_hidden_states=True)
    read = model.text_model(**tokens)
    image_embeds = nn.functional.normalize(model.visual_projection(seen.pooler_output).float(), dim=-1)
    text_embeds = nn.functional.normalize(model.text_projection(read.pooler_output).float(), dim=-1)
    return image_embeds, text_embeds, seen.hidden_states[FEATURE_LAYER][:, 1:]


def loss_terms(model: CLIPModel, region_head: nn.Module, batch: dict, pixel_values: torch.Tensor) -> dict:
    """The contrastive and the region-word term of a batch (scalars)."""
    tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
    images, texts, patches = _features(model, pixel_values, tokens)
    logits = model.logit_scale.exp().clamp(max=100) * images @ texts.T  # [batch, batch + negatives]
    target = torch.arange(len(images))
    contrastive = nn.functional.cross_entropy(logits, target)
    contrastive = (contrastive + nn.functional.cross_entropy(logits[:, : len(images)].T, target)) / 2
    words, places = region_head(patches.flatten(0, 1))
    regions = nn.functional.cross_entropy(words, batch["regions"].flatten())
    regions = regions + nn.functional.cross_entropy(places, torch.tensor(PATCH_PLACES).repeat(len(images)))
    return {"contrastive": contrastive, "regions": regions}


@torch.no_grad()
def evaluate(model: CLIPModel, processor: CLIPProcessor, n: int = 512, seed: int = 1) -> dict[str, float]:
    """Held-out figures of a scorer.

    Returns:
        `retrieval_at_1`: share of captions and images (mean of both directions) that find their partner among 256;
        `exact_over_wrong`: share of images whose true caption beats one with a false fact; `similarity_<kind>`: mean
        cosine for each kind of caption.
    """
    model.eval()
    scenes = list(draw_scenes(n, seed, "heldout", unique=True))
    rng = random.Random(seed)
    inputs = processor.image_processor([render(scene, rng.random()) for scene in scenes], return_tensors="pt")
    results, found = {}, []
    for kind in KINDS:
        texts = [draw_caption(scene, kind, rng) for scene in scenes]
        tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        images, embeds, _ = _features(model, inputs["pixel_values"], dict(tokens))
        similarity = (images * embeds).sum(-1)
        results[f"similarity_{kind}"] = similarity.mean().item()
        if kind == "exact":
            exact = similarity
            for start in range(0, n - 255, 256):
                block = images[start : start + 256] @ embeds[start : start + 256].T
                found += [(block.argmax(dim) == torch.arange(256)).float().mean().item() for dim in (0, 1)]
        if kind == "wrong":
            results["exact_over_wrong"] = (exact > similarity).float().mean().item()
    results["retrieval_at_1"] = sum(found) / len(found)
    return results


def save(model: CLIPModel, processor: CLIPProcessor, output: Path) -> None:
    """Write model (float16 safetensors) and processor to a folder; written beside, then renamed."""
    with new_folder(output, replace=True) as folder:
        state = {key: value.half() for key, value in model.state_dict().items() if value.is_floating_point()}
        model.save_pretrained(folder, state_dict={**model.state_dict(), **state})
        processor.save_pretrained(folder)


def train(
    output: Path,
    steps: int = 1200,
    batch_size: int = 128,
    learning_rate: float = 1.5e-3,
    region_weight: float = 2.0,
    seed: int = 0,
    save_every: int = 1000,
) -> dict[str, float]:
    """Train the tiny CLIP and save it.

    Args:
        output: the folder to write.
        steps: optimiser steps.
        batch_size: scenes per step.
        learning_rate: peak of the cosine schedule.
        region_weight: weight of the region-word term; 0 leaves it out.
        seed: seeds weights and data.
        save_every: steps between evaluations; the model is saved each time.

    Returns:
        The figures of `evaluate`.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed=seed)
    model, image_processor = build_model(tokenizer), build_image_processor()
    processor = CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
    region_head = RegionHead(model.config.vision_config.hidden_size)
    parameters = [*model.parameters(), *region_head.parameters()]
    optimizer, schedule = build_optimizer(parameters, learning_rate, steps, longest_warmup=300)
    data = SceneBatches(tokenizer, steps, batch_size, seed)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4)
    started, figures = time.time(), {}
    progress = tqdm(enumerate(loader, start=1), total=steps, desc="clip", mininterval=10)
    for step, batch in progress:
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = loss_terms(model, region_head, batch, normalise(batch["images"], image_processor))
        loss = terms["contrastive"] + region_weight * terms["regions"]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix({key: f"{value.item():.3f}" for key, value in terms.items()})
        if step % save_every == 0 or step == steps:
            figures = {key: round(value, 3) for key, value in evaluate(model, processor).items()}
            save(model, processor, output)
            tqdm.write(f"clip: step {step}/{steps}, {time.time() - started:.0f} s, {figures}")
    return figures
