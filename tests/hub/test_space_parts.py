"""The Space's modules by themselves: images, the map's geometry, bars, and answers of a real small model."""

import importlib
import re
import sys
import threading
import time
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from demo_model import CONTEXT, save_demo_model
from PIL import Image, ImageDraw
from transformers import LlavaImageProcessor

from aligngpt_hub.demo.space import TEMPLATE
from modeling_aligngpt import AlignGPTProcessor


MODULES = ("answers", "alignment", "images", "page")


@pytest.fixture(scope="module")
def space():
    """The Space's modules, imported as the app does."""
    sys.path.insert(0, str(TEMPLATE))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(TEMPLATE))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def answers(space, tmp_path_factory):
    space["answers"].load(str(save_demo_model(tmp_path_factory.mktemp("models") / "demo")))
    return space["answers"]


@pytest.fixture(scope="module")
def whale():
    return Image.open(TEMPLATE / "examples" / "whale-and-balloon.png").convert("RGB")


def ask(text: str = "what is in the picture?") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# ---- images ----


@pytest.fixture
def reader(space, monkeypatch):
    """The processor's own door for images, which needs no model."""
    processor = SimpleNamespace(transparency="white")
    processor.read_image = partial(AlignGPTProcessor.read_image, processor)
    monkeypatch.setattr(space["images"], "loaded", lambda: SimpleNamespace(processor=processor))


