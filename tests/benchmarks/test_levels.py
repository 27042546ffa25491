"""The experiment on levels: its model computes what the product computes, its worlds and tables are what they say."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[2]))

from aligngpt_playground.captions import exact_caption
from aligngpt_playground.scenes import draw_scenes, render
from benchmarks.levels import tables
from benchmarks.levels.arms import STAGE_1, STAGE_2, rows_of
from benchmarks.levels.judging import Captions, auc, judge
from benchmarks.levels.real import ARMS, Seed
from benchmarks.levels.real import PARTS as REAL
from benchmarks.levels.run import PARTS, measure
from benchmarks.levels.student import ANSWER, CAPTION, QUESTION, Rows, Student
from benchmarks.levels.worlds import FORMS, TRUTHS, Pairs, blind_caption, draw_rows
from modeling_aligngpt import AlignGPTProcessor


@pytest.fixture(scope="module")
def student():
    return Student(seed=3)


@pytest.fixture(scope="module")
def seen(student):
    """Images, and the features that the tower gives of them."""
    from aligngpt_playground import parts_path
    from modeling_aligngpt.assembly import assemble

    processor: AlignGPTProcessor = assemble(parts_path("llama"), parts_path("clip"))[1]
    images = [render(scene, 1) for scene in draw_scenes(3, 5)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = student.model.model.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    return processor, images, states[-2][:, 1:]


@pytest.mark.parametrize("arm", ["none", "gate", "own level"])
def test_logits_are_the_products(student, seen, arm):
    processor, images, features = seen
    arm, levels = STAGE_2[arm], torch.tensor([0, 3, 7])
    prefix, _ = student.prefix(arm, ANSWER, features, levels)
    found = student.model.lm_head(student.states(prefix))
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(images=images, text=[text] * 3, return_tensors="pt")
    if arm.cut is None:
        kept = inputs["input_ids"][0] != processor.align_token_id
        inputs = {name: value if name == "pixel_values" else value[:, kept] for name, value in inputs.items()}
    model = student.model.eval()
    model.config.align_mode = "gate"
    given = {} if arm.mixed or not arm.cut else {"align_level": levels}
    with torch.no_grad():
        expected = model(**inputs, **given).logits
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_losses_do_not_depend_on_the_rows_beside(student, seen):
    features, texts = seen[2], ["a cat", "a dog at the top left in the snow", "two cats"]
    rows = Rows(features, texts, torch.tensor([1, 2, 3]))
    losses, mask, _ = student.answer_losses(STAGE_1["robust"], CAPTION, rows)
    alone, _, _ = student.answer_losses(STAGE_1["robust"], CAPTION, Rows(features[:1], texts[:1], rows.levels[:1]))
    torch.testing.assert_close(losses[0][mask[0]], alone[0], atol=1e-4, rtol=0)


def test_every_form_is_true_and_untrue_equally_often():
    _, _, kinds = draw_rows("blind", 3000, 0, "train")
    for form in FORMS:
        of_form = [kind.split("/")[1] for kind in kinds if kind.startswith(form)]
        shares = [of_form.count(truth) / len(of_form) for truth in TRUTHS]
        assert np.allclose(shares, (0.5, 0.25, 0.25), atol=0.05), shares
    for scene in draw_scenes(50, 1):
        assert blind_caption(scene, random.Random(0), "full", "true") == exact_caption(scene)
        assert blind_caption(scene, random.Random(0), "full", "wrong") != exact_caption(scene)


def test_arms_take_what_they_say():
    scores = torch.linspace(0, 1, 100)
    features, texts = torch.zeros(100, 1), [str(row) for row in range(100)]
    rows = rows_of(STAGE_1["filter 0.3"], features, texts, scores, 0)
    assert rows.texts == texts[70:] and set(rows.levels.tolist()) == {-1}
    rows = rows_of(STAGE_1["filter 0.5, levels"], features, texts, scores, 0)
    assert rows.texts == texts[50:] and min(rows.levels) == 4
    rows = rows_of(STAGE_1["filter 0.5, cut anew"], features, texts, scores, 0)
    assert min(rows.levels) == 0 and max(rows.levels) == 7
    straight, dealt = (rows_of(STAGE_1[name], features, texts, scores, 0).levels for name in ("robust", "shuffled"))
    assert straight.tolist() == sorted(straight.tolist()) and torch.equal(straight.sort().values, dealt.sort().values)
    assert not torch.equal(straight, dealt)


def test_intervals_hold_seeds_and_images_and_are_corrected():
    rng = np.random.default_rng(0)
    mean, low, high, p = tables.bootstrap((rng.random((5, 200)) < 0.6).astype(float) - 0.5)
    assert low < mean < high and p < 0.05
    # five seeds that differ: the interval is wider than that of the images alone
    apart = np.repeat(np.array([-0.2, -0.1, 0.0, 0.1, 0.2])[:, None], 200, axis=1)
    assert tables.bootstrap(apart)[2] - tables.bootstrap(apart)[1] > 0.15
    assert tables.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_measures_of_captions():
    scene = next(draw_scenes(1, 2))
    found = measure([exact_caption(scene), "a robot"], [scene, scene])
    assert found["exact"] == "10" and found["all objects"][0] == "1" and found["absent object"][1] == "1"


def test_the_page_is_what_the_runs_say():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.render(page) == page
    for path in tables.RUNS.glob("*.jsonl"):
        runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len({(run["arm"], run["seed"]) for run in runs}) == len(runs), path.name
        assert path.stem.partition("-")[2] in {*PARTS, *REAL}


def test_judging_tells_what_it_is_given(student, seen):
    """AUC by its definition; within a form a judge of forms alone is at chance."""
    assert auc(torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([True, True, False, False])) == pytest.approx(0.625)
    scenes = list(draw_scenes(3, 5))
    pairs = Pairs(scenes, [exact_caption(scene) for scene in scenes], [], seen[2], torch.rand(3))

    class Teacher:
        def score(self, features, pooled, texts):
            return torch.tensor([float(text in pairs.captions) for text in texts])

    captions = Captions(Teacher(), pairs, 0)
    assert len(captions.texts) == 27 and captions.true.sum() == 9
    forms = torch.tensor([float(FORMS.index(form)) for form in captions.forms])
    assert captions.aucs(forms)["within"] == 0.5
    found = judge(student, STAGE_1["robust"], pairs, captions)
    assert found["teacher"]["within"] > 0.6 and 0 <= found["mean level"]["within"] <= 1


def test_real_pictures_are_scored_by_an_encoder_that_did_not_see_them():
    """A tiny world two: kinds that features tell apart are scored above wrong ones; every arm trains and answers."""
    torch.manual_seed(0)
    names = ["a bird", "a tree", "a tool", "a fruit"]
    kinds = [names[row % 4] for row in range(400)]
    marks = torch.eye(4).repeat(1, 96)[[row % 4 for row in range(400)]]
    pooled = marks + 0.1 * torch.randn(400, 384)
    pictures = {
        "captions": [f"{kind} {row}" for row, kind in enumerate(kinds)],
        "kinds": kinds,
        "names": names,
        "features": pooled[:, None].repeat(1, 4, 1).half(),
        "pooled": pooled,
        "names_read": torch.randn(4, 384),
        "sentences": torch.randn(400, 384),
    }
    work = Seed(pictures, "kinds", 0)
    assert work.teacher > 0.8 and len(work.texts) == 100 and len(work.wanted) == 300
    for arm in ARMS:
        run = work.run(STAGE_1[arm], replace(REAL["kinds"], steps=10, batch=4))
        assert len(run["top"]["kind"]) == 300 and set(run["judging"]["likelihood"]) == {"within"}
