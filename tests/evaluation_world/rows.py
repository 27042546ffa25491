"""A tiny AlignGPT that answers with one word, and rows of the twelve benchmarks in their real form."""

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Sequence, Value
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from modeling_aligngpt.assembly import assemble


WORDS = ("A", "B", "C", "D", "Yes", "No", "two", "cat")
TEXT, NUMBER = Value("string"), Value("int64")


def draw_image(seed: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one for each of `WORDS`."""
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: row for row, name in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.add_tokens([word for word in WORDS if len(word) > 1])
    return fast


def make_one_word_model(folder, seed: int = 0):
    """
    Writes an AlignGPT whose answer is one of `WORDS`, which one depends on prompt, image and level, and then EOS.

    The first dimension says "an answer stands here": embeddings of the words have it, no layer writes it, and the row
    of EOS in the head reads it.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    language_model = LlamaForCausalLM(
        LlamaConfig(**text, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )
    language_model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": 64, "max_position_embeddings": 16},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    )
    clip.save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "clip"
    )
    model, processor = assemble(
        folder / "llama", folder / "clip", chat_template="vicuna_v1", gate_hidden_size=8, align_mode="gate", do_pad=True
    )
    words = tokenizer.convert_tokens_to_ids(list(WORDS))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision_tower" not in name:
                wide = 3.0 if "projector" in name or "align_" in name else 0.6
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * wide)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0
        model.model.multi_modal_projector.linear_2.weight[0] = 0
        model.model.align_embeddings.weight[:, 0] = 0
        embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
        embeddings[:, 0] = 0
        embeddings[words, 0] = 500
        head[:, 0] = 0
        head[tokenizer.eos_token_id] = 0
        head[tokenizer.eos_token_id, 0] = 50
    silent = set(range(model.config.text_config.vocab_size)) - {*words, tokenizer.eos_token_id}
    model.generation_config.suppress_tokens = sorted(silent)
    model.config.training_stage = "instruct"
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def answer_alone(model, processor, question: str, images: list) -> str:
    """The model's answer by transformers alone: a chat of images, then the question."""
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=images or None, text=[prompt], return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


# ---- rows: what each benchmark's data set holds, and the question that a model must be asked ----

PHRASE = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def _wrong(answer: str, among=WORDS) -> str:
    return next(word for word in among if word != answer)


def make_rows(ask) -> dict[str, dict]:
    """
    Rows of every benchmark.

    Args:
        ask: `(question, images) -> answer` of the model alone; truths are made of it, so that it is known which of
            them lmms-eval should find right.

    Returns:
        Task -> `features`, `split`, `rows`, `questions` (in order), `expected` (the paper's metric), and where there
        are several configurations `configs`.
    """
    return {
        **_open_questions(ask),
        **_yes_no(ask),
        **_choices(ask),
        **_judged(ask),
    }


def _open_questions(ask) -> dict[str, dict]:
    vqa, gqa, gqa_images, vizwiz, text = [], [], [], [], []
    questions: dict[str, list[str]] = {"vqav2_val": [], "gqa": [], "vizwiz_vqa_val": [], "textvqa_val": []}
    for i in range(4):
        shown, asked = draw_image(i), f"What is number {i}?"
        given = ask(asked + PHRASE, [shown])
        # of ten people 10, 3, 1 and 0 agree
        agreeing = (10, 3, 1, 0)[i]
        people = [given.lower()] * agreeing + [f"something {n}" for n in range(10 - agreeing)]
        questions["vqav2_val"].append(asked + PHRASE)
        vqa.append(
            {
                "image": shown,
                "question": asked,
                "question_id": i,
                "question_type": "what is",
                "image_id": i,
                "multiple_choice_answer": people[0],
                "answer_type": "other",
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(people)
                ],
            }
        )
        gqa_images.append({"id": f"n{i}", "image": shown})
        questions["gqa"].append(asked + PHRASE)
        truth = given.lower() if i % 2 == 0 else "nothing"
        gqa.append(
            {"id": str(i), "imageId": f"n{i}", "question": asked, "answer": truth, "fullAnswer": f"It is {truth}."}
        )
        asked = f"what colour is number {i}?"
        prompt = asked.capitalize() + UNANSWERABLE + PHRASE
        given = ask(prompt, [shown])
        people = [given.lower()] * agreeing + ["unanswerable"] * (10 - agreeing)
        questions["vizwiz_vqa_val"].append(prompt)
        vizwiz.append(
            {
                "question_id": f"VizWiz_val_{i}",
                "image": shown,
                "question": asked,
                "answers": people,
                "category": "other",
            }
        )
        asked = f"what does sign {i} say?"
        prompt = f"{asked.capitalize()}\nReference OCR token: STOP, {i}{PHRASE}"
        given = ask(prompt, [shown])
        people = [f"{given}."] * agreeing + ["stop"] * (10 - agreeing)
        questions["textvqa_val"].append(prompt)
        text.append(
            {
                "image_id": str(i),
                "question_id": i,
                "question": asked,
                "image": shown,
                "answers": people,
                "ocr_tokens": ["STOP", str(i)],
                "set_name": "val",
            }
        )
    # 10 agree: 1; 3: 0.9; 1: 0.3; 0: 0
    soft = 100 * (1 + 0.9 + 0.3) / 4
    answers = List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER})
    return {
        "vqav2_val": {
            "features": _like(vqa[0], answers=answers),
            "split": "validation",
            "rows": vqa,
            "questions": questions["vqav2_val"],
            "expected": soft,
        },
        "gqa": {
            "configs": {"testdev_balanced_instructions": gqa, "testdev_balanced_images": gqa_images},
            "split": "testdev",
            "questions": questions["gqa"],
            "expected": 50.0,
        },
        "vizwiz_vqa_val": {
            "split": "val",
            "rows": vizwiz,
            "questions": questions["vizwiz_vqa_val"],
            "expected": soft,
        },
        "textvqa_val": {
            "split": "validation",
            "rows": text,
            "questions": questions["textvqa_val"],
            "expected": soft,
        },
    }


