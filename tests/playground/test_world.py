"""The small world's data: reproducible, split without overlap, and every answer right."""

import random

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image

from aligngpt_playground import (
    CATEGORIES,
    KINDS,
    OBJECTS,
    QUESTION_TYPES,
    SPLITS,
    Scene,
    all_questions,
    draw_caption,
    draw_scenes,
    exact_caption,
    make_conversations,
    make_pairs,
    parts_path,
    render,
    split_of,
    write_world,
)
from aligngpt_playground.__main__ import main
from aligngpt_playground.captions import NUMBERS
from aligngpt_playground.scenes import BACKGROUNDS, IMAGE_SIZE, PLACES
from aligngpt_playground.sprites import plural, sprite, with_article


def test_every_object_has_a_visible_sprite_of_its_own():
    assert len(OBJECTS) == sum(map(len, CATEGORIES.values())) >= 100
    seen = set()
    for name in OBJECTS:
        image = sprite(name, 28)
        pixels = np.asarray(image)
        assert image.mode == "RGBA" and max(image.size) == 28
        assert (pixels[..., 3] > 128).mean() > 0.08, name
        seen.add(pixels.tobytes())
    assert len(seen) == len(OBJECTS)


def test_names_are_unique_single_lower_case_words():
    words = [*OBJECTS, *CATEGORIES, *BACKGROUNDS]
    assert len(set(words)) == len(words)
    assert all(word.isalpha() and word.islower() for word in words)
    plurals = [plural(name) for name in OBJECTS]
    assert len(set(plurals)) == len(plurals)


def test_unknown_sprite_and_background_are_named():
    with pytest.raises(ValueError, match="'gnu'"):
        sprite("gnu", 28)
    with pytest.raises(ValueError, match="'swamp'"):
        render(Scene("swamp", (("cat", 0),)))


def test_same_seed_same_rows_other_seed_other_rows():
    for make in (make_pairs, make_conversations):
        first, again, other = make(20, 3), make(20, 3), make(20, 4)
        assert first == again
        assert [row["scene"] for row in first] != [row["scene"] for row in other]


def test_rendering_depends_on_scene_and_seed_alone():
    scene = Scene("snow", (("cat", 0), ("dog", 3)))
    pixels = np.asarray(render(scene, 5))
    assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert (pixels == np.asarray(render(scene, 5))).all()
    assert (pixels != np.asarray(render(scene, 6))).any()


def test_objects_are_drawn_in_their_own_quadrant():
    half = IMAGE_SIZE // 2
    for place in range(len(PLACES)):
        empty = np.asarray(render(Scene("room", ()), 1)).astype(int)
        full = np.asarray(render(Scene("room", (("frog", place),)), 1)).astype(int)
        changed = np.abs(full - empty).sum(-1) > 0
        row, column = divmod(place, 2)
        inside = changed[row * half : (row + 1) * half, column * half : (column + 1) * half]
        assert inside.any() and inside.sum() == changed.sum()


def test_cells_tell_what_covers_each_patch():
    cells = Scene("sea", (("cat", 1), ("bus", 2))).cells()
    assert cells == ["sea", "sea", "cat", "cat"] * 2 + ["bus", "bus", "sea", "sea"] * 2


def test_splits_share_no_scene():
    train = {scene for seed in range(3) for scene in draw_scenes(3000, seed)}
    heldout = set(draw_scenes(1500, 0, "heldout"))
    assert train and heldout and not train & heldout
    assert {split_of(scene) for scene in train} == {"train"} and {split_of(scene) for scene in heldout} == {"heldout"}
    pairs = {row["scene"] for row in make_pairs(300, 0, "heldout")}
    conversations = {row["scene"] for row in make_conversations(300, 0, "train")}
    assert all(split_of(Scene.from_json(text)) == "heldout" for text in pairs)
    assert all(split_of(Scene.from_json(text)) == "train" for text in conversations)


def test_no_caption_describes_a_held_out_scene_in_training():
    heldout = {exact_caption(scene) for scene in draw_scenes(5000, 0, "heldout")}
    unrelated = {row["caption"] for row in make_pairs(400, 0, kinds=["unrelated"])}
    assert not heldout & unrelated


def test_unique_scenes():
    scenes = list(draw_scenes(800, 0, "heldout", unique=True))
    assert len(set(scenes)) == 800


def test_scene_survives_json():
    for scene in draw_scenes(50, 0):
        assert Scene.from_json(scene.to_json()) == scene


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'test'"):
        make_pairs(1, 0, "test")
    with pytest.raises(ValueError, match="n is -1"):
        make_conversations(-1, 0)
    with pytest.raises(ValueError, match="turns is 0"):
        make_conversations(1, 0, turns=0)
    with pytest.raises(ValueError, match="'vague'"):
        make_pairs(1, 0, kinds=["vague"])
    with pytest.raises(ValueError, match="'vague'"):
        draw_caption(next(draw_scenes(1, 0)), "vague", random.Random(0))
    with pytest.raises(ValueError, match="'gpt'"):
        parts_path("gpt")


def words_of(text):
    return text.replace(",", " ").replace("?", " ").split()


