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
from paramdiff.plots.export import checked, save
from paramdiff.plots.heat import heatmap
from paramdiff.plots.histograms import histogram
from paramdiff.plots.moments import adam
from paramdiff.plots.profiles import layers
from paramdiff.plots.spectra import spectrum
from paramdiff.plots.striped import stripes

__all__ = ["FIGURES", "adam", "checked", "heatmap", "histogram", "layers", "of", "save", "spectrum", "stripes"]

FIGURES: dict[str, Callable[..., Any]] = {
    "heatmap": heatmap, "layers": layers, "histogram": histogram, "spectrum": spectrum, "stripes": stripes, "adam": adam,
}  # fmt: skip


def of(kind: str) -> Callable[..., Any]:
    """The function that draws a kind of figure. Raises `OptionError` for one that is not known."""
    if kind not in FIGURES:
        raise OptionError(f"There is no figure {kind[:40]!r}.", hint=f"Draw one of {', '.join(FIGURES)}.")
    return FIGURES[kind]
