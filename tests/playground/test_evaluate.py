import random

import pytest
from datasets import load_from_disk

from aligngpt_playground import Scene, draw_caption, draw_questions, draw_scenes, exact_caption, render, write_world
from aligngpt_playground.evaluate import (
    Accuracy,
    SavedModel,
    accuracy_of,
    backgrounds_named,
    caption_table,
    evaluate_captions,
    evaluate_questions,
    format_table,
    majority_answers,
    objects_named,
    question_table,
    questions_of,
    score_answer,
    score_caption,
)
from aligngpt_playground.questions import Question


SCENE = Scene("snow", (("cat", 0), ("dog", 3)))


# ---- captions ----


def test_named_things_are_found_once_in_singular_and_plural():
    assert objects_named("Two butterflies, a cat and one cat!") == ["butterfly", "cat"]
    assert objects_named("scattered category") == []
    assert backgrounds_named("a cat in the snow and at  night.") == ["snow", "night"]
    assert backgrounds_named("a snow cat") == []


@pytest.mark.parametrize(
    ("caption", "main_object", "all_objects", "background"),
    [
        ("a cat at the top left and a dog at the bottom right in the snow", True, True, True),
        ("a dog and a cat in the snow", True, True, True),
        ("a cat in the snow", True, False, True),
        ("a dog in the snow", False, False, True),
        ("a cat, a dog and a bee", True, False, False),
        ("cats and dogs at sea", True, True, False),
        ("a cat and a dog in the snow at night", True, True, False),
        ("", False, False, False),
    ],
)
def test_caption_scores(caption, main_object, all_objects, background):
    expected = {"main object": main_object, "all objects": all_objects, "background": background}
    assert score_caption(caption, SCENE) == expected


def test_exact_captions_are_right_and_unrelated_ones_wrong():
    rng = random.Random(0)
    for scene in draw_scenes(200, 0):
        assert all(score_caption(exact_caption(scene), scene).values())
        assert not any(score_caption(draw_caption(scene, "unrelated", rng), scene).values())


def test_caption_table_puts_the_best_single_answer_beside_the_model():
    training = [Scene("snow", (("cat", 0),)), Scene("sea", (("cat", 1),)), Scene("sea", (("bee", 1),))]
    heldout = [Scene("sea", (("cat", 2),)), Scene("snow", (("bee", 2), ("cat", 3))), Scene("sea", (("bee", 0),))]
    captions = ["a cat at sea", "a bee and a cat in the desert", "a dog"]
    main, every, background = caption_table(captions, heldout, training)
    assert (main.accuracy, main.majority, main.majority_answer) == (2 / 3, 1 / 3, "cat")
    assert (every.accuracy, every.majority, every.majority_answer) == (2 / 3, 1 / 3, "cat")
    assert (background.accuracy, background.majority, background.majority_answer) == (1 / 3, 2 / 3, "sea")
    assert background.at_chance


# ---- questions ----


def test_answers_are_compared_without_case_spaces_and_full_stop():
    assert score_answer(" Top  left.", "top left")
    assert not score_answer("top", "top left")
    assert not score_answer("", "one")


def test_question_table_counts_by_type_and_overall():
    training = [Question("yesno", "?", "yes")] * 2 + [Question("yesno", "?", "no"), Question("count", "?", "two")]
    heldout = [
        Question("count", "how many?", "two"),
        Question("yesno", "is there?", "yes"),
        Question("yesno", "is there?", "no"),
        Question("count", "how many?", "one"),
    ]
    rows, overall = question_table(["two", "yes", "no", "three"], heldout, training)
    assert [(row.name, row.number, row.accuracy, row.majority, row.majority_answer) for row in rows] == [
        ("count", 2, 0.5, 0.5, "two"),
        ("yesno", 2, 1.0, 0.5, "yes"),
    ]
    assert (overall.number, overall.accuracy, overall.majority) == (4, 0.75, 0.5)


def test_a_tie_goes_to_the_first_answer_of_the_alphabet():
    assert majority_answers([Question("yesno", "?", "yes"), Question("yesno", "?", "no")]) == {"yesno": "no"}


def test_only_what_beats_the_majority_clearly_is_not_at_chance():
    half = [True, False] * 50
    assert accuracy_of("same", half, half).at_chance
    assert accuracy_of("worse", [False] * 100, half).at_chance
    assert accuracy_of("a little better", [True] * 55 + [False] * 45, half).at_chance
    assert not accuracy_of("better", [True] * 80 + [False] * 20, half).at_chance


