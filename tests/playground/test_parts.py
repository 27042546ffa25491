"""The shipped parts: they load anywhere, and do what the pipeline needs of them on held-out scenes."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, CLIPModel, CLIPProcessor

from aligngpt_playground import draw_scenes, exact_caption, parts_path, render
from aligngpt_playground.__main__ import main
from aligngpt_playground.captions import KINDS
from aligngpt_playground.drills import BETWEEN, NAMES_A_DRILL, drill_text, neighbour_text
from aligngpt_playground.evaluate import objects_named
from aligngpt_playground.questions import QUESTION_TYPES, draw_questions
from aligngpt_playground.scene_text import ANSWER, CELLS, GIVEN, chat_text, draw_texts, plain_text
from aligngpt_playground.sprites import OBJECTS, plural
from aligngpt_playground.train_clip import MAX_TEXT_TOKENS, REGION_WORDS, SceneBatches, evaluate, normalise
from aligngpt_playground.train_llama import TextBatches, build_tokenizer, encode
from aligngpt_playground.train_llama import evaluate as evaluate_llama
from aligngpt_shared.files import new_folder
from modeling_aligngpt import CHAT_TEMPLATES, select_chat_template


@pytest.fixture(scope="module")
def clip():
    folder = parts_path("clip")
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, CLIPProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama():
    folder = parts_path("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_parts_are_small_safetensors_and_tell_where_they_come_from():
    folder = parts_path("clip").parent
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "trained"]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert (folder / "README.md").is_file()


def test_clip_finds_partners_on_held_out_scenes(clip):
    figures = evaluate(*clip, n=256, seed=5)
    assert figures["retrieval_at_1"] >= 0.6, figures
    assert figures["exact_over_wrong"] >= 0.7, figures
    order = [figures[f"similarity_{kind}"] for kind in ("exact", "partial", "wrong", "unrelated")]
    assert order == sorted(order, reverse=True), figures


def test_patches_say_what_stands_where(clip):
    """A linear probe on the layer that the projector reads finds word and quadrant of held-out patches."""
    model, processor = clip

    def patches(split, n, seed):
        scenes = list(draw_scenes(n, seed, split))
        pixels = processor.image_processor([render(scene, i) for i, scene in enumerate(scenes)], return_tensors="pt")
        with torch.no_grad():
            hidden = model.vision_model(**pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
        words = [REGION_WORDS.index(word) for scene in scenes for word in scene.cells()]
        places = [2 * (row // 2) + column // 2 for _ in scenes for row in range(4) for column in range(4)]
        return torch.cat([hidden, torch.ones(len(hidden), 1)], 1), torch.tensor(words), torch.tensor(places)

    train_x, *train_y = patches("train", 1500, 0)
    test_x, *test_y = patches("heldout", 200, 1)
    for name, target, truth, chance in zip(("word", "place"), train_y, test_y, (0.2, 0.25), strict=True):
        one_hot = torch.nn.functional.one_hot(target).float()
        gram = train_x.T @ train_x + torch.eye(train_x.shape[1])
        found = (test_x @ torch.linalg.solve(gram, train_x.T @ one_hot)).argmax(-1)
        accuracy = (found == truth).float().mean().item()
        assert accuracy > 0.7 > chance, (name, accuracy)


def test_clip_processor_makes_the_pixels_of_training(clip):
    model, processor = clip
    assert isinstance(AutoProcessor.from_pretrained(parts_path("clip")), CLIPProcessor)
    batch = SceneBatches(processor.tokenizer, 1, 4, 0)[0]
    expected = processor.image_processor(list(batch["images"].numpy()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalise(batch["images"], processor.image_processor), expected, atol=1e-5, rtol=0)
    assert model.config.vision_config.image_size == expected.shape[-1]


def test_no_caption_is_cut_by_the_scorer(clip):
    tokenizer = clip[1].tokenizer
    longest = max(len(ids) for ids in tokenizer([exact_caption(scene) for scene in draw_scenes(2000, 3)])["input_ids"])
    assert longest <= MAX_TEXT_TOKENS == tokenizer.model_max_length


def test_llama_answers_about_scenes_in_words(llama):
    """Far better than the majority answers, which get about a quarter right."""
    model, tokenizer = llama
    for told, least in ((False, 0.75), (True, 0.5)):
        figures = evaluate_llama(model, tokenizer, n=100, seed=9, told=told)
        assert figures["all"] > least, figures
        assert set(figures) == {"all", *QUESTION_TYPES}


def test_no_text_of_the_llama_says_how_well_a_caption_fits():
    """What stands before a caption is the same whatever the caption is worth, and names no kind of caption."""
    for scene in draw_scenes(20, 11):
        given = {str(plain_text(scene, random.Random(5), kind)[:-1]) for kind in KINDS}
        assert len(given) == 1
    rng = random.Random(0)
    texts = [text for _ in range(20) for text in draw_texts(8, rng)]
    written = {word for segments in texts for text, _ in segments for word in text.split()}
    assert len(texts) > 160 and not written & set(KINDS)


def test_llama_captions_scenes_in_words(llama):
    """It says what the cells say, and ends there."""
    from aligngpt_playground.train_llama import embed

    model, tokenizer = llama
    rng, named = random.Random(0), []
    for scene in draw_scenes(40, 11, "heldout", unique=True):
        batch = encode(tokenizer, [plain_text(scene, rng, "exact", dropped=0.0)[:-1]])
        output = model.generate(
            inputs_embeds=embed(model, batch),
            attention_mask=batch["attention_mask"],
            max_new_tokens=32,
            do_sample=False,
        )
        text = tokenizer.decode(output[0], skip_special_tokens=True)
        assert text.endswith("\n"), text
        named.append(set(objects_named(text)) == set(scene.names))
    assert sum(named) / len(named) > 0.6, named


def test_llama_tokenizer_round_trips(llama):
    tokenizer = llama[1]
    for text in (
        "what is left of the car?",
        "two butterflies and three dogs, at the top left and bottom right in the snow\n",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nan xylophone is not here.<|im_end|>\n",
    ):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    for word in REGION_WORDS:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    assert len(tokenizer("\n", add_special_tokens=False)["input_ids"]) == 1
    assert tokenizer("a cat")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<pad>"
    assert select_chat_template(tokenizer) == "chatml"


def test_pretraining_text_is_laid_out_as_the_templates_do(llama):
    """Cells stand where the image's tokens will; `<align>` stands for nothing that was pretrained."""
    tokenizer = llama[1]
    rng = random.Random(0)
    image = {"type": "image"}
    for scene in draw_scenes(20, 4):
        questions = draw_questions(scene, 6, rng)
        messages = []
        for question in questions:
            content = [{"type": "text", "text": question.question}]
            messages += [
                {"role": "user", "content": content if messages else [image, *content]},
                {"role": "assistant", "content": question.answer},
            ]
        chat = [
            (" ".join(["<unk>"] * 16) if kind == CELLS else text, kind)
            for text, kind in chat_text(scene, rng, questions)
        ]
        caption = exact_caption(scene)
        plain = [("<s>", "given"), (" ".join(["<unk>"] * 16), CELLS), (f"{caption}\n", ANSWER)]
        described = [messages[0], {"role": "assistant", "content": caption}]
        for name, conversation, segments in (("chatml", messages, chat), ("plain", described, plain)):
            text = tokenizer.apply_chat_template(conversation, chat_template=CHAT_TEMPLATES[name], tokenize=False)
            text = text.replace("<image>", "<unk>" * 16).replace("<align>", "")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == encode(tokenizer, [segments])["input_ids"][0].tolist(), text


