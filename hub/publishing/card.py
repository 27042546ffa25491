"""The model card, written from the run's own records: README.md, its images, and results for the Hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, eval_result_entries_to_yaml

from .card_results import model_index, result_files, results_table
from .figures import STAGES, draw_curves
from .run_records import Records, Source, hub_link


TEMPLATE = Path(__file__).with_name("card.md.jinja")
CURVE = "loss_curve.png"
CODE_LICENCE = "Apache-2.0"
TAGS = ("aligngpt", "vision-language", "arxiv:2405.14129")
PAPER = "[arXiv 2405.14129](https://arxiv.org/abs/2405.14129)"
MODES = {
    "level": "the level that the caller names, or the default level",
    "gate": "a gate mixes the lower levels to fit the question, the top level is always added",
    "local": "a gate mixes the lower levels, without the top level",
    "global": "the top level alone",
    "mean": "the mean of the lower levels, the top level is always added",
    "mean_of_all": "the mean of all levels",
    "fixed": "one fixed level",
    "random": "as the gate, over a table drawn at random before stage 2",
}


def write_card(
    records: Records,
    folder: Path,
    repo_id: str,
    *,
    base_models: Sequence[str] = (),
    licences: Mapping[str, str] | None = None,
    licence: str | None = None,
    languages: Sequence[str] = ("en",),
    tag: str | None = None,
    example: Mapping[str, str] | None = None,
) -> list[str]:
    """
    Write README.md, the loss curve and the results' files into a folder.

    Args:
        records: of the model.
        folder: where to write.
        repo_id: where the model will be.
        base_models: Hub ids of its base models, where the records do not hold them.
        licences: Hub id -> licence, as far as known.
        licence: of the whole.
        languages: codes of the languages it was trained on.
        tag: the tag that this version gets, for the examples.
        example: `image` (in the repository), `question` and `answer`, for the card's head.

    Returns:
        The names of the written files.
    """
    written = []
    if any(len(stage.get("loss_curve") or []) > 1 for stage in records.stages):
        draw_curves(records.stages, folder / CURVE)
        written.append(CURVE)
    bases = list(dict.fromkeys([*base_models, *(s.name for s in records.sources if s.is_hub_id and not s.is_dataset)]))
    licences = dict(licences or {})
    data = _metadata(records, repo_id, bases, licences, licence, languages)
    values = _values(records, repo_id, base_models, licences, licence, tag)
    values |= {"has_curve": CURVE in written, "example": example}
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), **values)
    (folder / "README.md").write_text(str(card).rstrip() + "\n", encoding="utf-8")
    written.append("README.md")
    for name, entries in result_files(records.evaluation).items():
        path = folder / ".eval_results" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
        written.append(f".eval_results/{name}.yaml")
    return written


def _metadata(
    records: Records,
    repo_id: str,
    bases: list[str],
    licences: Mapping[str, str],
    licence: str | None,
    languages: Sequence[str],
) -> ModelCardData:
    datasets = list(dict.fromkeys(s.name for s in records.sources if s.is_dataset and s.is_hub_id))
    results = model_index(records.evaluation)
    more: dict[str, Any] = {}
    licence = licence or _common_licence(records, bases, licences)
    if licence is None:
        # the Hub wants a name with "other"
        licence = "other"
        more |= {"license_name": "licences-of-its-parts", "license_link": "README.md#licences"}
    if records.adapter:
        more["base_model_relation"] = "adapter"
    return ModelCardData(
        language=list(languages),
        license=licence,
        library_name="peft" if records.adapter else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=bases or None,
        datasets=datasets or None,
        tags=[*TAGS, *(["lora"] if records.adapter else [])],
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
        **more,
    )


def _common_licence(records: Records, bases: list[str], licences: Mapping[str, str]) -> str | None:
    """The licence of all base models, where every one is known and they agree."""
    local = [s for s in records.sources if not s.is_dataset and not s.is_hub_id and s.role != "starting model"]
    known = {licences.get(base) for base in bases}
    return known.pop() if bases and not local and len(known) == 1 else None


# ---- the text ----


def _values(
    records: Records,
    repo_id: str,
    base_models: Sequence[str],
    licences: Mapping[str, str],
    licence: str | None,
    tag: str | None,
) -> dict[str, Any]:
    """What the template shows."""
    config, stages = records.config, records.stages
    base = records.adapter.get("base_model_name_or_path") or ""
    # an adapter has no config of its own: the run's summary knows the most important
    mode = config.get("align_mode") or (stages[-1].get("align_mode") if stages else None) or "gate"
    if mode == "mean" and config.get("aligngpt_version") == "0.1.0":
        mode = "mean_of_all"  # as `AlignGPTConfig` reads it
    levels = config.get("num_align_levels") or (stages[-1].get("num_align_levels") if stages else None) or 8
    stage = config.get("training_stage") or (stages[-1]["stage"] if stages else None)
    question = "" if stage == "pretrain" else ', {"type": "text", "text": "What is in the picture?"}'
    comments = {"gate": "  # the gate weighs the levels", "level": "  # at the default level"}
    pin = "" if tag else "  # or a tag, or a commit"
    return {
        "title": repo_id.split("/")[-1],
        "intro": _intro(stage, records),
        "repo_id": repo_id,
        "revision": tag or "main",
        "pin_hint": pin,
        "is_adapter": bool(records.adapter),
        "base_model": base,
        "base_link": hub_link(base),
        "base_revision": records.adapter.get("revision"),
        "has_config": bool(config),
        "content": 'content = [{"type": "image", "image": "image.jpg"}' + question + "]",
        "mode_comment": comments.get(mode, ""),
        "num_align_levels": levels,
        "parts": _parts(records, base_models, mode, levels),
        "levels": list_levels(records.alignment),
        "levels_text": levels_text(records.alignment),
        "score_name": "score",
        "training": _training(stages),
        **results_table(records.evaluation),
        "limits": _limits(records, stage),
        "licence_text": _licence_text(licence),
        "licences": _licences(records, base_models, licences),
    }


def _intro(stage: str | None, records: Records) -> str:
    method = (
        f"AlignGPT ({PAPER}) is a vision-language model that learns how well each image and its text belong "
        "together, and mixes those levels of alignment to fit the question."
    )
    whats = {
        "pretrain": "This is a model after stage 1: projector and alignment levels are trained, the language model is "
        "as it was. It captions images; it is the start for stage 2.",
        "instruct": "This is a finished model: it answers questions about images.",
    }
    size = f" It has {_count(records.parameters)} parameters." if records.parameters and not records.adapter else ""
    return f"{method}\n{whats.get(stage, '')}{size}".rstrip()


def _parts(records: Records, base_models: Sequence[str], mode: str, levels: int) -> list[tuple[str, str]]:
    config, parts = records.config, []
    for source in records.sources:
        kind = "dataset" if source.is_dataset else "model"
        parts.append((source.role, hub_link(source.name, source.revision, kind == "dataset")))
    named = {source.name for source in records.sources}
    parts += [("base model", hub_link(name)) for name in base_models if name not in named]
    for name, key in (("language model", "text_config"), ("vision tower", "vision_config")):
        if part := config.get(key):
            parts.append((f"{name}, kind", _describe_part(part)))
    if config.get("image_seq_length"):
        parts.append(("positions of an image", str(config["image_seq_length"])))
    parts.append(("alignment levels", f"{levels} (0 to {levels - 1})"))
    parts.append(("alignment vector", f"`{mode}`: {MODES.get(mode, 'see config.json')}"))
    if config.get("gate_context") == "sequence":
        parts.append(("gate in training", "also read the answers, as the authors' code does"))
    elif config.get("gate_context") == "first_turn":
        parts.append(("gate reads", "what stands in front of the first answer, in training and in use"))
    if config.get("dtype"):
        parts.append(("weights", f"{config['dtype']}, safetensors"))
    return parts


def _describe_part(part: Mapping[str, Any]) -> str:
    text = f"{part.get('model_type', '?')}"
    if part.get("num_hidden_layers"):
        text += f", {part['num_hidden_layers']} layers of width {part.get('hidden_size')}"
    if part.get("image_size"):
        text += f", {part['image_size']} px in patches of {part.get('patch_size')}"
    return text


def list_levels(alignment: Mapping[str, Any]) -> list[dict[str, str]]:
    """The levels as rows of a table; empty where edges and counts do not fit together."""
    edges, counts = alignment.get("edges") or [], alignment.get("counts") or []
    if len(edges) != len(counts) + 1 or not counts:
        return []
    means, total = alignment.get("mean_scores") or [None] * len(counts), sum(counts) or 1
    bounds = [f"{edge:.4f}" for edge in edges]
    if alignment.get("method") in ("robust", "edges"):  # what lies outside is in the end levels
        bounds[0], bounds[-1] = "-∞", "∞"
    return [
        {
            "number": str(number),
            "low": bounds[number],
            "high": bounds[number + 1],
            "count": f"{count:,}",
            "share": f"{count / total:.1%}",
            "mean": "-" if means[number] is None else f"{means[number]:.4f}",
        }
        for number, count in enumerate(counts)
    ]


def levels_text(alignment: Mapping[str, Any], with_rows: bool = True) -> str:
    """How the levels came about, in a sentence or two."""
    if not alignment:
        return ""
    scorer = hub_link(alignment.get("scorer"), alignment.get("revision"))
    total = sum(alignment.get("counts") or [])
    quantiles = " and ".join(map(str, alignment.get("quantiles") or []))
    between = f": equal widths between the quantiles {quantiles}" if quantiles else ""
    text = (
        f"Each of {total:,} pairs of stage 1 has a score, the cosine similarity of image and caption under {scorer}; "
        f"the scores were cut into {alignment.get('num_align_levels', len(alignment.get('counts') or []))} levels "
        f"(`{alignment.get('method')}`{between})."
    )
    rows = alignment.get("rows")
    if with_rows and isinstance(rows, Mapping):
        text += " " + describe_rows(rows)
    return text


def describe_rows(rows: Mapping[str, Any]) -> str:
    """What became of the rows of a scoring, in a sentence."""
    read = rows.get("read")
    left_out = {
        name: count
        for name, count in rows.items()
        if isinstance(count, int) and count and name not in ("read", "scored", "written", "captions_cut")
    }
    named = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in left_out.items())
    fate = f"{sum(left_out.values()):,} were left out ({named})" if named else "none was left out"
    text = f"Of {read:,} rows read, {fate}." if read is not None else ""
    if rows.get("captions_cut"):
        text += f" {rows['captions_cut']:,} captions were longer than the scorer reads and were cut for scoring."
    return text.strip()


_TRAINING_KEYS = (
    ("train_rows", "rows"), ("train_rows_left_out", "rows left out"), ("train_rows_cut", "rows cut at the length"),
    ("epochs", "epochs"), ("steps", "steps"), ("batch_size", "batch size"), ("learning_rate", "learning rate"),
    ("max_length", "longest row (positions)"), ("image_aspect_ratio", "images"), ("seed", "seed"),
    ("trained_parameters", "trained parameters"), ("parameters", "parameters"), ("loss_first", "loss, first logged"),
    ("loss_last", "loss, last logged"), ("train_seconds", "seconds"), ("hardware", "hardware"),
    ("peak_memory", "peak memory"),
)  # fmt: skip


def _training(stages: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not stages:
        return None
    rows = [(title, [_show(key, stage.get(key)) for stage in stages]) for key, title in _TRAINING_KEYS]
    shown = {key for key, _ in _TRAINING_KEYS}
    shown |= {"num_train_epochs", "max_steps"}  # what came of them is shown
    details = []
    for part in ("hyperparameters", "versions"):
        names = dict.fromkeys(key for stage in stages for key in (stage.get(part) or {}) if key not in shown)
        details += [
            (name.replace("_", " "), [_show(name, (stage.get(part) or {}).get(name)) for stage in stages])
            for name in names
        ]
    told = [[row for row in table if any(value != "-" for value in row[1])] for table in (rows, details)]
    titles = [STAGES.get(stage["stage"], stage["stage"]) for stage in stages]
    return {"stages": titles, "rows": told[0], "details": told[1]}


def _show(key: str, value: Any) -> str:
    """A value as a table shows it."""
    if value is None or value == "" or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "peak_memory" and isinstance(value, (int, float)):
        return f"{value / 1e9:.2f} GB"
    if key == "hardware" and isinstance(value, Mapping) and value.get("name"):
        return f"{value.get('processes', 1)} x {value['name']} ({value.get('device')})"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_show(name, item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_show(key, item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}" if key != "seed" else str(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _limits(records: Records, stage: str | None) -> list[str]:
    limits = [
        "Its answers can be wrong or made up, also about things that are not in the picture. Nothing was done against "
        "harmful answers beyond what its parts bring along.",
    ]
    if stage == "pretrain":
        limits.append("It was not trained to follow instructions: what stands beside the image is not answered.")
    size = (records.config.get("vision_config") or {}).get("image_size")
    if size:
        limits.append(f"It sees images at {size} x {size} px: small print and far details are lost.")
    rows = [stage["train_rows"] for stage in records.stages if stage.get("train_rows")]
    if rows and max(rows) < 50_000:
        limits.append(
            f"It was trained on {' and '.join(f'{n:,}' for n in rows)} rows: expect nothing outside their kind."
        )
    if not records.evaluation.get("results"):
        limits.append("Its quality was not measured on public benchmarks.")
    if not records.stages:
        limits.append("Its training left no records in this repository.")
    limits.append(
        "Training and beam search over several images in one prompt need transformers 5; 4.57 loads and answers."
    )
    return limits


def _licence_text(licence: str | None) -> str:
    whole = f"The weights are published under `{licence}`. " if licence else ""
    return (
        whole + "Weights that were trained from others stay under those licences too; check them before you use this."
    )


def _licences(records: Records, base_models: Sequence[str], licences: Mapping[str, str]) -> list[tuple[str, str, str]]:
    rows = [("code (`*.py`)", "this repository", f"`{CODE_LICENCE}`")]
    named = {source.name for source in records.sources}
    sources = [*records.sources, *(Source("base model", name) for name in base_models if name not in named)]
    if records.adapter.get("base_model_name_or_path") and not sources:
        sources = [Source("base model", records.adapter["base_model_name_or_path"])]
    for source in sources:
        known = licences.get(source.name)
        text = f"`{known}`" if known else "see its page" if source.is_hub_id else "not recorded"
        rows.append((source.role, hub_link(source.name, None, source.is_dataset), text))
    return rows


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
