"""results.json of a quickstart -> one HTML file without scripts or outside resources."""

import base64
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from aligngpt_shared.files import write_file


RESULTS_NAME = "results.json"
REPORT_NAME = "report.html"
_WIDTH, _HEIGHT = 360, 200  # of a chart; as narrow as a phone, so that its text is never shrunk
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 12, 30


def write_report(folder: str | Path) -> Path:
    """Write `report.html` beside the `results.json` of a folder.

    Args:
        folder: the output of a quickstart; images are named in the results relative to it.

    Returns:
        The path of the report.

    Raises:
        ValueError: results or an image they name are missing.
    """
    folder = Path(folder)
    source = folder / RESULTS_NAME
    if not source.is_file():
        raise ValueError(f"{folder} holds no {RESULTS_NAME}: give the output folder of a quickstart")
    results = json.loads(source.read_text(encoding="utf-8"))
    return write_file(folder / REPORT_NAME, render_report(results, folder))


def render_report(results: dict[str, Any], folder: str | Path) -> str:
    """The report's HTML; `folder` is what image paths start from. Every text of the results is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.globals.update(
        image=lambda path: embed_image(Path(folder) / path),
        histogram=histogram,
        loss_curve=loss_curve,
        bars=gate_bars,
    )
    environment.filters.update(percent=lambda share: f"{100 * share:.0f}", fixed=lambda value, n=3: f"{value:.{n}f}")
    return environment.get_template("report.html.jinja").render(results)


def embed_image(path: Path) -> str:
    """A PNG file as a data URI."""
    if not path.is_file():
        raise ValueError(f"the results name the image {path.name}, which is missing from {path.parent}")
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# ---- charts: inline SVG, coloured by the page's style sheet ----


def _svg(label: str, body: Sequence[str], height: int = _HEIGHT):
    from markupsafe import Markup, escape

    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return Markup(head + "".join(body) + "</svg>")


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Round values from `low` to `high`, about `number` of them."""
    span = max(high - low, 1e-9)
    power = 10 ** math.floor(math.log10(span / number))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= number + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def _bar(x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}"/>'


class _Plane:
    """Maps data to the chart's coordinates and draws the axes."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x_range, self.y_range = x, y

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / max(high - low, 1e-9) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return _HEIGHT - _BOTTOM - (value - low) / max(high - low, 1e-9) * (_HEIGHT - _BOTTOM - _TOP)

    def axes(self, x_ticks: Sequence[float], x_name: str) -> list[str]:
        body = []
        for value in ticks(*self.y_range):
            body.append(_line(_LEFT, self.y(value), _WIDTH - _RIGHT, self.y(value), "grid"))
            body.append(_text(_LEFT - 5, self.y(value) + 4, f"{value:g}", "end"))
        body += [_text(self.x(value), _HEIGHT - _BOTTOM + 14, f"{value:g}") for value in x_ticks]
        return [*body, _text(_WIDTH - _RIGHT, _HEIGHT - 2, x_name, "end")]


def histogram(counts: Sequence[int], low: float, high: float, edges: Sequence[float]):
    """Bars of score counts in equal intervals from `low` to `high`, with the inner level edges as dashed lines."""
    plane = _Plane((low, high), (0, max([*counts, 1]) * 1.12))
    width = (high - low) / max(len(counts), 1)
    body = plane.axes(ticks(low, high, 6), "CLIP score")
    for index, count in enumerate(counts):
        left, right = plane.x(low + index * width), plane.x(low + (index + 1) * width)
        top = plane.y(count)
        body.append(_bar(left + 0.5, top, right - left - 1, _HEIGHT - _BOTTOM - top))
    for edge in edges[1:-1]:
        body.append(_line(plane.x(edge), _TOP, plane.x(edge), _HEIGHT - _BOTTOM, "edge"))
    for level, (start, end) in enumerate(pairwise(edges)):
        if plane.x(end) - plane.x(start) >= 10:
            body.append(_text(plane.x((start + end) / 2), _TOP + 2, str(level)))
    return _svg("Histogram of the CLIP scores with the edges of the levels", body)


def loss_curve(curve: Sequence[Sequence[float]], name: str):
    """Training loss over steps."""
    steps, losses = [point[0] for point in curve], [point[1] for point in curve]
    plane = _Plane((0, max([*steps, 1])), (0, max([*losses, 1e-3]) * 1.05))
    points = " ".join(f"{plane.x(step):.1f},{plane.y(loss):.1f}" for step, loss in zip(steps, losses, strict=True))
    body = [*plane.axes(ticks(0, max([*steps, 1]), 5), "step"), f'<polyline class="curve" points="{points}"/>']
    if curve:
        x, y = plane.x(steps[-1]), plane.y(losses[-1])
        body += [
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>',
            _text(x - 4, y - 8, f"{losses[-1]:.2f}", "end"),
        ]
    return _svg(f"Training loss of {name}", body)


def gate_bars(weights: Sequence[float], top: float):
    """The gate's weights of the local levels as bars from 0 to `top`; a dashed line marks an even mix."""
    height, floor = 84, 66
    step = (_WIDTH - 20) / max(len(weights), 1)
    scale = (floor - 16) / max(top, 1e-9)
    even = floor - scale / max(len(weights), 1)
    body = [_line(10, even, _WIDTH - 10, even, "edge")] if weights else []
    for level, weight in enumerate(weights):
        x, tall = 10 + level * step, weight * scale
        body.append(
            _bar(x + 3, floor - tall, step - 6, tall)
            + _text(x + step / 2, floor - tall - 4, f"{weight:.2f}")
            + _text(x + step / 2, height - 4, str(level))
        )
    return _svg("Gate weights of levels 0 to " + str(len(weights) - 1), body, height)
