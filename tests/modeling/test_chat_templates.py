"""Chat templates: against the authors' recorded prompts, the families' own templates, and bad conversations."""

import json
import os
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_aligngpt import AlignGPTProcessor
from modeling_aligngpt.chat_templates import (
    CHAT_TEMPLATES,
    LLAMA_2_SYSTEM,
    VICUNA_SYSTEM,
    select_chat_template,
    stop_token,
    with_suffix,
)
from modeling_aligngpt.new_processor import image_processor_for, infer_image_suffix


GOLDEN = Path(os.environ.get("ALIGNGPT_GOLDEN") or Path(__file__).parents[1] / "fixtures" / "golden")
RECORDED = {"v1": "vicuna_v1", "vicuna_v1": "vicuna_v1", "llava_llama_2": "llama_2", "plain": "plain"}
FAMILIES = [name for name in CHAT_TEMPLATES if name != "plain"]
SPECIAL_TOKENS = {
    "vicuna_v1": ("<s>", "</s>"),
    "llama_2": ("<s>", "</s>"),
    "plain": ("<s>", "</s>"),
    "chatml": (None, "<|im_end|>"),
    "llama_3": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<eos>"),
    "phi": ("<s>", "<|endoftext|>"),
}


def make_tokenizer(bos=None, eos=None, more=(), chat_template=None):
    """A byte-level tokenizer with these special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos)
    tokenizer.add_tokens([token for token in ("<image>", "<align>", *more) if token], special_tokens=True)
    tokenizer.chat_template = chat_template
    return tokenizer


def render(name, messages, **kwargs):
    tokenizer = make_tokenizer(*SPECIAL_TOKENS[name])
    return tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATES[name], tokenize=False, **kwargs)


def supervised(name, messages):
    """The supervised pieces of the rendered conversation."""
    tokenizer = make_tokenizer(*SPECIAL_TOKENS[name], more=("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"))
    out = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True
    )
    pieces, last = [], 0
    for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True):
        if mask and not last:
            pieces.append([])
        if mask:
            pieces[-1].append(token)
        last = mask
    return [tokenizer.decode(piece) for piece in pieces]


def user(*parts):
    return {"role": "user", "content": [{"type": "image"} if part is None else text(part) for part in parts]}


def text(string):
    return {"type": "text", "text": string}


def assistant(string):
    return {"role": "assistant", "content": string}


def system(string):
    return {"role": "system", "content": string}


def read_json(name):
    return json.loads((GOLDEN / "json" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("record", read_json("training_targets"), ids=lambda r: f"{r['template']}-{r['name']}")
def test_training_prompts_are_the_authors(record):
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[role], "content": content} for role, content in record["conversation"]]
    align = "<align>" if record["has_image"] else ""
    assert render(RECORDED[record["template"]], messages) == f"<s>{align}{record['prompt']}"


@pytest.mark.parametrize("record", read_json("inference"), ids=lambda r: r["name"])
def test_inference_prompts_are_the_authors(record):
    messages = []
    for question, answer in record["turns"]:
        messages += [{"role": "user", "content": question}, assistant(answer)]
    align = "<align>" if record["image"] else ""
    prompt = render(RECORDED[record["conv"]], messages[:-1], add_generation_prompt=True)
    assert prompt == f"<s>{align}{record['prompt']}"


TALK = [user("Hi there."), assistant("Hello!"), user("Two\nlines?"), assistant("Yes, \n two.")]


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize(
    ("name", "own"),
    [("llama_3", "llama3"), ("gemma", "gemma"), ("phi", "phi3"), ("phi", "phi3_5"), ("chatml", "qwen2_5")],
)
def test_equals_the_familys_own_template(name, own, with_system, generation_prompt):
    chat_templates = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    own_template = (chat_templates / f"{own}.jinja").read_text(encoding="utf-8")
    messages = [{**message, "content": _string(message)} for message in TALK]
    if name == "chatml" and not with_system:
        messages.insert(
            0, system("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
        )  # its default
    elif with_system and name == "gemma":
        messages[0]["content"] = f"Be brief.\n\n{messages[0]['content']}"  # which knows no system message
    elif with_system:
        messages.insert(0, system("Be brief."))
    if generation_prompt:
        messages.pop()
    tokenizer = make_tokenizer(*SPECIAL_TOKENS[name])
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=own_template, tokenize=False, add_generation_prompt=generation_prompt
    )
    if with_system and name == "gemma":
        messages = [system("Be brief."), *TALK[: len(messages)]]
    assert render(name, messages, add_generation_prompt=generation_prompt) == theirs


def _string(message):
    return message["content"] if isinstance(message["content"], str) else message["content"][0]["text"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "vicuna_v1",
            f"<s>{VICUNA_SYSTEM} USER: Hi there. ASSISTANT: Hello!</s>"
            "USER: Two\nlines? ASSISTANT: Yes, \n two.</s>ASSISTANT:",
        ),
        (
            "llama_2",
            f"<s>[INST] <<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\nHi there. [/INST] Hello! </s>"
            "<s>[INST] Two\nlines? [/INST] Yes, \n two. </s>",
        ),
        ("mistral", "<s>[INST] Hi there.[/INST] Hello!</s>[INST] Two\nlines?[/INST] Yes, \n two.</s>"),
        (
            "chatml",
            "<|im_start|>user\nHi there.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
            "<|im_start|>user\nTwo\nlines?<|im_end|>\n<|im_start|>assistant\nYes, \n two.<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_text_only_layout(name, expected):
    assert render(name, TALK, add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna_v1", "<s>Be brief. USER: Hi ASSISTANT:"),
        ("llama_2", "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("mistral", "<s>[INST] Be brief.\n\nHi[/INST]"),
        ("gemma", "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"),
        ("phi", "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"),
    ],
)
def test_system_message(name, expected):
    assert render(name, [system("Be brief."), user("Hi")], add_generation_prompt=True) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_comes_first_in_its_message(name):
    expected = render(name, [user(None, "What is it?")])
    assert expected.count("<image>\nWhat is it?") == 1
    for message in (
        user("What is it?", None),
        user("What ", None, "is it?"),
        {"role": "user", "content": " What <image>is it?\n"},
        {"role": "user", "content": "What is it?\n<image>"},
        user("What is it?<image>"),
    ):
        assert render(name, [message]) == expected
    alone = render(name, [user(None)])
    assert "<image>" in alone and "<image>\n" not in alone.replace("<image>\n<|im_end", "")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("string", "parts", "laid_out"),
    [
        (
            "This is <image> and this <image>. What differs?",
            ("This is ", None, " and this ", None, ". What differs?"),
            "This is <image> and this <image>. What differs?",
        ),
        ("<image>\n<image>\nWhat differs?", (None, None, "What differs?"), "<image>\n<image>\nWhat differs?"),
        ("<image> <image><image>", (None, None, None), "<image>\n<image>\n<image>"),
        ("\nWhat differs?\n<image><image>\n", ("What differs?\n", None, None), "What differs?\n<image><image>"),
        ("<image> or <image> ?", (None, "or ", None, " ?"), "<image>\nor <image> ?"),
    ],
)
def test_several_images_keep_their_places(name, string, parts, laid_out):
    expected = render(name, [user(None, "What is it?")]).replace("<image>\nWhat is it?", laid_out)
    assert render(name, [{"role": "user", "content": string}]) == expected
    assert render(name, [user(*parts)]) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_align_comes_right_behind_bos_when_any_message_has_a_image(name):
    bos = {"chatml": None, "phi": None}.get(name, SPECIAL_TOKENS[name][0]) or ""
    talk = [user("Hi."), assistant("Yes."), user(None, "And this?")]
    assert render(name, talk).startswith(f"{bos}<align>")
    assert render(name, talk).count("<align>") == 1
    assert "<align>" not in render(name, talk[:2])


def test_chatml_bos():
    talk = [user(None, "Hi")]
    template = CHAT_TEMPLATES["chatml"]
    for bos, start in (
        (None, "<align><|im_start|>"),
        ("<|im_start|>", "<align><|im_start|>"),
        ("<s>", "<s><align><|im"),
    ):
        tokenizer = make_tokenizer(bos, "<|im_end|>")
        assert tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False).startswith(start)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("vicuna_v1", [" Hello!</s>", " Yes, \n two.</s>"]),
        ("llama_2", [" Hello! </s>", " Yes, \n two. </s>"]),
        ("chatml", ["Hello!<|im_end|>", "Yes, \n two.<|im_end|>"]),
        ("llama_3", ["Hello!<|eot_id|>", "Yes, \n two.<|eot_id|>"]),
        ("mistral", [" Hello!</s>", " Yes, \n two.</s>"]),
        ("gemma", ["Hello!<end_of_turn>", "Yes, \n two.<end_of_turn>"]),
        ("phi", ["Hello!<|end|>", "Yes, \n two.<|end|>"]),
    ],
)
def test_every_answer_is_supervised_with_its_stop_token(name, pieces):
    assert supervised(name, TALK) == pieces
    tokenizer = make_tokenizer(*SPECIAL_TOKENS[name])
    assert all(piece.endswith(stop_token(name, tokenizer)) for piece in pieces)


def test_plain():
    talk = [user("Describe it.", None), assistant(" a cat\nasleep ")]
    assert render("plain", talk) == "<s><align><image> a cat\nasleep \n"
    assert supervised("plain", talk) == [" a cat\nasleep \n"]
    assert render("plain", talk[:1], add_generation_prompt=True) == "<s><align><image>"
    for bad in ([user("Hi")], [*talk, user("More?")]):
        with pytest.raises(TemplateError, match="plain template takes one user message with an image"):
            render("plain", bad)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([user(None, "a"), user("b")], r"message 1 \(user\): roles must alternate"),
        ([user(None), assistant("a"), assistant("b")], r"message 2 \(assistant\): roles must alternate"),
        ([user(None), {"role": "robot", "content": "b"}], r"message 1 \(robot\): unknown role"),
        ([user(None), assistant(" \n")], r"message 1 \(assistant\): the answer is empty"),
        ([user(None), {"role": "assistant", "content": []}], r"message 1 \(assistant\): the answer is empty"),
        ([user(None), assistant("<image> a")], r"message 1 \(assistant\): it holds an image"),
        ([system("an <image>"), user(None)], r"message 0 \(system\): it holds an image"),
        ([user(None), system("a")], r"message 1 \(system\): a system message must be the first"),
        ([{"role": "user", "content": [{"type": "video"}]}], r"message 0 \(user\): a part is of type 'video'"),
        ([{"role": "user", "contents": "Hi"}], r"message 0 \(user\): it has no 'content' but role, contents\."),
        (
            [{"role": "user", "content": [{"type": "text", "content": "Hi"}]}],
            r"message 0 \(user\): a text part has no 'text' but type, content\.",
        ),
        ([system("a")], "no user message"),
        ([assistant("a")], "no user message"),
    ],
)
def test_bad_conversations_name_the_message(name, messages, match):
    with pytest.raises(TemplateError, match=match):
        render(name, messages)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_final_message_can_be_continued(name):
    talk = [user("Hi"), assistant("It is the sound of")]
    assert render(name, talk, continue_final_message=True).endswith("It is the sound of")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_before_the_first_question_is_left_out(name):
    assert render(name, [assistant("Hm?"), user("Hi"), assistant("Yes.")]) == render(
        name, [user("Hi"), assistant("Yes.")]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_earlier_turns_stay_as_they_are_when_a_conversation_grows(name):
    talk = [system("Be brief."), user(None, "Hi"), assistant("Yes."), user("More?"), assistant("No.")]
    eos_at_the_end = SPECIAL_TOKENS["phi"][1] if name == "phi" else ""
    for end in (3, 5):
        prompt = render(name, talk[: end - 1], add_generation_prompt=True)
        assert render(name, talk[:end]).startswith(prompt)
        assert render(name, talk).startswith(render(name, talk[:end]).removesuffix(eos_at_the_end))


def test_placeholders_can_be_named():
    chat = make_tokenizer("<s>", "</s>").apply_chat_template(
        [user(None, "Hi")],
        chat_template=CHAT_TEMPLATES["mistral"],
        tokenize=False,
        image_token="<pic>",
        align_token="<a>",
    )
    assert chat == "<s><a>[INST] <pic>\nHi[/INST]"


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_selection_from_ones_own_template(name):
    if name != "plain":  # the format of a stage, not of a language model
        assert select_chat_template(make_tokenizer("<s>", "</s>", chat_template=CHAT_TEMPLATES[name])) == name


@pytest.mark.parametrize(
    ("own", "name"),
    [
        *(
            ("llama3", "llama_3"),
            ("llama3_1", "llama_3"),
            ("llama3_2", "llama_3"),
            ("gemma", "gemma"),
            ("gemma3", "gemma"),
        ),
        *(("phi3", "phi"), ("phi3_5", "phi"), ("qwen2_5", "chatml"), ("qwen3", "chatml"), ("smolvlm", "vicuna_v1")),
    ],
)
def test_selection_from_public_templates(own, name):
    chat_templates = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    template = (chat_templates / f"{own}.jinja").read_text(encoding="utf-8")
    assert select_chat_template(make_tokenizer("<s>", "</s>", chat_template=template)) == name


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ bos_token + '[INST] ' }}{{ '<<SYS>>' }}{{ ' [/INST]' }}", "llama_2"),
        ("{{ bos_token }}{{ '[INST] ' + message['content'] + ' [/INST]' }}", "mistral"),
        ("{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}", "vicuna_v1"),
        ({"rag": "x", "default": "{{ '<|im_start|>' }}{{ '<|im_end|>' }}"}, "chatml"),
    ],
)
def test_selection_from_older_templates(template, name):
    assert select_chat_template(make_tokenizer("<s>", "</s>", chat_template=template)) == name


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (("<|im_start|>", "<|im_end|>"), "chatml"),
        (("<|start_header_id|>", "<|eot_id|>"), "llama_3"),
        (("<start_of_turn>", "<end_of_turn>"), "gemma"),
        (("<|user|>", "<|end|>"), "phi"),
        (("[INST]", "[/INST]"), "mistral"),
        ((), "vicuna_v1"),
    ],
)
def test_selection_of_a_base_model_by_its_vocabulary(more, name):
    assert select_chat_template(make_tokenizer("<s>", "</s>", more)) == name


def test_selection_of_an_unknown_family(caplog):
    assert select_chat_template(make_tokenizer("<s>", "</s>", chat_template="{{ messages }}")) == "vicuna_v1"
    assert "of no known family" in caplog.text
    with pytest.raises(ValueError, match="no EOS token"):
        select_chat_template(make_tokenizer())
    with pytest.raises(ValueError, match="'alpaca' is not one of vicuna_v1"):
        stop_token("alpaca", make_tokenizer())


SUFFIX_CHATS = [
    [("user", "<image>\nwhat is it?")],
    [("user", "<image>")],
    [("user", "<image>\n<image>\nwhat are they?"), ("assistant", "two"), ("user", "and now?")],
    [("user", "hello"), ("assistant", "hi"), ("user", "<image>\nwhat is it?"), ("assistant", " a cat"), ("user", "no")],
    [("system", "Be short."), ("user", "<image> what is it?")],
    [("user", " only text ")],
    [("system", ""), ("user", "only text")],
    [("user", "this is <image> and this <image>. what differs?")],
    [("user", "see <image> , <image> "), ("assistant", "yes"), ("user", " <image><image> and <image>")],
    [("user", "is it <image> or<image><image>?"), ("assistant", " no"), ("user", "why")],
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chat", SUFFIX_CHATS)
def test_suffix_in_the_template_is_what_the_processor_writes(name, chat):
    """An engine tokenises what the template gives; the processor edits it. Both get the same ids."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "base_llm")
    added = ["<image>", "<align>", "<|user|>", "<|end|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_end|>"]
    added += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_tokens(added, special_tokens=True)
    processor = AlignGPTProcessor(
        image_processor_for(8, None, do_pad=True),
        tokenizer,
        image_seq_length=3,
        image_suffix=infer_image_suffix(tokenizer),
    )
    assert processor.image_suffix == " "
    messages = [{"role": role, "content": text} for role, text in chat]
    images = [Image.new("RGB", (8, 8))] * sum(text.count("<image>") for _, text in chat)

    def ids(template):
        processor.chat_template = template
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text, processor(images=images or None, text=text, add_special_tokens=False)["input_ids"][0]

    edited = ids(CHAT_TEMPLATES[name])[1]
    text, again = ids(with_suffix(CHAT_TEMPLATES[name], " ", tokenizer))
    engine = tokenizer(text.replace("<image>", "<image>" * 3), add_special_tokens=False)["input_ids"]
    assert again == edited
    assert engine == edited
