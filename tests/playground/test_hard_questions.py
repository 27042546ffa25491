"""The harder questions: answers that follow from the scene, forms that are new, and the command's table."""

import json
import random

import pytest

from aligngpt_playground.__main__ import main
from aligngpt_playground.hard_questions import evaluate_hard, hard_questions, popular_objects
from aligngpt_playground.questions import all_questions
from aligngpt_playground.scenes import PLACES, Scene, draw_scenes
from aligngpt_playground.sprites import CATEGORIES, OBJECTS
from aligngpt_playground.trained import trained_model


SCENES = list(draw_scenes(300, 5, "heldout"))
POPULAR = popular_objects(SCENES)
CORNERS = Scene("snow", (("cat", 0), ("dog", 1), ("bus", 2)))


def made(scene: Scene) -> dict[str, list]:
    by_type: dict[str, list] = {}
    for seed in range(20):
        for question in hard_questions(scene, random.Random(seed), POPULAR):
            by_type.setdefault(question.type, []).append(question)
    return by_type


def test_absent_objects_are_absent_and_of_their_kind():
    for scene in SCENES[:40]:
        for kind, questions in made(scene).items():
            if not kind.startswith("absent"):
                continue
            for question in questions:
                name = question.question.removesuffix("?").split()[-1]
                assert (name in scene.names) == (question.answer == "yes")
                if question.answer == "no" and kind == "absent, popular":
                    assert name in POPULAR
                if question.answer == "no" and kind == "absent, adversarial":
                    assert any(name in CATEGORIES[OBJECTS[there]] for there in scene.names)


def test_answers_follow_from_the_scene():
    by_type = made(CORNERS)
    said = {kind: {(q.question, q.answer) for q in questions} for kind, questions in by_type.items()}
    assert said["which is left of"] == {
        ("which thing is left of the dog?", "cat"),
        ("which thing is right of the cat?", "dog"),
        ("which thing is above the bus?", "cat"),
        ("which thing is below the cat?", "bus"),
    }
    assert ("what kind of thing is below the cat?", "vehicle") in said["two hops: kind"]
    assert ("where is the thing below the cat?", "bottom left") in said["two hops: place"]
    assert ("is the cat left of the dog?", "yes") in said["is it left of"]
    assert ("is the cat right of the dog?", "no") in said["is it left of"]
    for question, answer in said["attribute: place"]:
        name, place = question.removeprefix("is the ").removesuffix("?").split(" at the ")
        assert (CORNERS.at(PLACES.index(place)) == name) == (answer == "yes")
    assert said["attribute: background"] >= {("is the background snow?", "yes")}
    assert {answer for _, answer in said["attribute: background"]} == {"yes", "no"}


def test_numbers_are_asked_of_copies():
    copies = Scene("sea", (("cat", 0), ("cat", 1), ("cat", 3)))
    by_type = made(copies)
    assert "which is left of" not in by_type and "attribute: place" not in by_type
    for question in by_type["attribute: number"]:
        assert (question.question == "are there three cats?") == (question.answer == "yes")


def test_stage_2_has_trained_none_of_the_forms():
    """But for those of POPE, which it asks with other objects."""
    trained = {
        question.question
        for scene in SCENES
        for qs in all_questions(scene, random.Random(0)).values()
        for question in qs
    }
    hard = [
        q
        for scene in SCENES
        for q in hard_questions(scene, random.Random(0), POPULAR)
        if not q.type.startswith("absent")
    ]
    assert not trained & {question.question for question in hard}


def test_the_shipped_model_is_measured_and_told(tmp_path, capsys):
    found = evaluate_hard(trained_model("gate"), 24, seed=3)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["absent, random"]["number"] == 48 and rows["absent, random"]["accuracy"] > 0.8
    assert found["overall"]["number"] == len(found["answers"]) == sum(row["number"] for row in found["rows"])
    right = [
        answer["expected"] == answer["answer"] for answer in found["answers"] if answer["type"] == "two hops: kind"
    ]
    assert rows["two hops: kind"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert 0.3 < found["yes_share"]["absent, adversarial"] < 0.7
    assert main(["hard", "--images", "4", "--output", str(tmp_path / "hard.json")]) == 0
    said = capsys.readouterr().out
    assert "absent, popular" in said and "Share of yes: " in said
    assert len(json.loads((tmp_path / "hard.json").read_text())["answers"]) > 24


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    assert main(["hard", "--images", "0"]) == 2
    assert "images is 0" in capsys.readouterr().err
    assert main(["hard", "--model", str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err
