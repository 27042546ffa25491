"""What the gate reads is found in the ids: the same in training, when asked, in later turns and behind a cache."""

import json

import pytest
import torch
from stage_parts import conversation_rows, draw_image, message
from transformers import GenerationConfig

from aligngpt_trainers import AlignGPTDataCollator
from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.configuration_aligngpt import answer_openings, first_turn_end


TEMPLATES = [name for name in CHAT_TEMPLATES if name != "plain"]


def talk(turns: int = 3) -> dict:
    """A conversation of several turns about one image."""
    messages = []
    for turn in range(turns):
        messages += [message("user", f"question {turn}?", images=not turn), message("assistant", f"a square {turn}")]
    return {"images": [draw_image("red")], "messages": messages}


def rendered(row: dict, processor, messages=None, **kwargs):
    """What a processor makes of a conversation, its image loaded into it."""
    found = [
        {
            "role": m["role"],
            "content": [
                {"type": "image", "image": row["images"][0]} if p["type"] == "image" else p for p in m["content"]
            ],
        }
        for m in (messages or row["messages"])
    ]
    return processor.apply_chat_template(found, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


def read_by(model, inputs) -> list[list[int]]:
    """The ids of each row that stand in front of its first answer, as the model finds them."""
    ids = inputs["input_ids"]
    front = ~model.model.find_answers(ids, model.get_input_embeddings()(ids)) & inputs["attention_mask"].bool()
    by_embeddings = ~model.model.find_answers(None, model.get_input_embeddings()(ids))
    assert torch.equal(front, by_embeddings & inputs["attention_mask"].bool())
    return [row[seen].tolist() for row, seen in zip(ids, front, strict=True)]


@pytest.fixture
def model_and_processor(assembled):
    model, processor = assembled
    assert model.config.gate_context == "first_turn"
    model.config.align_mode, before = "gate", (model.config.answer_openings, processor.image_suffix)
    yield model.eval(), processor
    model.config.align_mode, model.config.gate_context = "level", "first_turn"
    model.config.answer_openings, processor.image_suffix = before
    processor.chat_template = CHAT_TEMPLATES["vicuna_v1"]


@pytest.mark.parametrize("suffix", ["", " "])
@pytest.mark.parametrize("template", TEMPLATES)
def test_training_and_asking_read_the_same(model_and_processor, template, suffix):
    model, processor = model_and_processor
    processor.chat_template, processor.image_suffix = CHAT_TEMPLATES[template], suffix
    model.config.answer_openings = answer_openings(processor.tokenizer, processor.chat_template)
    for row in [talk(), talk(1), *conversation_rows(4)]:
        trained = AlignGPTDataCollator(processor, "instruct")([row])
        assert "prompt_mask" not in trained
        # up to the first token that is learned
        read = trained["input_ids"][(trained["labels"] != -100).cumsum(1) == 0].tolist()
        assert read_by(model, trained) == [read]
        assert first_turn_end(trained["input_ids"][0].tolist(), model.config.answer_openings) == len(read)
        if len(row["images"]) == 1:
            for asked in range(1, len(row["messages"]), 2):
                inputs = rendered(row, processor, row["messages"][:asked], add_generation_prompt=True)
                assert read_by(model, inputs) == [read]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_reads_as_its_rows(model_and_processor, side):
    model, processor = model_and_processor
    texts = [
        processor.apply_chat_template(row["messages"][:asked], tokenize=False, add_generation_prompt=True)
        for row, asked in ((talk(), 5), (talk(1), 1), (talk(), 3))
    ]
    settings = {"padding": True, "padding_side": side, "add_special_tokens": False, "return_tensors": "pt"}
    together = processor(text=texts, images=[[draw_image("red")]] * 3, **settings)
    assert "prompt_mask" not in together and "prompt_mask" not in processor.model_input_names
    alone = [read_by(model, processor(text=[text], images=[draw_image("red")], **settings)) for text in texts]
    assert read_by(model, together) == [read for (read,) in alone]


def test_weights_agree_in_training_later_turns_and_behind_a_cache(model_and_processor):
    model, processor = model_and_processor
    row = talk()
    batch = AlignGPTDataCollator(processor, "instruct")([row])
    trained = model(**batch)
    quiet = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**rendered(row, processor, row["messages"][:1], add_generation_prompt=True), **quiet)
    later = model.generate(**rendered(row, processor, row["messages"][:5], add_generation_prompt=True), **quiet)
    for output in (first, later):
        torch.testing.assert_close(output.align_weights, trained.align_weights, rtol=0, atol=1e-6)
    # the second turn behind the cache of the first answer equals the whole conversation read afresh
    inputs = rendered(row, processor, row["messages"][:3], add_generation_prompt=True)
    with torch.no_grad():
        whole = model(**inputs)
        length = len(read_by(model, inputs)[0])
        begun = model(input_ids=inputs["input_ids"][:, :length], pixel_values=inputs["pixel_values"])
        rest = model(input_ids=inputs["input_ids"][:, length:], past_key_values=begun.past_key_values)
    assert rest.align_weights is None
    torch.testing.assert_close(rest.logits, whole.logits[:, length:], rtol=1e-4, atol=1e-5)
    model.config.gate_context = "sequence"
    assert (model(**batch).align_weights - trained.align_weights).abs().max() > 1e-6


