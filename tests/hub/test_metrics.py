"""Every metric against lmms-eval's own task functions, value for value, on generated answers."""

import json
import random
from pathlib import Path

import pytest
from evaluation_world.lmms import lmms_task

from aligngpt_hub import metrics
from aligngpt_hub.metrics.mmbench import read_choice
from aligngpt_hub.metrics.vqa_accuracy.scoring import _CONTRACTIONS, normalize_answer


FOLDER = Path(metrics.__file__).parent


WORDS = r"""a an the two Three ten none zero cant don't dont y'allll yall'd've youre couldnt've somebody'd let's she's
cat Cat's dogs red-ish 1,000 1,000.5 3.5 $3.50 2. 5,6,7 U.S.A. St. no Yes yes. NO! yes, maybe? (left) /path a/b A. B)
C: (D) .5 "quoted" new\nline tab\ttab é naïve 红色 左 unanswerable [x] {y} @home #1 50% back`tick under_score x>y x<y
ow's'at 'twas oclock o'clock's the's"""
WORDS = [word.replace("\\n", "\n").replace("\\t", "\t") for word in WORDS.split()]


def odd_answers(number, seed):
    """Answers with articles, digits, contractions, punctuation, line breaks and nothing in them."""
    rng = random.Random(seed)
    answers = ["", " ", ".", "?", "\n", "a", "The", "A.", "a, b"]
    while len(answers) < number:
        words = rng.choices(WORDS, k=rng.randint(1, 5))
        answers.append(rng.choice([" ", "  ", ", ", " - ", "; "]).join(words) + rng.choice(["", ".", "?", " ", "!\n"]))
    return answers[:number]


def human_answers(prediction, rng):
    """Ten answers, some of which agree with the prediction up to its form."""
    others, agreement = odd_answers(40, rng.random()), rng.choice([0, 0.1, 0.2, 0.5])
    forms = [prediction, prediction.upper(), prediction + ".", f"the {prediction}", prediction.strip()]
    return [rng.choice(forms) if rng.random() < agreement else rng.choice(others) for _ in range(10)]


# ---- VQAv2, TextVQA, VizWiz ----


def test_contractions_are_the_official_ones():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    official = EvalAIAnswerProcessor.CONTRACTIONS
    # entries with capitals are never met, because words are in lower case; entries that change nothing do nothing
    effective = {key: value for key, value in official.items() if key == key.lower() and key != value}
    assert effective == _CONTRACTIONS


@pytest.mark.parametrize(
    ("kind", "path", "function"),
    [
        ("vqav2", "vqav2/utils.py", "vqav2_process_results"),
        ("textvqa", "textvqa/utils.py", "textvqa_process_results"),
        ("vizwiz", "vizwiz_vqa/utils.py", "vizwiz_vqa_process_results"),
    ],
)
def test_vqa_accuracy(kind, path, function):
    theirs, rng = getattr(lmms_task(path), function), random.Random(1)
    predictions = odd_answers(400, 2)
    references = [human_answers(prediction, rng) for prediction in predictions]
    expected = []
    for prediction, answers in zip(predictions, references, strict=True):
        shown = [{"answer": a, "answer_id": i} for i, a in enumerate(answers)] if kind == "vqav2" else list(answers)
        result = theirs({"answers": shown, "question_id": 0}, [prediction])
        expected.append(result["exact_match"])
        assert normalize_answer(prediction, kind) == result["submission"]["answer"], repr(prediction)
    ours = [metrics.vqa_accuracy([p], [r], kind)["accuracy"] for p, r in zip(predictions, references, strict=True)]
    assert ours == pytest.approx(expected, abs=1e-12)
    assert 0.1 < sum(expected) / len(expected) < 0.9
    assert {round(value, 6) for value in expected} == {0, 0.3, 0.6, 0.9, 1}
    assert metrics.vqa_accuracy(predictions, references, kind)["accuracy"] == pytest.approx(sum(expected) / 400)


def test_a_single_reference_stands_for_all_people():
    """So that the function can be used in training, where a question has one answer."""
    assert metrics.vqa_accuracy(["Two.", "cat"], ["2", "dog"]) == {"accuracy": 0.5}


def test_a_vqa_answer_of_three_people_counts_fully_only_in_part():
    """Three of ten agree: 0.9, because leaving one of the three out leaves two (two thirds)."""
    answers = ["cat"] * 3 + ["dog"] * 7
    assert metrics.vqa_accuracy(["Cat."], [answers])["accuracy"] == pytest.approx(0.9)


LETTERED = ["A", "b", "C.", "D. a cat", "(A)", "A)", "B:", "A and B", "The answer is C", "E", "", " d ", "a.", "A.B."]


def letter_answers(number, seed):
    rng = random.Random(seed)
    words = [*LETTERED, "A cat sat", "A dog is near B", ":C", ":C)", "(D).", "B, C", "none", "AB"]
    return [rng.choice([rng.choice(words), f"{rng.choice('ABCDE')}. {rng.choice(WORDS)}"]) for _ in range(number)]


