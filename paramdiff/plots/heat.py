"""Heat maps: one cell for each layer and module (or expert), of any column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from paramdiff.diff import Diff
from paramdiff.errors import OptionError
from paramdiff.moments import Moments
from paramdiff.plots import quantities, runs, style
from paramdiff.plots.canvas import Canvas
from paramdiff.plots.quantities import Quantity

LABEL = 16  # pixels above a panel for its name
OUTSIDE = -1  # where what lies outside layers is drawn
ROW, GAP, AROUND = 17, 44, 118  # height of a row of cells, between panels, and of all else, in pixels


def heatmap(
    results: runs.Results,
    column: str | None = None,
    *,
    module: str | None = None,
    side: str | None = None,
    k: int | None = None,
) -> Canvas:
    """Layer × module, coloured by `column`; with `module`, layer × expert of that one.

    Args:
        results: a `Diff` or `Moments`; several are drawn below each other on one scale.
        column: a column of tensors, ranks, subspaces or adam. Shares are drawn as the *changed* share on a log scale, so
            that 99.9 % and 99.99 % unchanged can be told apart. By default sparsity (of `adam`: adaptivity).
        module: draw the experts of this module one by one.
        side: of two optimizer states, which: first or second. By default the first that has values in this column.
        k: of subspaces, how many leading directions.

    Cells pool the elements of their tensors. Grey cells are exactly zero, empty ones have no tensor.

    Raises `OptionError` for a column or module that is not there.

    >>> from paramdiff import compare, plots
    >>> diff = compare("sample_data/base", "sample_data/rl-sgd")
    >>> plots.heatmap(diff, "rel_l2").layout.title.text
    '‖Δ‖ / ‖base‖, by layer and module: base → rl-sgd'
    """
    found = runs.named(results)
    first = next(iter(found.values()))
    column = column or ("adaptivity" if isinstance(first, Moments) else "sparsity")
    frames = {label: _cells(result, column, module, side, k) for label, result in found.items()}
    what = quantities.quantity(column, pl.concat([frame[column].cast(pl.Float64) for frame in frames.values()]))
    subject = runs.subject(found, side or quantities.side_of(first, column))
    return draw(frames, what, subject, across="expert" if module else "module", of=module or "")


def _cells(result: Diff | Moments, column: str, module: str | None, side: str | None, k: int | None) -> pl.DataFrame:
    table = quantities.table_of(result, column)
    side = side or quantities.side_of(result, column)
    if module is None:
        return in_order(quantities.rolled(result, table, ["layer", "module"], side, k), result.tables[table])
    own = result.tables[table].filter((pl.col("module") == module) & pl.col("expert").is_not_null())
    if not own.height:
        raise OptionError(f"There are no single experts of {module!r} here.", hint="Leave the module out.")
    part = type(result)({**result.tables, table: own}, result.run)
    return quantities.rolled(part, table, ["layer", "expert"], side, k)


def in_order(frame: pl.DataFrame, table: pl.DataFrame) -> pl.DataFrame:
    """A rolled-up frame with its modules in the order in which they are drawn."""
    order = {module: position for position, module in enumerate(quantities.modules(table))}
    return frame.sort(pl.col("module").replace_strict(order, return_dtype=pl.Int64), maintain_order=True)


def draw(frames: dict[str, pl.DataFrame], what: Quantity, subject: str, *, across: str = "module", of: str = "") -> Canvas:
    """The heat map of rolled-up frames: columns layer, `across`, that of `what`, tensors and name."""
    what = quantities.over_groups(what, frames.values())
    values = [v for frame in frames.values() for v in quantities.drawn(frame, what) if v is not None]
    scale = _scale(what, values)
    rows = list(dict.fromkeys(key for frame in frames.values() for key in frame[across].to_list()))
    if across == "expert":
        rows.sort()
    title = f"{style.sentence(style.safe(what.label, 100))}, by layer and {across}"
    title += (f" of {style.safe(of)}" if of else "") + f": {style.safe(subject)}"
    single = min(ROW, max(3, 900 // max(1, len(rows))))
    panel = max(3 * ROW, single * len(rows))
    inner = panel * len(frames) + GAP * (len(frames) - 1)
    height = AROUND + inner + (LABEL if len(frames) > 1 else 0)
    fig = style.figure(title, _alt(frames, what, across), height=height)
    if len(frames) > 1:  # the first panel's label stands above it
        fig.update(margin={"t": style.MARGIN["t"] + LABEL})
    zeros = False
    for number, (label, frame) in enumerate(frames.items()):
        axes = {"xaxis": f"x{number + 1}", "yaxis": f"y{number + 1}"} if number else {}
        zeros = _add(fig, frame, what, rows, across, scale, axes) or zeros
        top = 1 - number * (panel + GAP) / inner
        _axes(fig, frames, number, label, rows, across, (top - panel / inner, top))
    if zeros:
        fig.add_annotation(
            text=f"<span style='color:{style.NOTHING}'>■</span> zero", xref="paper", yref="paper", x=1, xanchor="left",
            xshift=10, y=0, yanchor="top", yshift=-8, showarrow=False, font={"size": 10},
        )  # fmt: skip
    return fig


def _scale(what: Quantity, values: Sequence[float]) -> dict[str, Any]:
    """Colour axis: its colours, ends and ticks."""
    bar: dict[str, Any] = {"thickness": 12, "outlinewidth": 0, "len": 1, "lenmode": "fraction"}
    if what.is_log:
        positive = [v for v in values if v > 0] or [1.0]
        low, high = min(positive), max(positive)
        # A few cells far below all others would take the colours from them: they share the darkest, and its tick says so.
        lowest, low = low, max(low, float(np.quantile(positive, 0.05)) / 2)
        if low == high:
            low, high = low / 1.1, high * 1.1
        bar["tickvals"], bar["ticktext"] = _ticks(low, high, clipped=lowest < low, share=what.scale == quantities.SHARE)
        return {"colorscale": style.SEQUENTIAL, "cmin": math.log10(low), "cmax": math.log10(high), "colorbar": bar}
    if what.scale == quantities.SIGNED:
        most = max((abs(v) for v in values), default=1.0) or 1.0
        return {"colorscale": style.SIGNED, "cmin": -most, "cmax": most, "colorbar": bar}
    low, high = min(values, default=0.0), max(values, default=1.0)
    if what.scale == quantities.PERCENT:
        bar["ticksuffix"] = " %"
    return {"colorscale": style.SEQUENTIAL, "cmin": low, "cmax": high if high > low else low + 1e-9, "colorbar": bar}


def _ticks(low: float, high: float, *, clipped: bool, share: bool) -> tuple[list[float], list[str]]:
    """Ticks of a log colour bar; where cells lie below it, the lowest one says so."""
    at, text = style.decades(low, high, share=share)
    if clipped:
        first, apart = math.log10(low), 0.08 * math.log10(high / low)
        kept = [(power, label) for power, label in zip(at, text, strict=True) if power > first + apart]
        at = [first, *(power for power, _ in kept)]
        text = [f"≤ {style.tick(low, share=share)}", *(label for _, label in kept)]
    return at, text


def _add(
    fig: Canvas,
    frame: pl.DataFrame,
    what: Quantity,
    rows: list[Any],
    across: str,
    scale: dict[str, Any],
    axes: dict[str, str],
) -> bool:
    """Add one frame's cells. True where some of them are zero on a log scale, which has no place for it."""
    layers = _layers([frame])
    place = {layer: x for x, layer in enumerate(layers)}
    height = {row: y for y, row in enumerate(rows)}
    cells: list[list[float | None]] = [[None] * len(layers) for _ in rows]
    zero: list[list[float | None]] = [[None] * len(layers) for _ in rows]
    hover = [[""] * len(layers) for _ in rows]
    keys = zip(frame["layer"].to_list(), frame[across].to_list(), strict=True)
    counts: Any = frame[what.count].to_list() if what.count in frame.columns else None
    sizes: Any = frame[what.of].to_list() if what.of in frame.columns else None
    shown = style.safe(what.label, 100)
    every = zip(keys, quantities.drawn(frame, what), frame["name"].to_list(), frame["tensors"].to_list(), strict=True)
    for index, ((layer, row), value, name, tensors) in enumerate(every):
        x, y = place[OUTSIDE if layer is None else layer], height[row]
        if value is not None:
            drawn = value if not what.is_log else math.log10(value) if value > 0 else None
            cells[y][x] = None if drawn is None else float(f"{drawn:.5g}")  # as fine as colours are; hovering has all digits
            zero[y][x] = 0.0 if drawn is None else None
        known = counts is not None and sizes is not None and counts[index] is not None
        of = f"<br>{counts[index]:,} of {sizes[index]:,} {what.elements}" if known else ""
        hover[y][x] = f"{_who(name, tensors, layer, row, across)}<br>{shown}: <b>{what.said(value)}</b>{of}"
    common = {
        "x": list(range(len(layers))), "y": list(range(len(rows))),
        "hovertext": hover, "hoverinfo": "text", "hoverongaps": False,
        "xgap": 1 if len(layers) < 100 else 0, "ygap": 1 if len(rows) < 50 else 0, **axes,
    }  # fmt: skip
    any_zero = any(cell is not None for row in zero for cell in row)
    if any_zero:
        fig.add_heatmap(z=zero, colorscale=[[0, style.NOTHING], [1, style.NOTHING]], showscale=False, **common)
    fig.add_heatmap(z=cells, coloraxis="coloraxis", **common)
    fig.update(coloraxis=scale)
    return any_zero


