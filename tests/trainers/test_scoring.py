"""What `aligngpt score` makes of scores: exact levels, filters, image, LLaVA JSON, and nothing lost on the way."""

import csv
import itertools
import json
import math
import os
import random
import re
import runpy
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from PIL import Image as PILImage
from scoring_parts import config, make_pairs, run_child, save_scorers, start_child, write_pairs

from aligngpt_trainers.commands.cli import main
from aligngpt_trainers.data.load import load_rows
from aligngpt_trainers.scoring import levels as score_levels
from aligngpt_trainers.scoring import run as scoring
from aligngpt_trainers.scoring.levels import balance_levels, cut_levels, faults_of_levels, remedy_for_levels
from aligngpt_trainers.scoring.run import score_dataset
from aligngpt_trainers.scoring.scorer import PairScorer
from aligngpt_trainers.scoring.sheet import (
    describe_sources,
    rank_correlation,
    sources_and_scores,
    word_about_length,
)


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


def dropped(output):
    return [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]


def all_rows(folder):
    rows = load_from_disk(folder)
    return {row["id"]: (row["clip_score"], row["align_level"]) for row in rows.remove_columns("images")}


class TestLevels:
    @pytest.mark.parametrize("method", ["uniform", "quantile"])
    @pytest.mark.parametrize("num_align_levels", [8, 200])
    def test_in_pieces_exactly_as_numpy_on_the_whole(self, method, num_align_levels, monkeypatch):
        monkeypatch.setattr(score_levels, "PIECE", 77_777)
        scores = np.random.default_rng(0).normal(0.25, 0.05, 10**6).astype(np.float32)
        levels, edges, counts = cut_levels(scores, num_align_levels, method)
        whole = scores.astype(np.float64)
        share = np.linspace(0, 1, num_align_levels + 1)
        expected = (
            np.quantile(whole, share) if method == "quantile" else np.linspace(whole.min(), whole.max(), len(share))
        )
        np.testing.assert_array_equal(edges, expected)
        np.testing.assert_array_equal(levels, np.searchsorted(edges[1:-1], whole, side="right"))
        np.testing.assert_array_equal(counts, np.histogram(whole, edges)[0])
        assert levels.dtype == (np.int8 if num_align_levels == 8 else np.int16)

    def test_a_broken_score_in_a_later_piece_is_found(self, monkeypatch):
        monkeypatch.setattr(score_levels, "PIECE", 10)
        scores = np.linspace(0, 1, 95, dtype=np.float32)
        scores[[57, 93]] = np.nan
        with pytest.raises(ValueError, match="2 of 95 scores are not finite, the first in row 57"):
            cut_levels(scores)

    @pytest.mark.parametrize(("method", "copies"), [("uniform", 1), ("robust", 2), ("quantile", 2), ("edges", 1)])
    def test_memory_beside_the_scores(self, method, copies, monkeypatch):
        """One byte a pair for the levels and pieces of fixed size; quantiles copy the scores once, as they are."""
        monkeypatch.setattr(score_levels, "PIECE", 1 << 16)
        scores = np.random.default_rng(0).random(4_000_000, dtype=np.float32)
        tracemalloc.start()
        cut_levels(scores, method=method, edges=[0, 0.5, 1] if method == "edges" else None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < len(scores) * (1 + 4 * (copies - 1)) + 4_000_000

    def test_levels_that_hold_too_few_or_too_many(self):
        scores = np.random.default_rng(0).standard_normal(100_000)
        counts = cut_levels(scores)[2]
        few, top = faults_of_levels(counts)
        assert few == "levels 0, 7 hold under 0.5% of the rows, too few to train their embeddings"
        assert re.fullmatch(r"the top level, which stage 2 adds to every input, holds 0\.0\d%", top)
        assert remedy_for_levels(scores, counts) == "--binning robust (smallest level 4.0%, top level 4.0%)"
        # most near the best score, lone ones far below: equal widths, however bounded, leave the many together
        scores = np.concatenate([-500 + scores[:9], np.linspace(-8, 0, 30_000), 0.01 * scores[30_000:]])
        counts = cut_levels(scores)[2]
        assert "the top level holds 100% and tells few rows apart" in faults_of_levels(counts)
        advice = r"--binning robust \(.*, top level 7.\.\d%\) or (--binning quantile \(.* 12\.5%, .* 12\.5%\))"
        both = re.fullmatch(advice, remedy_for_levels(scores, counts))
        assert both and remedy_for_levels(scores, cut_levels(scores, 8, "robust")[2]) == both[1]
        assert remedy_for_levels(np.repeat([0.0, 1.0], 9), [9, 0, 9]) == "fewer levels (--num_align_levels below 3)"
        assert faults_of_levels([3, 297, 300]) == faults_of_levels([1, 1, 1]) == []

    def test_the_page_says_what_the_cuts_do(self):
        root = Path(__file__).parents[2]
        table = runpy.run_path(str(root / "benchmarks" / "cuts.py"))["table"]()
        assert table in (root / "docs" / "concepts.md").read_text()

    def test_balanced_levels(self):
        levels = np.repeat([0, 1, 3], [700, 40, 260]).astype(np.int8)
        counts = np.array([700, 40, 0, 260])
        kept = balance_levels(levels, counts, None, seed=3)
        assert np.bincount(levels[kept], minlength=4).tolist() == [40, 40, 0, 40]
        assert (kept == balance_levels(levels, counts, None, seed=3)).all()
        assert (kept != balance_levels(levels, counts, None, seed=4)).any()
        more = balance_levels(levels, counts, 100, seed=3)
        assert np.bincount(levels[more], minlength=4).tolist() == [100, 40, 0, 100]
        # a fair draw: the kept ones are spread over the level, not its first or last
        assert 250 < np.flatnonzero(kept[:700]).mean() < 450


class TestWhatIsLeftOut:
    def test_min_score(self, pairs, scorers, tmp_path):
        score_dataset(config(pairs, scorers, tmp_path / "all"))
        whole = all_rows(tmp_path / "all")
        limit = float(np.median([score for score, _ in whole.values()]))
        words = ["score", "--dataset", pairs[0], "--scorer", scorers["clip"], "--output", str(tmp_path / "out")]
        words += ["--min-score", repr(limit), "--num-align-levels=3", "--device", "cpu", "--batch_size", "8"]
        assert main(words) == 0
        kept = all_rows(tmp_path / "out")
        assert set(kept) == {name for name, (score, _) in whole.items() if score >= limit} and 20 < len(kept) < 30
        record = json.loads((tmp_path / "out" / "alignment.json").read_text())
        assert record["min_score"] == limit and record["edges"][0] == min(score for score, _ in kept.values())
        assert record["rows"]["scored"] == 50 and record["rows"]["written"] == len(kept) == sum(record["counts"])
        assert record["rows"]["below_min_score"] == 50 - len(kept)
        listed = dropped(tmp_path / "out")
        assert {entry["id"] for entry in listed} == set(whole) - set(kept)
        assert all(
            entry["kind"] == "below_min_score" and f"below min_score {limit}" in entry["reason"] for entry in listed
        )
        with pytest.raises(ValueError, match=r"No pair scores 2\.0 or more \(the best has 0\.1"):
            score_dataset(config(pairs, scorers, tmp_path / "none", min_score=2.0))

    def test_balanced(self, pairs, scorers, tmp_path, caplog):
        plain = score_dataset(config(pairs, scorers, tmp_path / "all"))
        record = score_dataset(config(pairs, scorers, tmp_path / "out", sampling="balanced"))
        smallest = min(plain["counts"])
        assert record["counts"] == [smallest] * 4 and "Balanced sampling keeps" in caplog.text
        assert record["edges"] == plain["edges"]
        assert record["sampling"] == {
            "method": "balanced",
            "samples_per_level": smallest,
            "seed": 0,
            "counts_before": plain["counts"],
        }
        whole, kept = all_rows(tmp_path / "all"), all_rows(tmp_path / "out")
        assert kept == {name: whole[name] for name in kept} and len(kept) == 4 * smallest
        assert {entry["id"] for entry in dropped(tmp_path / "out")} == set(whole) - set(kept)
        score_dataset(config(pairs, scorers, tmp_path / "again", sampling="balanced"))
        assert all_rows(tmp_path / "again") == kept
        other = score_dataset(
            config(pairs, scorers, tmp_path / "other", sampling="balanced", samples_per_level=8, seed=1)
        )
        assert other["counts"] == [min(8, count) for count in plain["counts"]]

    def test_every_kind_is_counted_and_listed(self, pairs, scorers, tmp_path, capsys):
        rows = [json.loads(line) for line in Path(pairs[0]).read_text().splitlines()]
        (tmp_path / "pictures" / "5.png").write_text("<html>")
        rows[9]["image"] = "pictures/nowhere.png"
        rows[11]["caption"] = "  "
        rows[20]["caption"] = None
        rows[30]["caption"] = "an <image> of it"
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"on_bad_row": "skip"}
        record = score_dataset(config((str(tmp_path / "bad.jsonl"),), scorers, tmp_path / "out", **options))
        counts = record["rows"]
        assert (counts["read"], counts["scored"], counts["written"]) == (50, 45, 45)
        assert (counts["unreadable"], counts["empty"], counts["unusable"]) == (2, 2, 1)
        listed = dropped(tmp_path / "out")
        assert [(entry["row"], entry["id"], entry["kind"]) for entry in listed] == [
            (5, "5", "unreadable"),
            (9, "9", "unreadable"),
            (11, "11", "empty"),
            (20, "20", "empty"),
            (30, "30", "unusable"),
        ]
        assert "nowhere.png" in listed[1]["reason"] and "reserved" in listed[4]["reason"]
        assert "45 of 50 rows scored; 2 unreadable, 2 empty, 1 unusable" in capsys.readouterr().out
        assert str(tmp_path) not in json.dumps(record)
        again = load_rows(tmp_path / "out")
        assert again["id"][:] == [str(i) for i in range(50) if i not in (5, 9, 11, 20, 30)]
        for row in again:
            assert row["images"][0].tobytes() == pairs[1][int(row["id"])].tobytes()

    def test_rows_without_exactly_one_image(self, scorers, tmp_path):
        images, texts = make_pairs(12)
        rows = [{"images": [i], "prompt": "?", "completion": t} for i, t in zip(images, texts, strict=True)]
        rows[4]["images"], rows[7]["images"] = [], images[:2]
        load_rows(rows).save_to_disk(tmp_path / "mixed")
        with pytest.raises(ValueError, match="row 4: 0 images; a pair to score has one image"):
            score_dataset(config((str(tmp_path / "mixed"),), scorers, tmp_path / "out"))
        record = score_dataset(config((str(tmp_path / "mixed"),), scorers, tmp_path / "out", on_bad_row="skip"))
        assert record["rows"]["written"] == 10 and record["rows"]["unusable"] == 2
        assert [entry["row"] for entry in dropped(tmp_path / "out")] == [4, 7]


