"""Sources whose columns have other names: a mapping reads them, as lists, files, tables and streams."""

import io
import json
import logging

import datasets
import pytest
from datasets import Dataset, IterableDataset
from PIL import Image as PILImage

from aligngpt_trainers.commands.arguments import DataArguments
from aligngpt_trainers.commands.settings import parse_settings
from aligngpt_trainers.data.columns import mapping_of
from aligngpt_trainers.data.conversations import caption_of
from aligngpt_trainers.data.load import load_rows


KINDS = ("list", "json", "parquet", "memory", "stream", "json stream")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def source(tmp_path):
    """Makes a source of each kind of the same records."""
    PILImage.new("RGB", (6, 4), (200, 10, 20)).save(tmp_path / "a.png")

    def make(kind, records):
        if "json" in kind:
            (tmp_path / "data.json").write_text(json.dumps(records))
            return tmp_path / "data.json"
        if kind == "parquet":
            Dataset.from_list(records).to_parquet(tmp_path / "data.parquet")
            return tmp_path / "data.parquet"
        return records if kind == "list" else Dataset.from_list(records)

    return make


def read(source, kind, folder, columns, **options):
    stream = {"streaming": True, "shuffle_buffer": 0} if "stream" in kind else {}
    return list(load_rows(source, image_folder=folder, columns=columns, **stream, **options))


def record(number, rating, **more):
    return {
        "uid": f"x{number}",
        "img": "a.png",
        "alt": f"a kite {number}",
        "metrics": rating,
        "text": "not this",
        **more,
    }


MAPPING = {"id": "uid", "image": "img", "caption": "alt", "clip_score": "metrics.clip"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rating", "columns"),
    [
        ([{"clip": 0.25}, {"clip": 3.0}], MAPPING),
        ([[{"clip": 0.0}, {"clip": 0.5}], [{"clip": 3.0}, {"clip": None}]], MAPPING),
        ([{"clip": [0.0, 0.5]}, {"clip": [3.0]}], MAPPING),
        ([0.25, 3.0], "id=uid, image=img,caption=alt,clip_score=metrics"),
        (["0.25", "3"], {**MAPPING, "clip_score": "metrics"}),
    ],
)
def test_columns_nested_ones_and_lists(source, tmp_path, kind, rating, columns):
    records = [record(number, value) for number, value in enumerate(rating)]
    rows = read(source(kind, records), kind, tmp_path, columns)
    assert [row["clip_score"] for row in rows] == [0.25, 3.0] and [row["id"] for row in rows] == ["x0", "x1"]
    assert [caption_of(row["messages"]) for row in rows] == ["a kite 0", "a kite 1"]
    assert rows[0]["images"][0].getpixel((0, 0)) == (200, 10, 20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rating", "reason"),
    [
        ([0.5, None, 0.75], "no clip_score, which other rows have"),
        ([0.5, float("nan"), 0.75], "no clip_score, which other rows have"),
        (["0.5", "good", "0.75"], "clip_score is 'good', not a number"),
        ([[0.5], [], [0.75]], "no clip_score, which other rows have"),
    ],
)
def test_a_row_without_a_score_is_named_and_counted(source, tmp_path, kind, rating, reason):
    given = source(kind, [record(number, value) for number, value in enumerate(rating)])
    columns = {**MAPPING, "clip_score": "metrics"}
    with pytest.raises(ValueError, match=f"row.* 1.*: {reason}|'x1'.*: {reason}"):
        read(given, kind, tmp_path, columns)
    assert [row["clip_score"] for row in read(given, kind, tmp_path, columns, on_bad_row="skip")] == [0.5, 0.75]


def test_truth_values_are_no_scores(tmp_path, source):
    given = source("list", [record(0, 1), record(1, True)])
    with pytest.raises(ValueError, match="clip_score is True, not a number"):
        read(given, "list", tmp_path, {**MAPPING, "clip_score": "metrics"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_that_cannot_be_followed(source, tmp_path, kind):
    given = source(kind, [record(0, {"clip": 0.5})])
    there = r"alt, img, metrics, metrics\.clip, text, uid"
    with pytest.raises(ValueError, match=rf"clip_score to 'rating', which no row has; there are {there}\."):
        read(given, kind, tmp_path, {"clip_score": "rating"})
    with pytest.raises(ValueError, match=r"picture=img is not a name of ours .*ours are images, image, mess"):
        read(given, kind, tmp_path, {"picture": "img"})
    with pytest.raises(ValueError, match="columns: image= is not a name of ours"):
        read(given, kind, tmp_path, "image")


def test_the_mapped_column_wins_over_others_of_its_kind(source, tmp_path):
    more = {"images": ["b.png"], "messages": [], "similarity": 0.3, "level": 2}
    columns = {"image": "img", "text": "alt", "align_level": "level"}
    for kind in KINDS:
        (row,) = read(source(kind, [record(0, 1, **more)]), kind, tmp_path, columns)
        assert caption_of(row["messages"]) == "a kite 0" and row["align_level"] == 2


def test_embedded_images_stay_encoded(tmp_path):
    stream = io.BytesIO()
    PILImage.new("RGB", (6, 4)).save(stream, "JPEG")
    image = {"bytes": stream.getvalue(), "path": None}
    nested = [{"sample": {"jpg": image, "alt": "a kite"}, "img": image}] * 3
    features = datasets.Features(
        {"sample": {"jpg": datasets.Image(), "alt": datasets.Value("string")}, "img": datasets.Image()}
    )
    Dataset.from_list(nested, features=features).to_parquet(tmp_path / "a.parquet")
    for name in ("img", "sample.jpg"):
        for streaming in (False, True):
            columns = {"image": name, "caption": "sample.alt"}
            rows = load_rows(tmp_path / "a.parquet", columns=columns, streaming=streaming)
            rows = (
                rows.decode(False)
                if streaming
                else rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
            )
            assert [row["images"][0]["bytes"] for row in rows] == [stream.getvalue()] * 3


def test_a_selection_and_a_stream_without_kinds(source, tmp_path):
    chosen = source("memory", [record(number, {"clip": number}) for number in range(4)]).select([3, 1])
    assert [row["id"] for row in read(chosen, "memory", tmp_path, MAPPING)] == ["x3", "x1"]
    stream = IterableDataset.from_generator(lambda: iter([record(0, {"clip": 1.5})]))
    (row,) = read(stream, "list", tmp_path, MAPPING)
    assert row["clip_score"] == 1.5 and isinstance(row["images"][0], PILImage.Image)


def test_no_word_of_columns_that_were_mapped(source, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    read(source("list", [record(0, {"clip": 1}, more=1)]), "list", tmp_path, MAPPING)
    assert "columns not used: more." in caplog.text


def test_as_a_setting(tmp_path):
    (tmp_path / "a.yaml").write_text("columns:\n  image: img\n  text: alt\n")
    for words in (["--columns", "image=img,text=alt"], ["--config", str(tmp_path / "a.yaml")]):
        (settings,) = parse_settings("aligngpt pretrain", (DataArguments,), words)
        assert mapping_of(settings.columns) == {"image": "img", "text": "alt"}
