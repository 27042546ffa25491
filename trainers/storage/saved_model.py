"""A save is read back before it is called done: its names, shapes and code are those that its own config asks for."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration


class SavedModelError(ValueError):
    """What was written is not a model that loads."""


def check_saved(folder: Path) -> None:
    """
    Compares the headers of a folder's weights with the model that its `config.json` describes (built without memory),
    and looks for the code that `auto_map` names. An adapter's weights are only opened.

    Raises:
        SavedModelError: naming file and weights.
    """
    config = AlignGPTConfig.from_pretrained(folder)
    _check_code(folder, config.auto_map)
    found = weights_of(folder)
    if (folder / "adapter_config.json").is_file():
        if not found:
            raise SavedModelError(f"{folder.name} holds no weights.")
        return
    with torch.device("meta"):
        model = AlignGPTForConditionalGeneration(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    wanted = {name: list(value.shape) for name, value in model.state_dict().items() if name not in tied}
    for what, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("holds besides", found.keys() - wanted.keys()),
        ("has in another shape", [name for name in wanted.keys() & found.keys() if found[name] != wanted[name]]),
    ):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise SavedModelError(
                f"{folder.name} {what} {len(names)} weights ({some}): it would load as another model."
            )


def weights_of(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of all weights in a folder.

    Raises:
        SavedModelError: a file cannot be read.
    """
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise SavedModelError(f"{path.name} cannot be read ({error}).") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if named != found.keys():
            raise SavedModelError(f"{index.name} names other weights than the files hold.")
    return found


def _check_code(folder: Path, auto_map: dict[str, str] | None) -> None:
    for name in (auto_map or {}).values():
        file, _, cls = name.rpartition(".")
        path = folder / f"{file}.py"
        if not path.is_file() or f"class {cls}" not in path.read_text(encoding="utf-8"):
            raise SavedModelError(f"config.json names {name}, and {path.name} does not hold it.")
