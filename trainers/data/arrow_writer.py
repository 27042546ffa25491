"""Arrow tables that are written piece by piece: in memory while small, else in a file of the cache."""

import hashlib
import os
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable, MemoryMappedTable, Table


IN_MEMORY = 64 << 20  # bytes of a table that may stay in memory


class TableWriter:
    """
    Collects record batches; beyond `limit` bytes they go to a file in the cache of `datasets`, which is then
    memory-mapped. The file is named after its content and appears only when it is whole.

    Args:
        schema: of the batches.
        limit: bytes that may stay in memory.
    """

    def __init__(self, schema: pa.Schema, limit: int = IN_MEMORY):
        self.schema, self.limit = schema, limit
        self._batches: list[pa.RecordBatch] = []
        self._held = 0
        self._hash = hashlib.sha256()
        self._path: Path | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *_) -> None:
        """Removes what an error left unfinished."""
        if self._writer is not None:
            self._writer.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    @property
    def digest(self) -> str:
        """SHA-256 of what was written: the same rows have the same in every run."""
        return self._hash.hexdigest()

    def write(self, columns: dict[str, list | pa.Array]) -> None:
        """Adds rows, given as columns."""
        arrays = [
            columns[field.name]
            if isinstance(columns[field.name], pa.Array)
            else pa.array(columns[field.name], field.type)
            for field in self.schema
        ]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        self._hash.update(batch.serialize())
        if self._writer is None and self._held + batch.nbytes <= self.limit:
            self._batches.append(batch)
            self._held += batch.nbytes
            return
        if self._writer is None:
            folder = Path(datasets.config.HF_DATASETS_CACHE) / "aligngpt_rows"
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder, suffix=".incomplete")
            os.close(handle)
            self._path = Path(name)
            self._writer = pa.RecordBatchStreamWriter(name, self.schema)
            for held in self._batches:
                self._writer.write_batch(held)
            self._batches.clear()
        self._writer.write_batch(batch)

    def finish(self) -> Table:
        """The table of all rows."""
        if self._writer is None:
            return InMemoryTable.from_batches(self._batches, schema=self.schema)
        self._writer.close()
        finished = self._path.with_name(f"{self.digest}.arrow")
        os.replace(self._path, finished)
        self._writer = self._path = None
        return MemoryMappedTable.from_file(str(finished))
