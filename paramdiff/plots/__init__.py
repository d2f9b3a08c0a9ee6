"""Figures of what was measured: functions from results to plotly figures, which read no files.

Each takes one result or several (a list, or a mapping from labels), and returns a `plotly.graph_objects.Figure` in the one
style of `plots.style`; `layout.meta["alt"]` says in words what it shows.

>>> from paramdiff import compare, plots
>>> fig = plots.heatmap(compare("sample_data/base", "sample_data/rl-sgd"))
>>> fig.layout.title.text
'Share of parameters changed, by layer and module: base → rl-sgd'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paramdiff.errors import OptionError
from paramdiff.plots import heat, histograms, moments, profiles, spectra, striped, style
from paramdiff.plots.canvas import as_figure
from paramdiff.plots.export import checked, save

__all__ = ["FIGURES", "adam", "blank", "checked", "heatmap", "histogram", "layers", "of", "save", "spectrum", "stripes"]

heatmap = as_figure(heat.heatmap)
layers = as_figure(profiles.layers)
histogram = as_figure(histograms.histogram)
spectrum = as_figure(spectra.spectrum)
stripes = as_figure(striped.stripes)
adam = as_figure(moments.adam)
blank = as_figure(style.figure)  # for figures of one's own

FIGURES: dict[str, Callable[..., Any]] = {
    "heatmap": heatmap, "layers": layers, "histogram": histogram, "spectrum": spectrum, "stripes": stripes, "adam": adam,
}  # fmt: skip


def of(kind: str) -> Callable[..., Any]:
    """The function that draws a kind of figure. Raises `OptionError` for one that is not known."""
    if kind not in FIGURES:
        raise OptionError(f"There is no figure {kind[:40]!r}.", hint=f"Draw one of {', '.join(FIGURES)}.")
    return FIGURES[kind]
