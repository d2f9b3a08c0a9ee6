"""Figures as files: an interactive page, or a picture for a paper."""

from __future__ import annotations

import hashlib
import re
from html import escape, unescape
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from paramdiff.errors import OptionError
from paramdiff.output import write_aside
from paramdiff.plots import style
from paramdiff.wording import shortened

WIDTHS = {"column": 340, "text": style.WIDTH}  # CSS pixels: 9 and 18 cm, the two widths of a paper
NARROW = 500  # below, the legend goes under the figure and fonts shrink
PICTURES = ("png", "svg", "pdf")
SHARPNESS = 3  # pixels of a PNG per CSS pixel: 288 to the inch


def checked(path: str | PathLike[str], width: str | int = "text") -> Path:
    """The path, if a figure can be written there at this width. Raises `OptionError` for another ending or width.

    >>> checked("heat.svg").suffix
    '.svg'
    """
    target = Path(fspath(path))
    if target.suffix.lower() not in (".html", *(f".{kind}" for kind in PICTURES)):
        raise OptionError(f"{target.name}: a figure is written as .html, .png, .svg or .pdf.", hint="Name it so.")
    text = str(width)
    if text not in WIDTHS and not (text.isdecimal() and len(text) < 6 and 100 <= int(text) <= 10_000):
        raise OptionError(f"{text[:40]!r} is no width.", hint="Give column, text, or 100 to 10000 pixels.")
    return target


def save(fig: go.Figure, path: str | PathLike[str], width: str | int = "text") -> None:
    """Write a figure as .html (one page with everything in it, which works offline), .png, .svg or .pdf.

    Args:
        width: of a picture: "column" (9 cm), "text" (18 cm) or CSS pixels, of which there are 96 to the inch. Fonts keep
            their size; the legend moves below a narrow figure.

    Raises:
        OptionError: for another ending or width, or where kaleido or the browser that it draws with is missing.
        OutputError: the file cannot be written. What was there before then stays.

    >>> from paramdiff import compare, plots
    >>> fig = plots.heatmap(compare("sample_data/base", "sample_data/rl-sgd"))
    >>> plots.save(fig, "out/heat.html")
    """
    target = checked(path, width)
    kind = target.suffix.lower().lstrip(".")
    pixels = WIDTHS[str(width)] if str(width) in WIDTHS else int(width)
    write_aside(target, page(fig).encode("utf-8", "replace") if kind == "html" else picture(fig, kind, pixels))


def page(fig: go.Figure) -> str:
    """One HTML page with the figure, its text alternative and plotly.js."""
    shown = sized(fig, None)
    alt = escape(str(fig.layout.meta["alt"]))
    body = shown.to_html(include_plotlyjs=True, full_html=False, config=CONFIG, div_id="figure")
    title = escape(unescape(str(fig.layout.title.text)), quote=False)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"></head>\n<body style="margin:1rem;font-family:{style.FONT}">\n'
        f'<figure style="margin:0" role="group" aria-label="{alt}">{body}<figcaption>{alt}</figcaption></figure>\n'
        "</body></html>\n"
    )


CONFIG: dict[str, Any] = {
    "displaylogo": False, "responsive": True, "toImageButtonOptions": {"format": "svg"},
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}  # fmt: skip


def sized(fig: go.Figure, width: int | None) -> go.Figure:
    """A copy of the figure for a width in CSS pixels; None: as wide as the page."""
    copy = go.Figure(fig)
    if width is None:
        return copy
    copy.update_layout(width=width)
    if width < NARROW:
        named = [trace for trace in copy.data if trace.name and trace.showlegend is not False]
        for trace in named:
            trace.name = shortened(str(trace.name), 16)
        text = 4.6 * max((len(trace.name) for trace in named), default=0)  # pixels, of letters in a small font
        rows = -(-len(named) // max(1, int((width - 70) // (40 + text)))) if len(named) > 1 else 0
        below = 42 + 19 * rows
        plotted = min(fig.layout.height - 100, 230) if rows else fig.layout.height - 100
        copy.update_layout(
            font={"size": 9}, title={"text": _wrapped(str(fig.layout.title.text)), "font": {"size": 10}},
            margin={"l": 40, "r": 8, "t": 48, "b": below}, height=48 + plotted + below,
            legend={
                "orientation": "h", "font": {"size": 8}, "yref": "container", "y": 0, "yanchor": "bottom", "x": 0,
                "xref": "container", "xanchor": "left", "entrywidth": text, "entrywidthmode": "pixels",
            },
        )  # fmt: skip
    return copy


def _wrapped(title: str) -> str:
    """A title on two lines: what is shown, and of what.

    >>> _wrapped("Mean |Δ|, by layer: base → sft")
    'Mean |Δ|, by layer<br>base → sft'
    """
    return title.replace(": ", "<br>", 1)


def _named_by_content(svg: bytes) -> bytes:
    """The same SVG each time: plotly puts random numbers into its ids, which have to differ between figures on one page."""
    for number, trace in enumerate(dict.fromkeys(re.findall(rb"\btrace([0-9a-f]{6})\b", svg))):
        svg = svg.replace(b"trace" + trace, b"trace%06x" % number)
    found = re.search(rb'id="defs-([0-9a-f]{6})"', svg)
    if found is None:
        return svg
    without = svg.replace(found[1], b"")
    return svg.replace(found[1], hashlib.sha256(without).hexdigest()[:6].encode())


def picture(fig: go.Figure, kind: str, pixels: int) -> bytes:
    """A figure as a PNG, SVG or PDF. Raises `OptionError` where that cannot be drawn here."""
    try:
        import kaleido  # noqa: F401 - only to say so where it is missing
    except ImportError:
        raise OptionError("Pictures need kaleido.", hint="pip install 'paramdiff[images]', or write .html.") from None
    shown = sized(fig, pixels)
    try:
        scale = SHARPNESS if kind == "png" else 1
        drawn = bytes(shown.to_image(format=kind, width=pixels, height=shown.layout.height, scale=scale))
        return _named_by_content(drawn) if kind == "svg" else drawn
    except Exception as error:
        missing = type(error).__name__ in ("ChromeNotFoundError", "BrowserFailedError", "BrowserClosedError")
        if not missing and not (isinstance(error, RuntimeError) and "Chrome" in str(error)):
            raise
        raise OptionError(
            "kaleido found no Chrome or Chromium that it can draw with.",
            hint="Install one (apt install chromium, or BROWSER_PATH says where it is), or write .html.",
        ) from error
