"""`generate`: the gate reads the prompt alone, whatever the cache, search, padding or form of the inputs."""

import pytest
import torch
from modeling.tiny import (
    ALIGN,
    EOS,
    IMAGE,
    LLAMA,
    MIXED_ROWS,
    PAD,
    TOP_LEVEL,
    num_images,
    prompts,
    randomize,
    row,
    tiny_model,
)
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation import ContinuousBatchingConfig

from modeling_aligngpt import AlignGPTForConditionalGeneration


NEW = 8


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def answers(model, inputs, **kwargs) -> torch.Tensor:
    """New tokens of a greedy search that no EOS ends."""
    kwargs = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **kwargs}
    output = model.generate(**inputs, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else output


def step_by_step(model, ids: list[int], images=None, **kwargs) -> list[int]:
    """Greedy search written out: a whole forward pass for each token, the prompt's length given by hand."""
    prompt_mask, start = torch.ones(1, len(ids)), len(ids)
    for _ in range(NEW):
        logits = model(input_ids=torch.tensor([ids]), pixel_values=images, prompt_mask=prompt_mask, **kwargs).logits[
            0, -1
        ]
        logits[[EOS, IMAGE, ALIGN]] = -torch.inf
        ids = [*ids, int(logits.argmax())]
    return ids[start:]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": 2},
    ],
    ids=["cache", "no cache", "static cache", "prompt lookup"],
)
@pytest.mark.parametrize("ids", MIXED_ROWS, ids=["one image", "two images", "text"])
def test_greedy_search_is_step_by_step(model, ids, how):
    inputs = prompts([ids])
    with torch.no_grad():
        expected = step_by_step(model, ids, inputs.get("pixel_values"))
    assert answers(model, inputs, **how)[0].tolist() == expected


@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}],
    ids=["cache", "no cache", "static cache", "beams"],
)
def test_batched_answers_are_single_answers(model, how):
    batched = answers(model, prompts(MIXED_ROWS), **how)
    images, start = prompts(MIXED_ROWS)["pixel_values"], 0
    for ids, answer in zip(MIXED_ROWS, batched, strict=True):
        stop = start + num_images(ids)
        single = {**prompts([ids]), **({"pixel_values": images[start:stop]} if stop > start else {})}
        assert answers(model, single, **how)[0].tolist() == answer.tolist()
        start = stop


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("where", ["argument", "config argument", "own config"])
def test_padding_is_found_without_an_attention_mask(where, how):
    model = tiny_model()
    model.generation_config.pad_token_id = None
    inputs = prompts(MIXED_ROWS)
    expected = answers(model, inputs, pad_token_id=PAD, **how)
    inputs.pop("attention_mask")
    if where == "argument":
        how = {**how, "pad_token_id": PAD}
    elif where == "config argument":
        settings = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, suppress_tokens=[IMAGE, ALIGN])
        how = {**how, "generation_config": settings}
    else:
        model.generation_config.pad_token_id = PAD
    assert answers(model, inputs, **how).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}],
    ids=["cache", "no cache", "static cache", "beams"],
)
def test_prompts_may_be_padded_on_the_right(model, how):
    expected = answers(model, prompts(MIXED_ROWS, "left"), **how).tolist()
    inputs = prompts(MIXED_ROWS, "right")
    assert not inputs["attention_mask"][:, -1].all()
    kept = {name: value.clone() for name, value in inputs.items()}
    assert answers(model, inputs, **how).tolist() == expected
    assert all(torch.equal(value, kept[name]) for name, value in inputs.items())  # the caller's tensors stay
    positional = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"],
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **how,
    )  # fmt: skip
    assert positional[:, -NEW:].tolist() == expected
    unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert answers(model, unmasked, **how).tolist() == expected
    unmasked["prompt_mask"] = inputs["attention_mask"]
    assert answers(model, unmasked, **how).tolist() == expected
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert answers(model, {**inputs, "inputs_embeds": embeds}, **how).tolist() == expected


def test_generation_is_steered_by_level(model):
    inputs = prompts(MIXED_ROWS[:2])
    by_level = [answers(model, inputs, align_level=level).tolist() for level in range(TOP_LEVEL + 1)]
    assert len({str(rows) for rows in by_level}) > 4
    mixed = answers(model, inputs, align_level=torch.tensor([2, 6])).tolist()
    assert mixed == [by_level[2][0], by_level[6][1]]
    assert answers(model, inputs, align_level=[2, 6]).tolist() == mixed
    assert answers(model, inputs, align_level=torch.tensor([2])).tolist() == by_level[2]
    beams = [answers(model, inputs, align_level=level, num_beams=2).tolist() for level in (2, 6)]
    both = answers(model, inputs, align_level=torch.tensor([2, 6]), num_beams=2).tolist()
    assert both == [beams[0][0], beams[1][1]]
    assert answers(model, inputs, align_level=torch.tensor(2), num_beams=2).tolist() == beams[0]
    with pytest.raises(ValueError, match="out of range"):
        answers(model, inputs, align_level=8)


