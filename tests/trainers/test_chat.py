"""The chat: what a turn hands to the model, steering, the gate's bars, and the terminal loop."""

import argparse

import pytest
from stage_parts import NUM_LEVELS, draw_image

from aligngpt_trainers.commands import chat as chat_module
from aligngpt_trainers.commands.chat import Chat
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


@pytest.fixture
def chat(stage1_folder):
    model = AlignGPTForConditionalGeneration.from_pretrained(stage1_folder, align_mode="gate").eval()
    return Chat(model, AlignGPTProcessor.from_pretrained(stage1_folder), max_new_tokens=6)


@pytest.fixture
def files(tmp_path):
    names = []
    for colour in ("red", "blue"):
        names.append(str(tmp_path / f"{colour}.png"))
        draw_image(colour).save(names[-1])
    return names


def reference(chat: Chat, messages, images, **steering) -> str:
    """The same conversation through the processor's documented path."""
    inputs = chat.processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images": images},
    )
    output = chat.model.generate(**inputs, **steering, max_new_tokens=6, do_sample=False)
    return chat.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_turns_and_images_add_up(chat, files, capsys):
    chat.add_image(files[0])
    first = chat.ask("what colour is it?")
    assert capsys.readouterr().out.strip() == first
    chat.add_image(files[1])
    second = chat.ask("and this one?", stream=False)
    assert capsys.readouterr().out == ""
    user = lambda text: {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}  # noqa: E731
    answer = {"role": "assistant", "content": [{"type": "text", "text": first}]}
    images = [draw_image("red"), draw_image("blue")]
    assert first == reference(chat, [user("what colour is it?")], [draw_image("red")])
    assert second == reference(chat, [user("what colour is it?"), answer, user("and this one?")], images)
    assert len(chat.messages) == 4 and len(chat.images) == 2
    chat.reset()
    assert chat.messages == [] and chat.images == []


def test_an_answer_cannot_command_the_terminal(chat, capsys):
    (escape,) = chat.processor.tokenizer("\x1b", add_special_tokens=False)["input_ids"]
    chat.model.generation_config.sequence_bias = {(escape,): 1e4}
    assert chat.ask("what is it?") == "\x1b" * 6
    assert capsys.readouterr().out.strip() == "\\x1b" * 6


def test_the_gates_weights_are_shown(chat, files):
    assert "no image" in chat.describe_weights()
    chat.add_image(files[0])
    chat.ask("what colour is it?", stream=False)
    assert len(chat.weights) == NUM_LEVELS and sum(chat.weights) == pytest.approx(2, abs=1e-5)
    shown = chat.describe_weights().splitlines()
    assert len(shown) == NUM_LEVELS and f"{chat.weights[0]:5.3f}" in shown[0] and "1.000" in shown[-1]
    chat.set_level(1)
    chat.ask("again", stream=False)
    assert chat.weights == [0.0, 1.0, 0.0, 0.0] and "0.000  (global; steered to level 1)" in chat.describe_weights()
    chat.set_level(NUM_LEVELS - 1)
    chat.ask("again", stream=False)
    assert chat.weights == [0.0, 0.0, 0.0, 1.0]


def test_steering_reaches_the_model(chat, files):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    for level in range(NUM_LEVELS):
        chat.reset()
        chat.set_level(level)
        chat.add_image(files[0])
        assert chat.ask("what is it?", stream=False) == reference(
            chat, messages, [draw_image("red")], align_level=level
        )
    with pytest.raises(ValueError, match=rf"level {NUM_LEVELS} is not in 0\.\.{NUM_LEVELS - 1}"):
        chat.set_level(NUM_LEVELS)


def run(arguments: list[str]):
    parser = argparse.ArgumentParser()
    chat_module.add_arguments(parser)
    return chat_module.run(parser.parse_args(arguments))


def test_one_question(stage1_folder, files, capsys):
    run(
        [
            "--model",
            str(stage1_folder),
            "--image",
            *files[:1],
            "--question",
            "what?",
            "--show-weights",
            "--max-new-tokens",
            "3",
        ]
    )
    shown = capsys.readouterr().out
    assert shown.count("level ") >= NUM_LEVELS and "/quit" not in shown


def test_the_terminal_loop(stage1_folder, files, monkeypatch, capsys):
    lines = iter(
        [
            "hello",
            f"/image {files[0]}",
            "what?",
            "/weights",
            "/level 1",
            "/level 77",
            "/level x",
            "/image gone.png",
            "/help",
            "/reset",
            "",
        ]
    )

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    run(["--model", str(stage1_folder), "--max-new-tokens", "3"])
    shown = capsys.readouterr().out
    assert shown.count("/quit") == 2  # at the start and for /help
    assert "error: alignment level 77 is not in 0..3" in shown
    assert "gone.png" in shown and shown.count("error: ") == 3
    assert f"level {NUM_LEVELS - 1}" in shown
