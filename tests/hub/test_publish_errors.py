"""What goes wrong between here and the Hub: said in one line, and nothing half done on either side."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from local_hub.client import IMPATIENT, run_command, run_python, run_script
from local_hub.server import HubServer
from modeling.test_loading import build
from safetensors.torch import save_file


LARGE = 60_000  # bytes: weights are larger, every other file is smaller


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return build("llama, clip", tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two files to upload, one by LFS."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    save_file({"weight": torch.arange(50_000.0)}, tmp_path / "files" / "model.safetensors")
    return tmp_path / "files"


# ---- uploading ----

UPLOAD = (
    IMPATIENT
    + """
import json, sys
from aligngpt_hub.publishing.upload import upload_checked_folder
said = []
for settings in json.loads(sys.argv[1]):
    try:
        upload = upload_checked_folder(**settings)
        said.append([upload.url, upload.commit, upload.changed, upload.pull_request, upload.tag])
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""
)


def upload(hub, *settings: dict, token: str | None = None, **environment) -> list:
    """What each upload returned or said, all in one process."""
    result = run_python(hub, UPLOAD, [json.dumps(settings)], token=token or hub.token, **environment)
    assert result.returncode == 0, result.stderr[-4000:]
    said = json.loads(result.stdout.splitlines()[-1])
    assert all("\n" not in line for line in said if isinstance(line, str))
    return said


def test_branches_tags_and_pull_requests(hub, folder):
    target = {"folder": str(folder), "repo_id": "user/refs"}
    old = {
        "folder": {"old.safetensors": str(folder / "model.safetensors"), "a/b.safetensors": str(folder / "README.md")}
    }
    first, again, branch, tagged, twice, pull = upload(
        hub,
        {**target, **old},
        {**target, "stale": ["*.safetensors"]},
        {**target, "folder": {"notes.md": str(folder / "README.md")}, "revision": "experiment"},
        {**target, "tag": "v1"},
        {**target, "tag": "v1"},
        {**target, "folder": {"idea.md": str(folder / "README.md")}, "create_pr": True},
    )
    repo = hub.repos["models", "user/refs"]
    assert [c.sha for c in hub.commits("models", "user/refs")] == [
        again[1],
        first[1],
        hub.commits("models", "user/refs")[-1].sha,
    ]
    # what mixes with the new version goes, what merely stands elsewhere stays
    assert hub.files("models", "user/refs").keys() == {
        ".gitattributes",
        "README.md",
        "model.safetensors",
        "a/b.safetensors",
    }
    assert repo.resolve("experiment").sha == branch[1] and repo.resolve("experiment").parent == again[1]
    assert (tagged[1], tagged[2], tagged[4]) == (again[1], False, "v1") and repo.resolve("v1").sha == again[1]
    assert "has a tag 'v1' already" in twice
    assert pull[3] == "refs/pr/1" and pull[0].endswith("/discussions/1") and "idea.md" in repo.resolve("refs/pr/1").tree


