"""Spectra of the update: singular values beside the largest, and how much of the energy the first directions hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from paramdiff.diff import Diff
from paramdiff.errors import OptionError
from paramdiff.names import KINDS
from paramdiff.plots import quantities, runs, style
from paramdiff.plots.canvas import Canvas
from paramdiff.wording import number, percent

GRID = np.geomspace(1e-4, 1, 81)  # shares of the directions at which spectra of different sizes are read
MARKS = (0.9, 0.95, 0.99)
MOST = 24  # single matrices in one figure
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """One matrix: its row of `Diff.ranks`, and at each point of `GRID` σᵢ/σ₁ and the share of the energy up to there.

    NaN where a matrix has no such direction (fewer than 1/share), or a sketch did not go so far; None where nothing changed
    or a norm is beyond float64.
    """

    row: dict[str, Any]
    relative: Floats | None
    energy: Floats | None


def spectrum(results: runs.Results, by: str = "module", *, module: str | None = None, names: Sequence[str] = ()) -> Canvas:
    """Left: σᵢ/σ₁ against the share of directions, i/min(m, n). Right: the share of Σσ² that these directions hold.

    Args:
        results: a `Diff` with spectra, or several (a line each).
        by: what a line stands for: module, layer or kind. Lines are medians over its matrices, bands (drawn for up to three
            lines) the middle 80 %.
        module: only the matrices of this one.
        names: these matrices instead, a line each.

    Matrices that did not change have no spectrum to draw; the text alternative counts them.

    Raises `OptionError` where "spectrum" was not measured, nothing changed, or a name is not there.

    >>> from paramdiff import compare, plots
    >>> diff = compare("sample_data/base", "sample_data/rl-sgd", measures=["change", "spectrum"])
    >>> plots.spectrum(diff, by="kind").layout.title.text
    'Spectrum of the update: base → rl-sgd'
    """
    if by not in ("module", "layer", "kind"):
        raise OptionError(f"Spectra are not grouped by {by!r}.", hint="Group them by module, layer or kind.")
    found = runs.diffs(results)
    if len(names) > MOST:
        raise OptionError(f"{len(names)} matrices are too many for one figure.", hint=f"Name at most {MOST}.")
    every = {label: curves(diff, chosen(diff, module, names)) for label, diff in found.items()}
    return compose(every, runs.subject(found), "name" if names else by, module)


def compose(every: dict[str, list[Curve]], subject: str, by: str, module: str | None = None) -> Canvas:
    """The figure of the curves of one run, grouped `by` what their rows say, or of several, a line each.

    `module` leaves those of others out. Raises `OptionError` where no curve is left.
    """
    lines: dict[str, list[Curve]] = {}
    for label, found in every.items():
        for curve in found:
            if module is None or curve.row["module"] == module:
                place = curve.row[by]
                own = "outside" if place is None else str(place)
                lines.setdefault(own if len(every) == 1 else label, []).append(curve)
    left = [curve for found in lines.values() for curve in found if curve.relative is None]
    zero = sum(not curve.row["frobenius"] for curve in left)
    moved = {label: kept for label, found in lines.items() if (kept := [c for c in found if c.relative is not None])}
    if not moved:
        raise OptionError(
            "There is no spectrum to draw: no matrix changed."
            if len(left) == zero
            else "There is no finite spectrum to draw."
        )
    if len(every) == 1:
        moved = _sorted(moved, by)
    subject += f", {module}" if module else ""
    fig = draw(moved, subject, ordered=by == "layer" and len(every) == 1)
    fig.update(meta={"alt": _alt(moved, zero, len(left) - zero)})
    return fig


def chosen(diff: Diff, module: str | None = None, names: Sequence[str] = ()) -> pl.DataFrame:
    """The rows of `Diff.ranks` that have a spectrum, of one module or with these names."""
    ranks = diff.ranks.filter(pl.col("method").is_not_null() & pl.col("duplicate_of").is_null())
    missing: list[str] = [name for name in names if name not in ranks["name"]]
    if module is not None and module not in ranks["module"]:
        missing.append(module)
    if missing:
        raise OptionError(f"There is no spectrum of {missing[0]!r} here.", hint="Diff.ranks lists what there is.")
    if module is not None:
        ranks = ranks.filter(pl.col("module") == module)
    return ranks.filter(pl.col("name").is_in(list(names))) if names else ranks


def curves(diff: Diff, ranks: pl.DataFrame) -> list[Curve]:
    """The curve of each row of `ranks`."""
    spectra = diff.tables["spectra"].join(ranks.select("name").unique(), on="name", how="semi")
    sigmas = spectra.group_by("name", "expert", maintain_order=True).agg(pl.col("sigma"))
    joined = ranks.join(sigmas, on=["name", "expert"], how="left", nulls_equal=True, maintain_order="left")
    wanted = ("name", "module", "layer", "kind", "full_rank", "frobenius", "energy_rank_99_percent", "sigma")
    found = []
    for row in joined.select(wanted).iter_rows(named=True):
        sigma = np.asarray(row.pop("sigma") or [], dtype=np.float64)
        if not len(sigma) or not 0 < sigma[0] < np.inf or not 0 < row["frobenius"] < np.inf:
            found.append(Curve(row, None, None))
            continue
        index = np.floor(GRID * row["full_rank"] + 1e-9).astype(int)  # so many directions make up the share, whole ones
        there = (index >= 1) & (index <= len(sigma))
        relative, energy = np.full(len(GRID), np.nan), np.full(len(GRID), np.nan)
        shares = sigma / sigma[0]  # whose squares float64 holds, where those of σ may be beyond it
        relative[there] = shares[index[there] - 1]
        held = np.cumsum(shares**2) * (sigma[0] / row["frobenius"]) ** 2
        energy[there] = held[index[there] - 1].clip(max=1)
        found.append(Curve(row, relative, energy))
    return found


def _sorted(lines: dict[str, list[Curve]], by: str) -> dict[str, list[Curve]]:
    """Lines in the order in which they are drawn."""
    if by == "layer":
        return dict(sorted(lines.items(), key=lambda line: int(line[0]) if line[0].isdecimal() else -1))
    rows = pl.DataFrame([{key: curve.row[key] for key in ("module", "kind")} for found in lines.values() for curve in found])
    order = quantities.modules(rows) if by == "module" else list(KINDS) if by == "kind" else list(lines)
    return dict(sorted(lines.items(), key=lambda line: order.index(line[0])))


def draw(lines: dict[str, list[Curve]], subject: str, *, ordered: bool = False) -> Canvas:
    """The figure of curves that are not None, a line for each list of them; `ordered`: coloured by their order."""
    parts = ("relative", "energy")
    medians = {label: [np.stack([getattr(c, part) for c in found]) for part in parts] for label, found in lines.items()}
    fig = style.figure(f"Spectrum of the update: {style.safe(subject)}", "", height=340)
    every = -(-len(medians) // 14) if ordered else 1  # colours in an order need no name each
    for position, (label, (relative, energy)) in enumerate(medians.items()):
        look = {"color": style.shade(position, len(medians)), "width": 1.4} if ordered else style.line(position)
        name = style.safe(f"layer {label}" if ordered and label.isdecimal() else label, 30)
        sigma, held = _median(relative), _median(energy)
        if len(medians) <= 3 and len(relative) > 2:
            for panel, values in enumerate((relative, energy)):
                _band(fig, values, str(look["color"]), panel)
        there = np.isfinite(relative).sum(axis=0)  # a narrow matrix has no first 1 % of its directions
        for panel, values in enumerate((sigma, held)):
            known = np.isfinite(values) & (values > 0)
            said = number if panel == 0 else percent
            what = "σᵢ/σ₁" if panel == 0 else "energy"
            fig.add_scatter(
                x=_rounded(GRID[known]), y=_rounded(values[known]), name=name, legendgroup=label,
                showlegend=panel == 0 and position % every == 0,
                mode="lines", line=look, **_axes(panel), hoverinfo="text",
                hovertext=[
                    f"{name}{f', median of {n} matrices' if n > 1 else ''}<br>first {percent(float(x))} of the directions"
                    f"<br>{what}: <b>{said(float(y))}</b>"
                    for x, y, n in zip(GRID[known], values[known], there[known], strict=True)
                ],
            )  # fmt: skip
    for mark in MARKS:
        fig.add_line(mark, panel="2", color="#888888", width=1, dash="dot")
    _layout(fig, medians)
    return fig


def _layout(fig: Canvas, medians: dict[str, list[Floats]]) -> None:
    some = [GRID[np.isfinite(relative).any(axis=0)] for relative, _ in medians.values()]
    first = min(float(part[0]) for part in some if len(part))
    axis = {**style.log_axis([first, 1.0], share=True, margin=1.0, most=5), "title": {"text": "share of directions"}}
    positive = [float(v) for relative, _ in medians.values() for v in _median(relative) if v > 0]
    fig.update(
        xaxis={**axis, "domain": [0, 0.4], "anchor": "y"}, xaxis2={**axis, "domain": [0.6, 1], "anchor": "y2"},
        yaxis={**style.log_axis([max(min(positive, default=1.0), 1e-8), 1.0]), "title": {"text": "σᵢ / σ₁"}, "anchor": "x"},
        yaxis2={
            "range": [0, 1.03], "tickformat": ".0%", "title": {"text": "energy, share of Σσ²"}, "anchor": "x2",
            "tickvals": [0, 0.25, 0.5, 0.75, 0.9, 0.99],
        },
    )  # fmt: skip


def _axes(panel: int) -> dict[str, str]:
    return {"xaxis": "x2", "yaxis": "y2"} if panel else {"xaxis": "x", "yaxis": "y"}


def _band(fig: Canvas, values: Floats, colour: str, panel: int) -> None:
    """The middle 80 % of the matrices, behind the lines."""
    low, high = (_quantile(values, q) for q in (0.1, 0.9))
    known = np.isfinite(low) & (low > 0)
    fig.add_scatter(
        x=_rounded(np.concatenate([GRID[known], GRID[known][::-1]])),
        y=_rounded(np.concatenate([high[known], low[known][::-1]])),
        fill="toself", fillcolor=style.faded(colour), line={"width": 0}, mode="lines", hoverinfo="skip", showlegend=False,
        **_axes(panel),
    )  # fmt: skip


def _rounded(values: Floats) -> list[float]:
    """Four significant digits: more would be invisible, and would double the size of a report."""
    return [float(f"{value:.4g}") for value in values]


def _median(values: Floats) -> Floats:
    return _quantile(values, 0.5)


def _quantile(values: Floats, q: float) -> Floats:
    """Over matrices (axis 0), of those that have a value; NaN where fewer than half do, so that a curve ends where it
    would jump to other matrices."""
    found = np.full(values.shape[1], np.nan)
    enough = np.isfinite(values).sum(axis=0) * 2 >= len(values)
    if enough.any():
        found[enough] = np.nanquantile(values[:, enough], q, axis=0)
    return found


def _alt(lines: dict[str, list[Curve]], zero: int, beyond: int) -> str:
    said = []
    for label, found in list(lines.items())[:6]:
        percents = [curve.row["energy_rank_99_percent"] for curve in found]
        known = [value for value in percents if value is not None]  # a sketch does not reach 99 %
        if known:
            middle = f"{np.median(known):.3g} % of the directions"
            said.append(f"{style.plain(label)}: 99 % of the energy lies in {middle}{' (median)' if len(known) > 1 else ''}")
    more = f"; {len(lines) - 6} more lines" if len(lines) > 6 else ""
    left = f" {zero} {'matrix' if zero == 1 else 'matrices'} without a change not drawn." if zero else ""
    left += f" {beyond} beyond float64 not drawn." if beyond else ""
    return f"Singular values of the update and the energy they hold. {'; '.join(said)}{more}.{left}"
