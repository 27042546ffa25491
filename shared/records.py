"""
The records that trainers and Hub side exchange as files: their names, and the version of what stands in them. A record
without a version is of before there was one, and is read as version 1.
"""

import json
from pathlib import Path
from typing import Any


SUMMARY = "training_summary.json"
ALIGNMENT = "alignment.json"
# the gate as stage 2 found it, beside the model that stage 2 made
GATE_BEFORE = "gate_before.safetensors"
EVALUATION = "evaluation_results.json"
SCHEMA_VERSION = 1


def versioned(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the version of its schema in front."""
    return {"schema_version": SCHEMA_VERSION, **record}


def read_record(path: Path) -> dict[str, Any]:
    """
    A record's content.

    Raises:
        ValueError: it is no JSON object, or of a later version than this code knows.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return known(record, str(path))


def known(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The record itself; a ValueError with its `name` when it is of a later version than this code knows."""
    version = record.get("schema_version", 1)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(
            f"{name} is of schema version {version!r}, this code knows up to {SCHEMA_VERSION}: update aligngpt."
        )
    return record
