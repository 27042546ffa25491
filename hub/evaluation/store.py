"""Answers on disk as they come, with how they were given, so that a run that was stopped goes on."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def hash_weights(folder: str | os.PathLike) -> str:
    """SHA-256 over a local model's weights and configuration."""
    digest = hashlib.sha256()
    for path in sorted([*Path(folder).glob("*.safetensors"), Path(folder) / "config.json"]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class AnswerStore:
    """
    Answers in a JSON-lines file: a line that says how they were given, then one for each.

    Args:
        path: the file; processes after the first write beside it (`FILE.rank1`), and all read all.
        identity: how the answers are given.
        rank: of this process.

    Raises:
        ValueError: the file holds answers given in another way, or is no such file.
    """

    def __init__(self, path: str | os.PathLike, identity: dict[str, Any], rank: int = 0):
        base = Path(path)
        self.path = base if rank == 0 else base.with_name(f"{base.name}.rank{rank}")
        self.rows: dict[str, dict[str, Any]] = {}
        self.written: set[str] = set()
        for file in (base, *sorted(base.parent.glob(f"{base.name}.rank*"))):
            if file.is_file():
                self._read(file, identity, own=file == self.path)
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")

    def _read(self, file: Path, identity: dict[str, Any], own: bool):
        lines = file.read_text(encoding="utf-8").split("\n")
        if own and lines[-1]:
            # the last line of a run that was killed while it wrote
            file.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
        rows = [json.loads(line) for line in lines[:-1]]
        before = rows[0].get("identity") if rows else identity
        if before != identity:
            changed = sorted(name for name in identity if (before or {}).get(name) != identity[name])
            raise ValueError(
                f"{file.name} holds answers with another {', '.join(changed)}: "
                "give another output folder, or overwrite."
            )
        self.rows |= {row["key"]: row for row in rows[1:]}
        if own:
            self.written = {row["key"] for row in rows[1:]}

    def get(self, key: str) -> dict[str, Any] | None:
        """The kept row of a request."""
        return self.rows.get(key)

    def add(self, row: dict[str, Any]):
        """Keeps a row and writes it to disk at once."""
        self.rows[row["key"]] = row
        self.written.add(row["key"])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def merge(self):
        """Takes over what other processes have written, once they are done."""
        for file in sorted(self.path.parent.glob(f"{self.path.name}.rank*")):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
            for row in rows:
                if row["key"] not in self.written:
                    self.add(row)
            file.unlink()
