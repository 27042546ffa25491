"""
Two trained models of the small world that come with the package: something answers before anything is trained.

What training changed is kept in `parts/trained` (float16); the rest is the tiny parts themselves. `trained_model` puts
both together once, in the cache of the Hub's libraries.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from aligngpt_shared.files import new_folder, write_json

from .captions import DESCRIBE
from .world import make_conversations, make_pairs, parts_path, write_world


TRAINED = Path(__file__).parent / "parts" / "trained"
MODELS = {
    "gate": "stage 2 the paper's way: the gate mixes the levels",
    "steering": "stage 2 on each row's own level, beyond the paper: descriptions follow the level that is asked for",
}
FIELDS = ("align_mode", "default_align_level", "gate_context", "training_stage")
_FROZEN = "model.vision_tower."


def trained_model(name: str = "gate") -> Path:
    """
    Folder of a trained model; made at the first call.

    Args:
        name: of `MODELS`.

    Raises:
        ValueError: there is no such model.
        OSError: the cache cannot be written.
    """
    import torch
    from huggingface_hub.constants import HF_HOME
    from safetensors.torch import load_file

    from modeling_aligngpt.assembly import assemble
    from modeling_aligngpt.configuration_aligngpt import VERSION

    if name not in MODELS:
        raise ValueError(f"trained model is {name!r}; it must be one of {', '.join(MODELS)}")
    weights, fields = TRAINED / f"{name}.safetensors", json.loads((TRAINED / f"{name}.json").read_text("utf-8"))
    # another release, or other weights, make another folder
    digest = hashlib.sha256(weights.read_bytes() + VERSION.encode()).hexdigest()[:12]
    folder = Path(HF_HOME) / "aligngpt" / f"playground-{name}-{digest}"
    if folder.is_dir():
        return folder
    model, processor = assemble(parts_path("llama"), parts_path("clip"), do_pad=True)
    changed = {key: value.to(torch.float32) for key, value in load_file(weights).items()}
    missing = model.load_state_dict(changed, strict=False).missing_keys
    if wrong := [key for key in missing if not key.startswith(_FROZEN) and key not in model.all_tied_weights_keys]:
        raise ValueError(f"{weights} lacks {', '.join(wrong)}")
    for field in FIELDS:
        setattr(model.config, field, fields[field])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder, replace=True) as beside:
        model.save_pretrained(beside)
        processor.save_pretrained(beside)
    return folder


def gate_model() -> str:
    """What `--model playground` means on the command line."""
    return str(trained_model("gate"))


def steering_model() -> str:
    """What `--model playground-steering` means on the command line."""
    return str(trained_model("steering"))


# ---- how they were made ----


def train_models(output: str | os.PathLike, pairs: int = 3600, rows: int = 3000, seed: int = 0) -> dict[str, Any]:
    """
    Trains both models by the quickstart's recipes and writes what changed; `aligngpt_playground train-models`.

    Args:
        output: folder for `gate.safetensors`, `steering.safetensors` and what belongs to them; replaced.
        pairs: of stage 1.
        rows: of each stage 2; of the steering one half are descriptions that fit their image to different degrees, each
            with its own level, and half right answers, at the top level.
        seed: of data, initialisation and order.

    Returns:
        Held-out figures of both.
    """
    from aligngpt_trainers.commands.cli import main

    recipes = Path(__file__).parent / "recipes"
    output = Path(output).absolute()
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as scratch, new_folder(output, replace=True) as beside:
        os.chdir(scratch)
        try:
            for part in ("clip", "llama"):
                Path("parts").mkdir(exist_ok=True)
                os.symlink(parts_path(part), Path("parts", part))
            write_world("data", pairs, rows, 1, 1, seed)
            for command in ("score", "pretrain", "instruct"):
                _run(main, command, "--config", str(recipes / f"{command}.yaml"))
            _write_steering_rows(rows, seed)
            _run(main, "score", "--dataset", "data/descriptions", "--scorer", "parts/clip", "--device", "cpu",
                 "--binning", "edges", "--edges", "scored", "--output", "scored-descriptions")  # fmt: skip
            _mix("scored-descriptions", "data/right", "mixed")
            _run(main, "instruct", "--config", str(recipes / "instruct.yaml"), "--dataset", "mixed", "--align_mode",
                 "level", "--output_dir", "steering")  # fmt: skip
            figures = {}
            for name, folder in (("gate", "instruct"), ("steering", "steering")):
                figures[name] = _measure(folder)
                _keep(Path(folder), beside, name)
        finally:
            os.chdir(before)
        write_json(beside / "figures.json", figures)
    return figures


def _run(main, *words: str) -> None:
    if status := main(words):
        raise ValueError(f"`aligngpt {words[0]}` ended with status {status}; its message stands above")


def _write_steering_rows(rows: int, seed: int) -> None:
    from datasets import Dataset

    # other images than those of the world's pairs and conversations
    Dataset.from_list(make_pairs(rows // 2, seed + 1)).save_to_disk("data/descriptions")
    Dataset.from_list(make_conversations(rows - rows // 2, seed + 1)).save_to_disk("data/right")


def _mix(descriptions: str, right: str, output: str) -> None:
    """Descriptions as answers with their own levels, and right answers at the top level, as one data set."""
    from datasets import Dataset, load_from_disk

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        text = row["messages"][-1]["content"][0]["text"]
        question = [{"type": "image", "text": None}, {"type": "text", "text": DESCRIBE}]
        answer = [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"images": row["images"], "messages": messages, "align_level": row["align_level"]}

    scored, others = load_from_disk(descriptions), load_from_disk(right)
    mixed = [ask(row) for row in scored]
    mixed += [{"images": row["images"], "messages": row["messages"], "align_level": 7} for row in others]
    Dataset.from_list(mixed).save_to_disk(output)


def _keep(folder: Path, output: Path, name: str) -> None:
    """Writes what differs from the tiny parts, and the config's fields that say what the model does."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    changed = {key: value.to(torch.float16) for key, value in weights.items() if not key.startswith(_FROZEN)}
    save_file(changed, output / f"{name}.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(output / f"{name}.json", {field: config.get(field) for field in FIELDS})


def _measure(folder: str, number: int = 256) -> dict[str, Any]:
    """Held-out questions right, and descriptions at the lowest and the top level."""
    from .evaluate import SavedModel, question_table, questions_of
    from .measures import describe_captions
    from .scenes import Scene

    saved = SavedModel(folder)
    rows = make_conversations(number, split="heldout")
    asked = [(row["images"][0], question) for row in rows for question in questions_of(row)]
    questions = [question for _, question in asked]
    answers, _ = saved.answer([image for image, _ in asked], [question.question for question in questions])
    images, scenes = [row["images"][0] for row in rows], [Scene.from_json(row["scene"]) for row in rows]
    described = {
        str(level): describe_captions(saved.answer(images, [DESCRIBE] * number, level)[0], scenes) for level in (0, 7)
    }
    return {"questions": question_table(answers, questions, questions)[1].accuracy, "descriptions": described}
