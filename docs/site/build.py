"""
The site (`make docs`): every Markdown page of this repository as it lies, and a reference made of the code.

Pages are copied to `build/site-source` in the same places, with the files that they link to, so that their links hold.
The reference of commands and settings is read from the parsers and dataclasses, that of classes from docstrings. Broken
links and settings without a text end the build with an error.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "build" / "site-source"
PAGES = (
    "README.md",
    "AGENTS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/*.md",
    "benchmarks/*.md",
    "benchmarks/levels/*.md",
    "notebooks/*.ipynb",
)
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")

# Settings by command: (module, dataclasses). What is inherited of TRL and transformers is named and not repeated.
SETTINGS = {
    "init": ("aligngpt_trainers.commands.init", ("InitArguments",)),
    "score": ("aligngpt_trainers.scoring.config", ("ScoreConfig",)),
    "pretrain": ("aligngpt_trainers.commands.train", ("PretrainModelArguments", "DataArguments")),
    "instruct": ("aligngpt_trainers.commands.train", ("ModelArguments", "DataArguments")),
    "merge": ("aligngpt_trainers.commands.merge", ("MergeArguments",)),
}
CLASSES = {
    "Model": (
        "modeling_aligngpt.AlignGPTConfig",
        "modeling_aligngpt.AlignGPTForConditionalGeneration",
        "modeling_aligngpt.AlignGPTModel",
        "modeling_aligngpt.AlignGPTProcessor",
        "modeling_aligngpt.assembly.assemble",
    ),
    "Trainers": (
        "aligngpt_trainers.pretrain_trainer.AlignGPTPretrainTrainer",
        "aligngpt_trainers.pretrain_config.AlignGPTPretrainConfig",
        "aligngpt_trainers.instruct_trainer.AlignGPTInstructTrainer",
        "aligngpt_trainers.instruct_config.AlignGPTInstructConfig",
        "aligngpt_trainers.stage_config.StageConfig",
        "aligngpt_trainers.dummy_image.DummyImageCallback",
        "aligngpt_trainers.data.load.load_rows",
        "aligngpt_trainers.scoring.run.score_dataset",
    ),
    "Hub": (
        "aligngpt_hub.publishing.model.publish",
        "aligngpt_hub.publishing.dataset.publish_dataset",
        "aligngpt_hub.demo.space.push_space",
        "aligngpt_hub.original.convert.convert_checkpoint",
        "aligngpt_hub.original.export.export_original",
        "aligngpt_hub.evaluation.runner.run_benchmarks",
    ),
    "Records": (
        "aligngpt_shared.records",
        "aligngpt_shared.files",
        "aligngpt_shared.locks",
    ),
}


def collect() -> list[Path]:
    """The pages and, from link to link, what they need; paths from the repository's root."""
    waiting = [path.relative_to(ROOT) for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    found: dict[Path, None] = {}
    while waiting:
        page = waiting.pop(0)
        if page in found:
            continue
        found[page] = None
        if page.suffix != ".md":
            continue
        for groups in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            target = next(filter(None, groups)).partition("#")[0]
            if not target or "://" in target or target.startswith("mailto:"):
                continue
            path = (ROOT / page.parent / target).resolve()
            if not path.is_relative_to(ROOT) or not path.exists():
                raise SystemExit(f"{page}: the link {target} leads nowhere.")
            # a folder is shown by its own page, if it has one
            path = path / "README.md" if path.is_dir() and (path / "README.md").is_file() else path
            if path.is_file():
                waiting.append(path.relative_to(ROOT))
    return list(found)


def copy(paths: list[Path]) -> None:
    """Into `SOURCE`, in the same places. Links to folders get their page's name; what is no page stays a file."""
    for path in paths:
        target = SOURCE / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".md":
            shutil.copyfile(ROOT / path, target)
            if path.suffix == ".ipynb":
                copy_notebook(target)
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        if text.startswith("---\n"):  # metadata of a card: shown as what it is
            head, _, rest = text[4:].partition("\n---\n")
            text = f"```yaml\n{head}\n```\n{rest}"
        target.write_text(_with_page_links(text, path), encoding="utf-8")


def copy_notebook(path: Path) -> None:
    """A notebook as a page beside it, with its outputs."""
    import nbformat
    from nbconvert import MarkdownExporter

    images = f"{path.stem}_files"
    notebook = nbformat.read(path, as_version=4)
    # what code is highlighted as; a kernel writes it when it runs
    notebook.metadata.setdefault("language_info", {})["name"] = notebook.metadata.kernelspec.language
    text, resources = MarkdownExporter().from_notebook_node(notebook, {"output_files_dir": images})
    (path.parent / images).mkdir(exist_ok=True)
    for name, content in resources["outputs"].items():
        (path.parent / name).write_bytes(content)
    title, _, rest = text.strip().partition("\n")
    text = f"{title}\n\n[The notebook itself]({path.name}), with its outputs as they were here.\n{rest}\n"
    # from notebook to notebook
    text = re.sub(r"\]\((\d\d-[\w-]+)\.ipynb\)", r"](\1.md)", text)
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def _with_page_links(text: str, page: Path) -> str:
    def named(match: re.Match) -> str:
        target = match.group(2)
        path = ROOT / page.parent / target.partition("#")[0]
        if "://" in target or not path.is_dir():
            return match.group(0)
        if (path / "README.md").is_file():
            return f"{match.group(1)}({target.rstrip('/')}/README.md)"
        return match.group(1).strip("[]")  # a folder without a page: its name

    return re.sub(r"(\[[^\]]*\])\(([^)\s]+)\)", named, text)


def write_reference() -> None:
    """Pages of commands, settings and classes."""
    folder = SOURCE / "reference"
    folder.mkdir(parents=True)
    (folder / "commands.md").write_text(commands_page(), encoding="utf-8")
    (folder / "settings.md").write_text(settings_page(), encoding="utf-8")
    for title, names in CLASSES.items():
        lines = [f"# {title}", ""]
        for name in names:
            lines += [f"::: {name}", ""]
        (folder / f"{title.lower()}.md").write_text("\n".join(lines), encoding="utf-8")


def commands_page() -> str:
    """Each command with its help, as a terminal of 100 columns shows it; one process for all."""
    from aligngpt_trainers.commands.cli import COMMANDS, main

    os.environ["COLUMNS"] = "100"
    lines = ["# Commands", "", "What `aligngpt COMMAND --help` says.", ""]
    for command, (_, text) in COMMANDS.items():
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            main([command, "--help"])
        lines += [
            f"## {command}",
            "",
            f"{text[0].upper()}{text[1:]}.",
            "",
            "```text",
            shown.getvalue().strip(),
            "```",
            "",
        ]
    return "\n".join(lines)


def settings_page() -> str:
    """
    Tables of this project's own settings.

    Raises:
        SystemExit: a setting has no text.
    """
    import importlib

    lines = ["# Settings", "", "YAML keys and `--options` of the commands; those of TRL's `SFTConfig` come besides."]
    kinds = [(f"aligngpt {command}", module, names) for command, (module, names) in SETTINGS.items()]
    kinds += [
        ("Both stages (beside TRL's SFTConfig)", "aligngpt_trainers.stage_config", ("StageConfig",)),
        ("Stage 1", "aligngpt_trainers.pretrain_config", ("AlignGPTPretrainConfig",)),
        ("Stage 2", "aligngpt_trainers.instruct_config", ("AlignGPTInstructConfig",)),
    ]
    for title, module, names in kinds:
        lines += ["", f"## {title}", "", "| setting | default | |", "|---|---|---|"]
        for name in names:
            lines += [
                _setting_row(f"{module}.{name}", field) for field in _own_fields(importlib.import_module(module), name)
            ]
    return "\n".join(lines) + "\n"


def _own_fields(module, name: str) -> list[dataclasses.Field]:
    """The fields that a dataclass, or one of ours that it extends, brings itself."""
    kind = getattr(module, name)
    ours = [base for base in kind.__mro__ if base.__module__.startswith("aligngpt_")]
    if kind.__name__.endswith(("Config",)) and kind.__name__ != "ScoreConfig":
        ours = ours[:1]
    declared = {field for base in ours for field in vars(base).get("__annotations__", {})}
    return [field for field in dataclasses.fields(kind) if field.name in declared]


def _setting_row(where: str, field: dataclasses.Field) -> str:
    text = field.metadata.get("help")
    if not text:
        raise SystemExit(f"{where}: the setting {field.name} has no text (`metadata={{'help': ...}}`).")
    default = "" if field.default is dataclasses.MISSING else f"`{field.default}`"
    return f"| `{field.name}` | {default} | {text.replace('|', chr(92) + '|')} |"


# in place of the script that the theme would fetch, for pages that are opened from a folder
FOLDER_SEARCH = "assets/folder-search.js"


def finish(output: Path) -> None:
    """
    Names what the theme leaves without a name, for screen readers and keyboards; nothing is fetched from elsewhere.

    Raises:
        SystemExit: a page names another machine's script or style.
    """
    for page in output.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        own = "../" * (len(page.relative_to(output).parts) - 1) + FOLDER_SEARCH
        text = text.replace("https://unpkg.com/iframe-worker/shim", own)
        foreign = re.findall(r"<(?:script|link)[^>]+(?:src|href)=[\"']?(https?://[^\"' >]+)", text)
        if foreign:
            raise SystemExit(f"{page.relative_to(output)} fetches {foreign[0]}: keep it with the site.")
        dialog = 'data-md-component="search" role="dialog"'
        text = text.replace(dialog, f'{dialog} aria-label="Search"')
        page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site", help="folder to write (%(default)s)")
    args = parser.parse_args()
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    copy(collect())
    write_reference()
    shutil.copytree(Path(__file__).parent / "assets", SOURCE / "assets")
    config = Path(__file__).parent / "mkdocs.yml"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-q",
            "-f",
            str(config),
            "-d",
            str(args.output.resolve()),
        ],
        check=False,
    )
    if done.returncode:
        raise SystemExit("the site was not built: see above.")
    finish(args.output)
    print(f"the site is in {args.output}; to read it: python -m http.server --directory {args.output}")


if __name__ == "__main__":
    main()
