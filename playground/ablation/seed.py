"""One seed of the ablation: its models of stage 1, and stage 2 of every variant with its figures."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aligngpt_shared.files import write_json

from .. import measures
from ..captions import DESCRIBE
from ..evaluate import question_table, questions_of, scenes_of
from .rows import (
    BOTH,
    SometimesWithout,
    Without,
    added_scores,
    make_world,
    noisy_rows,
    part,
    score,
    silent,
    stage_one_rows,
    truly_scored,
)
from .variants import PRETRAINS, Settings, Variant, run_path


def run_seed(
    seed: int,
    variants: tuple[Variant, ...],
    settings: Settings,
    output: str,
    parts: str | None,
    keep: bool = False,
    after_run: Callable[[], None] | None = None,
) -> None:
    """All variants of a seed that are not there yet."""
    import datasets
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = Path(output) / f"seed-{seed}"
    for variant in variants:
        path = run_path(Path(output), seed, variant)
        if path.is_file():
            continue
        work = SeedRuns(folder, seed, settings, make_world(folder, seed, settings, parts), parts)
        write_json(path, {"variant": variant.name, "seed": seed, **work.instruct(variant)})
        if after_run:
            after_run()
    if not keep:
        for name in ("pretrain", "world"):
            shutil.rmtree(folder / name, ignore_errors=True)


class SeedRuns:
    """What the runs of a seed share.

    Args:
        folder: of the seed.
        seed: of initialisation and order.
        settings: of the whole ablation.
        world: the seed's data.
        parts: folder of the tiny parts, by default the package's.
    """

    def __init__(self, folder: Path, seed: int, settings: Settings, world: Path, parts: str | None):
        self.folder, self.seed, self.settings, self.world, self.parts = folder, seed, settings, world, parts

    # ---- stage 1 ----

    def pretrained(self, name: str) -> Path:
        """Folder of a stage-1 model, trained unless it is there, with its figures in `captions.json`."""
        from aligngpt_trainers import AlignGPTPretrainConfig, AlignGPTPretrainTrainer
        from modeling_aligngpt.assembly import assemble

        output, variant = self.folder / "pretrain" / name, PRETRAINS[name]
        if (output / "captions.json").is_file():
            return output
        rows = stage_one_rows(self._scored("pairs", variant.scorer), variant, self.seed)
        model, processor = assemble(
            part(self.parts, "llama"),
            part(self.parts, "clip"),
            num_align_levels=variant.num_align_levels,
            seed=self.seed,
        )
        config = AlignGPTPretrainConfig(
            output_dir=str(output),
            max_steps=self.settings.pretrain_steps,
            per_device_train_batch_size=self.settings.batch_size,
            gradient_accumulation_steps=1,
            learning_rate=self.settings.pretrain_learning_rate,
            image_token_penalty=self.settings.image_token_penalty,
            adam_beta2=0.98,
            **self._common(),
        )
        seconds = time.perf_counter()
        with silent():
            trainer = AlignGPTPretrainTrainer(model, config, rows, processing_class=processor)
            if variant.levels == "none":
                trainer.data_collator = Without(trainer.data_collator, model.config.align_token_id)
            trainer.train()
            trainer.save_final()
        seconds = time.perf_counter() - seconds
        figures = self._stage_one_figures(trainer.model, processor, variant.levels == "none")
        write_json(output / "captions.json", {**figures, "seconds": seconds})
        return output

    def _scored(self, name: str, scorer: str):
        """Pairs, or noisy descriptions, with the scores of a scorer (see `PretrainVariant`)."""
        from datasets import load_from_disk

        data, by_clip = self.world / "data" / name, self.world / f"scored-{name}"
        if scorer == "clip":
            return load_from_disk(str(by_clip))
        if scorer == "truth":
            return truly_scored(load_from_disk(str(data)), load_from_disk(str(by_clip)))
        judge = scorer.removeprefix(BOTH)
        judged = load_from_disk(str(score(data, self.pretrained(judge), self.world / f"{judge}-{name}")))
        if judge == scorer:
            return judged
        # other rows' scores are standardised as the pairs' are, whose edges their levels are cut at
        pairs = None if name == "pairs" else (self._scored("pairs", "clip"), self._scored("pairs", judge))
        return added_scores(load_from_disk(str(by_clip)), judged, pairs)

    def _stage_one_figures(self, model, processor, without: bool) -> dict[str, Any]:
        from datasets import load_from_disk

        heldout = load_from_disk(str(self.world / "heldout" / "pairs"))["heldout"]
        images, scenes = heldout["image"][:], scenes_of(heldout)
        asked = self._loaded(model, processor, without)
        if without:
            return measures.describe_captions(asked.caption(images), scenes)
        return {
            # the top level is the model's default
            **measures.describe_captions(asked.caption(images), scenes),
            "by_level": measures.by_level(asked, images, scenes, None),
            "judged": {
                **measures.judge_captions(asked, None, self.settings.heldout),
                "CLIP": measures.score_captions(str(part(self.parts, "clip")), self.settings.heldout),
            },
        }

    # ---- stage 2 ----

    def instruct(self, variant: Variant, save_to: Path | None = None) -> dict[str, Any]:
        """Stage 2 and its held-out figures; the model is kept where `save_to` says."""
        from datasets import load_from_disk

        from aligngpt_trainers import AlignGPTInstructConfig, AlignGPTInstructTrainer
        from aligngpt_trainers.lora import LoraArguments, lora_config
        from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

        folder = self.pretrained(variant.pretrain)
        without = PRETRAINS[variant.pretrain].levels == "none"
        model = AlignGPTForConditionalGeneration.from_pretrained(folder, dtype="float32")
        processor = AlignGPTProcessor.from_pretrained(folder)
        heldout = load_from_disk(str(self.world / "heldout" / "conversations"))["heldout"]
        rows = self._instruction_rows(variant)
        rank = self.settings.lora_r
        batch_size = self.settings.instruct_batch_size or self.settings.batch_size
        steps = -(-self.settings.conversations // batch_size) * self.settings.instruct_epochs
        config = AlignGPTInstructConfig(
            output_dir=str(save_to or self.world / "unused"),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=64,
            learning_rate=self.settings.instruct_learning_rate,
            align_mode=variant.align_mode,
            **self._common(),
        )
        # rows' own levels are not there for the held-out conversations
        compared = None if variant.data == "noisy" else heldout
        seconds = time.perf_counter()
        with silent():
            trainer = AlignGPTInstructTrainer(
                model,
                config,
                rows,
                eval_dataset=compared,
                processing_class=processor,
                peft_config=lora_config(LoraArguments(use_peft=True, lora_r=rank), model) if rank else None,
            )
            if without:
                trainer.data_collator = Without(trainer.data_collator, model.config.align_token_id)
            if variant.without_level:
                trainer.data_collator = SometimesWithout(
                    trainer.data_collator, processor, variant.without_level, self.seed
                )
            trainer.train()
            if save_to is not None:
                trainer.save_final()
            seconds = time.perf_counter() - seconds
            figures: dict[str, Any] = {}
            if compared is not None:
                figures["loss"] = trainer.evaluate()["eval_loss"]
                figures["loss_by_level"] = measures.loss_by_level(trainer) if variant.group == "method" else None
        trained = trainer.model.merge_and_unload() if rank else trainer.model
        asked = self._loaded(trained, processor, without)
        figures |= self._noisy_figures(asked, without) if variant.data == "noisy" else self._answers(asked, heldout)
        if not without:
            question = DESCRIBE if variant.data == "noisy" else None
            figures["judged"] = measures.judge_captions(asked, question, self.settings.heldout)
        weights = figures.pop("weights")
        gated = variant.align_mode in ("gate", "local", "random") and not without
        columns = list(zip(*weights, strict=True)) if gated else []
        return {
            **figures,
            "captions": json.loads((folder / "captions.json").read_text(encoding="utf-8")),
            "gate": [{"mean": measures.mean(column), "spread": measures.spread(column)} for column in columns],
            "align_norm": measures.align_norm(trained),
            "seconds": round(seconds, 2),
        }

    def _instruction_rows(self, variant: Variant):
        from datasets import load_from_disk

        if variant.data == "clean":
            return load_from_disk(str(self.world / "data" / "conversations"))["train"]
        stage1 = PRETRAINS[variant.pretrain]
        pairs, scored = (self._scored(name, variant.scorer) for name in ("pairs", "noisy"))
        return noisy_rows(scored, variant, pairs, stage1.num_align_levels, stage1.binning)

    def _answers(self, asked: measures.LoadedModel, heldout) -> dict[str, Any]:
        """Held-out questions, each asked alone."""
        pairs = [(row["images"][0], question) for row in heldout for question in questions_of(row)]
        questions = [question for _, question in pairs]
        answers, weights = asked.answer([image for image, _ in pairs], [question.question for question in questions])
        table, overall = question_table(answers, questions, questions)
        # POPE's way to see a bias
        yes = [text.lower().startswith("yes") for text, q in zip(answers, questions, strict=True) if q.type == "yesno"]
        return {
            "questions": {row.name: row.accuracy for row in [*table, overall]},
            "yes_share": measures.mean(yes) if yes else None,
            "weights": weights,
        }

    def _noisy_figures(self, asked: measures.LoadedModel, without: bool) -> dict[str, Any]:
        """Held-out descriptions as the model gives them by itself, and at each level."""
        from datasets import load_from_disk

        heldout = load_from_disk(str(self.world / "heldout" / "pairs"))["heldout"]
        images, scenes = heldout["image"][:], scenes_of(heldout)
        texts, weights = asked.answer(images, [DESCRIBE] * len(images))
        figures = {"descriptions": measures.describe_captions(texts, scenes), "weights": weights}
        if not without:
            figures["by_level"] = measures.by_level(asked, images, scenes, DESCRIBE)
        return figures

    # ---- small helpers ----

    def _loaded(self, model, processor, without: bool) -> measures.LoadedModel:
        return measures.LoadedModel(model, Without(processor, model.config.align_token_id) if without else processor)

    def _common(self) -> dict[str, Any]:
        return {
            "max_length": 256,
            "use_cpu": True,
            "bf16": self.settings.bf16,
            "gradient_checkpointing": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            # what a stopped run has left of a stage is begun anew
            "overwrite": True,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": self.seed,
        }
