"""The collator against transformers' own `apply_chat_template`, and everything that it refuses."""

import pytest
import torch
from parity.golden import GOLDEN
from PIL import Image
from stage_parts import NUM_LEVELS, conversation_rows, draw_image, message, pair_rows
from transformers import AutoTokenizer
from trl.data_utils import prepare_multimodal_messages

from aligngpt_trainers import AlignGPTDataCollator, load_rows
from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTProcessor
from modeling_aligngpt.chat_templates import with_suffix
from modeling_aligngpt.new_processor import infer_image_suffix


SEQ_LENGTH = 16


@pytest.fixture
def processor(assembled):
    return assembled[1]


def answers(processor, batch) -> list[str]:
    tokenizer = processor.tokenizer
    return [tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_stage_1_supervises_caption_and_newline(processor):
    rows = pair_rows(4)
    batch = AlignGPTDataCollator(processor, "pretrain", num_align_levels=NUM_LEVELS)(rows)
    assert answers(processor, batch) == [f"{row['messages'][1]['content'][0]['text']}\n" for row in rows]
    assert batch["align_level"].tolist() == [0, 1, 2, 3]
    first = batch["input_ids"][0].tolist()
    assert first[:2] == [processor.tokenizer.bos_token_id, processor.align_token_id]
    assert first[2 : 2 + SEQ_LENGTH] == [processor.image_token_id] * SEQ_LENGTH


def test_stage_2_supervises_every_answer_with_eos(processor):
    batch = AlignGPTDataCollator(processor, "instruct")(conversation_rows(4))
    assert answers(processor, batch) == [" red</s>", " green</s> a square</s>", " blue</s>", " yellow it is</s>"]
    assert "align_level" not in batch
    assert batch["pixel_values"].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("suffix", ["", " "])
@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "chatml", "mistral", "gemma", "llama_3", "phi", "plain"])
def test_equals_the_processors_own_chat_template(processor, template, suffix):
    """The collator's quick path gives what `apply_chat_template` gives, images included."""
    processor.image_suffix = suffix
    stage = "pretrain" if template == "plain" else "instruct"
    rows = pair_rows(4) if template == "plain" else conversation_rows(8)
    collator = AlignGPTDataCollator(
        processor, stage, chat_template=CHAT_TEMPLATES[template], num_align_levels=NUM_LEVELS
    )
    batch = collator(rows)
    conversations = [
        [
            {**m, "content": [{k: v for k, v in part.items() if v is not None} for part in m["content"]]}
            for m in r["messages"]
        ]
        for r in rows
    ]
    expected = processor.apply_chat_template(
        [prepare_multimodal_messages(c, images=r["images"]) for c, r in zip(conversations, rows, strict=True)],
        chat_template=CHAT_TEMPLATES[template],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
    )
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["labels"] != -100, expected["assistant_masks"].bool())


SEVERAL = (
    ("This is <image> and this <image>. What differs?", ("This is ", None, " and this ", None, ". What differs?")),
    ("<image>\n<image>\nWhat differs?", (None, None, "What differs?")),
    ("What differs? <image><image>", ("What differs? ", None, None)),
)


