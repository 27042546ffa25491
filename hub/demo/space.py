"""`aligngpt space`: a complete Gradio Space for a published model, as a folder and, with `--push`, on the Hub."""

import argparse
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aligngpt_shared.files import new_folder
from aligngpt_shared.locks import lock, lock_of
from modeling_aligngpt.images_aligngpt import read_image

from ..publishing.outgoing import SPACE_FILES, check_contents, select_files, stage_files
from ..publishing.upload import HubError, Upload, check_repo_id, hub_errors, upload_checked_folder


TEMPLATE = Path(__file__).parents[1] / "space"
"""The Space's folder before a model's name is written into it."""
SETTINGS = "settings.json"
HARDWARE = "zero-a10g"

_SHA = re.compile(r"[0-9a-f]{40}")
# what loading a model reads, for the Space's image
_LOADED = re.compile(r"[^/]+\.(json|safetensors|py|jinja|model)")


@dataclass
class Example:
    """An image of the page with its questions, the first of which is asked."""

    title: str
    image: Path
    questions: list[str]


@dataclass
class Model:
    """A model repository at a commit; `files` are what loading it reads, empty when the Hub was not asked."""

    repo_id: str
    revision: str
    files: list[str]
    private: bool = False


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("folder", metavar="DIR", help="where the Space is written")
    parser.add_argument("--model", required=True, metavar="ID", help="the published model that it shows, USER/NAME")
    parser.add_argument("--revision", help="its branch, tag or commit (default: main's newest commit); always pinned")
    parser.add_argument("--title", help="the Space's title (default: the model's name)")
    parser.add_argument("--hardware", default=HARDWARE, help=f"hardware to suggest (default: {HARDWARE}, ZeroGPU)")
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="JSON",
        help="the page's examples: a list of `title`, `image` (a file beside it) and `questions` (default: the small "
        "world's, which suit no other model)",
    )
    parser.add_argument("--overwrite", action="store_true", help="also replace files of the Space changed by hand")
    parser.add_argument("--push", action="store_true", help="upload it to --repo-id as well")
    parser.add_argument("--repo-id", metavar="USER/NAME", help="the Space on the Hub")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="files not to upload")
    parser.add_argument("--private", action="store_true", help="make a new Space private")


def run(args: argparse.Namespace):
    """`aligngpt space`."""
    if args.push and not args.repo_id:
        raise ValueError("--push needs to know where to: add --repo-id USER/NAME.")
    if args.repo_id and not args.push:
        raise ValueError("--repo-id names where --push uploads to: add --push, or leave it out.")
    if args.repo_id:
        check_repo_id(args.repo_id)
    model = find_model(args.model, args.revision)
    examples = None if args.examples is None else read_examples(args.examples)
    folder = render_space(args.folder, model, args.title, args.hardware, args.overwrite, examples)
    print(f"{folder}: a Space for {model.repo_id} at {model.revision}")
    if not model.files:
        print("The Hub was not asked for the model's files: the Space downloads them when it starts.")
    if model.private:
        print("The model is private: give the Space a secret HF_TOKEN that may read it.")
    if args.push:
        # True or the account's own setting
        upload = push_space(folder, args.repo_id, private=args.private or None, ignore=args.ignore)
        print(f"{'uploaded' if upload.changed else 'nothing new'}: {upload.url}")


