"""
What one transformers release makes of a saved AlignGPT: run as `python probe.py FOLDER REFERENCE OUTPUT` where nothing
of ours is installed. Writes `report.json` and `tensors.safetensors` to OUTPUT.
"""

import json
import logging
import sys
import traceback
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


sys.path.insert(0, str(Path(__file__).parents[1] / "modeling"))
import fresh_process


# 4.57's own name, asked for by name; and what the pipeline of 5.18 and 5.19 does by itself
OF_THE_LIBRARY = ("AutoModelForVision2Seq", "Passing `generation_config` together with")


class Deprecations(logging.Handler):
    """Collects what transformers or Python says of something that will go away."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found: set[str] = set()
        warnings.showwarning = lambda message, category, *_, **__: self.add(f"{category.__name__}: {message}")

    def emit(self, record: logging.LogRecord):
        self.add(record.getMessage())

    def add(self, text: str):
        if any(known in text for known in OF_THE_LIBRARY):
            return
        if "deprecat" in text.lower() or text.startswith("FutureWarning"):
            self.found.add(text.strip().splitlines()[0][:200])


def parity(model, reference: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of the authors' recorded prompts, and greedy ids."""
    tensors = {}
    for name in sorted({key.split(".")[0] for key in reference}):
        inputs = {key.split(".")[1]: value for key, value in reference.items() if key.startswith(f"{name}.")}
        with torch.no_grad():
            tensors[f"{name}.logits"] = model(**inputs).logits.contiguous()
        tensors[f"{name}.greedy"] = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tensors


def beams(model, processor) -> torch.Tensor:
    """Three beams over a batch with one image a row."""
    images = [fresh_process.draw_image(seed) for seed in range(2)]
    text = ["<image>\nWhat is it?", "<image>\nCompare the two ends of it at some length."]
    processor.tokenizer.padding_side = "left"
    inputs = processor(images=images, text=text, padding=True, return_tensors="pt")
    return model.generate(**inputs, num_beams=3, max_new_tokens=6, do_sample=False)


def main(folder: str, reference: str, output: Path):
    sys.meta_path.insert(0, fresh_process._NotInstalled())
    heard = Deprecations()
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    logging.getLogger("transformers").addHandler(heard)
    report: dict = {"transformers": transformers.__version__, "failed": {}}
    tensors: dict[str, torch.Tensor] = {}

    def attempt(name: str, work):
        try:
            return work()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            report["failed"][name] = f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name})"

    def load():
        names = [name for name in fresh_process.AUTO_CLASSES if hasattr(transformers, name)]
        for name in names:
            getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
        report["auto_classes"] = names

    def answer():
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        tensors.update({f"parity.{key}": value for key, value in parity(model, load_file(reference)).items()})
        tensors.update({f"answers.{key}": value for key, value in fresh_process.run_model(model, processor).items()})
        attempt("beams", lambda: tensors.update({"beams": beams(model, processor)}))

    def pipe():
        shown = fresh_process.run_pipeline(folder)
        report["pipeline"] = {name: fresh_process._texts(answers) for name, answers in shown.items()}

    for name, work in (("load", load), ("answer", answer), ("pipeline", pipe)):
        attempt(name, work)
    report["deprecations"] = sorted(heard.found)
    output.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, output / "tensors.safetensors")
    (output / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
