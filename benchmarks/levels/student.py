"""The model of every arm, on image features that the tower has read once; forward and training in one page.

Modules and their arithmetic are the product's own (`tests/benchmarks/test_levels.py` compares the logits). Suffixes: B
rows, T positions, D hidden size.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from aligngpt_playground import parts_path
from modeling_aligngpt.assembly import assemble

from .arms import LEVELS, Arm, Rows


QUESTION = "describe the picture."
TOP = LEVELS - 1


@dataclass(frozen=True)
class Format:
    """Text in front of the image, between image and answer, and behind the answer."""

    before: str
    between: str
    end: str


CAPTION = Format("", "", "\n")
ANSWER = Format("<|im_start|>user\n", f"\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")


class Student:
    """
    Projector, level table, gate and language model.

    Args:
        language_model: folder; the package's by default.
        seed: of what is initialised.
        tower_width: of the image features; the package's tower by default.
    """

    def __init__(self, language_model: Path | None = None, seed: int = 0, tower_width: int | None = None):
        torch.manual_seed(seed)
        self.model, processor = assemble(language_model or parts_path("llama"), parts_path("clip"))
        if tower_width is not None:
            projector = self.model.model.multi_modal_projector
            own, projector.linear_1 = projector.linear_1, nn.Linear(tower_width, projector.linear_1.out_features)
            nn.init.normal_(projector.linear_1.weight, std=float(own.weight.detach().std()))
            nn.init.zeros_(projector.linear_1.bias)
        self.model.train()
        self.tokenizer = processor.tokenizer
        self.words = self.model.get_input_embeddings()
        words = self.words.weight.detach().norm(dim=-1)
        self.word_length = words.mean()
        self.bos = self.ids("<s>")

    def ids(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def prefix(self, arm: Arm, form: Format, features: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Embeddings [B, T, D] of all in front of the answer, and the projected image [B, 16, D]."""
        core, rows = self.model.model, len(features)
        images = core.multi_modal_projector(features)
        before, between = self.words(self.ids(form.before)), self.words(self.ids(form.between))
        parts = [self.words(self.bos).expand(rows, -1, -1)]
        if arm.cut is not None and not arm.as_text:
            parts.append(self.align_vectors(arm, images, levels, torch.cat([before, between])).unsqueeze(1))
        parts += [before.expand(rows, -1, -1), images, between.expand(rows, -1, -1)]
        if arm.as_text:
            digits = torch.stack([self.ids(str(level)) for level in range(LEVELS)])
            parts.append(self.words(digits[levels]))
        return torch.cat(parts, dim=1), images

    def align_vectors(self, arm: Arm, images: torch.Tensor, levels: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        core = self.model.model
        if not arm.mixed:
            return core.align_embeddings(levels)
        rows = torch.arange(len(images))
        mean = prompt.mean(0).expand(len(images), -1)
        weights = core.get_gate_weights(images, rows, mean)
        table = core.align_embeddings.weight
        return weights @ table[:-1] + table[-1]

    def states(self, embeds: torch.Tensor) -> torch.Tensor:
        return self.model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def answer_losses(self, arm: Arm, form: Format, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cross-entropy [B, T] of the answers' tokens, the mask [B, T] of those, and the projected images."""
        prefix, images = self.prefix(arm, form, rows.features, rows.levels)
        answers = [self.ids(text + form.end) for text in rows.texts]
        longest = max(map(len, answers))
        ids = torch.stack([nn.functional.pad(row, (0, longest - len(row))) for row in answers])
        mask = torch.stack([torch.arange(longest) < len(row) for row in answers])
        # padding is on the right and attention looks to the left: nothing sees it
        states = self.states(torch.cat([prefix, self.words(ids)], dim=1))[:, prefix.shape[1] - 1 : -1]
        losses = torch.zeros(ids.shape)
        losses[mask] = nn.functional.cross_entropy(self.model.lm_head(states[mask]), ids[mask], reduction="none")
        return losses, mask, images

    @torch.no_grad()
    def write(self, arm: Arm, form: Format, features: torch.Tensor, level: int = TOP, batch: int = 100) -> list[str]:
        """Greedy answers to images, asked at a level where the arm has any."""
        self.model.eval()
        end = int(self.ids(form.end)[0])
        texts = []
        for start in range(0, len(features), batch):
            part = features[start : start + batch]
            prefix, _ = self.prefix(arm, form, part, torch.full((len(part),), level))
            written = self._greedy(prefix, end)
            texts += [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]
        self.model.train()
        return texts

    def _greedy(self, embeds: torch.Tensor, end: int, tokens: int = 40) -> torch.Tensor:
        written = torch.full((len(embeds), 0), end)
        done = torch.zeros(len(embeds), dtype=torch.bool)
        cache = None
        for _ in range(tokens):
            out = self.model.model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            following = self.model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
            following = torch.where(done, torch.tensor(end), following)
            written = torch.cat([written, following[:, None]], dim=1)
            done |= following == end
            if done.all():
                break
            embeds = self.words(following)[:, None]
        return torch.where(written == end, torch.tensor(self.tokenizer.pad_token_id), written)


@dataclass(frozen=True)
class Budget:
    """Steps, rows a step, peak rate of the projector (and gate), and of the language model (0: frozen)."""

    steps: int = 300
    batch: int = 32
    rate: float = 4e-3
    language_rate: float = 0.0


def train(student: Student, arm: Arm, form: Format, rows: Rows, budget: Budget, seed: int) -> float:
    """Trains in place; returns the mean loss of the last tenth. Order and steps are the same for all arms of a seed."""
    core = student.model.model
    groups = [{"params": [*core.multi_modal_projector.parameters(), *core.align_gate.parameters()], "lr": budget.rate}]
    groups.append({"params": list(core.align_embeddings.parameters()), "lr": budget.rate * arm.table_rate})
    student.model.requires_grad_(False)
    if budget.language_rate:
        groups.append({"params": list(core.language_model.parameters()), "lr": budget.language_rate})
        # stage 2 leaves the table as stage 1 made it
        groups[1]["params"] = groups[1]["params"] if form is CAPTION else []
    groups = [group for group in groups if group["params"]]
    trained = [parameter for group in groups for parameter in group["params"]]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = math.ceil(0.03 * budget.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup,
            0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, budget.steps - warmup))),
        ),
    )
    draw, order, late = torch.Generator().manual_seed(seed), torch.zeros(0, dtype=torch.long), []
    for step in range(budget.steps):
        while len(order) < budget.batch:
            order = torch.cat([order, torch.randperm(len(rows.texts), generator=draw)])
        chosen, order = order[: budget.batch], order[budget.batch :]
        batch = Rows(rows.features[chosen], [rows.texts[row] for row in chosen], rows.levels[chosen])
        losses, mask, images = student.answer_losses(arm, form, batch)
        loss = losses.sum() / mask.sum()
        if form is CAPTION and arm.penalty:
            scale = images.norm(dim=-1) / student.word_length
            loss = loss + arm.penalty * scale.log().square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step >= 0.9 * budget.steps:
            late.append(float(losses.sum() / mask.sum()))
    student.model.requires_grad_(False)
    return sum(late) / len(late)
