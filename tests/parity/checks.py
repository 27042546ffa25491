"""Comparisons that hold for every recorded forward pass, whatever the stage."""

import torch
from parity.golden import CLEAR_MARGIN, IGNORED, VOCAB_SIZE, Batch, Seen, assert_close, cut_labels, in_their_order


def assert_same_rows(batch: Batch, tensors: dict[str, torch.Tensor]):
    """Which row stands where, its mask, and (in training) which tokens count."""
    with_image = [row for row, has in enumerate(batch.has_image) if has]
    without = [row for row, has in enumerate(batch.has_image) if not has]
    assert tensors["row_source"].tolist() == with_image + without
    mask = in_their_order(batch.attention_mask, tensors, 0)
    assert torch.equal(mask, tensors["out_attention_mask"])
    if "out_labels" in tensors:
        labels = in_their_order(cut_labels(batch, tensors), tensors, IGNORED)
        assert torch.equal(labels, tensors["out_labels"])


def assert_same_logits(logits: torch.Tensor, tensors: dict[str, torch.Tensor]):
    """Logits [B, T, ours] against the recorded vectors, log-sum-exp, best token and margin of every position."""
    logits = in_their_order(logits[..., :VOCAB_SIZE].detach(), tensors, 0.0)
    rows, positions = tensors["logits_index"].T
    assert_close(logits[rows, positions], tensors["logits"], "logits")
    mask = tensors["out_attention_mask"].bool()
    assert_close(logits.logsumexp(-1)[mask], tensors["logits_lse"][mask], "logits_lse")
    best = logits.topk(2, dim=-1)
    assert_close((best.values[..., 0] - best.values[..., 1])[mask], tensors["logits_margin"][mask], "logits_margin")
    clear = mask & (tensors["logits_margin"] > CLEAR_MARGIN)
    assert clear.sum() > 0.9 * mask.sum()
    assert torch.equal(best.indices[..., 0][clear], tensors["logits_argmax"][clear])


def assert_same_embeddings(seen: Seen, tensors: dict[str, torch.Tensor]):
    """The first embeddings of each row, as the language model gets them: BOS, alignment vector, text."""
    if "embeds_head" in tensors:
        (embeds,) = seen.inputs_embeds
        head = embeds[tensors["row_source"]][:, : tensors["embeds_head"].shape[1]]
        assert_close(head, tensors["embeds_head"], "embeds_head")


def assert_same_gate(seen: Seen, align_weights: torch.Tensor, batch: Batch, tensors: dict[str, torch.Tensor]):
    """Text mean, dots, gate and alignment vector of each row with an image; no gate call without any."""
    if "gate_dots" not in tensors:
        assert not seen.gate_dots and not seen.text_mean
        return
    with_image = torch.tensor(batch.has_image)
    (mean, count), *others = seen.text_mean
    assert not others
    assert torch.equal(count[with_image], tensors["text_count"])
    assert_close(mean[with_image], tensors["text_mean"], "text_mean")
    (dots,), (gate_logits,) = seen.gate_dots, seen.gate_logits
    assert_close(dots, tensors["gate_dots"], "gate_dots")
    assert_close(gate_logits, tensors["gate_logits"], "gate_logits")
    assert_close(align_weights.detach()[with_image][:, :-1], tensors["gate_weights"], "gate_weights")
    assert torch.count_nonzero(align_weights[~with_image]) == 0
    (embeds,) = seen.inputs_embeds
    assert_close(embeds[with_image, 1], tensors["align_vector"], "align_vector")
