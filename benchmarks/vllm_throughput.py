"""
vLLM: an AlignGPT beside vLLM's own LLaVA with the same parts, 64 requests at once; see vllm.md.

    python benchmarks/vllm_throughput.py make --output runs/throughput
    .venv-engines/bin/python benchmarks/vllm_throughput.py measure --folder runs/throughput

The second command needs vLLM's environment (`make engines-smoke` makes it). vLLM's LLaVA imports torchvision; where
that is a build for CUDA beside a torch for CPUs, `--torchvision DIR` names a folder with it (`pip install --no-deps
--target DIR torchvision`), and the operators that it misses are declared here; none of them is called.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

# both in this process, so that its CPU time is all there is; nothing is to be asked of the Hub
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
TOWER |= {"image_size": 224, "patch_size": 14}
# two-sided 95 % of Student's t by degrees of freedom
STUDENT = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 11: 2.20, 14: 2.14, 19: 2.09}


def make(output: Path) -> None:
    """An AlignGPT with random weights, 256 tokens an image, and the LLaVA of the same parts."""
    from engines.make_models import save_sentencepiece_model

    from aligngpt_trainers.commands.cli import main as aligngpt

    text = {**SIZES, "num_key_value_heads": 8, "max_position_embeddings": 2048}
    save_sentencepiece_model(output / "aligngpt", vision=TOWER, text=text)
    words = ["export", "--model", str(output / "aligngpt"), "--output", str(output / "llava")]
    if status := aligngpt(words):
        raise SystemExit(status)


DECLARE = """\
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def with_torchvision(folder: Path) -> None:
    """Starts this program again, so that it and the processes that vLLM starts find torchvision and its operators."""
    place = Path(tempfile.mkdtemp(prefix="aligngpt-torchvision-"))
    (place / "sitecustomize.py").write_text(DECLARE)
    os.environ["PYTHONPATH"] = f"{place}{os.pathsep}{folder.resolve()}"
    os.execv(sys.executable, [sys.executable, *sys.argv])


def prompts_of(processor, images: list, questions: list[str]) -> list[dict]:
    made = []
    for image, question in zip(images, questions, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        made.append({"prompt_token_ids": ids, "multi_modal_data": {"image": image}})
    return made


def noise(count: int, seed: int) -> list:
    """Images that no cache has seen."""
    import numpy
    from PIL import Image

    generator = numpy.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (224, 224, 3), dtype=numpy.uint8)) for _ in range(count)]


def seconds_of(work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def interval(values: list[float]) -> str:
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def measure(folder: Path, requests: int, tokens: int, rounds: int, cached: bool) -> dict:
    """CPU seconds of both engines, in turns, and of transformers, one request after the other."""
    import torch
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    cache = {"enable_prefix_caching": cached} | ({} if cached else {"mm_processor_cache_gb": 0})
    engines = {
        name: LLM(
            model=str(folder / name),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=requests,
            limit_mm_per_prompt={"image": 1},
            **cache,
        )
        for name in ("aligngpt", "llava")
    }
    ours = AlignGPTProcessor.from_pretrained(folder / "aligngpt")
    processors = {"aligngpt": ours, "llava": AutoProcessor.from_pretrained(folder / "llava")}
    model = AlignGPTForConditionalGeneration.from_pretrained(folder / "aligngpt").eval()
    found: dict[str, list[float]] = {"aligngpt": [], "llava": [], "one after the other": []}
    for number in range(rounds + 1):
        images = noise(1, number) * requests if cached else noise(requests, number)
        questions = [f"What is number {index} in the picture?" for index in range(requests)]
        # whoever comes first warms caches of the processor: in turns
        for name in sorted(engines, reverse=bool(number % 2)):
            prompts = prompts_of(processors[name], images, questions)
            spent = seconds_of(
                lambda name=name, prompts=prompts: engines[name].generate(prompts, sampling, use_tqdm=False)
            )
            if number:
                found[name].append(spent)
        if number == 1 and not cached:
            prompts = prompts_of(ours, images, questions)
            found["one after the other"].append(seconds_of(partial(answer, model, ours, images, prompts, tokens)))
    ratios = [llava / own for own, llava in zip(found["aligngpt"], found["llava"], strict=True)]
    result = {"requests": requests, "tokens": tokens, "rounds": rounds, "cached": cached, "seconds": found}
    result["throughput, of LLaVA's"] = interval(ratios)
    if not cached:
        alone = statistics.mean(found["one after the other"])
        result["one after the other, times as long"] = round(alone / statistics.mean(found["aligngpt"]), 2)
    result["threads"] = torch.get_num_threads()
    return result


def answer(model, processor, images: list, prompts: list[dict], tokens: int) -> None:
    """As `aligngpt serve` does, without its server."""
    import torch

    for image, prompt in zip(images, prompts, strict=True):
        text = processor.tokenizer.decode(prompt["prompt_token_ids"])
        inputs = processor(text=text, images=[image], add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "measure"))
    parser.add_argument("--output", "--folder", type=Path, default=Path("runs/throughput"), dest="folder")
    parser.add_argument("--torchvision", type=Path, help="folder with torchvision, where its operators are missing")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--cached", action="store_true", help="one image, many questions, with the caches on")
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder)
        return
    if args.torchvision and "aligngpt-torchvision-" not in os.environ.get("PYTHONPATH", ""):
        with_torchvision(args.torchvision)
    print(json.dumps(measure(args.folder, args.requests, args.tokens, args.rounds, args.cached), indent=2))


if __name__ == "__main__":
    main()
