"""
`aligngpt publish`: a trained model, or a LoRA adapter, to the Hub in one commit.

The folder is sorted and checked, the card is written from the run's records, everything is tried in a fresh process;
only then does anything leave. The folder itself is not changed.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants

from aligngpt_shared.references import is_hub_id
from modeling_aligngpt import AlignGPTConfig

from .card import write_card
from .checks import check_code, check_complete
from .example import answer_example
from .fresh_load import check_loads
from .outgoing import check_contents, select_files, stage_files
from .run_records import Records, read_records
from .upload import Upload, check_repo_id, check_signed_in, download_text, hub_errors, upload_checked_folder


# of an earlier version, gone when the new one does not have them: shards, code and results that would mix with it
STALE = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json", "*.py",
    "adapter_config.json", ".eval_results/*.yaml", "original/*",
)  # fmt: skip
LLAVA_BRANCH = "llava"
STALE_BESIDE_ADAPTER = ("*.py", ".eval_results/*.yaml")
# what stands in the empty cards that libraries write
EMPTY_CARD = "[More Information Needed]"
ADAPTER = "adapter_config.json"


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    dry_run: bool = False,
    base_models: Sequence[str] = (),
    license: str | None = None,
    languages: Sequence[str] = ("en",),
    card: str | os.PathLike | None = None,
    new_card: bool = False,
    ignore: Iterable[str] = (),
    message: str | None = None,
    token: str | None = None,
    with_llava: int | bool = False,
    example: tuple[str, str] | None = None,
) -> Upload | None:
    """
    Publish a model folder: what `aligngpt pretrain`, `instruct` or `convert` wrote, `save_pretrained` of model and
    processor, or a LoRA adapter saved with its processor.

    Args:
        folder: with safetensors, config, code and processor.
        repo_id: USER/NAME, created where it does not exist.
        private: of a new repository.
        revision: branch to commit to; by default main.
        create_pr: open a pull request instead of committing.
        tag: give the commit this tag; the card's examples then pin it.
        dry_run: check and write the card, print what would go, and send nothing.
        base_models: Hub ids of the models it was made from, where the run's records name local folders. An adapter
            must have exactly one, from its config or here.
        license: the Hub's name of the whole model's licence; by default its base models', where they agree.
        languages: codes of the languages it was trained on.
        card: a card of your own (a Markdown file with metadata), in place of the generated.
        new_card: write the card anew where the folder holds one.
        ignore: patterns of files to leave out.
        message: of the commit.
        token: by default `HF_TOKEN` or the stored one.
        example: an image and a question, which the model answers for the card's head.
        with_llava: also as a plain LLaVA, in the branch `llava`: `True` at the top level, or the 0-based level.

    Returns:
        Where it is (the AlignGPT), `None` after a dry run.

    Raises:
        ValueError: the checks found something (all of it is named, nothing was sent), or the Hub refused.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the one that training, conversion or save_pretrained wrote.")
    # what is missing or cannot be read is named below, beside all else
    if (Path(folder) / "config.json").is_file():
        with suppress(OSError):
            AlignGPTConfig.get_config_dict(folder)
    wrong = [name for name in base_models if not is_hub_id(name)]
    if wrong:
        raise ValueError(f"--base-model {wrong[0]!r} is no Hub id: write USER/NAME.")
    if create_pr and (revision or tag):
        raise ValueError("A pull request goes to main and is tagged once merged: leave --revision and --tag out.")
    files, left_out, findings = select_files(folder, ignore=ignore)
    with tempfile.TemporaryDirectory(prefix="aligngpt-publish-") as stage, ExitStack() as more:
        # before anything is sent: what cannot be a LLaVA is said now
        llava = None if with_llava is False else _make_llava(folder, repo_id, with_llava, more)
        staged = stage_files(files, Path(stage))
        online = not (dry_run or constants.HF_HUB_OFFLINE)
        local_base = _settle_adapter(staged, base_models, findings, online, token)
        records = _read(staged, findings)
        shown = None
        if example is not None:
            if ADAPTER in staged:
                raise ValueError(f"{folder} is an adapter: an example needs a whole model (`aligngpt merge`).")
            shown = answer_example(folder, *example, Path(stage))
            staged[shown["image"]] = Path(stage) / shown["image"]
        kept = _prepare_card(
            records,
            staged,
            Path(stage),
            repo_id,
            base_models,
            license,
            languages,
            tag,
            card,
            new_card,
            dry_run,
            token,
            shown,
        )
        findings += check_contents(staged, folder) + check_complete(staged) + check_code(staged)
        done = ""
        if not findings:
            if not dry_run:
                check_signed_in(token)
            problems, done = check_loads(stage, local_base)
            findings += problems
        if findings:
            lines = "\n".join(f"  {finding}" for finding in findings)
            raise ValueError(f"{folder} is not fit to be published; nothing was sent:\n{lines}")
        print(f"checked: {len(staged)} files, {_megabytes(staged.values())}; {done}.")
        if left_out:
            print(f"left out: {_shorten(left_out)}")
        if kept:
            print(kept)
        if dry_run:
            _print_plan(staged, repo_id)
            if llava is not None:
                print(f"and to its branch {LLAVA_BRANCH!r}, as a plain LLaVA: {_megabytes(llava.values())}.")
            return None
        is_adapter = ADAPTER in staged
        upload = upload_checked_folder(
            staged,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            tag=tag,
            message=message or _message(records),
            stale=STALE_BESIDE_ADAPTER if is_adapter else STALE,
            token=token,
        )
        if llava is not None:
            # the branch begins as main is: nothing of that belongs here
            beside = upload_checked_folder(
                llava,
                repo_id,
                revision=LLAVA_BRANCH,
                message="The same as a plain LLaVA",
                stale=["*", "*/*"],
                token=token,
            )
            print(f"as a plain LLaVA, without code: revision={LLAVA_BRANCH!r}, commit {beside.commit}")
        return upload


