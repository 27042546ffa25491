"""
Benchmarks answered by vLLM and by transformers: the same answers and figures. For the environment that evaluates:

    python tests/engines/evaluate_check.py --model runs/engines/levels --vllm-python .venv-engines/bin/python
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import psutil


sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluation_world.rows import answer_alone, make_rows, write_data

from aligngpt_trainers.commands import cli
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


# a share of the memory is what vLLM takes on a CPU, too
OPTIONS = "--enforce-eager --gpu-memory-utilization 0.2"
TASKS = ("pope", "gqa", "scienceqa_img", "mme")


def answers(folder: Path) -> dict[tuple, str]:
    """Answer by task and sample."""
    found = {}
    for path in (folder / "evaluation").glob("answers-*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            row = json.loads(line)
            found[row["task"], str(row["doc_id"])] = row["answer"]
    return found


def is_server(process: psutil.Process, model: str) -> bool:
    """Whether it is vLLM's server of the model, which must have ended."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return any("vllm.entrypoints" in word for word in words) and model in words


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vllm-python", required=True)
    args = parser.parse_args()
    model = AlignGPTForConditionalGeneration.from_pretrained(args.model).eval()
    processor = AlignGPTProcessor.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(lambda question, images: answer_alone(model, processor, question, images))
        data = write_data(Path(folder) / "data", {task: rows[task] for task in TASKS})
        words = ["evaluate", "--model", args.model, "--tasks", ",".join(TASKS)]
        words += [word for task in TASKS for word in ("--data", f"{task}={data[task]}")]
        engine = ["--backend", "vllm", "--vllm-python", args.vllm_python, f"--vllm-options={OPTIONS}"]
        outputs = []
        for name, more in (("here", ["--dtype", "float32"]), ("vllm", [*engine, "--dtype", "float32"])):
            outputs.append(Path(folder) / name)
            if cli.main([*words, "--output", str(outputs[-1]), *more]):
                return 1
        here, there = map(answers, outputs)
        equal = sum(there[key] == answer for key, answer in here.items())
        left = [process.pid for process in psutil.process_iter() if is_server(process, args.model)]
        print(f"{equal} of {len(here)} answers by vLLM are those of transformers ({', '.join(TASKS)})")
        if left:
            print(f"vLLM still runs: {left}")
        return int(equal != len(here) or here.keys() != there.keys() or not here or bool(left))


if __name__ == "__main__":
    sys.exit(main())
