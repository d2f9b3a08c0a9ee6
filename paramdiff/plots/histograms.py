"""Histograms of how far each element went: |Δ|, |Δ| beside the weight, and the distance in ulps."""

from __future__ import annotations

import math

import polars as pl

from paramdiff.errors import OptionError
from paramdiff.names import KINDS
from paramdiff.plots import quantities, runs, style
from paramdiff.plots.canvas import Canvas
from paramdiff.wording import percent

MISSING = {
    "ulp": "Integers have no distance in ulps.",
    "log2_abs_delta": 'Nothing changed, or "magnitude" was not measured.',
    "log2_rel_delta": 'Nothing changed, or "magnitude" was not measured.',
}
ULP, DELTA, RELATIVE = "ulp", "log2_abs_delta", "log2_rel_delta"
AXES = {
    ULP: "distance in ulps (steps of the type)",
    DELTA: "|Δ|",
    RELATIVE: "|Δ| / |base|",
}


def histogram(results: runs.Results, which: str = DELTA, *, by: str | None = "kind") -> Canvas:
    """The share of all elements in each bin, on a log scale: of one result a line for each group of `by` (kind, module or
    None), of several a line each.

    Args:
        results: a `Diff`, or several.
        which: log2_abs_delta (bins are powers of two of |Δ|), log2_rel_delta (of |Δ|/|base|) or ulp.
        by: how the tensors of one result are grouped.

    Shares are of the elements of the group, changed or not; only `ulp` has a bin for the unchanged ones. A distance in ulps
    counts steps of the type that both sides have in common.

    Raises `OptionError` where "change" and "magnitude" were not measured, or for another `which` or `by`.

    >>> from paramdiff import compare, plots
    >>> fig = plots.histogram(compare("sample_data/base", "sample_data/rl-sgd"), "ulp", by=None)
    >>> fig.data[0].x[:4]
    ('0', '1', '2', '3–4')
    """
    if which not in AXES:
        raise OptionError(f"There is no histogram {which!r}.", hint=f"Draw one of {', '.join(AXES)}.")
    if by not in ("kind", "module", None):
        raise OptionError(f"Histograms are not grouped by {by!r}.", hint="Group them by kind, module or None.")
    found = runs.diffs(results)
    lines: dict[str, tuple[pl.DataFrame, int]] = {}
    for label, diff in found.items():
        if "histograms" not in diff.tables:
            raise OptionError("This comparison has no histograms.", hint='Compare with measures=["change", "magnitude"].')
        own = diff.tables["histograms"].filter(pl.col("histogram") == which)
        lines |= grouped(own, diff.counted, which, by if len(found) == 1 else None, label)
    if not lines:
        raise OptionError(f"No tensor has a histogram of {which}.", hint=MISSING[which])
    return draw(lines, which, runs.subject(found))


def grouped(
    bins: pl.DataFrame, weights: pl.DataFrame, which: str, by: str | None, label: str
) -> dict[str, tuple[pl.DataFrame, int]]:
    """Added-up bins of each group, and the elements of its tensors, unchanged ones too, that they are shares of."""
    key = pl.col(by) if by else pl.lit(label).alias("group")
    placed = weights.select("name", "numel", key.alias("group"))
    if which == ULP:  # integers, say, have no such distance: they are no part of the whole
        placed = placed.join(bins, on="name", how="semi")
    added = (
        bins.join(placed, on="name").group_by("group", "lower", "upper").agg(pl.col("count").sum()).sort("lower", "upper")
    )
    sizes = dict(placed.group_by("group").agg(pl.col("numel").sum()).rows())
    order = quantities.modules(weights) if by == "module" else KINDS if by == "kind" else [label]
    parts = {str(group): frame for (group,), frame in added.group_by("group", maintain_order=True)}
    return {group: (parts[group], int(sizes[group])) for group in order if group in parts}


def draw(lines: dict[str, tuple[pl.DataFrame, int]], which: str, subject: str) -> Canvas:
    """The histogram of added-up bins (lower, upper, count) with the elements they are shares of."""
    names = {ULP: "Distance in ulps", DELTA: "Size of the change", RELATIVE: "Size of the change beside the weight"}
    fig = style.figure(f"{names[which]}: {style.safe(subject)}", _alt(lines, which))
    shares = [count / of for frame, of in lines.values() for count in frame["count"] if count]
    (_ulps if which == ULP else _powers)(fig, lines)
    axis = {"title": {"text": "share of elements"}, **style.log_axis(shares or [1.0], share=True)}
    fig.update(xaxis={"title": {"text": AXES[which]}}, yaxis=axis)
    return fig


