"""`aligngpt export`: an AlignGPT as a plain LLaVA, for engines that run no code of ours."""

import argparse
import json
from pathlib import Path

from aligngpt_shared.files import new_folder, write_json

from ..original.locate import locate


CALIBRATED = "calibrated"
RECORD = "export.json"


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--model", required=True, help="an AlignGPT: folder or Hub id")
    parser.add_argument("--output", required=True, type=Path, help="folder to write, absent or empty")
    parser.add_argument(
        "--format",
        choices=("llava", "gguf"),
        default="llava",
        help="what to write: a LLaVA of transformers (default), or that with mmproj.gguf, of which llama.cpp's own "
        "converter makes the rest",
    )
    parser.add_argument(
        "--align-level",
        default=None,
        help=f"the level that answers everything (default: the top one), or `{CALIBRATED}`: the gate's mean weights "
        "over --data",
    )
    parser.add_argument("--data", help="conversations about images, in any of training's layouts: what the cost is for")
    parser.add_argument("--split", help="split of the data (default: as training takes it)")
    # the reader of training's files, from the command line, which knows both packages
    parser.set_defaults(load_rows=None)
    parser.add_argument("--limit", type=int, default=256, help="rows of the data at most (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows at once (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run `aligngpt export`; the exit code."""
    # torch's and transformers' imports wait for a command that is to be run
    import torch

    from modeling_aligngpt import AlignGPTConfig

    from .gguf_mmproj import MMPROJ, TEMPLATE
    from .llava import check_exportable, write_llava
    from .llava_check import check_equal, compare, talks_of

    for name in ("limit", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    source = locate(args.model, "model")
    config = AlignGPTConfig.from_pretrained(source)
    check_exportable(config)
    if args.format == "gguf":
        _check_gguf(config, source)
    if args.align_level == CALIBRATED and not args.data:
        raise ValueError(f"--align-level {CALIBRATED} needs --data: conversations that the gate is averaged over.")
    talks = []
    if args.data:
        rows = args.load_rows(args.data, split=args.split)
        talks = talks_of(list(rows.select(range(min(args.limit, len(rows))))))
    with new_folder(args.output) as folder:
        weights, vector = _weights(args, config, source, talks)
        write_llava(source, folder, weights)
        if args.format == "gguf":
            todo = _write_gguf(source, folder, "float32" if config.dtype == torch.float32 else "float16")
        check = check_equal(source, folder, weights)
        cost = compare(source, folder, talks, args.batch_size) if talks else None
        record = {"of": Path(args.model).name, "level_weights": weights, "check": check, "cost": cost}
        write_json(folder / RECORD, record)
        card = _card(args, vector, weights, check, cost)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"Wrote a LLaVA to {args.output}: {vector}")
    print(
        f"Largest difference of logits {check['largest_difference']:.1e}, largest logit {check['largest_logit']:.1f}."
    )
    if cost:
        print(
            f"On {cost['rows']} conversations: {cost['same_answers']:.1%} of the first answers equal the gate's; loss "
            f"{cost['loss']:.4f}, with the gate {cost['loss_of_the_gate']:.4f}."
        )
    if args.format == "gguf":
        model = args.output / "model.gguf"
        for line in todo:
            print(line)
        print(f"Next, with llama.cpp's converter: python convert_hf_to_gguf.py {args.output} --outfile {model}")
        print(
            f"Then: llama-mtmd-cli -m {model} --mmproj {args.output / MMPROJ} --jinja --chat-template "
            f'"$(cat {args.output / TEMPLATE})" --image IMAGE -p QUESTION --temp 0'
        )
    return 0


def _write_gguf(source: Path, folder: Path, dtype: str) -> list[str]:
    """What llama.cpp needs besides its own converter; what there is to know and to do."""
    from modeling_aligngpt import AlignGPTProcessor

    from .gguf_mmproj import copy_vocabulary, notes, write_mmproj, write_template

    write_mmproj(folder, dtype)
    write_template(folder, AlignGPTProcessor.from_pretrained(source).chat_template)
    todo = copy_vocabulary(source, folder)
    said = notes(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return [*said, todo] if todo else said


def _check_gguf(config, source: Path) -> None:
    """Refuses, before anything is written, what llama.cpp cannot run."""
    from modeling_aligngpt import AlignGPTProcessor

    from .gguf_mmproj import check_convertible
    from .llava import llava_config

    processor = AlignGPTProcessor.from_pretrained(source)
    check_convertible(llava_config(config).to_dict(), processor.image_processor.to_dict())


def export_at_level(source: Path, folder: Path, name: str, align_level: int | None = None) -> None:
    """
    Writes a model as a plain LLaVA at one level, with its card; what `aligngpt publish --with-llava` sends.

    Args:
        source: folder of an AlignGPT.
        folder: where to write.
        name: the model's on the Hub.
        align_level: 0-based; `None` is the top one.

    Raises:
        ValueError: the model has what LLaVA lacks, or no such level.
    """
    from modeling_aligngpt import AlignGPTConfig

    from .llava import check_exportable, level_weights, write_llava
    from .llava_check import check_equal

    config = AlignGPTConfig.from_pretrained(source)
    check_exportable(config)
    level = config.num_align_levels - 1 if align_level is None else align_level
    weights = level_weights(config, level)
    write_llava(source, folder, weights)
    check = check_equal(source, folder, weights)
    vector = f"level {level} of {config.num_align_levels}."
    (folder / "README.md").write_text(_render_card(name, name, None, vector, weights, check, None), encoding="utf-8")


def _weights(args: argparse.Namespace, config, source: Path, talks: list) -> tuple[list[float], str]:
    """What each level contributes, and a sentence about it."""
    from .llava import level_weights
    from .llava_check import mean_level_weights

    if args.align_level != CALIBRATED:
        top = config.num_align_levels - 1
        text = str(top) if args.align_level is None else args.align_level
        if not text.isdecimal():
            raise ValueError(f"--align-level {text}: give a level, 0 to {top}, or `{CALIBRATED}`.")
        level = int(text)
        return level_weights(config, level), f"level {level} of {top + 1}{', the top one' if level == top else ''}."
    if not config.uses_gate:
        raise ValueError(f"--align-level {CALIBRATED}: this model has no gate (align_mode={config.align_mode!r}).")
    from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

    model = AlignGPTForConditionalGeneration.from_pretrained(source).eval()
    weights = mean_level_weights(model, AlignGPTProcessor.from_pretrained(source), talks, args.batch_size)
    del model
    return weights, f"the gate's mean weights over {len(talks)} questions of {Path(args.data).name}."


def _card(args: argparse.Namespace, vector: str, weights: list[float], check: dict, cost: dict | None) -> str:
    from aligngpt_shared.references import is_hub_id

    on_hub = is_hub_id(args.model) and not Path(args.model).exists()
    source = args.model if on_hub else Path(args.model).name
    data = Path(args.data).name if args.data else None
    return _render_card(args.output.name, source, args.model if on_hub else None, vector, weights, check, cost, data)


def _render_card(
    name: str,
    source: str,
    base_model: str | None,
    vector: str,
    weights: list[float],
    check: dict,
    cost: dict | None,
    data: str | None = None,
) -> str:
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=False)
    return environment.get_template("llava_card.md.jinja").render(
        name=name,
        base_model=base_model,
        source=source,
        vector=vector,
        weights=weights,
        check=check,
        cost=cost,
        data=data,
    )
