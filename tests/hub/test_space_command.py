"""`aligngpt space`: the rendered folder, what it refuses to touch, and the way to the Hub (a local one)."""

import json
import re
import sys
import tomllib
from pathlib import Path

import documents
import pytest
import yaml
import zygote
from local_hub.server import HubServer
from packaging.requirements import Requirement
from PIL import Image

from aligngpt_hub.demo.space import TEMPLATE, Model, find_model, push_space, read_examples, render_space
from aligngpt_hub.publishing.image_metadata import without_metadata
from aligngpt_trainers.commands.cli import main


ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
MODEL = Model("user/demo", SHA, ["config.json", "model.safetensors"])


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_the_folder_is_complete_and_pinned(tmp_path):
    folder = render_space(tmp_path / "space", MODEL, title='A "quoted": title')
    card = front_matter(folder)
    assert card["title"] == 'A "quoted": title'
    assert card["models"] == ["user/demo"]
    assert card["preload_from_hub"] == [f"user/demo config.json,model.safetensors {SHA}"]
    assert card["sdk"] == "gradio" and card["suggested_hardware"] == "zero-a10g"
    assert (card["license"], card["license_name"]) == ("other", "apache-2.0-and-cc-by-sa-4.0")
    assert (folder / card["app_file"]).is_file()
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["model"], settings["revision"]) == ("user/demo", SHA)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "{{" not in text and SHA in text
    # the Hub's own rules for a Space's card
    assert len(card["short_description"]) <= 60
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert names >= {path.name for path in TEMPLATE.rglob("*.p*") if "__pycache__" not in path.parts}
    assert not [path for path in folder.rglob("*") if "__pycache__" in path.parts]
    assert sum(path.stat().st_size for path in folder.rglob("*.png")) < 100_000


def test_a_model_gets_its_own_examples(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "street.png")
    rows = [{"title": "A street", "image": "street.png", "questions": ["What is it?", "Where?"]}]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    folder = render_space(tmp_path / "space", MODEL, examples=read_examples(tmp_path / "mine.json"))
    assert {path.name for path in (folder / "examples").iterdir()} == {"examples.json", "street.png"}
    assert json.loads((folder / "examples" / "examples.json").read_text()) == rows
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "OpenMoji" not in card and "{%" not in card and front_matter(folder)["license"] == "apache-2.0"
    assert "OpenMoji" in (render_space(tmp_path / "other", MODEL) / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "must be a list of examples"),
        ("[", "cannot be read as JSON"),
        ('[{"title": "a", "image": 3, "questions": ["b"]}]', "row 0: `title` and `image` must be texts"),
        ('[{"title": "a", "image": "street.png", "questions": []}]', "row 0: `questions` must be a list of texts"),
        ('[{"title": "a", "image": "gone.png", "questions": ["b"]}]', "row 0: .*gone.png"),
    ],
)
def test_examples_that_cannot_be_shown_are_named(content, message, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "street.png")
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / "mine.json")


