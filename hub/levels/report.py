"""`levels.json` -> one HTML file without scripts or outside resources."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aligngpt_shared.files import write_file

from .statistics import verdict


_WIDTH, _HEIGHT = 360, 190  # as narrow as a phone, so that text is never shrunk
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 32


def write_report(path: Path, results: dict[str, Any], images: Sequence = ()):
    """Writes the page; `images` belong to the examples of the captions."""
    import jinja2

    results = {**dict.fromkeys(("gates", "steering")), **results}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.globals.update(trend_chart=trend_chart, gate_chart=gate_chart, verdict=verdict)
    environment.filters.update(fixed=lambda value, n=3: f"{value:.{n}f}", percent=lambda value: f"{value:.1%}")
    html = environment.get_template("levels.html.jinja").render(**results, shown=[embed(each) for each in images])
    write_file(path, html)


def embed(image) -> str:
    """A small PNG as a data URI."""
    small = image.copy()
    small.thumbnail((192, 192))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(label: str, body: Sequence[str], height: int = _HEIGHT):
    from markupsafe import Markup, escape

    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return Markup(head + "".join(body) + "</svg>")


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def trend_chart(measure: dict[str, Any]):
    """Mean of a measure at each level, with a band of one standard error to both sides."""
    means, errors = measure["mean"], measure["error"]
    low = min(mean - error for mean, error in zip(means, errors, strict=True))
    high = max(mean + error for mean, error in zip(means, errors, strict=True))
    margin = (high - low) * 0.08 or 0.5
    low, high = low - margin, high + margin

    def place(level: int, value: float) -> tuple[float, float]:
        x = _LEFT + level * (_WIDTH - _LEFT - _RIGHT) / max(len(means) - 1, 1)
        return x, _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    body = []
    for value in (low + margin, (low + high) / 2, high - margin):
        _, y = place(0, value)
        body.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        body.append(_text(_LEFT - 5, y + 4, f"{value:.3g}", "end"))
    upper = [place(level, mean + error) for level, (mean, error) in enumerate(zip(means, errors, strict=True))]
    lower = [place(level, mean - error) for level, (mean, error) in enumerate(zip(means, errors, strict=True))]
    points = [place(level, mean) for level, mean in enumerate(means)]
    body.append(f'<polygon class="band" points="{_points([*upper, *reversed(lower)])}"/>')
    body.append(f'<polyline class="curve" points="{_points(points)}"/>')
    for level, (x, y) in enumerate(points):
        body.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        body.append(_text(x, _HEIGHT - _BOTTOM + 15, str(level)))
    body.append(_text(_WIDTH - _RIGHT, _HEIGHT - 3, "level", "end"))
    return _svg(f"{measure['name']} by level: " + ", ".join(f"{mean:.3g}" for mean in means), body)


def gate_chart(group: dict[str, Any], top: float):
    """Mean gate weights of the local levels as bars, with lines of one standard deviation; dashed: an even mix."""
    means, spreads = group["mean"], group["spread"]
    height, floor = 130, 104
    step = (_WIDTH - 20) / max(len(means), 1)
    scale = (floor - 20) / max(top, 1e-9)
    even = floor - scale / max(len(means), 1)
    body = [f'<line class="even" x1="10" y1="{even:.1f}" x2="{_WIDTH - 10}" y2="{even:.1f}"/>']
    for level, (mean, spread) in enumerate(zip(means, spreads, strict=True)):
        x, tall = 10 + level * step, mean * scale
        middle = x + step / 2
        body.append(
            f'<rect class="bar" x="{x + 4:.1f}" y="{floor - tall:.1f}" width="{step - 8:.1f}" height="{tall:.1f}"/>'
        )
        ends = [floor - scale * max(mean - spread, 0), floor - scale * min(mean + spread, top)]
        body.append(f'<line class="spread" x1="{middle:.1f}" y1="{ends[0]:.1f}" x2="{middle:.1f}" y2="{ends[1]:.1f}"/>')
        body.append(_text(middle, height - 13, f"{mean:.2f}"))
        body.append(_text(middle, height - 1, str(level)))
    shown = ", ".join(f"{mean:.2f}" for mean in means)
    return _svg(f"Gate weights of {group['name']}, levels 0 to {len(means) - 1}: {shown}", body, height)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
