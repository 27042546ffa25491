"""Scoring beyond pairs: conversations of stage 2 with their levels, a share to keep, tars, other layouts of output."""

import io
import json
import tarfile

import numpy as np
import pytest
from datasets import load_dataset, load_from_disk
from scoring_parts import config, make_pairs, save_scorers, write_pairs

from aligngpt_trainers.commands.cli import main
from aligngpt_trainers.data.load import load_rows
from aligngpt_trainers.scoring.run import score_dataset
from aligngpt_trainers.scoring.scorer import PairScorer


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


LONG = "the red kite is over the bay. " * 6


@pytest.fixture
def conversations(pairs, tmp_path):
    """Ten rows with an image, two turns each and one long answer; every third row also one without an image."""
    rows = []
    for i, text in enumerate(pairs[2][:10]):
        turns = [("human", "<image>\nwhat?"), ("gpt", text), ("human", "and?"), ("gpt", LONG if i == 4 else "a boat")]
        spoken = [{"from": who, "value": value} for who, value in turns]
        rows.append({"id": f"{i}", "image": f"pictures/{i}.png", "conversations": spoken})
        if i % 3 == 0:
            alone = [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "four"}]
            rows.append({"id": f"text-{i}", "conversations": alone})
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(rows))
    return str(path), rows


def test_answers_are_scored_and_rows_without_images_are_kept(conversations, scorers, tmp_path):
    path, rows = conversations
    settings = {"conversations": True}
    record = score_dataset(config((path,), scorers, tmp_path / "out", **settings))
    scored = load_from_disk(tmp_path / "out")
    assert scored["id"][:] == [row["id"] for row in rows]
    without = [row["id"].startswith("text") for row in rows]
    assert [level is None for level in scored["align_level"][:]] == without
    assert [score is None for score in scored["clip_score"][:]] == without
    assert record["rows"] | {"captions_cut": 0} == {
        **dict.fromkeys(record["rows"], 0), "read": 14, "scored": 10, "written": 14, "without_image": 4,
    }  # fmt: skip
    assert sum(record["counts"]) == 10 and record["preprocessing"]["long_texts"] == "mean of their parts"
    # a row's text are all of its answers
    scorer = PairScorer(scorers["clip"], device="cpu", by_parts=True)
    first = scored[0]
    text = f"{rows[0]['conversations'][1]['value']} a boat"
    assert scorer.score(*scorer.preprocess(first["images"], [text])[:2]).item() == pytest.approx(
        first["clip_score"], abs=2e-6
    )


def test_a_long_text_is_scored_by_its_parts(scorers):
    images, _ = make_pairs(2)
    whole, parts = (PairScorer(scorers["clip"], device="cpu", by_parts=by_parts) for by_parts in (False, True))
    pieces = parts.preprocess.split(LONG)
    assert len(pieces) > 1 and " ".join(piece.strip() for piece in pieces) == LONG.strip()
    assert all(len(parts.preprocess.tokenizer(piece)["input_ids"]) <= 77 for piece in pieces)
    inputs = parts.preprocess(images, ["a kite", LONG])
    assert inputs[1]["rows"].tolist() == [0, *[1] * len(pieces)] and inputs[2] == [False, False]
    assert whole.preprocess(images, ["a kite", LONG])[2] == [False, True]
    short, long = parts.score(*inputs[:2]).tolist()
    each = [whole.score(*whole.preprocess(images[1:], [piece])[:2]).item() for piece in pieces]
    assert long == pytest.approx(np.mean(each), abs=1e-6)
    assert short == pytest.approx(whole.score(*whole.preprocess(images[:1], ["a kite"])[:2]).item(), abs=1e-6)
    # one sentence that is too long is cut all the same, and counted
    assert parts.preprocess(images[:1], ["a boat " * 100])[2] == [True]


def test_other_layouts_of_the_output(conversations, scorers, tmp_path):
    path, rows = conversations
    llava, parquet = tmp_path / "new" / "llava.json", tmp_path / "new" / "rows.parquet"
    files = {"json_output": str(llava), "parquet_output": str(parquet)}
    score_dataset(config((path,), scorers, tmp_path / "out", conversations=True, **files))
    scored = load_from_disk(tmp_path / "out")
    written = json.loads(llava.read_text())
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert [row.get("similarity") for row in written] == scored["align_level"][:]
    assert all(("image" in new) == ("image" in old) for new, old in zip(written, rows, strict=True))
    # what any trainer of the Hub's libraries reads
    table = load_dataset("parquet", data_files=str(parquet), split="train", cache_dir=str(tmp_path / "cache"))
    assert set(table.column_names) >= {"images", "messages", "align_level"}
    assert table["align_level"][:] == scored["align_level"][:]
    assert table[0]["images"][0].tobytes() == scored[0]["images"][0].tobytes()
    assert load_rows(str(parquet))["messages"][:] == scored["messages"][:]
    with pytest.raises(ValueError, match=r"parquet_output .* exists"):
        score_dataset(config((path,), scorers, tmp_path / "again", conversations=True, parquet_output=str(parquet)))