class TestOutput:
    def test_histogram_shows_scores_and_edges(self, pairs, scorers, tmp_path):
        record = score_dataset(config(pairs, scorers, tmp_path / "out", num_align_levels=5))
        with PILImage.open(tmp_path / "out" / "histogram.png") as image:
            assert image.format == "PNG"
            pixels = np.asarray(image.convert("RGB")).astype(int)
        red = (pixels[..., 0] > pixels[..., 1] + 30).sum(0) > pixels.shape[0] / 2
        places = np.flatnonzero(red & ~np.roll(red, 1))
        assert len(places) == 6  # a line for each edge, equally far from each other as uniform edges are
        assert np.ptp(np.diff(places)) <= 2
        blue = (pixels[..., 2] > pixels[..., 0] + 40).any(0)
        inside = [blue[low + 4 : high - 3].any() for low, high in itertools.pairwise(places)]
        assert inside == [count > 0 for count in record["counts"]]

    def test_record_says_how_images_were_prepared(self, pairs, scorers, tmp_path):
        record = score_dataset(config(pairs, scorers, tmp_path / "out"))
        prepared = record["preprocessing"]
        assert prepared["size"] == {"shortest_edge": 16} and prepared["crop_size"] == {"height": 16, "width": 16}
        assert len(prepared["image_mean"]) == len(prepared["image_std"]) == 3 and prepared["resample"] == 3
        assert record["dtype"] == "float32" and record["dataset"] == "pairs.jsonl"
        assert PairScorer(scorers["clip"], device="cpu", dtype="bfloat16").identity()["dtype"] == "bfloat16"

    def test_json_in_the_authors_form_and_back(self, pairs, scorers, tmp_path):
        llava = [
            {
                "id": f"{i:05d}",
                "image": f"pictures/{i}.png",
                "conversations": [
                    {"from": "human", "value": "Describe it.\n<image>"},
                    {"from": "gpt", "value": text},
                ],
            }
            for i, text in enumerate(pairs[2])
        ]
        (tmp_path / "llava.json").write_text(json.dumps(llava))
        # images as files: the paths stay what they were
        file = tmp_path / "scored.json"
        score_dataset(
            config((str(tmp_path / "llava.json"),), scorers, tmp_path / "out", json_output=str(file), min_score=-0.1)
        )
        written, rows = json.loads(file.read_text()), load_from_disk(tmp_path / "out")
        assert 10 < len(written) == len(rows) < 50
        by_id = {record["id"]: record for record in llava}
        for record, row in zip(written, rows, strict=True):
            source = by_id[record["id"]]
            assert record["image"] == source["image"] and record["similarity"] == row["align_level"]
            assert record["conversations"][0] == {"from": "human", "value": "<image>\nDescribe it."}
            assert record["conversations"][1] == source["conversations"][1]
        again = load_rows(file)
        for column in ("id", "align_level", "clip_score", "messages"):
            assert again[column][:] == rows[column][:]
        # images stored in the data set: they are written beside the file
        two = str(tmp_path / "sub" / "two.json")
        score_dataset(config((str(tmp_path / "out"),), scorers, tmp_path / "out2", json_output=two))
        second = load_rows(two)
        assert second["id"][:] == rows["id"][:]
        assert [row["images"][0].tobytes() for row in second] == [row["images"][0].tobytes() for row in rows]
        with pytest.raises(ValueError, match=r"json_output .* exists"):
            score_dataset(config(pairs, scorers, tmp_path / "out3", json_output=str(file)))

    def test_csv_without_ids(self, pairs, scorers, tmp_path):
        with (tmp_path / "pairs.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption"])
            writer.writerows((f"pictures/{i}.png", text) for i, text in enumerate(pairs[2]))
        score_dataset(config((str(tmp_path / "pairs.csv"),), scorers, tmp_path / "out"))
        assert load_from_disk(tmp_path / "out").column_names == ["images", "messages", "clip_score", "align_level"]


