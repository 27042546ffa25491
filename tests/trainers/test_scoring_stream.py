"""Streams score like whole data sets, are read once, and go on after a kill."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image, load_dataset, load_from_disk
from local_hub.client import run_command
from local_hub.server import HubServer
from scoring_parts import config, save_scorers, write_pairs

from aligngpt_trainers.data.load import load_rows
from aligngpt_trainers.scoring.run import score_dataset
from aligngpt_trainers.scoring.scorer import PairScorer
from aligngpt_trainers.scoring.stream_blocks import RecordStream, StreamSource


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


@pytest.fixture
def whole(pairs, scorers, tmp_path):
    """The scored rows of the data set as a whole."""
    score_dataset(config(pairs, scorers, tmp_path / "whole"))
    return load_from_disk(tmp_path / "whole")


def held_pairs(pairs):
    """The pairs with their images embedded."""
    rows = {"id": [str(i) for i in range(50)], "image": pairs[1], "caption": pairs[2]}
    return Dataset.from_dict(rows).cast_column("image", Image())


def stream(source, pairs, scorers, output, **options):
    return config((str(source),), scorers, output, streaming=True, **options)


def test_a_file_of_records_gives_the_same_bytes(pairs, scorers, whole, tmp_path):
    record = score_dataset(stream(pairs[0], pairs, scorers, tmp_path / "out"))
    name = "data-00000-of-00001.arrow"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert record["streaming"] and record["rows"]["read"] == 50


@pytest.mark.parametrize("kind", ["parquet", "saved", "folder", "arrays"])
def test_every_kind_of_stream(kind, pairs, scorers, whole, tmp_path):
    """Parts (row groups, files) are scored one by one: other batches, so the last bits of a score may differ."""
    rows = held_pairs(pairs)
    source = tmp_path / "source"
    if kind == "parquet":  # 5 row groups of 10 rows
        source.mkdir()
        source = source / "pairs.parquet"
        rows.to_parquet(source, batch_size=10)
        assert pq.read_metadata(source).num_row_groups == 5
    elif kind == "saved":
        rows.save_to_disk(source, num_shards=3)
    elif kind == "folder":
        source.mkdir()
        for number in range(3):
            rows.shard(3, number).to_parquet(source / f"train-{number:05d}-of-00003.parquet")
    else:  # LLaVA JSON
        source = tmp_path / "llava.json"
        turns = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}] for text in pairs[2]]
        records = [{"id": str(i), "image": f"pictures/{i}.png", "conversations": t} for i, t in enumerate(turns)]
        source.write_text(json.dumps(records))
    record = score_dataset(stream(source, pairs, scorers, tmp_path / "out"))
    found = load_rows(tmp_path / "out")
    assert found["id"][:] == whole["id"][:] and record["rows"]["written"] == 50
    np.testing.assert_allclose(found["clip_score"][:], whole["clip_score"][:], atol=2e-6)
    assert [row["images"][0].tobytes() for row in found] == [image.tobytes() for image in pairs[1]]
    assert not (tmp_path / "out.partial").exists()


def test_blocks_whose_end_is_the_end_of_the_part(pairs, scorers, tmp_path):
    """32 rows and blocks of 16: a third, empty block says that the stream is over."""
    lines = Path(pairs[0]).read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[:32]))
    settings = stream(tmp_path / "some.jsonl", pairs, scorers, tmp_path / "out")
    source = StreamSource(RecordStream(settings), tmp_path, 16)
    spans = list(source.spans(set(), 8, 0, 1))
    assert [(span.block[-1], span.start, span.stop, span.last) for span in spans] == [
        ("0", 0, 8, False),
        ("0", 8, 16, True),
        ("1", 0, 8, False),
        ("1", 8, 16, True),
        ("2", 0, 0, True),
    ]
    assert score_dataset(settings)["rows"]["written"] == 32
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"none\.jsonl: no rows"):
        score_dataset(stream(tmp_path / "none.jsonl", pairs, scorers, tmp_path / "none"))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_processes_share_a_stream_without_gap_or_overlap(count, pairs, scorers, tmp_path):
    (tmp_path / "parts").mkdir()
    for number in range(3):
        held_pairs(pairs).shard(3, number).to_parquet(tmp_path / "parts" / f"{number}.parquet")
    for data in (pairs[0], tmp_path / "parts"):  # a single part, three parts
        shares = []
        for rank in range(count):
            folder = tmp_path / f"{Path(data).stem}-{rank}"
            folder.mkdir()
            source = StreamSource(RecordStream(stream(data, pairs, scorers, tmp_path / "out")), folder, 8)
            shares.append({span.block for span in source.spans(set(), 8, rank, count)})
        together = set().union(*shares)
        assert sum(map(len, shares)) == len(together)
        expected = {"pairs": ["00000"] * 7, "parts": ["00000", "00001", "00002"] * 3}[Path(data).stem]
        assert sorted(name.split("-")[1] for name in together) == sorted(expected)


def test_finished_blocks_are_not_scored_or_spooled_again(pairs, scorers, whole, tmp_path, monkeypatch):
    settings = stream(pairs[0], pairs, scorers, tmp_path / "out")
    score = PairScorer.score

    def third_fails(self, *inputs):
        calls.append(len(inputs[0]["pixel_values"]))
        if len(calls) == 4:
            raise ValueError("stop here")
        return score(self, *inputs)

    calls: list[int] = []
    monkeypatch.setattr(PairScorer, "score", third_fails)
    with pytest.raises(ValueError, match="stop here"):
        score_dataset(settings)
    kept = tmp_path / "out.partial" / "rows-00000-000000.arrow"
    changed = kept.stat().st_mtime_ns
    calls.clear()

    def counted(self, *inputs):
        calls.append(len(inputs[0]["pixel_values"]))
        return score(self, *inputs)

    monkeypatch.setattr(PairScorer, "score", counted)
    link = tmp_path / "spooled"
    link.hardlink_to(kept)
    score_dataset(settings)
    assert sum(calls) == 34 and link.stat().st_mtime_ns == changed
    assert load_from_disk(tmp_path / "out")["clip_score"][:] == whole["clip_score"][:]


def test_images_within_archives_are_fetched(pairs, scorers, whole, tmp_path):
    """A folder of images that `datasets` streams out of a zip file names them by address, without their bytes."""
    (tmp_path / "source").mkdir()
    with zipfile.ZipFile(tmp_path / "source" / "train.zip", "w") as archive:
        lines = [json.loads(line) for line in Path(pairs[0]).read_text().splitlines()]
        rows = [{"file_name": f"{row['id']}.png", "id": str(row["id"]), "caption": row["caption"]} for row in lines]
        archive.writestr("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for i in range(50):
            archive.write(tmp_path / "pictures" / f"{i}.png", f"{i}.png")
    first = next(iter(load_dataset(str(tmp_path / "source"), split="train", streaming=True).decode(False)))
    assert first["image"]["path"].startswith("zip://") and first["image"]["bytes"] is None
    score_dataset(stream(tmp_path / "source", pairs, scorers, tmp_path / "out"))
    found = load_from_disk(tmp_path / "out")
    scores = dict(zip(found["id"][:], found["clip_score"][:], strict=True))
    assert len(scores) == 50
    np.testing.assert_allclose([scores[i] for i in whole["id"]], whole["clip_score"][:], atol=2e-6)
    assert {row["id"]: row["images"][0].tobytes() for row in found} == {
        str(i): image.tobytes() for i, image in enumerate(pairs[1])
    }


def test_what_cannot_be_streamed(pairs, scorers, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        score_dataset(stream(tmp_path / "nowhere.jsonl", pairs, scorers, tmp_path / "out"))
    (tmp_path / "broken.jsonl").write_text(Path(pairs[0]).read_text() + '{"id": \n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 51: not valid JSON"):
        score_dataset(stream(tmp_path / "broken.jsonl", pairs, scorers, tmp_path / "out"))
    assert not (tmp_path / "out").exists() and list((tmp_path / "out.partial").glob("shard-*"))
    (tmp_path / "broken.jsonl").write_text(Path(pairs[0]).read_text())
    with pytest.raises(ValueError, match=r"progress of a run with other settings \(data changed\)"):
        score_dataset(stream(tmp_path / "broken.jsonl", pairs, scorers, tmp_path / "out"))


def test_a_stream_from_the_hub(pairs, scorers, whole, tmp_path):
    """Read over HTTP as it is scored, at the commit that `main` is when the run starts; the commit is recorded."""
    (tmp_path / "repo" / "data").mkdir(parents=True)
    for number in range(3):
        path = tmp_path / "repo" / "data" / f"train-{number:05d}-of-00003.parquet"
        held_pairs(pairs).shard(3, number).to_parquet(path)
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("datasets", "someone/pairs", tmp_path / "repo")
        given = {"dataset": "someone/pairs", "scorer": scorers["clip"], "output": tmp_path / "out", "device": "cpu"}
        given |= {"batch_size": 8, "shard_size": 16, "num_align_levels": 4, "streaming": True}
        run = run_command(hub, "score", *(word for name, value in given.items() for word in (f"--{name}", value)))
        assert run.returncode == 0, run.stderr[-3000:]
        commit = hub.commits("datasets", "someone/pairs")[0].sha
        files = [path for _, path in hub.requests if path.endswith(".parquet")]
    record = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert record["dataset"] == "someone/pairs" and record["dataset_revision"] == commit
    assert files and all(commit in path for path in files)
    found = load_from_disk(tmp_path / "out")
    assert found["id"][:] == whole["id"][:]
    np.testing.assert_allclose(found["clip_score"][:], whole["clip_score"][:], atol=2e-6)
