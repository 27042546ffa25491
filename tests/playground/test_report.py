import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from aligngpt_playground import write_world
from aligngpt_playground.evaluate import evaluate_captions, evaluate_questions
from aligngpt_playground.report import gate_bars, histogram, loss_curve, render_report, ticks, write_report


NASTY = "<script>alert('&')</script>"


@pytest.fixture(scope="module")
def folder(untrained_folder, tmp_path_factory):
    """What a quickstart leaves for the report, with the figures of an untrained model."""
    folder = tmp_path_factory.mktemp("report")
    write_world(folder / "data", 20, 20, 6, 8, progress=False)
    (folder / "images").mkdir()
    captions = evaluate_captions(untrained_folder, folder / "data/pairs", folder / "images", examples=2)
    asked = evaluate_questions(
        untrained_folder, folder / "data/conversations", folder / "images", before=untrained_folder
    )
    captions["examples"][0]["by_level"][0] = NASTY
    example = asked["questions"]["examples"][0]
    results = {
        "captions": captions,
        **asked,
        "targets": [{"name": "Questions answered right", "value": 0.5, "target": 0.65, "met": False}],
        "levels": {
            "edges": [0.0, 0.5, 1.0],
            "counts": [3, 5],
            "histogram": {"low": 0.0, "high": 1.0, "counts": [1, 2, 0, 5]},
            "examples": [{"image": example["image"], "caption": "a cat", "score": 0.25}, None],
        },
        "losses": {"pretrain": [[10, 2.0], [20, 1.5]], "instruct": []},
        "parameters": {"all": 3_859_079, "trained_in_pretrain": 75_648, "trained_in_instruct": 1_974_343},
        "loaded_back": {"program": "ask = pipeline(...)", "answers": [{**example, "right": False, "answer": ""}]},
        "steps": [{"name": "Stage 1", "command": "aligngpt pretrain --config 'a b.yaml'", "seconds": 1.25}],
        "seconds": 1.5,
        "machine": "2 CPU cores",
        "versions": {"torch": "2.13"},
        "attribution": "Sprites: OpenMoji (https://openmoji.org)",
    }
    # images are named relative to the folder, as in a quickstart, which runs in it
    text = json.dumps(results).replace(f"{folder.as_posix()}/", "")
    (folder / "results.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def html(folder):
    path = write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob("*.partial"))
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects tags, and sees that all are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def tags(html):
    return Tags(html)


def test_the_page_is_well_formed_and_asks_for_nothing_outside(html, tags):
    assert not tags.open
    assert not [tag for tag, _ in tags.tags if tag in ("script", "link", "iframe", "object", "embed", "form")]
    for _, attrs in tags.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "srcset", "xlink:href", "action"):
            assert attrs.get(name, "data:").startswith("data:")
    assert "url(" not in html and "@import" not in html


def test_images_are_embedded_and_described(folder, tags, results):
    images = tags.attributes("img")
    number = len(results["captions"]["examples"]) + len(results["questions"]["examples"]) + 1 + 1
    assert len(images) == number
    for attrs in images:
        kind, _, data = attrs["src"].partition(",")
        assert kind == "data:image/png;base64" and "alt" in attrs
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 64)
    first = (folder / results["captions"]["examples"][0]["image"]).read_bytes()
    assert base64.b64decode(images[0]["src"].partition(",")[2]) == first


def test_texts_are_escaped(html):
    assert NASTY not in html
    assert "&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;" in html


def test_figures_captions_answers_and_commands_are_there(html, results):
    for row in (*results["captions"]["rows"], *results["questions"]["rows"], results["questions"]["overall"]):
        assert f"{row['accuracy']:.3f}</td>" in html and f"{row['majority']:.3f}</td>" in html
    assert html.count("at chance</span>") == sum(
        row["at_chance"]
        for row in (*results["captions"]["rows"], *results["questions"]["rows"], results["questions"]["overall"])
    )
    for example in results["questions"]["examples"]:
        assert example["question"] in html
    assert "aligngpt pretrain --config &#39;a b.yaml&#39;" in html
    assert "target 0.65: missed" in html and "(nothing)" in html


def test_the_gate_is_drawn_for_every_question(html, results):
    charts = re.findall(r'<svg class="chart"[^>]*aria-label="Gate weights.*?</svg>', html)
    assert len(charts) == len(results["questions"]["examples"])
    for chart, example in zip(charts, results["questions"]["examples"], strict=True):
        heights = [float(height) for height in re.findall(r'<rect class="bar"[^>]*height="([\d.]+)"', chart)]
        assert len(heights) == 7
        scale = max(heights) / max(example["weights"])
        assert heights == pytest.approx([weight * scale for weight in example["weights"]], abs=0.06 + scale * 1e-3)


def test_light_dark_and_phones_are_cared_for(html):
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in html
    assert "prefers-color-scheme: dark" in html and 'name="color-scheme" content="light dark"' in html


def test_charts_keep_to_their_plane():
    curve = str(loss_curve([[10, 3.0], [20, 1.0]], "stage 1"))
    points = re.search(r'points="([^"]+)"', curve)[1].split()
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points)
    assert 0 < x1 < x2 < 360 and 0 < y1 < y2 < 200
    bars = str(histogram([0, 4, 2], -0.5, 1.0, [-0.5, 0.25, 1.0]))
    assert bars.count('class="edge"') == 1 and bars.count('class="bar"') == 3
    heights = [float(height) for height in re.findall(r'class="bar"[^>]*height="([\d.]+)"', bars)]
    assert heights[0] == 0 and heights[1] == pytest.approx(2 * heights[2], abs=0.2)
    assert "polyline" in str(loss_curve([], "an empty run"))
    assert str(gate_bars([], 1.0)).endswith("</svg>")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.23, 0.91), (0, 3.37), (0, 7000), (0.5, 0.5)])
def test_ticks_are_round_and_within(low, high):
    values = ticks(low, high)
    assert 1 <= len(values) <= 6
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)
    assert all(len(f"{value:g}") <= 5 for value in values)


def test_missing_results_and_images_are_named(folder, results, tmp_path):
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match=r"image caption-0\.png, which is missing"):
        render_report(results, tmp_path)


def test_questions_stand_beside_what_was_right_before_stage_2(html, results):
    for row in [*results["questions"]["rows"], results["questions"]["overall"]]:
        assert f'<td class="n">{row["before"]:.3f}</td>' in html
    assert "before stage 2" in html
