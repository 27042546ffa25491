"""Orderly stops of a run: at signals, and at losses or gradients that are not finite."""

import functools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from transformers import TrainerCallback

from .collator import IGNORE_INDEX, ROW_INDEX_COLUMN


MOST_ROWS_NAMED = 20
# A second Ctrl-C this many seconds after the first does not wait for the step.
IMPATIENCE = 1.0
# Seconds that a data loader's process goes on after a SIGTERM: for a step, not for ever.
WORKER_GRACE = 120


class TrainingStopped(SystemExit):
    """
    A signal stopped training after a whole step and a saved checkpoint. Ends the process with the status that shells
    give the signal (128 + its number: 143 for SIGTERM, 130 for SIGINT), unless caught.
    """

    def __init__(self, signal_number: int, step: int, message: str):
        super().__init__(128 + signal_number)
        self.signal_number, self.step, self.message = signal_number, step, message

    def __str__(self) -> str:
        return self.message


class NonFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite; names the rows."""


class StopCallback(TrainerCallback):
    """
    Finishes the step after SIGTERM or SIGINT, has a checkpoint saved and training stopped, in all processes at the same
    step, whichever got the signal. A context manager around training.

    `transformers` offers a checkpoint at SIGTERM (`enable_jit_checkpoint`), but not at SIGINT, not in step between
    processes, and without a status to the caller.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.received = 0
        self.received_at = 0.0
        self.stopped_by = self.began_at = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopCallback":
        self.received = self.stopped_by = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _receive(self, number: int, frame: Any):
        # a launcher passes on what its processes got already, so several processes never lose patience
        again = self.received and number == signal.SIGINT and self.trainer.args.world_size == 1
        if again and time.monotonic() - self.received_at > IMPATIENCE:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
            if self.trainer.is_world_process_zero():
                name = signal.Signals(number).name
                print(f"\n{name}: finishing the step and saving a checkpoint ...", file=sys.stderr, flush=True)

    def _received_anywhere(self) -> int:
        if self.trainer.args.world_size == 1:
            return self.received
        mine = torch.tensor([self.received], device=self.trainer.args.device)
        return int(self.trainer.accelerator.gather(mine).max())

    def on_step_end(self, args, state, control, **kwargs):
        number = self._received_anywhere()
        # at the last step there is nothing left to stop
        if number and state.global_step < state.max_steps:
            self.stopped_by = number
            control.should_log = control.should_save = control.should_training_stop = True
        return control

    def on_train_begin(self, args, state, control, **kwargs):
        self.began_at = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped_by or state.global_step == self.began_at:  # saved already
            control.should_save = control.should_evaluate = False
        return control

    def error(self) -> TrainingStopped:
        """What training ends with, once `stopped_by` says so; the message goes to the terminal."""
        step, total = self.trainer.state.global_step, self.trainer.state.max_steps
        message = (
            f"Stopped by {signal.Signals(self.stopped_by).name} after step {step} of {total}; checkpoint-{step} is "
            f"saved in {self.trainer.args.output_dir}. Continue with the same command and resume_from_checkpoint=auto."
        )
        if self.trainer.is_world_process_zero():
            print(message, file=sys.stderr, flush=True)
        return TrainingStopped(self.stopped_by, step, message)


def outlive_signals(loader: Any) -> Any:
    """
    Makes a data loader's processes ignore signals that reach the whole group (Ctrl-C, a batch system's SIGTERM), so
    that the step can be finished with them. Returns the loader.
    """
    base = getattr(loader, "base_dataloader", loader)
    base.worker_init_fn = functools.partial(_start_worker, base.worker_init_fn)
    return loader


