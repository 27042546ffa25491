"""The page: an image, a chat (or two, to compare levels) and the alignment beside it. No state outside the session."""

import json
import os
import re
import time
from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import answers
import gradio as gr
from alignment import NO_MAP, NO_QUESTION, bars_html, map_html
from answers import MAX_NEW_TOKENS, MAX_SECONDS, Alignment, QuestionError
from images import MAX_FILE_BYTES, ImageError, read_image, seen_box


HERE = Path(__file__).parent
EXAMPLES = json.loads((HERE / "examples" / "examples.json").read_text(encoding="utf-8"))
"""Rows `title`, `image` (a file beside the list), `questions`; written by `aligngpt space --examples`."""
SUGGESTIONS = max(len(example["questions"]) for example in EXAMPLES)
CODE = "https://github.com/AlignGPT-VL/AlignGPT"
BY_ITSELF = -1
"""The value of the level control that leaves the level to the model."""
QUEUE = 32
"""Requests that may wait; further ones are told so."""

Messages = list[dict[str, Any]]

_ENDINGS = {
    "end": "",
    "length": f" It was cut: answers have at most {MAX_NEW_TOKENS} tokens, and no more than the model's context holds.",
    "time": f" It was cut: answers may take {MAX_SECONDS} seconds.",
    "stopped": " It was stopped.",
}


def build_page(loaded: answers.Loaded) -> gr.Blocks:
    """The whole page for a loaded model."""
    choices = [(_by_itself(loaded.config.align_mode), BY_ITSELF)]
    choices += [(str(level), level) for level in range(loaded.config.num_align_levels)]
    # uploads are deleted after an hour
    with gr.Blocks(title="AlignGPT", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        gr.HTML(_header(loaded), elem_id="header")
        with gr.Row(elem_id="columns", equal_height=False):
            with gr.Column(scale=3, min_width=300):
                parts = _image_column(choices)
            with gr.Column(scale=4, min_width=300):
                parts |= _chat_column()
            with gr.Column(scale=3, min_width=300, elem_id="alignment"):
                parts |= _alignment_column()
        _connect(SimpleNamespace(**parts))
    return page


def _image_column(choices: list[tuple[str, int]]) -> dict[str, Any]:
    image = gr.Image(
        label=f"Image (up to {MAX_FILE_BYTES // 2**20} MB)",
        sources=["upload", "clipboard"],
        type="filepath",
        format="png",
        height=300,
        elem_id="image",
        alt_text="The image that is asked about",
        buttons=["fullscreen"],
    )
    # our own code opens the file: its errors say what is wrong with it
    image.preprocess = partial(_uploaded_path, Path(image.GRADIO_CACHE))
    notice = gr.HTML(_status(""), elem_id="notice", padding=False)
    with gr.Row(elem_id="examples"):
        examples = [
            gr.Button(f"Example: {each['title']}", icon=str(HERE / "examples" / each["image"]), size="sm", min_width=90)
            for each in EXAMPLES
        ]
    with gr.Group(elem_id="steering"):
        level = gr.Radio(choices, value=BY_ITSELF, label="Alignment level", elem_id="level")
        compare = gr.Checkbox(label="Compare with a second level", elem_id="compare")
        second = gr.Radio(choices, value=0, label="Second level", elem_id="second", visible=False)
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature (0: the likeliest word each time)")
        top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top p")
        length = gr.Slider(1, MAX_NEW_TOKENS, value=MAX_NEW_TOKENS, step=1, label="Longest answer, in tokens")
    return {
        "temperature": temperature,
        "top_p": top_p,
        "length": length,
        "image": image,
        "notice": notice,
        "examples": examples,
        "level": level,
        "compare": compare,
        "second": second,
    }


def _chat_column() -> dict[str, Any]:
    with gr.Row(elem_id="chats"):
        chat = _chatbot("Chat", "chat")
        other = _chatbot("Chat at the second level", "other", visible=False)
    with gr.Row(elem_id="asking"):
        question = gr.Textbox(
            label="Question about the image",
            placeholder="what is in the picture?",
            lines=1,
            max_lines=4,
            scale=5,
            min_width=180,
            elem_id="question",
        )
        ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
    with gr.Row(elem_id="suggestions"):
        suggestions = [gr.Button(visible=False, size="sm", min_width=90) for _ in range(SUGGESTIONS)]
    with gr.Row(elem_id="actions"):
        buttons = {
            name: gr.Button(name.capitalize(), size="sm", min_width=80, elem_id=name)
            for name in ("retry", "stop", "clear")
        }
    status = gr.HTML(_status(""), elem_id="status", padding=False)
    return {
        "chat": chat,
        "other": other,
        "question": question,
        "ask": ask,
        "suggestions": suggestions,
        **buttons,
        "status": status,
    }


def _alignment_column() -> dict[str, Any]:
    gr.HTML("<h2>Levels in this answer</h2>", padding=False)
    bars = gr.HTML(NO_QUESTION, elem_id="bars", padding=False)
    gr.HTML("<h2>Image and question, patch by patch</h2>", padding=False)
    heat = gr.HTML(NO_MAP, elem_id="heat", padding=False)
    return {"bars": bars, "heat": heat}


def _connect(on: SimpleNamespace):
    """Connects events with their handlers; only `/ask` is open to programs."""
    given = [on.image, on.question, on.chat, on.other, on.level, on.second, on.compare]
    given += [on.temperature, on.top_p, on.length]
    beside = [on.chat, on.other, on.bars, on.heat, on.status]
    # one answer at a time, whoever asks
    model_only = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
    private = {"api_visibility": "private", "show_progress": "hidden"}
    at_once = {**private, "queue": False}
    running = [
        gr.on([on.ask.click, on.question.submit], chat_on, given, [on.question, *beside], **private | model_only),
        on.retry.click(retry, given, [on.question, *beside], **private | model_only),
    ]
    on.stop.click(lambda: _status("Stopped."), None, on.status, cancels=running, **at_once)
    on.clear.click(start_over, None, beside, cancels=running, **at_once)
    on.image.change(check_image, on.image, [on.image, on.notice, *beside], cancels=running, **at_once)
    on.compare.change(show_second, [on.compare, on.chat], [on.second, on.other], **at_once)
    levels = [on.level, on.second, on.compare]
    gr.on([part.change for part in levels], name_chats, levels, [on.chat, on.other], **at_once)
    for button, example in zip(on.examples, EXAMPLES, strict=True):
        button.click(_example(example), None, [on.image, on.question, *on.suggestions], **at_once)
    for button in on.suggestions:
        button.click(lambda text: text, button, on.question, **at_once)
    _add_api(on.image, on.question, on.level, model_only)


def _uploaded_path(cache: Path, payload) -> str | None:
    """The path of an upload, wherever it stands in the payload."""
    if payload is None or payload.path is None:
        return None
    # gradio checks only what is declared as a file: another path could name any image of this machine
    if not Path(payload.path).resolve().is_relative_to(cache.resolve()):
        raise gr.Error("The image was not uploaded here: upload it first.", print_exception=False)
    return payload.path


def _add_api(image, question, level, model_only: dict[str, Any]):
    """`/ask` for programs: the same image, question and level, the answer piece by piece, then the alignment."""
    with gr.Column(visible=False):
        answer, numbers, button = gr.Textbox(label="Answer"), gr.JSON(label="Alignment"), gr.Button()
    button.click(ask_once, [image, question, level], [answer, numbers], api_name="ask", **model_only)


def _chatbot(label: str, name: str, visible: bool = True) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        elem_id=name,
        visible=visible,
        height=420,
        min_width=200,
        layout="bubble",
        # the Hub shares a conversation in the Space's discussions; elsewhere there is nowhere to share it
        buttons=["copy", "share"] if os.environ.get("SPACE_ID") else ["copy"],
        feedback_options=None,
        placeholder="Choose an image, then ask about it.",
        # answers are shown as text and Markdown, never as markup of their own
        sanitize_html=True,
    )


