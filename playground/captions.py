"""Captions that fit their image to different degrees: what stage 1 of AlignGPT learns to tell apart."""

import random

from .scenes import BACKGROUNDS, PLACES, Scene, draw_scene
from .sprites import CATEGORIES, OBJECTS, plural, with_article


KINDS = ("exact", "partial", "loose", "wrong", "unrelated")
"""exact: everything, places included. partial: true, but something is left out. loose: categories only. wrong: one fact
is false. unrelated: the caption of another scene."""
DESCRIBE = "Describe the picture."
"""What is asked for where captions are answers."""
NUMBERS = ("zero", "one", "two", "three", "four")


def join_words(parts: list[str]) -> str:
    """`["a", "b", "c"]` -> `"a, b and c"`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def object_phrase(scene: Scene) -> str:
    """The objects in reading order: `"a cat and a dog"`, `"three cats"`."""
    if scene.repeated:
        return f"{NUMBERS[len(scene.objects)]} {plural(scene.main_object)}"
    return join_words([with_article(name) for name in scene.names])


def placed_phrase(scene: Scene) -> str:
    """The objects with their places: `"a cat at the top left and a dog at the bottom right"`."""
    if scene.repeated:
        return object_phrase(scene) + " at the " + join_words([PLACES[place] for _, place in scene.objects])
    return join_words([f"{with_article(name)} at the {PLACES[place]}" for name, place in scene.objects])


def exact_caption(scene: Scene) -> str:
    """The full, true caption of a scene."""
    return f"{placed_phrase(scene)} {BACKGROUNDS[scene.background]}"


def partial_caption(scene: Scene, rng: random.Random) -> str:
    """A true caption that leaves out the places, the background or an object."""
    background = BACKGROUNDS[scene.background]
    choices = [object_phrase(scene), f"{object_phrase(scene)} {background}", placed_phrase(scene)]
    if len(set(scene.names)) > 1:
        name = rng.choice(scene.names)
        choices += [with_article(name), f"{with_article(name)} {background}"]
    return rng.choice(choices)


def loose_caption(scene: Scene, rng: random.Random) -> str:
    """A true caption that names the objects' categories only."""
    if scene.repeated:
        text = "some " + plural(OBJECTS[scene.main_object])
    else:
        text = join_words([with_article(OBJECTS[name]) for name in scene.names])
    return f"{text} {BACKGROUNDS[scene.background]}" if rng.random() < 0.5 else text


def alter(scene: Scene, rng: random.Random) -> Scene:
    """A scene that differs in one fact: an object, a place or the background."""
    objects = list(scene.objects)
    how = rng.choice(("object", "place", "background"))
    if how == "background":
        others = [name for name in BACKGROUNDS if name != scene.background]
        return Scene(rng.choice(others), scene.objects)
    if how == "place" and len(set(scene.names)) > 1 and rng.random() < 0.5:
        first, second = rng.sample(range(len(objects)), 2)
        (a, p), (b, q) = objects[first], objects[second]
        objects[first], objects[second] = (b, p), (a, q)
        return Scene(scene.background, tuple(objects))
    free = [place for place in range(len(PLACES)) if scene.at(place) is None]
    if how == "place" and free:
        index = rng.randrange(len(objects))
        objects[index] = (objects[index][0], rng.choice(free))
        return Scene(scene.background, tuple(sorted(objects, key=lambda pair: pair[1])))
    # All copies change when the scene repeats one object; otherwise one object does, half the time within its category.
    old = scene.main_object if scene.repeated else rng.choice(scene.names)
    pool = CATEGORIES[OBJECTS[old]] if rng.random() < 0.5 else tuple(OBJECTS)
    new = rng.choice([name for name in pool if name not in scene.names])
    return Scene(scene.background, tuple((new if name == old else name, place) for name, place in objects))


def draw_caption(scene: Scene, kind: str, rng: random.Random) -> str:
    """Draw a caption of a scene.

    Args:
        scene: what the image shows.
        kind: one of `KINDS`.
        rng: source of the choices.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind == "exact":
        return exact_caption(scene)
    if kind == "partial":
        return partial_caption(scene, rng)
    if kind == "loose":
        return loose_caption(scene, rng)
    if kind == "wrong":
        return exact_caption(alter(scene, rng))
    if kind == "unrelated":
        while True:
            other = draw_scene(rng)
            if not set(other.names) & set(scene.names) and other.background != scene.background:
                return exact_caption(other)
    raise ValueError(f"caption kind is {kind!r}; it must be one of {KINDS}")
