"""A scored data set to a local Hub and back, whole and as a stream."""

import io
import json
import re
from pathlib import Path

import documents
import PIL.Image
import pytest
import yaml
from datasets import Dataset, DatasetDict, Image, List, Value, load_from_disk
from local_hub.client import run_command, run_python, run_script
from local_hub.pairs import ALIGNMENT, features, rows, save
from local_hub.server import HubServer
from modeling.fresh_process import draw_image

from aligngpt_hub import publish_dataset
from aligngpt_hub.publishing import samples
from aligngpt_hub.publishing.card import levels_text, list_levels


REPO = "user/pairs"


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """Embedded images, and a list of dropped rows that stays here."""
    folder = save(
        tmp_path_factory.mktemp("scored") / "scored", Dataset.from_dict(rows(12), features=features(List(Image())))
    )
    (folder / "dropped.jsonl").write_text('{"row": 3, "reason": "no such image file /home/me/3.png"}\n')
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


LOAD = """
import datasets, json, sys
datasets.disable_progress_bars()
def plain(row):
    return {**row, "images": [[i.size, list(i.getpixel((5, 5))), i.filename if hasattr(i, "filename") else ""]
                              for i in row["images"]]}
repo, revision, split = sys.argv[1:]
whole = datasets.load_dataset(repo, revision=revision)
stream = datasets.load_dataset(repo, revision=revision, split=split, streaming=True)
print(json.dumps({"splits": {name: len(part) for name, part in whole.items()},
                  "features": repr(whole[split].features),
                  "rows": [plain(row) for row in whole[split]], "stream": [plain(row) for row in stream]}))
"""


@pytest.fixture(scope="module")
def published(hub, scored) -> dict[str, bytes]:
    """The files of a first publication."""
    words = ["--tag", "v1", "--license", "cc-by-4.0", "--source", "someone/pairs"]
    result = run_command(hub, "publish-data", scored, "--repo-id", REPO, *words)
    assert result.returncode == 0, result.stderr
    return hub.files("datasets", REPO)


def test_there_and_back(hub, published, scored):
    commits, files = hub.commits("datasets", REPO), published
    assert [commit.title for commit in commits] == ["12 scored pairs, 2 levels", "initial commit"]
    data = "data/train-00000-of-00001.parquet"
    shown = {f"assets/level-{level}-{number}.png" for level in (0, 1) for number in (0, 1)}
    assert files.keys() == {".gitattributes", "README.md", "alignment.json", "histogram.png", data, *shown}
    assert json.loads(files["alignment.json"]) == ALIGNMENT
    report = run_script(hub, LOAD, [REPO, "v1", "train"])
    loaded = load_from_disk(scored)
    assert report["splits"] == {"train": 12} and report["features"] == repr(loaded.features)
    assert report["rows"] == report["stream"]
    for row, original in zip(report["rows"], loaded, strict=True):
        size, pixel, name = row.pop("images")[0]
        image = original.pop("images")[0]
        assert (size, pixel) == (list(image.size), list(image.getpixel((5, 5)))) and "/" not in name
        assert row == original


def test_the_card_shows_pairs_of_each_level(published, scored, tmp_path):
    card, loaded = published["README.md"].decode(), load_from_disk(scored)
    shown = re.findall(r"^\| (\d) \| !\[A pair of level \1\]\((\S+)\) \| (.*) \| (\S+) \|$", card, re.MULTILINE)
    assert [level for level, *_ in shown] == ["1", "1", "0", "0"]
    for level, name, text, score in shown:
        (row,) = [
            row
            for row in loaded
            if row["align_level"] == int(level)
            and samples.plain(row["messages"][1]["content"][0]["text"]) == text
            and f"{row['clip_score']:.3f}" == score
        ]
        drawn = PIL.Image.open(io.BytesIO(published[name]))
        expected = row["images"][0].convert("RGB")
        expected.thumbnail((160, 160))
        assert drawn.tobytes() == expected.tobytes()


def test_the_card_of_a_robust_cut():
    record = {"method": "robust", "quantiles": [0.01, 0.99], "edges": [0.1, 0.2, 0.3], "counts": [5, 6]}
    assert "(`robust`: equal widths between the quantiles 0.01 and 0.99)" in levels_text(record)
    bounds = [(level["low"], level["high"]) for level in list_levels(record)]
    assert bounds == [("-∞", "0.2000"), ("0.2000", "∞")]
    assert list_levels({**record, "method": "uniform"})[0]["low"] == "0.1000"


def test_texts_of_others_are_text_in_the_card():
    hostile = "a | b\n<script>x</script> ![i](http://x) `c` {{ d }} " + "word " * 60
    shown = samples.plain(hostile)
    assert "\n" not in shown and "<" not in shown and shown.endswith(" ...") and len(shown) < 260
    assert not re.search(r"(?<!\\)[|`\[\]{}!]", shown)


def test_the_cards_blocks_run_as_they_stand(hub, published):
    card = published["README.md"].decode()
    for text in documents.mentioned(card):
        documents.check_mention(text)
    (block,) = documents.blocks(card, "python")
    last = "\nimport json; print(json.dumps({'rows': len(pairs['train']), 'first': next(iter(stream))['align_level']}))"
    assert run_script(hub, block + last) == {"rows": 12, "first": 0}


