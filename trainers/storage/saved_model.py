"""A save is read back before it is called done: by the loader itself, without taking up memory."""

from pathlib import Path

from safetensors import safe_open
from transformers.utils import logging

from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration


class SavedModelError(ValueError):
    """What was written is not a model that loads."""


def check_saved(folder: Path) -> None:
    """
    Opens every file of weights, loads the model that a folder's `config.json` describes onto the meta device, and looks
    for the code that `auto_map` names. An adapter's weights are only opened.

    Raises:
        SavedModelError: naming file and weights.
    """
    config = AlignGPTConfig.from_pretrained(folder)
    _check_code(folder, config.auto_map)
    files = sorted(folder.glob("*.safetensors"))
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


def _check_code(folder: Path, auto_map: dict[str, str] | None) -> None:
    for name in (auto_map or {}).values():
        file, _, cls = name.rpartition(".")
        path = folder / f"{file}.py"
        if not path.is_file() or f"class {cls}" not in path.read_text(encoding="utf-8"):
            raise SavedModelError(f"config.json names {name}, and {path.name} does not hold it.")
