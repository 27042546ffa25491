"""
The paper's benchmarks as tasks of lmms-eval: their prompts and generation settings are those of LLaVA-1.5
(arXiv 2310.03744, which the paper follows), greedy throughout.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_aligngpt.images_aligngpt import read_image

from . import scores


# what a Vicuna model generates at most in LLaVA-1.5's evaluation
SHORT = {"max_new_tokens": 128, "do_sample": False, "until": []}
LONG = {"max_new_tokens": 1024, "do_sample": False, "until": []}
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
LETTER_PROMPT_CN = "请直接回答选项字母。"
SERVER_NOTE = "the paper's figure is of the test split, which a server scores: see --tasks {}"


@dataclass(frozen=True)
class Benchmark:
    """
    One benchmark.

    Args:
        task: name in lmms-eval, and of the option `--tasks`.
        config: its file below lmms-eval's `tasks` folder.
        title: name in the paper.
        score: `(samples, judgements) -> [(metric, value), ...]`, the paper's metric first; or lmms-eval's metrics, each
            with our name and unit of it; None: a server scores.
        paper_7b, paper_13b: AlignGPT's figures in the paper (arXiv 2405.14129, tables 1 and 2); None where the paper
            has none, or reports another split.
        overrides: settings of the task that differ from lmms-eval's.
        judge: how a judge is asked (a key of `judge.JUDGED`); None: no judge.
        note: what to know when the figure is compared.
    """

    task: str
    config: str
    title: str
    score: Callable[..., list[tuple[str, float]]] | dict[str, tuple[str, float]] | None
    paper_7b: float | None = None
    paper_13b: float | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    judge: str | None = None
    note: str = ""


def mmbench_prompt(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Hint, question, one choice a line, and how to answer."""
    lines = [doc["hint"]] if scores.is_given(doc.get("hint")) else []
    lines.append(doc["question"])
    for letter, choice in scores.choices_of(doc).items():
        lines.append(f"{letter}. {choice}")
    return "\n".join([*lines, (lmms_eval_specific_kwargs or {}).get("post_prompt", LETTER_PROMPT)])


def _mmbench(post_prompt: str) -> dict[str, Any]:
    return {
        "doc_to_text": mmbench_prompt,
        "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": post_prompt}},
        "generation_kwargs": LONG,
    }


ACCURACY = {"exact_match": ("accuracy", 100)}
MME = {"mme_perception_score": ("perception", 1), "mme_cognition_score": ("cognition", 1)}
SEED = {"seed_image": ("image accuracy", 100), "seed_all": ("accuracy", 100)}
ASKED_SHORT, ASKED_LONG = {"generation_kwargs": SHORT}, {"generation_kwargs": LONG}
# LLaVA-1.5 shows the data set's OCR tokens
TEXTVQA = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase.", "ocr": True}
# the question alone: lmms-eval asks for reasoning first
MM_VET = {"pre_prompt": "", "post_prompt": ""}
# fmt: off
BENCHMARKS = (
    Benchmark("vqav2_val", "vqav2/vqav2_val.yaml", "VQAv2", ACCURACY, 79.1, 80.0,
              ASKED_SHORT, note=SERVER_NOTE.format("vqav2_test")),
    Benchmark("gqa", "gqa/gqa.yaml", "GQA", ACCURACY, 62.9, 63.6, ASKED_SHORT),
    Benchmark("vizwiz_vqa_val", "vizwiz_vqa/vizwiz_vqa_val.yaml", "VizWiz", ACCURACY, 54.2, 56.4,
              ASKED_SHORT, note=SERVER_NOTE.format("vizwiz_vqa_test")),
    Benchmark("scienceqa_img", "scienceqa/scienceqa_img.yaml", "SQA", ACCURACY, 68.5, 70.3, ASKED_LONG),
    Benchmark("textvqa_val", "textvqa/textvqa_val.yaml", "TextVQA", ACCURACY, 58.4, 60.2,
              {**ASKED_SHORT, "lmms_eval_specific_kwargs": {"default": TEXTVQA}}),
    Benchmark("pope", "pope/pope.yaml", "POPE", scores.pope, 86.0, 86.2, ASKED_SHORT),
    Benchmark("mme", "mme/mme.yaml", "MME", MME, 1527.4, 1572.0, ASKED_SHORT),
    Benchmark("mmbench_en_dev", "mmbench/mmbench_en_dev.yaml", "MMB", scores.mmbench, 67.3, 69.5,
              _mmbench(LETTER_PROMPT), judge="mmbench"),
    Benchmark("mmbench_cn_dev", "mmbench/mmbench_cn_dev.yaml", "MMB-CN", scores.mmbench, 59.9, 63.7,
              _mmbench(LETTER_PROMPT_CN), judge="mmbench"),
    Benchmark("seedbench", "seedbench/seedbench.yaml", "SEED", SEED, 66.5, 67.8, ASKED_SHORT),
    Benchmark("llava_in_the_wild", "llava-in-the-wild/llava-in-the-wild.yaml", "LLaVA-W", scores.llava_bench,
              68.4, 75.2, ASKED_LONG, judge="llava_bench", note="depends on the judge: LLaVA-1.5 used gpt-4-0314"),
    Benchmark("mmvet", "mmvet/mmvet.yaml", "MM-Vet", scores.mm_vet, 30.8, 35.6,
              {**ASKED_LONG, "lmms_eval_specific_kwargs": {"default": MM_VET}}, judge="mm_vet",
              note="depends on the judge: MM-Vet's own server uses gpt-4-0613"),
    Benchmark("vqav2_test", "vqav2/vqav2_test.yaml", "VQAv2 (test)", None,
              overrides=ASKED_SHORT, note="writes what the server scores"),
    Benchmark("vizwiz_vqa_test", "vizwiz_vqa/vizwiz_vqa_test.yaml", "VizWiz (test)", None,
              overrides=ASKED_SHORT, note="writes what the server scores"),
)
# fmt: on
BY_NAME = {benchmark.task: benchmark for benchmark in BENCHMARKS}
PAPER = tuple(benchmark.task for benchmark in BENCHMARKS if benchmark.paper_7b is not None)


