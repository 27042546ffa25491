"""The processor: the authors' ids, labels and pixel values, ways to give images, errors, saving, the pipeline."""

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import zygote
from modeling.test_chat_templates import make_tokenizer
from PIL import Image
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoProcessor, AutoTokenizer, CLIPVisionConfig, LlamaConfig, SiglipImageProcessor, pipeline

from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.compat_v4 import IS_TRANSFORMERS_4
from modeling_aligngpt.images_aligngpt import pil_image_processor
from modeling_aligngpt.new_processor import infer_image_suffix, processor_from_parts
from modeling_aligngpt.processing_aligngpt import BREAK


GOLDEN = Path(os.environ.get("ALIGNGPT_GOLDEN") or Path(__file__).parents[1] / "fixtures" / "golden")
TEMPLATES = {"v1": "vicuna_v1", "vicuna_v1": "vicuna_v1", "llava_llama_2": "llama_2", "plain": "plain"}
PLACEHOLDERS = ["<image>", "<align>"]


def read_json(name):
    return json.loads((GOLDEN / "json" / f"{name}.json").read_text(encoding="utf-8"))


def llama_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "base_llm")
    tokenizer.add_tokens(PLACEHOLDERS, special_tokens=True)
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def config_for(tokenizer, image_size=48, patch_size=2, **kwargs):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**vision, "vocab_size": 576, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    return AlignGPTConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=image_size, patch_size=patch_size),
        text_config=LlamaConfig(**text, pad_token_id=0),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        align_token_id=tokenizer.convert_tokens_to_ids("<align>"),
        **kwargs,
    )


@pytest.fixture(scope="module")
def golden():
    """The processor of the recorded model: 576 positions an image."""
    tokenizer = llama_tokenizer()
    template = CHAT_TEMPLATES["vicuna_v1"]
    tower = GOLDEN / "clip-vit-tiny"
    return processor_from_parts(
        tokenizer,
        config_for(tokenizer),
        vision_tower=tower,
        chat_template=template,
        do_pad=True,
        transparency="dropped",
    )


@pytest.fixture
def small():
    """Four positions an image of 8 x 8, byte-level tokens, a template without BOS."""
    return make_small()


def make_small(chat_template="chatml", adds_bos=True, **kwargs):
    tokenizer = make_tokenizer("<s>", "<|im_end|>", ("<pad>", "<|im_start|>"))
    tokenizer.pad_token = "<pad>"
    if adds_bos:
        bos = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[bos]
        )
    config = config_for(tokenizer, image_size=8, patch_size=4)
    return processor_from_parts(tokenizer, config, chat_template=CHAT_TEMPLATES[chat_template], **kwargs)


def draw_image(seed=0, size=(20, 12), mode="RGB"):
    pixels = np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode) if mode != "RGBA" else Image.fromarray(pixels, "RGBA")


def user(*parts):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def shown(image):
    return {"type": "image", "image": image}


def tokens(processor, row):
    """The row's text, each run of image positions as one `<image>`."""
    run = "<image>" * processor.image_seq_length
    text = processor.tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.replace(run, "[image]")


def expected_ids(processor, recorded, labels=None):
    """Recorded ids (and labels) with `<align>` behind BOS and each image's positions in place of its -200."""
    ids, targets = [], []
    for position, token in enumerate(recorded):
        row = [processor.image_token_id] * processor.image_seq_length if token == -200 else [token]
        if position == 0 and -200 in recorded:
            row.append(processor.align_token_id)
        ids += row
        targets += [-100] * len(row) if labels is None or len(row) > 1 else [labels[position]]
    return ids, targets


RECORDED = read_json("training_targets")
names = lambda record: f"{record.get('template', '')}-{record['name']}"  # noqa: E731


