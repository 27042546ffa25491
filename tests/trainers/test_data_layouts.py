"""The layouts that public data comes in, each as a list, a JSON file, a table and a stream: the same rows."""

import base64
import io
import json
import tarfile

import datasets
import pytest
from datasets import Dataset
from PIL import Image as PILImage

from aligngpt_trainers.data.load import load_rows


RED = (200, 10, 20)
KINDS = ("list", "json", "table", "stream", "json stream")


def encoded(kind="PNG"):
    stream = io.BytesIO()
    PILImage.new("RGB", (6, 4), RED).save(stream, kind)
    return stream.getvalue()


PNG = encoded()
B64 = base64.b64encode(PNG).decode()
ASKED = [("user", "<>What?"), ("assistant", "A kite.")]
SHOWN = [("user", "<>"), ("assistant", "A kite.")]
SYSTEM = ("system", "Be brief.")


def parts(**image):
    content = [image, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": [{**TEXT}]}]}


TEXT = {"type": "text", "text": "A kite."}
LAYOUTS = {
    "texts": ({"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A kite."}]}, [ASKED]),
    "answer": ({"image": "a.png", "question": "What?", "answer": "A kite."}, [ASKED]),
    "answers": ({"image": "a.png", "question": "What?", "answers": ["A dog.", "A kite.", "A kite."]}, [ASKED]),
    "dicts": (
        {"image": "a.png", "question": "What?", "answers": [{"answer": "A kite.", "id": 1}]},
        [ASKED],
    ),
    "query": ({"images": ["a.png"], "query": "<image>What?", "response": "A kite."}, [ASKED]),
    "instruction": (
        {"images": ["a.png"], "instruction": "What?", "input": "Say.", "output": "A kite.", "system": "Be brief."},
        [[SYSTEM, ("user", "<>What?\nSay."), ASKED[1]]],
    ),
    "roles": (
        {
            "images": ["a.png"],
            "system": "Be brief.",
            "conversations": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A kite."}],
        },
        [[SYSTEM, *ASKED]],
    ),
    "path": (parts(type="image", path="a.png"), [ASKED]),
    "image": (parts(type="image", image="a.png"), [ASKED]),
    "base64": (parts(type="image", base64=B64), [ASKED]),
    "url": (parts(type="image", url=f"data:image/png;base64,{B64}"), [ASKED]),
    "image_url": (parts(type="image_url", image_url={"url": f"data:image/png;base64,{B64}"}), [ASKED]),
    "captions": ({"image": "a.png", "captions": ["A kite.", "Red."]}, [SHOWN, [SHOWN[0], ("assistant", "Red.")]]),
    "caption": ({"image": "a.png", "caption": ["A kite."]}, [SHOWN]),
    "alt_text": ({"image": "a.png", "alt_text": "A kite."}, [SHOWN]),
    "alt": ({"image": "a.png", "alt": "A kite."}, [SHOWN]),
}
# What costs its row alone, and how it is named.
BAD = {
    "texts": ({"texts": [{"user": "What?"}]}, "lacks 'user' or 'assistant'|empty answer"),
    "answers": ({"answers": []}, "empty answer"),
    "base64": (parts(type="image", base64="no base64!"), "unusable image value"),
    "url": (parts(type="image", url="https://example.com/a.png"), "the web address https.*fetch it first"),
    "captions": ({"captions": []}, "has only|empty answer"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    (tmp_path / "a.png").write_bytes(PNG)
    return tmp_path


def read(records, kind, folder, **options):
    source = Dataset.from_list(records) if kind in ("table", "stream") else records
    if "json" in kind:
        source = folder / "data.json"
        source.write_text(json.dumps(records))
    stream = {"streaming": True, "shuffle_buffer": 0} if "stream" in kind else {}
    return list(load_rows(source, image_folder=folder, **stream, **options))


def said(row):
    turns = []
    for message in row["messages"]:
        blocks = [block["text"] if block["type"] == "text" else "<>" for block in message["content"]]
        turns.append((message["role"], "".join(blocks)))
    assert [image.getpixel((0, 0)) for image in row["images"]] == [RED]
    return turns


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(folder, name, kind):
    record, turns = LAYOUTS[name]
    assert [said(row) for row in read([record], kind, folder)] == turns
    if name not in BAD:
        return
    change, reason = BAD[name]
    bad = [record, {**record, **change}, record]
    with pytest.raises(ValueError, match=f"row 1|row {len(turns)}") as refused:
        read(bad, kind, folder)
    assert refused.match(reason)
    assert [said(row) for row in read(bad, kind, folder, on_bad_row="skip")] == [*turns, *turns]


def test_addresses_of_images_are_refused_with_the_remedy(folder):
    with pytest.raises(ValueError, match="URL holds addresses of images: fetch them first, as img2dataset"):
        load_rows([{"URL": "https://example.com/a.png", "TEXT": "a kite"}])


def test_captions_of_coco(folder):
    images = [{"id": 7, "file_name": "a.png"}]
    captions = [{"image_id": 7, "id": 1, "caption": "A kite."}, {"image_id": 7, "id": 2, "caption": "Red."}]
    source = folder / "captions_val2017.json"
    source.write_text(json.dumps({"info": {}, "images": images, "annotations": captions}))
    for stream in (False, True):
        assert [said(row)[1][1] for row in load_rows(source, streaming=stream)] == ["A kite.", "Red."]
    source.write_text(
        json.dumps({"images": images, "annotations": [{"image_id": 8, "id": 1, "caption": "?"}, *captions]})
    )
    with pytest.raises(ValueError, match=r"row 0 \(id 1\): .*empty question"):
        load_rows(source)
    assert len(load_rows(source, on_bad_row="skip")) == 2


def test_pictures_with_texts_beside_them(folder):
    below = folder / "set" / "00000"
    below.mkdir(parents=True)
    for name, image in {"x1.JPG": encoded("JPEG"), "x2.png": PNG, "x3.webp": encoded("WEBP")}.items():
        (below / name).write_bytes(image)
    (below / "x1.txt").write_text("A kite.\n")
    (below / "x3.txt").write_text("A sea.")
    (below / "x3.json").write_text('{"clip": 0.25}')
    (below / "00000_stats.json").write_text("{}")
    with pytest.raises(ValueError, match=r"1 of 3 rows .*\n  row 1 \(id '00000/x2'\).*each key an image"):
        load_rows(folder / "set")
    rows = load_rows(folder / "set", on_bad_row="skip")
    assert rows["id"][:] == ["00000/x1", "00000/x3"] and [m[1]["content"][0]["text"] for m in rows["messages"]] == [
        "A kite.",
        "A sea.",
    ]
    (row,) = load_rows(folder / "set", on_bad_row="skip", columns="clip_score=json.clip")
    assert row["clip_score"] == 0.25 and row["id"] == "00000/x3"


@pytest.mark.parametrize("streaming", [False, True])
def test_tars(folder, streaming):
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A kite."}]
    members = {
        "0.jpg": encoded("JPEG"), "0.txt": b"A kite.", "1.PNG": PNG, "1.json": json.dumps({"caption": "Red."}).encode(),
        "2.webp": PNG, "2.json": b"{", "3.txt": b"no image", "4.png": PNG,
        "4.json": json.dumps({"conversations": turns}).encode(),
    }  # fmt: skip
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (folder / "00000_stats.json").write_text("{}")
    options = {"streaming": True, "shuffle_buffer": 0} if streaming else {}
    with pytest.raises(ValueError, match=r"00000\.tar, key 2: its json is no JSON object"):
        list(load_rows(folder, **options))
    for source in (folder, folder / "00000.tar"):
        rows = list(load_rows(source, on_bad_row="skip", **options))
        assert [row["id"] for row in rows] == ["0", "1", "4"]
        assert rows[2]["messages"][0]["content"][1]["text"] == "What?"
    cut = (folder / "00000.tar").read_bytes()[:2600]
    (folder / "00000.tar").write_bytes(cut)
    assert [row["id"] for row in load_rows(folder, on_bad_row="skip", **options)] == ["0"]
    with pytest.raises(ValueError, match=r"00000\.tar: the archive is cut"):
        list(load_rows(folder, **options))
    (folder / "00000.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"00000\.tar: not readable as tar"):
        list(load_rows(folder, **options))
