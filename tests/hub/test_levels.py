"""`aligngpt levels`: the statistics against known cases, the figures against the model alone, the page."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from evaluation_world.rows import draw_image, make_one_word_model

from aligngpt_hub.levels import statistics as level_statistics
from aligngpt_hub.levels.probe import DualEncoder, caption_measures, read_answers
from aligngpt_trainers.commands import cli
from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTForConditionalGeneration, AlignGPTProcessor


TEXT = Value("string")


# ---- statistics ----


def test_rank_correlations_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 5, (2, 7))
        pairs = list(itertools.combinations(range(7), 2))
        signs = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs]
        ties = [sum(v[i] != v[j] for i, j in pairs) for v in (a, b)]
        expected = sum(signs) / np.sqrt(ties[0] * ties[1]) if all(ties) else 0.0
        assert level_statistics.kendall(a, b) == pytest.approx(expected)
        ranks = [[(sum(v < x) + sum(v <= x) - 1) / 2 for x in v] for v in (a, b)]
        varied = all(np.std(r) for r in ranks)
        assert level_statistics.spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1] if varied else 0.0)


def test_a_trend_is_found_and_noise_is_not():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(40, 8)) + rng.normal(size=(40, 1)) * 10
    rising = level_statistics.trend(noise + 0.2 * np.arange(8))
    assert rising["p"] < 0.01 and rising["slope"] == pytest.approx(0.2, abs=0.08) and rising["spearman"] > 0.7
    falling = level_statistics.trend(-noise - 0.2 * np.arange(8))
    assert falling["p"] == rising["p"] and falling["slope"] == pytest.approx(-rising["slope"])
    assert level_statistics.trend(np.ones((5, 4)))["p"] == 1
    assert level_statistics.trend(np.ones((5, 4)))["spearman"] == 0
    # p-values of pure noise are spread evenly
    values = [level_statistics.trend(rng.normal(size=(12, 4)), seed=i)["p"] for i in range(60)]
    assert 0.35 < np.mean(values) < 0.65 and 0 < sum(value < 0.2 for value in values) < 24
    with pytest.raises(ValueError, match="at least two images and two levels"):
        level_statistics.trend([[1, 2, 3]])


def test_groups_are_told_apart_only_where_they_differ():
    rng = np.random.default_rng(2)
    weights = rng.dirichlet(np.ones(7), 90)
    names = ["what", "count", "where"] * 30
    same = level_statistics.by_group(weights, names)
    assert same["p"] > 0.02 and same["share"] < 0.1
    assert [(group["name"], group["number"]) for group in same["groups"]] == [
        ("what", 30),
        ("count", 30),
        ("where", 30),
    ]
    assert same["groups"][1]["mean"] == pytest.approx(weights[1::3].mean(0).tolist())
    assert same["all"]["spread"] == pytest.approx(weights.std(0).tolist())
    weights[1::3] = np.roll(np.sort(weights[1::3], axis=1), 1, axis=1)
    assert level_statistics.by_group(weights, names)["p"] < 0.001
    assert level_statistics.by_group(weights, ["all"] * 90)["p"] is None


def test_images_are_compared_with_themselves():
    """A small difference between questions about one image counts, however different the images are."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=(20, 1, 3)) * 5
    weights = (base + np.array([0, 0.1])[:, None] + rng.normal(size=(20, 2, 3)) * 0.05).reshape(40, 3)
    names, images = ["a", "b"] * 20, np.repeat(np.arange(20), 2)
    assert level_statistics.by_group(weights, names)["p"] > 0.5
    assert level_statistics.by_group(weights, names, images)["p"] < 0.001


# ---- captions ----


class FixedEncoder:
    """Puts images and texts on the axes that they name."""

    def __init__(self, axes):
        self.axes = axes

    def images(self, images):
        return np.eye(4)[[self.axes[each] for each in images]]

    def texts(self, texts):
        return np.eye(4)[[self.axes[each] for each in texts]]