def _by_itself(align_mode: str) -> str:
    return "Gate decides" if align_mode in ("gate", "local", "random") else f"Model decides ({align_mode})"


def _header(loaded: answers.Loaded) -> str:
    name = f"<code>{escape(loaded.name)}</code>"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", loaded.name):
        name = f'<a href="https://huggingface.co/{escape(loaded.name)}">{name}</a>'
    return (
        "<h1>AlignGPT</h1><p>Ask about an image, and see which levels of image-text alignment the answer is made of. "
        f"Model: {name}, levels 0 (loosest) to {loaded.config.num_align_levels - 1} "
        f'(closest). <a href="https://arxiv.org/abs/2405.14129">Paper</a> · <a href="{CODE}">Authors\' code</a></p>'
    )


def _status(text: str, kind: str = "said") -> str:
    """A line that screen readers read out when it changes; errors at once."""
    role = "alert" if kind == "error" else "status"
    return (
        f'<p class="{kind}" role="{role}" aria-live="{"assertive" if kind == "error" else "polite"}">{escape(text)}</p>'
    )


def _example(example: dict[str, Any]):
    def choose():
        texts = example["questions"]
        buttons = [gr.update(value=text, visible=True) for text in texts]
        buttons += [gr.update(visible=False) for _ in range(SUGGESTIONS - len(texts))]
        # an image and not a path: no file of this folder is served
        return read_image(HERE / "examples" / example["image"]), texts[0], *buttons

    return choose


def start_over():
    return [], [], NO_QUESTION, NO_MAP, _status("")


def check_image(path: str | None):
    """A new image starts a new conversation; one that cannot be used is taken out, with the reason."""
    if path is None:
        # after a refusal the image changes once more, to none: the reason stays
        return gr.skip(), gr.skip(), *start_over()
    try:
        image = read_image(path)
    except ImageError as error:
        return None, _status(str(error), "error"), *start_over()
    return gr.skip(), _status(f"The image is ready ({image.width} x {image.height} pixels)."), *start_over()


def show_second(compare: bool, chat: Messages):
    """The second chat goes on from what the first has so far."""
    return gr.update(visible=compare), gr.update(visible=compare, value=chat if compare else [])


