"""One look for all figures: colours, fonts, axes, and text that a file's names cannot break.

Colours are safe for colour-blind readers: Paul Tol's "muted" set for lines, cividis for amounts, purple to orange for signed
quantities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from paramdiff.plots.canvas import Canvas
from paramdiff.wording import printable, shortened

INK, NOTHING = "#222222", "#c9c9c9"
COLOURS = ("#332288", "#cc6677", "#117733", "#ddaa33", "#88ccee", "#882255", "#44aa99", "#999933", "#aa4499", "#555555")
DASHES = ("solid", "dash", "dot", "dashdot")
SEQUENTIAL, SIGNED = "Cividis", "PuOr"
SMALLEST, LARGEST = 1e-307, 1e307  # what axes reach to
WIDTH, HEIGHT = 680, 380  # CSS pixels: the text width of a page, at 96 to the inch 18 cm
FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
MARGIN = {"l": 60, "r": 20, "t": 48, "b": 50}  # pixels
_AXIS = {
    "showline": True, "linecolor": INK, "linewidth": 1, "ticks": "outside", "tickcolor": INK, "ticklen": 4,
    "gridcolor": "#ececec", "zeroline": False, "automargin": True, "title": {"standoff": 8},
}  # fmt: skip
TEMPLATE: dict[str, Any] = {
    "font": {"family": FONT, "size": 11, "color": INK},
    "title": {"font": {"size": 13}, "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 8}},
    "paper_bgcolor": "white", "plot_bgcolor": "white", "colorway": COLOURS,
    "xaxis": _AXIS, "yaxis": _AXIS,
    "legend": {"font": {"size": 10}, "tracegroupgap": 2},
    "hoverlabel": {"align": "left", "font": {"family": FONT, "size": 11}},
    "margin": MARGIN,
}  # fmt: skip


def figure(title: str, alt: str, *, height: int = HEIGHT) -> Canvas:
    """An empty figure in the one style. `alt` says in words what it shows; it is kept in `layout.meta["alt"]`."""
    return Canvas({"title": {"text": title}, "height": height, "meta": {"alt": alt}})


def safe(text: str, longest: int = 60) -> str:
    """Text of a file or a user for a figure: plotly reads some tags in it, and newlines; names may be of any length.

    >>> safe("<b>q_proj</b>")
    '&lt;b&gt;q_proj&lt;/b&gt;'
    """
    found = escape(shortened(printable(text), longest), quote=False)
    # plotly fills in %{…} in some texts, and hands $…$ to MathJax where there is one; as entities they are just characters
    return found.replace("%{", "&#37;{").replace("$", "&#36;")


def plain(text: str, longest: int = 40) -> str:
    """The same for a text alternative, in which no tags are read."""
    return shortened(printable(text), longest)


def line(number: int) -> dict[str, Any]:
    """Colour and dash of the `number`-th line."""
    return {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number // len(COLOURS) % len(DASHES)], "width": 1.6}


def shade(number: int, of: int) -> str:
    """The `number`-th of so many colours in an order: along cividis, without its palest end."""
    from plotly.colors import sample_colorscale

    sampled = sample_colorscale(SEQUENTIAL, [0.9 * number / max(1, of - 1)], colortype="tuple")[0]
    return "#" + "".join(f"{round(255 * part):02x}" for part in sampled)


def faded(colour: str, opacity: float = 0.15) -> str:
    """A #rrggbb colour, seen through."""
    return f"rgba({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:7], 16)}, {opacity})"


def decades(low: float, high: float, *, share: bool = False, most: int = 9) -> tuple[list[float], list[str]]:
    """Ticks of a log axis between two positive values: their log10 and their labels, at most `most`.

    >>> decades(0.0002, 0.3, share=True)
    ([-3.0, -2.0, -1.0], ['0.1 %', '1 %', '10 %'])
    >>> decades(0.1, 0.3)[1]
    ['0.1', '0.2', '0.3']
    """
    low, high = max(low, SMALLEST), min(high, LARGEST)
    first, last = math.log10(low), math.log10(high)
    powers = range(max(-307, math.floor(first)), min(307, math.ceil(last)) + 1)
    if last - first < 2.2:  # too few powers of ten to read values by
        steps = (1, 3) if most < 6 else range(1, 10) if last - first < 0.8 else (1, 2, 5)
        values = [step * 10.0**power for power in powers for step in steps]
    else:
        every = math.ceil(len(powers) / most)
        values = [10.0**power for power in powers if power % every == 0]
    values = [value for value in values if low * 0.999 <= value <= high * 1.001] or [low, high]
    return [math.log10(value) for value in values], [tick(value, share=share) for value in values]


def tick(value: float, *, share: bool = False) -> str:
    """A value as a label.

    >>> tick(1e-05), tick(0.25), tick(1e-05, share=True), tick(1e-7, share=True)
    ('1e-5', '0.25', '0.001 %', '1e-5 %')
    """
    amount = value * 100 if share else value
    text = f"{amount:.3g}"
    if "e" not in text and 0 < abs(amount) < 1e-3:
        text = f"{amount:.2e}"
    if "e" in text:
        digits, power = text.split("e")
        digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
        text = f"{digits}e{int(power)}"
    return f"{text} %" if share else text


def log_axis(values: Sequence[float], *, share: bool = False, margin: float = 1.25, most: int = 9) -> dict[str, Any]:
    """A log axis over positive values, with the same labels as colour bars have."""
    low, high = max(min(values) / margin, SMALLEST), min(max(values) * margin, LARGEST)
    if share:
        high = min(high, 1.04)  # there is nothing beyond 100 %
    at, text = decades(low, high, share=share, most=most)
    return {
        "type": "log", "tickvals": [10.0**power for power in at], "ticktext": text,
        "range": [math.log10(low), math.log10(high)],
    }  # fmt: skip


def sentence(label: str) -> str:
    """A label as the beginning of a title; names of columns and symbols stay as they are.

    >>> sentence("mean |Δ|"), sentence("σ₁ of Δ"), sentence("my_column"), sentence("cos(m, g)")
    ('Mean |Δ|', 'σ₁ of Δ', 'my_column', 'cos(m, g)')
    """
    word = label.split(" ")[0]
    return label[0].upper() + label[1:] if word.isascii() and word.isalpha() and word != label else label