@pytest.mark.parametrize("record", RECORDED, ids=names)
def test_training_ids_and_labels_are_the_authors(golden, record):
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[role], "content": content} for role, content in record["conversation"]]
    images = {"images": [draw_image()]} if record["has_image"] else {}
    out = golden.apply_chat_template(
        messages,
        chat_template=CHAT_TEMPLATES[TEMPLATES[record["template"]]],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs=images,
    )
    ids, labels = expected_ids(golden, record["input_ids"], record["labels"])
    assert out["input_ids"][0] == ids
    assert [token if mask else -100 for token, mask in zip(ids, out["assistant_masks"][0], strict=True)] == labels


@pytest.mark.parametrize("record", [*RECORDED, *read_json("inference")], ids=names)
def test_raw_prompts_give_the_authors_ids(golden, record):
    has_image = -200 in record["input_ids"]
    for prompt in (record["prompt"], "<s>" + record["prompt"]):
        row = golden(text=prompt, images=draw_image() if has_image else None)["input_ids"][0]
        assert list(row) == expected_ids(golden, record["input_ids"])[0]


@pytest.mark.parametrize("record", read_json("inference"), ids=names)
def test_chats_give_the_authors_ids(golden, record):
    messages = []
    for question, answer in record["turns"]:
        question = question.removeprefix("<image>\n")
        path = {"type": "image", "path": str(GOLDEN / "images" / str(record["image"]))}
        messages += [user(*([path] if record["image"] and not messages else []), question)]
        messages += [{"role": "assistant", "content": answer}] if answer else []
    out = golden.apply_chat_template(
        messages,
        chat_template=CHAT_TEMPLATES[TEMPLATES[record["conv"]]],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    assert out["input_ids"][0].tolist() == expected_ids(golden, record["input_ids"])[0]
    if record["image"]:
        recorded = load_file(GOLDEN / "tensors" / f"infer_{record['name']}.safetensors")["pixel_values"]
        torch.testing.assert_close(out["pixel_values"], recorded.view_as(out["pixel_values"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("do_pad", "mode"), [(True, "pad"), (False, "square")])
def test_pixel_values_are_the_authors(golden, do_pad, mode):
    images = [Image.open(GOLDEN / "images" / name) for name in read_json("preprocess_images")["files"]]
    assert {image.mode for image in images} == {"RGB", "RGBA", "L"}
    values = golden(images=images, do_pad=do_pad, return_tensors="pt")["pixel_values"]
    recorded = load_file(GOLDEN / "tensors" / "preprocess_images.safetensors")[mode]
    torch.testing.assert_close(values, recorded, atol=1e-5, rtol=0)


def test_every_way_to_give_a_image(small, tmp_path):
    image = draw_image()
    path = tmp_path / "image.png"
    image.save(path)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    array = np.array(image)
    wanted = small(images=image, return_tensors="pt")["pixel_values"]
    assert wanted.shape == (1, 3, 8, 8)
    ways = [[image], [[image]], (image,), str(path), path, [path], encoded, array, array[None], [array]]
    ways += [array.transpose(2, 0, 1), torch.from_numpy(array.transpose(2, 0, 1).copy())]
    for given in ways:
        torch.testing.assert_close(small(images=given, return_tensors="pt")["pixel_values"], wanted)
        row = small(images=given, text="<image> a", return_tensors="pt")
        assert tokens(small, row["input_ids"][0]) == "<s><align>[image] a"
    opaque = draw_image(mode="RGBA")
    opaque.putalpha(255)
    torch.testing.assert_close(
        small(images=opaque, return_tensors="pt")["pixel_values"],
        small(images=opaque.convert("RGB"), return_tensors="pt")["pixel_values"],
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_all_kinds_of_rows(small, side):
    one, two, three = (draw_image(seed) for seed in range(3))
    text = ["<image> a", "no image", "<image> and <image>: which is longer?"]
    small.tokenizer.padding_side = side
    wanted = None
    for images in ([[one], [], [two, three]], [one, None, [two, three]], [one, two, three]):
        out = small(images=images, text=text, padding=True, return_tensors="pt")
        assert sorted(out) == ["attention_mask", "input_ids", "pixel_values"]
        assert out["pixel_values"].shape == (3, 3, 8, 8)
        rows = [
            tokens(small, row[mask.bool()])
            for row, mask in zip(*map(out.get, ("input_ids", "attention_mask")), strict=True)
        ]
        assert rows == [
            "<s><align>[image] a",
            "<s>no image",
            "<s><align>[image] and [image]: which is longer?",
        ]
        assert out["attention_mask"][1, 0 if side == "left" else -1] == 0
        alone = torch.cat([small(images=image, return_tensors="pt")["pixel_values"] for image in (one, two, three)])
        torch.testing.assert_close(out["pixel_values"], alone)
        wanted = out["input_ids"] if wanted is None else wanted
        assert torch.equal(out["input_ids"], wanted)


@pytest.mark.parametrize("images", [None, [], [[], []], [None, None]])
def test_text_only(small, images):
    out = small(images=images, text=["one", "two three"])
    assert sorted(out) == ["attention_mask", "input_ids"]
    assert [tokens(small, row) for row in out["input_ids"]] == ["<s>one", "<s>two three"]


def test_align_is_set_once_behind_bos(small):
    for prompt in ("<image> a", "<s><image> a", "<align><image> a", "<s><align><image> a"):
        assert tokens(small, small(images=draw_image(), text=prompt)["input_ids"][0]) == "<s><align>[image] a"
    bare = small(images=draw_image(), text="<image> a", add_special_tokens=False)["input_ids"][0]
    assert tokens(small, bare) == "<align>[image] a"
    mixed = small(images=[[draw_image()], []], text=["<s><image> a", "b"])["input_ids"]
    assert [tokens(small, row) for row in mixed] == ["<s><align>[image] a", "<s>b"]
    no_bos = make_small(adds_bos=False)
    rows = no_bos(images=[[draw_image()], []], text=["<s><image> a", "b"])["input_ids"]
    assert [tokens(no_bos, row) for row in rows] == ["<s><align>[image] a", "b"]


def test_bos_that_starts_a_turn_is_no_bos(small):
    small.tokenizer.bos_token = "<|im_start|>"
    row = small(images=draw_image(), text="<|im_start|>user\n<image>", add_special_tokens=False)["input_ids"][0]
    assert tokens(small, row) == "<align><|im_start|>user\n[image]"


def test_image_suffix():
    processor = make_small(image_suffix=" ")
    for prompt, wanted in (
        ("<image>a", "<s><align>[image] a"),
        ("a<image>", "<s><align> a[image]"),
        ("<image><image>\n", "<s><align>[image][image] \n"),
        ("<|im_start|>a<image><|im_end|>", "<s><align><|im_start|>a[image]<|im_end|>"),
    ):
        images = [draw_image()] * prompt.count("<image>")
        assert tokens(processor, processor(images=images, text=prompt)["input_ids"][0]) == wanted
    assert infer_image_suffix(processor.tokenizer) == "" and infer_image_suffix(llama_tokenizer()) == " "


def test_kwargs_reach_their_part(small):
    out = small(images=draw_image(), text="<image> a", padding="max_length", max_length=30, do_normalize=False)
    assert len(out["input_ids"][0]) == 30 and np.asarray(out["pixel_values"]).min() >= 0
    nested = small(
        images=draw_image(),
        text="<image> a",
        text_kwargs={"padding": "max_length", "max_length": 30, "add_special_tokens": False},
        images_kwargs={"do_normalize": False},
    )
    assert len(nested["input_ids"][0]) == 30 and tokens(small, nested["input_ids"][0]).startswith("<align>[image] a")
    kinds = small(images=draw_image(), text="<image> a", return_mm_token_type_ids=True)["mm_token_type_ids"][0]
    assert list(kinds) == [0, 0, 1, 1, 1, 1, 0, 0]
    assert small._get_num_multimodal_tokens(image_sizes=[(10, 20), (5, 5)])["num_image_tokens"] == [4, 4]


@pytest.mark.parametrize(
    ("images", "text", "match"),
    [
        ([[0], [0]], ["<image>", "none"], r"Row 1: .* but it has 0 and 1 images; write one <image> for each"),
        ([[0], []], ["<image><image>", "none"], r"Row 0: .* but it has 2 and 1 images"),
        ([0, 0, 0], ["<image>", "<image>"], r"Rows 0 to 1: .* but they have 2 \(1, 1\) and 3 images"),
        ([[0], [0]], ["<image>"], "2 rows of images for 1 prompts"),
        (None, ["a", "<image>"], r"Row 1: .* but it has 1 and 0 images"),
        ([[], []], ["a", "<image>"], r"Row 1: .* but it has 1 and 0 images"),
        (None, None, "at least one input"),
    ],
)
def test_images_and_placeholders_must_agree(small, images, text, match):
    images = (
        [[draw_image()] * len(row) if isinstance(row, list) else draw_image() for row in images] if images else images
    )
    with pytest.raises(ValueError, match=match):
        small(images=images, text=text)


def test_unreadable_images_are_named(small, tmp_path):
    broken, cut = tmp_path / "broken.png", tmp_path / "cut.png"
    broken.write_text("no image")
    draw_image(size=(300, 300)).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    text = ["<image>", "<image>"]
    for bad in (broken, cut, tmp_path / "missing.png"):
        for given in (bad, str(bad)):
            with pytest.raises(ValueError, match=rf"row 1, image 0 \(.*{bad.name}\): the image cannot be read"):
                small(images=[[draw_image()], [given]], text=text)
    with pytest.raises(ValueError, match=r"image 1: the image cannot be read .*repair the file or leave the row out"):
        small(images=[draw_image(), Image.open(cut)], text=text)
    with pytest.raises(ValueError, match="row 0, image 1: the image cannot be read"):
        small(images=[[draw_image(), 3.5]], text="<image><image>")


def test_other_errors(small):
    with pytest.raises(ValueError, match="not videos: leave `videos` out"):
        small(text="a", videos=["a.mp4"])
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        small(images=draw_image(), text="<image>", truncation=True, max_length=4)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "base_llm")
    with pytest.raises(ValueError, match="The tokenizer has no token '<image>': add it"):
        AlignGPTProcessor(small.image_processor, tokenizer)


def test_misspelt_arguments_are_refused(small):
    chat = [user(shown(draw_image()), "What is it?")]
    with pytest.raises(TypeError, match="no argument 'align_levels': did you mean 'align_level'"):
        small(images=draw_image(), text="<image> a", align_levels=3)
    with pytest.raises(TypeError, match="no argument 'image': did you mean 'images'"):
        small(image=draw_image(), text="<image> a")
    with pytest.raises(TypeError, match="no argument 'paddding': did you mean 'padding'"):
        small(text="a", paddding=True)
    with pytest.raises(TypeError, match="no argument 'align_levels': did you mean 'align_level'"):
        small.apply_chat_template(chat, tokenize=True, return_dict=True, align_levels=3)
    small.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False)  # a setting of other templates


def test_tools_have_no_place(small):
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}]
    chat = [user("Hi")]
    with pytest.raises(ValueError, match="has no place for tools: leave `tools` out"):
        small.apply_chat_template(chat, tools=tools)
    assert small.apply_chat_template(chat, tools=None) == small.apply_chat_template(chat, tools=[])
    small.apply_chat_template(chat, chat_template="{{ tools }}", tools=tools)