def _who(name: str | None, tensors: int, layer: int | None, row: Any, across: str) -> str:
    if name is not None:
        return style.safe(name, 100)
    place = "outside layers" if layer is None else f"layer {layer}"
    return f"{style.safe(str(row))} ({across}), {place}: {tensors} tensors"


def _layers(frames: Sequence[pl.DataFrame]) -> list[int]:
    """The layers of frames, in order; `OUTSIDE` first if something lies outside them."""
    found = {layer for frame in frames for layer in frame["layer"].to_list()}
    inside = sorted(layer for layer in found if layer is not None)
    return ([OUTSIDE] if None in found else []) + inside


def _axes(
    fig: Canvas,
    frames: dict[str, pl.DataFrame],
    number: int,
    label: str,
    rows: list[Any],
    across: str,
    domain: tuple[float, float],
) -> None:
    """Label the axes of the `number`-th frame, which share the figure's height."""
    layers = _layers([list(frames.values())[number]])
    inside = [(position, layer) for position, layer in enumerate(layers) if layer != OUTSIDE]
    every = max(1, math.ceil(len(inside) / 16))
    shown = [(x, str(layer)) for x, layer in inside if layer % every == 0 and (x > 1 or every == 1 or OUTSIDE not in layers)]
    if OUTSIDE in layers:
        shown.insert(0, (0, "none"))
    last = number == len(frames) - 1
    names = [style.safe(str(row), 28) for row in rows]
    several = max(1, math.ceil(len(rows) / 60))
    fig.update(
        **{
            f"xaxis{number + 1 if number else ''}": {
                "tickvals": [x for x, _ in shown], "ticktext": [text for _, text in shown],
                "range": [-0.5, len(layers) - 0.5], "tickangle": 0,
                "title": {"text": "layer" if last else ""}, "showgrid": False, "anchor": f"y{number + 1 if number else ''}",
            },
            f"yaxis{number + 1 if number else ''}": {
                "tickvals": list(range(len(rows)))[::several], "ticktext": names[::several], "showgrid": False,
                "range": [len(rows) - 0.5, -0.5], "domain": [max(0.0, domain[0]), domain[1]],
                "title": {"text": across if across == "expert" else ""}, "anchor": f"x{number + 1 if number else ''}",
            },
        }
    )  # fmt: skip
    if len(frames) > 1:
        fig.add_annotation(
            text=f"<b>{style.safe(label)}</b>", xref="paper", yref="paper", x=0, y=domain[1], xanchor="left",
            yanchor="bottom", showarrow=False,
        )  # fmt: skip


def _alt(frames: dict[str, pl.DataFrame], what: Quantity, across: str) -> str:
    """The heat map in words: its extremes, run by run."""
    said = []
    for label, frame in frames.items():
        cells = zip(quantities.drawn(frame, what), frame["layer"].to_list(), frame[across].to_list(), strict=True)
        known = sorted(((value, layer, row) for value, layer, row in cells if value is not None), key=lambda cell: cell[0])
        if not known:
            said.append("no values")
            continue
        least, most = (f"{what.said(v)} ({_where(layer, row, across)})" for v, layer, row in (known[0], known[-1]))
        text = f"from {least} to {most}"
        said.append(f"{style.plain(label)}: {text}" if len(frames) > 1 else text)
    return f"Heat map of {style.plain(what.label, 100)} by layer and {across}, {'; '.join(said)}."


def _where(layer: int | None, row: Any, across: str) -> str:
    row = f"expert {row}" if across == "expert" else style.plain(row)
    return f"{row}, outside layers" if layer is None else f"{row}, layer {layer}"
