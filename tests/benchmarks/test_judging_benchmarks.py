"""benchmarks/judging.py reads each benchmark's layout and scores it with every kind of scorer; rows are drawn here."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2]))

from aligngpt_playground import parts_path, trained_model
from aligngpt_playground.captions import exact_caption
from aligngpt_playground.scenes import draw_scenes, render
from benchmarks.judging import auc, figures, main, read_cases


ROWS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files in the five layouts about drawn images: the true caption, and that of another scene."""
    folder = tmp_path_factory.mktemp("judging")
    files: dict[str, list | dict] = {name: [] for name in ("winoground", "seetrue", "rewardbench")}
    crepe, foils = {}, []
    scenes = list(draw_scenes(2 * ROWS, 3, "heldout", unique=True))
    for number, scene in enumerate(scenes):
        name = f"COCO_val2014_{number:012d}.jpg"
        render(scene, number).save(folder / name, quality=95)
        true, false = exact_caption(scene), exact_caption(scenes[number - 1])
        crepe[str(number)] = {"filename": name, "caption": true, "negative_caption": false}
        foils += [{"image_id": number, "caption": text, "foil": text == false} for text in (true, false)]
        files["seetrue"] += [{"image": name, "text": text, "label": int(text == true)} for text in (true, false)]
        ranked = {"query": "Describe the picture.", "response": [false, true], "human_ranking": [1, 0]}
        files["rewardbench"].append({"image": name, **ranked})
        if number % 2:
            before = scenes[number - 1]
            files["winoground"].append(
                {
                    "image_0": f"COCO_val2014_{number - 1:012d}.jpg",
                    "image_1": name,
                    "caption_0": exact_caption(before),
                    "caption_1": true,
                }
            )
    files |= {"sugarcrepe": crepe, "foil": {"annotations": foils}}
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(
    ("name", "layout", "columns"),
    [
        ("sugarcrepe", "SugarCrepe", ["accuracy"]),
        ("winoground", "Winoground", ["text", "image", "group"]),
        ("seetrue", "SeeTRUE", ["AUC"]),
        ("foil", "FOIL", ["AUC"]),
        ("rewardbench", "VL-RewardBench", ["accuracy"]),
    ],
)
def test_each_layout_is_read_and_scored(name, layout, columns, folder, capsys):
    scorer = f"clip:{parts_path('clip')}"
    found = main(["--benchmark", str(folder / f"{name}.json"), "--images", str(folder), "--scorer", scorer])
    assert read_cases(folder / f"{name}.json")[0] == layout and layout in capsys.readouterr().out
    assert list(found[scorer]) == columns and list(found["length"]) == columns
    # this CLIP knows true captions of its world
    assert all(0.8 <= value <= 1 for value in found[scorer].values()), found


def test_models_answer_by_likelihood_and_the_image_is_taken_off(folder, tmp_path):
    model = trained_model("gate")
    kinds = [f"{kind}:{model}" for kind in ("likelihood", "whole", "debiased", "judge")]
    words = [word for kind in kinds for word in ("--scorer", kind)]
    output = tmp_path / "found.json"
    main(["--benchmark", str(folder / "rewardbench.json"), "--images", str(folder), "--limit", "3", *words,
          "--output", str(output)])  # fmt: skip
    scores = json.loads(output.read_text())["scores"]
    assert all(len(scores[kind]) == 3 for kind in kinds)
    mean, whole, debiased, judged = (scores[kind] for kind in kinds)
    assert all(0 <= level <= 7 for row in judged for level in row)
    for row in range(3):
        for item in range(2):
            assert whole[row][item] < mean[row][item] < 0
            # what the text is worth without the image is negative, too, and is taken off
            assert debiased[row][item] > whole[row][item]


def test_figures_and_refusals(tmp_path):
    assert auc([3.0, 1.0, 2.0], [1, 0, 0]) == 1.0 and auc([1.0, 1.0], [1, 0]) == 0.5
    layout, cases = "Winoground", []
    row = {"image_0": "a", "image_1": "b", "caption_0": "x", "caption_1": "y"}
    (tmp_path / "w.jsonl").write_text(json.dumps(row))
    layout, cases = read_cases(tmp_path / "w.jsonl")
    # texts right for both images, images right for one text only
    assert figures(layout, cases, [[0.9, 0.1, 0.95, 0.96]]) == {"text": 1.0, "image": 0.0, "group": 0.0}
    (tmp_path / "other.json").write_text('[{"a": 1}]')
    with pytest.raises(ValueError, match="no known layout"):
        read_cases(tmp_path / "other.json")
