"""The drawn worlds of the experiment: pairs with scores, their image features, and held-out scenes.

`small` is the quickstart's: its captions, scored by the CLIP that comes with the package. In `blind` nothing was told
what fits: captions of every form are true and untrue equally often, and they are scored by a dual encoder that has
seen such noisy pairs alone, without labelled regions and without made negatives.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from aligngpt_playground import parts_path
from aligngpt_playground.captions import KINDS, alter, exact_caption, loose_caption, partial_caption
from aligngpt_playground.scenes import Scene, draw_scene, draw_scenes, render
from aligngpt_playground.world import KIND_WEIGHTS, draw_caption


FORMS = ("full", "partial", "loose")
TRUTHS = ("true", "wrong", "unrelated")
TRUTH_WEIGHTS = (2, 1, 1)
SCORER_PAIRS, SCORER_SEED = 12_000, 900_000
FEATURE_LAYER = -2


@dataclass
class Pairs:
    """Rows of a world.

    Args:
        scenes: what the images show.
        captions: one for each.
        kinds: what the caption is worth: of `KINDS`, or `form/truth` in the blind world.
        features: [rows, 16, 192], the tower's, as the projector reads them.
        scores: [rows]; higher fits better.
        pooled: [rows, 192], the tower's pooled states, which the small world's scorer reads.
    """

    scenes: list[Scene]
    captions: list[str]
    kinds: list[str]
    features: torch.Tensor
    scores: torch.Tensor
    pooled: torch.Tensor | None = None


def blind_caption(scene: Scene, rng: random.Random, form: str, truth: str) -> str:
    """A caption of one of `FORMS` that is true, has one fact wrong, or belongs to another scene."""
    told = scene
    if truth == "wrong":
        told = alter(scene, rng)
    elif truth == "unrelated":
        while set(told.names) & set(scene.names) or told.background == scene.background:
            told = draw_scene(rng)
    if form == "full":
        return exact_caption(told)
    return partial_caption(told, rng) if form == "partial" else loose_caption(told, rng)


def draw_rows(world: str, number: int, seed: int, split: str) -> tuple[list[Scene], list[str], list[str]]:
    """Scenes, captions and kinds, the same for the same seed."""
    scenes = list(draw_scenes(number, seed, split))
    rng = random.Random(f"levels/{world}/{split}/{seed}")
    captions, kinds = [], []
    for scene in scenes:
        if world == "small":
            kind = rng.choices(KINDS, weights=[KIND_WEIGHTS[kind] for kind in KINDS])[0]
            captions.append(draw_caption(scene, kind, rng))
        else:
            form, truth = rng.choice(FORMS), rng.choices(TRUTHS, TRUTH_WEIGHTS)[0]
            kind = f"{form}/{truth}"
            captions.append(blind_caption(scene, rng, form, truth))
        kinds.append(kind)
    return scenes, captions, kinds


class Tower:
    """The package's CLIP: features for the projector, and the score of the small world."""

    def __init__(self):
        folder = parts_path("clip")
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = CLIPProcessor.from_pretrained(folder)

    @torch.no_grad()
    def read(self, scenes: list[Scene], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [rows, 16, 192] and pooled states [rows, 192] of drawn scenes."""
        features, pooled = [], []
        for start in range(0, len(scenes), 256):
            images = [render(scene, f"{seed}/{start + i}") for i, scene in enumerate(scenes[start : start + 256])]
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            out = self.model.vision_model(pixel_values=pixels, output_hidden_states=True)
            features.append(out.hidden_states[FEATURE_LAYER][:, 1:])
            pooled.append(out.pooler_output)
        return torch.cat(features), torch.cat(pooled)

    @torch.no_grad()
    def score(self, pooled: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """CLIP's cosine of each pair, [rows]."""
        found = []
        for start in range(0, len(captions), 256):
            tokens = self.processor.tokenizer(captions[start : start + 256], padding=True, return_tensors="pt")
            text = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
            image = self.model.visual_projection(pooled[start : start + 256])
            found.append(nn.functional.cosine_similarity(image, text))
        return torch.cat(found)


class DualEncoder(nn.Module):
    """A two-layer text encoder and a pooled projection of frozen image features, trained by CLIP's loss alone."""

    def __init__(self, vocab_size: int, features: int = 192, hidden: int = 128):
        super().__init__()
        self.words = nn.Embedding(vocab_size, hidden)
        self.places = nn.Parameter(torch.randn(64, hidden) * 0.02)
        layer = nn.TransformerEncoderLayer(hidden, 4, 2 * hidden, dropout=0.0, batch_first=True, norm_first=True)
        self.text = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        # every patch keeps a place of its own: a caption says what stands where
        self.image = nn.Sequential(nn.Linear(features, 48), nn.GELU(), nn.Flatten(1), nn.Linear(16 * 48, hidden))
        self.scale = nn.Parameter(torch.tensor(2.5))

    def encode(self, features: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = self.text(self.words(ids) + self.places[: ids.shape[1]], src_key_padding_mask=~mask.bool())
        text = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(self.image(features), dim=-1), nn.functional.normalize(text, dim=-1)


def train_scorer(tower: Tower, tokenizer, path: Path, steps: int = 600, batch: int = 192) -> DualEncoder:
    """The blind world's scorer: on noisy pairs that no experiment trains on; kept in `path`."""
    encoder = DualEncoder(len(tokenizer))
    if path.is_file():
        encoder.load_state_dict(torch.load(path, weights_only=True))
        return encoder.eval()
    torch.manual_seed(0)
    encoder = DualEncoder(len(tokenizer))
    scenes, captions, _ = draw_rows("blind", SCORER_PAIRS, SCORER_SEED, "train")
    features, _ = tower.read(scenes, SCORER_SEED)
    tokens = tokenizer(captions, padding=True, return_tensors="pt", add_special_tokens=False)
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(captions), (batch,), generator=draw)
        image, text = encoder.encode(features[rows], tokens["input_ids"][rows], tokens["attention_mask"][rows])
        logits = encoder.scale.exp().clamp(max=100) * image @ text.T
        target = torch.arange(batch)
        loss = nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(encoder.state_dict(), path)
    return encoder.eval()


class World:
    """Draws pairs of a world and scores them.

    Args:
        name: `small` or `blind`.
        cache: folder that keeps the blind world's scorer.
    """

    def __init__(self, name: str, cache: Path):
        if name not in ("small", "blind"):
            raise ValueError(f"world is {name!r}; it must be small or blind")
        self.name, self.tower = name, Tower()
        self.tokenizer = AutoTokenizer.from_pretrained(parts_path("llama"))
        self.scorer = train_scorer(self.tower, self.tokenizer, cache / "scorer.pt") if name == "blind" else None

    @torch.no_grad()
    def score(self, features: torch.Tensor, pooled: torch.Tensor, captions: list[str]) -> torch.Tensor:
        if self.scorer is None:
            return self.tower.score(pooled, captions)
        found = []
        for start in range(0, len(captions), 512):
            part = slice(start, start + 512)
            tokens = self.tokenizer(captions[part], padding=True, return_tensors="pt", add_special_tokens=False)
            image, text = self.scorer.encode(features[part], tokens["input_ids"], tokens["attention_mask"])
            found.append((image * text).sum(-1))
        return torch.cat(found)

    def pairs(self, number: int, seed: int, split: str = "train") -> Pairs:
        """Scored pairs; no training scene is ever held out."""
        scenes, captions, kinds = draw_rows(self.name, number, seed, split)
        features, pooled = self.tower.read(scenes, seed)
        return Pairs(scenes, captions, kinds, features, self.score(features, pooled, captions), pooled)