# ---- POPE ----

YES_NO = [
    "yes",
    "no",
    "Yes",
    "No.",
    "yes.",
    " YES ",
    "no ",
    "Yes, there is",
    "maybe",
    "",
    "y",
    "n",
    "N.",
    "not",
    "know",
]


def test_pope():
    theirs, rng = lmms_task("pope/utils.py"), random.Random(7)
    predictions = rng.choices(YES_NO, k=300)
    references = rng.choices(["yes", "no", "Yes", " no"], k=300)
    splits = rng.choices(["random", "popular", "adversarial"], k=300)
    ours = metrics.pope_scores(predictions, references, splits)

    def expected(chosen):
        rows = [
            theirs.pope_process_results({"answer": references[i], "question_id": i}, [predictions[i]])["pope_f1_score"]
            for i in chosen
        ]
        return {
            name: getattr(theirs, f"pope_aggregate_{long}")(rows)
            for name, long in (("accuracy",) * 2, ("precision",) * 2, ("recall",) * 2, ("f1", "f1_score"))
        }

    for name, value in expected(range(300)).items():
        assert ours[name] == pytest.approx(value, abs=1e-12), name
    for split in ("random", "popular", "adversarial"):
        for name, value in expected([i for i in range(300) if splits[i] == split]).items():
            assert ours["by_split"][split][name] == pytest.approx(value, abs=1e-12)
    assert list(ours["by_split"]) == ["random", "popular", "adversarial"]
    assert ours["mean_f1"] == pytest.approx(sum(ours["by_split"][split]["f1"] for split in ours["by_split"]) / 3)
    # of the answers: lmms-eval's counts the truths
    assert ours["yes_ratio"] == sum(answer.lower().strip() == "yes" for answer in predictions) / 300


# ---- MMBench ----


def test_mmbench_letters():
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    theirs = MMBench_Evaluator()
    rng, seen = random.Random(9), set()
    for prediction in letter_answers(600, 10) + odd_answers(200, 11) + ["the answer is: a red cat", "red and blue"]:
        choices = dict(zip("ABCD", rng.sample(["a red cat", "blue", "red", "Cat's", "3.5", "nothing"], 4), strict=True))
        expected = theirs.can_infer(prediction, dict(choices)) or None
        assert read_choice(prediction, choices) == expected, prediction
        seen.add(expected)
    assert seen == {*"ABCDE", None}


def test_mmbench_is_circular():
    import pandas
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    rng, rows = random.Random(12), []
    for index in range(120):
        for turn in range(rng.choice([1, 2, 4])):
            right = rng.choice("ABCD")
            prediction = rng.choice([right, f"{right}.", f"({right})"]) if rng.random() < 0.8 else rng.choice("ABCD")
            rows.append(
                {
                    "index": index + turn * 1_000_000,
                    "answer": right,
                    "prediction": prediction,
                    "category": rng.choice(["color", "shape"]) if turn == 0 else "turned",
                    "question": "?",
                    **dict(zip("ABCD", ["one", "two", "three", "four"], strict=True)),
                }
            )
    theirs = MMBench_Evaluator()
    data, answers = pandas.DataFrame(rows), {row["index"]: row["answer"] for row in rows}
    expected = {
        index: theirs.eval_sub_data(data[data["index"] % 1_000_000 == index], answers, static_only=True)
        for index in range(120)
    }
    references = [{**row, "choices": {letter: row[letter] for letter in "ABCD"}} for row in rows]
    ours = metrics.mmbench_scores([row["prediction"] for row in rows], references)
    assert ours["accuracy"] == pytest.approx(sum(expected.values()) / 120)
    assert ours["vanilla_accuracy"] > ours["accuracy"] and ours["unread"] == 0
    for category in ("color", "shape"):
        chosen = [row["index"] for row in rows if row["category"] == category]
        assert ours["by_category"][category] == pytest.approx(sum(expected[i] for i in chosen) / len(chosen))


def test_mmbench_judge_is_asked_where_no_letter_is_read():
    reference = {"index": 3, "answer": "B", "choices": {"A": "a cat", "B": "a dog"}, "category": "animals"}
    asked = []

    def judge(prediction, row):
        asked.append((prediction, row["index"]))
        return "B"

    assert metrics.mmbench_scores(["a hound"], [reference]) == {
        "accuracy": 0,
        "vanilla_accuracy": 0,
        "by_category": {"animals": 0},
        "unread": 1,
    }
    assert metrics.mmbench_scores(["a hound"], [reference], judge)["accuracy"] == 1
    assert asked == [("a hound", 3)]
    with pytest.raises(ValueError, match="Question 3 is there in turned copies alone"):
        metrics.mmbench_scores(["B"], [{**reference, "index": 1_000_003}])


