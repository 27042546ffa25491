"""
What the alignment costs: AlignGPT beside transformers' own LLaVA of the very same tower, projector and language model.

    python benchmarks/overhead.py                                 # 5M weights, 640 positions, one core
    python benchmarks/overhead.py --scale medium --threads 2
    python benchmarks/overhead.py --device cuda --scale 1b --dtype bfloat16
    python benchmarks/overhead.py --profile prefill               # where the time goes

Both read rows of the same length, LLaVA with one more word in place of `<align>`. Two more contenders show the limit:
`parts`, tower and projector, and the language model fed finished embeddings; and that language model alone.
What is measured and what came out: `overhead.md`.
"""

import argparse
from collections.abc import Callable
from typing import Any

import common
import torch
from common import Contender
from pairs import SCALES, Rows, make_pair, make_rows
from torch import nn


WORKS = ("prefill", "decode", "generate", "stage1", "stage2")


def forward_of(model: nn.Module, inputs: dict[str, torch.Tensor], **kwargs) -> Contender:
    def run():
        with torch.no_grad():
            model(**inputs, logits_to_keep=1, **kwargs)

    return Contender(run)


class Parts(nn.Module):
    """The modules of a model one behind the other, with nothing done between them."""

    def __init__(self, model, rows: Rows, with_images: bool):
        super().__init__()
        self.inner, self.head, self.loss_function = model.model, model.lm_head, model.loss_function
        self.vocab_size = model.config.text_config.vocab_size
        self.layer, self.with_images = model.config.vision_feature_layer, with_images
        with torch.no_grad():
            self.embeds = self.inner.get_input_embeddings()(rows.ours["input_ids"])
        self.rows = rows

    def forward(self, labels: torch.Tensor | None = None, logits_to_keep: int = 0):
        projected = None
        if self.with_images:
            with torch.no_grad():
                states = self.inner.vision_tower(self.rows.ours["pixel_values"], output_hidden_states=self.layer)
            projected = self.inner.multi_modal_projector(states.hidden_states[self.layer][:, 1:])
        embeds = self.embeds if labels is None else self.embeds.clone().requires_grad_()
        mask = self.rows.ours["attention_mask"]
        hidden = self.inner.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        logits = self.head(hidden[:, -logits_to_keep:])
        if labels is None:
            return logits
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size)
        # the image's embeddings get a gradient each, as they do inside the model
        return loss if projected is None else (loss, projected)


def prefill(model, llava, rows: Rows, args) -> dict[str, Contender]:
    return {
        "aligngpt": forward_of(model, rows.ours),
        "llava": forward_of(llava, rows.llava),
        "parts": forward_of(Parts(model, rows, with_images=True), {}),
        "language model": forward_of(Parts(model, rows, with_images=False), {}),
    }