def test_results_must_be_as_many_as_the_baselines():
    with pytest.raises(ValueError, match="count: 0 results"):
        accuracy_of("count", [], [])
    with pytest.raises(ValueError, match="2 results and 1"):
        accuracy_of("count", [True, True], [True])


def test_the_table_marks_what_is_at_chance():
    bad = Accuracy("where", 9, 0.2, 0.3, "top left", True)
    good = Accuracy("what", 9, 0.9, 0.1, "a very long answer it is", False)
    title, where, what = format_table("Questions", [bad, good]).splitlines()
    assert where.endswith("at chance") and "0.200" in where and '0.300 ("top left")' in where
    assert "at chance" not in what and "0.900" in what
    assert len(where.removesuffix("  at chance")) == len(title) == len(what)


def test_questions_come_back_out_of_a_conversation_row():
    questions = draw_questions(SCENE, 4, random.Random(0))
    messages = []
    for question in questions:
        asked = [{"type": "image", "text": None}, {"type": "text", "text": question.question}]
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    assert questions_of({"types": [question.type for question in questions], "messages": messages}) == questions


# ---- a saved model ----


@pytest.fixture(scope="module")
def saved(untrained_folder):
    return SavedModel(untrained_folder, batch_size=3)


@pytest.fixture(scope="module")
def images():
    return [render(scene, seed) for seed, scene in enumerate(draw_scenes(5, 0, "heldout"))]


def test_answers_do_not_depend_on_the_batch(saved, untrained_folder, images):
    questions = ["what is in the picture?", "how many things are there?", "is there a cat?", "where is it?", "hello"]
    answers, weights = saved.answer(images, questions)
    for image, question, answer, gate in zip(images, questions, answers, weights, strict=True):
        (alone,), (gate_alone,) = saved.answer([image], [question])
        assert answer == alone
        assert gate == pytest.approx(gate_alone, abs=1e-5)
        assert sum(gate) == pytest.approx(1, abs=1e-5)
    assert len({tuple(round(weight, 3) for weight in gate) for gate in weights}) > 2


def test_each_image_is_captioned_at_its_level(saved, images):
    levels = [0, 7, 3, 3, 1]
    captions = saved.caption(images, align_level=levels)
    for image, level, caption in zip(images, levels, captions, strict=True):
        assert saved.caption([image], align_level=level) == [caption]
    assert len({saved.caption(images[:1], align_level=level)[0] for level in range(8)}) > 1


def test_numbers_of_images_and_questions_must_agree(saved, images):
    with pytest.raises(ValueError, match="5 images, 1 prompts"):
        saved.answer(images, ["hello"])


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        SavedModel(tmp_path)


def test_folders_are_evaluated_from_end_to_end(untrained_folder, tmp_path):
    write_world(tmp_path, 20, 20, 6, 4, progress=False)
    (tmp_path / "shown").mkdir()
    captions = evaluate_captions(untrained_folder, tmp_path / "pairs", tmp_path / "shown", examples=2)
    assert captions["number"] == 6 and [entry["level"] for entry in captions["by_level"]] == [0, 7]
    assert [len(example["by_level"]) for example in captions["examples"]] == [8, 8]
    found = evaluate_questions(untrained_folder, tmp_path / "conversations", tmp_path / "shown")
    rows, overall = found["questions"]["rows"], found["questions"]["overall"]
    assert overall["number"] == sum(row["number"] for row in rows)
    right = sum(row["accuracy"] * row["number"] for row in rows)
    assert overall["accuracy"] * overall["number"] == pytest.approx(right)
    assert [example["type"] for example in found["questions"]["examples"]] == [row["name"] for row in rows]
    asked = [row for row in load_from_disk(str(tmp_path / "conversations"))["heldout"] if "where" in row["types"]]
    chances = [1 / len(Scene.from_json(row["scene"]).objects) for row in asked]
    assert f"gets {sum(chances) / len(chances):.3f} right" in found["questions"]["notes"][0]
    assert sum(found["gate"]["mean"]) == pytest.approx(1, abs=1e-3)
    assert found["gate"]["top"] >= max(max(row["weights"]) for row in found["gate"]["by_type"])
    assert len(list((tmp_path / "shown").glob("*.png"))) >= 3
