"""The packages' imports: no circles, no arrow upward, and no private name of one module used in another."""

import ast
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGES = {
    "modeling_aligngpt": "modeling_aligngpt",
    "aligngpt_trainers": "trainers",
    "aligngpt_hub": "hub",
    "aligngpt_playground": "playground",
    "aligngpt_recipes": "recipes",
    "aligngpt_shared": "shared",
}
# what each room may use besides itself; the model uses nothing
_CORE = ("modeling_aligngpt", "aligngpt_shared")
_TRAINERS = tuple(f"aligngpt_trainers{room}" for room in ("", ".storage", ".data", ".scoring"))
ROOMS = {
    "modeling_aligngpt": (),
    "aligngpt_shared": (),
    "aligngpt_recipes": (),
    "aligngpt_trainers.storage": _CORE,
    "aligngpt_trainers.data": (*_CORE, "aligngpt_trainers.storage"),
    "aligngpt_trainers.scoring": (*_CORE, "aligngpt_trainers.storage", "aligngpt_trainers.data"),
    "aligngpt_trainers": (*_CORE, "aligngpt_trainers.storage", "aligngpt_trainers.data"),
    "aligngpt_trainers.commands": (*_CORE, "aligngpt_recipes", *_TRAINERS),
    "aligngpt_hub": _CORE,
    "aligngpt_hub.metrics": (),
    "aligngpt_hub.original": (*_CORE, "aligngpt_hub"),
    "aligngpt_hub.engines": (*_CORE, "aligngpt_hub", "aligngpt_hub.original"),
    "aligngpt_hub.publishing": (*_CORE, "aligngpt_hub", "aligngpt_hub.original", "aligngpt_hub.engines"),
    "aligngpt_hub.evaluation": (*_CORE, "aligngpt_hub", "aligngpt_hub.metrics"),
    "aligngpt_hub.levels": (*_CORE, "aligngpt_hub"),
    "aligngpt_hub.serving": (*_CORE, "aligngpt_hub"),
    "aligngpt_hub.demo": (*_CORE, "aligngpt_hub", "aligngpt_hub.publishing"),
    "aligngpt_playground": (*_CORE, *_TRAINERS, "aligngpt_trainers.commands", "aligngpt_hub"),
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[0] == "space" or "__pycache__" in parts:
                continue  # a template, whose modules are a Space's
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, str]]:
    """(module, name taken from it) of our own imports of a module, wherever in it they stand."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    only_types = {id(part) for block in typing for part in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found = [
                (f"{module}.{a.name}", "") if f"{module}.{a.name}" in MODULES else (module, a.name) for a in node.names
            ]
        else:
            continue
        yield from ((module, taken) for module, taken in found if module in MODULES and module != name)


def room(name: str) -> str:
    if name == "aligngpt_trainers.__main__":  # the command line's door, which has to stand there
        return "aligngpt_trainers.commands"
    return max((known for known in ROOMS if name == known or name.startswith(f"{known}.")), key=len)


def test_no_circles():
    graph = {name: {module for module, _ in imports(name)} for name in MODULES}
    done, path = set(), []

    def visit(name: str):
        if name in path:
            raise AssertionError("circle: " + " -> ".join([*path[path.index(name) :], name]))
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


def test_no_arrow_upward():
    upward = [
        f"{name} imports {module}"
        for name in MODULES
        for module, _ in imports(name)
        if room(module) not in (room(name), *ROOMS[room(name)])
    ]
    assert not upward


def test_private_names_stay_at_home():
    taken = [
        f"{name} takes {module}.{what}"
        for name in MODULES
        for module, what in imports(name)
        if what.startswith("_") and not what.startswith("__")
    ]
    assert not taken


def test_every_room_is_there_and_small_enough_to_see():
    sizes: dict[str, int] = {}
    for name in MODULES:
        sizes[room(name)] = sizes.get(room(name), 0) + 1
    assert sizes.keys() == ROOMS.keys()
    assert max(sizes.values()) <= 24, sizes


def drawing() -> str:
    """The rooms' imports as a Mermaid graph; `modeling_aligngpt` and `aligngpt_shared`, which most use, as one."""
    folders = {
        name: name.replace("aligngpt_trainers", "trainers").replace("aligngpt_hub", "hub").replace("aligngpt_", "")
        for name in ROOMS
    }
    core = {"modeling_aligngpt": "core", "aligngpt_shared": "core"}
    nodes = {name: core.get(name, folders[name].replace(".", "_")) for name in ROOMS}
    edges = {(nodes[room(name)], nodes[room(module)]) for name in MODULES for module, _ in imports(name)}
    labels = {node: folders[name].replace(".", "/") for name, node in nodes.items()}
    labels["core"] = "modeling_aligngpt, shared"
    lines = ["graph TD"]
    lines += [f'    {node}["{label}"]' for node, label in sorted(labels.items())]
    lines += [f"    {one} --> {other}" for one, other in sorted(edges) if one != other]
    return "\n".join(lines)


def test_the_drawing_is_of_these_imports():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{drawing()}\n```" in page, f"put this into docs/architecture.md:\n{drawing()}"


def test_every_file_of_the_models_folder_is_in_its_tour():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "modeling_aligngpt").glob("*.py")} - {"__init__.py"}
    assert not [name for name in names if f"`{name}`" not in page]
