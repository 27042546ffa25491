"""Secrets in every place of what leaves by the three ways to publish: each is found, or does not travel."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, List
from local_hub.pairs import features, rows, save
from modeling.test_loading import build
from PIL import Image, PngImagePlugin

import aligngpt_hub
from aligngpt_hub.demo.space import Model, push_space, render_space
from aligngpt_hub.local import find_local_model
from aligngpt_hub.publishing.dataset import _embedded
from aligngpt_hub.publishing.image_metadata import without_metadata
from aligngpt_hub.publishing.outgoing import SPACE_FILES, check_contents, select_files, stage_files
from aligngpt_trainers.commands.cli import main


TOKEN = "hf" + "_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
KEY = "-----BEGIN OPENSSH " + "PRIVATE KEY-----"
ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be")


# ---- images ----


def encoded(kind: str, **settings) -> bytes:
    pixels = np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def exif(tag: int, value) -> Image.Exif:
    found = Image.Exif()
    if tag == 0x8825:
        found.get_ifd(tag).update(value)
        found[tag] = value
    else:
        found[tag] = value
    return found


def text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", TOKEN)
    return info


def late_text() -> bytes:
    """PNG text behind the pixels."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", TOKEN)
    plain, written = encoded("PNG"), encoded("PNG", pnginfo=info)
    start = written.index(b"tEXt") - 4
    chunk = written[start : start + 12 + int.from_bytes(written[start : start + 4], "big")]
    return plain[:-12] + chunk + plain[-12:]


GPS = {1: "N", 2: (48.0, 51.0, 29.0), 3: "E", 4: (2.0, 17.0, 40.0)}
IMAGES = {
    "JPEG EXIF": lambda: encoded("JPEG", exif=exif(0x010E, TOKEN)),
    "JPEG comment": lambda: encoded("JPEG", comment=TOKEN.encode()),
    "JPEG profile": lambda: encoded("JPEG", icc_profile=TOKEN.encode()),
    "JPEG behind the end": lambda: encoded("JPEG") + KEY.encode(),
    "JPEG behind the end, UTF-16": lambda: encoded("JPEG") + TOKEN.encode("utf-16"),
    "JPEG GPS": lambda: encoded("JPEG", exif=exif(0x8825, GPS)),
    "progressive JPEG EXIF": lambda: encoded("JPEG", progressive=True, exif=exif(0x010E, TOKEN)),
    "PNG text": lambda: encoded("PNG", pnginfo=text()),
    "PNG text behind the pixels": late_text,
    "PNG behind the end": lambda: encoded("PNG") + KEY.encode(),
    "PNG EXIF": lambda: encoded("PNG", exif=exif(0x010E, TOKEN)),
    "PNG GPS": lambda: encoded("PNG", exif=exif(0x8825, GPS)),
    "WebP EXIF": lambda: encoded("WEBP", lossless=True, exif=exif(0x010E, TOKEN)),
    "GIF comment": lambda: encoded("GIF", comment=TOKEN.encode()),
    "TIFF description": lambda: encoded("TIFF", description=TOKEN),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_in_data_lose_what_stands_beside_their_pixels(tmp_path, case):
    data = IMAGES[case]()
    (tmp_path / "me.png").write_bytes(data)
    sent = _embedded({"bytes": None, "path": str(tmp_path / "me.png")}, keep_bytes=False)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(sent["bytes"])) as after:
        assert before.convert("RGB").tobytes() == after.convert("RGB").tobytes()
        assert not after.getexif() and not {"comment", "Comment", "icc_profile"} & after.info.keys()
    for secret in (TOKEN, KEY):
        assert not any(secret.encode(encoding) in sent["bytes"] for encoding in ENCODINGS)
    assert "me" not in sent["path"]
    # kept as they are: found
    columns = rows(1) | {"images": [[{"bytes": data, "path": None}]]}
    save(tmp_path / "kept", Dataset.from_dict(columns, features=features(List(datasets.Image()))))
    with pytest.raises(ValueError, match=r"row 0: the image.*(holds a (Hugging Face token|private key)|GPS)"):
        aligngpt_hub.publish_dataset(tmp_path / "kept", "user/pairs", dry_run=True, keep_image_bytes=True)


def test_a_turned_image_stays_upright_and_a_transparent_one_transparent():
    turned = encoded("JPEG", exif=exif(0x0112, 6))
    with Image.open(io.BytesIO(without_metadata(turned))) as image:
        assert dict(image.getexif()) == {0x0112: 6}
    clear = io.BytesIO()
    Image.new("P", (4, 4)).save(clear, "PNG", transparency=0)
    with Image.open(io.BytesIO(without_metadata(clear.getvalue()))) as image:
        assert image.convert("RGBA").getpixel((0, 0))[3] == 0


# ---- rows ----


