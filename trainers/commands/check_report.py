"""Text of what `aligngpt check` found."""

from typing import Any

from ..memory import describe_bytes


BAR = 40  # characters of a histogram's longest bar
LINE = 1000  # characters of an example that are shown


def _share(part: float, whole: float) -> str:
    if not whole:
        return "-"
    share = part / whole
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def _tokens(facts: dict[str, Any]) -> list[str]:
    limit = "no limit" if facts["max_length"] is None else f"max_length {facts['max_length']}"
    percentiles = ", ".join(
        f"{name[1:]}% up to {facts[name]}" for name in facts if name[0] == "p" and name[1:].isdigit()
    )
    images = f"{facts['rows_without_image']:,} without an image, at most {facts['most_images']} in a row"
    return [
        f"rows       {facts['rows']:,}; {images}",
        f"tokens     {facts['tokens']:,}; a row {facts['mean']:.1f}, {percentiles}, "
        f"longest {facts['longest']} ({limit})",
        f"           {_share(facts['image_tokens'], facts['tokens'])} of them of images, "
        f"{_share(facts['supervised'], facts['tokens'])} supervised",
    ]


def _batches(batches: list[dict[str, Any]]) -> list[str]:
    positions, padding = (sum(batch[name] for batch in batches) for name in ("positions", "padding"))
    shapes = ", ".join(f"{batch['rows']} x {batch['length']}" for batch in batches)
    return [f"batches    first {len(batches)}: {shapes}; {_share(padding, positions)} padding"]


def _images(facts: dict[str, Any]) -> list[str]:
    lines = [f"images   {facts['decoded']:,} decoded, of {facts['rows']:,} rows; {facts['unreadable']:,} unreadable"]
    if facts["decoded"]:
        lines[0] += (
            f"; shorter side {facts['shortest_side']} px at least, {facts['median_shortest_side']} px in the middle, "
            f"longer side {facts['longest_side']} px at most"
        )
    return lines


def _levels(counts: list[int]) -> list[str]:
    most = max(counts) or 1
    lines = [f"{level:>4}  {count:>9,}  {'#' * round(BAR * count / most)}" for level, count in enumerate(counts)]
    return ["levels     rows of each, 0 (loose) to the top (exact)", *lines]


def _parameters(parts: dict[str, dict[str, int]]) -> list[str]:
    trained, everything = (sum(part[name] for part in parts.values()) for name in ("trained", "all"))
    lines = [f"parameters {trained:,} of {everything:,} train ({_share(trained, everything)})"]
    width = max(map(len, parts))
    return lines + [f"  {name:<{width}}  {part['trained']:>15,} of {part['all']:>15,}" for name, part in parts.items()]


def _memory(memory: dict[str, Any]) -> list[str]:
    parts = {name: value for name, value in memory.items() if name not in ("rows", "length") and value is not None}
    without = "" if "activations" in parts else ", without activations"
    return [
        f"memory     {describe_bytes(sum(parts.values()))} on one device, for {memory['rows']} rows x "
        f"{memory['length']} tokens{without}",
        f"           {', '.join(f'{name} {describe_bytes(value)}' for name, value in parts.items())}",
    ]


def _steps(steps: dict[str, Any]) -> list[str]:
    epochs = "" if steps["epochs"] is None else f" ({steps['epochs']:.2g} epochs)"
    devices = "" if steps["num_devices"] == 1 else f" on {steps['num_devices']} devices"
    return [f"steps      {steps['steps']:,} of {steps['rows_per_update']} rows{devices}{epochs}"]


def _example(example: dict[str, str]) -> list[str]:
    text = example["text"]
    text = text if len(text) <= LINE else f"{text[:LINE]} ... ({len(text) - LINE} more characters)"
    return [f"example    {example['name']}; [[supervised]]", *(f"  | {line}" for line in text.split("\n"))]


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def describe_check(report: dict[str, Any]) -> str:
    """The lines that `aligngpt check` prints; `report` is what it also writes as JSON."""
    lines = [f"aligngpt check: {report['stage']} of {report['model']} on {report['dataset']}", ""]
    writers = (
        ("tokens", _tokens),
        ("batches", _batches),
        ("images", _images),
        ("levels", _levels),
        ("parameters", _parameters),
        ("steps", _steps),
        ("memory", _memory),
        ("example", _example),
    )
    if report.get("layout"):
        lines.append(f"layout     {report['layout']}")
    for name, write in writers:
        if report.get(name):
            lines += write(report[name])
    if report.get("first_loss") is not None:
        lines.append(f"loss       {report['first_loss']:.4f} of the first batch, before any step")
    if report.get("step_seconds") is not None and report.get("steps"):
        seconds, steps = report["step_seconds"], report["steps"]["steps"]
        lines.append(
            f"time       about {_duration(seconds * steps)} on such devices: {steps:,} steps of {seconds:.2g} s, "
            "guessed from a forward pass; reading, evaluation and saves aside"
        )
    lines.append("")
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    lines += [f"PROBLEM: {problem}" for problem in report["problems"]]
    count = len(report["problems"])
    lines.append(
        f"{count} problem{'s' * (count != 1)} would stop training." if count else "Nothing found that stops training."
    )
    return "\n".join(lines)
