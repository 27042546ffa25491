"""The paper's benchmarks end to end: prompt as the model sees it, answer, judge, figure, file, going on."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from threading import get_ident

import pytest
from demo_model import serving
from evaluation_world.rows import answer_alone, draw_image, make_one_word_model, make_rows, write_data

from aligngpt_hub.evaluation.tasks import BENCHMARKS, BY_NAME, PAPER, make_task
from aligngpt_trainers.commands import cli
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_one_word_model(tmp_path_factory.mktemp("one-word"), seed=33)


@pytest.fixture(scope="module")
def model(model_folder):
    return AlignGPTForConditionalGeneration.from_pretrained(model_folder).eval()


@pytest.fixture(scope="module")
def processor(model_folder):
    return AlignGPTProcessor.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def rows(model, processor):
    return make_rows(lambda question, images: answer_alone(model, processor, question, images))


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), rows)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """URL of a judge in a process of its own, and the file of what it was asked."""
    log = tmp_path_factory.mktemp("judge") / "log.jsonl"
    server = subprocess.Popen(
        [sys.executable, Path(__file__).parents[1] / "evaluation_world" / "judge_server.py", log],
        stdout=subprocess.PIPE,
        text=True,
    )
    yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1", log
    server.terminate()
    server.wait()


def words(model_folder, data, output, *more, tasks="paper"):
    chosen = PAPER if tasks == "paper" else tasks.split(",")
    local = [word for task in chosen for word in ("--data", f"{task}={data[task]}")]
    return ["evaluate", "--model", str(model_folder), "--tasks", tasks, "--output", str(output), *local, *more]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(model_folder, data, judge, tmp_path_factory):
    """The output of a run of all twelve."""
    output = tmp_path_factory.mktemp("runs") / "evaluated"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGE_KEY", "sesame")
        given = ("--judge-url", judge[0], "--judge-model", "rule", "--judge-key-env", "JUDGE_KEY", "--batch-size", "3")
        assert cli.main(words(model_folder, data, output, *given)) == 0
    return output


# ---- the twelve ----


@pytest.mark.parametrize("task", PAPER)
def test_the_model_is_asked_as_in_llava(task, run, rows):
    answers = read(run / "evaluation" / f"answers-{task}.jsonl")[1:]
    assert len(answers) == len(rows[task]["questions"])
    for row in answers:
        images = 2 if task == "seedbench" and row["doc_id"] == 3 else 1
        question = rows[task]["questions"][row["doc_id"]]
        start = f"<s><align>{SYSTEM} USER: " + "<image>\n" * images
        assert row["prompt"] == f"{start}{question} ASSISTANT:"


@pytest.mark.parametrize("task", PAPER)
def test_the_answers_are_those_of_transformers_alone(task, run, rows, model, processor):
    """Batches of three, padded, give what single prompts give; and the gate weighs each as the model does."""
    entry = rows[task]
    listed = entry.get("rows") or entry["configs"]["testdev_balanced_instructions"]
    for row in read(run / "evaluation" / f"answers-{task}.jsonl")[1:]:
        doc = listed[row["doc_id"]]
        shown = entry["configs"]["testdev_balanced_images"][row["doc_id"]]["image"] if task == "gqa" else doc["image"]
        shown = shown if isinstance(shown, list) else [shown]
        question = entry["questions"][row["doc_id"]]
        assert row["answer"] == answer_alone(model, processor, question, shown)
        inputs = processor(text=[row["prompt"]], images=shown, return_tensors="pt", add_special_tokens=False)
        assert row["align_weights"] == pytest.approx(model(**inputs).align_weights[0].tolist(), abs=1e-4)
        assert sum(row["align_weights"]) == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize("task", PAPER)
def test_the_figure_is_right_and_stands_beside_the_papers(task, run, rows):
    results = json.loads((run / "evaluation_results.json").read_text(encoding="utf-8"))
    own = [row for row in results["results"] if row["task"] == task]
    first, benchmark = own[0], BY_NAME[task]
    assert first["value"] == pytest.approx(rows[task]["expected"], abs=1e-3)
    assert (first["paper_7b"], first["paper_13b"]) == (benchmark.paper_7b, benchmark.paper_13b)
    assert all(row["paper_7b"] is None and "/" not in row["metric"] for row in own[1:])
    assert first["num_samples"] == len(rows[task]["questions"]) and first["split"] == rows[task]["split"]
    assert first["task_version"].startswith("lmms-eval 0.7.3")


def test_the_papers_figures_are_those_of_its_table():
    figures = {benchmark.title: (benchmark.paper_7b, benchmark.paper_13b) for benchmark in BENCHMARKS}
    assert {title: pair for title, pair in figures.items() if pair[0] is not None} == {
        "VQAv2": (79.1, 80.0),
        "GQA": (62.9, 63.6),
        "VizWiz": (54.2, 56.4),
        "SQA": (68.5, 70.3),
        "TextVQA": (58.4, 60.2),
        "POPE": (86.0, 86.2),
        "MME": (1527.4, 1572.0),
        "MMB": (67.3, 69.5),
        "MMB-CN": (59.9, 63.7),
        "SEED": (66.5, 67.8),
        "LLaVA-W": (68.4, 75.2),
        "MM-Vet": (30.8, 35.6),
    }


def test_the_results_say_how_they_were_made(run):
    results = json.loads((run / "evaluation_results.json").read_text(encoding="utf-8"))
    assert results["model"] == "model" and results["revision"] is None and len(results["weights"]) == 64
    assert (results["dtype"], results["align_mode"], results["align_level"], results["seed"]) == (
        "float32",
        "gate",
        None,
        0,
    )
    assert results["code_version"] and results["date"].startswith("20")
    assert set(results["runs"]) == set(PAPER)
    assert all(run["seconds"] > 0 and run["settings"]["limit"] is None for run in results["runs"].values())
    assert {"random/f1", "popular/yes_ratio", "adversarial/accuracy"} <= set(results["details"]["pope"])
    assert "/" not in "".join(row["dataset"] for row in results["results"]), "a path of this machine"


def test_lmms_eval_scores_pope_the_same_by_itself(run, data, model_folder, tmp_path, monkeypatch):
    """As `lmms-eval --model aligngpt` does it, with its own metrics and the model it finds by the entry point."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    found = simple_evaluate(
        model="aligngpt",
        model_args=f"pretrained={model_folder},batch_size=2,device=cpu",
        tasks=[make_task(BY_NAME["pope"], data["pope"])],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    results = json.loads((run / "evaluation_results.json").read_text(encoding="utf-8"))
    ours = {row["metric"]: row["value"] for row in results["results"] if row["task"] == "pope"}
    for theirs, name in (("accuracy", "accuracy"), ("recall", "recall"), ("f1_score", "f1")):
        assert ours[name] == pytest.approx(found["results"]["pope"][f"pope_{theirs},none"] * 100, abs=1e-3)


