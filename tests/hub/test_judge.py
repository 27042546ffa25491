"""`aligngpt judge` and an AlignGPT as the scorer of `aligngpt score`."""

import json
import shutil

import numpy as np
import pytest
from datasets import load_from_disk
from demo_model import save_demo_model
from PIL import Image

from aligngpt_trainers.commands import cli
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


CAPTIONS = ["a whale", "a robot at sea. a castle", "three pizzas at the top left", "a bus"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judging")
    save_demo_model(folder / "model")
    ramp = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    rows = []
    for index, caption in enumerate(CAPTIONS):
        ramp.rotate(30 * index).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": caption}]
        rows.append({"image": f"{index}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def expected(world, question):
    processor = AlignGPTProcessor.from_pretrained(world / "model")
    model = AlignGPTForConditionalGeneration.from_pretrained(world / "model").eval()
    images = [Image.open(world / f"{index}.png") for index in range(len(CAPTIONS))]
    return model.judge(**processor.judge_inputs(images, CAPTIONS, question)).mean_level.tolist()


@pytest.mark.parametrize(("align_mode", "question"), [("gate", None), ("level", "what is it?")])
def test_rows_are_captions_or_where_stage_2_learned_levels_answers(world, monkeypatch, align_mode, question):
    monkeypatch.chdir(world)
    config = json.loads((world / "model" / "config.json").read_text())
    shutil.copytree(world / "model", world / align_mode)
    config |= {"align_mode": align_mode, "training_stage": "instruct"}
    (world / align_mode / "config.json").write_text(json.dumps(config))
    words = f"judge --model {align_mode} --data rows.json --output verdicts.jsonl --sentences --batch-size 3"
    assert cli.main(words.split()) == 0
    verdicts = [json.loads(line) for line in (world / "verdicts.jsonl").read_text().splitlines()]
    assert [verdict["text"] for verdict in verdicts] == CAPTIONS and [verdict["row"] for verdict in verdicts] == [
        0,
        1,
        2,
        3,
    ]
    assert [verdict["mean_level"] for verdict in verdicts] == pytest.approx(expected(world, question), abs=2e-3)
    assert [len(verdict["sentences"]) for verdict in verdicts] == [1, 2, 1, 1]
    assert verdicts[1]["sentences"][1]["text"] == "a castle"


def test_one_image_and_text_are_told_at_once(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    assert cli.main(["judge", "--model", "model", "--image", "0.png", "--text", "a whale", "--question", "what?"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("level ") and "of 7   a whale" in said and "p(level)   0: " in said


def test_a_model_scores_pairs(world, monkeypatch):
    monkeypatch.chdir(world)
    words = "score --dataset rows.json --scorer model --output scored --num_align_levels 4 --device cpu"
    assert cli.main(words.split()) == 0
    rows = load_from_disk(str(world / "scored"))
    scores = expected(world, None)
    assert rows["clip_score"][:] == pytest.approx(scores, abs=2e-3)
    record = json.loads((world / "scored" / "alignment.json").read_text())
    levels = np.searchsorted(record["edges"][1:-1], rows["clip_score"][:], side="right")
    assert rows["align_level"][:] == levels.tolist() and len(set(levels)) > 1
    assert record["architecture"] == "AlignGPTForConditionalGeneration"