def test_several_returns_and_beams(model):
    inputs = prompts(MIXED_ROWS)
    greedy = answers(model, inputs)
    beams = answers(model, inputs, num_beams=3, num_return_sequences=2)
    assert beams.shape == (6, NEW)
    assert answers(model, inputs, num_beams=3).tolist() == beams[::2].tolist()
    torch.manual_seed(0)
    # top_k=1 leaves sampling no choice: every return is the greedy answer of its own row
    sampled = answers(model, inputs, do_sample=True, top_k=1, num_return_sequences=2)
    assert sampled.tolist() == greedy.repeat_interleave(2, 0).tolist()


@pytest.mark.parametrize("ids", MIXED_ROWS, ids=["one image", "two images", "text"])
@pytest.mark.parametrize("how", [{}, {"align_level": 3}], ids=["gate", "level"])
def test_a_draft_model_of_text_alone_changes_no_answer(model, ids, how):
    draft = randomize(AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)), seed=1)
    for inputs in (prompts([ids]), {**prompts([ids]), "prompt_mask": torch.ones(1, len(ids))}):
        expected = answers(model, inputs, **how).tolist()
        assert answers(model, inputs, assistant_model=draft, **how).tolist() == expected
    assert answers(model, prompts([ids]), assistant_model=tiny_model(seed=1), **how).tolist() == expected


def test_continuous_batching_takes_text_and_refuses_images(model):
    texts = [row(5, 6, 7, images=0), row(8, 9, images=0)]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=EOS, suppress_tokens=[EOS])
    pages = {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, page_size=16)}
    found = model.generate_batch(texts, generation_config=settings, **pages).values()
    expected = [answers(model, prompts([ids]), suppress_tokens=[EOS])[0].tolist() for ids in texts]
    assert [request.generated_tokens for request in found] == expected
    for ids in (MIXED_ROWS[0], [1, ALIGN, 5]):
        with pytest.raises(ValueError, match="Prompt 1 of generate_batch holds <image> or <align>"):
            model.generate_batch([texts[0], ids], generation_config=settings, **pages)


def test_generate_needs_nothing_beside_what_is_saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AlignGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 1024
    loaded.generation_config.max_new_tokens = NEW
    inputs = prompts([row(5, images=8)])
    length = inputs["input_ids"].shape[1]
    assert length > 20  # more than transformers' own limit
    loaded.generation_config.eos_token_id = None
    assert loaded.generate(**inputs).shape[1] == length + NEW
    # the caller's limit is not the saved one's lesser
    assert loaded.generate(**inputs, max_length=length + 2).shape[1] == length + 2


def test_embeddings_in_place_of_ids(model):
    inputs = prompts(MIXED_ROWS)
    expected = answers(model, inputs).tolist()
    ids = inputs.pop("input_ids")
    assert answers(model, {**inputs, "inputs_embeds": model.get_input_embeddings()(ids)}).tolist() == expected


@pytest.mark.parametrize("use_cache", [True, False])
def test_images_are_encoded_once_with_a_cache(model, use_cache):
    calls = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda *_: calls.append(1))
    answers(model, prompts(MIXED_ROWS[:1]), use_cache=use_cache)
    hook.remove()
    assert len(calls) == 1  # transformers 5 hands the encoded images on where there is no cache


def test_no_placeholder_in_an_answer():
    model, inputs = tiny_model(), prompts(MIXED_ROWS[:1])
    with torch.no_grad():
        best = int(model(**inputs).logits[0, -1].argmax())
        model.lm_head.weight[[IMAGE, ALIGN]] = 3 * model.lm_head.weight[best]  # now it wants nothing else
        assert int(model(**inputs).logits[0, -1].argmax()) in (IMAGE, ALIGN)
    for how in ({}, {"do_sample": True}, {"num_beams": 2}):
        torch.manual_seed(0)
        assert not set(answers(model, inputs, **how).flatten().tolist()) & {IMAGE, ALIGN}


def test_images_that_are_none(model):
    inputs = prompts([row(5, 6, images=0)])
    assert answers(model, {**inputs, "pixel_values": None}).tolist() == answers(model, inputs).tolist()


def test_scores_of_bfloat16(model):
    inputs = prompts(MIXED_ROWS)
    half = tiny_model().bfloat16()
    exact, rounded = (
        m.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True).logits
        for m in (model, half)
    )
    assert (exact[0] - rounded[0].float()).abs().mean() < 0.02 * exact[0].std()
