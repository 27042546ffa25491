"""
What someone with `transformers` alone does with a saved AlignGPT: run as `python fresh_process.py FOLDER OUTPUT`.

Loads FOLDER with every Auto class and the pipeline, and writes to OUTPUT `report.json`, `tensors.safetensors` and
`resaved/` (the model and processor, saved again).
"""

import importlib.abc
import json
import sys
from pathlib import Path

import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, pipeline


class _NotInstalled(importlib.abc.MetaPathFinder):
    """Makes this process one where AlignGPT was never installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "modeling_aligngpt" or fullname.startswith("aligngpt_"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForMultimodalLM")
SEARCH = {"max_new_tokens": 6, "do_sample": False}


def draw_image(seed: int) -> Image.Image:
    ramp = Image.linear_gradient("L").rotate(37 * seed).resize((40 + seed, 30))
    return Image.merge("RGB", [ramp, ramp.rotate(90), ramp.rotate(180)])


def user(text: str, *images: Image.Image) -> dict:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def prompts() -> dict[str, tuple[list[str], list[Image.Image] | None]]:
    """Texts and images by name; rows of a batch differ in length and number of images."""
    return {
        "one": (["<image>\nWhat is it?"], [draw_image(0)]),
        "two": (["<image><image>\nWhich is darker?"], [draw_image(0), draw_image(1)]),
        "text": (["Hello, who are you?"], None),
        "batch": (
            ["<image>\nWhat is it?", "<image>and <image>: compare them at some length.", "No image here."],
            [draw_image(2), draw_image(3), draw_image(4)],
        ),
    }


def run_model(model, processor) -> dict:
    """Inputs, logits at the last position, and greedy ids of every prompt."""
    tensors = {}
    processor.tokenizer.padding_side = "left"
    for name, (text, images) in prompts().items():
        inputs = processor(images=images, text=text, padding=True, return_tensors="pt")
        for key, value in inputs.items():
            tensors[f"{name}.{key}"] = value
        output = model.generate(**inputs, **SEARCH, output_logits=True, return_dict_in_generate=True)
        tensors[f"{name}.logits"] = output.logits[0].float()
        tensors[f"{name}.answer"] = output.sequences[:, inputs["input_ids"].shape[1] :]
        steered = model.generate(**inputs, **SEARCH, align_level=2, output_logits=True, return_dict_in_generate=True)
        tensors[f"{name}.steered"] = steered.logits[0].float()
    messages = [user("What is it?", draw_image(0))]
    chat = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tensors.update({f"chat.{key}": value for key, value in chat.items()})
    tensors["chat.logits"] = model(**chat).logits[:, -1].detach().float()
    return {name: value.contiguous() for name, value in tensors.items()}


def run_pipeline(folder: str) -> dict:
    """What the pipeline says to chats, a batch, plain prompts, text alone and several images."""
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    settings = {"max_new_tokens": 6, "do_sample": False}
    chat, two = [user("What is it?", draw_image(0))], [user("Which is darker?", draw_image(0), draw_image(1))]
    told = [user("What is it?", draw_image(0)), {"role": "assistant", "content": "A ramp."}, user("Of which colour?")]
    calls = {
        "chat": {"text": chat},
        "two images": {"text": two},
        "turns": {"text": told},
        "batch": {"text": [chat, two], "batch_size": 2},
        "plain": {"images": draw_image(0), "text": "<image>\nWhat is it?"},
        "text alone": {"text": [user("Hello, who are you?")]},
    }
    return {name: pipe(**call, return_full_text=False, generate_kwargs=settings) for name, call in calls.items()}


def _texts(answers) -> list[str]:
    """The generated texts of a pipeline's answer, whose nesting differs between versions."""
    if isinstance(answers, dict):
        return [answers["generated_text"]]
    return [text for answer in answers for text in _texts(answer)]


def main(folder: str, output: Path):
    output.mkdir(parents=True)
    sys.meta_path.insert(0, _NotInstalled())
    auto_classes = {name: getattr(transformers, name) for name in AUTO_CLASSES if hasattr(transformers, name)}
    loaded = {name: auto.from_pretrained(folder, trust_remote_code=True) for name, auto in auto_classes.items()}
    loaded["AutoConfig"] = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    loaded["AutoProcessor"] = processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for generated in auto_classes.keys() - {"AutoModel"}:
        state, reference = loaded[generated].model.state_dict(), loaded["AutoModel"].state_dict()
        assert all((state[name] == value).all() for name, value in reference.items()), generated

    model = loaded["AutoModelForImageTextToText"]
    save_file(run_model(model, processor), output / "tensors.safetensors")
    report = {
        "transformers": transformers.__version__,
        "classes": {name: [type(part).__module__, type(part).__name__] for name, part in loaded.items()},
        "image_processor": type(processor.image_processor).__name__,
        "ours": sorted(name for name in sys.modules if name.split(".")[0] in ("modeling_aligngpt", "aligngpt_hub")),
        "pipeline": {name: _texts(answers) for name, answers in run_pipeline(folder).items()},
        "dtype": str(model.dtype),
    }
    model.save_pretrained(output / "resaved")
    processor.save_pretrained(output / "resaved")
    (output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