def test_the_card(published):
    text = published["README.md"].decode()
    data = yaml.safe_load(text.split("---")[1])
    assert (data["license"], data["size_categories"], data["source_datasets"]) == (
        "cc-by-4.0", ["n<1K"], ["someone/pairs"]
    )  # fmt: skip
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    for line in (
        'load_dataset("user/pairs", revision="v1")',
        "| 1 | 0.3000 | 0.5000 | 8 | 66.7% | 0.4000 |",
        "[openai/clip-vit-large-patch14-336](https://huggingface.co/openai/clip-vit-large-patch14-336)",
        "| revision | `ce19dc912ca5cd21c8a653c79e251e808ccabcd1` |",
        "| unreadable images | 2 |",
        "Of 15 rows read, 3 were left out (2 unreadable images, 1 below min score).",
        "![Histogram of the scores with the edges of the levels](histogram.png)",
        "Published under `cc-by-4.0`.",
    ):
        assert line in text, line


MANY = """
import json, sys
from aligngpt_hub import publish_dataset
said = []
for times in range(2):
    try:
        publish_dataset(sys.argv[1], "user/many", shard_bytes=4000, message="again")
        said.append(None)
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_many_files_images_in_files_and_a_broken_upload(hub, tmp_path):
    """Two splits, each in several files; the images lie in a folder here; the first try breaks in the middle."""
    images = tmp_path / "pictures"
    images.mkdir()
    paths = features(List(Value("string")))
    splits = {"train": rows(8, images), "heldout": rows(3, images)}
    data = DatasetDict({name: Dataset.from_dict(columns, features=paths) for name, columns in splits.items()})
    folder = save(tmp_path / "scored", data)
    assert str(tmp_path) in json.dumps(load_from_disk(folder)["train"]["images"][:])
    hub.add_repo("datasets", "user/many")
    hub.cut_after(None)
    hub.cut_after(0, "upload", times=6, larger_than=12_000)
    result = run_python(hub, "import time; time.sleep = lambda s: None\n" + MANY, [folder], token=hub.token)
    hub.cut_after(None)
    assert result.returncode == 0, result.stderr[-4000:]
    broken, whole = json.loads(result.stdout.splitlines()[-1])
    assert "user/many is as it was; run the same command again" in broken and whole is None
    assert [commit.title for commit in hub.commits("datasets", "user/many")] == ["again", "initial commit"]
    files = hub.files("datasets", "user/many")
    assert sum(name.startswith("data/train-") for name in files) > 1
    assert not any(str(tmp_path).encode() in content for content in files.values())
    report = run_script(hub, LOAD, ["user/many", "main", "train"])
    assert report["splits"] == {"train": 8, "heldout": 3}
    assert [row["id"] for row in report["stream"]] == [f"pair-{number}" for number in range(8)]
    assert report["rows"] == report["stream"] and report["rows"][3]["images"][0][0] == list(draw_image(3).size)


def without_columns(data: Dataset, folder: Path) -> None:
    save(folder, data.select_columns(["id", "images"]))


def with_paths(data: Dataset, folder: Path) -> None:
    save(folder, data.rename_column("id", "file").map(lambda row: {"file": "/home/me/1.jpg"}))


def with_images(make):
    """The same rows, their images given by what `make(folder)` says."""

    def spoil(data: Dataset, folder: Path) -> None:
        folder.parent.mkdir(exist_ok=True)
        columns = {name: data[name][:] for name in data.column_names if name != "images"}
        columns["images"] = [[make(folder.parent)] for _ in range(len(data))]
        save(folder, Dataset.from_dict(columns, features=features(List(Value("string")))))

    return spoil


def private_key(folder: Path) -> str:
    (folder / "id_rsa").write_text("-----BEGIN OPENSSH " + "PRIVATE KEY-----\nabc\n")
    return str(folder / "id_rsa")


def late_secret(data: Dataset, folder: Path) -> None:
    """Far behind the first thousand rows."""
    many = data.select([0] * 1200)
    ids = [f"pair-{number}" for number in range(1199)] + ["hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"]
    save(folder, many.remove_columns("id").add_column("id", ids))


def write(alignment: dict | None):
    return lambda data, folder: save(folder, data, alignment)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write(None), "holds no alignment.json: give the output folder of `aligngpt score`"),
        (write({"edges": [1]}), "is no record of levels"),
        (write({**ALIGNMENT, "scorer": "/home/me/clip"}), "alignment.json: line 17 holds the path /home/me/clip"),
        (lambda data, folder: (save(folder, data) / "state.json").unlink(), "is no data set"),
        (without_columns, "columns align_level, clip_score, messages are missing"),
        (with_paths, "column file: holds the path /home/me/1.jpg"),
        (late_secret, "column id: holds a Hugging Face token"),
        (with_images(private_key), "row 0: .*id_rsa is no image .*not accepted.*Leave it out"),
        (
            with_images(lambda folder: "http://127.0.0.1:9/a.png"),
            "row 0: http://127.0.0.1:9/a.png is no image .*web address",
        ),
        (with_images(lambda folder: "gone.png"), "row 0: gone.png is no image .*there is no file"),
    ],
)
def test_refusals(scored, tmp_path, spoil, message):
    """Nothing is asked of the Hub: this process is offline."""
    spoil(load_from_disk(scored), tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        publish_dataset(tmp_path / "other", REPO)


def test_dry_run(scored, capsys):
    assert publish_dataset(scored, REPO, dry_run=True) is None
    said = capsys.readouterr().out
    assert "checked: 12 rows in train" in said and "| 1 | 0.3000 |" in said and "nothing was sent" in said
