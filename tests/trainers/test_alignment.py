"""Scores are those of the plain model, levels those of numpy, and a killed run loses one shard at most."""

import json
import os

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from scoring_parts import config, make_pairs, save_scorers, write_pairs
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPModel,
)

from aligngpt_trainers.data.load import load_rows
from aligngpt_trainers.scoring.output import STATUSES
from aligngpt_trainers.scoring.run import score_dataset
from aligngpt_trainers.scoring.scorer import PairScorer, cut_levels


def score_pairs(scorer, images, texts) -> np.ndarray:
    return scorer.score(*scorer.preprocess(images, texts)[:2]).cpu().numpy()


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


def plain_logits(name, images, texts):
    """[pairs] diagonal of `logits_per_image` of the model called in the documented way, all pairs in one batch."""
    model, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    pixels = AutoImageProcessor.from_pretrained(name, backend="pil")(images, return_tensors="pt")
    padding = {"padding": "max_length", "max_length": 24} if "siglip" in name else {"padding": True, "max_length": 77}
    ids = tokenizer(texts, truncation=True, return_tensors="pt", **padding)
    if "siglip" in name:
        ids = {"input_ids": ids["input_ids"]}
    with torch.no_grad():
        return model(**pixels, **ids).logits_per_image.diagonal(), model


class TestScorer:
    def test_scores_are_the_cosines_of_the_model(self, scorers):
        images, texts = make_pairs(30)
        for kind, name in scorers.items():
            logits, model = plain_logits(name, images, texts)
            bias = model.logit_bias if kind == "siglip" else 0
            expected = ((logits - bias) / model.logit_scale.exp()).detach().numpy()
            scores = score_pairs(PairScorer(name, device="cpu"), images, texts)
            assert scores.dtype == np.float32 and np.ptp(scores) > 1e-3
            np.testing.assert_allclose(scores, expected, atol=2e-6)
            # a pair's score does not hang on its company: padding is the full length for SigLIP, masked for CLIP
            alone = [score_pairs(PairScorer(name, device="cpu"), [images[i]], [texts[i]])[0] for i in range(1, 9)]
            np.testing.assert_allclose(alone, expected[1:9], atol=2e-6)

    def test_captions_beyond_the_text_model_are_cut_and_counted(self, scorers):
        images, texts = make_pairs(10)
        lengths = {"clip": 77, "siglip": 24}
        for kind, name in scorers.items():
            scorer = PairScorer(name, device="cpu")
            _, inputs, cut = scorer.preprocess(images, texts)
            assert inputs["input_ids"].shape == (10, lengths[kind])
            whole = scorer.preprocess.tokenizer(texts)["input_ids"]
            assert cut == [len(ids) > lengths[kind] for ids in whole] and 0 < sum(cut) < 10

    def test_lower_precision_stays_near(self, scorers):
        images, texts = make_pairs(20)
        for name in scorers.values():
            exact = score_pairs(PairScorer(name, device="cpu"), images, texts)
            rough = score_pairs(PairScorer(name, device="cpu", dtype="bfloat16"), images, texts)
            assert rough.dtype == np.float32 and 0 < np.abs(exact - rough).max() < 0.03

    def test_what_cannot_score_is_refused(self, scorers, tmp_path):
        with pytest.raises(ValueError, match=r"scorer '.*nowhere' cannot be loaded"):
            PairScorer(str(tmp_path / "nowhere"))
        tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertModel(BertConfig(vocab_size=8, **tiny)).save_pretrained(tmp_path / "bert")
        with pytest.raises(ValueError, match="is a BertModel: it must encode images and texts"):
            PairScorer(str(tmp_path / "bert"))
        CLIPModel.from_pretrained(scorers["clip"]).save_pretrained(tmp_path / "bare")
        with pytest.raises(ValueError, match="lacks its image processor or tokenizer"):
            PairScorer(str(tmp_path / "bare"))
        model = CLIPModel.from_pretrained(scorers["clip"])
        half = {key: value for key, value in model.state_dict().items() if not key.startswith("text_model")}
        model.save_pretrained(tmp_path / "half", state_dict=half)
        with pytest.raises(ValueError, match=r"lacks \d+ weights of CLIPModel, e\.g\. text_model"):
            PairScorer(str(tmp_path / "half"))
        with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16"):
            PairScorer(scorers["clip"], dtype="int8")


