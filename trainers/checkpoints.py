"""Checkpoints and the finished model, written so that nothing half-written is ever taken for whole."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from aligngpt_shared.records import SUMMARY, versioned

from .continuing import write_settings
from .guards import NonFiniteError
from .storage.manifest import MANIFEST_NAME, damage, write_manifest
from .storage.saved_model import check_saved


logger = logging.get_logger(__name__)

RECORD_NAME = "run_record.json"
STATE_NAME = "trainer_state.json"
AUTO = ("auto", "true", "True", True)


class CheckpointError(OSError):
    """A checkpoint or the model could not be written; says which complete checkpoint remains."""


class SaveCallback(TrainerCallback):
    """Makes a checkpoint whole that the trainer has written."""

    def __init__(self, trainer: "CheckpointMixin"):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        self.trainer.finish_checkpoint()


class CheckpointMixin:
    """How a stage saves and continues. A checkpoint is whole once its manifest stands, which is written last."""

    checkpoints_kept: int | None = None

    def finish_checkpoint(self) -> None:
        """Adds record, settings and manifest to the checkpoint of this step; then older ones go."""
        args = self.args
        folder = self._checkpoint()
        record = self.run_record()
        self.accelerator.wait_for_everyone()
        if args.should_save:
            if self.saves_shards:
                self._describe_shards(folder)
            (folder / RECORD_NAME).write_text(json.dumps(record), encoding="utf-8")
            write_settings(self, folder)
            write_manifest(folder, args.checkpoint_digests)
            self._remove_older()
        self.accelerator.wait_for_everyone()

    def _remove_older(self) -> None:
        """Whole checkpoints beyond `save_total_limit`, by their step and not by time; the best stays."""
        best, limit = self.state.best_model_checkpoint, self.checkpoints_kept
        older = [path for path in _checkpoints(self.args.output_dir) if (path / MANIFEST_NAME).is_file()][1:]
        spare = [path for path in older if best is None or path.name != Path(best).name]
        if limit is not None and limit > 0:
            for path in spare[max(limit - 1 - (len(older) - len(spare)), 0) :]:
                shutil.rmtree(path, ignore_errors=True)

    def _checkpoint(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def raise_save_error(self, error: BaseException) -> None:
        """
        What stopped training, where a checkpoint was being saved, as a [`CheckpointError`]; a full disk is another
        error for every library, tokenizers' own a bare Exception.
        """
        folder = self._checkpoint()
        if isinstance(error, Exception) and folder.is_dir() and not (folder / MANIFEST_NAME).is_file():
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise self._save_error(folder.name, error) from error

    @property
    def saves_shards(self) -> bool:
        """Whether each process writes its own part of a checkpoint's weights (FSDP's SHARDED_STATE_DICT)."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        return plugin is not None and "SHARDED_STATE_DICT" in str(plugin.state_dict_type)

    def _describe_shards(self, checkpoint: Path) -> None:
        """What `aligngpt merge --checkpoint` needs beside the parts of the weights: config, code and processor."""
        self.model.config.save_pretrained(checkpoint)
        self.model.generation_config.save_pretrained(checkpoint)
        self.processing_class.save_pretrained(checkpoint)

    @contextmanager
    def _whole_weights(self) -> Iterator[None]:
        """The finished model is whole, however checkpoints are written."""
        if not self.saves_shards:
            yield
            return
        plugin = self.accelerator.state.fsdp_plugin
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            yield
        finally:
            plugin.set_state_dict_type("SHARDED_STATE_DICT")

    def _save_error(self, what: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{what} could not be saved ({_first_line(error)}). {self.last_checkpoint_message()}")

    def last_checkpoint_message(self) -> str:
        """A sentence about which checkpoint to continue from after a failure."""
        last = find_last_checkpoint(self.args.output_dir)
        if last is None:
            return "There is no complete checkpoint yet: see to the cause and start again."
        return (
            f"The last complete checkpoint is {Path(last).name} in {self.args.output_dir}: see to the cause, then "
            "continue with resume_from_checkpoint=auto."
        )

    def remove_unfinished(self):
        """Removes what a save that was cut off has left; one that lacks its manifest alone is written over later."""
        for path in _checkpoints(self.args.output_dir) if self.args.should_save else ():
            if not (path / MANIFEST_NAME).is_file() and not (path / STATE_NAME).is_file():
                logger.warning(f"{path.name} is a save that was cut off: removed.")
                shutil.rmtree(path, ignore_errors=True)

    # ---- the finished model ----

    def save_final(self, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """
        Saves model (of a PEFT run the adapter), processor, code and `training_summary.json` to `output_dir`, ready for
        the Hub.

        Everything is written beside and moved at the end, the summary last: a folder with a summary is complete.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        output_dir = Path(self.args.output_dir)
        beside = output_dir / "unfinished"
        self.check_weights()
        try:
            if self.args.should_save:
                shutil.rmtree(beside, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            with self._whole_weights():
                self.save_model(str(beside))
            self.save_state()
            summary = versioned({**self.summary(), **(extra or {})})
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if is_peft_model(self.model):
                    self._complete_adapter(beside)
                # a pickle with this machine's paths; the summary holds what matters of it
                (beside / "training_args.bin").unlink(missing_ok=True)
                lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in summary.items())
                (beside / SUMMARY).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
                self.save_beside(beside)
                check_saved(beside)
                (output_dir / SUMMARY).unlink(missing_ok=True)
                for stale in _model_files(output_dir):
                    stale.unlink()
                for path in sorted(beside.iterdir(), key=lambda path: path.name == SUMMARY):
                    if path.is_dir():
                        shutil.rmtree(output_dir / path.name, ignore_errors=True)
                    os.replace(path, output_dir / path.name)
                beside.rmdir()
        except Exception as error:
            if self.args.should_save:
                shutil.rmtree(beside, ignore_errors=True)
            raise self._save_error("The trained model", error) from error
        self.accelerator.wait_for_everyone()
        return summary

    def save_beside(self, folder: Path):
        """Writes what a stage keeps beside its model."""

    def check_weights(self):
        """
        Checks the weights before they count as final.

        Raises:
            NonFiniteError: naming the first that hold NaN or infinity.
        """
        broken = []
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            # of a sharded weight, what lies here
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if parameter.requires_grad and not bool(torch.isfinite(local.detach()).all()):
                broken.append(name)
        if broken:
            raise NonFiniteError(
                f"{len(broken)} weights hold NaN or infinity after training ({', '.join(broken[:3])}): nothing was "
                f"saved as finished. {self.last_checkpoint_message()} A lower learning_rate may help."
            )

    def _complete_adapter(self, folder: Path):
        """Config and code beside an adapter: they say what the stage made of the base model. No card of PEFT's."""
        base = self.accelerator.unwrap_model(self.model).get_base_model()
        custom_object_save(base, folder, config=base.config)
        base.config.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)


def find_last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint in a folder, or `None`; what is damaged is named and passed over."""
    for path in _checkpoints(output_dir):
        if not (path / MANIFEST_NAME).is_file():
            logger.warning(f"{path.name} is incomplete (the run stopped while saving): passed over.")
        elif (found := damage(path)) is not None:
            logger.warning(f"{path.name} is damaged ({found}): passed over.")
        else:
            return str(path)
    return None


def has_checkpoints(output_dir: str | os.PathLike, resuming: bool = False) -> bool:
    """Whether a folder holds checkpoints, whole or damaged; for a run that is continued a save cut off is none."""
    names = (MANIFEST_NAME,) if resuming else (MANIFEST_NAME, STATE_NAME)
    return any((path / name).is_file() for path in _checkpoints(output_dir) for name in names)


def _checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    found = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def checkpoint_to_continue(asked: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """
    The checkpoint that a run goes on from: the one named, or for `"auto"` the last whole one.

    Raises:
        CheckpointError: the one named is damaged, or all that there are.
    """
    if asked in AUTO:
        last = find_last_checkpoint(output_dir)
        if last is None and has_checkpoints(output_dir, resuming=True):
            raise CheckpointError(
                f"{output_dir} holds checkpoints, but no whole one (see above): remove them to start afresh."
            )
        return last
    if not asked:
        return None
    if not Path(asked).is_dir():
        raise CheckpointError(f"resume_from_checkpoint={str(asked)!r}: there is no such folder.")
    if (found := damage(asked)) is not None:
        raise CheckpointError(f"{asked} is damaged ({found}): name an earlier checkpoint, or start afresh.")
    return str(asked)


def check_output(args: Any, resumed_from: str | None, remove: bool = True) -> None:
    """
    Refuses a folder that holds an earlier run, unless it is continued or `overwrite` says so; then, if `remove`, makes
    room.

    Raises:
        ValueError: naming what is there.
    """
    folder = Path(args.output_dir)
    if resumed_from is not None:
        return
    finished = [
        name for name in (SUMMARY, "model.safetensors", "adapter_model.safetensors") if (folder / name).exists()
    ]
    if args.overwrite:
        for path in _checkpoints(folder) if remove else ():
            shutil.rmtree(path)
        return
    if has_checkpoints(folder, resuming=args.resume_from_checkpoint in AUTO):
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run: continue it with resume_from_checkpoint=auto, choose "
            "another output_dir, or replace it with overwrite."
        )
    if finished:
        raise ValueError(
            f"{folder} holds a finished model ({finished[0]}): choose another output_dir, or replace it with overwrite."
        )


def read_record(checkpoint: str | os.PathLike | None) -> dict[str, float]:
    """A run's counts up to a checkpoint; empty when it holds none."""
    path = Path(checkpoint or ".") / RECORD_NAME
    return json.loads(path.read_text(encoding="utf-8")) if checkpoint and _is_json(path) else {}


def read_state(checkpoint: str | os.PathLike | None) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint; empty when there is none."""
    path = Path(checkpoint or ".") / STATE_NAME
    return json.loads(path.read_text(encoding="utf-8")) if checkpoint and _is_json(path) else {}


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _model_files(folder: Path) -> Iterable[Path]:
    """Weights of an earlier run, which could outlive a new save with another number of shards."""
    return [path for pattern in ("*.safetensors", "*.safetensors.index.json") for path in folder.glob(pattern)]