DEEP = {
    "string": (pa.string(), TOKEN),
    "large string": (pa.large_string(), TOKEN),
    "behind an escape": (pa.string(), f"line\n{TOKEN}"),
    "list": (pa.list_(pa.string()), ["a", TOKEN]),
    "list of lists": (pa.list_(pa.list_(pa.string())), [["a"], [TOKEN]]),
    "struct": (pa.struct([("by", pa.string())]), {"by": TOKEN}),
    "list of structs": (pa.list_(pa.struct([("by", pa.large_string())])), [{"by": TOKEN}]),
    "struct of lists": (pa.struct([("by", pa.list_(pa.string()))]), {"by": [TOKEN]}),
    "binary": (pa.binary(), b"\x00\xff" + TOKEN.encode()),
    "large binary": (pa.large_binary(), KEY.encode()),
    "binary UTF-16": (pa.binary(), TOKEN.encode("utf-16")),
    "a path in a struct": (pa.struct([("file", pa.string())]), {"file": "/home/me/pairs/1.jpg"}),
    "a password": (pa.struct([("password", pa.string())]), {"password": "hunter2" + "hunter2"}),
    "name of a field": (pa.struct([(TOKEN, pa.string())]), {TOKEN: "a"}),
}


@pytest.mark.parametrize("case", DEEP)
def test_texts_of_rows_at_any_depth(tmp_path, case):
    kind, value = DEEP[case]
    data = Dataset.from_dict(rows(2), features=features(List(datasets.Image())))
    more = Dataset(pa.table({"more": pa.array([None, value], kind)}))
    save(tmp_path / "scored", datasets.concatenate_datasets([data, more], axis=1))
    with pytest.raises(ValueError, match=r"split train, column(s| more): .*holds (a |the path|what looks)"):
        aligngpt_hub.publish_dataset(tmp_path / "scored", "user/pairs", dry_run=True)


# ---- files of a model and of a Space ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("folders")
    return {
        "model": build("llama, clip", top / "model"),
        "space": render_space(top / "space", Model("user/demo", "0" * 40, [])),
    }


def refused(way: str, folder: Path) -> str:
    """What is said instead of sending; this process is offline."""
    with pytest.raises(ValueError, match=r"nothing was sent|Nothing was uploaded") as error:
        if way == "model":
            aligngpt_hub.publish(folder, "user/name", dry_run=True)
        else:
            push_space(folder, "user/space")
    assert TOKEN not in str(error.value)
    return str(error.value)


READ = {
    "model": (
        "README.md", "LICENSE", "NOTICE.txt", "USE_POLICY.md", "tokenizer.model", "original/tokenizer.model",
        "vocab.txt", "chat_template.jinja", ".eval_results/a.yaml", ".gitattributes", "assets/logo.png",
    ),
    "space": ("app.py", "notes.txt", "style.css", "examples/ATTRIBUTION.md", "README.md", "examples/a.jpg"),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("way", "name"), [(way, name) for way, names in READ.items() for name in names])
def test_every_file_that_goes_is_read(folders, tmp_path, way, name, encoding):
    folder = Path(shutil.copytree(folders[way], tmp_path / "folder"))
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("ab") as file:
        file.write(b"\n" + f"x {TOKEN} x".encode(encoding))
    assert f"{name}: " in (said := refused(way, folder)) and "Hugging Face token" in said


@pytest.mark.parametrize("way", READ)
@pytest.mark.parametrize(
    "name",
    ["LICENSE.env", "NOTICE.env", "prod.env", ".env", "id_rsa", "key.pem", "notes.ipynb", "link.txt", "data.csv"],
)
def test_other_kinds_of_files_and_links_stay(folders, tmp_path, way, name):
    folder = Path(shutil.copytree(folders[way], tmp_path / "folder"))
    (tmp_path / "outside.txt").write_text("mine")
    if name == "link.txt":
        (folder / name).symlink_to(tmp_path / "outside.txt")
    else:
        (folder / name).write_text("ordinary")
    assert f"{name}: " in refused(way, folder)


def test_a_virtual_environment_stays_without_a_word(folders, tmp_path):
    folder = Path(shutil.copytree(folders["space"], tmp_path / "folder"))
    (folder / ".venv" / "lib").mkdir(parents=True)
    (folder / ".venv" / "lib" / "a.py").write_text(f"x = '{TOKEN}'")
    _, left_out, findings = select_files(folder, SPACE_FILES)
    assert left_out == [".venv/lib/a.py"] and findings == []


@pytest.mark.parametrize("case", [case for case in IMAGES if case.startswith(("JPEG", "PNG"))])
def test_images_beside_a_model_or_page_are_staged_bare(tmp_path, case):
    name = "assets/a.jpg" if case.startswith("JPEG") else "assets/a.png"
    (tmp_path / "a").write_bytes(IMAGES[case]())
    (tmp_path / "here").mkdir()
    (tmp_path / "a").rename(path := tmp_path / "here" / Path(name).name)
    staged = stage_files({name: path}, tmp_path / "stage")
    assert check_contents({name: path}) and not check_contents(staged)
    assert not staged[name].is_symlink()


def test_names_of_machine_and_user(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGNAME", "annabel")
    path = tmp_path / "training_summary.json"
    path.write_text(json.dumps({"by": {"who": ["annabel"]}, "model": "annabel/base"}))
    assert check_contents({path.name: path}) == [f"{path.name}: holds the name of its user (annabel). Remove it."]


def test_an_index_that_leads_elsewhere_is_refused(folders, tmp_path, capsys):
    folder = Path(shutil.copytree(folders["model"], tmp_path / "model"))
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"model.align_embeddings.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name files of this folder"):
        find_local_model(str(folder))
    assert main(["chat", "--model", str(folder), "--question", "hi"]) == 2
    assert "must name files of this folder" in capsys.readouterr().err
