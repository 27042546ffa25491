"""
An export for llama.cpp against transformers: prompt ids and greedy ids of llama-cpp-python, whose library is llama.cpp.

    python tests/engines/llama_cpp_check.py --llama-python ENV/bin/python --llama-cpp SOURCES

`--llama-python` has llama-cpp-python; SOURCES holds llama.cpp's `convert_hf_to_gguf.py`. The tower is a SigLIP:
with CLIP's, llama.cpp orders tokens otherwise (see docs/serving.md). Not run in CI: building llama.cpp takes minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration


sys.path.insert(0, str(Path(__file__).parents[1]))

from engines.make_models import TOKENIZER
from modeling.tiny import randomize

from aligngpt_hub.engines.llava_check import load_processor
from aligngpt_trainers.commands import cli
from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTConfig, AlignGPTForConditionalGeneration
from modeling_aligngpt.new_processor import processor_from_parts


QUESTIONS = ("what is it?", "describe", "how many things are there?", "why", "where is the dog?", "is it night?")
TOKENS = 12
# run by llama-cpp-python: (folder, plan) -> for each row the ids in its cache, and how many are the prompt's
WORKER = """
import base64, json, sys
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Llava15ChatHandler

folder, plan = sys.argv[1], json.load(open(sys.argv[2]))

class Handler(Llava15ChatHandler):
    DEFAULT_SYSTEM_MESSAGE = None
    # BOS is written by llama.cpp itself
    CHAT_FORMAT = "{% set bos_token = '' %}" + plan["template"]

handler = Handler(clip_model_path=folder + "/mmproj.gguf", verbose=False)
llama = Llama(folder + "/model.gguf", chat_handler=handler, n_ctx=512, verbose=False, type_k=0, type_v=0)
found = []
for row in plan["rows"]:
    url = "data:image/png;base64," + base64.b64encode(open(row["image"], "rb").read()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["question"]}]
    done = llama.create_chat_completion(
        [{"role": "user", "content": content}], temperature=0, top_k=1, repeat_penalty=1.0, max_tokens=plan["tokens"]
    )
    ids = llama.input_ids[: llama.n_tokens].tolist()
    found.append({"ids": ids, "prompt": done["usage"]["prompt_tokens"]})
print(json.dumps(found))
"""


def save_siglip_model(folder: Path) -> None:
    """A tiny Vicuna with a SigLIP tower and random weights, and the sentencepiece file of its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["<image>", "<align>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.unk_token
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"model_type": "llama", **sizes, "num_key_value_heads": 2, "vocab_size": len(tokenizer), **ids}
    config = AlignGPTConfig(
        vision_config={"model_type": "siglip_vision_model", **sizes, "image_size": 32, "patch_size": 8},
        text_config={**text, "max_position_embeddings": 1024},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        align_token_id=tokenizer.convert_tokens_to_ids("<align>"),
        gate_context="first_turn",
    )
    torch.manual_seed(0)
    randomize(AlignGPTForConditionalGeneration(config)).save_pretrained(folder)
    template = CHAT_TEMPLATES["vicuna_v1"]
    processor_from_parts(tokenizer, config, chat_template=template, do_pad=True).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((TOKENIZER / "tokenizer.model").read_bytes())


def expected(folder: Path) -> list[dict]:
    """Prompt and greedy ids of transformers, and images of the tower's size, so that nobody resizes them."""
    processor, model = load_processor(folder), LlavaForConditionalGeneration.from_pretrained(folder).eval()
    rows = []
    for number, question in enumerate(QUESTIONS):
        image = Image.linear_gradient("L").resize((32, 32)).convert("RGB").rotate(40 * number)
        image.save(folder / f"{number}.png")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=text, images=[image], add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        prompt = inputs["input_ids"][0].tolist()
        new = output[0, len(prompt) :].tolist()
        path = str(folder / f"{number}.png")
        rows.append({"image": path, "question": question, "prompt": prompt, "new": new})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--llama-cpp", required=True, type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model, folder = Path(place) / "model", Path(place) / "out"
        save_siglip_model(model)
        assert cli.main(["export", "--model", str(model), "--output", str(folder), "--format", "gguf"]) == 0
        converter = [sys.executable, args.llama_cpp / "convert_hf_to_gguf.py", folder, "--outtype", "f32"]
        subprocess.run([*converter, "--outfile", folder / "model.gguf"], check=True, capture_output=True)
        rows = expected(folder)
        image = json.loads((folder / "config.json").read_text())["image_token_index"]
        plan = {"template": (folder / "llama_cpp.jinja").read_text(encoding="utf-8"), "rows": rows, "tokens": TOKENS}
        (folder / "plan.json").write_text(json.dumps(plan))
        command = [args.llama_python, "-c", WORKER, str(folder), str(folder / "plan.json")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            return 1
    same = 0
    for row, found in zip(rows, json.loads(done.stdout.strip().splitlines()[-1]), strict=True):
        # an image's places hold nothing that could be compared
        places = [number for number, token in enumerate(row["prompt"]) if token != image]
        ids = found["ids"]
        prompt = found["prompt"] == len(row["prompt"]) and all(ids[at] == row["prompt"][at] for at in places)
        # the last token is not in the cache any more
        new, wanted = ids[found["prompt"] :][: TOKENS - 1], row["new"][: TOKENS - 1]
        same += prompt and new == wanted
    print(f"{same} of {len(rows)} prompts have transformers' ids, in the question and in the greedy answer")
    return 0 if same == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