@pytest.mark.parametrize("kind", KINDS)
def test_caption_kinds_say_what_they_promise(kind):
    rng = random.Random(0)
    names = {word: name for name in OBJECTS for word in (name, plural(name))}
    for scene in draw_scenes(300, 1):
        caption = draw_caption(scene, kind, rng)
        exact = exact_caption(scene)
        named = {names[word] for word in words_of(caption) if word in names}
        if kind == "exact":
            assert caption == exact and named == set(scene.names) and BACKGROUNDS[scene.background] in caption
            assert all(PLACES[place] in caption for _, place in scene.objects)
        elif kind == "partial":
            assert caption != exact and named and named <= set(scene.names)
        elif kind == "loose":
            assert not named
            kinds = {OBJECTS[name] for name in scene.names}
            assert all(category in caption for category in kinds)
        elif kind == "wrong":
            assert caption != exact
            assert len(set(words_of(caption)) & set(words_of(exact))) > 2
        else:
            assert not named & set(scene.names) and BACKGROUNDS[scene.background] not in caption


def independent_answer(scene, kind, question):
    """The answer read off the scene by other means than those that made it."""
    grid = [[None, None], [None, None]]
    for name, place in scene.objects:
        grid[place // 2][place % 2] = name
    words = words_of(question)
    spots = {name: (row, column) for row in (0, 1) for column, name in enumerate(grid[row]) if name}
    if kind == "what":
        if len(scene.names) > 1 and len(set(scene.names)) == 1:
            return f"{NUMBERS[len(scene.names)]} {plural(scene.names[0])}"
        told = [with_article(name) for row in grid for name in row if name]
        return told[0] if len(told) == 1 else ", ".join(told[:-1]) + " and " + told[-1]
    if kind == "count":
        asked = words[2]
        return NUMBERS[sum(asked in ("things", plural(name)) for row in grid for name in row if name)]
    if kind == "background":
        return scene.background
    if kind == "relation":
        row, column = spots[words[-1]]
        step = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[words[2]]
        return grid[row + step[0]][column + step[1]]
    if kind in ("category", "place"):
        row, column = int(words[-2] == "bottom"), int(words[-1] == "right")
        return OBJECTS[grid[row][column]] if kind == "category" else grid[row][column]
    if kind == "yesno":
        return "yes" if words[-1] in spots else "no"
    row, column = spots[words[-1]]
    return f"{('top', 'bottom')[row]} {('left', 'right')[column]}"


def test_every_answer_is_right():
    rng = random.Random(0)
    asked = dict.fromkeys(QUESTION_TYPES, 0)
    for scene in draw_scenes(600, 2):
        for kind, questions in all_questions(scene, rng).items():
            for question in questions:
                assert question.type == kind
                assert question.answer == independent_answer(scene, kind, question.question), (scene, question)
                asked[kind] += 1
    assert min(asked.values()) > 200, asked


def test_conversations_hold_one_image_and_alternate():
    for row in make_conversations(40, 0, turns=4):
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * len(row["types"]) and 1 <= len(row["types"]) <= 4
        assert len(set(row["types"])) == len(row["types"])
        images = [part for message in row["messages"] for part in message["content"] if part["type"] == "image"]
        assert len(images) == len(row["images"]) == 1 and row["messages"][0]["content"][0]["type"] == "image"
        scene = Scene.from_json(row["scene"])
        for kind, question, answer in zip(row["types"], row["messages"][::2], row["messages"][1::2], strict=True):
            text = question["content"][-1]["text"]
            assert answer["content"][0]["text"] == independent_answer(scene, kind, text)


def test_write_world_and_command(tmp_path, capsys):
    written = write_world(tmp_path, 30, 20, 12, 10, seed=1, progress=False)
    assert written == {
        "pairs/train": 30,
        "pairs/heldout": 12,
        "conversations/train": 20,
        "conversations/heldout": 10,
    }
    pairs = load_from_disk(tmp_path / "pairs")
    assert set(pairs) == set(SPLITS)
    expected = make_pairs(30, 1)
    assert [row["caption"] for row in pairs["train"]] == [row["caption"] for row in expected]
    assert (np.asarray(pairs["train"][4]["image"]) == np.asarray(expected[4]["image"])).all()
    conversations = load_from_disk(tmp_path / "conversations")["heldout"]
    assert conversations[3]["messages"][1]["role"] == "assistant" and conversations[3]["images"][0].size == (64, 64)

    command = ["make", "--output", str(tmp_path), "--pairs", "5", "--conversations", "4"]
    assert main([*command, "--heldout-pairs", "3", "--heldout-conversations", "2"]) == 0
    assert "pairs/train: 5 rows" in capsys.readouterr().out
    assert len(load_from_disk(tmp_path / "pairs")["train"]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conversations", "images", "pairs"]
    heldout = load_from_disk(tmp_path / "conversations")["heldout"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["0.png", "1.png"]
    with Image.open(tmp_path / "images" / "1.png") as image:
        assert (np.asarray(image) == np.asarray(heldout[1]["images"][0])).all()
    assert main(["make", "--output", str(tmp_path), "--pairs", "-1"]) == 2
    assert "n is -1" in capsys.readouterr().err