def _yes_no(ask) -> dict[str, dict]:
    pope, mme, pope_asked, mme_asked = [], [], [], []
    rates: dict[str, list[int]] = {}
    for i in range(9):
        shown, split = draw_image(100 + i), ("random", "popular", "adversarial")[i % 3]
        asked = f"Is there a thing {i} in the image?"
        pope_asked.append(asked + PHRASE)
        given = ask(asked + PHRASE, [shown]).lower()
        truth = given if given in ("yes", "no") and i != 4 else "yes"
        pope.append(
            {
                "id": str(i),
                "question_id": str(i),
                "question": asked,
                "answer": truth,
                "image_source": f"COCO_{i}",
                "image": shown,
                "category": split,
            }
        )
        counts = rates.setdefault(split, [0, 0, 0])
        counts[0] += given == truth == "yes"
        counts[1] += given == "yes" != truth
        counts[2] += given == "no" != truth
    f1 = [2 * hit / (2 * hit + false + missed) if hit else 0.0 for hit, false, missed in rates.values()]
    points: dict[str, list[list[bool]]] = {}
    for i in range(8):
        category, shown = ("existence", "code_reasoning")[i // 4], draw_image(200 + i // 2)
        asked = f"Is this {i}? Please answer yes or no."
        prompt = f"Is this {i}?{PHRASE}"
        mme_asked.append(prompt)
        given = ask(prompt, [shown])
        truth = given if given in ("Yes", "No") else "Yes"
        mme.append(
            {
                "question_id": f"{category}/{i // 2}.png",
                "image": shown,
                "question": asked,
                "answer": truth,
                "category": category,
            }
        )
        pairs = points.setdefault(category, [])
        if i % 2 == 0:
            pairs.append([])
        pairs[-1].append(given == truth)
    pairs = points["existence"]
    perception = 100 * (sum(map(sum, pairs)) / 4 + sum(map(all, pairs)) / 2)
    return {
        "pope": {"split": "test", "rows": pope, "questions": pope_asked, "expected": 100 * sum(f1) / 3},
        "mme": {"split": "test", "rows": mme, "questions": mme_asked, "expected": perception},
    }


def _choices(ask) -> dict[str, dict]:
    science, seed, asked = [], [], {"scienceqa_img": [], "seedbench": []}
    choices = ["one", "two", "three", "four"]
    lettered = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    hits = {"scienceqa_img": [], "seedbench": []}
    for i in range(4):
        shown, hint = draw_image(300 + i), "" if i % 2 else "Look closely."
        prompt = (f"Context: {hint}\n" if hint else "") + f"Which is {i}?\n{lettered}\n{LETTER}"
        asked["scienceqa_img"].append(prompt)
        given = ask(prompt, [shown])
        truth = "ABCD".index(given) if given in "ABCD" and i != 1 else 1
        hits["scienceqa_img"].append("ABCD"[truth] == given)
        science.append(
            {"image": shown, "question": f"Which is {i}?", "choices": choices, "answer": truth, "hint": hint}
        )
    for i in range(4):
        # the last is a video of two frames, which the paper's figure leaves out
        shown = [draw_image(400 + i), draw_image(450)][: 1 + i // 3]
        prompt = f"Which is it, {i}?\n{lettered}\n{LETTER}"
        asked["seedbench"].append(prompt)
        given = ask(prompt, shown)
        truth = given if given in "ABCD" and i != 2 else _wrong(given, "ABCD")
        if i < 3:
            hits["seedbench"].append(given[:1].lower() == truth.lower())
        seed.append(
            {
                "answer": truth,
                **{f"choice_{name}": choice for name, choice in zip("abcd", choices, strict=True)},
                "data_id": str(i),
                "data_type": "image" if i < 3 else "video",
                "question": f"Which is it, {i}?",
                "question_id": str(i),
                "question_type_id": 1 + i // 2,
                "image": shown,
            }
        )
    made = {
        "scienceqa_img": {"split": "test", "rows": science, "configs_name": "ScienceQA-IMG"},
        "seedbench": {"split": "test", "rows": seed, "features": _like(seed[0], image=List(Image()))},
    }
    for task, entry in made.items():
        entry |= {"questions": asked[task], "expected": 100 * sum(hits[task]) / len(hits[task])}
    return {
        **made,
        "mmbench_en_dev": _mmbench(ask, "en", LETTER, "Look."),
        "mmbench_cn_dev": _mmbench(ask, "cn", "请直接回答选项字母。", "请看图。"),
    }


def _mmbench(ask, name: str, how: str, hint: str) -> dict:
    rows, asked, right = [], [], {}
    for i in range(3):
        choices = ["红", "蓝", "two"][: 2 + i % 2]
        for turn in range(len(choices)):
            turned = choices[turn:] + choices[:turn]
            shown, given_hint = draw_image(500 + i), hint if i == 1 else "nan"
            lines = [given_hint] * (i == 1) + [f"Colour {i}?"]
            lines += [f"{letter}. {choice}" for letter, choice in zip("ABC", turned, strict=False)]
            prompt = "\n".join([*lines, how])
            asked.append(prompt)
            given = ask(prompt, [shown])
            # an answer that is the text of one choice counts as its letter; the judge, asked about others, says B
            letter = given if given in tuple("ABCD") else "ABC"[turned.index("two")] if given in turned else "B"
            truth = letter if i != 2 else "B"
            right.setdefault(i, []).append(letter == truth)
            cells = dict(zip("ABCD", [*turned, "nan", "nan"], strict=False))
            rows.append(
                {
                    "index": i + turn * 1_000_000,
                    "question": f"Colour {i}?",
                    "hint": given_hint,
                    "answer": truth,
                    **{letter: cells.get(letter, "nan") for letter in "ABCD"},
                    "category": "color",
                    "image": shown,
                    "source": "made",
                    "L2-category": "attributes",
                    "comment": "nan",
                    "split": "dev",
                }
            )
    expected = 100 * sum(map(all, right.values())) / len(right)
    return {"split": "dev", "rows": rows, "questions": asked, "expected": expected, "configs_name": name}


def _judged(ask) -> dict[str, dict]:
    wild, vet, wild_asked, vet_asked = [], [], [], []
    for i in range(3):
        shown, asked = draw_image(600 + i), f"Describe {i}."
        wild_asked.append(asked)
        wild.append(
            {
                "question_id": i,
                "question": asked,
                "caption": f"An image of {i}.",
                "gpt_answer": "It is noise.",
                "image_id": f"{i:03}",
                "category": ("conv", "detail", "complex")[i],
                "image": shown,
            }
        )
        asked = f"What is {i}?" + (" (the judge hesitates)" if i == 2 else "")
        given = ask(asked, [shown])
        vet_asked.append(asked)
        vet.append(
            {
                "question_id": f"v1_{i}",
                "image": shown,
                "question": asked,
                "answer": given if i != 1 else "a<AND>b",
                "image_source": "made",
                "capability": ("rec", "ocr,math", "rec,ocr")[i],
            }
        )
    # the rules of the judge in judge_server.py: 8 and 6 points; 1.0 where the truth is the answer
    return {
        "llava_in_the_wild": {"split": "train", "rows": wild, "questions": wild_asked, "expected": 75.0},
        "mmvet": {"split": "test", "rows": vet, "questions": vet_asked, "expected": 100 * 2 / 3},
    }


def _like(row: dict, **given) -> Features:
    """Features that fit a row."""
    kinds = {str: TEXT, int: NUMBER}
    features = {}
    for name, value in row.items():
        if isinstance(value, PILImage.Image):
            features[name] = Image()
        elif isinstance(value, list):
            features[name] = Sequence(TEXT)
        else:
            features[name] = kinds[type(value)]
    return Features({**features, **given})


def write_data(folder, rows: dict[str, dict]) -> dict[str, str]:
    """Writes each task's data set by `save_to_disk`; returns task -> folder."""
    for task, entry in rows.items():
        configs = entry.get("configs") or {entry.get("configs_name", ""): entry["rows"]}
        for name, listed in configs.items():
            features = entry.get("features") or _like(listed[0])
            dataset = Dataset.from_list(listed, features=features)
            DatasetDict({entry["split"]: dataset}).save_to_disk(str(folder / task / name))
    return {task: str(folder / task) for task in rows}