def test_pretraining_trains_on_answers_alone_and_is_reproducible(llama):
    tokenizer = llama[1]
    first, again = (TextBatches(tokenizer, [("texts", 3)], 4, seed="2")[1] for _ in range(2))
    other = TextBatches(tokenizer, [("texts", 3)], 4, seed="3")[1]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert first["input_ids"].shape != other["input_ids"].shape or not torch.equal(
        first["input_ids"], other["input_ids"]
    )
    texts = draw_texts(4, random.Random(1))
    batch = encode(tokenizer, texts)
    for row, segments in enumerate(texts):
        trained = batch["input_ids"][row][batch["labels"][row] != -100]
        answers = "".join(text for text, kind in segments if kind == ANSWER)
        assert (
            tokenizer.decode(trained).replace("<|im_end|>", " ").split() == answers.replace("<|im_end|>", " ").split()
        )
        cells = [text for text, kind in segments if kind == CELLS]
        assert (batch["place_ids"][row, :, 0] >= 0).sum() == 16 * len(cells)


@pytest.mark.proof
@pytest.mark.parametrize("part", ["clip", "llama"])
def test_train_parts_command(part, tmp_path, capsys):
    output = tmp_path / part
    short = ["--steps", "2"] if part == "clip" else ["--share", "0.001"]
    command = ["train-parts", "--part", part, "--output", str(output), *short, "--batch-size", "4"]
    assert main(command) == 0
    assert "{" in capsys.readouterr().out
    loader = CLIPModel if part == "clip" else AutoModelForCausalLM
    model = loader.from_pretrained(output, dtype=torch.float32)
    shipped = loader.from_pretrained(parts_path(part), dtype=torch.float32)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in shipped.state_dict().items()}
    assert [path.name for path in tmp_path.iterdir()] == [part]


