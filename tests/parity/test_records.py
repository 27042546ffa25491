"""From recorded conversations to their batches: our chat templates, tokenizer and masks give their ids and labels."""

import pytest
import torch
from parity.golden import IGNORED, TENSOR_FILES, draw_image, our_batch, read, read_json


BATCHES = [name for name in TENSOR_FILES if name.startswith(("stage1_", "stage2_")) and "after" not in name]
ROLES = {"human": "user", "gpt": "assistant"}


def _messages(record: dict) -> list[dict]:
    """A LLaVA-style record as chat messages."""
    messages = []
    for turn in record["conversations"]:
        content = [{"type": "text", "text": turn["value"].replace("<image>", "")}]
        if "<image>" in turn["value"]:
            content.insert(0, {"type": "image", "image": draw_image(record["image"])})
        messages.append({"role": ROLES[turn["from"]], "content": content})
    return messages


@pytest.mark.parametrize("name", BATCHES)
def test_ids_and_labels(name, stage1_processor, stage2_processor, stage2_model):
    processor = stage1_processor if name.startswith("stage1") else stage2_processor
    records = read_json("stage1_records") if name.startswith("stage1") else read_json(name)["records"]
    batch = our_batch(read(name), stage2_model.config)
    limit = stage2_processor.tokenizer.model_max_length
    for row, record in enumerate(records):
        ours = processor.apply_chat_template(
            _messages(record),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
        )
        ids = ours["input_ids"][0]
        supervised = torch.as_tensor(ours["assistant_masks"])[0].bool()
        labels = torch.where(supervised, ids, IGNORED)
        length = int(batch.attention_mask[row].sum())
        assert len(ids) == length or (len(ids) > length == limit), "only a row at their limit may have been cut"
        assert torch.equal(ids[:length], batch.input_ids[row, :length]), f"row {row}"
        assert torch.equal(labels[:length], batch.labels[row, :length]), f"row {row}"
