"""Train the tiny Llama of `parts/llama` on text alone: texts of `scene_text` first, then the drills of `drills`."""

import random
import string
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aligngpt_shared.files import new_folder

from .captions import NUMBERS
from .drills import COURSES, draw_phase
from .optimizer import build_optimizer
from .questions import QUESTION_TYPES, draw_questions
from .scene_text import (
    ANSWER,
    BOS,
    CELL_PLACES,
    CELLS,
    CHAT_TEMPLATE,
    IM_END,
    IM_START,
    PAD,
    UNKNOWN,
    Segment,
    chat_text,
    told_text,
)
from .scenes import BACKGROUNDS, draw_scenes
from .sprites import CATEGORIES, OBJECTS, plural


MAX_TOKENS = 512
_COMMON_WORDS = (
    "a an the at in on of is are was what which where how many kind thing things there image background some and or "
    "top bottom left right above below user assistant system hello yes no nothing not describe this it "
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer: every word of the world is one token, others are spelt, a newline is a token.

    Text is lower-cased; single spaces, punctuation and newlines survive decoding.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = [UNKNOWN, BOS, PAD, IM_START, IM_END]
    words = [*_COMMON_WORDS.split(), *NUMBERS, *BACKGROUNDS, *CATEGORIES, *OBJECTS]
    regular = {"s", "es"}
    irregular = [plural(name) for name in OBJECTS if plural(name).removeprefix(name) not in regular]
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = ["\n", *string.punctuation, *letters, *("##" + letter for letter in letters), "##es", *words, *irregular]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*special, *pieces]))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN, continuing_subword_prefix="##"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="removed"),
            pre_tokenizers.Split(Regex(r"\n|[^\w\s]"), behavior="isolated"),
        ]
    )
    # Decoding puts a space between words and takes it away again around newlines, marks and punctuation.
    glued = [decoders.Replace(f" {mark}", mark) for mark in ("\n", "?", ".", ",", "!", ":", ";", "'", IM_START, IM_END)]
    opened = [decoders.Replace(f"{mark} ", mark) for mark in ("\n", "'", IM_START, IM_END, BOS)]
    backend.decoder = decoders.Sequence([decoders.WordPiece("##", cleanup=False), *glued, decoders.Fuse(), *opened])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=IM_END,
        unk_token=UNKNOWN,
        pad_token=PAD,
        additional_special_tokens=[IM_START],
        model_max_length=MAX_TOKENS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama of 1.3 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,  # what is read is what is written: copying is learned in a fifth of the steps
        initializer_range=0.06,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[list[Segment]]) -> dict[str, torch.Tensor]:
    """Segments -> right-padded `input_ids`, `attention_mask`, `labels` (-100 where nothing is trained), each
    [batch, length], and `place_ids` [batch, length, 2]: the place words of cells, -1 elsewhere.
    """
    flat = tokenizer([text for segments in texts for text, _ in segments], add_special_tokens=False)["input_ids"]
    pieces = iter(flat)
    place_ids = [tokenizer.convert_tokens_to_ids(list(words)) for words in CELL_PLACES]
    rows: list[dict[str, list]] = []
    for segments in texts:
        row: dict[str, list] = {"input_ids": [], "labels": [], "place_ids": []}
        for (_, kind), piece in zip(segments, pieces, strict=False):
            row["input_ids"] += piece
            row["labels"] += piece if kind == ANSWER else [-100] * len(piece)
            row["place_ids"] += place_ids if kind == CELLS else [[-1, -1]] * len(piece)
        row["attention_mask"] = [1] * len(row["input_ids"])
        rows.append(row)
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": tokenizer.pad_token_id, "labels": -100, "place_ids": [-1, -1], "attention_mask": 0}
    return {
        key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
        for key, value in fill.items()
    }


def embed(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Embeddings [batch, length, hidden] of an encoded batch: words, plus the place words of cells."""
    table = model.get_input_embeddings()
    places = table(batch["place_ids"].clamp(min=0)) * (batch["place_ids"] >= 0).unsqueeze(-1)
    return table(batch["input_ids"]) + places.sum(dim=2)


class TextBatches(torch.utils.data.Dataset):
    """The batches of a course: batch `i` is drawn from (seed, `first` + i), and tells training scenes only."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        phases: list[tuple[str, int]],
        batch_size: int,
        seed: str,
        first: int = 0,
    ):
        self.tokenizer, self.batch_size, self.seed, self.first = tokenizer, batch_size, seed, first
        self.steps = [(name, step / steps) for name, steps in phases for step in range(steps)]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.seed}/{self.first + step}")
        return encode(self.tokenizer, draw_phase(*self.steps[step], self.batch_size, rng))