def test_log_probabilities_of_an_answer_are_those_of_generation(model_and_processor):
    """What any trainer computes for a finished conversation, whatever stands in it."""
    model, processor = model_and_processor
    for cache in (True, False):
        asked = rendered(talk(1), processor, talk(1)["messages"][:1], add_generation_prompt=True)
        made = model.generate(
            **asked,
            max_new_tokens=6,
            do_sample=False,
            use_cache=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        batch = {**asked, "input_ids": made.sequences, "attention_mask": torch.ones_like(made.sequences)}
        with torch.no_grad():
            scored = model(**batch).logits[:, asked["input_ids"].shape[1] - 1 : -1]
        expected = torch.stack(made.logits, 1)
        torch.testing.assert_close(scored.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-4)


def test_the_reading_is_saved_and_models_of_0_1_0_get_it(model_and_processor, tmp_path):
    model, processor = model_and_processor
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert saved["answer_openings"] == model.config.answer_openings != None  # noqa: E711
    path.write_text(json.dumps({key: value for key, value in saved.items() if key != "answer_openings"}))
    processor_file = tmp_path / "processor_config.json"
    processor_file.write_text(json.dumps({**json.loads(processor_file.read_text()), "gate_context": "first_turn"}))
    again = AlignGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.answer_openings == model.config.answer_openings
    asked = rendered(talk(), AlignGPTProcessor.from_pretrained(tmp_path))
    assert "prompt_mask" not in asked and read_by(again, asked) == read_by(model, asked)


def test_a_text_without_turns_is_read_whole(model_and_processor):
    model, processor = model_and_processor
    inputs = processor(text="<image> what is it?", images=draw_image("red"), return_tensors="pt")
    assert read_by(model, inputs) == inputs["input_ids"].tolist()
    assert answer_openings(processor.tokenizer, "{{ messages[0]['content'] }}") is None
    assert answer_openings(processor.tokenizer, CHAT_TEMPLATES["plain"]) is None
    assert answer_openings(processor.tokenizer, None) is None


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_generate_gives_the_weights_back(model_and_processor, search):
    model, processor = model_and_processor
    rows = [talk(1), talk(3)]
    if "prompt_lookup_num_tokens" in search:
        rows = rows[:1]
    chats = [row["messages"][:-1] for row in rows]
    texts = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = processor(
        text=texts, images=[r["images"] for r in rows], padding=True, padding_side="left", return_tensors="pt"
    )
    expected = model(**inputs).align_weights
    output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, **search)
    copies = search.get("num_return_sequences", 1)
    torch.testing.assert_close(output.align_weights, expected.repeat_interleave(copies, 0), rtol=1e-4, atol=1e-5)
    assert output.align_weights.shape == (len(output.sequences), model.config.num_align_levels)
    settings = GenerationConfig(max_new_tokens=2, return_dict_in_generate=True)
    level = model.generate(**inputs, align_level=2, generation_config=settings)
    assert level.align_weights.tolist() == [[0, 0, 1, 0]] * len(rows)
    assert torch.is_tensor(model.generate(**inputs, max_new_tokens=2))