def test_self_retrieval_asks_for_the_own_image_first():
    encoder = FixedEncoder({"one": 0, "two": 1, "three": 2, "nothing": 3})
    captions = [["nothing", "one"], ["one", "two"], ["three", "three"]]
    found = caption_measures(captions, ["one", "two", "three"], [{}] * 3, encoder, None)
    assert found["CLIP score"].tolist() == [[0, 1], [0, 1], [1, 1]]
    # "nothing" is as near to all images: it finds none
    assert found["self-retrieval"].tolist() == [[0, 1], [0, 1], [1, 1]]
    assert found["words"].tolist() == [[1, 1]] * 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with `model`, `clip`, `pairs` and `conversations`."""
    folder = tmp_path_factory.mktemp("levels")
    make_one_word_model(folder, seed=33)
    (folder / "clip").rename(folder / "tower")
    _write_clip(folder / "clip")
    pairs = [{"image": draw_image(i), "caption": "a cat", "wanted": "two"} for i in range(6)]
    Dataset.from_list(pairs, Features({"image": Image(), "caption": TEXT, "wanted": TEXT})).save_to_disk(
        folder / "pairs"
    )
    rows = []
    for i in range(5):
        turns = []
        for turn, question in enumerate(("what is it?", f"how many are there, {i}?")):
            content = [{"type": "image", "text": None}] * (turn == 0) + [{"type": "text", "text": question}]
            turns += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
            ]
        rows.append({"images": [draw_image(i)], "messages": turns, "types": ["what", "count"]})
    features = Features(
        {
            "images": List(Image()),
            "messages": List({"role": TEXT, "content": List({"type": TEXT, "text": TEXT})}),
            "types": List(TEXT),
        }
    )
    DatasetDict(heldout=Dataset.from_list(rows, features=features)).save_to_disk(folder / "conversations")
    return folder


def _write_clip(folder):
    """A scorer that takes any text: a CLIP with a byte-level tokenizer."""
    from evaluation_world.rows import make_tokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = make_tokenizer()
    part = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(3)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    CLIPModel(
        CLIPConfig(
            text_config={**part, **text}, vision_config={**part, "image_size": 32, "patch_size": 8}, projection_dim=8
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def is_wanted(caption: str, row: dict) -> dict[str, bool]:
    """What `--correct` names below."""
    return {"wanted word": caption == row["wanted"]}


@pytest.fixture(scope="module")
def report(world):
    """Output of a run on questions and images."""
    words = ["--data", str(world / "conversations"), "--data", str(world / "pairs"), "--batch-size", "5"]
    words += ["--scorer", str(world / "clip"), "--correct", f"{__name__}:is_wanted", "--max-new-tokens", "6"]
    output = world / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(is_wanted=is_wanted))
        assert cli.main(["levels", "--model", str(world / "model"), *words, "--output", str(output)]) == 0
    return output


def test_gate_weights_are_the_models(world, report):
    model = AlignGPTForConditionalGeneration.from_pretrained(world / "model").eval()
    processor = AlignGPTProcessor.from_pretrained(world / "model")
    expected = {"what": [], "count": []}
    for i in range(5):
        for name, question in (("what", "what is it?"), ("count", f"how many are there, {i}?")):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            inputs = processor(text=[text], images=[draw_image(i)], return_tensors="pt", add_special_tokens=False)
            expected[name].append(model(**inputs).align_weights[0, :-1].tolist())
    gate = json.loads((report / "levels.json").read_text())["gate"]
    assert [group["name"] for group in gate["groups"]] == ["what", "count"] and gate["all"]["number"] == 10
    for group in gate["groups"]:
        assert group["mean"] == pytest.approx(np.mean(expected[group["name"]], axis=0).tolist(), abs=1e-4)
        assert group["spread"] == pytest.approx(np.std(expected[group["name"]], axis=0).tolist(), abs=1e-4)
    assert 0 < gate["p"] <= 1


def test_captions_are_the_models_at_every_level(world, report):
    model = AlignGPTForConditionalGeneration.from_pretrained(world / "model").eval()
    processor = AlignGPTProcessor.from_pretrained(world / "model")
    captions = json.loads((report / "levels.json").read_text())["captions"]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": captions["prompt"]}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    written = []
    for i in range(6):
        inputs = processor(text=[text], images=[draw_image(i)], return_tensors="pt", add_special_tokens=False)
        of_image = []
        for level in range(8):
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, align_level=level)
            of_image.append(
                processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            )
        written.append(of_image)
    assert [example["by_level"] for example in captions["examples"]] == written[:4]
    measures = {measure["name"]: measure for measure in captions["measures"]}
    assert list(measures) == ["words", "CLIP score", "self-retrieval", "wanted word"]
    wanted = [[caption == "two" for caption in of_image] for of_image in written]
    assert measures["wanted word"]["mean"] == pytest.approx(np.mean(wanted, axis=0).tolist())
    encoder = DualEncoder(str(world / "clip"))
    scores = encoder.images([draw_image(2)]) @ encoder.texts(written[2]).T
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(world / "clip").eval()
    inputs = dict(encoder.image_processor(images=[draw_image(2)], return_tensors="pt"))
    inputs |= encoder.tokenizer(written[2], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    expected = clip(**inputs).logits_per_image / clip.logit_scale.exp()
    assert scores[0].tolist() == pytest.approx(expected[0].tolist(), abs=1e-5)


def test_after_stage_1_captions_are_in_its_format(world, tmp_path, monkeypatch):
    """The image alone is the prompt, and a caption ends at the line break."""
    from aligngpt_hub.levels.probe import LevelProbe

    probe = LevelProbe(str(world / "model"))
    probe.model.config.training_stage = "pretrain"
    asked = []
    real = probe.model.generate
    monkeypatch.setattr(probe.model, "generate", lambda **given: asked.append(given["input_ids"]) or real(**given))
    found = probe.captions([draw_image(0)], "never asked", 6)
    plain = probe.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}],
        chat_template=CHAT_TEMPLATES["plain"],
        tokenize=False,
        add_generation_prompt=True,
    )
    expected = probe.processor(text=[plain], images=[draw_image(0)], add_special_tokens=False, return_tensors="pt")
    assert asked[0][0].tolist() == expected["input_ids"][0].tolist()
    assert len(found) == 1 and len(found[0]) == 8


def test_the_page_stands_alone_and_says_what_the_json_says(report):
    html = (report / "levels.html").read_text(encoding="utf-8")
    results = json.loads((report / "levels.json").read_text())
    outside = re.findall(r'(?:src|href)="(?!data:|https://arxiv)[^"]*"|<script|@import|url\(', html)
    assert not outside
    assert html.count('<svg class="chart"') == len(results["captions"]["measures"]) + 3
    assert html.count('role="img" aria-label=') == html.count("<svg")
    assert html.count("<img") == html.count('alt="Example') == 4
    for measure in results["captions"]["measures"]:
        assert f"<h3>{measure['name']}</h3>" in html and f"p = {measure['p']:.4f}" in html
    assert '<html lang="en">' in html and "width=device-width" in html
    assert {path.name for path in report.iterdir()} == {"levels.html", "levels.json"}


def test_texts_of_models_cannot_break_the_page(tmp_path):
    from aligngpt_hub.levels.report import write_report

    trend = {"name": "<b>words", **level_statistics.trend(np.random.default_rng(0).normal(size=(4, 3)))}
    captions = {
        "number": 4,
        "prompt": "<script>",
        "scorer": None,
        "measures": [trend],
        "examples": [{"by_level": ["<script>alert(1)</script>", "", "x"]}],
    }
    results = {"model": "<i>", "align_mode": "level", "num_align_levels": 3, "gate": None, "captions": captions}
    write_report(tmp_path / "page.html", results, [draw_image(0)])
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;alert" in html and "<b>words" not in html


def test_kept_answers_of_an_evaluation_are_weights_by_benchmark(tmp_path, capsys):
    path = tmp_path / "answers-pope.jsonl"
    # all shares, as they are kept; and the local levels alone, as files of before there was that hold them
    for identity, top in (({"num_align_levels": 3}, [1]), ({}, [])):
        rows = [{"identity": identity}] + [
            {"task": task, "align_weights": [weight, 1 - weight, *top], "answer": "x"}
            for task, weight in (("pope", 0.2), ("pope", 0.4), ("mme", 0.9))
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert read_answers(path) == ([[0.2, 0.8], [0.4, 0.6], [0.9, 1 - 0.9]], ["pope", "pope", "mme"])
    assert cli.main(["levels", "--answers", str(path), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "0.300 ± 0.100" in printed and "mme" in printed
    path.write_text('{"answer": "x"}\n')
    assert cli.main(["levels", "--answers", str(path)]) == 2
    assert "line 1: no answer of `aligngpt evaluate`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data is missing"),
        (["--data", "x"], "--model is missing"),
        (["--model", "x", "--data", "x", "--limit", "0"], "--limit is 0"),
        (["--model", "x", "--data", "x", "--correct", "nowhere:f"], "--correct nowhere:f: write MODULE:FUNCTION"),
    ],
)
def test_what_cannot_be_is_said(words, message, capsys):
    assert cli.main(["levels", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_data_set_or_scorer_that_is_not_there_is_named(world, tmp_path, capsys):
    given = ["levels", "--model", str(world / "model"), "--output", str(tmp_path / "out")]
    assert cli.main([*given, "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere cannot be loaded" in capsys.readouterr().err
    data = ["--data", str(world / "pairs"), "--max-new-tokens", "1", "--limit", "2"]
    assert cli.main([*given, *data, "--scorer", str(world / "llama")]) == 2
    assert "--scorer" in capsys.readouterr().err
    assert cli.main([*given, "--data", str(world / "conversations"), "--split", "nine"]) == 2
    assert "has no split 'nine' but heldout" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- beside other gates, and what levels change ----


def test_other_gates_read_what_the_models_own_reads(world):
    from aligngpt_hub.levels.probe import LevelProbe
    from aligngpt_hub.levels.truth import gates_to_compare

    probe = LevelProbe(str(world / "model"))
    questions = [
        ("what is it?", [draw_image(0)]),
        ("how many?", [draw_image(1), draw_image(2)]),
        ("where?", [draw_image(3)]),
    ]
    has_before, gates = gates_to_compare(probe, str(world / "model"), str(world / "model"), seed=0)
    assert has_before and len(gates) == 60
    own, others = probe.gate_weights(questions, gates)
    np.testing.assert_allclose(others[0], own, atol=1e-5, err_msg="the first is the model's own gate here")
    assert all(each.shape == (3, 7) for each in others) and np.abs(others[1] - own).max() > 1e-3
    # a random gate put into the model gives the same
    probe.model.model.align_gate = gates[1]
    np.testing.assert_allclose(probe.gate_weights(questions)[0], others[1], atol=1e-5)


def test_a_gate_has_learned_only_what_random_gates_do_not_show():
    from aligngpt_hub.levels.truth import compare_gates

    rng = np.random.default_rng(0)
    groups = ["a", "b"] * 20
    drawn = [rng.dirichlet(np.ones(7), 40) for _ in range(60)]
    shares = [level_statistics.share_between(weights, groups) for weights in drawn]
    among = compare_gates(float(np.median(shares)), drawn, groups, has_before=True)
    assert among["before"] == pytest.approx(shares[0]) and among["number"] == 59 and not among["learned"]
    assert (among["random"]["least"], among["random"]["largest"]) == (min(shares[1:]), max(shares[1:]))
    assert "nothing shows that the gate has learned" in level_statistics.verdict(among)
    beyond = compare_gates(max(shares) + 0.1, drawn, groups, has_before=False)
    assert beyond["learned"] and beyond["p"] == pytest.approx(1 / 61) and beyond["before"] is None
    assert "has learned to tell the groups apart" in level_statistics.verdict(beyond)
    assert compare_gates(None, drawn, groups, False) is None and compare_gates(0.1, [], groups, False) is None


def test_what_levels_change_is_counted(world, report):
    """Answers at each level and the losses of the known ones, against the model alone."""
    found = json.loads((report / "levels.json").read_text())["steering"]
    model = AlignGPTForConditionalGeneration.from_pretrained(world / "model").eval()
    processor = AlignGPTProcessor.from_pretrained(world / "model")
    own, at, losses, tokens = [], [], [], 0
    for i in range(5):
        for question in ("what is it?", f"how many are there, {i}?"):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            inputs = processor(text=[text], images=[draw_image(i)], return_tensors="pt", add_special_tokens=False)

            def answer(inputs=inputs, **steered):
                ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, **steered)
                return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

            own.append(answer())
            at.append([answer(align_level=level) for level in range(8)])
            # the prompt's ids stand in front of the answer's
            said = {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}
            whole = processor.apply_chat_template([*chat, said], tokenize=False).rstrip("\n")
            told = processor(text=[whole], images=[draw_image(i)], return_tensors="pt", add_special_tokens=False)
            prompt = inputs["input_ids"].shape[1]
            labels = told["input_ids"].clone()
            labels[:, :prompt] = -100
            rows = [model(**told, labels=labels, align_level=level).loss.item() for level in range(8)]
            told["prompt_mask"] = labels == -100
            rows.append(model(**told, labels=labels).loss.item())
            number = labels.shape[1] - prompt
            losses.append(np.array(rows) * number)
            tokens += number
    assert found["number"] == found["answers"] == 10
    assert found["different"] == [np.mean([a[level] != o for a, o in zip(at, own, strict=True)]) for level in range(8)]
    assert found["any"] == np.mean([len(set(a)) > 1 for a in at])
    assert [*found["loss"], found["own_loss"]] == pytest.approx((np.sum(losses, axis=0) / tokens).tolist(), abs=1e-4)
    gates = json.loads((report / "levels.json").read_text())["gates"]
    assert gates["number"] == 59 and gates["before"] is None
    html = (report / "levels.html").read_text()
    assert level_statistics.verdict(gates) in html and "What the levels change in answers" in html


def test_a_model_without_a_gate_shows_none(world, tmp_path, capsys):
    model = AlignGPTForConditionalGeneration.from_pretrained(world / "model")
    model.config.align_mode = "global"
    model.save_pretrained(tmp_path / "model")
    AlignGPTProcessor.from_pretrained(world / "model").save_pretrained(tmp_path / "model")
    words = ["levels", "--model", str(tmp_path / "model"), "--data", str(world / "conversations")]
    assert cli.main([*words, "--output", str(tmp_path / "out"), "--max-new-tokens", "2", "--steering", "3"]) == 0
    printed = capsys.readouterr().out
    assert "gate weights" not in printed and "of 3 questions are answered differently" in printed
    results = json.loads((tmp_path / "out" / "levels.json").read_text())
    assert results["gate"] is None and results["gates"] is None and results["steering"]["number"] == 3
