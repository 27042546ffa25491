"""The trained models that come with the package: made from the parts, named on the command line, and what they know."""

import json

import pytest
import torch

from aligngpt_playground import make_conversations, parts_path, trained
from aligngpt_playground.captions import DESCRIBE
from aligngpt_playground.evaluate import SavedModel, question_table, questions_of
from aligngpt_playground.measures import describe_captions
from aligngpt_playground.scenes import Scene
from aligngpt_trainers.commands import cli


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def rows():
    return make_conversations(96, seed=3, split="heldout")


def test_the_files_are_small_and_said_where_they_come_from():
    size = sum(path.stat().st_size for path in trained.TRAINED.iterdir())
    assert size < 8_000_000
    readme = (trained.TRAINED.parent / "README.md").read_text(encoding="utf-8")
    assert "train-models" in readme
    figures = json.loads((trained.TRAINED / "figures.json").read_text())
    assert set(figures) == set(trained.MODELS)
    for name, found in figures.items():
        assert f"{found['questions']:.3f}" in readme, name


def test_a_model_is_made_once_and_its_tower_is_the_part(cache):
    from transformers import CLIPModel

    folder = trained.trained_model("gate")
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert trained.trained_model("gate") == folder and (folder / "config.json").stat().st_mtime_ns == stamp
    tower = SavedModel(folder).model.model.vision_tower.state_dict()
    part = CLIPModel.from_pretrained(parts_path("clip")).vision_model.state_dict()
    assert tower.keys() == part.keys() and all(torch.equal(tower[name], part[name]) for name in tower)
    with pytest.raises(ValueError, match="trained model is 'best'"):
        trained.trained_model("best")


def test_the_gate_model_answers_held_out_questions(cache, rows):
    saved = SavedModel(trained.trained_model("gate"))
    assert saved.model.config.align_mode == "gate" and saved.stage == "instruct"
    asked = [(row["images"][0], question) for row in rows for question in questions_of(row)]
    questions = [question for _, question in asked]
    answers, weights = saved.answer([image for image, _ in asked], [question.question for question in questions])
    assert question_table(answers, questions, questions)[1].accuracy > 0.9
    assert all(abs(sum(each) - 1) < 1e-4 for each in weights[:5])


def test_the_other_follows_the_level(cache, rows):
    saved = SavedModel(trained.trained_model("steering"))
    images, scenes = [row["images"][0] for row in rows], [Scene.from_json(row["scene"]) for row in rows]
    low, high = (
        describe_captions(saved.answer(images, [DESCRIBE] * len(images), level)[0], scenes) for level in (0, 7)
    )
    assert high["exact"] > 0.5 > low["exact"] + 0.3 and high["absent object"] < 0.2 < low["absent object"]


def test_names_on_the_command_line(cache, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "image.png"
    make_conversations(1, split="heldout")[0]["images"][0].save(image)
    words = ["chat", "--image", str(image), "--question", "what is in the picture?"]
    said = []
    for named in ([], ["--model", "playground"], ["--model=playground"], ["--model", "playground-steering"]):
        assert cli.main([*words, *named]) == 0
        said.append(capsys.readouterr().out.strip())
    assert said[0] == said[1] == said[2] and all(said)
    # a checkout has a folder of that name; a model's folder is that model
    (tmp_path / "playground").mkdir()
    assert cli.main([*words, "--model", "playground"]) == 0
    assert capsys.readouterr().out.strip() == said[0]
    (tmp_path / "playground" / "config.json").write_text("{}")
    assert cli.main([*words, "--model", "playground"]) == 2
    assert "not of an AlignGPT" in capsys.readouterr().err