def test_several_images_or_none_alone_are_refused(conversations, pairs, scorers, tmp_path):
    path, rows = conversations
    several = tmp_path / "several.json"
    turns = [{"from": "human", "value": "<image><image> same?"}, {"from": "gpt", "value": "no"}]
    several.write_text(json.dumps([*rows, {"image": ["pictures/0.png", "pictures/1.png"], "conversations": turns}]))
    with pytest.raises(ValueError, match="row 14: 2 images; a pair to score has one image"):
        score_dataset(config((str(several),), scorers, tmp_path / "out", conversations=True))
    with pytest.raises(ValueError, match=r"0 images; .* set conversations"):
        score_dataset(config((path,), scorers, tmp_path / "out"))
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps([row for row in rows if "image" not in row]))
    with pytest.raises(ValueError, match="No row has an image"):
        score_dataset(config((str(alone),), scorers, tmp_path / "out", conversations=True))
    assert not (tmp_path / "out").exists()


def test_a_share_to_keep(pairs, scorers, tmp_path, capsys):
    score_dataset(config(pairs, scorers, tmp_path / "all"))
    scores = load_from_disk(tmp_path / "all")["clip_score"][:]
    words = ["score", "--dataset", pairs[0], "--scorer", scorers["clip"], "--output", str(tmp_path / "out")]
    assert main([*words, "--keep", "0.3", "--num_align_levels", "3", "--device", "cpu", "--batch_size", "8"]) == 0
    kept = load_from_disk(tmp_path / "out")
    assert kept["clip_score"][:] == [score for score in scores if score in sorted(scores)[-15:]]
    record = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert record["keep"] == 0.3 and record["rows"]["below_kept_share"] == 35
    assert "35 below kept share" in capsys.readouterr().out
    listed = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert len(listed) == 35 and all("is not among the share to keep" in entry["reason"] for entry in listed)
    # both filters: of what is above the limit, the share
    limit = float(np.median(scores))
    both = config(pairs, scorers, tmp_path / "both", min_score=limit, keep=0.2, num_align_levels=2)
    assert score_dataset(both)["rows"]["written"] == 5
    with pytest.raises(ValueError, match=r"keep must be a share above 0 and at most 1, not 1\.5"):
        config(pairs, scorers, tmp_path / "none", keep=1.5)


def write_tar(path, images, members):
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(images):
            file = io.BytesIO()
            image.save(file, "PNG")
            for suffix, content in {"png": file.getvalue(), **members(i)}.items():
                entry = tarfile.TarInfo(f"{i:05d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("text", ["txt", "json"])
def test_webdataset_tars_are_read(pairs, scorers, tmp_path, monkeypatch, text):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    _, images, texts = pairs
    facts = {"txt": lambda i: texts[i].encode(), "json": lambda i: json.dumps({"caption": texts[i]}).encode()}
    for part, chosen in enumerate((range(30), range(30, 50))):
        write_tar(
            tmp_path / f"{part}.tar",
            [images[i] for i in chosen],
            lambda i, first=chosen[0]: {text: facts[text](first + i)},
        )
    score_dataset(config(pairs, scorers, tmp_path / "plain"))
    record = score_dataset(config((str(tmp_path / "*.tar"),), scorers, tmp_path / "out"))
    assert record["rows"]["written"] == 50
    tars, plain = load_from_disk(tmp_path / "out"), load_from_disk(tmp_path / "plain")
    assert sorted(tars["clip_score"][:]) == pytest.approx(sorted(plain["clip_score"][:]), abs=1e-6)
    assert tars["id"][0] == "00000"
    with pytest.raises(ValueError, match="it must hold for each key an image"):
        write_tar(tmp_path / "other.tar", images[:2], lambda i: {"cls": b"3"})
        load_rows(str(tmp_path / "other.tar"))
