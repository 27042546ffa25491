"""
Whether a model's folder is complete: weights, processor, template, and code that others can load.

Every check returns findings in words, each naming the file and the remedy. The last check, loading the folder in a
fresh process, is in `fresh_load.py`; which files go, and what must not be in them, in `outgoing.py`.
"""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path


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
