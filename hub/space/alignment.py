"""Images of the alignment: bars of what each level contributes, and a heat map of patches over the image."""

import base64
import io
from html import escape

from answers import Alignment
from images import Box
from PIL import Image


MAP_SIDE = 640
"""Longest side, in pixels, of the image under the heat map."""
LARGEST_TABLE = 12
"""Grids up to this many rows are also given as a table of numbers."""

LIMIT = 0.3
"""The map's scale ends at this similarity, to both sides; images and prompts of trained models stay within."""
# violet, nothing, orange: told apart without colour vision too
_BELOW, _ZERO, _ABOVE = (84, 39, 136), (247, 247, 247), (230, 97, 1)

NO_QUESTION = '<p class="hint">Ask a question: here stands what each alignment level contributes to its answer.</p>'
NO_MAP = '<p class="hint">Ask a question: here stands how similar each part of the image is to it.</p>'


def bars_html(lanes: list[tuple[str, Alignment]]) -> str:
    """
    One table of bars for each answer, read out as a table by screen readers.

    Args:
        lanes: what decided the levels ("Gate", "Level 3"), and the alignment.
    """
    return '<div class="lanes">' + "".join(_bars(title, alignment) for title, alignment in lanes) + "</div>"


def _bars(title: str, alignment: Alignment) -> str:
    top = len(alignment.shares) - 1
    gates = bool(alignment.gate) and _is_mix(alignment)
    rows = []
    for level, share in enumerate(alignment.shares):
        is_top = level == top
        bar = f'<span class="bar{" top" if is_top else ""}" style="width:{min(max(share, 0), 1):.1%}"></span>'
        if alignment.gate and not gates and not is_top:
            bar += f'<span class="ghost" style="width:{alignment.gate[level]:.1%}"></span>'
        name = f"{level}" + (" (loosest)" if level == 0 else " (closest)" if is_top else "")
        rows.append(
            f'<tr class="{"some" if share >= 0.005 else "none"}">'
            f'<th scope="row"><span class="sr">Level </span>{name}</th>'
            f'<td class="track" aria-hidden="true">{bar}</td><td class="share">{share:.2f}</td></tr>'
        )
    return (
        f'<div class="lane"><table class="bars levels"><caption>{escape(title)}</caption>'
        '<thead class="sr"><tr><th scope="col">Level</th><th scope="col">Bar</th><th scope="col">Weight</th></tr>'
        "</thead>"
        f"<tbody>{''.join(rows)}</tbody></table>{_note(alignment, gates)}</div>"
    )


def _is_mix(alignment: Alignment) -> bool:
    return all(abs(share - weight) < 1e-3 for share, weight in zip(alignment.shares, alignment.gate, strict=False))


def _note(alignment: Alignment, gates: bool) -> str:
    top = len(alignment.shares) - 1
    if not alignment.gate:
        return ""
    if gates:
        text = f"Weights of the levels' vectors, whose sum the model reads. Those of 0 to {top - 1} add up to 1" + (
            f" (the gate); level {top} is always added with 1." if alignment.shares[top] else " (the gate)."
        )
    else:
        best = max(range(top), key=alignment.gate.__getitem__)
        text = f"Thin bars: what the gate would have mixed, most of level {best} ({alignment.gate[best]:.2f})."
    return f'<p class="hint">{text}</p>'


def map_html(image: Image.Image, similarity: list[list[float]], box: Box) -> str:
    """
    The image with each patch coloured by its cosine similarity with the prompt, as inline SVG.

    Args:
        image: as it was uploaded, upright.
        similarity: rows of patches, -1 to 1.
        box: where the patches lie on the image; what is outside the image is not drawn.
    """
    if not similarity:
        return '<p class="hint">This model\'s vision tower has no grid of patches to draw.</p>'
    width, height = image.size
    patches = _visible(similarity, box, width, height)
    cells = "".join(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{_colour(value)}">'
        f"<title>{value:+.3f}</title></rect>"
        for value, (x, y, w, h) in patches.values()
    )
    description = _description(similarity, patches)
    return (
        f'<figure class="map"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
        f'<image href="{_data_url(image)}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f'<g class="patches">{cells}</g></svg>'
        f'<figcaption><span>&minus;{LIMIT}</span><span class="scale" aria-hidden="true"></span><span>+{LIMIT}</span>'
        "<span class=\"what\">similarity (cosine) of each patch's token and the prompt's mean embedding, zero in the "
        f"middle. Not where the answer comes from.</span></figcaption>{_numbers(similarity)}</figure>"
    )


Patches = dict[tuple[int, int], tuple[float, tuple[float, float, float, float]]]


def _visible(similarity: list[list[float]], box: Box, width: int, height: int) -> Patches:
    """Row and column of each patch that shows some of the image -> its value, and where (x, y, width, height)."""
    across, down = box.width / len(similarity[0]), box.height / len(similarity)
    patches = {}
    for row, values in enumerate(similarity):
        top, bottom = max(box.top + row * down, 0), min(box.top + (row + 1) * down, height)
        for column, value in enumerate(values):
            left, right = max(box.left + column * across, 0), min(box.left + (column + 1) * across, width)
            # less than a thousandth of a patch is rounding
            if right - left > across / 1000 and bottom - top > down / 1000:
                patches[row, column] = value, (left, top, right - left, bottom - top)
    return patches


def _colour(value: float) -> str:
    share = min(abs(value) / LIMIT, 1)
    end = _ABOVE if value > 0 else _BELOW
    mixed = (round(a + (b - a) * share) for a, b in zip(_ZERO, end, strict=True))
    return f"rgb({','.join(map(str, mixed))})"


def _description(similarity: list[list[float]], patches: Patches) -> str:
    most, least = (pick(patches, key=lambda place: patches[place][0]) for pick in (max, min))

    def say(place: tuple[int, int]) -> str:
        return f"row {place[0] + 1}, column {place[1] + 1} ({patches[place][0]:+.3f})"

    return (
        f"Heat map of {len(similarity)} by {len(similarity[0])} patches over the image. "
        f"Most similar to the prompt is {say(most)}, least {say(least)}."
    )


def _numbers(similarity: list[list[float]]) -> str:
    if len(similarity) > LARGEST_TABLE:
        return ""
    rows = "".join("<tr>" + "".join(f"<td>{value:+.3f}</td>" for value in values) + "</tr>" for values in similarity)
    return f'<details><summary>The values as a table</summary><table class="values">{rows}</table></details>'


def _data_url(image: Image.Image) -> str:
    # without its colours, so that those of the map can be read
    small = image.convert("L")
    small.thumbnail((MAP_SIDE, MAP_SIDE))
    stream = io.BytesIO()
    small.save(stream, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