def _start_worker(initialize: Callable[[int], None] | None, worker_id: int):
    """In a data loader's process, behind torch's own handlers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # Unix alone
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
    if initialize is not None:
        initialize(worker_id)


class FiniteGuard(TrainerCallback):
    """
    Stops training at a loss that is NaN or infinite before its gradient reaches the weights, in all processes, and
    names the rows it comes from; likewise at a gradient that is not finite.

    It looks at each batch: TRL waits for the device there anyway, for its metrics.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.batches: list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]] = []

    def check_loss(self, loss: torch.Tensor, inputs: dict[str, Any], row_index: torch.Tensor | None):
        """
        Args:
            loss: of this process and batch, `()`. inputs: of the model, with labels. row_index: positions in the data
                set, `(rows,)`, where they are known.

        Raises:
            NonFiniteError: in all processes, when the loss of any is not finite.
        """
        self.batches.append((row_index, inputs["input_ids"], inputs["labels"]))
        trainer = self.trainer
        finite = everywhere = torch.isfinite(loss.detach()).all()
        if trainer.args.world_size > 1:
            everywhere = trainer.accelerator.gather(finite.reshape(1)).all()
        if bool(everywhere):
            return
        guilty = []
        if not bool(finite):
            names = self._names(self.batches[-1:])
            # the rows one by one; a sharded model would wait for the other processes
            sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
            guilty = names if sharded else self._with_bad_loss(inputs, names) or names
        self._stop("The loss is NaN or infinite", guilty)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Looks at the whole gradient, the same in all processes; where it was clipped, NaN has become of infinity."""
        batches, self.batches = self.batches, []
        accelerator = self.trainer.accelerator
        # a gradient scaler skips such steps itself and lowers its scale
        if getattr(accelerator, "scaler", None) is not None:
            return
        norm = accelerator.clip_grad_norm_(self.trainer.model_wrapped.parameters(), math.inf)
        if norm is not None and not bool(torch.isfinite(torch.as_tensor(norm))):
            self._stop("The gradient is NaN or infinite, though the loss is not,", self._names(batches))

    @torch.no_grad()
    def _with_bad_loss(self, inputs: dict[str, torch.Tensor], names: list[str]) -> list[str]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        guilty = []
        for index, name in enumerate(names):
            with self.trainer.compute_loss_context_manager():
                loss = model(**take_row(inputs, index, model.config)).loss
            if not bool(torch.isfinite(loss)):
                guilty.append(name)
        return guilty

    def _stop(self, what: str, guilty: list[str]):
        trainer = self.trainer
        if trainer.args.world_size > 1:
            guilty = gather_object(guilty)
        rows = "; ".join(guilty[:MOST_ROWS_NAMED])
        more = f" and {len(guilty) - MOST_ROWS_NAMED} more" if len(guilty) > MOST_ROWS_NAMED else ""
        raise NonFiniteError(
            f"{what} at step {trainer.state.global_step + 1}: stopped before the weights changed. It comes from: "
            f"{rows}{more}. Look at these rows, or lower the learning rate. {trainer.last_checkpoint_message()}"
        )

    def _names(self, batches: list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]) -> list[str]:
        """Rows by their position and `id`, or by their answer where the position is unknown."""
        rows, ids = self.trainer.train_dataset, {}
        if not isinstance(rows, IterableDataset) and {"id", ROW_INDEX_COLUMN} <= set(rows.column_names):
            ids = dict(zip(rows[ROW_INDEX_COLUMN], rows["id"], strict=True))
        names = []
        for row_index, input_ids, labels in batches:
            if row_index is None:
                decode = self.trainer.processing_class.tokenizer.decode
                answers = [decode(row[label != IGNORE_INDEX]) for row, label in zip(input_ids, labels, strict=True)]
                names += [f"the row with the answer {answer[:60]!r}" for answer in answers]
            else:
                for index in row_index.tolist():
                    names.append(f"row {index}" + (f" (id {ids[index]!r})" if ids.get(index) is not None else ""))
        return names


def take_row(inputs: dict[str, Any], index: int, config: Any) -> dict[str, Any]:
    """One row of a batch as a batch of its own, with its images."""
    num_rows = inputs["input_ids"].shape[0]
    row = {}
    for key, value in inputs.items():
        of_rows = torch.is_tensor(value) and value.ndim and value.shape[0] == num_rows and key != "pixel_values"
        row[key] = value[index : index + 1] if of_rows else value
    if inputs.get("pixel_values") is not None:
        images = (inputs["input_ids"] == config.image_token_id).sum(1) // config.image_seq_length
        start = int(images[:index].sum())
        row["pixel_values"] = inputs["pixel_values"][start : start + int(images[index])]
        if not len(row["pixel_values"]):
            del row["pixel_values"]
    return row
