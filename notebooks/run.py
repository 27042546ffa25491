"""
Runs the notebooks from top to bottom, each in a fresh process; an error in a cell fails it.

    python notebooks/run.py                   # all, outputs thrown away
    python notebooks/run.py 01 --write        # one, its outputs kept in the file
"""

import argparse
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


HERE = Path(__file__).parent
# what a cell may take, in seconds, on two busy cores
LIMIT = 1800


def run(path: Path, write: bool, work: Path) -> float:
    """
    Executes one notebook with `work` as its working directory; returns the seconds.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    NotebookClient(
        notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    ).execute()
    if write:
        nbformat.write(cleaned(notebook, work), path)
    return time.monotonic() - started


def cleaned(notebook, work: Path):
    """Without times, progress bars and paths of the machine that it ran on."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        kept = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in kept:
            if "text" in output:
                output["text"] = re.sub(re.escape(str(work)) + r"/?", "", output["text"])
        cell["outputs"] = kept
    notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec",) if name in notebook.metadata}
    return notebook


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of the notebooks' names (default: all)")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the files")
    parser.add_argument("--work", type=Path, default=Path("runs/notebooks"), help="working directory (%(default)s)")
    args = parser.parse_args()
    paths = sorted(HERE.glob("*.ipynb"))
    chosen = [path for path in paths if not args.names or path.name.startswith(tuple(args.names))]
    if not chosen:
        raise SystemExit(f"no notebook begins with {args.names}; there are {', '.join(path.stem for path in paths)}")
    failed = []
    for path in chosen:
        try:
            print(f"{path.name}: {run(path, args.write, args.work.absolute()):.0f} s", flush=True)
        except CellExecutionError as error:
            print(f"{path.name}: FAILED\n{error}", flush=True)
            failed.append(path.name)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} notebooks ran to the end")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
