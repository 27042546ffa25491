"""Forward pass: the alignment vector in every mode, the gate, rows of every kind, and what is refused."""

import pytest
import torch
from modeling.tiny import (
    ALIGN,
    BOS,
    IMAGE,
    IMAGE_SIZE,
    IMAGE_TOKENS,
    MIXED_ROWS,
    PAD,
    SEQ_LENGTH,
    TOP_LEVEL,
    draw_images,
    make_batch,
    num_images,
    row,
    tiny_model,
)
from torch.nn.functional import gelu
from transformers import Gemma2Config, Gemma2ForCausalLM

from modeling_aligngpt import ALIGN_MODES, base_aligngpt
from modeling_aligngpt.configuration_aligngpt import GATE_CONTEXTS


def plain_logits(model, ids: list[int], images: torch.Tensor, mode: str, level: int | None = None) -> torch.Tensor:
    """The paper's formulas for one row, written out; text is everything but BOS and placeholders."""
    inner, table = model.model, model.model.align_embeddings.weight
    tokens = model.get_input_embeddings().weight[ids]
    features = inner.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    first, second = inner.multi_modal_projector.linear_1, inner.multi_modal_projector.linear_2
    projected = gelu(features @ first.weight.T + first.bias) @ second.weight.T + second.bias

    text = torch.stack([token for i, token in zip(ids, tokens, strict=True) if i not in (BOS, IMAGE, ALIGN)])
    first, second = inner.align_gate.linear_1, inner.align_gate.linear_2
    shares = []
    for image in projected:
        likeness = image @ text.mean(0)
        shares.append((gelu(likeness @ first.weight.T + first.bias) @ second.weight.T + second.bias).softmax(0))
    local = torch.stack(shares).mean(0) @ table[:TOP_LEVEL]
    vector = {
        "level": table[TOP_LEVEL if level is None else level],
        "fixed": table[TOP_LEVEL if level is None else level],
        "gate": local + table[TOP_LEVEL],
        "random": local + table[TOP_LEVEL],
        "local": local,
        "global": table[TOP_LEVEL],
        "mean": table[:TOP_LEVEL].mean(0) + table[TOP_LEVEL],
        "mean_of_all": table.mean(0),
    }[mode]
    where_images = [place for place, i in enumerate(ids) if i == IMAGE]
    embeddings = tokens.clone()
    embeddings[where_images] = projected.flatten(0, 1)
    embeddings[ids.index(ALIGN)] = vector
    hidden = inner.language_model(inputs_embeds=embeddings[None]).last_hidden_state
    return model.lm_head(hidden)


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("mode", ALIGN_MODES)
def test_modes_are_the_plain_formulas(mode, num):
    model = tiny_model(align_mode=mode)
    ids = row(5, 6, 7, 8, images=num, before=(9, 10))
    batch = make_batch([ids])
    with torch.no_grad():
        ours = model(**batch).logits
        plain = plain_logits(model, ids, batch["pixel_values"], mode)
        other = plain_logits(model, ids, batch["pixel_values"], "mean" if mode != "mean" else "gate")
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert (ours - other).abs().max() > 1e-2  # the modes differ by far more than the tolerance


@pytest.mark.parametrize("mode", ["level", "fixed"])
def test_default_level(mode):
    model = tiny_model(align_mode=mode, default_align_level=2)
    ids = row(5, 6, 7)
    batch = make_batch([ids])
    with torch.no_grad():
        plain = plain_logits(model, ids, batch["pixel_values"], mode, level=2)
        torch.testing.assert_close(model(**batch).logits, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ALIGN_MODES)
