"""
AlignGPT in vLLM beside transformers: run in an environment of vLLM and this project's core (`make engines`).

Prompts in one batch: one or two images, later turns, levels by request and the gate, the same images under different
questions on a warm prefix cache, text alone. Counted: prompt ids and greedy ids that are equal, and the largest
difference of the first token's five best log-probabilities. What must be refused is asked for, and the engine goes on.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


# a CPU's engine takes its cache from here; nothing is to be asked of the Hub
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

MAX_IMAGES, TOKENS = 3, 16


def make_requests(processor, number: int, num_levels: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts about held-out scenes, in an order that mixes their kinds."""
    from aligngpt_playground.world import make_conversations

    rows = make_conversations((number + 3) // 2, seed=11, split="heldout")
    requests = []
    for index, row in enumerate(rows):
        images = [row["images"][0], rows[(index + 1) % len(rows)]["images"][0]]
        questions = [
            "".join(part["text"] or "" for part in message["content"])
            for message in row["messages"]
            if message["role"] == "user"
        ]
        # two questions about the same images, one behind the other
        for turn, question in enumerate(questions[:2]):
            count = (1, 1, 2, 1)[index % 4]
            messages = [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": question}]}]
            if index % 5 == 4:
                messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and what else?"}]
            if index % 9 == 8:
                count, messages = 0, [{"role": "user", "content": question}]
            level = (None, None, 0, num_levels - 1)[(index + turn) % 4] if count else None
            text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            requests.append({"text": text, "images": images[:count], "level": level})
    requests = requests[:number]
    random.Random(seed).shuffle(requests)
    return requests


def prompt_of(processor, request: dict[str, Any]) -> dict[str, Any]:
    """A request as vLLM's own chat interface makes it: the template's text, tokenised as it is."""
    prompt: dict[str, Any] = {
        "prompt_token_ids": processor.tokenizer(request["text"], add_special_tokens=False)["input_ids"]
    }
    if request["images"]:
        prompt["multi_modal_data"] = {"image": request["images"]}
    if request["level"] is not None:
        prompt["mm_processor_kwargs"] = {"align_level": request["level"]}
    return prompt


def compare(model, processor, requests: list[dict[str, Any]], outputs: list) -> dict[str, Any]:
    """What vLLM gave beside what transformers gives."""
    import torch

    found = {"prompts": len(requests), "prompt_ids_equal": 0, "greedy_ids_equal": 0, "largest_difference": 0.0}
    differences = []
    for request, output in zip(requests, outputs, strict=True):
        inputs = processor(
            text=request["text"], images=request["images"] or None, add_special_tokens=False, return_tensors="pt"
        )
        level = {} if request["level"] is None else {"align_level": request["level"]}
        with torch.inference_mode():
            given = model.generate(
                **inputs,
                **level,
                max_new_tokens=TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
            )
        start = inputs["input_ids"].shape[1]
        found["prompt_ids_equal"] += inputs["input_ids"][0].tolist() == list(output.prompt_token_ids)
        found["greedy_ids_equal"] += given.sequences[0, start:].tolist() == list(output.outputs[0].token_ids)
        expected = given.scores[0][0].float().log_softmax(-1)
        first = output.outputs[0].logprobs[0]
        differences.append(max(abs(expected[token].item() - value.logprob) for token, value in first.items()))
    differences.sort()
    found["largest_difference"] = differences[-1]
    found["above_1e-4"] = sum(difference > 1e-4 for difference in differences)
    found["median_difference"] = differences[len(differences) // 2]
    return found


def check_chat(llm, processor, requests: list[dict[str, Any]], sampling) -> int:
    """vLLM's own chat interface gives the prompt ids of the processor; how many were compared."""
    compared = 0
    for request in requests:
        if len(request["images"]) != 1:
            continue
        content = [{"type": "image_pil", "image_pil": request["images"][0]}, {"type": "text", "text": "what is it?"}]
        level = {} if request["level"] is None else {"mm_processor_kwargs": {"align_level": request["level"]}}
        (output,) = llm.chat([{"role": "user", "content": content}], sampling, use_tqdm=False, **level)
        asked = [{"role": "user", "content": [{"type": "image"}, content[1]]}]
        text = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=request["images"], add_special_tokens=False)
        assert list(output.prompt_token_ids) == list(inputs["input_ids"][0]), output.prompt_token_ids
        compared += 1
        if compared == 8:
            return compared
    raise AssertionError(f"only {compared} prompts of one image to compare")


def check_refused(llm, processor, request: dict[str, Any], sampling, num_levels: int) -> list[str]:
    """What must be refused; the messages. The engine answers what follows."""
    from vllm.exceptions import VLLMValidationError

    good = prompt_of(processor, {**request, "level": 0})
    wrong = {
        "a level that is not there": {**good, "mm_processor_kwargs": {"align_level": num_levels}},
        "a level that is no number": {**good, "mm_processor_kwargs": {"align_level": "top"}},
        "another setting": {**good, "mm_processor_kwargs": {"do_resize": False}},
        "too many images": {**good, "multi_modal_data": {"image": request["images"] * (MAX_IMAGES + 1)}},
        "an image without a place": {**good, "multi_modal_data": {"image": request["images"] * 2}},
    }
    said = []
    for name, prompt in wrong.items():
        try:
            llm.generate([prompt], sampling, use_tqdm=False)
        except (ValueError, VLLMValidationError) as error:
            said.append(f"{name}: {error}")
        else:
            raise AssertionError(f"{name} was answered")
        assert llm.generate([good], sampling, use_tqdm=False)[0].outputs[0].token_ids
    return said


def check_model(folder: str, number: int, eager: bool, **settings: Any) -> dict[str, Any]:
    """One model in vLLM: all prompts at once, once more on the warm cache, and what is refused."""
    from vllm import LLM, SamplingParams

    from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

    processor = AlignGPTProcessor.from_pretrained(folder)
    model = AlignGPTForConditionalGeneration.from_pretrained(folder).eval()
    levels = model.config.num_align_levels
    requests = make_requests(processor, number, levels)
    llm = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=eager,
        max_model_len=min(model.config.text_config.max_position_embeddings, 2048),
        limit_mm_per_prompt={"image": MAX_IMAGES},
        **settings,
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=5)
    prompts = [prompt_of(processor, request) for request in requests]
    results: dict[str, Any] = {"model": Path(folder).name, "eager": eager, **settings}
    started = time.perf_counter()
    results["cold"] = compare(model, processor, requests, llm.generate(prompts, sampling, use_tqdm=False))
    results["warm"] = compare(model, processor, requests, llm.generate(prompts, sampling, use_tqdm=False))
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["chat"] = check_chat(llm, processor, requests, sampling)
    with_image = next(request for request in requests if len(request["images"]) == 1)
    results["refused"] = check_refused(llm, processor, with_image, sampling, levels)
    return results


def check_without_plugin(folder: str) -> str:
    """Without this project's plugin vLLM must refuse the folder with the reason; the message."""
    program = (
        "from vllm import LLM\n"
        "if __name__ == '__main__':\n"
        f"    LLM(model={folder!r}, trust_remote_code=True, dtype='float32', enforce_eager=True, max_model_len=128)\n"
    )
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False, timeout=600
    )
    reason = next((line for line in done.stderr.splitlines() if "its gate compares images" in line), None)
    assert done.returncode and reason, f"vLLM without the plugin did not refuse:\n{done.stderr[-3000:]}"
    return reason.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", required=True, help="folder of an AlignGPT; may be repeated")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--compiled", action="store_true", help="compiled, too")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="processes over which the language model is split"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    results: dict[str, Any] = {"runs": [], "without_plugin": check_without_plugin(args.model[0])}
    print(f"without the plugin: {results['without_plugin']}", flush=True)
    for folder in args.model:
        for eager in (True, False) if args.compiled else (True,):
            split = {} if args.tensor_parallel == 1 else {"tensor_parallel_size": args.tensor_parallel}
            run = check_model(folder, args.prompts, eager, **split)
            print(json.dumps(run, indent=2), flush=True)
            results["runs"].append(run)
            for state in ("cold", "warm"):
                for name in ("prompt_ids_equal", "greedy_ids_equal"):
                    assert run[state][name] == run[state]["prompts"], f"{folder}, {state}: {name} {run[state]}"
                assert run[state]["largest_difference"] < 1e-4, run[state]
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("vLLM answers as transformers does.")


if __name__ == "__main__":
    main()
