"""
What is looked at before a folder leaves this machine: which files go, and what must not be in them.

Every check returns findings in words, each naming the file and the remedy; an empty list is a clean folder. The last
check, loading the folder in a fresh process, is in `fresh_load.py`.
"""

import ast
import fnmatch
import json
import os
import pickletools
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..folders import stays_inside
from .secret_scan import find_secrets, texts_of_image, unescaped


# what training and tools leave beside a model and nobody needs: not sent, not a finding
LEFT_OUT = (
    "checkpoint-*/*", "unfinished/*", "runs/*", "logs/*", "wandb/*", "trackio/*", "samples/*", ".cache/*", ".git/*",
    "__pycache__/*", "*.pyc", ".DS_Store", "*.log", "*.lock", "events.out.tfevents*", "trainer_state.json",
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
CARD_FILES = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*", "*.png", "*.jpg", "assets/*.png", "assets/*.jpg")
MODEL_FILES = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "*.safetensors",
    "*.safetensors.index.json", "adapter_config.json", "*.py", "training_summary.json", "evaluation_results.json",
    "alignment.json", ".eval_results/*.yaml", ".gitattributes", "original/*.json", "original/*.safetensors",
    "original/tokenizer.model", *TOKENIZER_FILES, *CARD_FILES,
)  # fmt: skip

TEXT_SUFFIXES = {".json", ".jsonl", ".py", ".md", ".txt", ".jinja", ".yaml", ".yml", ".toml", ".cfg", ".csv", ""}
# a vocabulary holds pieces of paths that are nobody's
VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
IMAGES = {".png", ".jpg", ".jpeg"}
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


def check_contents(files: Mapping[str, Path], near: Path | None = None) -> list[str]:
    """
    Pickles by content, broken safetensors and JSON, secrets, and paths of this machine.

    Args:
        files: path in the repository -> path here.
        near: the folder they came from, whose own path must not occur in them.
    """
    findings = []
    own_paths = _own_paths(near)
    for name, path in files.items():
        if not path.stat().st_size:
            findings.append(f"{name}: is empty. Was it written to the end?")
            continue
        if path.suffix == ".safetensors":
            text, problem = _safetensors_metadata(path)
            findings += [f"{name}: {problem}"] if problem else []
        elif path.suffix in TEXT_SUFFIXES:
            content = path.read_bytes()
            if is_pickle(path):
                findings.append(f"{name}: is a pickle by its content, which can run code. Remove it.")
                continue
            text = content.decode("utf-8", errors="replace")
            if path.suffix == ".json":
                try:
                    json.loads(text)
                except ValueError as error:
                    findings.append(f"{name}: is no valid JSON ({error}). Was it written to the end?")
        elif path.suffix in IMAGES and not is_pickle(path):
            text = texts_of_image(path)
        else:
            if is_pickle(path):
                findings.append(f"{name}: is a pickle by its content, which can run code. Remove it.")
            continue
        generic = Path(name).name not in VOCABULARIES
        found = [*find_secrets(text), *find_paths(text, own_paths, generic)]
        # a JSON file is read by people and programs without its escapes
        plain = unescaped(text) if path.suffix == ".json" and generic and "\\" in text else None
        if not found and plain is not None:
            found = [*find_secrets(plain), *find_paths(plain, own_paths, generic)]
        findings += [f"{name}: {finding}" for finding in found]
    return findings


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


# ---- code ----


def check_code(files: Mapping[str, Path]) -> list[str]:
    """
    Code that others can load: every class that `auto_map` names and every relative import is there.

    transformers copies a flat set of files: it follows `from .x import y`, silently leaves out `from . import x`, and
    cannot follow deeper paths. Absolute imports of this project's packages work nowhere else.
    """
    findings, reached = [], set()
    modules = {name.removesuffix(".py"): path for name, path in files.items() if re.fullmatch(r"[^/]+\.py", name)}
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if name not in files:
            continue
        for auto_class, target in _auto_map(files[name]).items():
            repo, _, reference = target.rpartition("--")
            module, _, class_name = reference.rpartition(".")
            if repo:
                findings.append(f"{name}: {auto_class} takes its code from {repo}. Load and save the model again.")
            elif module not in modules:
                findings.append(f"{name}: {auto_class} needs {module}.py, which is missing. Save the model again.")
            elif class_name not in _classes(modules[module]):
                findings.append(f"{name}: {auto_class} needs the class {class_name}, which {module}.py does not have.")
            else:
                reached.add(module)
    waiting = sorted(reached)
    while waiting:
        module = waiting.pop()
        needed, problems = _relative_imports(f"{module}.py", modules[module])
        findings += problems
        for other in sorted(needed - reached):
            if other in modules:
                reached.add(other)
                waiting.append(other)
            else:
                findings.append(f"{module}.py: imports .{other}, but {other}.py is missing. Save the model again.")
    for module in sorted(modules.keys() - reached - {"handler"}):
        findings.append(f"{module}.py: code that the model does not use. Remove it, or --ignore '{module}.py'.")
    return findings


def _auto_map(path: Path) -> dict[str, str]:
    try:
        auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
    except (ValueError, AttributeError):
        return {}  # `check_contents` names broken JSON
    targets = {}
    for auto_class, names in auto_map.items():
        for target in names if isinstance(names, list) else [names]:
            if target:
                targets[auto_class] = target
    return targets


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return None


def _classes(path: Path) -> set[str]:
    tree = _parse(path)
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} if tree else set()


def _relative_imports(name: str, path: Path) -> tuple[set[str], list[str]]:
    """(modules that a file imports from beside it, what in its imports cannot work elsewhere)."""
    tree = _parse(path)
    if tree is None:
        return set(), [f"{name}: is no valid Python."]
    needed, findings = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign = [alias.name for alias in node.names if _is_ours(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign = [node.module] if _is_ours(node.module or "") else []
        elif isinstance(node, ast.ImportFrom):
            foreign = []
            if node.level > 1 or not node.module or "." in node.module:
                place = "." * node.level + (node.module or "")
                findings.append(
                    f"{name} line {node.lineno}: `from {place} import ...` does not travel. Write `from .module import "
                    "name`, the module beside it."
                )
            else:
                needed.add(node.module)
        else:
            continue
        findings += [
            f"{name} line {node.lineno}: imports {module}, which only this project's installation has."
            for module in foreign
        ]
    return needed, findings


def _is_ours(module: str) -> bool:
    top = module.split(".")[0]
    return top == "modeling_aligngpt" or top.startswith("aligngpt_")


def check_complete(files: Mapping[str, Path]) -> list[str]:
    """Whether what a model or adapter needs is there: weights with all their shards, processor, config, template."""
    if "adapter_config.json" in files:
        needed = ["adapter_model.safetensors", "processor_config.json", "tokenizer_config.json"]
    else:
        needed = ["config.json", "processor_config.json", "tokenizer_config.json"]
        if not any("/" not in name and path.suffix == ".safetensors" for name, path in files.items()):
            needed.append("model.safetensors")
    findings = [
        f"{name}: is missing. Save model and processor into this folder." for name in needed if name not in files
    ]
    for name, path in files.items():
        if name.endswith(".safetensors.index.json"):
            try:
                shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                findings.append(f"{name}: is no index of weights. Save the model again.")
                continue
            folder = name.rpartition("/")[0]
            for shard in sorted(shards):
                if (f"{folder}/{shard}" if folder else shard) not in files:
                    findings.append(f"{name}: the weights {shard} are missing. Save the model again.")
    if "chat_template.jinja" not in files and "chat_template.json" not in files and not _has_template(files):
        findings.append("chat_template.jinja: is missing. Save the processor into this folder.")
    return findings


def _has_template(files: Mapping[str, Path]) -> bool:
    path = files.get("tokenizer_config.json")
    return path is not None and '"chat_template"' in path.read_text(encoding="utf-8", errors="replace")
