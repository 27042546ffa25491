"""What the gate reads in training and in use, by `gate_context`: how far its shares of the levels are apart.

For conversations of several turns about one image: the shares in training (the whole conversation), when the last
question is asked (the processor's prompt), and behind a cache that was filled with the first question. The weights of
the model are the same in all of them; only the reading differs.
"""

import argparse

import numpy as np
import torch
from tqdm import tqdm

from aligngpt_trainers import AlignGPTDataCollator
from aligngpt_trainers.data.load import load_rows
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


def shares(model, inputs) -> np.ndarray:
    with torch.inference_mode():
        return model(**inputs, logits_to_keep=1).align_weights[0, :-1].numpy()


def asked(processor, row, turns: int):
    """The prompt of the first `turns` messages."""
    text = processor.apply_chat_template(row["messages"][:turns], tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=[row["images"]], return_tensors="pt", add_special_tokens=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", required=True, help="folder of a stage-2 model")
    parser.add_argument("--data", required=True, help="conversations with images")
    parser.add_argument("--rows", type=int, default=200, help="conversations of two turns and more (%(default)s)")
    args = parser.parse_args()
    model = AlignGPTForConditionalGeneration.from_pretrained(args.model).eval()
    processor = AlignGPTProcessor.from_pretrained(args.model)
    rows = [row for row in load_rows(args.data).select(range(args.rows)) if len(row["messages"]) >= 4]

    print(f"{len(rows)} conversations, {model.config.num_align_levels} levels\n")
    print(
        "| `gate_context` | training and last question: mean, largest | last question and kept cache: mean, largest |"
    )
    print("|---|---|---|")
    collator = AlignGPTDataCollator(processor, "instruct")
    for context in ("first_turn", "sequence"):
        model.config.gate_context = context
        in_use, cached = [], []
        for row in tqdm(rows, desc=context):
            batch = collator([row])
            batch.pop("labels")
            trained = shares(model, batch)
            last = shares(model, asked(processor, row, len(row["messages"]) - 1))
            first = shares(model, asked(processor, row, 1))
            in_use.append(np.abs(trained - last).max())
            cached.append(np.abs(last - first).max())
        cells = (f"{np.mean(found):.4f}, {np.max(found):.4f}" for found in (in_use, cached))
        print(f"| `{context}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
