"""Columns that no layout reads (`uid`, `source`, scores of others), kept beside the rows that are made."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
from datasets.table import Table

from .arrow_writer import TableWriter
from .columns import IMAGE_COLUMNS, OTHER_COLUMNS
from .conversations import FOREIGN, LAYOUTS, MORE, find_layout


ROWS_AT_ONCE = 1000
# what becomes a column of its own kind; whatever else is kept as its JSON
PLAIN: dict[frozenset[type], pa.DataType] = {
    frozenset({bool}): pa.bool_(),
    frozenset({int}): pa.int64(),
    frozenset({float}): pa.float64(),
    frozenset({int, float}): pa.float64(),
}


def kept_names(columns: Iterable[str]) -> list[str]:
    """Those of a source's columns that its rows do not hold in another form."""
    columns = list(columns)
    read = {*(find_layout(columns) or ()), *IMAGE_COLUMNS, *OTHER_COLUMNS, *MORE, *FOREIGN, "objects"}
    # as names of a row they would say something else
    read |= {"messages", *(name for layout in LAYOUTS if len(layout) == 1 for name in layout)}
    return [name for name in columns if name not in read]


class KeptColumns:
    """The other columns of records that are read one after the other; their kinds are known after the last one."""

    def __init__(self) -> None:
        self._kinds: dict[str, set[type]] = {}

    def take(self, record: Mapping[str, Any]) -> str:
        """The other columns of a record as one line of JSON."""
        there = [name for name in record if record[name] is not None]
        values = {name: record[name] for name in kept_names(there) if isinstance(name, str)}
        for name, value in values.items():
            fits = not isinstance(value, int) or -(2**63) <= value < 2**63
            self._kinds.setdefault(name, set()).add(type(value) if fits else object)
        return json.dumps(values, default=repr)

    def table(self, lines: pa.ChunkedArray) -> Table:
        """
        The columns, null where a record has no value.

        Args:
            lines: what `take` gave for each row; null for rows without.
        """
        schema = pa.schema([(name, PLAIN.get(frozenset(kinds), pa.string())) for name, kinds in self._kinds.items()])
        with TableWriter(schema) as writer:
            for start in range(0, len(lines), ROWS_AT_ONCE):
                rows = [json.loads(line or "{}") for line in lines[start : start + ROWS_AT_ONCE].to_pylist()]
                writer.write(
                    {field.name: [_value(row.get(field.name), field.type) for row in rows] for field in schema}
                )
            return writer.finish()


def _value(value: Any, kind: pa.DataType) -> Any:
    if value is None or kind != pa.string():
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode()  # half a character cannot be written