def test_the_entry_point_leads_to_the_model():
    from lmms_eval.models import get_model

    assert [point.value for point in entry_points(group="lmms_eval.models", name="aligngpt")] == [
        "aligngpt_hub.evaluation.lmms_adapter:manifest"
    ]
    assert get_model("aligngpt").__name__ == "AlignGPTLmms"


# ---- the judge ----


def test_the_judge_is_asked_with_the_benchmarks_prompts(run, judge, rows, monkeypatch):
    """Word for word what lmms-eval's own tasks send."""
    from evaluation_world.lmms import lmms_task
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    asked = read(judge[1])
    assert {(row["path"], row["key"], row["model"]) for row in asked} >= {
        ("/v1/chat/completions", "Bearer sesame", "rule")
    }
    prompts = [row["messages"][0]["content"] for row in asked]
    wild, vet = lmms_task("llava-in-the-wild/utils.py"), lmms_task("mmvet/utils.py")
    sent = []
    monkeypatch.setattr(wild, "_get_pipeline", lambda: lambda **given: sent.append(given["content"]))
    monkeypatch.setattr(vet, "get_chat_response", lambda prompt, **given: sent.append(prompt) or ("0.5", "x"))
    for task, theirs in (("llava_in_the_wild", wild.llava_process_results), ("mmvet", vet.mmvet_process_results)):
        for row in read(run / "evaluation" / f"answers-{task}.jsonl")[1:]:
            theirs(rows[task]["rows"][row["doc_id"]], [row["answer"]])
    assert len(sent) == 6 and set(sent) <= set(prompts)
    theirs, letters = MMBench_Evaluator(), 0
    for task in ("mmbench_en_dev", "mmbench_cn_dev"):
        for row in read(run / "evaluation" / f"answers-{task}.jsonl")[1:]:
            doc = rows[task]["rows"][row["doc_id"]]
            choices = {letter: doc[letter] for letter in "ABCD" if doc[letter] != "nan"}
            needed = not theirs.can_infer(row["answer"], dict(choices))
            prompt = theirs.build_prompt(doc["question"], theirs.build_option_str(choices.values()), row["answer"])
            assert (prompt in prompts) == needed
            letters += needed
    assert letters, "no answer of the tiny model needed the judge"