def soften(embeds: torch.Tensor, generator: torch.Generator, strength: float) -> torch.Tensor:
    """Blend each prompt embedding a little with another and add noise, because a projector never hits a word exactly.

    Args:
        embeds: [batch, length, hidden].
        generator: source of the noise.
        strength: largest share of the other word; the noise has up to this share of the embeddings' deviation.
    """
    batch, length, _ = embeds.shape
    share = strength * torch.rand(batch, length, 1, generator=generator)
    other = embeds.flatten(0, 1)[torch.randint(batch * length, (batch, length), generator=generator)]
    noise = torch.randn(embeds.shape, generator=generator) * embeds.detach().std() * share
    return embeds * (1 - share) + other.detach() * share + noise


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int = 200, seed: int = 1, told: bool = False
) -> dict[str, float]:
    """Share of questions on held-out scenes in words whose answer is written exactly (teacher-forced on earlier turns).

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        n: how many scenes, each with a question of every type it answers.
        seed: seeds scenes and questions.
        told: tell the scene in a sentence instead of in cell words.

    Returns:
        `all` and one figure for each question type.
    """
    model.eval()
    texts, types, rng = [], [], random.Random(seed)
    for scene in draw_scenes(n, seed, "heldout", unique=True):
        questions = draw_questions(scene, len(QUESTION_TYPES), rng)
        texts.append(told_text(scene, questions) if told else chat_text(scene, rng, questions, dropped=0.0))
        types.append([question.type for question in questions])
    batch = encode(tokenizer, texts)
    logits = model(inputs_embeds=embed(model, batch), attention_mask=batch["attention_mask"]).logits
    right = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]) | (batch["labels"][:, 1:] == -100)
    trained = batch["labels"][:, 1:] != -100
    hits: dict[str, list[bool]] = {kind: [] for kind in QUESTION_TYPES}
    for row, row_types in enumerate(types):
        starts = (trained[row] & ~torch.cat([torch.tensor([False]), trained[row, :-1]])).nonzero().flatten().tolist()
        for kind, start, end in zip(row_types, starts, [*starts[1:], trained.shape[1]], strict=True):
            hits[kind].append(bool(right[row, start:end].all()))
    every = [hit for values in hits.values() for hit in values]
    return {"all": sum(every) / len(every), **{kind: sum(values) / len(values) for kind, values in hits.items()}}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write model (float16 safetensors) and tokenizer to a folder; written beside, then renamed."""
    with new_folder(output, replace=True) as folder:
        model.save_pretrained(folder, state_dict={key: value.half() for key, value in model.state_dict().items()})
        tokenizer.save_pretrained(folder)


def train(
    output: Path,
    share: float = 1.0,
    batch_size: int = 32,
    softness: float = 0.25,
    seed: int = 0,
) -> dict[str, float]:
    """Pretrain the tiny Llama, course by course, and save it after each.

    Args:
        output: the folder to write.
        share: of the steps of `COURSES`.
        batch_size: conversations per step; twice as many captions.
        softness: `soften`'s strength.
        seed: seeds weights and data.

    Returns:
        The figures of `evaluate`, for scenes in cell words and (`told_...`) in sentences.
    """
    torch.manual_seed(seed)
    tokenizer, first = build_tokenizer(), 0
    model, generator, drawn = build_model(tokenizer), torch.Generator().manual_seed(seed), f"llama/{seed}"
    for number, (learning_rate, course) in enumerate(COURSES):
        if number == 2:
            # this course begins with what is saved, in float16: it can be taken alone
            model = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32, attn_implementation="sdpa")
            generator, drawn, first = torch.Generator().manual_seed(seed + 2), f"llama/{seed}/2", 0
        phases = [(name, max(1, round(steps * share))) for name, steps in course]
        batches = TextBatches(tokenizer, phases, batch_size, drawn, first)
        train_course(model, batches, learning_rate, softness, generator)
        first += len(batches)
        figures = {**evaluate(model, tokenizer)}
        figures |= {f"told_{key}": value for key, value in evaluate(model, tokenizer, told=True).items()}
        figures = {key: round(value, 3) for key, value in figures.items()}
        save(model, tokenizer, output)
        tqdm.write(f"llama: {', '.join(name for name, _ in phases)}: {figures}")
    return figures


def train_course(
    model: LlamaForCausalLM, batches: TextBatches, learning_rate: float, softness: float, generator: torch.Generator
) -> None:
    """Train on all batches once, under a schedule of their own."""
    steps = len(batches)
    optimizer, schedule = build_optimizer(list(model.parameters()), learning_rate, steps, longest_warmup=200)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4)
    model.train()
    progress = tqdm(enumerate(loader, start=1), total=steps, desc="llama", mininterval=10)
    for step, batch in progress:
        embeds = embed(model, batch)
        prompt = (batch["labels"] == -100).unsqueeze(-1)
        embeds = torch.where(prompt, soften(embeds, generator, softness), embeds)
        logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