def name_chats(level, second, compare: bool):
    """Each chat says what decides its level."""
    return gr.update(label=_title(level) if compare else "Chat"), gr.update(label=_title(second))


def retry(image, question, chat: Messages, other: Messages, level, second, compare, *sampling) -> Iterator[tuple]:
    """The last question once more, at the levels chosen now."""
    question = next((turn["content"] for turn in reversed(_turns(chat)) if turn["role"] == "user"), None)
    if question is None:
        yield (*(gr.skip() for _ in range(5)), _status("There is no question to repeat yet.", "error"))
        return
    chat, other = _before(chat, question), _before(other, question)
    for shown in chat_on(image, question, chat, other, level, second, compare, *sampling):
        # a question that is being written stays
        yield (gr.skip(), *shown[1:])


def chat_on(
    image,
    question: str,
    chat: Messages,
    other: Messages,
    level,
    second,
    compare,
    temperature: float = 0,
    top_p: float = 1,
    length: int = MAX_NEW_TOKENS,
) -> Iterator[tuple]:
    """Streams the answer, or both, into the chats; whatever goes wrong is said, and the question kept."""
    chat, other = _settled(chat), _settled(other)
    lanes = [(level, chat)] + ([(second, other)] if compare else [])
    before = (chat, other)
    started = time.monotonic()
    try:
        image = read_image(image)
        endings = []
        alignments: list[tuple[str, Alignment]] = []
        chats = [[*lane, _message("user", question)] for _, lane in lanes]
        yield _shown("", chats, _status("Reading the image ..."))
        for index, (lane_level, _) in enumerate(lanes):
            turns = _turns(chats[index])
            for item in answers.stream_answer(image, turns, _level(lane_level), length, temperature, top_p):
                if isinstance(item, Alignment):
                    alignments.append((_title(lane_level), item))
                    yield _shown("", chats, _status("Answering ..."), image, alignments)
                    continue
                answer = _message("assistant", item.text)
                yield _shown(
                    "", [*chats[:index], [*chats[index], answer], *chats[index + 1 :]], _status("Answering ...")
                )
                if item.ending is not None:
                    chats[index] = [*chats[index], _message("assistant", item.text or "(no words)")]
                    endings.append(_ENDINGS[item.ending])
        seconds = time.monotonic() - started
        yield _shown("", chats, _status(f"Answered in {seconds:.1f} seconds.{''.join(dict.fromkeys(endings))}"))
    except (ImageError, QuestionError) as error:
        yield (question, *before, *(gr.skip() for _ in range(2)), _status(str(error), "error"))
    # for instance no memory left: what happened, and everything as it was before
    except Exception as error:
        yield (question, *before, *(gr.skip() for _ in range(2)), _status(f"No answer: {_what(error)}", "error"))
        raise gr.Error(_what(error), title="No answer") from error


def ask_once(image, question: str, level: int | None) -> Iterator[tuple[str, dict | None]]:
    """One question about an image, for programs: the answer so far; with the last piece also the alignment."""
    try:
        image = read_image(image)
        alignment = None
        for item in answers.stream_answer(image, [{"role": "user", "content": question or ""}], _level(level)):
            if isinstance(item, Alignment):
                alignment = item
            elif item.ending is None:
                yield item.text, None
            else:
                assert alignment is not None
                yield item.text, {**vars(alignment), "ending": item.ending}
    except (ImageError, QuestionError) as error:
        raise gr.Error(str(error), title="No answer", print_exception=False) from error


def _shown(question: str, chats: list[Messages], status: str, image=None, alignments=None) -> tuple:
    """One state of the page; the alignment is drawn when it is new."""
    bars = heat = gr.skip()
    if alignments:
        bars = bars_html(alignments)
        similarity = alignments[0][1].similarity
        heat = map_html(image, similarity, seen_box(image.size, answers.loaded().processor.image_processor))
    return question, chats[0], chats[1] if len(chats) > 1 else gr.skip(), bars, heat, status


def _level(value: int | None) -> int | None:
    return None if value is None or value == BY_ITSELF else int(value)


def _title(level: int | None) -> str:
    return "As the model decides" if _level(level) is None else f"Fixed at level {level}"


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _turns(chat: Messages) -> list[dict[str, str]]:
    """Roles and texts of a chat, however gradio hands it over."""
    turns = []
    for message in chat:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part.get("text") or "" for part in content)
        turns.append({"role": message["role"], "content": content})
    return turns


def _settled(chat: Messages) -> Messages:
    """A chat without a last question that Stop left unanswered."""
    turns = _turns(chat)
    while turns and (turns[-1]["role"] == "user" or not turns[-1]["content"].strip()):
        turns.pop()
    return chat[: len(turns)]


def _before(chat: Messages, question: str) -> Messages:
    """A chat up to its last question, if that is this one."""
    turns = _turns(chat)
    last = next((index for index in reversed(range(len(turns))) if turns[index]["role"] == "user"), None)
    return chat[:last] if last is not None and turns[last]["content"] == question else chat


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