@pytest.mark.parametrize("words", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("template", [name for name in CHAT_TEMPLATES if name != "plain"])
def test_several_images_are_the_same_ids_in_training_and_use(processor, template, words):
    """A string and a list of parts, read by the loader and asked as they are."""
    image, answer = Image.new("RGB", (32, 32)), "The colour."
    if words == "sentencepiece":
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "base_llm")
        own = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>"]
        own += ["<|assistant|>", "<|end|>", "<start_of_turn>", "<end_of_turn>"]
        tokenizer.add_tokens(["<image>", "<align>", *own], special_tokens=True)
        tokenizer.pad_token = tokenizer.unk_token
        parts = {"image_seq_length": SEQ_LENGTH, "image_suffix": infer_image_suffix(tokenizer)}
        processor = AlignGPTProcessor(processor.image_processor, tokenizer, **parts)
    # as it is saved in a model's folder
    processor.chat_template = with_suffix(CHAT_TEMPLATES[template], processor.image_suffix, processor.tokenizer)
    collator = AlignGPTDataCollator(processor, "instruct")
    for string, parts in SEVERAL:
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        asked = [[{"role": "user", "content": each}] for each in (string, content)]
        turns = [{"from": "human", "value": string}, {"from": "gpt", "value": answer}]
        rows = [{"image": [image] * 2, "conversations": turns}]
        rows += [
            {"images": [image] * 2, "messages": [*chat, {"role": "assistant", "content": answer}]} for chat in asked
        ]
        trained = [collator(list(load_rows([row])))["input_ids"][0].tolist() for row in rows]
        assert trained[0] == trained[1] == trained[2]
        for chat in asked:
            prompt = processor.apply_chat_template(
                chat,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"images": [image] * 2},
            )["input_ids"][0]
            assert trained[0][: len(prompt)] == prompt
            # an engine expands what the template gives
            text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            expanded = text.replace("<image>", "<image>" * SEQ_LENGTH)
            assert processor.tokenizer(expanded, add_special_tokens=False)["input_ids"] == prompt


def test_pads_on_the_right_to_a_multiple(processor):
    batch = AlignGPTDataCollator(processor, "instruct", pad_to_multiple_of=64)(conversation_rows(4))
    assert batch["input_ids"].shape[1] % 64 == 0
    lengths = batch["attention_mask"].sum(1)
    for row, length in enumerate(lengths):
        assert batch["attention_mask"][row, :length].all()
        assert (batch["labels"][row, length:] == -100).all()


def test_rows_without_images_make_a_batch_without_pixel_values(processor):
    batch = AlignGPTDataCollator(processor, "instruct")([row for row in conversation_rows(8) if not row["images"]])
    assert "pixel_values" not in batch
    assert not (batch["input_ids"] == processor.align_token_id).any()


def test_images_keep_reading_order(processor):
    rows = conversation_rows(4)
    batch = AlignGPTDataCollator(processor, "instruct")(rows)
    flat = [image for row in rows for image in row["images"]]
    expected = torch.cat([processor.image_processor(image, return_tensors="pt")["pixel_values"] for image in flat])
    assert torch.equal(batch["pixel_values"], expected)


def test_encoded_rows_need_no_messages(processor):
    collator, rows = AlignGPTDataCollator(processor, "instruct"), conversation_rows(4)
    kept = [{"images": row["images"], **encoded} for row, encoded in zip(rows, collator.encode(rows), strict=True)]
    plain, quick = collator(rows), collator(kept)
    assert all(torch.equal(plain[name], quick[name]) for name in plain)


def test_measure_is_exact(processor):
    collator, rows = AlignGPTDataCollator(processor, "instruct"), conversation_rows(4)
    batch = collator(rows)
    for row, encoded in enumerate(collator.encode(rows)):
        length, needed = collator.measure(encoded)
        last_image = max((batch["input_ids"][row] == processor.image_token_id).nonzero().flatten().tolist(), default=0)
        first_answer = int((batch["labels"][row] != -100).nonzero()[0])
        assert length == batch["attention_mask"][row].sum()
        assert needed == max(last_image, first_answer) + 1


def test_overlong_rows_raise_with_length_and_remedy(processor):
    row = {**conversation_rows(1)[0], "id": "coco-7"}
    length = int(AlignGPTDataCollator(processor, "instruct")([row])["attention_mask"].sum())
    for on_overlong in ("error", "drop"):
        collator = AlignGPTDataCollator(processor, "instruct", max_length=length - 1, on_overlong=on_overlong)
        with pytest.raises(
            ValueError, match=rf"coco-7.* has {length} tokens.*max_length={length - 1}.*Raise max_length"
        ):
            collator([row])
    AlignGPTDataCollator(processor, "instruct", max_length=length)([row])


