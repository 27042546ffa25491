"""One writer for each output: a lock file beside it, held as long as the writer lives."""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_HELD: set[str] = set()  # file locks do not keep a process from itself


def lock_of(output: str | os.PathLike) -> Path:
    """The lock file of an output folder: beside it, so that the folder may be replaced; one for all links to it."""
    path = Path(os.path.realpath(output))
    return path.with_name(f"{path.name}.lock")


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds a lock file as long as the block runs; the lock of a process that died is free.

    Raises:
        ValueError: naming process and machine that hold it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    place = os.path.abspath(path)
    if place in _HELD:
        raise ValueError(f"{path.name.removesuffix('.lock')} is being written by this process already.")
    file = _open_locked(path)
    _HELD.add(place)
    try:
        file.truncate(0)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.write(json.dumps(note) + "\n")
        file.flush()
        yield
    finally:
        # first the name, then the lock: who opens the file in between sees that it is no longer the one of that name
        path.unlink(missing_ok=True)
        file.close()
        _HELD.discard(place)


def _open_locked(path: Path):
    """The open and locked file."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            held = _is_held(file)
        except OSError:
            file.close()
            raise
        if held:
            file.seek(0)
            try:
                note = json.loads(file.read())
                who = f"process {note['pid']} on {note['host']}, since {note['since']}"
            except (ValueError, KeyError, TypeError):
                who = "another process"
            file.close()
            raise ValueError(
                f"{path.name.removesuffix('.lock')} is being written by {who}: wait for it, or choose another output. "
                f"If that process is gone, delete {path}."
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _is_held(file) -> bool:
    """Takes the lock, or says that somebody has it."""
    try:
        if fcntl is not None:
            # not flock, which forked workers would go on holding for a while after a kill
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError as error:  # a file system without locks
        logger.warning("No file locks here (%s): the process id in %s has to do.", error, file.name)
    else:
        if fcntl is not None:
            return False
    file.seek(0)
    try:
        note = json.loads(file.read())
        if note["host"] != socket.gethostname():
            return True
        return note["pid"] != os.getpid() and psutil.pid_exists(note["pid"])
    except (ValueError, KeyError, TypeError):
        return False