def test_an_unreadable_judgement_is_asked_for_again_and_all_are_kept(run, judge):
    hesitant = [row for row in read(judge[1]) if "hesitates" in row["messages"][0]["content"].split("\n")[-1]]
    assert [row["temperature"] for row in hesitant][:2] == [0.0, 0.5]
    kept = read(run / "evaluation" / "judgements-mmvet.jsonl")
    assert len(kept) == 3 and {row["judge"] for row in kept} == {"rule"}
    assert sorted(row["judgement"] for row in kept) == ["0.0", "1.0", "1.0"]


def test_answers_wait_for_their_judge(model_folder, data, judge, tmp_path, capsys):
    given = words(model_folder, data, tmp_path, tasks="mmvet")
    assert cli.main(given) == 0
    assert "mmvet: answered, not judged" in capsys.readouterr().out
    assert not (tmp_path / "evaluation_results.json").exists()
    answers = (tmp_path / "evaluation" / "answers-mmvet.jsonl").read_bytes()
    assert cli.main([*given, "--judge-url", judge[0], "--judge-model", "nobody"]) == 2
    assert "the judge nobody at" in (error := capsys.readouterr().err) and "404" in error and "run again" in error
    assert cli.main([*given, "--judge-url", judge[0], "--judge-model", "rule"]) == 0
    assert (tmp_path / "evaluation" / "answers-mmvet.jsonl").read_bytes() == answers
    results = json.loads((tmp_path / "evaluation_results.json").read_text(encoding="utf-8"))
    assert results["results"][0]["value"] == pytest.approx(66.6667)


# ---- going on, refusing, settings ----


def test_a_stopped_run_goes_on_and_ends_the_same(run, model_folder, data, tmp_path, capsys, monkeypatch):
    from aligngpt_hub.evaluation.lmms_model import AlignGPTLmms

    given = words(model_folder, data, tmp_path, "--batch-size", "2", tasks="pope,gqa")
    asked, real = [], AlignGPTLmms.answer_batch

    def stop_at_four(self, requests):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(requests))
        yield from real(self, requests)

    with monkeypatch.context() as patch:
        patch.setattr(AlignGPTLmms, "answer_batch", stop_at_four)
        assert cli.main(given) == 130
    path = tmp_path / "evaluation" / "answers-pope.jsonl"
    assert len(read(path)) == 5
    with path.open("a") as file:
        file.write('{"key": "cut off in the mid')
    with monkeypatch.context() as patch:
        patch.setattr(
            AlignGPTLmms, "answer_batch", lambda self, requests: asked.append(len(requests)) or real(self, requests)
        )
        assert cli.main(given) == 0
    assert sum(asked) == 9 + 4, "nothing was asked twice"
    for task in ("pope", "gqa"):
        name = f"evaluation/answers-{task}.jsonl"
        ours, whole = ({row["doc_id"]: row["answer"] for row in read(folder / name)[1:]} for folder in (tmp_path, run))
        assert ours == whole
    before = (tmp_path / "evaluation_results.json").read_bytes()
    capsys.readouterr()
    assert cli.main(given) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert (tmp_path / "evaluation_results.json").read_bytes() == before


def test_a_server_answers_as_the_model_here(run, model_folder, data, tmp_path, capsys, monkeypatch):
    """Through `aligngpt serve`: the same answers, four requests at once; steered ones are steered."""
    from aligngpt_hub.evaluation.answers import AnsweringLmms

    threads, real = set(), AnsweringLmms.messages_of
    monkeypatch.setattr(
        AnsweringLmms, "messages_of", lambda self, request: threads.add(get_ident()) or real(self, request)
    )
    command = ["-m", "aligngpt_trainers", "serve", "--model", str(model_folder), "--port", "0", "--device", "cpu"]
    with serving(command, r"(http://\S+/v1) serves", tmp_path) as ready:
        url = ready.group(1)
        given = words(model_folder, data, tmp_path / "out", "--server", url, "--batch-size", "4", tasks="pope,gqa")
        assert cli.main(given) == 0, capsys.readouterr().err
        steered = words(model_folder, data, tmp_path / "0", "--server", url, "--align-level", "0", tasks="pope")
        assert cli.main(steered) == 0
        identity = read(tmp_path / "0" / "evaluation" / "answers-pope.jsonl")[0]["identity"]
        assert cli.main(_with(steered, "--align-level", "9")) == 2
        said = capsys.readouterr().err
        assert "pope, sample" in said and "align_level" in said
    for task in ("pope", "gqa"):
        name = f"evaluation/answers-{task}.jsonl"
        ours, whole = (
            {row["doc_id"]: row["answer"] for row in read(folder / name)[1:]} for folder in (tmp_path / "out", run)
        )
        assert ours == whole
    assert identity["server"] == "server" and identity["align_level"] == 0 and identity["weights"]
    assert threads == {get_ident()}, "tasks open their data as they go, which threads would do at once"
    answers = str(tmp_path / "0" / "evaluation" / "answers-pope.jsonl")
    assert cli.main(["levels", "--answers", answers]) == 2
    assert "a server gave these" in capsys.readouterr().err
    assert cli.main(given) == 2  # it has ended
    assert "no OpenAI-compatible server answers" in capsys.readouterr().err