def select(names: str) -> list[Benchmark]:
    """
    Benchmarks from `paper`, or names with commas between them.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    chosen: list[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name != "paper" and name not in BY_NAME:
            raise ValueError(
                f"--tasks: there is no benchmark {name!r} here; there are paper (the twelve of the paper), "
                f"{', '.join(BY_NAME)}. Other tasks of lmms-eval: lmms-eval --model aligngpt --tasks ..."
            )
        chosen += PAPER if name == "paper" else [name]
    if not chosen:
        raise ValueError("--tasks names no benchmark: give paper, or names with commas between them.")
    return [BY_NAME[name] for name in dict.fromkeys(chosen)]


# ---- as lmms-eval's task objects ----


def task_config(benchmark: Benchmark, data: str | os.PathLike | None = None) -> dict[str, Any]:
    """
    lmms-eval's configuration of a benchmark with our settings.

    Args:
        benchmark: which.
        data: a local folder in place of the Hub's data set: written by `save_to_disk` or one that `load_dataset`
            reads; a data set of several configurations has a folder for each inside.
    """
    import lmms_eval
    from lmms_eval.utils import load_yaml_config

    # modules of judged tasks make a client when they are imported; no request is made through it
    os.environ.setdefault("OPENAI_API_KEY", "unused")
    config = load_yaml_config(str(Path(lmms_eval.__file__).parent / "tasks" / benchmark.config))
    config = {**config, **benchmark.overrides, "dataset_kwargs": {}}
    # `until` must be there, or lmms-eval puts its own
    config["generation_kwargs"] = dict(config["generation_kwargs"])
    source = dataset_source(config["dataset_path"], config.get("dataset_name"), data)
    if benchmark.task == "gqa":
        images = dataset_source(config["dataset_path"], "testdev_balanced_images", data)
        config |= {"process_docs": None, "doc_to_visual": GQAImages(images, config["test_split"])}
    return {**config, **source}


def dataset_source(path: str, name: str | None, data: str | os.PathLike | None) -> dict[str, Any]:
    """`dataset_path`, `dataset_name` and `dataset_kwargs` of a data set on the Hub or in a local folder."""
    if data is None:
        return {"dataset_path": path, "dataset_name": name, "dataset_kwargs": {}}
    folder = Path(data)
    if name and (folder / name).is_dir():
        folder, name = folder / name, None
    if not folder.is_dir():
        raise ValueError(f"--data: {data} is no folder.")
    saved = (folder / "dataset_dict.json").is_file()
    return {
        "dataset_path": str(folder),
        "dataset_name": None if saved else name,
        "dataset_kwargs": {"load_from_disk": True} if saved else {},
    }


class GQAImages:
    """The image of a GQA question, found by its id: lmms-eval's own way copies the images for every question."""

    def __init__(self, source: dict[str, Any], split: str):
        self.source, self.split = source, split
        self.images = None

    def __call__(self, doc: dict[str, Any]) -> list:
        if self.images is None:
            import datasets

            if self.source["dataset_kwargs"]:
                self.images = datasets.load_from_disk(self.source["dataset_path"])[self.split]
            else:
                self.images = datasets.load_dataset(
                    self.source["dataset_path"], self.source["dataset_name"], split=self.split
                )
            self.rows = {name: row for row, name in enumerate(self.images["id"][:])}
        return [read_image(self.images[self.rows[doc["imageId"]]]["image"])]


def make_task(benchmark: Benchmark, data: str | os.PathLike | None = None):
    """
    lmms-eval's task object, its data loaded.

    Raises:
        ValueError: the data set cannot be loaded.
    """
    from lmms_eval.api.task import ConfigurableMessagesTask
    from tenacity import RetryError

    config = task_config(benchmark, data)
    try:
        task = ConfigurableMessagesTask(config=config, model_name="aligngpt")
    except (OSError, ValueError, KeyError, RetryError) as error:
        if isinstance(error, RetryError):
            error = error.last_attempt.exception()
        raise ValueError(
            f"{benchmark.task}: the data set {config['dataset_path']} cannot be loaded ({type(error).__name__}: "
            f"{error}). Check the network, or give a local copy: --data {benchmark.task}=FOLDER"
        ) from error
    task.EVAL_HARNESS_NAME = benchmark.task
    return task