def test_a_level_by_hand_steers_in_every_mode(mode):
    model = tiny_model(align_mode=mode)
    batch = make_batch([row(5, 6, 7), row(8, 9, images=2)])
    with torch.no_grad():
        one_for_all = model(**batch, align_level=3)
        a_list = model(**batch, align_level=torch.tensor([3, 5]))
        single = model(**make_batch([row(5, 6, 7)]), align_level=3)
        level = tiny_model(align_mode="level", default_align_level=3)(**batch)
    assert torch.equal(one_for_all.logits, level.logits)
    assert torch.equal(a_list.logits[0], one_for_all.logits[0])
    assert (a_list.logits[1] - one_for_all.logits[1]).abs().max() > 1e-2
    assert single.align_weights.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]]
    assert a_list.align_weights.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0]]
    assert model(**batch, align_level=TOP_LEVEL).align_weights.tolist() == [[0] * TOP_LEVEL + [1]] * 2


@pytest.mark.parametrize(
    ("level", "said"),
    [
        (8, "out of range"),
        (-1, "out of range"),
        (torch.tensor([0, 8]), "out of range"),
        (torch.tensor([0, 1, 2]), r"2 rows.*\(3,\)"),
        (torch.tensor([[0], [1]]), r"\(2, 1\)"),
        (1.5, "float"),
        (torch.tensor([True, False]), "bool"),
    ],
)
def test_levels_that_are_refused(level, said):
    with pytest.raises(ValueError, match=said):
        tiny_model()(**make_batch([row(5, 6), row(7, 8)]), align_level=level)


def test_gate_weights_of_mixed_rows():
    model = tiny_model()
    with torch.no_grad():
        outputs = model(**make_batch(MIXED_ROWS))
    weights = outputs.align_weights
    assert weights.shape == (3, TOP_LEVEL + 1)
    torch.testing.assert_close(weights[:, :-1].sum(1), torch.tensor([1.0, 1.0, 0.0]))
    assert weights[:, -1].tolist() == [1, 1, 0]
    assert outputs.image_hidden_states.shape == (3, SEQ_LENGTH, 32)
    text_only = model(**make_batch([row(5, 6, images=0)]))
    assert text_only.align_weights.tolist() == [[0.0] * (TOP_LEVEL + 1)]
    assert model(input_ids=torch.tensor([[5]]), past_key_values=text_only.past_key_values).align_weights is None
    assert text_only.image_hidden_states is None


def test_several_images_share_the_gate():
    model = tiny_model()
    images = draw_images(2)
    each = [model(**{**make_batch([row(5, 6, 7)]), "pixel_values": image[None]}).align_weights for image in images]
    both = model(**{**make_batch([row(5, 6, 7, images=2)]), "pixel_values": images}).align_weights
    assert (each[0] - each[1]).abs().max() > 1e-3
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_gate_reads_the_prompt_and_leaves_answers_out():
    prompt, answer, other_answer = row(5, 6, 7), [8, 9, 10], [20, 21, 22]
    model = tiny_model()

    def gate(model, ids, **kwargs):
        return model(**make_batch([ids]), **kwargs).align_weights

    def labels(ids):
        return torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])

    alone = gate(model, prompt)
    for ids in (prompt + answer, prompt + other_answer):
        torch.testing.assert_close(gate(model, ids, prompt_mask=labels(ids) == -100), alone)
        torch.testing.assert_close(gate(model, ids, prompt_mask=torch.ones(1, len(prompt))), alone)
        assert (gate(model, ids) - alone).abs().max() > 1e-3  # nothing says what the prompt is: everything is read


