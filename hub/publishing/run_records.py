"""What a model folder records about itself, read for its card: config, training summaries, results."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aligngpt_shared.records import ALIGNMENT, EVALUATION, SUMMARY, known
from aligngpt_shared.references import is_hub_id


# keys of `sources` by the role of what they name
_MODELS = {"language_model": "language model", "vision_tower": "vision tower", "model": "starting model"}


@dataclass
class Source:
    """Something the model is made of: a model or a data set.

    Attributes:
        role: "language model", "vision tower", "starting model", "stage 1 data", "stage 2 data".
        name: Hub id, or the name of a local folder.
        revision: where it is known.
    """

    role: str
    name: str
    revision: str | None = None

    @property
    def is_hub_id(self) -> bool:
        return is_hub_id(self.name)

    @property
    def is_dataset(self) -> bool:
        return self.role.endswith("data")


@dataclass
class Records:
    """What is known about a model folder; what is not recorded is empty.

    Attributes:
        config: config.json (of an adapter: what it knows of the base).
        adapter: adapter_config.json, for a LoRA adapter.
        processor: processor_config.json.
        stages: training summaries, stage 1 first.
        alignment: how the levels were cut.
        evaluation: evaluation_results.json.
        sources: what it was made of.
        parameters: counted from the weights, where these are safetensors.
    """

    config: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    alignment: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    parameters: int | None = None

    @property
    def own(self) -> bool:
        """Whether a run left records, beyond the config that every model has."""
        return bool(self.stages or self.evaluation or self.alignment)


def hub_link(name: str | None, revision: str | None = None, dataset: bool = False) -> str:
    """A Hub id as a link to its page, another name as it is."""
    if not name:
        return "not recorded"
    if not is_hub_id(name):
        return f"`{name}` (a local folder)"
    text = f"[{name}](https://huggingface.co/{'datasets/' if dataset else ''}{name})"
    return text + (f" at `{revision[:12]}`" if revision else "")


def read_records(files: Mapping[str, Path]) -> Records:
    """
    The records among a folder's files.

    Args:
        files: path in the repository -> path here.

    Raises:
        ValueError: a record is no JSON object.
    """
    records = Records(
        config=_read(files, "config.json"),
        adapter=_read(files, "adapter_config.json"),
        processor=_read(files, "processor_config.json"),
        evaluation=_read(files, EVALUATION),
    )
    summary = _read(files, SUMMARY)
    earlier = summary.get("pretrain") or {}
    records.stages = [stage for stage in (earlier, summary) if stage.get("stage")]
    records.alignment = _read(files, ALIGNMENT) or summary.get("alignment") or earlier.get("alignment") or {}
    records.sources = _sources(records.stages)
    records.parameters = _count_parameters(files)
    return records


def _read(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name].read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} is no valid JSON ({error}): was it written to the end?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, not a {type(value).__name__}.")
    return known(value, name)


def _sources(stages: list[dict[str, Any]]) -> list[Source]:
    """Models and data sets of all stages; a stage-2 run's starting model is left out where stage 1 is known."""
    found: dict[tuple[str, str], Source] = {}
    for stage in stages:
        sources = stage.get("sources") or {}
        number = {"pretrain": 1, "instruct": 2}.get(stage["stage"], stage["stage"])
        for key, role in _MODELS.items():
            name = sources.get(key)
            known = key == "model" and len(stages) > 1 and stage["stage"] == "instruct" and not is_hub_id(name)
            if name and not known:
                revision = sources.get(f"{key}_revision")
                found.setdefault((role, name), Source(role, name, revision))
        names = sources.get("dataset")
        for name in names if isinstance(names, list) else [names]:
            if name:
                revision = sources.get("dataset_revision")
                role = f"stage {number} data"
                found.setdefault((role, str(name)), Source(role, str(name), revision))
    return list(found.values())


def _count_parameters(files: Mapping[str, Path]) -> int | None:
    """Numbers in the safetensors files at the top, read from their headers."""
    count = 0
    for name, path in files.items():
        if "/" in name or path.suffix != ".safetensors":
            continue
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for key, entry in header.items():
            if key != "__metadata__":
                size = 1
                for length in entry["shape"]:
                    size *= length
                count += size
    return count or None
