"""What is documented is what works: commands are read by their real parsers, Python blocks run, or a test that runs
them is named."""

import json
import re
import shutil

import documents
import pytest
from demo_model import save_demo_model
from documents import PAGES, ROOT
from PIL import Image

from aligngpt_trainers.commands.cli import main
from aligngpt_trainers.commands.recipes import FOLDER


LINES = [(page.relative_to(ROOT), line) for page in PAGES for line in documents.commands(page.read_text())]
RECIPES = sorted(FOLDER.glob("*/*.yaml"))
# Blocks that need the Hub or a server: the test that runs what they show.
RUN_ELSEWHERE = {
    ("docs/hub.md", "aligngpt_hub.publish("): "tests/hub/test_publish.py",
    ("docs/hub.md", "pipeline("): "tests/hub/test_publish.py",
    ("docs/hub.md", "load_dataset("): "tests/hub/test_publish_data.py",
    ("docs/hub.md", "BitsAndBytesConfig("): "tests/modeling/test_small_machine.py",
    ("docs/space.md", "Client("): "tests/hub/test_space_app.py",
    ("docs/serving.md", "OpenAI("): "tests/hub/test_serve.py",
    # in an environment of its own: `make engines`
    ("docs/serving.md", "from vllm"): "tests/engines/vllm_check.py",
}


def refused(check, cases) -> list[str]:
    """Of (page, text) pairs those that a check refuses, with its words."""
    found = []
    for page, text in cases:
        try:
            check(text)
        except (AssertionError, ValueError, SystemExit) as error:
            found.append(f"{page}: {text}: {error}")
    return found


def test_commands_of_pages_and_recipes_are_real():
    of_recipes = {path: list(documents.in_comments(path.read_text())) for path in RECIPES}
    silent = [path for path, lines in of_recipes.items() if not lines and path.parent.name != "accelerate"]
    assert not silent
    cases = LINES + [(path.relative_to(ROOT), line) for path, lines in of_recipes.items() for line in lines]
    assert not refused(documents.parse_line, cases)


def test_mentioned_commands_exist():
    cases = [(page.relative_to(ROOT), text) for page in PAGES for text in documents.mentioned(page.read_text())]
    assert not refused(documents.check_mention, cases)


def test_wrong_lines_are_found():
    """The check itself: what it is there for fails."""
    for line in (
        "aligngpt score --dataset x --scorer z",  # --output is required
        "aligngpt pretrain --config vicuna-7b/pretrian",
        "aligngpt pretrain --config vicuna-7b/pretrain --lerning_rate 1",
        "aligngpt chat --model x --photo y",
        "aligngpt publish x --accelerate_config ddp",
        "aligngpt instruct --config vicuna-7b/instruct --accelerate_config multi_gpu",
        "alinggpt chat",
    ):
        with pytest.raises((ValueError, SystemExit)):
            documents.parse_line(line)
    with pytest.raises(AssertionError):
        documents.check_mention("aligngpt chat --no-such-flag")


def test_hyphens_and_underscores_are_the_same():
    lines = (
        "aligngpt score --dataset x --scorer y --output z --image{0}folder i --on{0}bad{0}row skip",
        "aligngpt pretrain --config vicuna-7b/pretrain --learning{0}rate 1 --accelerate{0}config ddp",
        "aligngpt chat --model x --show{0}weights --align{0}level 3",
        "aligngpt publish x --repo{0}id a/b --dry{0}run",
        "aligngpt check --config vicuna-7b/pretrain --no{0}model",
    )
    assert not refused(documents.parse_line, [(sign, line.format(sign)) for sign in "-_" for line in lines])


# ---- Python ----


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder in which the documents' names mean something small."""
    folder = tmp_path_factory.mktemp("documents")
    save_demo_model(folder / "runs" / "quickstart" / "instruct")
    (folder / "images").mkdir()
    (folder / "runs" / "quickstart" / "images").mkdir()
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    for path in ("runs/quickstart/images/level-0.png", "image.png", "images/a.png"):
        image.save(folder / path)
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a ramp"}]
    rows = [{"id": str(number), "image": "a.png", "conversations": turns} for number in range(4)]
    rows.append({"id": "gone", "image": "gone.png", "conversations": turns})
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    (folder / "conversations.json").write_text(json.dumps(rows[:4]))
    for name in ("runs/pretrain", "runs/vicuna-7b/pretrain", "runs/quickstart/pretrain"):
        shutil.copytree(folder / "runs" / "quickstart" / "instruct", folder / name)
        mark_as_pretrained(folder / name)
    adapter = ["instruct", "--config", "vicuna-7b/instruct_lora", "--model", f"{folder}/runs/vicuna-7b/pretrain"]
    adapter += ["--dataset", f"{folder}/conversations.json", "--image-folder", f"{folder}/images"]
    adapter += ["--output-dir", f"{folder}/runs/vicuna-7b/instruct_lora", "--use-cpu", "true", "--max-steps", "1"]
    adapter += ["--per-device-train-batch-size", "2", "--dataloader-num-workers", "0", "--lora-r", "4"]
    assert main(adapter) == 0
    return folder


def mark_as_pretrained(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "align_mode": "level", "training_stage": "pretrain"}))


def python_blocks():
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        found = list(documents.blocks(page.read_text(), "python"))
        if found:
            yield pytest.param(name, found, id=name)


@pytest.mark.parametrize(("page", "found"), python_blocks())
def test_python_blocks_run(page, found, workspace, monkeypatch):
    """In order, in one namespace a page, as a reader would paste them."""
    monkeypatch.chdir(workspace)
    namespace: dict = {"__name__": "__main__"}
    for number, block in enumerate(found):
        code = compile(block, f"{page}, block {number}", "exec")
        elsewhere = [path for (where, part), path in RUN_ELSEWHERE.items() if where == page and part in block]
        if not elsewhere:
            exec(code, namespace)
            continue
        assert (ROOT / elsewhere[0]).is_file()
        # what it imports is there
        imports = "\n".join(re.findall(r"^(?:from|import) (?!vllm).*$", block, re.MULTILINE))
        exec(imports, {})


def test_what_runs_elsewhere_is_there():
    for page, part in RUN_ELSEWHERE:
        assert any(part in block for block in documents.blocks((ROOT / page).read_text(), "python")), (page, part)