def test_a_level_travels_with_the_inputs(small):
    assert small(images=draw_image(), text="<image> a", align_level=3)["align_level"] == [3]
    batch = small(text=["a", "b"], padding=True, return_tensors="pt", align_level=[3, 4])
    assert batch["align_level"].tolist() == [3, 4]
    chats = [[user(shown(draw_image()), "What?")], [user("Hi")]]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    padding = {"padding": True} if IS_TRANSFORMERS_4 else {"processor_kwargs": {"padding": True}}
    assert small.apply_chat_template(chats, align_level=5, **settings, **padding)["align_level"].tolist() == [5, 5]


def test_processor_and_config_must_agree(golden):
    tokenizer = golden.tokenizer
    golden.validate_with(config_for(tokenizer))
    with pytest.raises(ValueError, match=r"images of 48x48, the vision tower takes 24x24 .*: set size and crop"):
        golden.validate_with(config_for(tokenizer, image_size=24, patch_size=1))
    with pytest.raises(ValueError, match="image_seq_length is 576 in the processor and 144 in the config"):
        golden.validate_with(config_for(tokenizer, patch_size=4))
    config = config_for(tokenizer)
    config.align_token_id = 7
    with pytest.raises(ValueError, match="align_token_id is 513 in the processor and 7 in the config"):
        golden.validate_with(config)
    config = config_for(tokenizer)
    config.text_config.vocab_size = 512
    with pytest.raises(ValueError, match="have ids up to 513, but the embeddings have 512 rows: resize"):
        golden.validate_with(config)