RACE = """
import json, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi
from aligngpt_hub.publishing.upload import upload_checked_folder
def shards():
    HfApi().create_commit("user/race", [CommitOperationAdd("other.md", b"x")], commit_message="meanwhile")
    yield "more.safetensors", Path(sys.argv[1]) / "model.safetensors"
for _ in range(2):
    try:
        upload_checked_folder(sys.argv[1], "user/race", shards=shards())
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def test_somebody_else_commits_meanwhile(hub, folder):
    hub.add_repo("models", "user/race")
    result = run_python(hub, RACE, [folder], token=hub.token)
    assert result.returncode == 0, result.stderr[-4000:]
    said = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('"')]
    assert len(said) == 1 and "user/race was changed by someone else meanwhile (412" in said[0]
    # the second time the other's commit brings nothing new, and ours goes through
    assert [commit.title for commit in hub.commits("models", "user/race")] == ["Upload", "meanwhile", "initial commit"]


def test_a_pull_request_to_a_stranger(hub, folder):
    hub.add_repo("models", "someone/open")
    ((url, _, _, revision, _),) = upload(hub, {"folder": str(folder), "repo_id": "someone/open", "create_pr": True})
    assert revision == "refs/pr/1" and url == f"{hub.url}/someone/open/discussions/1"
    assert hub.files("models", "someone/open") == {} and "README.md" in hub.files("models", "someone/open", revision)


def test_refusals_say_what_to_do(hub, folder):
    hub.add_repo("models", "user/public", folder)
    target = {"folder": str(folder), "repo_id": "user/public"}
    before = len(hub.writes())
    said = upload(
        hub,
        {**target, "repo_id": "no/such/name"},
        {**target, "repo_id": "name"},
        {**target, "repo_id": "user/a--b"},
        {**target, "private": True},
        {**target, "create_pr": True, "tag": "v1"},
        {**target, "repo_id": "someone/else"},
        {**target, "repo_id": "someone/else", "create_pr": True},
    )
    for line, text in zip(
        said,
        ["cannot be a repository's id", "write USER/NAME", "cannot be", "exists and is public", "leave --revision",
         "may not write to someone/else (403", "does not exist, or it is private"],
        strict=True,
    ):  # fmt: skip
        assert text in line, line
    reader = hub.add_user("user", role="read")
    assert "may not write to user/public (403" in upload(hub, target, token=reader)[0]
    assert "refuses the token (401)" in upload(hub, target, token="hf_" + "x" * 34)[0]
    assert "HF_HUB_OFFLINE" in upload(hub, target, HF_HUB_OFFLINE="1")[0]
    assert "hf auth login" in upload(hub, target, HF_TOKEN="")[0]
    assert "never stood" in upload(hub, target, HF_ENDPOINT="http://127.0.0.1:9")[0]
    # the one try of a stranger's name and the reader's were all that was asked of the Hub
    assert {path for _, path in hub.writes()[before:]} <= {
        "/api/repos/create",
        "/api/models/user/public/preupload/main",
    }
    assert len(hub.commits("models", "user/public")) == 1


def test_an_upload_that_breaks_can_be_repeated(hub, folder):
    hub.add_repo("models", "user/old", folder)
    save_file({"weight": torch.arange(50_000.0) + 1}, folder / "model.safetensors")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\nnewer")
    before = hub.files("models", "user/old")
    targets = [{"folder": str(folder), "repo_id": name} for name in ("user/old", "user/new", "user/old", "user/new")]
    targets[0]["revision"] = targets[2]["revision"] = "next"
    # each of the first two tries breaks as often as the client tries again
    hub.cut_after(50_000, "upload", times=12)
    broken, broken_new, repeated, repeated_new = upload(hub, *targets)
    assert "model.safetensors" in broken and "user/old is as it was; run the same command again" in broken
    assert "user/new was created and holds nothing yet" in broken_new
    assert hub.files("models", "user/old") == before, "main never changed"
    assert repeated[2] and repeated_new[2]
    for name, revision in (("user/old", "next"), ("user/new", "main")):
        files = hub.files("models", name, revision)
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert len(hub.commits("models", name, revision)) == 2


def test_the_command_says_it_in_one_line(hub, saved):
    hub.cut_after(1000, "upload", times=6, larger_than=LARGE)
    result = run_command(hub, "publish", saved, "--repo-id", "user/command")
    hub.cut_after(None)
    errors = [line for line in result.stderr.splitlines() if "rror" in line and "etrying" not in line]
    assert result.returncode == 2 and len(errors) == 1, result.stderr
    assert errors[0].startswith("error: Error while uploading 'model.safetensors' to the Hub. The connection to")
    assert "Traceback" not in result.stderr and "HF_TOKEN" not in result.stderr and hub.token not in result.stderr
    assert len(hub.commits("models", "user/command")) == 1


# ---- loading ----

TRY = """
import json, sys
from pathlib import Path
from huggingface_hub import constants
from transformers import AutoModelForImageTextToText
said = []
for settings in json.loads(sys.argv[1]):
    try:
        model = AutoModelForImageTextToText.from_pretrained(**settings, trust_remote_code=True)
        said.append([type(model).__name__, float(sum(p.double().abs().sum() for p in model.parameters()))])
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    cached = [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file() and "snapshots" in str(path)]
    said[-1] = [said[-1], sorted(path.name for path in cached)]
print(json.dumps(said))
"""


def test_what_may_not_be_loaded(hub, saved):
    """Private without a token, with a wrong or a stranger's token, a revision or repository that is not there."""
    hub.add_repo("models", "user/private", saved, private=True)
    hub.add_repo("models", "user/gated", saved, gated=True)
    stranger = hub.add_user("stranger")
    cases = [
        ({"token": False}, "private"),
        ({"token": "hf_" + "x" * 34}, "credentials"),
        ({"token": stranger}, "private"),
        ({"token": hub.token, "revision": "v9"}, "not a valid git identifier"),
        ({"token": hub.token, "pretrained_model_name_or_path": "user/nothing"}, "not a valid model identifier"),
        ({"token": stranger, "pretrained_model_name_or_path": "user/gated"}, "gated"),
    ]
    settings = [{"pretrained_model_name_or_path": "user/private", **case} for case, _ in cases]
    said = run_script(hub, TRY, [json.dumps([*settings, {**settings[0], "token": hub.token}])])
    for (text, cached), (case, expected) in zip(said, cases, strict=False):
        assert isinstance(text, str) and expected in text, (case, text)
        assert not [name for name in cached if name.endswith((".safetensors", ".py"))], (case, cached)
    assert said[-1][0][0] == "AlignGPTForConditionalGeneration"


def test_a_download_that_breaks(hub, saved, tmp_path):
    """Given up: an error, no model, no weights in the cache. Broken on the way: taken up where it broke."""
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    hub.add_repo("models", "user/broken", folder)
    hub.cut_after(50_000, "download", times=1, larger_than=LARGE)
    hub.cut_after(50_000, "download", times=2, larger_than=LARGE, reset=False)
    before = len(hub.requests)
    settings = {"pretrained_model_name_or_path": "user/broken"}
    (failed, cached), (loaded, whole), (again, _) = run_script(
        hub, TRY, [json.dumps([settings, settings, {"pretrained_model_name_or_path": str(saved)}])]
    )
    hub.cut_after(None)
    assert isinstance(failed, str) and "model.safetensors" not in cached
    assert "config.json" in cached, "what had arrived is not fetched again"
    assert "model.safetensors" in whole
    assert loaded == again
    tries = [path for method, path in hub.requests[before:] if method == "GET" and path.startswith("/cdn/")]
    assert len(tries) == 4