def test_a_setting_of_the_other_part_is_refused(tmp_path, capsys):
    command = ["train-parts", "--part", "llama", "--output", str(tmp_path / "llama"), "--steps", "2"]
    assert main(command) == 2
    assert "llama has no setting steps" in capsys.readouterr().err
    assert not (tmp_path / "llama").exists()


@pytest.mark.parametrize("gap", [0, 3, 6])
@pytest.mark.parametrize("form", ["list", "where", "yesno", "count"])
def test_drills_ask_for_what_the_scene_holds(gap, form):
    """Names of the scene are found where they are, others are not there; the answer stands `gap` tokens behind."""
    tokenizer = build_tokenizer()
    for seed in range(20):
        segments = drill_text(random.Random(seed), gap, (form,))
        (cells,) = [text for text, kind in segments if kind == CELLS]
        asked = [text for text, kind in segments[4:] if kind == GIVEN and text.strip() != "<|im_end|>"]
        answers = [text for text, kind in segments if kind == ANSWER]
        assert len(asked) == len(answers) == NAMES_A_DRILL
        for question, answer in zip(asked, answers, strict=True):
            ids = tokenizer(question, add_special_tokens=False)["input_ids"]
            between = tokenizer("".join(BETWEEN[:gap]), add_special_tokens=False)["input_ids"]
            assert ids[len(ids) - gap :] == between and len(between) == gap
            words = question.split("?")[0].split()
            names = {name for name in OBJECTS if name in words or plural(name) in words}
            # a share of the cells is replaced by the background: what is named there is there
            if names & set(cells.split()):
                assert answer not in ("no", "zero"), (question, answer, cells)


def test_neighbours_are_asked_for_in_chats():
    for seed in range(5):
        questions = [text for text, kind in neighbour_text(random.Random(seed)) if "assistant" in text]
        assert questions and all(text.startswith("what is ") for text in questions)


def test_train_parts_never_replaces_something_else(tmp_path, capsys):
    (tmp_path / "diary.txt").write_text("dear diary")
    assert main(["train-parts", "--part", "clip", "--output", str(tmp_path), "--steps", "1"]) == 2
    assert "not a model folder" in capsys.readouterr().err
    assert (tmp_path / "diary.txt").read_text() == "dear diary"


def test_a_failed_save_leaves_the_old_folder(tmp_path):
    target = tmp_path / "part"
    with new_folder(target, replace=True) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError), new_folder(target, replace=True) as folder:
        (folder / "weights").write_text("new")
        raise RuntimeError
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["part"]
