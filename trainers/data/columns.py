"""The names of columns, and rows of a source that has other names for them."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, LargeList, List, Value, concatenate_datasets

from .conversations import LAYOUTS, MORE, PAIRS, find_layout


IMAGE_COLUMNS = ("images", "image")
OTHER_COLUMNS = ("id", "align_level", "similarity", "clip_score")
NAMES = tuple(dict.fromkeys([*IMAGE_COLUMNS, *(name for layout in LAYOUTS for name in layout), *MORE, *OTHER_COLUMNS]))
# Names that say the same: where one of them is mapped, another column of that kind is not read.
ALIKE = (set(IMAGE_COLUMNS), {"align_level", "similarity"})
IMAGE_KEYS = ("image", "path", "url", "base64", "image_url")  # under which a part of a message holds its image
PEEK = 1000  # records whose columns are looked at before a file is read
TYPED_BY = 5  # records that say of what kind a stream's columns are, where it does not say so


def mapping_of(columns: Mapping[str, str] | str | None) -> dict[str, str]:
    """
    Our names of columns and the source's, of a mapping or a text such as `image=img,clip_score=metrics.clip`.

    Raises:
        ValueError: for a name that is none of ours.
    """
    if isinstance(columns, str):
        pairs = [part.partition("=") for part in columns.split(",") if part.strip()]
        columns = {ours.strip(): source.strip() for ours, _, source in pairs}
    for ours, source in (columns or {}).items():
        if ours not in NAMES or not source or not isinstance(source, str):
            raise ValueError(
                f"columns: {ours}={source} is not a name of ours and the source's, such as image=img; ours are "
                f"{', '.join(NAMES)}."
            )
    return dict(columns or {})


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A record under our names: the mapped columns and those that are not in their way."""
    hidden = _hidden(columns)
    kept = {name: value for name, value in record.items() if name not in hidden}
    return {**kept, **{ours: _reach(record, source) for ours, source in columns.items()}}


def under_our_names(opened: Any, columns: Mapping[str, str], title: str) -> Any:
    """
    A data set, a stream or a list of records under our names. Columns of a data set stay memory-mapped; what is taken
    out of a nested one is copied.

    Raises:
        ValueError: for a column that no row has.
    """
    if isinstance(opened, IterableDataset):
        opened = with_features(opened)
    is_table = isinstance(opened, (Dataset, IterableDataset))
    refuse_unknown(columns, set(_names(opened.features)) if is_table else names_in(opened), title)
    if isinstance(opened, list):
        return [renamed(record, columns) for record in opened]
    if isinstance(opened, Dataset):
        return _renamed_table(opened, columns)
    features, encoded = _renamed_features(opened.features, columns), opened.decode(False)
    rows = encoded.map(renamed, fn_kwargs={"columns": columns}, remove_columns=opened.column_names)
    return rows.cast(features)


def refuse_unknown(columns: Mapping[str, str], names: set[str], title: str) -> None:
    """Raises ValueError where a mapped column is not among the names that there are."""
    for ours, source in columns.items():
        if source not in names:
            raise ValueError(
                f"{title}: columns maps {ours} to {source!r}, which no row has; there are {', '.join(sorted(names))}."
            )


def names_in(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """The names of the columns in the first records, and of their fields, as `metrics.clip`."""
    return {name for record in islice(records, PEEK) if isinstance(record, dict) for name in _names(record)}


def captions_of_a_table_apart(dataset: Dataset) -> Dataset:
    """The data set with a row for each caption, where it has lists of them."""
    layout = find_layout(dataset.column_names)
    if layout not in PAIRS or not isinstance(dataset.features[layout[0]], (List, LargeList)):
        return dataset
    column = layout[0]
    captions = [each or [None] for each in dataset.with_format(None)[column][:]]
    rows = dataset.remove_columns(column).select([number for number, each in enumerate(captions) for _ in each])
    beside = {column: [caption for each in captions for caption in each]}
    return concatenate_datasets([rows, Dataset.from_dict(beside, Features({column: Value("string")}))], axis=1)


def with_features(rows: IterableDataset) -> IterableDataset:
    """The stream with the kinds of its columns, taken from its first rows where it does not say them."""
    return rows if rows.features is not None else rows.cast(Dataset.from_list(list(rows.take(TYPED_BY))).features)


def holds_images_in_parts(features: Features) -> bool:
    """Whether images stand in the parts of messages."""
    parts = {name.rpartition(".content.")[2] for name in _names(features) if ".content." in name}
    return not parts.isdisjoint(IMAGE_KEYS)


def _hidden(columns: Mapping[str, str]) -> set[str]:
    """Columns that are not read beside the mapped ones: where these come from, and what would be taken for them."""
    nested = {source.partition(".")[0] for source in columns.values()}
    hidden = {*columns, *columns.values(), *nested.difference(NAMES)}
    for group in ALIKE:
        hidden |= group if group & set(columns) else set()
    chosen = [set(layout) for layout in LAYOUTS if set(layout) & set(columns)]
    return hidden | ({name for layout in LAYOUTS for name in layout} - set().union(*chosen) if chosen else set())


def _reach(value: Any, name: str) -> Any:
    """The value of a column, or of a field in it; where there is a list on the way, one of each."""
    if isinstance(value, (list, tuple)):
        return [_reach(item, name) for item in value]
    if not isinstance(value, Mapping):
        return None
    head, dot, rest = name.partition(".")
    return _reach(value.get(head), rest) if dot and name not in value else value.get(name)


def _names(value: Any, start: str = "") -> Iterator[str]:
    """The names of columns and of the fields in them, of a record or of what kinds they are."""
    value = getattr(value, "feature", value)
    if isinstance(value, (list, tuple)):
        value = next((item for item in value if isinstance(item, dict)), None)
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield f"{start}{name}"
        yield from _names(inner, f"{start}{name}.")


def _kind(features: Any, name: str) -> Any:
    """Of what kind a column is, or a field in it."""
    if isinstance(features, (List, LargeList)):
        return List(_kind(features.feature, name))
    head, dot, rest = name.partition(".")
    return _kind(features[head], rest) if dot and name not in features else features[name]


def _renamed_features(features: Features, columns: Mapping[str, str]) -> Features:
    hidden = _hidden(columns)
    kept = {name: kind for name, kind in features.items() if name not in hidden}
    return Features({**kept, **{ours: _kind(features, source) for ours, source in columns.items()}})


def _renamed_table(dataset: Dataset, columns: Mapping[str, str]) -> Dataset:
    hidden, features = _hidden(columns), _renamed_features(dataset.features, columns)
    kept = [name for name in dataset.column_names if name not in hidden]
    pieces = [dataset.select_columns(kept)] if kept else []
    for ours, source in columns.items():
        if source in dataset.column_names:
            piece = dataset.select_columns([source]).rename_columns({source: ours} if source != ours else {})
        else:
            piece = dataset.select_columns([source.partition(".")[0]]).with_format("arrow")
            kind = Features({ours: features[ours]})
            options = {"fn_kwargs": {"columns": {ours: source}, "schema": kind.arrow_schema}, "features": kind}
            piece = piece.map(_taken, batched=True, batch_size=100, remove_columns=piece.column_names, **options)
            piece = piece.with_format(None)
        pieces.append(piece)
    return concatenate_datasets(pieces, axis=1) if len(pieces) > 1 else pieces[0]


def _taken(table: pa.Table, columns: Mapping[str, str], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([renamed(record, columns) for record in table.to_pylist()], schema)
