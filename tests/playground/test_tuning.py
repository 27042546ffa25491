"""Tuning after stage 2 on the small world: all ways run, go on where they stopped, and what is compared."""

import json
import random

import pytest

from aligngpt_playground.__main__ import main
from aligngpt_playground.ablation.tuning import WAYS, preference_pairs, summarize
from aligngpt_playground.captions import exact_caption
from aligngpt_playground.evaluate import objects_named
from aligngpt_playground.scenes import draw_scenes


TINY = ["--pairs", "48", "--pretrain-steps", "2", "--conversations", "32", "--heldout", "8", "--images", "16"]
TINY += ["--steps", "1", "--grpo-steps", "1", "--seeds", "1"]


def test_every_way_has_its_figures_and_a_finished_seed_is_not_run_again(tmp_path, capsys):
    words = ["tuning", "--output", str(tmp_path), *TINY]
    assert main(words) == 0
    found = json.loads((tmp_path / "seed-0.json").read_text())
    assert found.keys() == {"seed", "start", *WAYS}
    for way in ("start", *WAYS):
        assert 0 <= found[way]["absent object"] <= 1 and 0 <= found[way]["exact"] <= 1
    assert not (tmp_path / "seed-0").exists(), "models of finished seeds are not kept"
    stamp = (tmp_path / "seed-0.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (tmp_path / "seed-0.json").stat().st_mtime_ns == stamp
    table = json.loads((tmp_path / "table.json").read_text())["table"]
    assert table["dpo"]["absent object - start"] == pytest.approx(
        found["dpo"]["absent object"] - found["start"]["absent object"]
    )
    assert main([*words[:3], "--images", "17", *TINY[:8]]) == 2
    assert "other settings" in capsys.readouterr().err


def test_the_rejected_names_what_the_image_does_not_show():
    scenes = list(draw_scenes(40, 3, "train"))
    for scene, (chosen, rejected) in zip(scenes, preference_pairs(scenes, random.Random(0)), strict=True):
        assert chosen == exact_caption(scene) and set(objects_named(chosen)) <= set(scene.names)
        assert set(objects_named(rejected)) - set(scene.names)


def test_differences_are_paired():
    figures = {"exact": 0.5, "all objects": 0.5, "words": 9.0}
    starts, ends = (0.2, 0.4, 0.3), (0.1, 0.3, 0.2)
    runs = [
        {"start": {**figures, "absent object": start}, **{way: {**figures, "absent object": end} for way in WAYS}}
        for start, end in zip(starts, ends, strict=True)
    ]
    row = summarize(runs)["dpo"]
    assert row["absent object - start"] == pytest.approx(-0.1)
    assert row["absent object interval"] == pytest.approx(0, abs=1e-9)
