"""Scenes: what stands where on which background, and how that is drawn.

A scene has one to four objects, each in a quadrant of its own: either different ones (up to three) or copies of one
(two to four). Whether a scene belongs to the training or the held-out split is decided by a hash of its content, so
that no held-out combination of objects, places and background is ever trained on, whatever the seed.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from PIL import Image, ImageDraw

from .sprites import OBJECTS, sprite


IMAGE_SIZE = 64
GRID = 4
"""Patches per side that a tower with patch size 16 sees."""
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = {
    "meadow": "in a meadow",
    "desert": "in the desert",
    "snow": "in the snow",
    "night": "at night",
    "sea": "at sea",
    "room": "in a room",
}
"""Background name -> how a caption says it."""
SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 10

_NAMES = tuple(OBJECTS)
_BASE = {
    "meadow": (150, 205, 120),
    "desert": (238, 210, 150),
    "snow": (238, 243, 248),
    "night": (62, 66, 120),
    "sea": (110, 180, 225),
    "room": (225, 185, 175),
}


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    Args:
        background: a key of `BACKGROUNDS`.
        objects: (name, place) in reading order; `place` indexes `PLACES`.
    """

    background: str
    objects: tuple[tuple[str, int], ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the objects in reading order, copies repeated."""
        return tuple(name for name, _ in self.objects)

    @property
    def repeated(self) -> bool:
        """Whether the scene shows several copies of one object."""
        return len(self.objects) > 1 and len(set(self.names)) == 1

    @property
    def main_object(self) -> str:
        """The first object in reading order."""
        return self.objects[0][0]

    def at(self, place: int) -> str | None:
        """Name of the object in a quadrant, None when it is empty."""
        return {where: name for name, where in self.objects}.get(place)

    def cells(self) -> list[str]:
        """One word for each of the 4 x 4 patches in reading order: the object that covers it, else the background."""
        half = GRID // 2
        return [
            self.at((row // half) * 2 + column // half) or self.background
            for row in range(GRID)
            for column in range(GRID)
        ]

    def to_json(self) -> str:
        """The scene as a JSON string; `from_json` reads it back."""
        return json.dumps({"background": self.background, "objects": [list(pair) for pair in self.objects]})

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return cls(fields["background"], tuple((name, place) for name, place in fields["objects"]))


def split_of(scene: Scene) -> str:
    """`"train"` or `"heldout"`: decided by the scene's content alone, about one in ten is held out."""
    digest = hashlib.sha256(scene.to_json().encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % HELDOUT_ONE_IN == 0 else "train"


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {SPLITS}")


def _draw_any_scene(rng: random.Random) -> Scene:
    background = rng.choice(tuple(BACKGROUNDS))
    if rng.random() < 0.25:
        count = rng.randint(2, 4)
        names = [rng.choice(_NAMES)] * count
    else:
        count = rng.choices((1, 2, 3), weights=(2, 3, 2))[0]
        names = rng.sample(_NAMES, count)
    places = sorted(rng.sample(range(len(PLACES)), count))
    return Scene(background, tuple(zip(names, places, strict=True)))


def draw_scene(rng: random.Random, split: str = "train") -> Scene:
    """Draw one scene of a split."""
    while True:
        scene = _draw_any_scene(rng)
        if split_of(scene) == split:
            return scene


def draw_scenes(n: int, seed: int, split: str = "train", unique: bool = False) -> Iterator[Scene]:
    """Draw `n` scenes of a split, the same ones for the same seed.

    Args:
        n: how many.
        seed: any int.
        split: one of `SPLITS`.
        unique: draw no scene twice.
    """
    check_split(split)
    if n < 0:
        raise ValueError(f"n is {n}; it must not be negative")
    rng = random.Random(f"scenes/{split}/{seed}")
    seen: set[Scene] = set()
    while n > 0:
        scene = draw_scene(rng, split)
        if unique and scene in seen:
            continue
        seen.add(scene)
        n -= 1
        yield scene


def _draw_background(name: str, rng: random.Random) -> Image.Image:
    base = [channel + rng.randint(-10, 10) for channel in _BASE[name]]
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(base))
    pen = ImageDraw.Draw(canvas)
    darker, lighter = (tuple(max(0, min(255, channel + step)) for channel in base) for step in (-28, 28))
    for _ in range(14):
        x, y = rng.randrange(IMAGE_SIZE), rng.randrange(IMAGE_SIZE)
        if name == "meadow":
            pen.line((x, y, x + rng.randint(-2, 2), y - 5), fill=darker)
        elif name == "desert":
            pen.arc((x - 8, y - 2, x + 8, y + 4), 200, 340, fill=darker)
        elif name == "snow":
            pen.point([(x, y), (x + 1, y), (x, y + 1), (x - 1, y), (x, y - 1)], fill=(205, 220, 240))
        elif name == "night":
            pen.point([(x, y), (x + 1, y)], fill=(250, 245, 190))
        elif name == "sea":
            pen.line((x, y, x + 3, y - 2, x + 6, y), fill=lighter)
    if name == "room":
        shift = rng.randrange(8)
        for x in range(shift, IMAGE_SIZE, 8):
            pen.line((x, 0, x, IMAGE_SIZE), fill=darker)
    return canvas


def render(scene: Scene, seed: int = 0) -> Image.Image:
    """Draw a scene.

    Sizes, places within the quadrants and the background's texture vary with the seed.

    Args:
        scene: what to draw.
        seed: the same seed draws the same pixels.

    Returns:
        An RGB image of 64 x 64 pixels.
    """
    if scene.background not in BACKGROUNDS:
        raise ValueError(f"background is {scene.background!r}; it must be one of {tuple(BACKGROUNDS)}")
    rng = random.Random(f"render/{seed}")
    canvas = _draw_background(scene.background, rng)
    half = IMAGE_SIZE // 2
    for name, place in scene.objects:
        stamp = sprite(name, rng.choice((26, 28, 30)))
        x = (place % 2) * half + rng.randint(0, half - stamp.width)
        y = (place // 2) * half + rng.randint(0, half - stamp.height)
        canvas.paste(stamp, (x, y), stamp)
    return canvas
