"""`aligngpt recipes`: the settings that come with this package, listed, shown, or copied out to be changed."""

import argparse
import shutil
from pathlib import Path

import aligngpt_recipes


FOLDER = Path(aligngpt_recipes.__file__).parent
ACCELERATE = "accelerate"


def recipe_names() -> list[str]:
    """Names of all stages' recipes, such as `vicuna-7b/pretrain`."""
    paths = [path for path in FOLDER.glob("*/*.yaml") if path.parent.name != ACCELERATE]
    return sorted(f"{path.parent.name}/{path.stem}" for path in paths)


def accelerate_names() -> list[str]:
    """Names of accelerate's files, such as `zero2`."""
    return sorted(path.stem for path in (FOLDER / ACCELERATE).glob("*.yaml"))


def find_recipe(name: str) -> Path | None:
    """
    The file of a recipe: `vicuna-7b/pretrain`, with or without `.yaml` and `recipes/` around it; `None` if there is
    none of that name.
    """
    plain = name.removeprefix("recipes/").removesuffix(".yaml")
    return FOLDER / f"{plain}.yaml" if plain in recipe_names() else None


def find_accelerate(name: str) -> Path | None:
    """The file of accelerate's settings of that name; `None` if there is none."""
    return FOLDER / ACCELERATE / f"{name}.yaml" if name in accelerate_names() else None


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("name", nargs="?", help="a recipe or its folder: show it (default: list all)")
    parser.add_argument("--copy", metavar="DIR", help="copy it (without a name: all of them) into DIR, to be changed")


def run(args: argparse.Namespace):
    if args.copy is not None:
        return _copy(args.name, Path(args.copy))
    if args.name is None:
        print("\n".join(_list()))
        return None
    for path in _files(args.name):
        print(path.read_text(encoding="utf-8"))
    return None


def _list() -> list[str]:
    folders = sorted({name.split("/")[0] for name in recipe_names()})
    width = max(map(len, folders)) + 2
    lines = ["--config NAME/STAGE"]
    for folder in folders:
        stages = [name.split("/")[1] for name in recipe_names() if name.split("/")[0] == folder]
        lines.append(f"  {folder:<{width}}{' '.join(sorted(stages, key=lambda stage: (stage != 'pretrain', stage)))}")
    return [*lines, "--accelerate_config NAME", f"  {' '.join(accelerate_names())}"]


def _files(name: str) -> list[Path]:
    """The files that a name means: one recipe, a model's, or one of accelerate's."""
    plain = name.removeprefix("recipes/").rstrip("/")
    if (found := find_recipe(plain) or find_accelerate(plain.removeprefix(f"{ACCELERATE}/"))) is not None:
        return [found]
    if plain and "/" not in plain and (files := sorted((FOLDER / plain).glob("*.yaml"))):
        return files
    raise ValueError(f"there is no recipe {name!r}; `aligngpt recipes` lists them.")


def _copy(name: str | None, target: Path) -> None:
    files = sorted(FOLDER.glob("*/*.yaml")) if name is None else _files(name)
    places = [(path, target / path.parent.name / path.name) for path in files]
    if there := [str(place) for _, place in places if place.exists()]:
        raise ValueError(f"{there[0]} exists: choose another folder, or remove it.")
    for path, place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        print(place)
