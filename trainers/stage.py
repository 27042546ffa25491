"""What both training stages share: the freeze, the loss on answers, evaluation, resuming (see `StageTrainer`)."""

import os
import time
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import seed_worker
from transformers.utils import logging
from trl import SFTTrainer

from aligngpt_shared.locks import lock, lock_of
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.configuration_aligngpt import answer_openings

from .checkpoints import (
    CheckpointError,
    CheckpointMixin,
    SaveCallback,
    check_output,
    checkpoint_to_continue,
    find_last_checkpoint,
    read_record,
    read_state,
)
from .collator import ROW_INDEX_COLUMN, AlignGPTDataCollator
from .continuing import ContinuationError, compare_settings
from .data.streaming import Passes
from .dummy_image import add_dummy_images
from .eval_callback import GenerationMetrics, GenerationMixin
from .guards import FiniteGuard, NonFiniteError, StopCallback, TrainingStopped, outlive_signals
from .packing import RowPacking, check_packing
from .rows import prepare_rows
from .sampling import make_sampler
from .stage_config import IMAGE_ASPECT_RATIOS, StageConfig
from .storage.saved_model import check_savable
from .summary import summarize
from .supervised_head import SupervisedHead, gather_head
from .watching import RunWatch


logger = logging.get_logger(__name__)

__all__ = [
    "IMAGE_ASPECT_RATIOS",
    "CheckpointError",
    "ContinuationError",
    "NonFiniteError",
    "StageConfig",
    "StageTrainer",
    "TrainingStopped",
    "find_last_checkpoint",
]

# `dataloader_` settings that are the loader's own
LOADER_SETTINGS = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
# settings that give a module of the model a learning rate of its own
OWN_LEARNING_RATES = {
    "projector_learning_rate": "multi_modal_projector",
    "align_learning_rate": "align_embeddings",
}


