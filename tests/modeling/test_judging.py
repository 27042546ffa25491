"""The levels as a judge: against the definition, batches against rows, sentences, and inputs that cannot be judged."""

import pytest
import torch
from demo_model import save_demo_model
from PIL import Image

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.judging_aligngpt import part_numbers, split_sentences


TEXTS = ["a whale", "a robot and a castle at sea. a bus.", "three pizzas at the top left"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = save_demo_model(tmp_path_factory.mktemp("judge") / "model")
    model = AlignGPTForConditionalGeneration.from_pretrained(folder).eval()
    ramp = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    return model, AlignGPTProcessor.from_pretrained(folder), [ramp, ramp.rotate(90), ramp.rotate(45)]


@pytest.mark.parametrize("question", [None, "what is it?"])
def test_likelihoods_are_those_of_forward_at_each_level(judged, question):
    model, processor, images = judged
    for image, text in zip(images, TEXTS, strict=True):
        inputs = processor.judge_inputs([image], [text], question)
        answer = processor.tokenizer.decode(inputs["input_ids"][inputs["labels"] != -100])
        assert text in answer and answer.endswith("\n" if question is None else "<|im_end|>")
        found = model.judge(**inputs)
        for level in range(8):
            loss = model(**inputs, align_level=level).loss
            expected = -loss * found.num_tokens[0]
            assert found.log_likelihoods[0, level].item() == pytest.approx(expected.item(), abs=1e-3)
        expected = found.log_likelihoods[0].softmax(-1)
        torch.testing.assert_close(found.probabilities[0], expected)
        assert found.mean_level[0].item() == pytest.approx((expected * torch.arange(8)).sum().item(), abs=1e-4)


def test_a_batch_is_judged_as_its_rows(judged):
    model, processor, images = judged
    together = model.judge(**processor.judge_inputs(images, TEXTS))
    for row, (image, text) in enumerate(zip(images, TEXTS, strict=True)):
        alone = model.judge(**processor.judge_inputs([image], [text]))
        torch.testing.assert_close(together.log_likelihoods[row], alone.log_likelihoods[0], atol=1e-3, rtol=1e-4)
        assert together.num_tokens[row] == alone.num_tokens[0]


def test_the_tower_runs_once(judged):
    model, processor, images = judged
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *call: calls.append(1))
    try:
        model.judge(**processor.judge_inputs(images, TEXTS))
    finally:
        hook.remove()
    assert len(calls) == 1


def test_sentences_add_up_to_the_text(judged):
    model, processor, images = judged
    inputs = processor.judge_inputs(images[:2], TEXTS[:2], return_parts=True)
    found = model.judge(**inputs)
    assert found.part_probabilities.shape == (2, 2, 8)
    # one sentence is the whole text; the second row's two are judged apart, the first row has no second
    torch.testing.assert_close(found.part_probabilities[0, 0], found.probabilities[0])
    assert found.part_probabilities[0, 1].sum() == 0
    both = found.part_probabilities[1].log().sum(0).softmax(-1)
    torch.testing.assert_close(both, found.probabilities[1], atol=1e-4, rtol=1e-3)
    first = processor.tokenizer.decode(inputs["input_ids"][1][inputs["parts"][1] == 0])
    assert first == "a robot and a castle at sea."


def test_sentences():
    assert split_sentences("One. Two! 3.5 m?  Three") == ["One.", " Two!", " 3.5 m?", "  Three"]
    assert split_sentences("") == [""] and split_sentences("a") == ["a"]


def test_part_numbers_reach_the_end(judged):
    tokenizer = judged[1].tokenizer
    text = "a bus. a rose."
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    numbers = part_numbers(tokenizer, text, count + 1)
    assert numbers == [0] * (count // 2) + [1] * (count // 2 + 1)


def test_what_cannot_be_judged_is_refused(judged):
    model, processor, images = judged
    with pytest.raises(ValueError, match="1 images and 2 texts"):
        processor.judge_inputs(images[:1], TEXTS[:2])
    inputs = processor.judge_inputs(images[:2], TEXTS[:2])
    inputs["labels"][1] = -100
    with pytest.raises(ValueError, match="Row 1 has no text"):
        model.judge(**inputs)
    text_only = processor.tokenizer(["a whale"], return_tensors="pt")
    with pytest.raises(ValueError, match="Row 0 has no image"):
        model.judge(**text_only, labels=text_only["input_ids"], pixel_values=inputs["pixel_values"][:1])
    with pytest.raises(TypeError, match="no argument 'part': did you mean 'parts'"):
        model.judge(**inputs, part=inputs["labels"])
    with pytest.raises(TypeError, match="no argument 'align_level': it takes what judge_inputs returns"):
        model.judge(**inputs, align_level=3)