def test_images_are_read_upright_and_in_rgb(space, reader, tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[274] = 6  # the camera was turned
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert space["images"].read_image(tmp_path / "turned.jpg").size == (20, 40)
    Image.new("LA", (5, 6)).save(tmp_path / "grey.png")
    grey = space["images"].read_image(tmp_path / "grey.png")
    assert grey.mode == "RGB" and grey.getpixel((0, 0)) == (255, 255, 255)  # transparent throughout


def test_unusable_images_are_refused_with_what_is_wrong(space, reader, tmp_path):
    images = space["images"]
    (tmp_path / "text.png").write_text("no image")
    whole = (TEMPLATE / "examples" / "teddy-and-car.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (9000, 6000)).save(tmp_path / "wide.png")
    Image.new("1", (12000, 9000)).save(tmp_path / "bomb.png")
    (tmp_path / "heavy.png").write_bytes(whole + bytes(11 * 2**20))
    for name, message in {
        "text.png": "damaged or of a format that is not accepted",
        "cut.png": "damaged and cannot be read: image file is truncated",
        "wide.png": "9000 x 6000 pixels, at most 50,000,000",
        "bomb.png": "more than 100,000,000 pixels",
        "heavy.png": "11.0 MB, at most 10 MB",
    }.items():
        with pytest.raises(images.ImageError, match=re.escape(message)) as caught:
            images.read_image(tmp_path / name)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(images.ImageError, match="no image yet"):
        images.read_image(None)


@pytest.mark.parametrize("size", [(64, 64), (120, 48), (50, 130)])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_pad": True},
        {"do_pad": False},
        {"do_pad": False, "size": {"height": 64, "width": 64}, "do_center_crop": False},
        {"do_pad": True, "size": {"shortest_edge": 80}},
    ],
    ids=["padded", "cropped", "stretched", "padded and cropped"],
)
def test_patches_lie_where_the_processor_took_them_from(space, size, settings):
    processor = LlavaImageProcessor(
        **{"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}} | settings
    )
    box = space["images"].seen_box(size, processor)
    checked = 0
    for row, column in [(0, 0), (1, 2), (2, 1), (3, 3)]:
        x, y = box.left + (column + 0.5) * box.width / 4, box.top + (row + 0.5) * box.height / 4
        if not (4 < x < size[0] - 4 and 4 < y < size[1] - 4):
            continue
        image = Image.new("RGB", size, "black")
        ImageDraw.Draw(image).rectangle((x - 3, y - 3, x + 3, y + 3), fill="white")
        pixels = np.asarray(processor(image, do_normalize=False, return_tensors="np")["pixel_values"])[0].mean(0)
        cells = pixels.reshape(4, 16, 4, 16).max((1, 3))
        assert np.unravel_index(cells.argmax(), cells.shape) == (row, column)
        checked += 1
    assert checked


# ---- what is drawn ----


def test_the_map_covers_the_image_and_only_the_image(space):
    # 120 x 60, padded to a square: the outer two of four rows of patches are padding
    html = space["alignment"].map_html(
        Image.new("RGB", (120, 60)),
        [[-0.9] * 4, [0.0, 0.1, -0.15, 0.3], [0.1, 0.1, 0.1, -0.4], [0.9] * 4],
        space["images"].Box(0, -30, 120, 120),
    )
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", html, re.DOTALL).group(0))
    rects = [element for element in svg.iter() if element.tag == "rect"]
    places = {(float(rect.get("x")), float(rect.get("y"))): rect for rect in rects}
    assert sorted(places) == [(x, y) for x in (0, 30, 60, 90) for y in (0, 30)]
    colours = {place: rect.get("fill") for place, rect in places.items()}
    # signed, and the same scale for every image: zero has no colour, the ends are full
    assert colours[0, 0] == "rgb(247,247,247)" and colours[60, 0] == "rgb(166,143,192)"
    assert colours[90, 0] == "rgb(230,97,1)" and colours[90, 30] == "rgb(84,39,136)"
    assert svg.get("role") == "img"
    assert "Most similar to the prompt is row 2, column 4 (+0.300), least row 3, column 4 (-0.400)" in svg.get(
        "aria-label"
    )
    assert "&minus;0.3</span>" in html and "+0.3</span>" in html and "Not where the answer comes from" in html


def test_bars_show_what_was_used_and_what_the_gate_would_have_done(space):
    alignment = space["answers"].Alignment([0.25, 0.75], [0.25, 0.75, 1.0], [])
    mixed = space["alignment"].bars_html([("<As> the model decides", alignment)])
    assert "&lt;As&gt;" in mixed and "<As>" not in mixed
    assert re.findall(r'class="share">([\d.]+)<', mixed) == ["0.25", "0.75", "1.00"]
    # one scale for all: a bar is as long as its weight
    assert re.findall(r'class="bar(?: top)?" style="width:([\d.]+)%', mixed) == ["25.0", "75.0", "100.0"]
    assert 'class="ghost"' not in mixed and "level 2 is always added with 1" in mixed
    fixed = space["answers"].Alignment([0.25, 0.75], [1.0, 0.0, 0.0], [])
    steered = space["alignment"].bars_html([("a", alignment), ("b", fixed)]).split("<caption>")[2]
    assert re.findall(r'class="share">([\d.]+)<', steered) == ["1.00", "0.00", "0.00"]
    assert re.findall(r'ghost" style="width:([\d.]+)%', steered) == ["25.0", "75.0"]
    assert "most of level 1 (0.75)" in steered
    # a model without a gate shows none
    bare = space["alignment"].bars_html([("a", space["answers"].Alignment([], [0.0, 0.0, 1.0], []))])
    assert "ghost" not in bare and "gate" not in bare and re.findall(r'class="share">([\d.]+)<', bare)[2] == "1.00"


# ---- answers ----


def test_the_alignment_is_the_models_own(answers, whale):
    loaded = answers.loaded()
    for level in (None, 3, 7):
        first = next(answers.stream_answer(whale, ask(), level))
        inputs, _ = answers._inputs(loaded, whale, ask())
        steering = {} if level is None else {"align_level": level}
        expected = loaded.model(**inputs, **steering).align_weights[0]
        torch.testing.assert_close(torch.tensor(first.shares), expected)
        assert first.shares[-1] == pytest.approx(1.0 if level in (None, 7) else 0.0)
        # the gate's weights do not depend on the level that is fixed
        torch.testing.assert_close(torch.tensor(first.gate), loaded.model(**inputs).align_weights[0, :-1])
        assert [len(row) for row in first.similarity] == [4] * 4


def test_the_answer_grows_to_what_generate_gives(answers, whale):
    loaded = answers.loaded()
    inputs, room = answers._inputs(loaded, whale, ask())
    said = {}
    for level in (None, 0, 5):
        pieces = list(answers.stream_answer(whale, ask(), level))[1:]
        steering = {} if level is None else {"align_level": level}
        ids = loaded.model.generate(**inputs, **steering, do_sample=False, max_new_tokens=room)
        expected = loaded.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert pieces[-1] == answers.Piece(expected.strip(), "end")
        assert len(pieces) > 5
        for shorter, longer in pairwise(pieces):
            assert longer.text.startswith(shorter.text)
        said[level] = expected
    assert len(set(said.values())) == 3, said


def test_further_turns_read_what_was_said(answers, whale):
    turns = [*ask(), {"role": "assistant", "content": "a whale"}, *ask("where is it?")]
    prompt = answers.loaded().processor.tokenizer.decode(
        answers._inputs(answers.loaded(), whale, turns)[0]["input_ids"][0]
    )
    assert prompt.index("a whale") < prompt.index("where is it?") and prompt.count("<align>") == 1


def test_limits_of_a_question(answers, whale):
    (*_, last) = answers.stream_answer(whale, ask(), None, max_new_tokens=12)
    assert last.ending == "length" and len(last.text.split()) <= 12
    for text, message in {
        " ": "no question yet",
        "what? " * 400: "2399 characters, at most 2000",
        "an <image> of what?": "holds <image>",
        "what is it? " * 80: f"the model reads {CONTEXT}",
    }.items():
        with pytest.raises(answers.QuestionError, match=re.escape(message)):
            next(answers.stream_answer(whale, ask(text), None))


def slow_down(model, seconds: float) -> tuple[list[float], object]:
    calls = []

    def wait(*_):
        calls.append(time.monotonic())
        time.sleep(seconds)

    return calls, model.register_forward_pre_hook(wait)


def test_time_per_answer_is_limited(answers, whale, monkeypatch):
    monkeypatch.setattr(answers, "MAX_SECONDS", 0.2)
    calls, hook = slow_down(answers.loaded().model, 0.05)
    with hook:
        (*_, last) = answers.stream_answer(whale, ask(), None)
    assert last.ending == "time" and last.text
    assert len(calls) < 10


def test_nobody_listening_ends_the_work(answers, whale):
    calls, hook = slow_down(answers.loaded().model, 0.05)
    with hook:
        stream = answers.stream_answer(whale, ask(), None)
        next(stream), next(stream), next(stream)
        stream.close()
        (work,) = [thread for thread in threading.enumerate() if type(thread).__name__ == "_Generation"] or [None]
        if work is not None:
            work.join(timeout=1)
            assert not work.is_alive()
    assert len(calls) < 10


def test_what_goes_wrong_in_the_model_reaches_the_caller(answers, whale, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(answers.loaded().model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(answers.stream_answer(whale, ask(), None))


def test_a_folder_made_for_no_model_asks_for_one(space, monkeypatch):
    monkeypatch.delenv("MODEL_ID", raising=False)
    with pytest.raises(ValueError, match="set MODEL_ID"):
        space["answers"].load()


# ---- the page's functions, as its buttons call them ----


def said(role: str, text: str) -> dict:
    # as gradio hands a chat over
    return {"role": role, "content": [{"type": "text", "text": text}], "metadata": None}


@pytest.mark.parametrize("left_behind", [[], ["where?"], ["where?", ""]], ids=["answered", "before it", "at once"])
def test_a_stopped_question_does_not_block_the_next(space, answers, left_behind):
    chat = [said("user", "what is it?"), said("assistant", "a whale")]
    chat += [said(role, text) for role, text in zip(("user", "assistant"), left_behind, strict=False)]
    image = str(TEMPLATE / "examples" / "whale-and-balloon.png")
    *_, last = space["page"].chat_on(image, "what is there?", chat, [], 3, 0, False)
    assert [message["role"] for message in last[1]] == ["user", "assistant"] * 2
    assert last[1][2]["content"] == "what is there?" and last[1][3]["content"]
    assert "Answered in" in last[-1]


def test_retry_repeats_the_last_question_in_both_chats(space, answers):
    first = [said("user", "what is it?"), said("assistant", "a whale")]
    chat = [*first, said("user", "what is in the picture?"), said("assistant", "this")]
    image = str(TEMPLATE / "examples" / "whale-and-balloon.png")
    *_, last = space["page"].retry(image, "half a quest", chat, first, 3, 4, True)
    for lane in last[1:3]:
        assert [turn["content"] for turn in space["page"]._turns(lane)][:3] == [
            "what is it?",
            "a whale",
            chat[2]["content"][0]["text"],
        ]
        assert len(lane) == 4
    assert last[1][3] != last[2][3]
    ((*_, status),) = space["page"].retry(image, "", [], [], 3, 4, False)
    assert "no question to repeat" in status and 'role="alert"' in status


def test_an_unforeseen_failure_is_shown_as_what_it_is(space, answers, monkeypatch):
    def fail(**_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(answers.loaded().model, "generate", fail)
    image = str(TEMPLATE / "examples" / "whale-and-balloon.png")
    shown = []
    with pytest.raises(Exception, match="RuntimeError: CUDA out of memory"):
        for state in space["page"].chat_on(image, "what?", [], [], -1, 0, False):
            shown.append(state)
    # the question is back in its box, and the chat as it was
    assert shown[-1][0] == "what?" and shown[-1][1] == [] and "out of memory" in shown[-1][-1]
