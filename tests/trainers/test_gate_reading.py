"""`gate_context="first_turn"`: the gate reads the same in training, when asked, behind a cache, in other trainers."""

import pytest
import torch
from datasets import Dataset
from stage_parts import conversation_rows, draw_image, message
from transformers import GenerationConfig
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from aligngpt_trainers import AlignGPTDataCollator
from modeling_aligngpt import CHAT_TEMPLATES


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


@pytest.fixture
def model_and_processor(assembled):
    model, processor = assembled
    model.config.gate_context = processor.gate_context = "first_turn"
    yield model.eval(), processor
    model.config.gate_context = processor.gate_context = "prompt"
    processor.chat_template = CHAT_TEMPLATES["vicuna_v1"]


@pytest.mark.parametrize("suffix", ["", " "])
@pytest.mark.parametrize("template", TEMPLATES)
def test_training_and_asking_read_the_same(model_and_processor, template, suffix):
    _, processor = model_and_processor
    processor.chat_template, processor.image_suffix = CHAT_TEMPLATES[template], suffix
    rows = [talk(), talk(1), *conversation_rows(4)]
    for row in rows:
        trained = AlignGPTDataCollator(processor, "instruct", gate_context="first_turn")([row])
        read = trained["input_ids"][trained["prompt_mask"]].tolist()
        if not row["images"] or len(row["images"]) > 1:
            continue
        for asked in range(1, len(row["messages"]), 2):
            inputs = rendered(row, processor, row["messages"][:asked], add_generation_prompt=True)
            assert inputs["input_ids"][inputs["prompt_mask"].bool()].tolist() == read
        whole = rendered(row, processor)
        assert whole["input_ids"][whole["prompt_mask"].bool()].tolist() == read


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_reads_as_its_rows(model_and_processor, side):
    _, processor = model_and_processor
    texts = [
        processor.apply_chat_template(row["messages"][:asked], tokenize=False, add_generation_prompt=True)
        for row, asked in ((talk(), 5), (talk(1), 1), (talk(), 3))
    ]
    settings = {"padding": True, "padding_side": side, "add_special_tokens": False}
    images = [[draw_image("red")]] * 3
    together = processor(text=texts, images=images, return_tensors="pt", **settings)
    assert together["prompt_mask"].shape == together["input_ids"].shape
    assert not (together["prompt_mask"] * (1 - together["attention_mask"])).any()
    lists = processor(text=texts, images=images, **settings)
    assert lists["prompt_mask"] == together["prompt_mask"].tolist()
    for index, text in enumerate(texts):
        alone = processor(text=[text], images=[images[index]], return_tensors="pt", add_special_tokens=False)
        read = alone["input_ids"][alone["prompt_mask"].bool()]
        assert torch.equal(together["input_ids"][index][together["prompt_mask"][index].bool()], read)


def test_weights_agree_in_training_later_turns_and_behind_a_cache(model_and_processor):
    model, processor = model_and_processor
    row = talk()
    trained = model(**AlignGPTDataCollator(processor, "instruct", gate_context="first_turn")([row]))
    quiet = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**rendered(row, processor, row["messages"][:1], add_generation_prompt=True), **quiet)
    later = model.generate(**rendered(row, processor, row["messages"][:5], add_generation_prompt=True), **quiet)
    for output in (first, later):
        torch.testing.assert_close(output.align_weights, trained.align_weights, rtol=0, atol=1e-6)
    # the second turn behind the cache of the first answer equals the whole conversation read afresh
    inputs = rendered(row, processor, row["messages"][:3], add_generation_prompt=True)
    with torch.no_grad():
        whole = model(**inputs)
        length = int(inputs["prompt_mask"].sum())
        begun = model(input_ids=inputs["input_ids"][:, :length], pixel_values=inputs["pixel_values"])
        rest = model(input_ids=inputs["input_ids"][:, length:], past_key_values=begun.past_key_values)
    assert rest.align_weights is None
    torch.testing.assert_close(rest.logits, whole.logits[:, length:], rtol=1e-4, atol=1e-5)


def test_other_values_keep_their_meaning(model_and_processor):
    model, processor = model_and_processor
    row = talk()
    for context in ("prompt", "sequence"):
        model.config.gate_context = processor.gate_context = context
        asked = rendered(row, processor, row["messages"][:3], add_generation_prompt=True)
        assert "prompt_mask" not in asked
        batch = AlignGPTDataCollator(processor, "instruct", gate_context=context)([row])
        whole = rendered(row, processor)
        if context == "prompt":
            assert torch.equal(batch["prompt_mask"], batch["labels"] == -100)
            assert torch.equal(whole["prompt_mask"].bool(), batch["labels"] == -100)
        else:
            assert "prompt_mask" not in batch and "prompt_mask" not in whole


def test_the_reading_is_saved(model_and_processor, tmp_path):
    model, processor = model_and_processor
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    again.validate_with(model.config)
    model.config.gate_context = "prompt"
    with pytest.raises(ValueError, match="gate_context is first_turn in the processor and prompt in the config"):
        again.validate_with(model.config)
    with pytest.raises(ValueError, match="gate_context='answers' is not one of"):
        type(processor)(processor.image_processor, processor.tokenizer, gate_context="answers")


def test_a_text_without_turns_is_read_whole(model_and_processor):
    _, processor = model_and_processor
    inputs = processor(text="<image> what is it?", images=draw_image("red"), return_tensors="pt")
    assert torch.equal(inputs["prompt_mask"], inputs["attention_mask"])
    processor.chat_template = "{{ messages[0]['content'] }}"
    inputs = processor(text="<image> USER: a ASSISTANT: b", images=draw_image("red"), return_tensors="pt")
    assert torch.equal(inputs["prompt_mask"], inputs["attention_mask"])


@pytest.mark.parametrize("context", ["first_turn", "prompt"])
def test_trls_own_trainer_reads_no_answers(model_and_processor, tmp_path, context):
    """TRL's collator hands the mask on, so that a plain SFTTrainer's gate reads what ours reads."""
    model, processor = model_and_processor
    model.config.gate_context = processor.gate_context = context
    row = talk()
    messages = [
        {"role": m["role"], "content": [{k: v for k, v in p.items() if v is not None} for p in m["content"]]}
        for m in row["messages"]
    ]
    collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    theirs = collator([{"images": row["images"], "messages": messages}])
    ours = AlignGPTDataCollator(processor, "instruct", gate_context=context)([row])
    assert torch.equal(theirs["labels"], ours["labels"])
    assert torch.equal(theirs["prompt_mask"].bool(), ours["prompt_mask"])
    with torch.no_grad():
        assert torch.equal(model(**theirs).loss, model(**ours).loss)
    args = SFTConfig(
        str(tmp_path),
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        assistant_only_loss=True,
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list([{"images": row["images"], "messages": messages}]),
        processing_class=processor,
    )
    seen = []
    model.model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["prompt_mask"]), with_kwargs=True)
    trainer.train()
    assert torch.equal(seen[0].bool(), ours["prompt_mask"])


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