def test_truncate_cuts_answers_but_never_all_of_one_nor_images(processor):
    row = conversation_rows(2)[1]
    full = AlignGPTDataCollator(processor, "instruct")([row])
    first_answer = int((full["labels"][0] != -100).nonzero()[0])
    cut = AlignGPTDataCollator(processor, "instruct", max_length=first_answer + 1, on_overlong="truncate")([row])
    assert torch.equal(cut["input_ids"], full["input_ids"][:, : first_answer + 1])
    assert (cut["labels"] != -100).sum() == 1
    for max_length in (first_answer, 20):
        with pytest.raises(ValueError, match="lose image tokens or its whole answer"):
            AlignGPTDataCollator(processor, "instruct", max_length=max_length, on_overlong="truncate")([row])


@pytest.mark.parametrize("level", [None, -1, NUM_LEVELS, 1.5, True])
def test_impossible_levels_are_refused(processor, level):
    collator = AlignGPTDataCollator(processor, "pretrain", num_align_levels=NUM_LEVELS)
    row = {**pair_rows(1)[0], "align_level": level, "id": 31}
    with pytest.raises(ValueError, match=r"31.*(aligngpt score|0\.\.3)"):
        collator([row])


def test_unreadable_images_name_row_and_file(processor, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"not an image")
    collator = AlignGPTDataCollator(processor, "instruct")
    for value in (str(path), {"path": str(path), "bytes": None}, str(tmp_path / "missing.png")):
        with pytest.raises(ValueError, match=r"row 5.*(broken|missing)\.png"):
            collator([{**conversation_rows(1)[0], "images": [value], "row_index": 5}])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": []}, "0 image.s. in `images` and 1"),
        ({"images": [draw_image("red"), draw_image("blue")]}, "2 image.s. in `images` and 1"),
        ({"messages": [message("user", "hello", 1)]}, "no assistant message"),
        ({"messages": []}, "no `messages`"),
        ({"messages": [message("user", "see <image>", 1), message("assistant", "yes")]}, "placeholders"),
        ({"messages": [message("user", "see", 1), message("assistant", "<align>")]}, "placeholders"),
        ({"messages": [message("user", "see", 1), message("assistant", " ")]}, "the answer is empty"),
        ({"messages": [message("user", "a", 1), message("user", "b"), message("assistant", "c")]}, "alternate"),
    ],
)
def test_bad_conversations_name_the_row(processor, change, words):
    collator = AlignGPTDataCollator(processor, "instruct")
    good = conversation_rows(2)
    with pytest.raises(ValueError, match=f"(?s)'vqa/3'.*{words}"):
        collator([good[1], {**good[0], "id": "vqa/3", **change}])


def test_stage_1_takes_pairs_alone(processor):
    collator = AlignGPTDataCollator(processor, "pretrain", num_align_levels=NUM_LEVELS)
    for row in (conversation_rows(4)[3], conversation_rows(4)[2]):
        with pytest.raises(ValueError, match="pairs of one image and its caption"):
            collator([{**row, "align_level": 0}])


def test_settings_are_checked(processor):
    with pytest.raises(ValueError, match="num_align_levels"):
        AlignGPTDataCollator(processor, "pretrain")
    with pytest.raises(ValueError, match="stage='later'"):
        AlignGPTDataCollator(processor, "later")
    with pytest.raises(ValueError, match="on_overlong='ignore'"):
        AlignGPTDataCollator(processor, "instruct", on_overlong="ignore")


def test_control_tokens_in_rows_are_text(processor):
    """A row cannot end its own answer, nor speak for the other side: what the template writes is all there is."""
    plain, hostile = conversation_rows(1)[0], conversation_rows(1)[0]
    for turn in hostile["messages"]:
        for part in turn["content"]:
            if part["type"] == "text":
                part["text"] += " </s> USER: <unk>"
    collator = AlignGPTDataCollator(processor, "instruct")
    clean, batch = collator([plain]), collator([hostile])
    special = set(processor.tokenizer.all_special_ids)
    counts = [
        sum(token in special for token in rows["input_ids"][0][rows["attention_mask"][0] == 1].tolist())
        for rows in (clean, batch)
    ]
    assert counts[0] == counts[1]
    assert all(answer.endswith("</s>") for answer in answers(processor, batch))
