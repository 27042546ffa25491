"""
Batches of mixed rows: stage 2 with grouped batches beside plain SFTTrainer with LLaVA, and answering in batches of 8.

    python benchmarks/batching.py                      # the playground's parts; needs the extra `playground`
    python benchmarks/batching.py --device cuda --rows 4096 --batch 32

Training: the same rows (conversations of 1 to 21 turns about a drawn image, some without one), the same starting
weights, one epoch. Plain is what one does without this project: TRL's SFTTrainer, its collator, transformers' LLaVA.
Packed is with `pack_rows`. Answering: prompts of every length, with an image or not, eight at a time beside one by one;
the answers are the same. What came out: `batching.md`.
"""

import argparse
import copy
import random
import statistics
import tempfile
import warnings
from typing import Any

import common
import datasets
import torch
from common import Contender
from datasets import Dataset, Features, Image, List, Value
from pairs import llava_config
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from aligngpt_playground.questions import draw_questions
from aligngpt_playground.scene_text import cell_words
from aligngpt_playground.scenes import draw_scenes, render
from aligngpt_playground.world import parts_path
from aligngpt_trainers import AlignGPTInstructConfig, AlignGPTInstructTrainer
from modeling_aligngpt.assembly import assemble


PLAIN, RANDOM, GROUPED = "SFTTrainer + LLaVA", "AlignGPT, batches drawn at random", "AlignGPT, batches grouped"
PACKED, GROUPED_PACKED = f"{RANDOM}, packed", f"{GROUPED}, packed"
TURNS = (1, 1, 2, 3, 5, 8, 13, 21)
TEXT_SHARE = 0.1


def draw_rows(number: int, seed: int, split: str = "train") -> list[dict[str, Any]]:
    """Conversations of very different lengths, a tenth of them told in words in place of an image."""
    rng, rows = random.Random(f"{seed} {split}"), []
    for scene in draw_scenes(number, seed, split):
        turns, questions = rng.choice(TURNS), []
        while len(questions) < turns:
            questions += draw_questions(scene, min(6, turns - len(questions)), rng)
        has_image = rng.random() >= TEXT_SHARE
        messages = []
        for number_of_turn, question in enumerate(questions):
            content: list[dict[str, Any]] = [{"type": "text", "text": question.question}]
            if number_of_turn == 0 and has_image:
                content.insert(0, {"type": "image", "text": None})
            elif number_of_turn == 0:
                content[0]["text"] = f"{cell_words(scene, rng)} {question.question}"
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        rows.append({"images": [render(scene, rng.random())] if has_image else [], "messages": messages})
    return rows


def as_dataset(rows: list[dict[str, Any]]):
    text = Value("string")
    messages = {"role": text, "content": List({"type": text, "text": text})}
    return Dataset.from_list(rows, features=Features({"images": List(Image()), "messages": List(messages)}))


class Models:
    """One set of starting weights as AlignGPT and as LLaVA, and their processors."""

    def __init__(self):
        self.model, self.processor = assemble(
            parts_path("llama"), parts_path("clip"), chat_template="chatml", do_pad=True, align_mode="level"
        )
        config = copy.deepcopy(self.model.config)
        made = llava_config(config)
        made.image_token_index = made.image_token_id = config.image_token_id
        self.llava = LlavaForConditionalGeneration(made)
        weights = {name: value for name, value in self.model.state_dict().items() if ".align_" not in name}
        report = self.llava.load_state_dict(weights, strict=False)
        assert not report.unexpected_keys and not report.missing_keys, report
        self.llava_processor = LlavaProcessor(
            self.processor.image_processor,
            copy.deepcopy(self.processor.tokenizer),
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy="default",
            chat_template=self.processor.chat_template.replace("<align>", ""),
            num_additional_image_tokens=1,
        )


class Watch(TrainerCallback):
    """Seconds from the first step to the last; `counts` of the collator begin with it."""

    def __init__(self, args: argparse.Namespace, counts: list[int]):
        self.device, self.clock, self.counts, self.seconds = torch.device(args.device), args.clock, counts, 0.0

    def on_train_begin(self, *_, **__):
        self.counts[:] = 0, 0
        self.begin = common.now(self.device, self.clock)

    def on_train_end(self, *_, **__):
        self.seconds = common.now(self.device, self.clock) - self.begin


