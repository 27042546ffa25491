"""Several processes that share a scoring: their ranks, and how all stop when one fails."""

import atexit
import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from ..data.images import usable_cores


logger = logging.getLogger(__name__)

# the main process may write images for hours while the others wait
PATIENCE = timedelta(days=7)


class Processes:
    """The processes that `accelerate launch` or `torchrun` started; one alone where nobody launched any.

    Messages between them go through gloo on the CPU, whatever the devices: no scores are exchanged, and gloo notices at
    once when a process is gone.

    Args:
        device: of the scorer, as the settings say; None for the one that accelerate gives this process.
    """

    def __init__(self, device: str | None):
        self.rank, self.count, self.local_count, self.device = 0, 1, 1, device
        self.flag: Path | None = None
        self._group = None
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 and not dist.is_initialized():
            return
        if not dist.is_initialized():
            atexit.register(end_process_group)
        on_cpu = device.startswith("cpu") if device is not None else not torch.accelerator.is_available()
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        self.rank, self.count = state.process_index, state.num_processes
        self.local_count = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        if device is None or device == "cuda":
            self.device = str(state.device)
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A part that every process goes through, each in its own time: where one fails, all raise.

        Raises:
            ValueError: in the processes that did not fail, with the message of the one that did.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
            self._raise_flag()
        own = None if failure is None or isinstance(failure, _OtherFailed) else str(failure)
        try:
            messages = self._gather(own)
        except ValueError:
            if own is None:
                raise
            messages = []
        if own is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"process {rank} failed: {message}")
        if failure is not None:
            raise failure

    def from_main(self, value: Any = None) -> Any:
        """What the main process gave."""
        return self._gather(value if self.is_main else None)[0]

    def check(self):
        """Raises when another process has failed; cheap enough for every batch."""
        if self.flag is not None and self.count > 1 and self.flag.exists():
            raise _OtherFailed("stopped, because another process failed")

    def _gather(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise ValueError(
                "another process is gone without a word (killed, or out of memory); finished shards are kept, so the "
                "same command goes on from there."
            ) from error
        return values

    def _raise_flag(self):
        if self.flag is not None and self.count > 1:
            with contextlib.suppress(OSError):
                self.flag.touch()


class _OtherFailed(ValueError):
    """A failure of another process."""


def end_process_group():
    """Leaves the process group, so that the other processes and NCCL do not wait for this one."""
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


@contextlib.contextmanager
def keeping_progress(what: str, folder: Path) -> Iterator[None]:
    """Says, when something cannot be written, what is kept and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{what} cannot be written ({error}). Finished scores are kept in {folder}: make room, and the same "
            "command goes on from there."
        ) from error


def default_workers(device: torch.device, processes: Processes) -> int:
    """Processes that decode images for one process that scores.

    On a GPU machine the cores are free for decoding, up to 16 for a GPU. On a CPU the model uses all cores itself: one
    worker keeps it busy where there is more than one core, more would only take cores away.
    """
    cores = max(1, usable_cores() // processes.local_count)
    if device.type != "cpu":
        return min(16, max(1, cores - 1))
    return 1 if cores > 1 else 0
