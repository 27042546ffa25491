"""What was saved, computed and printed by 0.1.0 stays (`frozen.py` says what, and how to change it on purpose)."""

import sys

import frozen
import pytest
import torch
from frozen import FROZEN, MODELS, STAGES, read


# sums in another order, by another kind of processor or torch (without AVX, losses were 2e-7 off)
ANSWERS, SCORES, LOSSES = 1e-5, 1e-5, 1e-5


def updated_by(what: str) -> str:
    return f"If this is meant: `python tests/frozen.py {what}`, in the commit that changes it."


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_answers_as_ever(name):
    found, expected = frozen.answers(name), read("answers.json")[name]
    assert found.keys() == expected.keys()
    for question, answer in expected.items():
        for kind in ("prompt", "answer"):
            assert found[question][kind] == answer[kind], (question, kind)
        for kind in ("logits", "shares"):
            assert found[question][kind] == pytest.approx(answer[kind], rel=0, abs=ANSWERS), (question, kind)


@pytest.mark.parametrize("kind", STAGES)
def test_the_first_losses_of_a_stage(kind):
    expected = read("losses.json")
    same = expected["machine"] == frozen.machine()
    found = frozen.six_losses(kind)
    if not same:
        expected[kind] = pytest.approx(expected[kind], rel=LOSSES)
    assert found == expected[kind], updated_by("losses")


def test_scores_and_levels():
    found, expected = frozen.make_scores(), read("scores.json")
    assert found["edges"] == pytest.approx(expected["edges"], rel=0, abs=SCORES), updated_by("scores")
    assert found["scores"] == pytest.approx(expected["scores"], rel=0, abs=SCORES), updated_by("scores")
    # a score on an edge may fall to either side of it
    inner = torch.tensor(expected["edges"][1:-1])
    clear = [min(abs(inner - score)) > SCORES for score in expected["scores"]]
    levels = [[level for level, kept in zip(all["levels"], clear, strict=True) if kept] for all in (found, expected)]
    assert levels[0] == levels[1] and len(levels[0]) > 250, updated_by("scores")


def test_the_cards():
    for name, text in frozen.cards().items():
        assert text == (FROZEN / "cards" / name).read_text(encoding="utf-8"), updated_by("cards")


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse lays out its help otherwise")
def test_the_help_of_every_command():
    kept = {path.name: path.read_text(encoding="utf-8") for path in (FROZEN / "help").iterdir()}
    shown = frozen.helps()
    assert shown.keys() == kept.keys(), updated_by("help")
    for name, text in shown.items():
        assert text == kept[name], updated_by("help")