def test_image_processor_follows_the_tower(golden, tmp_path):
    tokenizer, config = golden.tokenizer, config_for(golden.tokenizer)
    assert golden.image_processor.do_pad and golden.image_processor.do_center_crop
    assert dict(golden.image_processor.size)["shortest_edge"] == dict(golden.image_processor.crop_size)["height"] == 48
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "siglip")
    # SigLIP's own way is to resize to the square, with its own normalisation, and the size is the tower's
    processor = processor_from_parts(tokenizer, config, vision_tower=tmp_path / "siglip")
    assert (
        list(processor.image_processor.image_mean) == [0.5, 0.5, 0.5] and not processor.image_processor.do_center_crop
    )
    white = processor(images=Image.new("RGB", (30, 10), "white"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(white, torch.ones(1, 3, 48, 48))
    bare = tmp_path / "bare"
    config.vision_config.save_pretrained(bare)
    unknown = r"bare': no preprocessor_config.json \(or processor_config.json\) that says how images are scaled"
    with pytest.raises(ValueError, match=unknown):
        processor_from_parts(tokenizer, config, vision_tower=bare)
    # of a class that cannot be had here, what the file says is taken
    settings = {"image_processor_type": "SomebodysImageProcessor", "image_mean": [0.3] * 3, "size": 48}
    (bare / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=unknown):
        processor_from_parts(tokenizer, config, vision_tower=bare)
    (bare / "preprocessor_config.json").write_text(json.dumps({**settings, "image_std": [0.2] * 3}))
    processor = processor_from_parts(tokenizer, config, vision_tower=bare)
    assert list(processor.image_processor.image_mean) == [0.3] * 3 and not processor.image_processor.do_center_crop


def test_answers_are_masked_with_images_on_either_padding_side(small):
    chats = [
        [
            user(shown(draw_image()), shown(draw_image(1)), "One?"),
            {"role": "assistant", "content": "First."},
            user("Two?", shown(draw_image(2))),
            {"role": "assistant", "content": "Second one."},
        ],
        [user("No image."), {"role": "assistant", "content": "None."}],
    ]
    for processor in (small, make_small("vicuna_v1", image_suffix=" ")):
        ends = "<|im_end|>"
        space = "" if processor is small else " "
        for side in ("left", "right"):
            out = processor.apply_chat_template(
                chats,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
                processor_kwargs={"padding": True, "padding_side": side},
            )
            answers = [
                processor.tokenizer.decode(row[mask.bool()], clean_up_tokenization_spaces=False)
                for row, mask in zip(out["input_ids"], out["assistant_masks"], strict=True)
            ]
            assert answers == [f"{space}First.{ends}{space}Second one.{ends}", f"{space}None.{ends}"]
            assert out["pixel_values"].shape == (3, 3, 8, 8)


def test_what_a_user_writes_is_text(small):
    """By default, in every way to ask; a model's own markers stay possible on purpose."""
    said = "What does <image> mean, and <align> or <|im_end|>?"
    chat = [user(shown(draw_image()), said)]
    end = small.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = {"tokenize": True, "return_dict": True}
    rows = [small.apply_chat_template(chat, **ids)["input_ids"][0]]
    rows += [small.apply_chat_template([chat, chat], padding=True, **ids)["input_ids"][1]]
    text = small.apply_chat_template(chat, tokenize=False)
    rows.append(small(images=[draw_image()], text=[text], add_special_tokens=False)["input_ids"][0])
    for row in rows:
        assert row == rows[0]
        assert row.count(small.image_token_id) == 4 and row.count(small.align_token_id) == 1 and row.count(end) == 1
        assert said in tokens(small, row).replace(BREAK, "")
    with pytest.raises(ValueError, match=r"Row 0: .* it has 2 and 1 images"):
        small.apply_chat_template(chat, sanitize_control_tokens=False, **ids)


def test_answers_and_strings_are_text_too(small):
    """In an answer that is handed back; in a content of one string, where `<image>` alone keeps its meaning."""
    turns = [
        {"role": "user", "content": "<image>What is <|im_end|> in it?"},
        {"role": "assistant", "content": [{"type": "text", "text": "a</s> <align> kite<|im_end|>"}]},
        user("and <|im_start|>assistant now?"),
    ]
    text = small.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    row = small(images=[draw_image()], text=[text], add_special_tokens=False)["input_ids"][0]
    ends, starts = (row.count(small.tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_end|>", "<|im_start|>"))
    assert (ends, starts) == (3, 4)
    assert row.count(small.image_token_id) == 4 and row.count(small.align_token_id) == 1
    assert small.tokenizer.convert_tokens_to_ids("</s>") not in row or small.tokenizer.eos_token != "</s>"


LOAD = """
import json, sys
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
processor.save_pretrained(sys.argv[2])
out = processor(images=[[sys.argv[3]], []], text=["<image>\\nWhat?", "a b"])
values = [round(float(value), 4) for value in out["pixel_values"][0].flatten()[:50]]
print(json.dumps([[list(map(int, row)) for row in out["input_ids"]], values, type(processor).__module__]))
"""


def test_save_and_load(golden, tmp_path):
    image = GOLDEN / "images" / "img4.png"
    config_for(golden.tokenizer).save_pretrained(tmp_path / "saved")
    before = golden.to_dict()
    golden.save_pretrained(tmp_path / "saved")
    assert golden.to_dict() == before
    wanted = golden(images=[[image], []], text=["<image>\nWhat?", "a b"])
    first = np.asarray(wanted["pixel_values"][0]).flatten()[:50]
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(again) is AlignGPTProcessor and again.to_dict() == before
    assert again.chat_template == again.tokenizer.chat_template == golden.chat_template
    assert again.tokenizer("A cat.")["input_ids"] == golden.tokenizer("A cat.")["input_ids"]
    # elsewhere, with nothing of ours importable, once and once more from what that saved
    for folder, then in (("saved", "second"), ("second", "third")):
        if not (tmp_path / folder / "config.json").is_file():
            for name in ("config.json", "configuration_aligngpt.py"):
                (tmp_path / folder / name).write_bytes((tmp_path / "saved" / name).read_bytes())
        env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        words = [str(tmp_path / folder), str(tmp_path / then), str(image)]
        run = zygote.run(LOAD, words, env, tmp_path)
        assert run.returncode == 0, run.stderr
        rows, values, module = json.loads(run.stdout.splitlines()[-1])
        assert rows == [list(row) for row in wanted["input_ids"]] and module.startswith("transformers_modules")
        np.testing.assert_allclose(values, first, atol=1e-4)
        _check_portable(tmp_path / folder)
    _check_portable(tmp_path / "third")


def _check_portable(folder):
    """Only names that both generations of transformers know, and the code beside them."""
    processor_config = json.loads((folder / "processor_config.json").read_text())
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    auto_map = {"AutoProcessor": "processing_aligngpt.AlignGPTProcessor"}
    assert processor_config["auto_map"] == tokenizer_config["auto_map"] == auto_map
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(tokenizer_config.get("extra_special_tokens"), list)
    beside = folder / "preprocessor_config.json"
    image_config = json.loads(beside.read_text()) if beside.is_file() else processor_config["image_processor"]
    assert image_config["image_processor_type"] == "LlavaImageProcessor" and "auto_map" not in image_config
    files = {path.name for path in folder.iterdir()}
    assert {"processing_aligngpt.py", "images_aligngpt.py", "chat_template.jinja", "tokenizer.json"} <= files
    assert not [name for name in files if name.endswith(".part")]


def test_pil_form_of_an_image_processor(golden):
    assert pil_image_processor(golden.image_processor) is golden.image_processor
    assert pil_image_processor(object) is object


@pytest.fixture(scope="module")
def pipe():
    processor = make_small()
    torch.manual_seed(0)
    config = config_for(processor.tokenizer, image_size=8, patch_size=4)
    model = AlignGPTForConditionalGeneration(config).eval()
    return pipeline("image-text-to-text", model=model, processor=processor)


def test_pipeline_with_chats(pipe, tmp_path):
    path = tmp_path / "image.png"
    draw_image().save(path)
    chat = [user({"type": "image", "path": str(path)}, "What is it?")]
    settings = {"max_new_tokens": 3, "do_sample": False} if IS_TRANSFORMERS_4 else {"max_new_tokens": 3}
    one = pipe(text=chat, **settings, return_full_text=False)
    assert isinstance(one[0]["generated_text"], str)
    full = pipe(text=chat, **settings)[0]["generated_text"]
    assert [message["role"] for message in full] == ["user", "assistant"]
    assert full[-1]["content"] == one[0]["generated_text"]
    both = pipe(text=[chat, [user("No image.")]], **settings, return_full_text=False)
    assert both[0][0]["generated_text"] == one[0]["generated_text"] and len(both) == 2


def test_pipeline_with_prompts(pipe):
    image = draw_image()
    one = pipe(images=image, text="<image> a", max_new_tokens=3, return_full_text=False)
    many = pipe(images=[image, image], text=["<image> a", "<image> a"], max_new_tokens=3, return_full_text=False)
    assert [row[0]["generated_text"] if isinstance(row, list) else row["generated_text"] for row in many] == [
        one[0]["generated_text"]
    ] * 2
    assert isinstance(pipe(text="no image", max_new_tokens=3)[0]["generated_text"], str)
    with pytest.raises(ValueError, match=r"Row 0: .* it has 1 and 0 images"):
        pipe(text="<image> a", max_new_tokens=3)


def test_pipeline_with_a_level(pipe):
    """By itself (transformers 4 drops all settings of a chat), and among the settings of `generate`."""
    seen, generate = [], pipe.model.generate
    pipe.model.generate = lambda **kwargs: seen.append(kwargs.get("align_level")) or generate(**kwargs)
    try:
        image, chat = draw_image(), [user(shown(draw_image()), "What is it?")]
        settings = {"max_new_tokens": 2, "return_full_text": False}
        asked = pipe(text=chat, generate_kwargs={"align_level": 7}, **settings)
        if not IS_TRANSFORMERS_4:
            assert pipe(text=chat, align_level=7, **settings) == asked
            pipe(text=[chat, chat], align_level=2, batch_size=2, **settings)
        pipe(images=image, text="<image> a", align_level=0, **settings)
        with pytest.raises(TypeError, match="no argument 'align_levels': did you mean 'align_level'"):
            pipe(images=image, text="<image> a", align_levels=0, **settings)
        with pytest.raises(ValueError, match=r"align_level=.*9.* is out of range"):
            pipe(images=image, text="<image> a", align_level=9, **settings)
    finally:
        del pipe.model.generate
    seen = [level if isinstance(level, int) else level.tolist() for level in seen]
    assert seen == ([7, [0], [9]] if IS_TRANSFORMERS_4 else [7, [7], [2, 2], [0], [9]])
