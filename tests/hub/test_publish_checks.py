"""What is found before anything leaves: each finding names the file and what to do; a clean folder has none."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from modeling.test_loading import build
from PIL import Image as PILImage
from PIL import PngImagePlugin
from safetensors.torch import load_file, save_file

import aligngpt_hub
from aligngpt_hub.publishing.checks import check_code, check_complete
from aligngpt_hub.publishing.fresh_load import check_loads
from aligngpt_hub.publishing.outgoing import check_contents, find_paths, select_files
from aligngpt_hub.publishing.secret_scan import find_secrets


TOKEN = "hf" + "_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"


def _text(value: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", value)
    return info


def _exif(value: str) -> PILImage.Exif:
    exif = PILImage.Exif()
    exif[0x010E] = value
    return exif


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return build("llama, clip", tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def look(folder: Path, **settings) -> list[str]:
    """All findings but those of the fresh process."""
    files, _, findings = select_files(folder, **settings)
    return findings + check_contents(files, folder) + check_complete(files) + check_code(files)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


class Harmful:
    def __reduce__(self):
        return (os.system, ("true",))


def test_a_clean_folder(folder):
    (folder / "checkpoint-10").mkdir()
    for name in ("checkpoint-10/model.safetensors", "optimizer.pt", "training_args.bin", "trainer_state.json"):
        (folder / name).write_bytes(pickle.dumps(str(folder)))
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "config").write_text(TOKEN)
    files, left_out, _ = select_files(folder)
    assert look(folder) == []
    assert len(left_out) == 5 and not set(left_out) & files.keys()
    assert {"model.safetensors", "config.json", "modeling_aligngpt.py", "chat_template.jinja"} <= files.keys()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Copies: what safetensors reads lies in the file that is to be written anew."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def spoil_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


CASES = {
    "unknown kind": (lambda f: (f / "notes.docx").write_bytes(b"x"), ["notes.docx: not a kind of file", "--ignore"]),
    "stray code": (lambda f: (f / "train.py").write_text("x = 1\n"), ["train.py: code that the model does not use"]),
    "pickle by name": (lambda f: torch.save({}, f / "pytorch_model.bin"), ["pytorch_model.bin: may be a pickle"]),
    "pickle as image": (
        lambda f: (f / "logo.png").write_bytes(pickle.dumps(Harmful())),
        ["logo.png: is a pickle by its content"],
    ),
    "zipped pickle": (lambda f: torch.save({"a": 1}, f / "LICENSE"), ["LICENSE: is a pickle by its content"]),
    "text pickle": (
        lambda f: (f / "vocab.txt").write_bytes(pickle.dumps(Harmful(), protocol=0)),
        ["vocab.txt: is a pickle by its content"],
    ),
    "pickle as weights": (
        lambda f: torch.save(weights_of(f), f / "model.safetensors"),
        ["model.safetensors: is not a complete safetensors file"],
    ),
    "half of the weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        ["model.safetensors: is not a complete safetensors file"],
    ),
    "empty": (lambda f: (f / "config.json").write_text(""), ["config.json: is empty"]),
    "broken JSON": (
        lambda f: (f / "generation_config.json").write_text('{"a": 1'),
        ["generation_config.json: is no valid JSON"],
    ),
    "token": (
        lambda f: (f / "training_summary.json").write_text(json.dumps({"stage": TOKEN})),
        ["training_summary.json: line 1 holds a Hugging Face token (hf_AbCd…)", "withdraw"],
    ),
    "token in the weights": (
        lambda f: save_file(weights_of(f), f / "model.safetensors", {"by": TOKEN}),
        ["model.safetensors: line 1 holds a Hugging Face token"],
    ),
    "key in the code": (
        lambda f: edit(f / "compat_v4.py", "import", "KEY = 'AKIA" + "ABCDEFGHIJKLMNOP'\nimport"),
        ["compat_v4.py", "an AWS key"],
    ),
    "path": (
        lambda f: spoil_config(f, _name_or_path="/home/someone/models/vicuna"),
        ["config.json: line 1 holds the path /home/someone/models/vicuna"],
    ),
    "own path": (
        lambda f: (f / "README.md").write_text(f"Trained from {f.parent}/stage1."),
        ["README.md: line 1 holds the path"],
    ),
    "cluster path": (
        lambda f: spoil_config(f, _name_or_path="/data/team/models/vicuna"),
        ["config.json: line 1 holds the path /data/team/models/vicuna"],
    ),
    "path in escapes": (
        lambda f: (f / "training_summary.json").write_text('{"dataset": "\\u002fopt\\u002fpairs\\/x.json"}'),
        ["training_summary.json: line 1 holds the path /opt/pairs/x.json"],
    ),
    "cloud secret": (
        lambda f: (f / "training_summary.json").write_text(
            json.dumps({"aws_secret_access_key": "wJalrXUtnFEMI/K7MDENG/bPxR" + "fiCYEXAMPLEKEY"})
        ),
        ["training_summary.json: line 1 holds what looks like a secret"],
    ),
    "password": (
        lambda f: spoil_config(f, database_password="hunter2" + "hunter2"),
        ["config.json: line", "holds what looks like a secret (Secret Keyword)"],
    ),
    "token in escapes": (
        lambda f: (f / "training_summary.json").write_text('{"stage": "hf\\u005f' + TOKEN[3:] + '"}'),
        ["training_summary.json: line 1 holds a Hugging Face token"],
    ),
    "token in an image": (
        lambda f: PILImage.new("RGB", (4, 4)).save(f / "curve.png", pnginfo=_text(TOKEN)),
        ["curve.png: line 1 holds a Hugging Face token"],
    ),
    "path in EXIF": (
        lambda f: PILImage.new("RGB", (4, 4)).save(f / "curve.jpg", exif=_exif("/nfs/me/run 3")),
        ["curve.jpg: line", "holds the path /nfs/me/run"],
    ),
    "link out of the folder": (
        lambda f: (f / "LICENSE").symlink_to("/etc/hostname"),
        ["LICENSE: a link to a file outside of the folder"],
    ),
    "missing code": (
        lambda f: (f / "images_aligngpt.py").unlink(),
        ["processing_aligngpt.py: imports .images_aligngpt, but images_aligngpt.py is missing"],
    ),
    "missing class": (
        lambda f: edit(f / "configuration_aligngpt.py", "class AlignGPTConfig", "class OtherConfig"),
        ["config.json: AutoConfig needs the class AlignGPTConfig"],
    ),
    "import of the folder": (
        lambda f: edit(f / "compat_v4.py", "import", "from . import images_aligngpt\nimport"),
        ["compat_v4.py line", "`from . import ...` does not travel"],
    ),
    "import of ours": (
        lambda f: edit(f / "compat_v4.py", "import", "from aligngpt_trainers.data.load import load_rows\nimport"),
        ["compat_v4.py line", "imports aligngpt_trainers.data.load, which only this project's installation has"],
    ),
    "code of elsewhere": (
        lambda f: spoil_config(f, auto_map={"AutoConfig": "user/x--configuration_aligngpt.AlignGPTConfig"}),
        ["config.json: AutoConfig takes its code from user/x"],
    ),
    "no processor": (
        lambda f: (f / "processor_config.json").unlink(),
        ["processor_config.json: is missing. Save model and processor"],
    ),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), ["chat_template.jinja: is missing"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors: is missing"]),
    "a missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
        ),
        ["model.safetensors.index.json: the weights model-00001-of-00002.safetensors are missing"],
    ),
    "a linked folder": (lambda f: (f / "assets").symlink_to("/"), ["assets: a link to a folder or to nothing"]),
}


@pytest.mark.parametrize("case", CASES)
def test_findings(folder, case):
    spoil, expected = CASES[case]
    spoil(folder)
    findings = look(folder)
    assert any(all(text in finding for text in expected) for finding in findings), findings
    assert not any(TOKEN in finding for finding in findings)


def test_all_findings_are_named_and_nothing_is_sent(folder):
    """In a process that is offline: a try to reach the Hub would be another error."""
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (folder / "notes.docx").write_bytes(b"x")
    (folder / "training_summary.json").write_text(json.dumps({"stage": "instruct", "note": TOKEN}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="nothing was sent") as error:
        aligngpt_hub.publish(folder, "user/name")
    lines = str(error.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "notes.docx", "pytorch_model.bin", "training_summary.json"
    ]  # fmt: skip
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    _, left_out, findings = select_files(folder, ignore=["*.bin", "notes.docx"])
    assert findings == [] and {"notes.docx", "pytorch_model.bin"} <= set(left_out)


def test_what_the_package_offers():
    assert all(callable(getattr(aligngpt_hub, name)) for name in aligngpt_hub.__all__)
    with pytest.raises(ValueError, match="write USER/NAME"):
        aligngpt_hub.publish("folder", "name")


def test_without_the_hub_nothing_is_tried(folder, monkeypatch):
    """Said before the fresh process, which takes its time."""
    monkeypatch.setattr("aligngpt_hub.publishing.model.check_loads", None)
    with pytest.raises(ValueError, match="switched off by HF_HUB_OFFLINE"):
        aligngpt_hub.publish(folder, "user/name", card=folder / "config.json")


def test_ordinary_text_passes():
    text = """
    See https://huggingface.co/home/page and http://tmp.org/tmp/x, ./tmp/y, ~/models, "images/train/a.jpg", or the
    ratio 3/tmp. Tokens look like hf_... and keys like sk-...; hf_hub_download and api_org_ are names.
    """
    assert find_paths(text) == [] and find_secrets(text) == []
    told = find_paths(r"in /mnt/data/llava, or C:\\Users\\me\\x, file:///home/me/x; D:\Users\me\y.")
    assert [line.removeprefix("line 1 holds the path ").split(", which")[0] for line in told] == [
        "/mnt/data/llava", "/home/me/x", r"C:\\Users\\me\\x", r"D:\Users\me\y"
    ]  # fmt: skip


def test_a_snapshot_of_the_cache_is_a_folder(folder, tmp_path):
    """Files that are links, as the client's cache has them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    assert look(snapshot) == []


def test_fresh_process(folder):
    """What only loading shows."""
    weights = weights_of(folder)
    weights.pop("model.align_gate.linear_1.weight")
    weights["model.align_embeddings.weight"] = weights["model.align_embeddings.weight"][:3].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert look(folder) == []
    findings, done = check_loads(folder)
    assert done == ""
    assert "1 weights are missing and would be random: model.align_gate.linear_1.weight" in findings[0]
    assert "another shape" in findings[1] and "align_embeddings" in findings[1]


def test_large_weights_are_compared_unread(folder, monkeypatch):
    import aligngpt_hub.publishing.fresh_load as fresh_load

    script = folder.parent / "fresh_load.py"
    script.write_text(Path(fresh_load.__file__).read_text().replace("LARGEST_RUN = 4 * 2**30", "LARGEST_RUN = 0"))
    monkeypatch.setattr(fresh_load, "__file__", str(script))
    findings, done = check_loads(folder)
    assert findings == [] and "by name and shape alone" in done