def decode(model, llava, rows: Rows, args) -> dict[str, Contender]:
    """`--tokens` greedy steps behind a prompt that is in the cache already."""

    def contender(prompt_of: Callable, step_of: Callable, ids: torch.Tensor) -> Contender:
        mask = rows.ours["attention_mask"]

        def prepare():
            with torch.no_grad():
                return prompt_of()

        def run(cache):
            with torch.no_grad():
                token, attended = ids[:, -1:], mask
                for _ in range(args.tokens):
                    attended = torch.cat([attended, attended[:, :1]], dim=1)
                    token = step_of(token, attended, cache).argmax(-1)

        return Contender(run, prepare)

    def of_model(model, inputs) -> Contender:
        return contender(
            lambda: model(**inputs, logits_to_keep=1).past_key_values,
            lambda token, mask, cache: (
                model(input_ids=token, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits
            ),
            inputs["input_ids"],
        )

    language_model, head = model.model.language_model, model.lm_head
    ids = rows.ours["input_ids"]
    bare = contender(
        lambda: language_model(input_ids=ids, attention_mask=rows.ours["attention_mask"]).past_key_values,
        lambda token, mask, cache: head(
            language_model(input_ids=token, attention_mask=mask, past_key_values=cache).last_hidden_state
        ),
        ids,
    )
    return {
        "aligngpt": of_model(model, rows.ours),
        "llava": of_model(llava, rows.llava),
        "language model": bare,
    }


def generate(model, llava, rows: Rows, args) -> dict[str, Contender]:
    """The same with prompt and images, as users call it."""
    settings = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
    return {
        "aligngpt": Contender(lambda: model.generate(**rows.ours, **settings)),
        "llava": Contender(lambda: llava.generate(**rows.llava, **settings)),
    }


def training(stage: int) -> Callable[..., dict[str, Contender]]:
    def contenders(model, llava, rows: Rows, args) -> dict[str, Contender]:
        inner = model.model
        for module in (model, llava):
            module.train().requires_grad_(False)
        trained = [inner.multi_modal_projector]
        trained += [inner.align_embeddings] if stage == 1 else [inner.language_model, model.lm_head, inner.align_gate]
        for module in trained:
            module.requires_grad_(True)
        levels: dict[str, Any] = {"align_level": rows.levels} if stage == 1 else {}

        def step(module: nn.Module, loss_of: Callable, owner: nn.Module) -> Contender:
            parameters = {id(p): p for p in module.parameters() if p.requires_grad}
            optimizer = torch.optim.AdamW(parameters.values(), lr=1e-6)

            def run():
                loss = loss_of()
                roots, seeds = ([loss], [None]) if isinstance(loss, torch.Tensor) else (list(loss), None)
                if seeds is None:
                    seeds = [None, torch.ones_like(roots[1])]
                torch.autograd.backward(roots, seeds)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            return Contender(run)

        parts = Parts(model, rows, with_images=True)
        bare = Parts(model, rows, with_images=False)
        labels = rows.labels
        result = {
            "aligngpt": step(model, lambda: model(**rows.ours, labels=labels, **levels).loss, model),
            "llava": step(llava, lambda: llava(**rows.llava, labels=labels).loss, llava),
            "parts": step(parts, lambda: parts(labels=labels), model),
        }
        if stage == 2:
            result["language model"] = step(
                nn.ModuleList([bare.inner.language_model, bare.head]), lambda: bare(labels=labels), model
            )
        else:
            # frozen, but gradients still have to reach its embeddings
            result["language model"] = Contender(lambda: bare(labels=labels).backward())
        return result

    return contenders


MAKERS = {
    "prefill": prefill,
    "decode": decode,
    "generate": generate,
    "stage1": training(1),
    "stage2": training(2),
}
BATCHES = {"prefill": (1, 8), "decode": (1, 8), "generate": (1, 8), "stage1": (4,), "stage2": (4,)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(
        parser, "overhead", repeats=21, scales=["small", *(name for name in SCALES if name != "small")]
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--text", type=int, default=62, help="words of a row, default: %(default)s")
    parser.add_argument("--answer", type=int, default=32, help="words that are supervised, default: %(default)s")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that are generated, default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", help="instead of each work's own batch sizes")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--profile", choices=WORKS, help="print what one run of this work spends its time on")
    args = parser.parse_args(argv)
    device, dtype = common.start(args), getattr(torch, args.dtype)
    facts = common.machine(args)
    common.print_header(facts)
    if args.profile:
        show_profile(args, device, dtype)
        return
    rows_out, records = [], {}
    for work in args.work:
        for batch in args.batch or BATCHES[work]:
            record = measure(work, batch, args, device, dtype)
            records[f"{work}, batch {batch}"] = record
            rows_out += lines_of(f"{work}, batch {batch}", record)
    columns = [
        "work",
        "contender",
        "ms (median)",
        "AlignGPT's time over it (quartiles)",
        "peak MB",
        "AlignGPT's memory over it",
    ]
    common.print_table(columns, rows_out)
    common.write_json(args.output, {"machine": facts, "scale": args.scale, "dtype": args.dtype, "works": records})


def measure(work: str, batch: int, args: argparse.Namespace, device, dtype) -> dict[str, Any]:
    # a fresh pair: what one work leaves (gradients, hooks) is nothing to the next
    model, llava = make_pair(args.scale, device, dtype)
    rows = make_rows(model.config, batch, args.text, args.answer, device, dtype)
    contenders = MAKERS[work](model, llava, rows, args)
    measured = common.interleave(contenders, device, args.repeats, args.warmup, args.clock)
    if not args.no_memory:
        measured.peak = {name: common.peak_bytes(contender, device) for name, contender in contenders.items()}
    ratios = {name: measured.ratio("aligngpt", name) for name in contenders if name != "aligngpt"}
    return {"positions": rows.positions, "seconds": measured.seconds, "ratios": ratios, "peak": measured.peak}


def lines_of(title: str, record: dict[str, Any]) -> list[list[str]]:
    lines = []
    for name, seconds in record["seconds"].items():
        median, peak = common.quartiles(seconds)[1], record["peak"].get(name)
        ratio = common.spread(record["ratios"][name]) if name in record["ratios"] else ""
        memory = "" if peak is None or not ratio else f"{record['peak']['aligngpt'] / peak:.3f}"
        shown = "" if peak is None else common.megabytes(peak)
        lines.append([title, name, common.milliseconds(median), ratio, shown, memory])
    return lines


def show_profile(args: argparse.Namespace, device, dtype) -> None:
    model, llava = make_pair(args.scale, device, dtype)
    batch = (args.batch or BATCHES[args.profile])[0]
    contenders = MAKERS[args.profile](
        model, llava, make_rows(model.config, batch, args.text, args.answer, device, dtype), args
    )
    for name in ("aligngpt", "llava"):
        contenders[name]()
        prepared = () if contenders[name].prepare is None else (contenders[name].prepare(),)
        with torch.profiler.profile(record_shapes=False) as recorded:
            contenders[name].run(*prepared)
        key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(f"{name}\n{recorded.key_averages().table(sort_by=key, row_limit=15)}")


if __name__ == "__main__":
    main()