def _ulps(fig: Canvas, lines: dict[str, tuple[pl.DataFrame, int]]) -> None:
    edges = _all_ulps([upper for frame, _ in lines.values() for upper in frame["upper"]])
    texts = [_ulp(lower, upper) for lower, upper in edges]
    for number, (label, (frame, of)) in enumerate(lines.items()):
        counts = dict(zip(frame["upper"].to_list(), frame["count"].to_list(), strict=True))
        found = [counts.get(upper, 0) for _, upper in edges]
        name = style.safe(label, 30)
        fig.add_scatter(
            x=texts, y=[count / of if count else None for count in found], name=name, mode="lines+markers",
            line=style.line(number) | {"width": 1}, marker={"size": 7, "symbol": number % 8}, hoverinfo="text",
            hovertext=[
                f"{name}<br>{text} ulp: <b>{percent(count / of)}</b><br>{count:,} of {of:,} elements"
                for text, count in zip(texts, found, strict=True)
            ],
        )  # fmt: skip
    categories = {"type": "category", "categoryorder": "array", "categoryarray": texts}
    fig.update(xaxis={**categories, "tickangle": -40, "dtick": -(-len(texts) // 20)})


def _all_ulps(uppers: list[float]) -> list[tuple[float, float]]:
    """All bins up to the last one that is used: 0, 1, 2, 3–4, 5–8, …; and the one of what has no distance."""
    last = max((upper for upper in uppers if math.isfinite(upper)), default=0.0)
    found = [(0.0, 0.0)]
    while found[-1][1] < last:
        found.append((found[-1][1] + 1, max(1.0, 2 * found[-1][1])))
    return found + [(math.inf, math.inf)] * any(not math.isfinite(upper) for upper in uppers)


def _ulp(lower: float, upper: float) -> str:
    if not math.isfinite(lower):
        return "finite ↔ not"
    return f"{lower:.0f}" if lower == upper else f"{_thousands(lower)}–{_thousands(upper)}"


def _thousands(value: float) -> str:
    """A distance, short: those beyond a thousand are powers of two.

    >>> _thousands(512), _thousands(1025), _thousands(2048), _thousands(65536)
    ('512', '2¹⁰', '2¹¹', '2¹⁶')
    """
    if value < 1000:
        return f"{value:.0f}"
    return "2" + str(round(math.log2(value))).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _powers(fig: Canvas, lines: dict[str, tuple[pl.DataFrame, int]]) -> None:
    ends = []
    for number, (label, (frame, of)) in enumerate(lines.items()):
        rows = _with_gaps(_bounded(frame))
        if not rows:
            continue
        name = style.safe(label, 30)
        ends += [rows[0][0], rows[-1][1]]
        fig.add_scatter(
            x=[2.0 ** ((lower + upper) / 2) for lower, upper, _ in rows],
            y=[count / of if count else None for *_, count in rows], name=name, mode="lines+markers",
            line=style.line(number) | {"shape": "hvh"}, marker={"size": 4},
            hovertext=[
                f"{name}<br>2^{lower:g} to 2^{upper:g} (from {2.0**lower:.2g}): <b>{percent(count / of)}</b>"
                f"<br>{count:,} of {of:,} elements"
                for lower, upper, count in rows
            ],
            hoverinfo="text",
        )  # fmt: skip
    low, high = (2.0 ** min(ends), 2.0 ** min(max(ends), 1020)) if ends else (0.1, 1.0)
    fig.update(xaxis=style.log_axis([low, high]))


def _bounded(frame: pl.DataFrame) -> list[tuple[float, float, int]]:
    """Bins of powers of two in order. The outermost ones, without an end, are drawn as wide as the others; what left a
    weight of zero has no bin."""
    rows = frame.filter(pl.col("lower").is_finite() | pl.col("upper").is_finite()).select("lower", "upper", "count").rows()
    ends = [(upper - 1 if lower == -math.inf else lower, upper, count) for lower, upper, count in rows]
    return sorted((lower, lower + 1 if upper == math.inf else upper, count) for lower, upper, count in ends)


def _with_gaps(rows: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Bins with the empty ones between them, so that a line breaks there."""
    found: list[tuple[float, float, int]] = []
    for lower, upper, count in rows:
        if found and lower > found[-1][1]:
            found.append((found[-1][1], lower, 0))
        found.append((lower, upper, count))
    return found


def _alt(lines: dict[str, tuple[pl.DataFrame, int]], which: str) -> str:
    said = []
    for name, (frame, of) in list(lines.items())[:8]:
        label = style.plain(name)
        if which == ULP:
            counts = dict(frame.select("lower", "count").rows())
            none, one = (percent(counts.get(distance, 0) / of) for distance in (0.0, 1.0))
            said.append(f"{label}: {none} unchanged, {one} by one ulp")
        else:
            rows = _bounded(frame)
            if rows:
                lower, upper, count = max(rows, key=lambda row: row[2])
                said.append(f"{label}: most often 2^{lower:g} to 2^{upper:g} ({percent(count / of)})")
            beyond = sum(frame["count"]) - sum(count for *_, count in rows)
            if beyond:
                said.append(f"{label}: {beyond:,} changes of weights that were zero are not drawn")
    more = f"; {len(lines) - 8} more lines" if len(lines) > 8 else ""
    return f"Histogram of {AXES[which]}. {'; '.join(said)}{more}."