class TestCutLevels:
    @pytest.mark.parametrize("num_align_levels", [2, 8, 13])
    def test_uniform_is_numpy_on_equal_intervals(self, num_align_levels):
        scores = np.random.default_rng(0).normal(0.25, 0.05, 5000).astype(np.float32)
        levels, edges, counts = cut_levels(scores, num_align_levels)
        assert edges[0] == scores.min() and edges[-1] == scores.max() and np.ptp(np.diff(edges)) < 1e-12
        inside = scores < scores.max()
        np.testing.assert_array_equal(levels[inside], np.digitize(scores[inside].astype(np.float64), edges) - 1)
        assert (levels[~inside] == num_align_levels - 1).all() and levels.min() == 0
        np.testing.assert_array_equal(counts, np.histogram(scores.astype(np.float64), edges)[0])

    def test_quantile_fills_levels_evenly(self):
        scores = np.random.default_rng(0).exponential(size=1003)
        levels, edges, counts = cut_levels(scores, 8, "quantile")
        assert counts.max() - counts.min() <= 1 and counts.sum() == 1003
        for level in range(8):
            held = scores[levels == level]
            assert edges[level] <= held.min() and held.max() <= edges[level + 1]

    def test_robust_has_equal_widths_between_two_quantiles(self):
        """Lone scores far out decide nothing; they go to the end levels."""
        scores = np.random.default_rng(0).normal(0.25, 0.05, 5000)
        scores[:2] = -1, 3
        levels, edges, counts = cut_levels(scores, 8, "robust")
        np.testing.assert_array_equal(edges, np.linspace(*np.quantile(scores, [0.01, 0.99]), 9))
        assert levels[:2].tolist() == [0, 7] and counts.sum() == 5000 and counts.min() > 0.02 * 5000
        assert cut_levels(scores, 8)[2].max() > 0.9 * 5000
        # later rows by the same edges
        np.testing.assert_array_equal(cut_levels(scores, method="edges", edges=edges)[0], levels)
        wide = cut_levels(scores, 8, "robust", quantiles=(0, 1))[1]
        np.testing.assert_array_equal(wide, cut_levels(scores, 8)[1])

    def test_edges_belong_to_the_upper_level_and_the_outside_to_the_ends(self):
        scores = [-9, 0.0, 0.0999, 0.1, 0.2, 0.3, 0.30001, 9]
        levels, edges, counts = cut_levels(scores, method="edges", edges=[0, 0.1, 0.2, 0.3])
        assert levels.tolist() == [0, 0, 0, 1, 2, 2, 2, 2] and counts.tolist() == [3, 1, 4]
        again, *_ = cut_levels(scores, 3, "edges", edges)
        assert again.tolist() == levels.tolist()

    def test_better_scores_never_have_lower_levels(self):
        scores = np.sort(np.random.default_rng(1).normal(size=999))
        for method in ("uniform", "robust", "quantile"):
            assert (np.diff(cut_levels(scores, 8, method)[0]) >= 0).all()

    @pytest.mark.parametrize(
        ("scores", "options", "message"),
        [
            ([], {}, "non-empty"),
            ([0.1, np.nan, np.inf], {}, r"2 of 3 scores are not finite, the first in row 1 \(nan\)"),
            ([0.3] * 9, {}, r"All 9 scores are 0\.3"),
            ([0.3] * 9, {"method": "quantile"}, r"All 9 scores are 0\.3"),
            ([0.1, *[0.3] * 9], {"method": "quantile"}, "too many scores are equal"),
            ([1, 1 + 2e-16], {}, "too many scores are equal"),
            ([0.1, 0.2], {"num_align_levels": 1}, "at least 2"),
            ([0.1, 0.2], {"method": "kmeans"}, "one of uniform, robust, quantile, values, edges"),
            ([0.1, *[0.3] * 900], {"method": "robust"}, "too many scores are equal"),
            (
                [0.1, 0.2],
                {"method": "robust", "quantiles": (0.9, 0.1)},
                r"two shares of the pairs, .* not \(0\.9, 0\.1\)",
            ),
            ([0.1, 0.2], {"method": "edges"}, "Give `edges`"),
            ([0.1, 0.2], {"edges": [0, 1, 2]}, "only there"),
            ([0.1, 0.2], {"method": "edges", "edges": [0, 2, 1]}, "each above the one before"),
            (
                [0.1, 0.2],
                {"method": "edges", "edges": [0, 1, 2], "num_align_levels": 8},
                "make 2 levels, but num_align_levels is 8",
            ),
        ],
    )
    def test_refused(self, scores, options, message):
        with pytest.raises(ValueError, match=message):
            cut_levels(scores, **options)


