"""Answers by generation at each evaluation, with what the gate weighed, beside the evaluation's loss."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from datasets import IterableDataset
from trl.models.utils import unwrap_model_for_generation

from aligngpt_shared.files import write_file

from .answer_tables import report_answers
from .collator import IGNORE_INDEX, ROW_INDEX_COLUMN


GENERATIONS_NAME = "generations.jsonl"

# Takes the records of `generate_answers`, gives metrics by name.
GenerationMetrics = Callable[[list[dict[str, Any]]], dict[str, float]]


class GenerationMixin:
    """
    Evaluation with answers by generation. Overridden of `transformers.Trainer`:

    - `evaluation_loop`: adds the metrics of `eval_generations` held-out rows to the evaluation's, so that they are
      logged, reported (TensorBoard, Trackio) and may choose the best checkpoint.
    - `evaluate`: leaves the random state alone, so that evaluating does not change training.
    """

    generation_metrics: GenerationMetrics | None = None

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        settings = self.args
        if settings.eval_generations and description == "Evaluation":
            rows = _choose(dataloader.dataset, settings.eval_generations)
            records = generate_answers(self, rows, len(rows), settings.eval_generation_tokens)
            metrics = summarize_generations(records)
            if self.generation_metrics is not None:
                metrics |= self.generation_metrics(records)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
            if settings.should_save:
                append_records(self._generations_path(), records, step=self.state.global_step, data=metric_key_prefix)
            if self.is_world_process_zero():
                report_answers(self, records, rows, metric_key_prefix)
        return output

    def forget_generations_after(self, step: int):
        """Of a run that starts again from a step, takes out the answers of later ones."""
        if self.args.should_save:
            forget_later_records(self._generations_path(), step)

    def _generations_path(self) -> Path:
        return Path(self.args.output_dir) / GENERATIONS_NAME


def generate_answers(trainer: Any, rows: Any, number: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """
    The model's greedy first answers to rows spread over a data set, shared between the processes; the same list in all
    of them.

    Args:
        trainer: a `StageTrainer`. rows: prepared rows, map-style or streamed.
        number: of rows. max_new_tokens: of an answer.

    Returns:
        For each row `row` (its `id` or position), `prompt`, `reference`, `answer`, `match` (equal but for spaces at the
        ends) and `align_weights` (list of N floats; `None` without an image or without a gate).
    """
    chosen = _choose(rows, number)
    rank, world_size = trainer.args.process_index, trainer.args.world_size
    # sharded models need as many calls in each process: the last row again where there is none left
    rounds = -(-len(chosen) // world_size)
    mine = [min(round_ * world_size + rank, len(chosen) - 1) for round_ in range(rounds)]
    records = []
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model, torch.no_grad():
        training = model.training
        model.eval()
        for index in mine:
            records.append((index, _answer(trainer, model, chosen[index], max_new_tokens)))
        model.train(training)
    if world_size > 1:
        records = gather_object(records)
    by_index = dict(records)
    return [by_index[index] for index in range(len(chosen))]


def _choose(rows: Any, number: int) -> list[dict[str, Any]]:
    if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
        return list(itertools.islice(iter(rows), number))
    indices = np.unique(np.linspace(0, len(rows) - 1, min(number, len(rows))).astype(int))
    return [rows[int(index)] for index in indices]


def _answer(trainer: Any, model: torch.nn.Module, row: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """One row's record. Only the first answer is asked for: what stands before it is the prompt."""
    batch = trainer.data_collator([row])
    input_ids, labels = batch["input_ids"][0], batch["labels"][0]
    supervised = (labels != IGNORE_INDEX).nonzero().flatten().tolist()
    begin = supervised[0]
    end = next((p for p in range(begin, len(labels)) if labels[p] == IGNORE_INDEX), len(labels))
    config, tokenizer = trainer.model.config, trainer.processing_class.tokenizer
    prompt = {"input_ids": input_ids[None, :begin], "attention_mask": torch.ones(1, begin, dtype=torch.long)}
    num_images = int((prompt["input_ids"] == config.image_token_id).sum()) // config.image_seq_length
    if num_images:
        prompt["pixel_values"] = batch["pixel_values"][:num_images]
    prompt = send_to_device(prompt, trainer.args.device)
    # all processes take as many steps where each step gathers weights; transformers does not see FSDP2 by itself
    synced = {"synced_gpus": True} if trainer.is_fsdp_enabled and trainer.args.world_size > 1 else {}
    with trainer.compute_loss_context_manager():
        generated = model.generate(
            **prompt,
            **synced,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
        )
    gates = num_images and config.uses_gate
    weights = generated.align_weights[0].float().tolist() if gates else None
    answer = tokenizer.decode(generated.sequences[0, begin:], skip_special_tokens=True).strip()
    reference = tokenizer.decode(input_ids[begin:end], skip_special_tokens=True).strip()
    shown = [token for token in prompt["input_ids"][0].tolist() if token != config.image_token_id]
    return {
        "row": row.get("id", row.get(ROW_INDEX_COLUMN)),
        "prompt": tokenizer.decode(shown, skip_special_tokens=True).strip(),
        "reference": reference,
        "answer": answer,
        "match": answer == reference,
        "align_weights": weights,
    }


def summarize_generations(records: list[dict[str, Any]]) -> dict[str, float]:
    """`answer_match`, the share of exact answers, and `align_weight_k`, the mean share of level k."""
    metrics = {"answer_match": float(np.mean([record["match"] for record in records]))} if records else {}
    weights = [record["align_weights"] for record in records if record["align_weights"] is not None]
    if weights:
        metrics |= {f"align_weight_{level}": float(mean) for level, mean in enumerate(np.mean(weights, axis=0))}
    return metrics


def append_records(path: Path, records: list[dict[str, Any]], **more: Any):
    """Adds a line of JSON for each record, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({**more, **record}, ensure_ascii=False) + "\n" for record in records)
    with open(path, "a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def forget_later_records(path: Path, step: int):
    """Keeps the lines up to a step, for a run that is continued from there (0: none); a line cut off goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_file(path, "".join(kept if step else []))
