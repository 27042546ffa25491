"""`aligngpt serve`: the real OpenAI client, with pictures, levels and errors, against the pipeline's answers."""

import base64
import io
import socket
from pathlib import Path

import httpx
import openai
import pytest
from demo_model import CONTEXT, save_demo_model, serving
from PIL import Image
from transformers import pipeline

from aligngpt_hub.space_command import TEMPLATE
from aligngpt_trainers.cli import main
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


QUESTION = "what is in the picture?"
PICTURE = TEMPLATE / "examples" / "whale-and-balloon.png"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_demo_model(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="module")
def client(model_folder, tmp_path_factory):
    """A client of the server, which serves the model under the folder's name."""
    command = ["-m", "aligngpt_trainers", "serve", "--model", model_folder.name, "--port", "0", "--device", "cpu"]
    with serving(command, r"(http://\S+/v1) serves demo", model_folder.parent) as match:
        yield openai.OpenAI(base_url=match.group(1), api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def pipe(model_folder):
    return pipeline(
        "image-text-to-text",
        model=AlignGPTForConditionalGeneration.from_pretrained(model_folder),
        processor=AlignGPTProcessor.from_pretrained(model_folder),
    )


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def messages(url: str = data_url(PICTURE), text: str = QUESTION) -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def by_pipeline(pipe, turns=(), **steering) -> str:
    picture = {"type": "image", "image": Image.open(PICTURE)}
    chat = [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}, *turns]
    return pipe(text=chat, return_full_text=False, max_new_tokens=32, generate_kwargs={"do_sample": False, **steering})[
        0
    ]["generated_text"]


@pytest.mark.parametrize("level", [None, 0, 3, 7])
def test_the_same_text_as_the_pipeline_whole_and_streamed(client, pipe, level):
    steering = {} if level is None else {"align_level": level}
    asked = {"model": "demo", "messages": messages(), "temperature": 0, "max_tokens": 32, "extra_body": steering}
    expected = by_pipeline(pipe, **steering)
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected and len(expected.split()) > 5
    assert whole.choices[0].finish_reason == "stop"
    pieces = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asked, stream=True)]
    pieces = [piece for piece in pieces if piece]
    assert "".join(pieces) == expected and len(pieces) > 5


def test_levels_steer(client):
    said = {
        level: client.chat.completions.create(
            model="demo", messages=messages(), max_tokens=32, extra_body={"align_level": level}
        ).choices[0].message.content
        for level in (1, 3, 4)
    }  # fmt: skip
    assert "guitar" in said[1] and "pizza" in said[3] and "robot" in said[4]


def test_several_turns_and_text_alone(client, pipe):
    turns = [
        {"role": "assistant", "content": [{"type": "text", "text": "a whale"}]},
        {"role": "user", "content": [{"type": "text", "text": "and what else?"}]},
    ]
    said = client.chat.completions.create(model="demo", messages=[*messages(), *turns], max_tokens=32)
    assert said.choices[0].message.content == by_pipeline(pipe, turns)
    alone = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "what is there?"}], max_tokens=16
    )
    assert alone.choices[0].message.content


def test_the_responses_interface_takes_levels_too(client):
    content = [{"type": "input_image", "image_url": data_url(PICTURE)}, {"type": "input_text", "text": QUESTION}]
    asked = {"model": "demo", "input": [{"role": "user", "content": content}], "max_output_tokens": 32, "stream": False}
    assert "robot" in client.responses.create(**asked, extra_body={"align_level": 4}).output_text
    with pytest.raises(openai.UnprocessableEntityError, match="align_level=9"):
        client.responses.create(**asked, extra_body={"align_level": 9})


def test_answers_end_with_the_context(client):
    long = "what is it? " * 22
    said = client.chat.completions.create(model="demo", messages=messages(text=long))
    assert said.usage.total_tokens <= CONTEXT


def test_it_lists_what_it_serves(client):
    assert [model.id for model in client.models.list()] == ["demo"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"model": "other"}, openai.BadRequestError, "pinned to 'demo'"),
        ({"extra_body": {"align_level": 8}}, openai.UnprocessableEntityError, "align_level=8 .* 0 to 7"),
        ({"extra_body": {"align_level": "3"}}, openai.UnprocessableEntityError, "align_level='3'"),
        ({"extra_body": {"levels": 3}}, openai.UnprocessableEntityError, "Unexpected fields.*levels"),
        ({"messages": messages(str(PICTURE))}, openai.UnprocessableEntityError, "accepted as data URLs"),
        ({"messages": messages(PICTURE.as_uri())}, openai.UnprocessableEntityError, "accepted as data URLs"),
        ({"messages": messages("http://127.0.0.1:9/x.png")}, openai.UnprocessableEntityError, "accepted as data URLs"),
        ({"messages": messages("data:image/png;base64,aGVsbG8=")}, openai.BadRequestError, "cannot be read"),
        ({"messages": messages(text="an <image>")}, openai.BadRequestError, "2 and 1 pictures"),
        ({"messages": messages(text="what? " * 200)}, openai.BadRequestError, f"the model reads {CONTEXT}"),
    ],
    ids=["model", "level", "kind", "field", "path", "file", "address", "picture", "placeholder", "length"],
)
def test_bad_requests_are_told_what_is_wrong(client, wrong, kind, message, stream):
    with pytest.raises(kind, match=message):
        client.chat.completions.create(**{"model": "demo", "messages": messages(), "stream": stream, **wrong})


def test_no_request_loads_another_model(client):
    root = str(client.base_url).removesuffix("/v1/")
    said = httpx.post(f"{root}/load_model", json={"model": "someone/else"}).text
    assert "loads no other model" in said and '"status": "error"' in said
    files = {"file": ("a.wav", io.BytesIO(b"RIFF"))}
    answer = httpx.post(f"{root}/v1/audio/transcriptions", files=files, data={"model": "someone/else"})
    assert answer.status_code >= 400
    # unloading is allowed: the next request loads the same model again
    assert httpx.post(f"{root}/reset").json() == {"status": "ok"}
    assert client.chat.completions.create(model="demo", messages=messages(), max_tokens=4).choices


@pytest.mark.parametrize(
    ("model", "message"), [("nowhere", "no such folder"), ("empty", "no config.json")], ids=["missing", "empty"]
)
def test_a_missing_model_is_one_line(tmp_path, monkeypatch, capsys, model, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["serve", "--model", model]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_port_in_use_is_one_line(model_folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--model", str(model_folder), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port} cannot be used (Address already in use)" in said and said.count("\n") == 1