def test_its_requirements_are_the_tested_versions():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    required = [
        Requirement(line)
        for line in (TEMPLATE / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert {requirement.name for requirement in required} == {"transformers", "torch", "pillow", "numpy"}
    for requirement in required:
        assert str(requirement.specifier) == f"=={pins[requirement.name]}"
    version = re.search(r"^sdk_version: (\S+)$", (TEMPLATE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version.group(1) == pins["gradio"]


def test_its_code_needs_nothing_else():
    allowed = {"gradio", "spaces", "torch", "transformers", "PIL", "numpy", "starlette"}
    own = {path.stem for path in TEMPLATE.glob("*.py")}
    for path in TEMPLATE.glob("*.py"):
        for name in re.findall(r"^(?:from|import) +(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert name in allowed | own or name in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_package_data_covers_the_template():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["aligngpt_hub"]
    packed = {path for pattern in patterns for path in (ROOT / "hub").glob(pattern)}
    missing = [
        path.name
        for path in TEMPLATE.rglob("*")
        if path.is_file() and path not in packed and "__pycache__" not in path.parts
    ]
    assert not missing


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no Space written by this command"):
        render_space(tmp_path, MODEL)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="is no Space written by this command"):
        push_space(tmp_path, "user/space")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "settings.json"]


def test_an_earlier_space_is_brought_up_to_date_but_not_over_changes_by_hand(tmp_path):
    folder = render_space(tmp_path / "space", MODEL)
    (folder / "extra.txt").write_text("mine")
    newer = Model("user/demo", SHA[::-1], [])
    render_space(folder, newer)
    assert SHA[::-1] in (folder / "README.md").read_text(encoding="utf-8")
    assert "preload_from_hub" not in front_matter(folder)
    assert (folder / "extra.txt").read_text() == "mine"
    (folder / "style.css").write_text("body { color: red }")
    with pytest.raises(ValueError, match=r"style\.css changed by hand"):
        render_space(folder, MODEL)
    assert SHA[::-1] in (folder / "README.md").read_text(encoding="utf-8")
    render_space(folder, MODEL, overwrite=True)
    assert (folder / "style.css").read_bytes() == (TEMPLATE / "style.css").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["space"]


def test_a_commit_is_taken_at_its_word_offline(tmp_path, capsys):
    # the tests run with HF_HUB_OFFLINE
    assert find_model("user/demo", SHA) == Model("user/demo", SHA, [])
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE.*name a full commit with --revision"):
        find_model("user/demo", "main")
    assert main(["space", str(tmp_path / "space"), "--model", "user/demo", "--revision", SHA]) == 0
    assert "downloads them when it starts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "."], "publish it first"),
        (["--model", "nothing"], "write USER/NAME"),
        (["--model", "user/demo", "--push"], "add --repo-id USER/NAME"),
        (["--model", "user/demo", "--repo-id", "user/space"], "add --push"),
        (["--model", "user/demo", "--revision", SHA, "--push", "--repo-id", "space"], "write USER/NAME"),
    ],
)
def test_bad_words_are_one_line(tmp_path, capsys, words, message):
    assert main(["space", str(tmp_path / "space"), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "space").exists()


def test_no_token_leaves_with_a_space(tmp_path):
    folder = render_space(tmp_path / "space", MODEL)
    # in two pieces, so that no scanner takes this line for a leaked secret
    (folder / "extra.txt").write_text("hf" + "_" + "a1B2" * 9)
    with pytest.raises(ValueError, match=r"Nothing was uploaded.*extra\.txt.*token"):
        push_space(folder, "user/space")


# the Hub's client reads its settings once: a process of its own, with one call after another
CALLS = """
import contextlib, io, json, os, sys
from aligngpt_trainers.commands.cli import main
for words, token in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def test_a_space_for_a_published_model_is_pushed(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "aligngpt"}')
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (model / "modeling_aligngpt.py").write_text("")
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("models", "user/demo", model)
        words = ["space", "space", "--model", "user/demo", "--push", "--repo-id", "user/show"]
        calls = [
            (words, hub.token),
            (words, hub.token),
            ([*words, "--revision", "v9"], hub.token),
            (words, None),
            (words, hub.add_user("stranger")),
            (["space", "hidden", *words[2:-1], "user/hidden", "--private"], hub.token),
        ]
        done = zygote.run(CALLS, [json.dumps(calls)], hub.env(), tmp_path)
        assert done.returncode == 0, done.stderr
        first, again, no_revision, no_token, stranger, hidden = map(json.loads, done.stdout.splitlines())
        assert first[0] == 0 and "uploaded: " in first[1], first
        sha = hub.commits("models", "user/demo")[0].sha
        files = hub.files("spaces", "user/show")
        local = {
            path.relative_to(tmp_path / "space").as_posix(): path.read_bytes()
            for path in (tmp_path / "space").rglob("*")
            if path.is_file()
        }
        local |= {name: without_metadata(data) for name, data in local.items() if name.endswith(".png")}
        assert {name: files[name] for name in set(files) - {".gitattributes"}} == local
        assert json.loads(files["settings.json"])["revision"] == sha
        # only what loading reads is preloaded
        (preloaded,) = front_matter(tmp_path / "space")["preload_from_hub"]
        assert preloaded == f"user/demo config.json,modeling_aligngpt.py {sha}"
        assert again[0] == 0 and "nothing new" in again[1], again
        for failed, message in (
            (no_revision, "has no such revision"),
            (no_token, "hf auth login"),
            (stranger, "may not write"),
        ):
            assert failed[0] == 2 and failed[2].startswith("error: ") and message in failed[2], failed
        assert hidden[0] == 0 and hub.repos["spaces", "user/hidden"].private, hidden
        assert not hub.repos["spaces", "user/show"].private


def test_commands_and_blocks_of_its_page():
    text = (TEMPLATE / "README.md").read_text(encoding="utf-8")
    for mention in documents.mentioned(text):
        documents.check_mention(mention)
    for block in documents.blocks(text, "python"):
        compile(block, "the Space's page", "exec")