class StageTrainer(CheckpointMixin, GenerationMixin, SFTTrainer):
    """
    [`SFTTrainer`] for one stage of AlignGPT. Subclasses name `stage` and say what trains (`configure_stage`,
    `trainable_modules`). Overridden beyond the lists in [`CheckpointMixin`] and [`GenerationMixin`], and why:

    - `__init__`: loads a path with our own classes, hands in the collator and checked rows, then freezes (after
      `super().__init__`, so that nothing there undoes it).
    - `get_train_dataloader`: batches of similar rows (`group_by`), streams that begin anew; its processes ignore
      signals, as those of `get_eval_dataloader`.
    - `get_batch_samples`: a run continued behind its last step does not take another one.
    - `create_optimizer`: gives projector and level table learning rates of their own (`OWN_LEARNING_RATES`).
    - `compute_loss`: takes the rows' names out of the batch, stops at a loss that is not finite; on a
      CPU it keeps the head to supervised positions, as TRL does on a GPU.
    - `log`: adds what [`RunWatch`] has seen.
    - `train`: resumes from the last *complete* checkpoint when asked for `"auto"`, stops orderly at a signal, and
      measures the run.
    - `create_model_card`: TRL's card shows a text-generation pipeline, which cannot run this model; cards are made from
      `training_summary.json` when a model is published.

    Args:
        model (`str` or `AlignGPTForConditionalGeneration`): folder or Hub id, or the model itself.
        args (`StageConfig`): settings.
        train_dataset (`Dataset` or `IterableDataset`): rows `images`, `messages`, in stage 1 `align_level`.
        eval_dataset (*optional*): the same, or a dict of such.
        processing_class (`AlignGPTProcessor`, *optional*): loaded from the model's folder when `None`.
        generation_metrics (`Callable`, *optional*): takes the records of `eval_generations` (see
            [`~eval_callback.generate_answers`]) and gives metrics by name, which are logged as `eval_{name}`.
        kwargs: of SFTTrainer, such as `peft_config` (stage 2) and `callbacks`.

    Raises:
        ValueError: settings, model and data that do not fit each other.
        TrainingStopped: from `train`, after a signal; a `SystemExit` with the signal's status.
        NonFiniteError: from `train`, at a loss or gradient that is not finite.
        CheckpointError: from `train` and `save_final`, when a folder cannot be written.
    """

    stage: ClassVar[str]

    def __init__(
        self,
        model: str | os.PathLike | AlignGPTForConditionalGeneration,
        args: StageConfig,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        generation_metrics: GenerationMetrics | None = None,
        **kwargs,
    ):
        if isinstance(model, (str, os.PathLike)):
            processing_class = processing_class or AlignGPTProcessor.from_pretrained(model)
            init_kwargs = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
            if kwargs.get("quantization_config") is not None:
                init_kwargs["quantization_config"] = kwargs.pop("quantization_config")
            model = AlignGPTForConditionalGeneration.from_pretrained(model, **init_kwargs)
            args.model_init_kwargs = None
        if processing_class is None:
            raise ValueError("processing_class is missing: pass the AlignGPTProcessor that belongs to the model.")
        processing_class.validate_with(model.config)
        if args.use_kernels:
            model.use_kernels = True
        self.check_adapter(kwargs.get("peft_config"), args)
        model.config.answer_openings = answer_openings(processing_class.tokenizer, processing_class.chat_template)
        self.configure_stage(model, args)
        model.config.training_stage = self.stage
        processing_class.image_processor.do_pad = args.image_aspect_ratio == "pad"
        # TRL would strip levels, lengths and names; `prepare_rows` keeps what is used
        args.remove_unused_columns = False
        if processing_class.tokenizer.pad_token is None:
            processing_class.tokenizer.pad_token = processing_class.tokenizer.eos_token
        collator = AlignGPTDataCollator(
            processing_class,
            stage=self.stage,
            max_length=args.max_length,
            on_overlong=args.on_overlong,
            num_align_levels=model.config.num_align_levels,
            use_levels=model.config.align_mode == "level",
            pad_to_multiple_of=args.pad_to_multiple_of,
            emit_row_index=True,
        )
        self.row_counts: dict[str, int] = {}

        def prepare(rows: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
            rows, counts = prepare_rows(rows, collator, args, name)
            self.row_counts |= counts
            return rows

        train_dataset = prepare(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, "eval")
        # what is supervised is the collator's; TRL up to 1.14 refuses the setting beside images
        args.assistant_only_loss = False
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        args.assistant_only_loss = True
        self._freeze()
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        check_savable(base, processing_class)
        self.generation_metrics = generation_metrics
        if self.saves_shards and is_peft_model(self.model):
            raise ValueError(
                "fsdp_state_dict_type is SHARDED_STATE_DICT and use_peft is set: adapters are small, their checkpoints "
                "are whole. Take FULL_STATE_DICT."
            )
        self.finite_guard, self.stop_callback = FiniteGuard(self), StopCallback(self)
        for callback in (self.finite_guard, self.stop_callback, SaveCallback(self)):
            self.add_callback(callback)
        self.resumed_from: str | None = None
        # settings that a continued run has otherwise than before, with the step
        self.setting_changes: list[dict[str, Any]] = []
        self._started: float | None = None
        self._trained = False
        self._record_before: dict[str, float] = {}
        self.record: dict[str, float] = {}
        self.watch = RunWatch(
            base,
            # a sharded head is brought together once a step, for the loss alone
            levels=base.config.align_mode == "level" and not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()),
            gate=self.uses_gate(),
            device=self.args.device,
        )
        self.supervised_head = SupervisedHead(base.model)
        gather_head(base)
        self.packing: RowPacking | None = None
        if self.args.pack_rows:
            check_packing(base.config.text_config)
            attention = base.config.text_config._attn_implementation or ""
            self.packing = RowPacking(base.model.language_model, one_line="flash" in attention)
        add_dummy_images(base)

    # ---- what a stage is ----

    def configure_stage(self, model: AlignGPTForConditionalGeneration, args: StageConfig):
        """Checks that the model fits the stage and sets what its config says from now on."""
        raise NotImplementedError

    def check_adapter(self, peft_config: Any, args: StageConfig):
        """Refuses an adapter that the stage has no use for."""

    def trainable_modules(self, model: AlignGPTForConditionalGeneration) -> list[torch.nn.Module]:
        """The modules whose parameters this stage trains; all others are frozen."""
        raise NotImplementedError

    def _freeze(self):
        if is_peft_model(self.model):
            # an adapter's own selection stands, but for what the stage leaves without a gradient
            idle = () if self.uses_gate() else ("align_gate",)
            for name, parameter in self.model.named_parameters():
                if any(module in name for module in idle):
                    parameter.requires_grad_(False)
            return
        self.model.requires_grad_(False)
        for module in self.trainable_modules(self.model):
            for parameter in module.parameters():
                parameter.requires_grad_(True)
                if not is_deepspeed_zero3_enabled():
                    # a low-precision copy would swallow small updates (ZeRO-3 keeps a float32 one of its shards
                    # itself); the frozen rest may stay as it was loaded
                    parameter.data = parameter.data.float()

    def uses_gate(self) -> bool:
        """Whether the gate decides anything in this stage."""
        return False

    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not fresh:
            return optimizer
        named = list((self.model if model is None else model).named_parameters())
        for setting, module in OWN_LEARNING_RATES.items():
            learning_rate = getattr(self.args, setting, None)
            if learning_rate is None:
                continue
            inside = {id(parameter) for name, parameter in named if module in name}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in inside]
                if own and len(own) == len(group["params"]):
                    # FSDP2 cannot load the state of a group that is left empty
                    group["lr"] = learning_rate
                elif own:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in inside]
                    optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
        return optimizer

    # ---- batches and loss ----

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        rows, args = self.train_dataset, self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = make_sampler(
            rows, args.group_by, args.train_batch_size, args.world_size, seed, args.dataloader_drop_last
        )
        streamed = isinstance(rows, IterableDataset)
        if sampler is None and not streamed:
            return outlive_signals(super().get_train_dataloader())
        given = {name: getattr(args, f"dataloader_{name}") for name in LOADER_SETTINGS}
        given |= {"batch_size": args.train_batch_size, "collate_fn": self.data_collator}
        start = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
        given |= {} if streamed else {"sampler": sampler, "drop_last": args.dataloader_drop_last}
        apart = streamed and 1 < args.world_size <= rows.num_shards
        if apart:  # each process reads files of its own, which accelerate sees of a bare stream alone
            rows = rows.shard(args.world_size, args.process_index)
        loader = DataLoader(Passes(rows) if streamed else rows, worker_init_fn=start, **given)
        if apart:
            return outlive_signals(prepare_data_loader(loader, args.device, 1, 0, put_on_device=True))
        return outlive_signals(self.accelerator.prepare(loader))

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps > 0:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, *args, **kwargs)

    def get_eval_dataloader(self, *args, **kwargs) -> torch.utils.data.DataLoader:
        return outlive_signals(super().get_eval_dataloader(*args, **kwargs))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        row_index = inputs.pop(ROW_INDEX_COLUMN, None)
        own_head = return_outputs or self.label_smoother is not None or self.compute_loss_func is not None
        compact = inputs["input_ids"].device.type == "cpu" and not own_head and not self.args.torch_compile
        watched = self.watch(inputs) if self.model.training else nullcontext()
        with watched, self.supervised_head(inputs) if compact else nullcontext(inputs) as given:
            result = super().compute_loss(model, given, return_outputs, num_items_in_batch)
        if self.model.training and "attention_mask" in inputs:
            self.finite_guard.check_loss(result[0] if return_outputs else result, inputs, row_index)
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs |= self.watch.take(self.accelerator)
            if self.packing is not None and self.packing.positions[1]:
                # of the positions of the batches, those that this process's language model saw
                logs["positions_left"] = round(self.packing.positions[0] / self.packing.positions[1], 4)
        super().log(logs, start_time)

    # ---- running ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        self.resumed_from = checkpoint_to_continue(resume_from_checkpoint, self.args.output_dir)
        with self._sole_writer():
            return self._train(**kwargs)

    def _sole_writer(self):
        """The lock on `output_dir`, in the process that writes."""
        return lock(lock_of(self.args.output_dir)) if self.args.should_save else nullcontext()

    def save_final(self, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """See [`CheckpointMixin.save_final`]; under the lock of `train`."""
        with self._sole_writer():
            return super().save_final(extra)

    def _train(self, **kwargs):
        if not self._trained:  # what this trainer has written itself it may replace
            check_output(self.args, self.resumed_from)
        self._trained = True
        self.setting_changes = compare_settings(self, self.resumed_from)
        for change in self.setting_changes:
            logger.warning(
                f"{change['setting']} changed from {change['before']} to {change['after']} at step {change['step']}."
            )
        self._record_before = read_record(self.resumed_from)
        self.watch.start()
        self.finite_guard.batches = []
        self.remove_unfinished()
        self.forget_generations_after(read_state(self.resumed_from).get("global_step", 0))
        self._report_first_batch()
        self._started = time.perf_counter()
        # older checkpoints go once a new one is whole (`finish_checkpoint`), which transformers does not wait for
        self.checkpoints_kept, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with self.stop_callback:
                output = super().train(resume_from_checkpoint=self.resumed_from, **kwargs)
        except BaseException as error:
            self._close_progress_bar()
            self.raise_save_error(error)
            raise
        finally:
            self.args.save_total_limit = self.checkpoints_kept
        self.record = self.run_record()
        if self.stop_callback.stopped_by:
            raise self.stop_callback.error()
        return output

    def _report_first_batch(self):
        """What `aligngpt check` says, in short, once a run starts."""
        if self.args.check_rows and self.is_world_process_zero():
            from .first_batch import log_first_batch

            with torch.random.fork_rng(devices=[]):
                log_first_batch(self)

    def _close_progress_bar(self):
        """So that an error stands on a line of its own, below the bar."""
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.close()

    def run_record(self) -> dict[str, float]:
        """
        Counts of the whole run, the part before a checkpoint that it was continued from included: `seconds`, and
        `attended` of `positions`. Called in all processes at once.
        """
        kind = torch.float32 if self.args.device.type == "mps" else torch.float64
        positions = self.watch.positions.to(kind)
        if self.args.world_size > 1:
            positions = self.accelerator.reduce(positions, reduction="sum")
        attended, all_positions = positions.tolist()
        seconds = 0.0 if self._started is None else time.perf_counter() - self._started
        counts = {"seconds": seconds, "attended": attended, "positions": all_positions}
        return {name: value + self._record_before.get(name, 0.0) for name, value in counts.items()}

    def create_model_card(self, *args: Any, **kwargs: Any):
        """Does nothing: see the class."""

    def summary(self) -> dict[str, Any]:
        """What the run did, in plain values; see [`~summary.summarize`]."""
        return summarize(self)
