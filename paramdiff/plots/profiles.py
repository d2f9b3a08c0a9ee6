"""Profiles along the layers: one line for each module, or for each run."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from paramdiff.moments import Moments
from paramdiff.plots import quantities, runs, style
from paramdiff.plots.canvas import Canvas
from paramdiff.plots.heat import in_order
from paramdiff.plots.quantities import Quantity

ALL = "all modules"


def layers(
    results: runs.Results,
    column: str | None = None,
    *,
    side: str | None = None,
    k: int | None = None,
) -> Canvas:
    """`column` along the layers: of one result a line for each module and one for all together; of several, a line each.

    Shares are drawn as the *changed* share on a log scale. A value of zero, for which a log scale has no place, is an open
    triangle on the lower edge. What lies outside layers is not drawn; the heat map has it.

    Raises `OptionError` for a column that is not there.

    >>> from paramdiff import compare, plots
    >>> fig = plots.layers(compare("sample_data/base", "sample_data/rl-sgd"))
    >>> [line.name for line in fig.data][:3]
    ['all modules', 'q_proj', 'k_proj']
    """
    found = runs.named(results)
    first = next(iter(found.values()))
    column = column or ("adaptivity" if isinstance(first, Moments) else "sparsity")
    frames = {}
    for label, result in found.items():
        table, own = quantities.table_of(result, column), side or quantities.side_of(result, column)
        frames[ALL if len(found) == 1 else label] = quantities.rolled(result, table, ["layer"], own, k)
        if len(found) == 1:
            cells = in_order(quantities.rolled(result, table, ["layer", "module"], own, k), result.tables[table])
            frames |= by_module(cells)
    subject = runs.subject(found, side or quantities.side_of(first, column))
    return draw(frames, _quantity(column, frames), subject)


def by_module(cells: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """The layers of each module, of those that have any."""
    inside = cells.filter(pl.col("layer").is_not_null())
    parts = inside.group_by("module", maintain_order=True)
    return {f"{module} (module)" if module == ALL else str(module): frame for (module,), frame in parts}


def _quantity(column: str, frames: dict[str, pl.DataFrame]) -> Quantity:
    return quantities.quantity(column, pl.concat([frame[column].cast(pl.Float64) for frame in frames.values()]))


def draw(frames: dict[str, pl.DataFrame], what: Quantity, subject: str) -> Canvas:
    """The profile of rolled-up frames: columns layer and that of `what`."""
    what = quantities.over_groups(what, frames.values())
    lines = {label: _points(frame, what) for label, frame in frames.items()}
    values = [v for points in lines.values() for _, v, _ in points if v is not None]
    positive = [v for v in values if v > 0]
    floor = min(positive) / 2 if positive else 0.5
    zeros = what.is_log and len(positive) < len(values)
    shown = style.safe(what.label, 100)
    title = f"{style.sentence(shown)}, by layer: {style.safe(subject)}"
    fig = style.figure(title, _alt(lines, what), height=min(640, max(style.HEIGHT, 110 + 19 * len(lines))))
    for number, (label, points) in enumerate(lines.items(), start=-1 if ALL in lines else 0):
        look = {"color": style.INK, "width": 3} if label == ALL else style.line(number)
        _line(fig, label, points, what, floor, look)
    last = max((layer for points in lines.values() for layer, *_ in points), default=0)
    fig.update(xaxis={"title": {"text": "layer"}, "tick0": 0, "dtick": math.ceil((last + 1) / 16)})
    if what.is_log:
        axis = style.log_axis(positive or [1.0], share=what.scale == quantities.SHARE)
        if zeros:
            axis["tickvals"], axis["ticktext"] = [floor, *axis["tickvals"]], ["0", *axis["ticktext"]]
            axis["range"] = style.log_axis([floor, *(positive or [1.0])])["range"]
        fig.update(yaxis={"title": {"text": shown}, **axis})
    else:
        fig.update(yaxis={"title": {"text": shown + (f", {what.unit}" if what.unit else "")}})
        if what.scale == quantities.PERCENT:
            fig.update(yaxis={"ticksuffix": " %", "rangemode": "tozero"})
    return fig


def _points(frame: pl.DataFrame, what: Quantity) -> list[tuple[int, float | None, str]]:
    """Layer, value and counts of one line, in the order of the layers."""
    counts: Any = frame[what.count].to_list() if what.count in frame.columns else None
    sizes: Any = frame[what.of].to_list() if what.of in frame.columns else None
    found = []
    for index, (layer, value) in enumerate(zip(frame["layer"].to_list(), quantities.drawn(frame, what), strict=True)):
        if layer is not None:
            known = counts is not None and sizes is not None and counts[index] is not None
            of = f"<br>{counts[index]:,} of {sizes[index]:,} {what.elements}" if known else ""
            found.append((layer, value, of))
    return sorted(found, key=lambda point: point[0])


def _line(fig: Canvas, label: str, points: list[Any], what: Quantity, floor: float, look: dict[str, Any]) -> None:
    def is_zero(value: float | None) -> bool:
        return what.is_log and value is not None and value <= 0

    name, shown = style.safe(label, 30), style.safe(what.label, 100)
    drawn = [floor if is_zero(value) else value for _, value, _ in points]
    fig.add_scatter(
        x=[layer for layer, _, _ in points], y=drawn, name=name, mode="lines+markers",
        line=look,
        marker={
            "size": 5 if len(points) < 40 else 3,
            "symbol": ["triangle-down-open" if is_zero(value) else "circle" for _, value, _ in points],
        },
        hovertext=[f"{name}, layer {layer}<br>{shown}: <b>{what.said(value)}</b>{of}" for layer, value, of in points],
        hoverinfo="text",
    )  # fmt: skip


def _alt(lines: dict[str, list[Any]], what: Quantity) -> str:
    """The lines in words: where each begins and ends, for the first few."""
    said = []
    for label, points in list(lines.items())[:4]:
        known = [(layer, value) for layer, value, _ in points if value is not None]
        if known:
            (first, begin), (last, end) = known[0], known[-1]
            said.append(f"{style.plain(label)} {what.said(begin)} in layer {first}, {what.said(end)} in layer {last}")
    more = f"; {len(lines) - 4} more" if len(lines) > 4 else ""
    return f"Lines of {style.plain(what.label, 100)} along the layers: {'; '.join(said) or 'no layers'}{more}."
