"""
Peak memory and time of the loss at stage 1's shape: all logits, TRL's head in chunks, supervised positions alone.

    python benchmarks/supervised_head.py                        # about a minute on two CPU cores
    python benchmarks/supervised_head.py --device cuda --hidden 4096 --rows 8

An image of 576 positions and a caption of 24 tokens a row, of which the caption is supervised; a vocabulary of 32,064.
The language model has one layer, so that the head is what is measured. Each way runs in a process of its own; the peak
is what the process holds at most (a GPU: what tensors hold), less what it holds before the first step.
"""

import argparse
import json
import resource
import subprocess
import sys
import time


WAYS = {
    "logits": "all logits, the model's own loss",
    "chunks": "TRL's fused head alone",
    "supervised": "the trainers' way",
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch (%(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the language model (%(default)s)")
    parser.add_argument("--caption", type=int, default=24, help="supervised tokens of a row (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32064, help="size of the vocabulary (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps timed, after one that is not (%(default)s)")
    parser.add_argument("--way", choices=WAYS, help="run this one here and print JSON")
    return parser.parse_args(words)


def build(args: argparse.Namespace):
    """An AlignGPT with tiny tower and one layer, frozen as in stage 1, and a batch."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    image, align = args.vocabulary - 1, args.vocabulary - 2
    config = AlignGPTConfig(vision_config=vision, text_config=text, image_token_id=image, align_token_id=align)
    model = AlignGPTForConditionalGeneration(config).to(args.device).train()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.model.align_embeddings.requires_grad_(True)
    length = config.image_seq_length
    caption = torch.randint(3, align, (args.rows, args.caption))
    prompt = torch.tensor([[1, align, *[image] * length]]).expand(args.rows, -1)
    input_ids = torch.cat([prompt, caption], 1)
    labels = input_ids.clone()
    labels[:, : prompt.shape[1]] = -100
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(args.rows, 3, 336, 336),
        "align_level": torch.arange(args.rows) % config.num_align_levels,
        "labels": labels,
    }
    return model, {name: tensor.to(args.device) for name, tensor in batch.items()}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Peak bytes beyond the start, seconds a step and the loss of one way."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from aligngpt_trainers.supervised_head import SupervisedHead

    model, batch = build(args)
    on_gpu = args.device.startswith("cuda")
    if args.way != "logits":
        # what SFTTrainer asks of it
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    head = SupervisedHead(model.model)

    def step() -> float:
        if args.way == "logits":
            loss = model(**batch).loss
        elif args.way == "chunks":
            loss = model(**batch, fused_lm_head=True).loss
        else:
            with head(batch) as inputs:
                loss = model(**inputs, fused_lm_head=True).loss
        loss.backward()
        model.zero_grad()
        return float(loss)

    with torch.no_grad():
        model.model(**{name: tensor[:1] for name, tensor in batch.items() if name != "labels"})
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated() if on_gpu else _resident_peak()
    loss = step()
    started = time.perf_counter()
    for _ in range(args.steps):
        loss = step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / args.steps
    peak = torch.cuda.max_memory_allocated() if on_gpu else _resident_peak()
    return {"peak": peak - before, "seconds": seconds, "loss": loss}


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    args = parse()
    if args.way:
        print(json.dumps(measure(args)))
        return
    print(f"{args.rows} rows, {args.caption} supervised tokens each, hidden size {args.hidden}, on {args.device}\n")
    print("| way | peak beyond the start (MiB) | s/step | loss |\n|---|---|---|---|")
    for way, description in WAYS.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"| {description} | {found['peak'] / 2**20:.0f} | {found['seconds']:.2f} | {found['loss']:.5f} |")


if __name__ == "__main__":
    main()