@pytest.mark.parametrize("context", GATE_CONTEXTS)
def test_labels_never_change_the_logits(context):
    model, ids = tiny_model(gate_context=context), row(5, 6, 7, 8, 9, 10)
    labels = torch.tensor([[-100] * (len(ids) - 3) + ids[-3:]])
    plain, learned = model(**make_batch([ids])), model(**make_batch([ids]), labels=labels)
    assert torch.equal(plain.logits, learned.logits) and learned.loss is not None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"labels": "answer"}, "does not say how answers begin"),
        ({"labels": "all", "prompt_mask": True}, "supervise <image>"),
        ({"labels": "answer", "prompt_mask": True}, None),
        ({"labels": "answer", "align_level": 3}, None),
    ],
)
def test_what_other_trainers_do_with_labels_is_said(given, said, monkeypatch):
    heard = []
    monkeypatch.setattr(base_aligngpt.logger, "warning_once", heard.append)
    ids = row(5, 6, 7, 8)
    labels = torch.tensor([ids if given["labels"] == "all" else [-100] * (len(ids) - 1) + ids[-1:]])
    mask = {"prompt_mask": torch.ones(1, len(ids) - 1)} if given.get("prompt_mask") else {}
    tiny_model()(**make_batch([ids]), labels=labels, align_level=given.get("align_level"), **mask)
    assert len(heard) == (said is not None) and all(said in line for line in heard)


def test_gate_passes_over_bos_padding_and_placeholders():
    model = tiny_model()
    ids = row(5, 6, 7)
    plain = model(**make_batch([ids])).align_weights
    with torch.no_grad():
        model.get_input_embeddings().weight[[BOS, PAD]] += 3.0
    for side in ("left", "right"):
        weights = model(**make_batch([ids, row(*range(5, 20), images=0)], side)).align_weights
        torch.testing.assert_close(weights[:1], plain)
    inside, without = (model(**make_batch([ids])).align_weights for ids in (row(5, BOS, 7), row(5, 7)))
    assert (inside - without).abs().max() > 1e-3  # a BOS inside the text is text


