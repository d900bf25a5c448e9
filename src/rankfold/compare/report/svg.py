"""matplotlib figures as inline SVG: colours that follow the page's scheme, ids of their own, text that stays text."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What stands for a variable of the page while matplotlib draws; style.css gives each its light and its dark value.
INK, MUTED, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
#: As many as there are marker shapes but one, so that colour and shape together repeat only after 72 contenders.
SERIES = tuple(f"#0500{i:02x}" for i in range(8))
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES)
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*")
#: Units of a picture's width: CSS pixels on a phone of 390, where pictures are not scaled.
WIDTH, FONT = 358, 15


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure of so many CSS pixels, whose axes the caller adds."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), layout="constrained", facecolor="none")


def colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def size(index: int, usual: float = 10) -> float:
    """The marker size at which a shape looks as large as a circle of `usual`."""
    return usual * {"D": 0.8, "s": 0.9, "*": 1.35, "p": 1.1, "P": 1.1, "v": 1.05, "^": 1.05}.get(marker(index), 1.0)


def inline(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an <svg> to paste into a page.

    Args:
        name: unlike that of any other picture of the page; begins every id.
        title, description: what a screen reader reads out.
    """
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href=")#', rf"\1#{name}-", text).replace("xlink:href=", "href=")
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    for sentinel, variable in VARIABLES.items():
        text = text.replace(sentinel, f"var({variable})")
    # The page's font; it is narrower than the one matplotlib measured with, so nothing grows
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    width = float(box[1].split()[2])
    head = (
        f'<svg class="figure" style="--width: {width:.0f}px" viewBox="{box[1]}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return head + text[text.index(">") + 1 :].strip()


def badge(index: int) -> str:
    """A contender's marker for a legend or a table, the same shape and colour as in the pictures."""
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(marker(index))
    outline = style.get_path().transformed(style.get_transform()).to_polygons()[0]
    scale = 1.3 * size(index)
    points = " ".join(
        f"{10 + scale * float(x):.1f},{10 - scale * float(y):.1f}" for x, y in zip(*np.transpose(outline), strict=True)
    )
    return (
        f'<svg class="badge" viewBox="0 0 20 20" aria-hidden="true">'
        f'<polygon points="{points}" style="fill: var(--series-{index % len(SERIES)})"/></svg>'
    )