def _with(given: list[str], name: str, value: str) -> list[str]:
    place = given.index(name) + 1
    return [*given[:place], value, *given[place + 1 :], "--overwrite"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--server", "http://127.0.0.1:9"], "give the address up to /v1"),
        (["--server", "http://127.0.0.1:9/v1"], "no OpenAI-compatible server answers"),
        (["--server", "http://127.0.0.1:9/v1", "--backend", "vllm"], "exclude each other"),
        (["--server", "http://127.0.0.1:9/v1", "--dtype", "bfloat16"], "--dtype has no effect with --server"),
        (["--backend", "vllm", "--align-mode", "mean"], "--align-mode has no effect with --backend vllm"),
        (["--backend", "vllm"], "vLLM ended before it answered: error: --backend vllm needs vLLM"),
    ],
)
def test_servers_that_are_not_there_are_said(more, message, model_folder, data, tmp_path, capsys):
    assert cli.main(words(model_folder, data, tmp_path, *more, tasks="pope")) == 2
    assert message in capsys.readouterr().err


def test_two_processes_share_the_samples_and_give_the_same(run, model_folder, data, tmp_path):
    import os

    given = words(model_folder, data, tmp_path, "--batch-size", "2", tasks="pope,mme")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "aligngpt_trainers"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, *given], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written to") == 1
    ours, whole = (
        [
            row
            for row in json.loads((folder / "evaluation_results.json").read_text())["results"]
            if row["task"] in given[4]
        ]
        for folder in (tmp_path, run)
    )
    assert ours == whole
    for task in ("pope", "mme"):
        name = f"evaluation/answers-{task}.jsonl"
        ours, whole = ({row["doc_id"]: row["answer"] for row in read(folder / name)[1:]} for folder in (tmp_path, run))
        assert ours == whole
    assert not list(tmp_path.glob("evaluation/*.rank*"))


def test_another_way_of_answering_is_not_mixed_in(model_folder, data, tmp_path, capsys):
    given = words(model_folder, data, tmp_path, "--limit", "2", tasks="pope")
    assert cli.main(given) == 0
    results = json.loads((tmp_path / "evaluation_results.json").read_text(encoding="utf-8"))
    assert results["results"][0]["num_samples"] == 2
    assert cli.main([*given, "--align-level", "0"]) == 2
    assert "holds figures with align_level None" in capsys.readouterr().err
    assert cli.main([*given, "--align-level", "0", "--overwrite"]) == 0
    steered = read(tmp_path / "evaluation" / "answers-pope.jsonl")
    assert steered[0]["identity"]["align_level"] == 0
    assert steered[1]["align_weights"] == [1, 0, 0, 0, 0, 0, 0, 0]
    # fewer samples would replace the figures, more come on top: those that are there are kept
    fewer = words(model_folder, data, tmp_path, "--limit", "1", "--align-level", "0", tasks="pope")
    assert cli.main(fewer) == 2
    assert "holds pope with limit 2" in capsys.readouterr().err
    more = words(model_folder, data, tmp_path, "--limit", "3", "--align-level", "0", tasks="pope")
    assert cli.main(more) == 0
    assert read(tmp_path / "evaluation" / "answers-pope.jsonl")[: len(steered)] == steered


