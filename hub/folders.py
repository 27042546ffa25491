"""Which files belong to a folder."""

from pathlib import Path


def stays_inside(path: Path, folder: Path) -> bool:
    """
    Whether a file lies inside a folder. Links out of it do not count, except those from a snapshot in the Hub's cache
    to its blobs.
    """
    target, folder = path.resolve(), folder.resolve()
    inside = target.is_relative_to(folder)
    return inside or (folder.parent.name == "snapshots" and target.is_relative_to(folder.parents[1] / "blobs"))
