"""
The one gate for what leaves this machine, be it a model, data or a Space: which files go, and what must not be in them.

Every check returns findings in words, each naming the file and the remedy; an empty list is a clean folder.
"""

import fnmatch
import getpass
import json
import os
import pickletools
import re
import socket
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from modeling_aligngpt.images_aligngpt import image_size

from ..folders import stays_inside
from .image_metadata import has_place, is_image, texts_of_image, without_metadata
from .secret_scan import find_secrets, find_tokens, unescaped


# what training and tools leave beside a model and nobody needs: not sent, not a finding
LEFT_OUT = (
    "checkpoint-*/*", "unfinished/*", "runs/*", "logs/*", "wandb/*", "trackio/*", "samples/*", ".cache/*", ".git/*",
    "__pycache__/*", ".venv/*", "venv/*", ".gradio/*", ".ipynb_checkpoints/*", "*.pyc", ".DS_Store",
    "*.log", "*.lock", "events.out.tfevents*", "trainer_state.json",
    # rows of the evaluation data with the answers given while training; answers and judgements of `aligngpt evaluate`
    "generations.jsonl", "evaluation/*",
    "trainer_log.jsonl", "training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "global_step*/*",
    "pytorch_model_fsdp*/*", "latest", "zero_to_fp32.py", "profile/*",
)  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
CARD_FILES = (
    "README.md", "*.png", "*.jpg", "assets/*.png", "assets/*.jpg", ".gitattributes",
    *(name + end for name in ("LICENSE", "NOTICE", "USE_POLICY") for end in ("", ".md", ".txt")),
)  # fmt: skip
MODEL_FILES = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "*.safetensors",
    "*.safetensors.index.json", "adapter_config.json", "*.py", "training_summary.json", "evaluation_results.json",
    "alignment.json", ".eval_results/*.yaml", "original/*.json", "original/*.safetensors",
    "original/tokenizer.model", *TOKENIZER_FILES, *CARD_FILES,
)  # fmt: skip
SPACE_FILES = (
    "*.py", "*.css", "*.html", "*.js", "*.txt", "settings.json", "Dockerfile", "examples/*.json", "examples/*.md",
    *(f"examples/*{end}" for end in (".png", ".jpg", ".jpeg", ".webp", ".gif")), *CARD_FILES,
)  # fmt: skip

# read as bytes alone; everything else is read as text, too
BINARY = {".safetensors", ".model"}
# a vocabulary holds pieces of paths that are nobody's
VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
# of machines and users: they say nothing about anybody
ORDINARY_NAMES = {"", "root", "user", "ubuntu", "localhost", "runner", "jovyan", "admin"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}

_PATH_START = r"(?:(?<![\w.:/~)\]-])|(?<=file:/)/)"
# folders at the top under which people and clusters keep their own
_ROOTS = (
    "home|Users|root|tmp|var|srv|mnt|media|data|opt|nfs|net|work|scratch|workspaces?|storage|shared|projects?|private|"
    "gpfs|lustre|beegfs|fsx|efs|cluster|export|content|kaggle"
)
_PATHS = (
    _PATH_START + rf"/(?:{_ROOTS})/[\w.-]+[^\s\"'`<>|)\]]*",
    r"(?<![\w])[A-Za-z]:\\{1,2}(?:Users|Documents and Settings|Temp)\\{1,2}[\w.-]+[^\s\"'`<>|]*",
)


def select_files(
    folder: Path, allowed: Iterable[str] = MODEL_FILES, ignore: Iterable[str] = ()
) -> tuple[dict[str, Path], list[str], list[str]]:
    """
    Sorts the files of a folder.

    Args:
        folder: what is to be published.
        allowed: patterns of the kinds of files that may go.
        ignore: more patterns to leave out.

    Returns:
        files: path in the repository -> path here, of what goes.
        left_out: what stays, being of no use elsewhere.
        findings: what is neither.
    """
    files, left_out, findings = {}, [], []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.is_file():
            findings.append(f"{name}: a link to a folder or to nothing. Replace it by what it stands for.")
        elif path.is_symlink() and not stays_inside(path, folder):
            findings.append(f"{name}: a link to a file outside of the folder. Replace it by what it stands for.")
        elif _matches(name, LEFT_OUT) or any(
            fnmatch.fnmatchcase(part, pattern) for part in (name, path.name) for pattern in ignore
        ):
            left_out.append(name)
        elif path.suffix in PICKLES:
            findings.append(
                f"{name}: may be a pickle, which can run code where it is read. Save safetensors, or leave it out "
                f"with --ignore {path.name!r}."
            )
        elif not _matches(name, allowed):
            findings.append(f"{name}: not a kind of file that belongs here. Remove it, or --ignore {name!r}.")
        else:
            files[name] = path
    return dict(sorted(files.items())), sorted(left_out), findings


def _walk(folder: Path) -> Iterable[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted([*names, *links]):
            yield Path(parent) / name


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path fits a pattern; a pattern without a slash is for files at the top."""
    for pattern in patterns:
        if "/" in pattern:
            top = pattern.split("/")[0]
            if fnmatch.fnmatchcase(name.split("/")[0], top) and fnmatch.fnmatchcase(name, pattern):
                return True
        elif "/" not in name and fnmatch.fnmatchcase(name, pattern):
            return True
    return False


def stage_files(files: Mapping[str, Path], stage: Path) -> dict[str, Path]:
    """The files under their names in the repository: links, so that none is copied; images without their metadata."""
    staged = {}
    for name, path in files.items():
        staged[name] = place = stage / name
        place.parent.mkdir(parents=True, exist_ok=True)
        bare = None
        if is_image(path):
            with suppress(OSError, ValueError, SyntaxError):  # no image: check_contents says so
                bare = without_metadata(path.read_bytes())
        # a picture keeps the format that its name says
        if bare is None or (path.suffix.lower() not in (".png", ".jpg", ".jpeg") and bare[:4] == b"\x89PNG"):
            place.symlink_to(path.resolve())
        else:
            place.write_bytes(bare)
    return staged


def check_contents(files: Mapping[str, Path], near: Path | None = None) -> list[str]:
    """
    Pickles by content, broken safetensors, JSON and images, secrets in the bytes of every file, paths and names of this
    machine.

    Args:
        files: path in the repository -> path here.
        near: the folder they came from, whose own path must not occur in them.
    """
    findings = []
    own_paths = _own_paths(near)
    for name, path in files.items():
        findings += [f"{name}: {finding}" for finding in _check_file(name, path, own_paths)]
    return findings


def _check_file(name: str, path: Path, own_paths: list[str]) -> list[str]:
    if not path.stat().st_size:
        return ["is empty. Was it written to the end?"]
    if path.suffix != ".safetensors" and is_pickle(path):
        return ["is a pickle by its content, which can run code. Remove it."]
    findings: list[str] = []
    if path.suffix == ".safetensors":
        text, problem = _safetensors_metadata(path)
        findings += [problem] if problem else []
    elif is_image(path):
        data = path.read_bytes()
        text = texts_of_image(data)
        try:
            image_size(data)
        except Exception as error:
            findings.append(f"is no image ({error}). Remove it.")
        findings += ["says where it was taken (GPS). Remove its metadata."] if has_place(data) else []
    else:
        # UTF-16 without its zeros reads as UTF-8 does, as far as secrets and paths go
        text = "" if path.suffix in BINARY else path.read_bytes().replace(b"\0", b"").decode("utf-8", errors="replace")
    if path.suffix == ".json":
        try:
            record = json.loads(text)
            findings += _names_of_this_machine(record) if Path(name).name not in VOCABULARIES else []
        except ValueError as error:
            findings.append(f"is no valid JSON ({error}). Was it written to the end?")
    generic = Path(name).name not in VOCABULARIES
    found = [*find_secrets(text), *find_paths(text, own_paths, generic)]
    # a JSON file is read by people and programs without its escapes
    plain = unescaped(text) if path.suffix == ".json" and generic and "\\" in text else None
    if not found and plain is not None:
        found = [*find_secrets(plain), *find_paths(plain, own_paths, generic)]
    if not found:
        with path.open("rb") as file:
            found = find_tokens(file)
    return findings + found


def _names_of_this_machine(record: Any) -> list[str]:
    """Values of a record that are this machine's name or its user's, which say who and where."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = ""
    own = {"name of this machine": socket.gethostname(), "name of its user": user}
    values = set(_values(record))
    return [
        f"holds the {what} ({name}). Remove it."
        for what, name in own.items()
        if name not in ORDINARY_NAMES and name in values
    ]


def _values(record: Any) -> Iterable[str]:
    if isinstance(record, str):
        yield record
    elif isinstance(record, (dict, list)):
        for inner in record.values() if isinstance(record, dict) else record:
            yield from _values(inner)


def find_paths(text: str, own_paths: Iterable[str] = (), generic: bool = True) -> list[str]:
    """Paths of this or of somebody's machine in a text."""
    found: dict[str, int] = {}
    patterns = [re.escape(own) + r"(?![\w.-])[^\s\"'`<>|)\]]*" for own in own_paths]
    for pattern in [*patterns, *(_PATHS if generic else ())]:
        for match in re.finditer(pattern, text):
            path = match[0].rstrip(".,;:")
            path = path[1:] if path.startswith("//") else path
            if not any(path in other or other in path for other in found):
                found[path] = text.count("\n", 0, match.start()) + 1
    return [
        f"line {line} holds the path {path[:80]}, which is nowhere but on one machine. Write a Hub id or a relative "
        "name instead."
        for path, line in found.items()
    ]


def _own_paths(folder: Path | None) -> list[str]:
    """Absolute paths that lead to the user, this process or the folder, the longest first; none is short."""
    places = [Path.home(), Path.cwd(), Path(tempfile.gettempdir())]
    if folder is not None:
        places += [folder.absolute(), folder.resolve(), folder.resolve().parent]
    # "/root" and "/tmp" alone occur in ordinary text
    return sorted({str(place) for place in places if len(place.parts) > 2}, key=len, reverse=True)


def _safetensors_metadata(path: Path) -> tuple[str, str | None]:
    """(the free text in a safetensors file's header, what is wrong with the file)."""
    try:
        with safe_open(path, framework="np") as file:
            return json.dumps(file.metadata() or {}), None
    except (SafetensorError, OSError) as error:
        return "", f"is not a complete safetensors file ({error}). Save the model again."


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, or a zip archive with one in it (as `torch.save` writes), whatever its name."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith((".pkl", "/data.pkl")) for name in archive.namelist())
    with path.open("rb") as file:
        content = file.read(16 << 20)
    if content[:1] == b"\x80" and len(content) > 1 and content[1] <= 5:
        return True
    # protocol 0 is text; ordinary text does not parse to its end with a call in it
    try:
        names = {opcode.name for opcode, _, _ in pickletools.genops(content)}
    except (ValueError, IndexError):
        return False
    return bool(names & {"GLOBAL", "INST"})