def _make_llava(folder: Path, repo_id: str, level: int | bool, stack: ExitStack) -> dict[str, Path]:
    """The model as a plain LLaVA, in a folder that lives as long as the stack: name -> path."""
    from ..engines.export import export_at_level

    if (folder / ADAPTER).is_file():
        raise ValueError(f"{folder} is an adapter, and a LLaVA is a whole model: merge it first (`aligngpt merge`).")
    made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aligngpt-llava-")))
    export_at_level(folder, made, repo_id, None if level is True else int(level))
    files = {path.relative_to(made).as_posix(): path for path in sorted(made.rglob("*")) if path.is_file()}
    if findings := check_contents(files, made):
        raise ValueError(f"{folder} is not fit to be published as a LLaVA: {' '.join(findings)}")
    return files


def _read(staged: dict[str, Path], findings: list[str]) -> Records:
    try:
        return read_records(staged)
    except ValueError as error:
        findings.append(str(error))
        return Records()


def _settle_adapter(
    staged: dict[str, Path], base_models: Sequence[str], findings: list[str], online: bool, token: str | None
) -> Path | None:
    """
    Make an adapter's config name its base model by Hub id, and by commit where the Hub can be asked.

    Returns:
        The base model's folder, where it is on this machine.
    """
    if ADAPTER not in staged:
        return None
    config = json.loads(staged[ADAPTER].read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path") or ""
    local = Path(base) if base and os.path.isdir(base) else None
    if len(base_models) > 1:
        findings.append(f"{ADAPTER}: an adapter has one base model; --base-model names {len(base_models)}.")
        return local
    if base_models and base_models[0] != base:
        config |= {"base_model_name_or_path": base_models[0], "revision": None}
    elif not base_models and (local is not None or not is_hub_id(base)):
        findings.append(
            f"{ADAPTER}: its base model is {Path(base).name!r}, a folder here, which nobody else has. Publish that "
            "first and name it: --base-model USER/NAME. Or merge the adapter (`aligngpt merge`) and publish the whole."
        )
        return local
    if online:
        base = config["base_model_name_or_path"]
        with hub_errors(base):
            config["revision"] = HfApi(token=token).model_info(base, revision=config.get("revision")).sha
    _replace(staged, ADAPTER, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return local


def _replace(staged: dict[str, Path], name: str, text: str) -> None:
    """Another text for a staged file; the original stays as it is."""
    staged[name].unlink()
    staged[name].write_text(text, encoding="utf-8")


def _prepare_card(
    records: Records,
    staged: dict[str, Path],
    stage: Path,
    repo_id: str,
    base_models: Sequence[str],
    license: str | None,
    languages: Sequence[str],
    tag: str | None,
    card: str | os.PathLike | None,
    new_card: bool,
    dry_run: bool,
    token: str | None,
    example: dict[str, str] | None,
) -> str | None:
    """Stages the card: the user's own, the folder's, or a new one. Returns a note unless it is new."""
    if card is not None:
        if not Path(card).is_file():
            raise ValueError(f"--card {card}: there is no such file.")
        (stage / "README.md").unlink(missing_ok=True)
        shutil.copyfile(card, stage / "README.md")
        staged["README.md"] = stage / "README.md"
        return None
    if "README.md" in staged and not new_card:
        if EMPTY_CARD not in staged["README.md"].read_text(encoding="utf-8", errors="replace"):
            return "the folder's own README.md stays the card; --new-card writes a new one."
    elif not records.own and not new_card and not dry_run and _has_card(repo_id, token):
        return f"{repo_id} has a card and this folder no records of a run: the card stays; --new-card writes a new one."
    if "README.md" in staged:
        staged.pop("README.md").unlink()
    for name in [name for name in staged if name.startswith(".eval_results/")] if records.evaluation else []:
        staged.pop(name).unlink()
    (stage / "loss_curve.png").unlink(missing_ok=True)
    names = [*base_models, *(source.name for source in records.sources if source.is_hub_id)]
    datasets = {source.name for source in records.sources if source.is_dataset}
    licences = {} if dry_run or constants.HF_HUB_OFFLINE else _licences(names, datasets, token)
    written = write_card(
        records,
        stage,
        repo_id,
        base_models=base_models or _adapter_base(records),
        licences=licences,
        licence=license,
        languages=languages,
        tag=tag,
        example=example,
    )
    staged.update({name: stage / name for name in written})
    return None


def _adapter_base(records: Records) -> list[str]:
    base = records.adapter.get("base_model_name_or_path")
    return [base] if is_hub_id(base) else []


def _has_card(repo_id: str, token: str | None) -> bool:
    with hub_errors(repo_id):
        return download_text(repo_id, "README.md", token=token) is not None


def _licences(names: Iterable[str], datasets: set[str], token: str | None) -> dict[str, str]:
    """Hub id -> licence, of those whose page says one."""
    api, found = HfApi(token=token), {}
    for name in dict.fromkeys(names):
        # a card without this line is better than no card
        with suppress(Exception):
            info = api.dataset_info(name, timeout=10) if name in datasets else api.model_info(name, timeout=10)
            licence = info.card_data.get("license") if info.card_data else None
            if licence == "other":
                licence = info.card_data.get("license_name") or licence
            if isinstance(licence, str):
                found[name] = licence
    return found


def _message(records: Records) -> str:
    if records.adapter:
        return "AlignGPT LoRA adapter"
    stage = records.stages[-1] if records.stages else {}
    what = {"pretrain": " after stage 1", "instruct": " after stage 2"}.get(stage.get("stage"), "")
    steps = f" ({stage['steps']:,} steps)" if stage.get("steps") else ""
    return f"AlignGPT{what}{steps}"


def _megabytes(paths: Iterable[Path]) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:,.1f} MB"


def _shorten(names: list[str]) -> str:
    """Names by folder, so that a checkpoint's files are one entry."""
    groups = dict.fromkeys(f"{name.split('/')[0]}/" if "/" in name else name for name in names)
    return ", ".join(groups)


def _print_plan(staged: dict[str, Path], repo_id: str) -> None:
    print(f"\nwould go to {repo_id}, in one commit:")
    for name, path in sorted(staged.items()):
        print(f"  {path.stat().st_size:>14,}  {name}")
    print("\nREADME.md:\n")
    print(staged["README.md"].read_text(encoding="utf-8"))
    print("dry run: nothing was sent.")


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt publish`."""
    parser.add_argument("folder", metavar="DIR", help="the folder of the model or adapter")
    add_hub_arguments(parser)
    from_help = "Hub id of a model it was made from, where the records name a folder (may be repeated)"
    parser.add_argument("--base-model", action="append", default=[], metavar="ID", dest="base_models", help=from_help)
    parser.add_argument("--license", metavar="NAME", help="the whole model's licence, by the Hub's name for it")
    parser.add_argument("--language", action="append", metavar="CODE", help="what it was trained on, default: en")
    parser.add_argument("--card", metavar="FILE", help="a card of your own in place of the generated")
    parser.add_argument("--new-card", action="store_true", help="write the card anew where the folder holds one")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="files to leave out")
    parser.add_argument(
        "--example",
        nargs=2,
        metavar=("IMAGE", "QUESTION"),
        help="begin the card with this image and the model's answer (you answer for the image's licence)",
    )
    parser.add_argument(
        "--with-llava",
        nargs="?",
        type=int,
        const=True,
        default=False,
        metavar="LEVEL",
        help=f"also as a plain LLaVA at one level (default: the top one), which needs no code of ours, in the branch "
        f"{LLAVA_BRANCH!r} of the same repository",
    )


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that publishing models and data share."""
    parser.add_argument("--repo-id", required=True, metavar="USER/NAME", help="where on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    parser.add_argument("--revision", metavar="BRANCH", help="commit to this branch, new or old (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--tag", metavar="V", help="give the commit this tag")
    parser.add_argument("--message", help="the commit's message")
    parser.add_argument("--dry-run", action="store_true", help="check, show what would go, send nothing")


def hub_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What publishing models and data have in common, as keywords."""
    names = ("private", "revision", "create_pr", "tag", "dry_run", "license", "message")
    return {"languages": args.language or ("en",), **{name: getattr(args, name) for name in names}}


def run(args: argparse.Namespace) -> int:
    """Run `aligngpt publish`; the exit code."""
    upload = publish(
        args.folder,
        args.repo_id,
        base_models=args.base_models,
        card=args.card,
        new_card=args.new_card,
        ignore=args.ignore,
        with_llava=args.with_llava,
        example=args.example and tuple(args.example),
        **hub_settings(args),
    )
    if upload is not None:
        print(describe(upload))
    return 0


def describe(upload: Upload) -> str:
    """Where an upload is, and how to pin it."""
    if not upload.changed:
        return f"{upload.repo_id} holds exactly this already: {upload.url}"
    pinned = upload.tag or upload.pull_request or upload.commit
    tagged = f", tag {upload.tag}" if upload.tag else ""
    return f"{upload.url}\ncommit {upload.commit}{tagged}; pinned: revision={pinned!r}"
