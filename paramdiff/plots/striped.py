"""Stripes: the changed share of each row and column, layer by layer (arXiv 2511.08567 saw updates concentrate in a few)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from paramdiff.diff import Diff
from paramdiff.errors import OptionError
from paramdiff.plots import runs, style
from paramdiff.plots.canvas import Canvas
from paramdiff.wording import percent

BINS = 192  # rows or columns beyond are drawn several to a cell
AXES = ("rows", "cols")
Profile = tuple[NDArray[np.float64], int]  # changed share of each cell, and how many rows there are


def stripes(result: Diff, module: str | None = None) -> Canvas:
    """The changed share of the rows (left) and columns (right) of one module's matrices, a line of cells for each layer.

    By default the module inside layers whose changes are most unevenly spread. Long axes are drawn several
    rows to a cell, experts of a layer together; shares are on a log scale, rows without a change grey.

    Raises `OptionError` where "rows" was not measured, or the module has no matrices.

    >>> from paramdiff import compare, plots
    >>> fig = plots.stripes(compare("sample_data/base", "sample_data/rl-sgd"), "q_proj")
    >>> fig.layout.title.text
    'Changed share of rows and columns of q_proj: base → rl-sgd'
    """
    found = runs.diffs(result)
    if len(found) > 1:
        raise OptionError(f"Stripes are drawn of one comparison, not of {len(found)}.", hint="Give one.")
    diff, subject = next(iter(found.values())), runs.subject(found)
    if "rows" not in diff.tables:
        raise OptionError("This comparison has no counts by row.", hint='Compare with measures=["change", "rows"].')
    known = striped_modules(diff)
    if not known:
        raise OptionError("There is no matrix to draw stripes of.")
    module = module or known[0]
    if module not in known:
        raise OptionError(f"There is no matrix of {module!r} here.", hint=f"Modules with matrices: {', '.join(known[:20])}.")
    return draw({axis: profiles(diff, module, axis) for axis in AXES}, module, subject)


def striped_modules(diff: Diff) -> list[str]:
    """Modules that have matrices: those inside layers first, of these the ones with the most unevenly spread changes."""
    uneven = pl.max_horizontal("top1pct_rows_share", "top1pct_cols_share")
    matrices = diff.counted.filter(pl.col("rows").is_not_null() & (pl.col("numel") > 0))
    found = matrices.group_by("module", maintain_order=True).agg(
        uneven.mean().fill_null(0).alias("uneven"), pl.col("layer").is_not_null().any().alias("inside")
    )
    return found.sort("inside", "uneven", descending=True, maintain_order=True)["module"].to_list()


def profiles(diff: Diff, module: str, axis: str) -> dict[int | None, Profile]:
    """For each layer the changed share along one axis, in at most `BINS` cells: all of its tensors added up."""
    own = diff.counted.filter((pl.col("module") == module) & (pl.col("numel") > 0))
    table = diff.tables["rows"].filter(pl.col("axis") == axis)
    found: dict[int | None, list[dict[str, Any]]] = {}
    for row in own.select("name", "layer").join(table, on="name", maintain_order="left").iter_rows(named=True):
        found.setdefault(row["layer"], []).append(row)
    return {
        layer: _profile(rows) for layer, rows in sorted(found.items(), key=lambda item: (item[0] is not None, item[0] or 0))
    }


def _profile(rows: list[dict[str, Any]]) -> Profile:
    length = max(row["length"] for row in rows)
    cells = min(BINS, length)
    changed, elements = np.zeros(cells), np.zeros(cells)
    for row in rows:
        place = np.arange(row["length"]) * cells // max(1, row["length"])
        changed += np.bincount(place, weights=np.asarray(row["changed"], dtype=np.float64), minlength=cells)
        elements += np.bincount(place, minlength=cells) * row["across"]
    return changed / np.maximum(elements, 1), length


def draw(found: dict[str, dict[int | None, Profile]], module: str, subject: str) -> Canvas:
    """The figure of profiles along both axes (see `profiles`)."""
    shares = [float(v) for layers in found.values() for cells, _ in layers.values() for v in cells]
    positive = [v for v in shares if v > 0] or [1.0]
    low, high = min(positive), max(positive)
    low = low if low < high else high / 1.1
    at, text = style.decades(low, high, share=True)
    layers = list(found["rows"])
    title = f"Changed share of rows and columns of {style.safe(module)}: {style.safe(subject)}"
    fig = style.figure(title, _alt(found, module), height=max(190, min(620, 130 + 16 * len(layers))))
    fig.update(
        coloraxis={
            "colorscale": style.SEQUENTIAL, "cmin": math.log10(low), "cmax": math.log10(high),
            "colorbar": {"tickvals": at, "ticktext": text, "thickness": 12, "outlinewidth": 0},
        }
    )  # fmt: skip
    names = ["none" if layer is None else str(layer) for layer in layers]
    every = max(1, math.ceil(len(names) / 24))
    for panel, axis in enumerate(AXES):
        _cells(fig, found[axis], axis, panel)
        number = "2" if panel else ""
        fig.update(
            **{
                f"xaxis{number}": {
                    "title": {"text": "row" if axis == "rows" else "column"}, "domain": [0.55, 1] if panel else [0, 0.45],
                    "anchor": f"y{number}", "showgrid": False,
                },
                f"yaxis{number}": {
                    "title": {"text": "" if panel else "layer"}, "tickvals": list(range(len(names)))[::every],
                    "ticktext": names[::every], "anchor": f"x{number}", "showgrid": False, "autorange": "reversed",
                },
            }
        )  # fmt: skip
    return fig


def _cells(fig: Canvas, layers: dict[int | None, Profile], axis: str, panel: int) -> None:
    """Add one panel: the cells of each layer, those of other lengths stretched to the longest."""
    longest = max(length for _, length in layers.values())
    cells = max(len(values) for values, _ in layers.values())
    drawn, hover = [], []
    word = "row" if axis == "rows" else "column"
    for layer, (values, length) in layers.items():
        place = np.arange(cells) * len(values) // cells
        drawn.append([round(math.log10(v), 4) if v > 0 else None for v in values[place].tolist()])
        where = "" if layer is None else f"layer {layer}, "
        starts = [-(-int(at) * length // len(values)) for at in range(len(values) + 1)]
        text = [
            f"{where}{word}{'s' if e - s > 1 else ''} {s if e - s <= 1 else f'{s}–{e - 1}'}<br>changed: <b>{percent(v)}</b>"
            for s, e, v in zip(starts, starts[1:], values.tolist(), strict=False)
        ]
        hover.append([text[at] for at in place])
    step = longest / cells
    common = {
        "x0": (step - 1) / 2, "dx": step, "hovertext": hover, "hoverinfo": "text",
        "xaxis": "x2" if panel else "x", "yaxis": "y2" if panel else "y",
    }  # fmt: skip
    if any(value is None for line in drawn for value in line):
        grey = [[0.0 if value is None else None for value in line] for line in drawn]
        flat = [[0, style.NOTHING], [1, style.NOTHING]]
        fig.add_heatmap(z=grey, colorscale=flat, showscale=False, hoverongaps=False, **common)
    fig.add_heatmap(z=drawn, coloraxis="coloraxis", hoverongaps=False, ygap=1, **common)


def _alt(found: dict[str, dict[int | None, Profile]], module: str) -> str:
    said = []
    for axis, word in zip(AXES, ("rows", "columns"), strict=True):
        values = np.concatenate([cells for cells, _ in found[axis].values()])
        said.append(f"{word} changed between {percent(float(values.min()))} and {percent(float(values.max()))}")
    return f"Changed share of the rows and columns of {style.plain(module)}, layer by layer: {'; '.join(said)}."