def make_trainer(name: str, models: Models, rows, args: argparse.Namespace, folder: str) -> SFTTrainer:
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": args.batch,
        "num_train_epochs": 1,
        "learning_rate": args.learning_rate,
        "max_length": 1024,
        "save_strategy": "no",
        "logging_steps": 10_000,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "bf16": args.device != "cpu",
        "gradient_checkpointing": False,
        "seed": args.seed,
    }
    if name == PLAIN:
        config = SFTConfig(assistant_only_loss=True, lr_scheduler_type="cosine", warmup_steps=0.03, **settings)
        llava = copy.deepcopy(models.llava)
        # as LLaVA trains, and as AlignGPT does: the tower stays as it is
        llava.model.vision_tower.requires_grad_(False)
        trainer = SFTTrainer(llava, config, train_dataset=rows, processing_class=models.llava_processor)
    else:
        group_by = "modality_length" if name in (GROUPED, GROUPED_PACKED) else "none"
        packed = name in (PACKED, GROUPED_PACKED)
        config = AlignGPTInstructConfig(group_by=group_by, pack_rows=packed, allow_unaligned=True, **settings)
        model = copy.deepcopy(models.model)
        trainer = AlignGPTInstructTrainer(model, config, rows, processing_class=copy.deepcopy(models.processor))
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(name: str, models: Models, rows, held_out, args: argparse.Namespace) -> dict[str, float]:
    """One epoch: seconds, share of padding, and the loss on held-out rows."""
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(name, models, rows, args, folder)
        collator, counts = trainer.data_collator, [0, 0]
        collate, watch = collator.torch_call, Watch(args, counts)

        def counting(batch):
            made = collate(batch)
            counts[0] += int(made["attention_mask"].sum())
            counts[1] += made["attention_mask"].numel()
            return made

        collator.torch_call = counting
        trainer.add_callback(watch)
        trainer.train()
        loss = held_out_loss(trainer.model, collate, held_out)
    return {"seconds": watch.seconds, "waste": 1 - counts[0] / counts[1], "attended": counts[0], "loss": loss}


@torch.no_grad()
def held_out_loss(model, collate, held_out) -> float:
    """Mean over supervised tokens."""
    model.eval()
    total, number = 0.0, 0
    for row in held_out:
        batch = collate([copy.deepcopy(row)])
        batch = {key: value.to(model.device) for key, value in batch.items() if key != "row_index"}
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * supervised
        number += supervised
    return total / number


def measure_training(models: Models, args: argparse.Namespace) -> dict[str, Any]:
    rows = as_dataset(draw_rows(args.rows, args.seed))
    held_out = list(as_dataset(draw_rows(max(8, args.rows // 16), args.seed, "heldout")))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in (PLAIN, RANDOM, GROUPED, PACKED, GROUPED_PACKED)}
    for number in range(-min(args.warmup, 1), args.repeats):
        for name in runs if number % 2 == 0 else reversed(runs):
            run = train(name, models, rows, held_out, args)
            if number >= 0:
                runs[name].append(run)
    lines = []
    for name, done in runs.items():
        middle = {key: statistics.median(run[key] for run in done) for key in done[0]}
        faster = common.Measured({n: [run["seconds"] for run in r] for n, r in runs.items()}).ratio(PLAIN, name)
        lines.append(
            [name, f"{middle['attended'] / middle['seconds']:.0f}", f"{args.rows / middle['seconds']:.1f}",
             "" if name == PLAIN else common.spread(faster), f"{middle['waste']:.1%}", f"{middle['loss']:.4f}"]
        )  # fmt: skip
    columns = ["stage 2 with", "tokens/s, padding not counted", "rows/s", "times as fast (quartiles)", "padding"]
    common.print_table([*columns, "held-out loss"], lines)
    return runs


def measure_answers(models: Models, args: argparse.Namespace) -> dict[str, Any]:
    """Greedy answers to held-out prompts by AlignGPT, one by one and eight at a time."""
    model, processor = copy.deepcopy(models.model).to(args.device).eval(), models.processor
    model.config.align_mode = "gate"
    processor.tokenizer.padding_side = "left"
    rows = draw_rows(args.prompts, args.seed + 1, "heldout")
    chats = [
        [{"role": m["role"], "content": [dict(p) for p in m["content"]]} for m in row["messages"][:-1]] for row in rows
    ]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    search = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
    answers: dict[int, list] = {}

    def ask(size: int) -> None:
        found = []
        for start in range(0, len(rows), size):
            images = [row["images"] for row in rows[start : start + size]]
            inputs = processor(images=images if any(images) else None, text=texts[start : start + size],
                               padding=True, return_tensors="pt").to(args.device)  # fmt: skip
            found += model.generate(**inputs, **search)[:, inputs["input_ids"].shape[1] :].tolist()
        answers[size] = found

    contenders = {"one by one": Contender(lambda: ask(1)), "eight at a time": Contender(lambda: ask(8))}
    measured = common.interleave(contenders, torch.device(args.device), args.repeats, 1, args.clock)
    equal = sum(a == b for a, b in zip(answers[1], answers[8], strict=True))
    ratio = measured.ratio("one by one", "eight at a time")
    lines = []
    for name in contenders:
        rate = args.prompts * args.tokens / measured.median(name)
        lines.append([name, f"{rate:.0f}", common.spread(ratio) if name == "eight at a time" else ""])
    common.print_table(["answers to mixed prompts", "tokens/s", "times as fast (quartiles)"], lines)
    print(f"{equal} of {args.prompts} answers are the same, token for token.\n")
    return {"seconds": measured.seconds, "ratio": ratio, "equal": equal, "prompts": args.prompts}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser, "batching", repeats=3, scales=["playground"])
    parser.add_argument("--rows", type=int, default=1024, help="conversations of an epoch, default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step, default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--prompts", type=int, default=64, help="prompts to answer, default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    common.start(args)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    facts = common.machine(args)
    common.print_header(facts)
    models = Models()
    training = measure_training(models, args)
    answers = measure_answers(models, args)
    common.write_json(args.output, {"machine": facts, "training": training, "answers": answers})


if __name__ == "__main__":
    main()
