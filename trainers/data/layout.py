"""Which layout is recognised in a source, for who looks before training."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from .columns import IMAGE_COLUMNS, OTHER_COLUMNS, mapping_of, names_in, with_features
from .conversations import MORE, find_layout
from .sources import open_source


def layout_of(
    source: Any,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | str | None = None,
    streaming: bool = False,
) -> str:
    """
    The layout that is recognised in a source, by its columns, such as `images + texts`; with the source's own names
    where `columns` maps them: `image (img) + caption (alt)`. Reads the first rows at most.

    Args:
        source: as for [`read_rows`], and so the others.
        streaming: do not copy what is on the Hub.

    Raises:
        ValueError: unknown source, columns or split.
    """
    opened, _ = open_source(source, split, name, revision, streaming, columns)
    opened = with_features(opened) if isinstance(opened, IterableDataset) else opened
    found = set(opened.column_names) if isinstance(opened, (Dataset, IterableDataset)) else names_in(opened)
    layout = find_layout(found)
    if layout is None:
        return f"none that is known, with the columns {', '.join(sorted(found))}"
    theirs = mapping_of(columns)
    images = [column for column in IMAGE_COLUMNS if column in found][:1]
    used = [*images, *layout, *(column for column in (*MORE, *OTHER_COLUMNS) if column in found)]
    return " + ".join(f"{ours} ({theirs[ours]})" if theirs.get(ours, ours) != ours else ours for ours in used)
