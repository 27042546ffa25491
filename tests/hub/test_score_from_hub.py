"""Pairs that lie on a Hub are scored there: whole, and as a stream, by the command in a process of its own."""

import json

import pytest
from datasets import Dataset, Features, Image, Value, load_from_disk
from local_hub.client import run_command
from local_hub.server import HubServer
from modeling.fresh_process import draw_image

from aligngpt_playground import parts_path


REPO, COUNT, FILES = "user/raw-pairs", 30, 3


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A data set in three files, without a card."""
    folder = tmp_path_factory.mktemp("raw")
    features = Features({"id": Value("string"), "image": Image(), "caption": Value("string")})
    numbers = range(COUNT)
    data = Dataset.from_dict(
        {
            "id": [f"pair-{number}" for number in numbers],
            "image": [draw_image(number) for number in numbers],
            "caption": [f"a red kite over hill {number}" for number in numbers],
        },
        features=features,
    )
    (folder / "data").mkdir()
    for part in range(FILES):
        data.shard(FILES, part, contiguous=True).to_parquet(folder / f"data/train-{part:05}-of-{FILES:05}.parquet")
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add_repo("datasets", REPO)
        server.commit_folder("datasets", REPO, folder)
        yield server


def score(hub, output, *words, repo=REPO, **more):
    options = ["--num-align-levels", 4, "--batch-size", 8, "--shard-size", 16, "--num-workers", 0, "--device", "cpu"]
    return run_command(
        hub, "score", "--dataset", repo, "--scorer", parts_path("clip"), "--output", output, *options, *words, **more
    )


@pytest.fixture(scope="module")
def whole(hub, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "scored"
    result = score(hub, output)
    assert result.returncode == 0, result.stderr[-4000:]
    return output


def test_a_data_set_of_the_hub_is_scored_and_pinned(hub, whole):
    rows, record = load_from_disk(whole), json.loads((whole / "alignment.json").read_text())
    assert rows["id"][:] == [f"pair-{number}" for number in range(COUNT)]
    assert len(set(rows["align_level"][:])) > 1
    assert [images[0].size for images in rows["images"]] == [draw_image(number).size for number in range(COUNT)]
    assert record["rows"]["read"] == record["rows"]["scored"] == COUNT and record["dataset"] == REPO


def test_what_is_not_there_is_named(hub, tmp_path):
    for words, repo in (((), "user/nothing"), (("--dataset-revision", "v9"), REPO)):
        result = score(hub, tmp_path / "scored", *words, repo=repo)
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode != 0 and (repo in last or "v9" in last), last
        assert not (tmp_path / "scored" / "alignment.json").exists()
