"""Reads a save back before it counts as done: with the loader itself, on the meta device."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from aligngpt_shared.records import GATE_BEFORE
from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.base_aligngpt import complete_generation_config


class SavedModelError(ValueError):
    """What was written is not a model that loads."""


def check_savable(model: AlignGPTForConditionalGeneration, processor: AlignGPTProcessor) -> None:
    """
    Writes all but the weights once and throws it away, so that no run ends in what cannot be saved. A generation config
    that transformers would refuse is mended where that changes no answer, and said.

    Raises:
        SavedModelError: with the reason.
    """
    model.generation_config = complete_generation_config(model.generation_config)
    with TemporaryDirectory() as folder:
        try:
            # one that is as it was loaded would be saved with a warning, but training changes some
            model.generation_config.validate(strict=True)
            for part in (model.config, model.generation_config, processor):
                part.save_pretrained(folder)
        except Exception as error:  # of three libraries
            reason = " ".join(str(error).split())[:500]
            raise SavedModelError(f"This model could not be saved after training: {reason}") from error


def check_saved(folder: Path) -> None:
    """
    Opens every file of weights, loads the model that a folder's `config.json` describes onto the meta device, and looks
    for the code that `auto_map` names. An adapter's weights are only opened. Under ZeRO-3 another process looks: in
    this one the loader splits what it loads, and whatever makes a model waits for all others.

    Raises:
        SavedModelError: naming file and weights.
    """
    if is_deepspeed_zero3_enabled():
        _check_elsewhere(folder)
        return
    config = AlignGPTConfig.from_pretrained(folder)
    _check_code(folder, config.auto_map)
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != GATE_BEFORE)
    if not files:
        raise SavedModelError(f"{folder.name} holds no weights.")
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as error:
            raise SavedModelError(f"{path.name} cannot be read ({error}).") from error
    if (folder / "adapter_config.json").is_file():
        return
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        _, report = AlignGPTForConditionalGeneration.from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(verbosity)
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    for what, names in (
        ("lacks", report["missing_keys"]),
        ("holds besides", report["unexpected_keys"]),
        ("has in another shape", mismatched),
    ):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise SavedModelError(f"{folder.name} {what} {len(names)} weights ({some}): another model would load.")


def _check_elsewhere(folder: Path) -> None:
    program = (
        f"import sys; from pathlib import Path; from {__name__} import check_saved; check_saved(Path(sys.argv[1]))"
    )
    alone = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=alone, check=False)
    if done.returncode:
        raise SavedModelError(done.stderr.strip().splitlines()[-1].rpartition("SavedModelError: ")[2])


def _check_code(folder: Path, auto_map: dict[str, str] | None) -> None:
    for name in (auto_map or {}).values():
        file, _, cls = name.rpartition(".")
        path = folder / f"{file}.py"
        if not path.is_file() or f"class {cls}" not in path.read_text(encoding="utf-8"):
            raise SavedModelError(f"config.json names {name}, and {path.name} does not hold it.")
