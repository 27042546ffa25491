"""`aligngpt republish`: from the authors' checkpoint on the Hub to one that loads, and a plain LLaVA, in one go."""

import json
import shutil

import pytest
from local_hub.client import run_command, run_script
from local_hub.server import HubServer
from parity.golden import GOLDEN, read_json

from aligngpt_hub.publishing.republish import read_recorded
from aligngpt_trainers.commands import cli


# one question each, in the template that a converted Vicuna gets
PROMPTS = [each for each in read_json("inference") if len(each["turns"]) == 1 and each["conv"] == "vicuna_v1"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with the authors' model, and its tower beside it."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        for repo_id, folder in (("authors/aligngpt-tiny", "checkpoint"), ("someone/clip-vit-tiny", "clip-vit-tiny")):
            server.add_repo("models", repo_id, GOLDEN / folder)
        yield server


@pytest.fixture
def answers(tmp_path):
    """What the authors' code answered, as a user would have recorded it."""
    shutil.copytree(GOLDEN / "images", tmp_path / "recorded" / "images")
    rows = []
    for prompt in PROMPTS:
        question = prompt["turns"][0][0].replace("<image>", "").strip()
        image = {"image": f"images/{prompt['image']}"} if prompt["image"] else {}
        cut = {"ids": prompt["generated"], "max_new_tokens": len(prompt["generated"])}
        rows.append({**image, "question": question, "answer": prompt["text"], **cut})
    path = tmp_path / "recorded" / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(tmp_path, answers, repo_id, *more):
    common = ["republish", "--checkpoint", "authors/aligngpt-tiny", "--vision-tower", "someone/clip-vit-tiny"]
    return [*common, "--output", tmp_path / "converted", "--answers", answers, "--repo-id", repo_id, *more]


ASK = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
found = json.loads(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained("user/tiny", **found).eval()
processor = AutoProcessor.from_pretrained("user/tiny", **found)
content = [{"type": "image", "image": Image.open(sys.argv[2])}, {"type": "text", "text": sys.argv[3]}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=int(sys.argv[4]), do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(json.dumps([type(model).__name__, ids.tolist()]))
"""


def test_one_command_from_their_weights_to_both_forms(hub, tmp_path, answers):
    result = run_command(hub, *words(tmp_path, answers, "user/tiny"))
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert f"{len(PROMPTS)} of {len(PROMPTS)} recorded answers are the model's." in result.stdout
    prompt = next(prompt for prompt in PROMPTS if prompt["image"])
    asked = [GOLDEN / "images" / prompt["image"], prompt["turns"][0][0].replace("<image>", "").strip()]
    asked.append(len(prompt["generated"]))
    name, ids = run_script(hub, ASK, [json.dumps({"trust_remote_code": True}), *asked], token=hub.token)
    assert (name, ids) == ("AlignGPTForConditionalGeneration", prompt["generated"])
    name, _ = run_script(hub, ASK, [json.dumps({"revision": "llava"}), *asked], token=hub.token)
    assert name == "LlavaForConditionalGeneration"
    card = hub.files("models", "user/tiny")["README.md"].decode()
    assert "someone/clip-vit-tiny" in card
    # once more: what was converted is taken, and nothing is sent twice
    again = run_command(hub, *words(tmp_path, answers, "user/tiny"))
    assert again.returncode == 0 and "not converted again" in again.stdout
    assert "holds exactly this already" in again.stdout
    assert len(hub.commits("models", "user/tiny")) <= 2


def test_an_answer_that_differs_stops_it_before_anything_is_sent(tmp_path, answers, capsys):
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    rows[1] = {**rows[1], "answer": "a whale", "ids": None}
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = ["--checkpoint", str(GOLDEN / "checkpoint"), "--vision-tower", str(GOLDEN / "clip-vit-tiny")]
    common = ["republish", *local, "--output", str(tmp_path / "converted"), "--answers", str(answers)]
    common += ["--repo-id", "user/other", "--dry-run"]
    assert cli.main(common) == 2
    error = capsys.readouterr().err
    assert "answers.jsonl, line 2: the model answers" in error and "'a whale'" in error
    share = (len(rows) - 1) / len(rows)
    assert cli.main([*common, "--min-equal", str(share), "--no-llava"]) == 0
    said = capsys.readouterr().out
    assert "not converted again" in said and "dry run: nothing was sent" in said and "plain LLaVA" not in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "answers.jsonl, line 1 is no JSON"),
        ("[]", "line 1 is list, not an object"),
        ('{"question": "a"}', "line 1: answer is None; it must be str"),
        ('{"question": "a", "answer": "b", "picture": "c"}', "unknown field 'picture'"),
        ('{"question": "a", "answer": "b", "max_new_tokens": 0}', "max_new_tokens is 0"),
        ('{"question": "a", "answer": "b", "max_new_tokens": true}', "max_new_tokens is True"),
        ('{"question": "a", "answer": "b", "image": "gone.png"}', "'gone.png' is no file in the folder"),
        ('{"question": "a", "answer": "b", "image": "../secret.png"}', "'../secret.png' is no file in the folder"),
        ('{"question": "a", "answer": "b", "ids": [1, "2"]}', "ids must be a list of whole numbers"),
        ("", "holds no row"),
    ],
)
def test_recorded_answers_are_checked(tmp_path, line, said):
    (tmp_path / "secret.png").write_bytes(b"")
    path = tmp_path / "in" / "answers.jsonl"
    path.parent.mkdir()
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl") as error:
        read_recorded(path)
    assert said in str(error.value)


def test_another_checkpoints_conversion_is_not_taken(tmp_path, capsys):
    kept = tmp_path / "converted" / "original"
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("{}")
    checkpoint = ["--checkpoint", str(GOLDEN / "checkpoint"), "--output", str(tmp_path / "converted")]
    assert cli.main(["republish", *checkpoint, "--repo-id", "user/tiny", "--dry-run"]) == 2
    assert "holds the conversion of another checkpoint" in capsys.readouterr().err