def test_the_sheet_shows_pairs_of_every_level(pairs, scorers, tmp_path, capsys):
    record = score_dataset(config(pairs, scorers, tmp_path / "out", num_align_levels=4))
    with PILImage.open(tmp_path / "out" / "pairs.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG" and sheet.width > sheet.height > 600
    assert len(record["length"]["mean_words"]) == 4 and -1 <= record["length"]["rank_correlation"] <= 1
    assert "pairs.png before you train" in capsys.readouterr().out


def test_the_level_stands_in_the_text_for_other_trainers(pairs, scorers, tmp_path):
    files = {"json_output": str(tmp_path / "out.json"), "parquet_output": str(tmp_path / "out.parquet")}
    score_dataset(config(pairs, scorers, tmp_path / "out", as_text=True, **files))
    levels = load_from_disk(tmp_path / "out")["align_level"][:]
    records = json.loads((tmp_path / "out.json").read_text())
    assert [record["conversations"][0]["value"] for record in records] == [f"<image>\nfit: {level}" for level in levels]
    table = Dataset.from_parquet(files["parquet_output"], cache_dir=str(tmp_path / "cache"))
    assert [row["messages"][0]["content"][-1]["text"] for row in table] == [f"fit: {level}" for level in levels]
    assert [row["messages"][1] for row in table] == [row["messages"][1] for row in load_from_disk(tmp_path / "out")]
    # the product's own output has levels already
    assert len(load_from_disk(tmp_path / "out")[0]["messages"][0]["content"]) == 1
    with pytest.raises(ValueError, match="as_text changes json_output and parquet_output alone"):
        config(pairs, scorers, tmp_path / "other", as_text=True)


def test_what_length_explains_is_said():
    rng = np.random.default_rng(0)
    scores = rng.random(200)
    assert rank_correlation(scores, scores**3) == pytest.approx(1) and rank_correlation(
        scores, -scores
    ) == pytest.approx(-1)
    assert rank_correlation(np.array([1, 1, 2, 2]), np.array([1, 2, 3, 4])) == pytest.approx(0.8944, abs=1e-4)
    assert rank_correlation(np.ones(5), scores[:5]) == 0
    assert word_about_length({"rank_correlation": 0.1, "mean_words": [3.0, 9.0]}) is None
    word = word_about_length({"rank_correlation": -0.4, "mean_words": [9.0, None, 3.0]})
    assert word.startswith("Shorter texts have higher scores (rank correlation -0.40; 9.0 words")


def test_what_the_source_explains_is_said():
    scores, levels = np.arange(8.0), np.array([0, 0, 1, 1, 2, 2, 3, -1])
    found = sources_and_scores(Dataset.from_dict({"source": list("aaaabbbb")}), scores, levels)
    assert found["counts"] == {"a": [2, 2, 0, 0], "b": [0, 0, 2, 1]}
    # of the ranks 1 to 7: means 2.5 and 6 around 4 explain 21 of 28, less what two groups do by chance
    assert found["rank_correlation"] == pytest.approx(math.sqrt(1 - (7 / 5) / (28 / 6)), abs=1e-4)
    said = describe_sources(found)
    assert said[1] == "  100% 100%   0%   0%  a" and said[-1].startswith("Scores go with the source")
    even = sources_and_scores(Dataset.from_dict({"source": list("abbaabba")}), scores, levels)
    assert even["rank_correlation"] < 0.2 and len(describe_sources(even)) == 3
    for column in ({"source": ["a"] * 8}, {"other": list("aaaabbbb")}, {"source": [[1]] * 8}):
        assert sources_and_scores(Dataset.from_dict(column), scores, levels) is None


class TestFromColumn:
    """Levels from a number that the rows have already."""

    @pytest.fixture
    def rated(self, pairs, tmp_path):
        rows = [json.loads(line) for line in Path(pairs[0]).read_text().splitlines()]
        for number, row in enumerate(rows):
            row["quality"] = {"rating": 1 + number % 5, "votes": [number, number + 1]}
            row["distance"] = 1 - number / 50
        path = tmp_path / "rated.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path, rows

    def levels(self, path, output, column, **options):
        record = score_dataset(scoring.ScoreConfig(str(path), str(output), from_column=column, **options))
        return record, load_from_disk(output)["align_level"][:]

    def test_ratings_are_levels_as_they_are(self, rated, tmp_path, capsys):
        record, levels = self.levels(rated[0], tmp_path / "out", "quality.rating", binning="values")
        assert levels == [number % 5 for number in range(50)]
        assert (record["num_align_levels"], record["counts"], record["method"]) == (5, [10] * 5, "values")
        assert record["scorer"] == "column quality.rating" and record["mean_scores"] == [1, 2, 3, 4, 5]
        assert "--num_align_levels 5" in capsys.readouterr().out
        assert json.loads((tmp_path / "out" / "alignment.json").read_text()) == record
        assert not list(tmp_path.glob("out.*"))

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_columns_that_came_with_the_rows_stay(self, rated, tmp_path, capsys, kind):
        path, rows = rated
        for number, row in enumerate(rows):
            row |= {
                "uid": f"{number:032x}",
                "source": "stamps" if number % 5 > 2 else "photographs",
                "laion": number / 7,
            }
            row["tags"] = ["a", str(number)]
            row.pop("uid") if number == 3 else None
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path = path.with_suffix(".parquet")
            Dataset.from_list(rows).to_parquet(path)
        files = {"json_output": str(tmp_path / "out.json"), "parquet_output": str(tmp_path / "out.parquet")}
        record, levels = self.levels(path, tmp_path / "out", "distance", keep=0.5, num_align_levels=4, **files)
        out, kept = load_from_disk(tmp_path / "out"), rows[:25]
        for name in ("uid", "source", "laion"):
            assert out[name][:] == [row.get(name) for row in kept]
        assert [json.loads(each) if kind == "jsonl" else each for each in out["tags"]] == [row["tags"] for row in kept]
        assert load_rows(files["parquet_output"])["align_level"][:] == levels
        assert (
            Dataset.from_parquet(files["parquet_output"], cache_dir=str(tmp_path / "cache"))["uid"][:] == out["uid"][:]
        )
        written = json.loads(Path(files["json_output"]).read_text())
        assert [each.get("uid") for each in written] == out["uid"][:] and written[0]["laion"] == 0
        assert load_rows(files["json_output"])["messages"][:] == out["messages"][:]
        # which sources a level holds
        assert {name: sum(counts) for name, counts in record["sources"]["counts"].items()} == {
            "photographs": 15,
            "stamps": 10,
        }
        assert "Share of each source" in capsys.readouterr().out

    def test_a_list_is_its_mean_and_low_may_be_good(self, rated, tmp_path):
        _, by_votes = self.levels(rated[0], tmp_path / "votes", "quality.votes")
        _, by_distance = self.levels(rated[0], tmp_path / "distance", "distance", lower_is_better=True)
        expected = cut_levels(np.arange(50) + 0.5)[0].tolist()
        assert by_votes == by_distance == expected
        record, kept = self.levels(rated[0], tmp_path / "kept", "quality.votes", keep=0.5, num_align_levels=4)
        assert len(kept) == 25 and record["rows"]["below_kept_share"] == 25 and set(kept) == {2, 3}

    @pytest.mark.parametrize(
        ("column", "options", "message"),
        [
            ("nothing", {}, "nothing"),
            ("caption", {}, "caption"),
            ("quality.rating", {}, "5 different values, too few for 8 levels"),
            ("distance", {"binning": "values"}, "takes whole numbers"),
            ("quality.rating", {"binning": "values", "num_align_levels": 8}, "5 levels, but num_align_levels is 8"),
        ],
    )
    def test_what_cannot_be_cut_is_said_and_leaves_nothing(self, rated, tmp_path, column, options, message):
        with pytest.raises(ValueError, match=message):
            self.levels(rated[0], tmp_path / "out", column, **options)
        assert not (tmp_path / "out").exists()

    def test_rows_without_a_value_are_left_out_and_counted(self, rated, tmp_path):
        path, rows = rated
        del rows[3]["distance"], rows[7]["distance"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match="row 3"):
            self.levels(path, tmp_path / "out", "distance")
        record, levels = self.levels(path, tmp_path / "out", "distance", on_bad_row="skip")
        assert len(levels) == 48 and record["rows"]["unusable"] == 2
        assert [entry["row"] for entry in dropped(tmp_path / "out")] == [3, 7]

    def test_a_scorer_or_a_column_not_both(self):
        for given in ({}, {"scorer": "clip", "from_column": "a"}):
            with pytest.raises(ValueError, match="one of the two"):
                scoring.ScoreConfig("data", "out", **given)
        with pytest.raises(ValueError, match="lower_is_better has no effect"):
            scoring.ScoreConfig("data", "out", scorer="clip", lower_is_better=True)


class TestNothingIsLost:
    def test_another_run_on_the_same_output_is_refused(self, pairs, scorers, tmp_path):
        log = tmp_path / "log"
        child = start_child(config(pairs, scorers, tmp_path / "out"), log, seconds=0.5)
        while not log.exists() and child.poll() is None:
            time.sleep(0.02)
        with pytest.raises(ValueError, match=rf"out is being written by process {child.pid} on .*, since .*out\.lock"):
            score_dataset(config(pairs, scorers, tmp_path / "out"))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert (tmp_path / "out.lock").exists()  # left by the dead run, and no hindrance
        assert score_dataset(config(pairs, scorers, tmp_path / "out"))["rows"]["written"] == 50
        assert not (tmp_path / "out.lock").exists()

    @pytest.mark.proof
    def test_killed_at_random_moments(self, pairs, scorers, tmp_path, monkeypatch):
        """Every batch is logged as it is scored: no more than a shard is scored again for each kill."""
        settings = config(pairs, scorers, tmp_path / "out", num_workers=1)
        score_dataset(config(pairs, scorers, tmp_path / "whole"))
        log, moments, kills = tmp_path / "log", random.Random(0), 0
        for _ in range(2):
            before = log.stat().st_size if log.exists() else 0
            child = start_child(settings, log, seconds=0.15)
            while child.poll() is None and (not log.exists() or log.stat().st_size == before):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.7))
            child.send_signal(signal.SIGKILL)
            kills += child.wait() == -signal.SIGKILL
            assert not (tmp_path / "out").exists()
        assert kills == 2
        scored = list(map(int, log.read_text().split()))
        score = PairScorer.score
        monkeypatch.setattr(
            PairScorer, "score", lambda self, *i: scored.append(len(i[0]["pixel_values"])) or score(self, *i)
        )
        score_dataset(settings)
        assert 50 <= sum(scored) <= 50 + 2 * 16
        assert all_rows(tmp_path / "out") == all_rows(tmp_path / "whole")
        assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]

    def test_killed_between_finishing_and_tidying(self, pairs, scorers, tmp_path, monkeypatch):
        partial = tmp_path / "out.partial"
        write = scoring.write_output

        def keep(*args):
            write(*args)
            partial.rename(tmp_path / "kept")
            partial.mkdir()

        monkeypatch.setattr(scoring, "write_output", keep)
        record = score_dataset(config(pairs, scorers, tmp_path / "out"))
        (tmp_path / "kept").rename(partial)
        (tmp_path / "out.tmp-123").mkdir()
        monkeypatch.setattr(PairScorer, "score", None)
        assert score_dataset(config(pairs, scorers, tmp_path / "out")) == record
        assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
        with pytest.raises(ValueError, match="exists: choose another folder"):
            score_dataset(config(pairs, scorers, tmp_path / "out"))

    @pytest.mark.parametrize(("limit", "what"), [(300, "shard shard-0"), (30_000, "output .*out")])
    def test_a_disk_that_fills(self, pairs, scorers, tmp_path, limit, what, monkeypatch):
        """A limit on the size of files stands for the full disk: writing fails with the system's own error."""
        settings = config(pairs, scorers, tmp_path / "out", num_workers=0)
        child = run_child(settings, tmp_path / "log", file_size=limit)
        assert child.returncode == 1
        line = child.stderr.strip().splitlines()[-1]
        assert line.startswith("error: ") and "Traceback" not in child.stderr
        assert re.search(rf"{what}.* cannot be written \(.*too large.*out\.partial: make room", line)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.tmp*"))
        kept = 16 * len(list((tmp_path / "out.partial").glob("shard-*.parquet")))
        assert (kept == 0) == (limit == 300)
        scored = []
        score = PairScorer.score
        monkeypatch.setattr(PairScorer, "score", lambda self, *i: scored.append(1) or score(self, *i))
        assert score_dataset(config(pairs, scorers, tmp_path / "out"))["rows"]["written"] == 50
        assert (not scored) == (kept > 0)

    def test_scores_that_are_not_finite(self, pairs, scorers, tmp_path, monkeypatch):
        score = PairScorer.score
        monkeypatch.setattr(PairScorer, "score", lambda self, *inputs: score(self, *inputs) / 0)
        with pytest.raises(ValueError, match="row 0: the score is not finite; with a 16-bit dtype, score in float32"):
            score_dataset(config(pairs, scorers, tmp_path / "out"))


def test_changed_images_in_the_data_set_are_noticed(scorers, tmp_path):
    """The digest of the data reads both ends of embedded images and every text."""
    images, texts = make_pairs(20)

    def digest(images, texts, name):
        columns = {"image": images, "caption": texts}
        Dataset.from_dict(columns).cast_column("image", scoring.datasets.Image()).save_to_disk(tmp_path / name)
        return scoring.WholeSource(*scoring.read_rows(tmp_path / name), 16).settings()["data"]

    first = digest(images, texts, "a")
    assert digest(images, texts, "b") == first
    assert digest(images, [*texts[:-1], texts[-1] + "."], "c") != first
    assert digest([*images[:-1], images[0]], texts, "d") != first


def test_cores_and_threads_are_left_alone(pairs, scorers, tmp_path):
    import torch

    before = torch.get_num_threads(), os.sched_getaffinity(0)
    score_dataset(config(pairs, scorers, tmp_path / "out"))
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before
