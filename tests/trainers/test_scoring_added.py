"""`aligngpt score --add_score`: the score of a second scorer is added to the one that rows have."""

import json

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from scoring_parts import config, save_scorers, write_pairs

from aligngpt_trainers.commands.cli import main
from aligngpt_trainers.scoring.combine import facts_of, standardized_mean
from aligngpt_trainers.scoring.output import _meaning
from aligngpt_trainers.scoring.run import score_dataset


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture
def scored(tmp_path, scorers):
    """Folder of pairs with the scores of CLIP."""
    score_dataset(config(write_pairs(tmp_path), scorers, tmp_path / "clip"))
    return tmp_path / "clip"


def scores_of(folder):
    return np.asarray(load_from_disk(str(folder))["clip_score"][:], np.float64)


def added(scored, scorers, output, **settings):
    return score_dataset(config((str(scored),), {"clip": scorers["siglip"]}, output, **settings))


def test_two_scores_are_standardised_and_averaged(scored, scorers, tmp_path, capsys):
    words = ["score", "--dataset", str(scored), "--scorer", scorers["siglip"], "--output", str(tmp_path / "both")]
    assert main([*words, "--add_score", "true", "--device", "cpu"]) == 0
    assert "50 of 50 rows scored" in capsys.readouterr().out
    added(scored, scorers, tmp_path / "siglip")
    first, second = scores_of(scored), scores_of(tmp_path / "siglip")
    expected = ((first - first.mean()) / first.std() + (second - second.mean()) / second.std()) / 2
    np.testing.assert_allclose(scores_of(tmp_path / "both"), expected, atol=1e-5)
    record = json.loads((tmp_path / "both" / "alignment.json").read_text())
    assert record["added"]["earlier"] == pytest.approx({"mean": first.mean(), "std": first.std()}, abs=1e-6)
    assert record["added"]["own"] == pytest.approx({"mean": second.mean(), "std": second.std()}, abs=1e-6)
    assert "added" not in json.loads((tmp_path / "siglip" / "alignment.json").read_text())
    # levels are cut from the sum
    levels = load_from_disk(str(tmp_path / "both"))["align_level"][:]
    order = np.argsort(expected)
    assert levels[order[0]] == 0 and levels[order[-1]] == 7 and (np.diff(np.take(levels, order)) >= 0).all()


def test_other_rows_are_cut_where_the_first_were(scored, scorers, tmp_path):
    added(scored, scorers, tmp_path / "both", add_score=True)
    rows = load_from_disk(str(scored))
    rows.select(range(10, 30)).save_to_disk(str(tmp_path / "some"))
    edges = {"binning": "edges", "edges": [str(tmp_path / "both")]}
    record = added(tmp_path / "some", scorers, tmp_path / "again", add_score=True, **edges)
    whole, again = load_from_disk(str(tmp_path / "both")), load_from_disk(str(tmp_path / "again"))
    np.testing.assert_allclose(again["clip_score"][:], whole["clip_score"][10:30], atol=1e-5)
    assert again["align_level"][:] == whole["align_level"][10:30]
    assert record["added"] == json.loads((tmp_path / "both" / "alignment.json").read_text())["added"]
    with pytest.raises(ValueError, match="cut from added scores, so add_score must be true"):
        added(tmp_path / "some", scorers, tmp_path / "plain", **edges)
    edges["edges"] = [str(scored)]
    with pytest.raises(ValueError, match="cut without added scores, so add_score must be false"):
        added(tmp_path / "some", scorers, tmp_path / "plain", add_score=True, **edges)
    assert not (tmp_path / "plain").exists()


def test_conversations_without_image_have_neither_score(scorers, tmp_path):
    texts = write_pairs(tmp_path)[2]
    rows = [
        {"image": f"pictures/{i}.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"}, says(text)]}
        for i, text in enumerate(texts[:8])
    ]
    rows.insert(3, {"conversations": [{"from": "human", "value": "two and two?"}, says("four")]})
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(rows))
    score_dataset(config((str(path),), scorers, tmp_path / "clip", conversations=True))
    record = added(tmp_path / "clip", scorers, tmp_path / "both", conversations=True, add_score=True)
    scores = load_from_disk(str(tmp_path / "both"))["clip_score"][:]
    assert scores[3] is None and record["rows"]["without_image"] == 1
    assert np.mean([score for score in scores if score is not None]) == pytest.approx(0, abs=1e-6)


def says(text):
    return {"from": "gpt", "value": text}


def test_rows_without_a_score_are_refused_before_anything_is_read(scored, scorers, tmp_path):
    rows = load_from_disk(str(scored))
    rows.remove_columns("clip_score").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"the rows have no clip_score. Score them by the other scorer first"):
        added(tmp_path / "none", scorers, tmp_path / "both", add_score=True)
    scores = rows["clip_score"][:]
    scores[7] = None
    Dataset.from_dict({**rows.remove_columns("clip_score").to_dict(), "clip_score": scores}).save_to_disk(
        str(tmp_path / "gap")
    )
    with pytest.raises(ValueError, match="row 7"):
        added(tmp_path / "gap", scorers, tmp_path / "both", add_score=True)
    with pytest.raises(ValueError, match="leave out streaming"):
        added(scored, scorers, tmp_path / "both", add_score=True, streaming=True)
    assert not (tmp_path / "both").exists() and not (tmp_path / "both.partial").exists()


def test_scores_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="all earlier scores are 1"):
        standardized_mean(np.ones(4), np.arange(4))
    with pytest.raises(ValueError, match="all own scores are 2"):
        standardized_mean(np.arange(4), np.full(4, 2))


@pytest.mark.parametrize("added", [{"earlier": {"mean": 0, "std": 1}}, {"earlier": 1, "own": 2}, []])
def test_a_broken_record_of_edges_is_refused(added):
    with pytest.raises(ValueError, match="edges: the earlier run's `added` cannot be read"):
        facts_of({"added": added}, True)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"architecture": "CLIPModel"}, "cosine similarity of image and caption"),
        ({"architecture": "AlignGPTForConditionalGeneration"}, "mean level of the caption under the model"),
        ({"architecture": "CLIPModel", "added": {}}, "mean of two scorers' scores, each standardised"),
    ],
)
def test_the_histogram_says_what_a_score_is(record, expected):
    assert _meaning(record) == expected