def test_ones_own_questions(model_folder, model, processor, tmp_path, capsys, monkeypatch):
    """The first question of each row, against its answer; a stopped run goes on; by level."""
    from aligngpt_hub.evaluation.store import AnswerStore

    rows, said = [], []
    for number in range(4):
        image = draw_image(number)
        image.save(tmp_path / f"{number}.png")
        said.append(answer_alone(model, processor, f"what is {number}?", [image]))
        talk = [f"<image>\nwhat is {number}?", f" {said[-1].upper()}. " if number < 3 else "nothing", "and?", "yes"]
        talk = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(talk)]
        rows.append({"image": f"{number}.png", "conversations": talk, "align_level": number // 2})
    (tmp_path / "my.json").write_text(json.dumps(rows))
    given = ["evaluate", "--model", str(model_folder), "--data", str(tmp_path / "my.json"), "--batch-size", "2"]
    given += ["--output", str(tmp_path / "out"), "--device", "cpu"]
    real = AnswerStore.add
    with monkeypatch.context() as patch:
        patch.setattr(AnswerStore, "add", lambda self, row: real(self, row) if len(self.rows) < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(given)
    kept = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert cli.main(given) == 0
    assert (tmp_path / "out" / "answers.jsonl").read_bytes().startswith(kept)
    answers = read(tmp_path / "out" / "answers.jsonl")[1:]
    assert [row["answer"] for row in answers] == said
    assert answers[0]["prompt"].endswith("<image>\nwhat is 0? ASSISTANT:")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["rows"], scores["exact_match"], scores["vqa_accuracy"]) == (4, 75, 75)
    assert {level: part["exact_match"] for level, part in scores["by_level"].items()} == {"0": 100, "1": 50}
    assert "75.0" in capsys.readouterr().out
    assert cli.main([*given, "--align-level", "3"]) == 2
    assert "another align_level" in capsys.readouterr().err
    assert cli.main([*given, "--align-level", "3", "--overwrite"]) == 0


def test_mode_and_level_reach_the_model(model_folder, data, tmp_path):
    from aligngpt_hub.evaluation.lmms_model import AlignGPTLmms

    lm = AlignGPTLmms(str(model_folder), align_mode="mean", dtype="bfloat16", device="cpu")
    assert lm.model.config.align_mode == "mean" and lm.identity["dtype"] == "bfloat16"
    for wrong, message in (
        ({"align_mode": "medium"}, "align_mode='medium' is not one of"),
        ({"align_level": 8}, r"align_level=8 is not in 0\.\.7"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"max_frames": 3}, "unknown model argument.*max_frames"),
    ):
        with pytest.raises(ValueError, match=message):
            AlignGPTLmms(str(model_folder), device="cpu", **wrong)


def test_a_test_split_becomes_a_file_for_the_server(model_folder, rows, data, tmp_path, capsys):
    from datasets import DatasetDict, load_from_disk

    folder = tmp_path / "data"
    DatasetDict(test=load_from_disk(data["vqav2_val"])["validation"].remove_columns("answers")).save_to_disk(folder)
    local = ["--data", f"vqav2_test={folder}", "--output", str(tmp_path / "out")]
    assert cli.main(["evaluate", "--model", str(model_folder), "--tasks", "vqav2_test", *local]) == 0
    rows = json.loads((tmp_path / "out" / "evaluation" / "submission-vqav2_test.json").read_text())
    assert [row["question_id"] for row in rows] == [0, 1, 2, 3] and all(row["answer"] for row in rows)
    assert "4 answers for the server" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "popes"], "there is no benchmark 'popes' here; there are paper"),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--data", "pope"], "pope"),
        (["--data", "pope", "--data", "gqa"], "your own questions are asked alone"),
        (["--data", "pope=/nowhere"], "there is no such folder"),
        (["--judge-url", "http://x"], "--judge-url and --judge-model belong together"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(more, message, capsys):
    assert cli.main(["evaluate", "--model", "nothing", *more]) == 2
    assert message in capsys.readouterr().err


def test_a_data_set_that_cannot_be_loaded_is_named_with_the_remedy(model_folder, tmp_path, capsys, monkeypatch):
    # lmms-eval waits between its five tries
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    given = ["evaluate", "--model", str(model_folder), "--tasks", "pope", "--output", str(tmp_path)]
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert "pope: the data set lmms-lab" in error and "--data pope=FOLDER" in error


def test_without_lmms_eval_the_error_says_how_to_install_it(tmp_path):
    """In a process that cannot find the package."""
    program = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'lmms_eval' else find(name, *more)\n"
        "from aligngpt_trainers.commands import cli\n"
        "sys.exit(cli.main(['evaluate', '--model', 'x', '--tasks', 'pope']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: lmms-eval is missing, by which benchmarks are run: "
        'pip install ".[eval]" && pip install --no-deps lmms-eval==0.7.3, in a checkout'
    ]


def test_list_names_all_with_the_papers_figures(capsys):
    assert cli.main(["evaluate", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(benchmark.task in printed for benchmark in BENCHMARKS) and "1527.4" in printed