def read_examples(path: Path) -> list[Example]:
    """
    Examples of a JSON list; see `--examples`.

    Raises:
        ValueError: naming the file, the row and the field.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--examples {path} cannot be read as JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"--examples {path}: it must be a list of examples.")
    found = []
    for number, row in enumerate(rows):
        where = f"--examples {path}, row {number}"
        if not isinstance(row, dict) or not isinstance(row.get("title"), str) or not isinstance(row.get("image"), str):
            raise ValueError(f"{where}: `title` and `image` must be texts.")
        questions = row.get("questions")
        if not isinstance(questions, list) or not questions or not all(isinstance(q, str) and q for q in questions):
            raise ValueError(f"{where}: `questions` must be a list of texts.")
        image = path.parent / row["image"]
        try:
            read_image(image)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        found.append(Example(row["title"], image, questions))
    if len({example.image.name for example in found}) < len(found):
        raise ValueError(f"--examples {path}: two images have the same file name.")
    return found


def _write_examples(folder: Path, examples: list[Example]) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    rows = []
    for example in examples:
        shutil.copyfile(example.image, folder / example.image.name)
        rows.append({"title": example.title, "image": example.image.name, "questions": example.questions})
    (folder / "examples.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def find_model(repo_id: str, revision: str | None = None) -> Model:
    """
    The commit that a Space is pinned to.

    Args:
        repo_id: USER/NAME.
        revision: branch, tag or commit; `None`: main. A full commit hash is not looked up if the Hub is out of reach.

    Raises:
        ValueError: it is a folder, or the Hub does not know it or cannot be reached.
    """
    from huggingface_hub import HfApi

    if Path(repo_id).is_dir():
        raise ValueError(
            f"{repo_id} is a folder here, and a Space loads its model from the Hub: publish it first "
            f"(`aligngpt publish {repo_id} --repo-id USER/NAME`); to see it here: `aligngpt demo --model {repo_id}`."
        )
    check_repo_id(repo_id)
    try:
        with hub_errors(repo_id):
            info = HfApi().model_info(repo_id, revision=revision)
    except HubError as error:
        if error.unreachable and revision and _SHA.fullmatch(revision):
            return Model(repo_id, revision, [])
        hint = " Or name a full commit with --revision." if error.unreachable else ""
        raise ValueError(error.reason + hint) from error
    names = sorted(sibling.rfilename for sibling in info.siblings or ())
    if "config.json" not in names:
        raise ValueError(f"{repo_id} at {info.sha[:7]} has no config.json: it is not a model that can be loaded.")
    return Model(repo_id, info.sha, [name for name in names if _LOADED.fullmatch(name)], bool(info.private))


def render_space(
    folder: str | os.PathLike,
    model: Model,
    title: str | None = None,
    hardware: str = HARDWARE,
    overwrite: bool = False,
    examples: list[Example] | None = None,
) -> Path:
    """
    Writes the Space. A folder from an earlier call is updated; files that were added to it stay.

    Raises:
        ValueError: the folder holds something else, or files of the Space changed by hand (and not `overwrite`).
    """
    folder = Path(folder)
    is_new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    written = {} if is_new else _settings(folder)["written"]
    present = {name: folder / name for name in written if (folder / name).is_file()}
    changed = [name for name, path in present.items() if _digest(path) != written[name]]
    if changed and not overwrite:
        raise ValueError(
            f"{folder}: {', '.join(sorted(changed))} changed by hand since it was written. Name another folder, or "
            "replace them with --overwrite."
        )
    if is_new:
        with new_folder(folder) as beside:
            _write(beside, model, title, hardware, examples)
        return folder
    with lock(lock_of(folder)), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        beside = Path(name)
        _write(beside, model, title, hardware, examples)
        # the settings last: until then they say what was there before
        for path in sorted(beside.rglob("*"), key=lambda path: path.name == SETTINGS):
            if path.is_file():
                target = folder / path.relative_to(beside)
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
    return folder


def push_space(
    folder: str | os.PathLike, repo_id: str, private: bool | None = None, ignore: Iterable[str] = ()
) -> Upload:
    """
    Uploads a folder that [`render_space`] wrote, as one commit; its images without their metadata.

    Args:
        folder: the Space; files added to it go too, where they are of a kind that a Space reads.
        repo_id: USER/NAME; made where it does not exist.
        private: of a new Space; by default the account's own setting.
        ignore: patterns of files to leave out.

    Raises:
        ValueError: the folder is not a Space, a file is of no kind that a Space reads, a file holds a secret,
            or the Hub refuses.
    """
    folder = Path(folder)
    settings = _settings(folder)
    files, _, findings = select_files(folder, SPACE_FILES, ignore)
    message = f"AlignGPT demo of {settings['model']} at {settings['revision'][:7]}"
    with tempfile.TemporaryDirectory(prefix="aligngpt-space-") as stage:
        staged = stage_files(files, Path(stage))
        if findings := [*findings, *check_contents(staged, near=folder)]:
            raise ValueError("Nothing was uploaded. " + " ".join(findings))
        return upload_checked_folder(staged, repo_id, "space", private=private, space_sdk="gradio", message=message)


def _write(folder: Path, model: Model, title: str | None, hardware: str, examples: list[Example] | None):
    """The template with the model's name in README.md and settings.json, and its examples."""
    from jinja2 import StrictUndefined, Template

    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".gradio")
    shutil.copytree(TEMPLATE, folder, dirs_exist_ok=True, ignore=ignored)
    if examples is not None:
        _write_examples(folder / "examples", examples)
    template = Template(
        (TEMPLATE / "README.md").read_text(encoding="utf-8"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    card = template.render(
        title=title or f"AlignGPT: {model.repo_id.split('/')[1]}",
        model=model.repo_id,
        revision=model.revision,
        hardware=hardware,
        own_examples=examples is not None,
        preload=f"{model.repo_id} {','.join(model.files)} {model.revision}" if model.files else None,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    settings = {
        "model": model.repo_id,
        "revision": model.revision,
        # by which a later call knows what was changed by hand
        "written": {name: _digest(folder / name) for name in names if name != SETTINGS},
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _settings(folder: Path) -> dict:
    """The settings an earlier call wrote: `model`, `revision`, and `written` (file -> SHA-256)."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        assert all(isinstance(settings[name], str) for name in ("model", "revision"))
        assert isinstance(settings["written"], dict)
        return settings
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ValueError(
            f"{folder} exists and is no Space written by this command: name another folder or remove it."
        ) from None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