@pytest.mark.parametrize("mode", ["gate", "level", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_rows_are_single_rows(side, mode):
    model = tiny_model(align_mode=mode)
    rows = [*MIXED_ROWS, [BOS, ALIGN, 5, 6]]  # the last has nothing to align
    batch = make_batch(rows, side)
    start = 0
    with torch.no_grad():
        batched = model(**batch)
        for index, ids in enumerate(rows):
            stop = start + num_images(ids)
            images = {"pixel_values": batch["pixel_values"][start:stop]} if stop > start else {}
            single = model(input_ids=torch.tensor([ids]), **images)
            real = batch["attention_mask"][index].bool()
            torch.testing.assert_close(batched.logits[index][real], single.logits[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(batched.align_weights[index], single.align_weights[0], rtol=1e-4, atol=1e-5)
            start = stop


def test_loss_is_the_mean_over_supervised_next_tokens():
    model = tiny_model()
    batch = make_batch(MIXED_ROWS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :10] = -100
    with torch.no_grad():
        outputs = model(**batch, labels=labels)
    scores, targets = outputs.logits[:, :-1].log_softmax(-1), labels[:, 1:]
    supervised = targets != -100
    expected = -scores[supervised].gather(1, targets[supervised][:, None]).mean()
    torch.testing.assert_close(outputs.loss, expected)


def test_logits_to_keep():
    model = tiny_model()
    batch = make_batch([row(5, 6, 7)])
    with torch.no_grad():
        full = model(**batch).logits
        torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, full[:, -2:])
        torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([0, 3])).logits, full[:, [0, 3]])


def test_inputs_embeds_and_encoded_images_in_place_of_ids_and_pixels():
    model = tiny_model()
    batch = make_batch(MIXED_ROWS)
    with torch.no_grad():
        expected = model(**batch)
        ids, pixel_values = batch.pop("input_ids"), batch.pop("pixel_values")
        embeds = model.get_input_embeddings()(ids)
        encoded = {"image": model.get_image_features(pixel_values)}
        for kwargs in (
            {"inputs_embeds": embeds, "pixel_values": pixel_values},
            {"input_ids": ids, "mm_encoder_outputs": encoded},
        ):
            outputs = model(**batch, **kwargs)
            torch.testing.assert_close(outputs.logits, expected.logits)
            torch.testing.assert_close(outputs.align_weights, expected.align_weights)


def test_sdpa_is_eager():
    batch = make_batch(MIXED_ROWS, "left")
    logits = []
    for attention in ("eager", "sdpa"):
        model = tiny_model()
        model.set_attn_implementation(attention)
        assert model.model.language_model.config._attn_implementation == attention
        with torch.no_grad():
            logits.append(model(**batch).logits[batch["attention_mask"].bool()])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close():
    model, batch = tiny_model(), make_batch(MIXED_ROWS)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        exact = model(**batch)
        model.bfloat16()
        rounded = model(**batch)  # images come as float32, as the processor gives them
        autocast = tiny_model()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = autocast(**batch)
    assert rounded.logits.dtype == torch.bfloat16
    scale = exact.logits[real].std()
    for outputs in (rounded, mixed):
        assert (outputs.logits[real].float() - exact.logits[real]).abs().mean() < 0.02 * scale
        assert (outputs.align_weights.float() - exact.align_weights).abs().max() < 0.02


def test_softcapping_of_the_language_model():
    text = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "head_dim": 8, "model_type": "gemma2"}
    model = tiny_model(text, tie_word_embeddings=True)
    values = {name: value for name, value in model.config.text_config.to_dict().items() if name != "model_type"}
    gemma = Gemma2ForCausalLM(Gemma2Config(**values)).eval()
    weights = {f"model.{name}": value for name, value in model.model.language_model.state_dict().items()}
    assert not gemma.load_state_dict({**weights, "lm_head.weight": model.lm_head.weight}).missing_keys
    batch = make_batch([row(5, 6, 7, 8, images=0)])
    with torch.no_grad():
        ours, theirs = model(**batch).logits, gemma(**batch).logits
    assert theirs.abs().max() <= 2.0 < model.lm_head(gemma.model(**batch).last_hidden_state).abs().max()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("rows", "images"),
    [
        ([row(5, 6, images=2)], 1),
        ([row(5, 6)], 2),
        ([row(5, 6, images=0)], 1),
        ([row(5, 6)[:-3], row(7)], 2),  # the first row was cut inside its image
        ([[BOS, ALIGN, *IMAGE_TOKENS, IMAGE, 5]], 1),
        (
            [[BOS, ALIGN, *IMAGE_TOKENS, IMAGE], [BOS, ALIGN, *IMAGE_TOKENS[1:], 5]],
            2,
        ),  # right in total, wrong in each row
    ],
)
def test_placeholders_and_images_must_agree(rows, images):
    batch = make_batch(rows)
    batch["pixel_values"] = draw_images(images)
    with pytest.raises(ValueError, match=r"image\(s\).*pixel_values"):
        tiny_model()(**batch)


def test_a_image_must_be_whole():
    model = tiny_model()
    model.config.image_seq_length = 2 * SEQ_LENGTH
    with pytest.raises(ValueError, match=f"came as {SEQ_LENGTH} positions, image_seq_length is {2 * SEQ_LENGTH}"):
        model(**make_batch([row(5, 6)]))


def test_inputs_that_are_refused():
    model = tiny_model()
    batch = make_batch([row(5, 6)])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**batch, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=batch["pixel_values"])
    encoded = {"image": model.get_image_features(batch["pixel_values"])}
    with pytest.raises(ValueError, match="not both"):
        model(**batch, mm_encoder_outputs=encoded)


def test_image_features_follow_their_arguments():
    model = tiny_model()
    images = draw_images(2)
    with torch.no_grad():
        features = model.get_image_features(images).pooler_output
        last = model.get_image_features(images, vision_feature_layer=-1).pooler_output
        full = model.get_image_features(images, vision_feature_select_strategy="full").pooler_output
    assert [tuple(image.shape) for image in features] == [(SEQ_LENGTH, 32)] * 2
    assert (features[0] - last[0]).abs().max() > 1e-2
    torch.testing.assert_close(full[0][1:], features[0])
    assert images.shape[-1] == IMAGE_SIZE