class TestScoreDataset:
    def test_output_and_record(self, pairs, scorers, tmp_path, capsys):
        _, images, texts = pairs
        record = score_dataset(config(pairs, scorers, tmp_path / "out"))
        rows = load_from_disk(tmp_path / "out")
        assert rows.column_names == ["images", "messages", "id", "clip_score", "align_level"]
        logits, model = plain_logits(scorers["clip"], images, texts)
        expected = (logits / model.logit_scale.exp()).detach().numpy()
        np.testing.assert_allclose(rows["clip_score"][:], expected, atol=2e-6)
        levels, edges, counts = cut_levels(rows["clip_score"][:], 4)
        assert rows["align_level"][:] == levels.tolist()
        assert record["edges"] == edges.tolist() and record["counts"] == counts.tolist()
        assert record == json.loads((tmp_path / "out" / "alignment.json").read_text())
        nothing = dict.fromkeys(STATUSES[1:], 0)
        assert record["rows"] == {"read": 50, "scored": 50, "written": 50, **nothing, "captions_cut": 6}
        assert record["scorer"] == "clip" and len(record["sha256"]) == 64 and record["dtype"] == "float32"
        # images travel with the rows, and the trainers' reader takes the folder as it is
        again = load_rows(tmp_path / "out")
        assert again["align_level"][:] == levels.tolist()
        assert again[3]["images"][0].tobytes() == images[3].tobytes()
        assert sorted(os.listdir(tmp_path)) == ["out", "pairs.jsonl", "pictures"]
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["level", "interval", "pairs", "share", "mean", "score"]
        assert [int(line.split()[3]) for line in lines[1:5]] == counts.tolist()
        assert lines[5].startswith("50 of 50 rows scored; 0 unreadable, 0 empty, 0 unusable")
        # a fresh model, of as many levels, comes first
        init = "aligngpt init --llm LANGUAGE_MODEL --vision_tower VISION_TOWER --num_align_levels 4 --output FRESH"
        assert lines[-2] == f"Next: {init}"
        assert lines[-1] == f"      aligngpt pretrain --model FRESH --dataset {tmp_path / 'out'} --output_dir OUT"

    def test_same_bytes_whatever_the_shards_and_workers(self, pairs, scorers, tmp_path):
        runs = [{}, {}, {"num_workers": 2}, {"shard_size": 24}]
        for number, options in enumerate(runs):
            score_dataset(config(pairs, scorers, tmp_path / f"out{number}", **options))
        scores = [np.asarray(load_from_disk(tmp_path / f"out{n}")["clip_score"][:], np.float32) for n in range(4)]
        assert len({part.tobytes() for part in scores}) == 1

    def test_the_robust_cut_is_recorded_and_applied_to_other_rows(self, pairs, scorers, tmp_path, capsys):
        first = score_dataset(config(pairs, scorers, tmp_path / "first", binning="robust", quantiles=[0.1, 0.9]))
        scores = load_from_disk(tmp_path / "first")["clip_score"][:]
        _, edges, counts = cut_levels(scores, 4, "robust", quantiles=(0.1, 0.9))
        record = json.loads((tmp_path / "first" / "alignment.json").read_text())
        assert record == first and (record["method"], record["quantiles"]) == ("robust", [0.1, 0.9])
        assert (record["edges"], record["counts"]) == (edges.tolist(), counts.tolist())
        # of the end levels the outer edge is no limit
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split()[1:3] == ["[-inf,", f"{edges[1]:.4f})"] and lines[4].split()[2] == "inf]"
        again = config(pairs, scorers, tmp_path / "again", binning="edges", edges=[str(tmp_path / "first")])
        assert score_dataset(again)["counts"] == record["counts"]
        default = config(pairs, scorers, tmp_path / "default", binning="robust", shard_size=24)
        assert score_dataset(default)["quantiles"] == [0.01, 0.99]

    def test_poor_levels_are_named_with_the_remedy(self, pairs, scorers, tmp_path, caplog):
        score_dataset(config(pairs, scorers, tmp_path / "few", num_align_levels=2, binning="quantile"))
        assert not caplog.records
        score_dataset(config(pairs, scorers, tmp_path / "many", num_align_levels=60))
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("Levels ") and "hold under 0.5% of the rows, too few to train" in line
        assert line.endswith("Remedy: fewer levels (--num_align_levels below 60).")

    def test_edges_of_an_earlier_run(self, pairs, scorers, tmp_path, caplog):
        first = score_dataset(config(pairs, scorers, tmp_path / "first", binning="quantile"))
        half = tmp_path / "half.jsonl"
        half.write_text("".join((tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)[::2]))
        again = config((str(half),), scorers, tmp_path / "again", binning="edges", edges=[str(tmp_path / "first")])
        assert score_dataset(again)["edges"] == first["edges"]
        whole, part = (load_from_disk(tmp_path / name)["align_level"][:] for name in ("first", "again"))
        assert part == whole[::2]
        written = [str(edge) for edge in first["edges"]]
        typed = config((str(half),), scorers, tmp_path / "typed", binning="edges", edges=written)
        assert (
            score_dataset(typed)["counts"] == json.loads((tmp_path / "again" / "alignment.json").read_text())["counts"]
        )
        assert "were made by scorer" not in caplog.text
        other = config((str(half),), {"clip": scorers["siglip"]}, tmp_path / "o", binning="edges", edges=again.edges)
        score_dataset(other)
        assert "were made by scorer clip" in caplog.text
        with pytest.raises(ValueError, match="make 4 levels, but num_align_levels is 8"):
            score_dataset(config(pairs, scorers, tmp_path / "x", binning="edges", edges=written, num_align_levels=8))
        with pytest.raises(ValueError, match="neither numbers nor an existing"):
            score_dataset(config(pairs, scorers, tmp_path / "x", binning="edges", edges=["nowhere.json"]))

    def test_unreadable_images(self, pairs, scorers, tmp_path, caplog):
        (tmp_path / "pictures" / "5.png").write_text("<html>")
        message = r"1 of 50 rows have no score \(1 unreadable\):\n  row 5: .*5\.png.*\n.*on_bad_row"
        with pytest.raises(ValueError, match=message):
            score_dataset(config(pairs, scorers, tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out.partial").glob("shard-*")}
        assert len(kept) == 4
        (tmp_path / "pictures" / "9.png").unlink()
        record = score_dataset(config(pairs, scorers, tmp_path / "skipped", on_bad_row="skip"))
        counts = record["rows"]
        assert (counts["read"], counts["scored"], counts["written"], counts["unreadable"]) == (50, 48, 48, 2)
        listed = [json.loads(line) for line in (tmp_path / "skipped" / "dropped.jsonl").open()]
        assert [(entry["row"], entry["id"], entry["kind"]) for entry in listed] == [
            (5, "5", "unreadable"),
            (9, "9", "unreadable"),
        ]
        assert "5.png" in listed[0]["reason"] and "no such image file" in listed[1]["reason"]
        rows = load_from_disk(tmp_path / "skipped")
        assert rows["id"][:] == [str(i) for i in range(50) if i not in (5, 9)]
        for row in rows:  # scores and images still belong together
            assert row["images"][0].tobytes() == pairs[1][int(row["id"])].tobytes()
        assert np.isfinite(rows["clip_score"][:]).all() and min(rows["align_level"][:]) == 0

    def test_refused_run_goes_on_when_told_to_skip(self, pairs, scorers, tmp_path, monkeypatch):
        (tmp_path / "pictures" / "5.png").write_text("<html>")
        with pytest.raises(ValueError, match="have no score"):
            score_dataset(config(pairs, scorers, tmp_path / "out"))

        def refuse(self, *inputs):
            raise AssertionError("scored twice")

        monkeypatch.setattr(PairScorer, "score", refuse)
        record = score_dataset(config(pairs, scorers, tmp_path / "out", on_bad_row="skip"))
        assert record["rows"]["scored"] == 49 and not (tmp_path / "out.partial").exists()

    def test_paths_instead_of_copies(self, pairs, scorers, tmp_path):
        score_dataset(config(pairs, scorers, tmp_path / "out", embed_images=False))
        rows = load_rows(tmp_path / "out")
        assert rows.with_format("arrow")[7]["images"].to_pylist()[0][0]["path"] == str(tmp_path / "pictures" / "7.png")
        assert rows[7]["images"][0].tobytes() == pairs[1][7].tobytes()
        images, texts = pairs[1:]
        Dataset.from_list([{"image": i, "caption": t} for i, t in zip(images, texts, strict=True)]).save_to_disk(
            tmp_path / "held"
        )
        with pytest.raises(ValueError, match=r"row 0: the image is stored in the data set"):
            score_dataset(config((str(tmp_path / "held"),), scorers, tmp_path / "no", embed_images=False))

    def test_refused(self, pairs, scorers, tmp_path):
        (tmp_path / "there").mkdir()
        with pytest.raises(ValueError, match="there' exists: choose another folder or set overwrite"):
            score_dataset(config(pairs, scorers, tmp_path / "there"))
        score_dataset(config(pairs, scorers, tmp_path / "there", overwrite=True))
        assert (tmp_path / "there" / "alignment.json").is_file()
        two = [{"images": make_pairs(2)[0], "prompt": "?", "completion": "a"}]
        load_rows(two).save_to_disk(tmp_path / "two")
        with pytest.raises(ValueError, match="row 0: 2 images; a pair to score has one"):
            score_dataset(config((str(tmp_path / "two"),), scorers, tmp_path / "out"))
        for options, message in [
            ({"binning": "edges"}, "belong together"),
            ({"edges": ["0", "1"]}, "belong together"),
            ({"binning": "even"}, "binning must be one of uniform"),
            ({"quantiles": [0.01, 0.99]}, "no effect without `binning: robust`"),
            ({"binning": "robust", "quantiles": [0.01]}, "quantiles must be two shares"),
            ({"binning": "robust", "quantiles": [1, 99]}, "quantiles must be two shares"),
            ({"binning": "robust", "quantiles": ["low", 0.99]}, "quantiles must be two shares"),
            ({"sampling": "some"}, "sampling must be one of all, balanced"),
            ({"samples_per_level": 5}, "no effect without"),
            ({"min_score": float("nan")}, "min_score must be a number"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"on_bad_row": "drop"}, "one of raise, skip"),
        ]:
            with pytest.raises(ValueError, match=message):
                config(pairs, scorers, tmp_path / "out", **options)


class TestResume:
    def test_progress_of_other_settings_is_not_mixed_in(self, pairs, scorers, tmp_path):
        (tmp_path / "pictures" / "49.png").write_text("<html>")
        with pytest.raises(ValueError, match="have no score"):
            score_dataset(config(pairs, scorers, tmp_path / "out"))
        with pytest.raises(ValueError, match=r"out\.partial keeps the progress .* \(batch_size changed\)"):
            score_dataset(config(pairs, scorers, tmp_path / "out", batch_size=4))
        make_pairs(1)[0][0].save(tmp_path / "pictures" / "49.png")
        with pytest.raises(ValueError, match=r"\(data changed\)"):
            score_dataset(config(pairs, scorers, tmp_path / "out"))
        record = score_dataset(config(pairs, scorers, tmp_path / "out", overwrite=True))
        assert record["rows"]["scored"] == 50
