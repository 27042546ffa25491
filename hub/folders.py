"""What belongs to a folder."""

from pathlib import Path


def stays_inside(path: Path, folder: Path) -> bool:
    """
    Whether a file is one of a folder's own: no link out of it, but for those from a snapshot of the Hub's cache to
    where that keeps its files.
    """
    target, folder = path.resolve(), folder.resolve()
    inside = target.is_relative_to(folder)
    return inside or (folder.parent.name == "snapshots" and target.is_relative_to(folder.parents[1] / "blobs"))
