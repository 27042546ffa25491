"""
Judgements of answers by any OpenAI-compatible server, with the benchmarks' own prompts (taken from lmms-eval). They are
stored, so that scores can be made again, and a run that was stopped asks only for what is missing.
"""

import concurrent.futures
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError
from tqdm import tqdm

from aligngpt_hub import metrics

from .scores import choices_of


@dataclass(frozen=True)
class Judged:
    """How a benchmark asks its judge: prompt of a sample (None: no judge is needed), settings, and what is readable."""

    prompt: Callable[[dict[str, Any]], str | None]
    readable: Callable[[str], bool]
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class JudgeServer:
    """
    An OpenAI-compatible server.

    Args:
        url: up to `/v1`.
        model: name of the judge there.
        api_key: sent as bearer token.
        workers: requests at once.
        retries: of a request that failed, with growing pauses.
    """

    url: str
    model: str
    api_key: str = ""
    workers: int = 4
    retries: int = 3

    @cached_property
    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=self.api_key or "none", max_retries=self.retries, timeout=300)

    def ask(self, prompt: str, temperature: float, max_tokens: int) -> str:
        """
        The judge's answer.

        Raises:
            ValueError: no answer after all retries, or the server refuses.
        """
        try:
            answered = self.client.chat.completions.create(
                messages=[{"role": "user", "content": prompt}],
                model=self.model,
                temperature=temperature,
                max_tokens=max_tokens,
            )
            return answered.choices[0].message.content or ""
        except (OpenAIError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"the judge {self.model} at {self.url} gave no answer ({error}).") from error


def judge_samples(samples: Sequence[dict[str, Any]], kind: str, server: JudgeServer, store: str | Path) -> list[str]:
    """
    One judgement for each sample, `""` where none is needed. What cannot be read is asked for again at a higher
    temperature, twice.

    Args:
        samples: with `doc` and `answer`.
        kind: a key of `JUDGED`.
        server: the judge.
        store: JSON-lines file of judgements.

    Raises:
        ValueError: the judge fails; what it gave before is kept.
    """
    judged, path = JUDGED[kind], Path(store)
    known = {row["key"]: row["judgement"] for row in _read_rows(path)}
    prompts = [judged.prompt(sample) for sample in samples]
    keys = [prompt and _key(server.model, prompt) for prompt in prompts]
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if prompt and key not in known}

    def ask(prompt: str) -> str:
        for extra in (0.0, 0.5, 1.0):
            judgement = server.ask(prompt, judged.temperature + extra, judged.max_tokens)
            if judged.readable(judgement):
                break
        return judgement

    path.parent.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(server.workers) as pool, path.open("a", encoding="utf-8") as file:
        asked = {pool.submit(ask, prompt): key for key, prompt in missing.items()}
        try:
            for future in tqdm(concurrent.futures.as_completed(asked), total=len(asked), desc="judgements"):
                key = asked[future]
                known[key] = future.result()
                row = {"key": key, "judge": server.model, "prompt": missing[key], "judgement": known[key]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
        except ValueError as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise ValueError(f"{error} {len(known)} judgements are kept in {path.name}: run again to go on.") from error
    return [known[key] if key else "" for key in keys]


def _key(model: str, prompt: str) -> str:
    return hashlib.sha256(json.dumps([model, prompt]).encode()).hexdigest()[:20]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file; one that was cut short is taken out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[-1]:
        path.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
    return [json.loads(line) for line in lines[:-1]]


# ---- the benchmarks' prompts ----


def _tasks_folder() -> Path:
    import lmms_eval

    return Path(lmms_eval.__file__).parent / "tasks"


def _mm_vet_prompt(sample: dict[str, Any]) -> str:
    doc = sample["doc"]
    truth = doc["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{_mm_vet_examples()}\n{doc['question']} | {truth} | {sample['answer']} |"


def _mm_vet_examples() -> str:
    """The few-shot prompt of MM-Vet; its module makes a client when it is imported, which is never used here."""
    os.environ.setdefault("OPENAI_API_KEY", "unused")
    if "mm_vet" not in _CACHE:
        spec = importlib.util.spec_from_file_location("aligngpt_mmvet_prompt", _tasks_folder() / "mmvet" / "utils.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _CACHE["mm_vet"] = module.MM_VET_PROMPT
    return _CACHE["mm_vet"]


def _llava_bench_prompt(sample: dict[str, Any]) -> str:
    if "llava_bench" not in _CACHE:
        path = _tasks_folder() / "llava-in-the-wild" / "rule.json"
        _CACHE["llava_bench"] = json.loads(path.read_text(encoding="utf-8"))
    doc = sample["doc"]
    rule = _CACHE["llava_bench"]["llava_bench_" + doc["category"]]
    caption = "\n".join(doc["caption"]) if isinstance(doc["caption"], list) else doc["caption"]
    sections = [f"[Context]\n{caption}", f"[Question]\n{doc['question']}"]
    for number, answer in ((1, doc["gpt_answer"]), (2, sample["answer"])):
        name = f"{rule['role']} {number}"
        sections += [f"[{name}]\n{answer}", f"[End of {name}]"]
    return "\n\n".join([*sections, f"[System]\n{rule['prompt']}", ""])


def _mmbench_prompt(sample: dict[str, Any]) -> str | None:
    choices = choices_of(sample["doc"])
    if metrics.read_choice(sample["answer"], choices) is not None:
        return None
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    asking = MMBench_Evaluator()
    return asking.build_prompt(sample["doc"]["question"], asking.build_option_str(choices.values()), sample["answer"])


_CACHE: dict[str, Any] = {}
JUDGED = {
    "llava_bench": Judged(_llava_bench_prompt, lambda text: metrics.parse_pair(text) is not None, 0.2, 1024),
    "mm_vet": Judged(_mm_vet_prompt, lambda text: metrics.parse_grade(text) is not None, 0.0, 128),
    "mmbench": Judged(_mmbench_prompt, lambda text: text.strip()[:1] in set("ABCDE"), 0.0, 256),
}