# ---- judged benchmarks ----


def test_llava_bench():
    theirs, rng = lmms_task("llava-in-the-wild/utils.py"), random.Random(15)
    forms = ["8 7", "8, 7\nBecause", "8.5 6.5\n", "Scores: 9 4", "7;6", "nothing", "", "10", "8/10 5/10"]
    judgements, categories = rng.choices(forms, k=200), rng.choices(["conv", "detail", "complex"], k=200)
    parsed = [theirs._parse_comparative_scores(text).metadata["scores"] for text in judgements]
    ours = metrics.llava_bench_scores(judgements, categories)
    readable = [index for index, scores in enumerate(parsed) if scores != [-1, -1]]
    assert ours["unread"] == 200 - len(readable)
    for category in ("all", "conv", "detail", "complex"):
        rows = [{"scores": parsed[index]} for index in readable if category in ("all", categories[index])]
        expected = theirs.llava_aggregation(rows, category)
        assert (ours["score"] if category == "all" else ours["by_category"][category]) == expected


def test_mm_vet():
    theirs, rng = lmms_task("mmvet/utils.py"), random.Random(16)
    capabilities = rng.choices(["rec", "ocr,math", "math, ocr", "rec,know,gen", "spat,ocr"], k=200)
    judgements = rng.choices(["0.0", "0.5", "1.0", "0.3 because", " 0.7", "good", "", "1.5"], k=200)
    grades = [metrics.parse_grade(text) for text in judgements]
    rows = [{"score": g or 0.0, "capabilities": c.replace(" ", "")} for g, c in zip(grades, capabilities, strict=True)]
    ours = metrics.mm_vet_scores(judgements, capabilities)
    assert ours["score"] == pytest.approx(theirs.mmvet_aggregate_results(rows))
    assert ours["unread"] == grades.count(None) == sum(text in ("good", "", "1.5") for text in judgements)
    chosen = [row["score"] for row in rows if "ocr" in row["capabilities"]]
    assert ours["by_capability"]["ocr"] == pytest.approx(100 * sum(chosen) / len(chosen))
    assert set(ours["by_combination"]) == {"rec", "math,ocr", "gen,know,rec", "ocr,spat"}


# ---- as an `evaluate` module ----


def test_it_loads_as_an_evaluate_module(tmp_path):
    evaluate = pytest.importorskip("evaluate")
    module = evaluate.load(str(FOLDER / "vqa_accuracy"), cache_dir=str(tmp_path))
    assert module.compute(predictions=["two"], references=[["2"] * 10]) == {"accuracy": 1.0}
    readme = (FOLDER / "vqa_accuracy" / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("---\ntitle:") and module.description.strip() in readme


def test_a_configuration_chooses_the_normalisation(tmp_path):
    evaluate = pytest.importorskip("evaluate")
    inputs = {"predictions": ["dog's"], "references": [["dog 's"] * 10]}
    scores = [
        evaluate.load(str(FOLDER / "vqa_accuracy"), name, cache_dir=str(tmp_path)).compute(**inputs)["accuracy"]
        for name in (None, "textvqa")
    ]
    assert scores == [0.0, 1.0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.vqa_accuracy([], []),
        lambda: metrics.pope_scores(["yes"], ["yes"], []),
        lambda: metrics.mmbench_scores(["A"], []),
        lambda: metrics.llava_bench_scores([], []),
    ],
)
def test_lists_of_different_lengths_are_refused(call):
    with pytest.raises(ValueError, match="as many are needed"):
        call()


def test_a_trainer_uses_them(tmp_path):
    """As the held-out metric of answers by generation, in a real evaluation of a trainer."""
    from datasets import Dataset, Features, Image, List, Value
    from evaluation_world.rows import draw_image, make_one_word_model

    from aligngpt_trainers import AlignGPTInstructConfig, AlignGPTInstructTrainer

    text = Value("string")
    messages = List({"role": text, "content": List({"type": text, "text": text})})
    rows = Dataset.from_list(
        [
            {
                "images": [draw_image(i)],
                "messages": [
                    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"{i}?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
                ],
            }
            for i in range(6)
        ],
        features=Features({"images": List(Image()), "messages": messages}),
    )
    settings = AlignGPTInstructConfig(
        str(tmp_path),
        use_cpu=True,
        eval_generations=6,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = AlignGPTInstructTrainer(
        str(make_one_word_model(tmp_path, seed=33)),
        settings,
        rows,
        eval_dataset=rows,
        generation_metrics=metrics.on_records(metrics.pope_scores),
    )
    found = trainer.evaluate()
    answers = [json.loads(line)["answer"] for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert len(answers) == 6
    assert found["eval_accuracy"] == sum(answer.lower() == "yes" for answer in answers) / 6
    assert {"eval_f1", "eval_precision", "eval_recall", "eval_yes_ratio"} <= set(found)
