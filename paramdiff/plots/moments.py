"""Adam's state: how the second moment is spread, and which learning rate each layer really had."""

from __future__ import annotations

import numpy as np
import polars as pl

from paramdiff.errors import OptionError
from paramdiff.moments import Moments
from paramdiff.names import KINDS
from paramdiff.plots import quantities, runs, style
from paramdiff.plots.canvas import Canvas
from paramdiff.wording import number, percent

STEP = 0.1  # decades to a bin
BINS = {"log10_sqrt_vhat": "√v̂", "log10_eff_lr": "effective learning rate, η / (√v̂ + ε)"}


def adam(results: runs.Results, *, by: str = "module") -> Canvas:
    """Left: how √v̂ is spread over the elements, for each group. Right: the effective learning rate along the layers, its
    median and the range from the 1st to the 99th percentile.

    Args:
        results: a result of `adam`, or several. Where there are several checkpoints, a line stands for each of them.
        by: what a line stands for in one checkpoint: module or kind.

    Raises `OptionError` where nothing has a second moment.

    >>> from paramdiff import adam, plots
    >>> fig = plots.adam(adam("sample_data/checkpoints/rl-adamw/checkpoint-200"), by="kind")
    >>> [line.name for line in fig.data][:3]
    ['embedding', 'attention', 'mlp']
    """
    found = runs.sides(results)
    lines = spreads(found, "log10_sqrt_vhat", by)
    if not lines:
        raise OptionError("There is no second moment to draw.", hint="Plain SGD keeps none.")
    title = "Adam's second moment and effective learning rate: "
    title += style.safe(next(iter(found)) if len(found) == 1 else f"{len(found)} checkpoints")
    rates = {label: result.by("layer", side=side) for label, (result, side) in found.items()}
    fig = style.figure(title, _alt(found, lines), height=360)
    _spread(fig, lines, "log10_sqrt_vhat")
    _rates(fig, rates)
    fig.update(
        xaxis={"domain": [0, 0.4]}, xaxis2={"domain": [0.62, 1], "anchor": "y2"}, yaxis2={"anchor": "x2"},
    )  # fmt: skip
    return fig


def spread(results: runs.Results, which: str = "log10_eff_lr", *, by: str = "module") -> Canvas:
    """How √v̂ (`log10_sqrt_vhat`) or the effective learning rate (`log10_eff_lr`) is spread over the elements of each group.

    Takes what `adam` takes, and raises the same.
    """
    found = runs.sides(results)
    lines = spreads(found, which, by)
    if not lines:
        raise OptionError("There is no second moment to draw.", hint="Plain SGD keeps none.")
    subject = next(iter(found)) if len(found) == 1 else f"{len(found)} checkpoints"
    label = BINS[which].partition(",")[0]
    fig = style.figure(f"Spread of {label}: {style.safe(subject)}", _alt(found, lines))
    _spread(fig, lines, which)
    return fig


def spreads(found: dict[str, tuple[Moments, str]], which: str, by: str) -> dict[str, pl.DataFrame]:
    """For each group (of one checkpoint) or checkpoint: `at`, the middle of a bin of `STEP` decades, and the `share` of the
    elements in it; zeros and infinities have no bin."""
    if by not in ("module", "kind"):
        raise OptionError(f"Optimizer states are not grouped by {by!r}.", hint="Group them by module or kind.")
    lines: dict[str, pl.DataFrame] = {}
    for label, (result, side) in found.items():
        own = result.parameters.filter((pl.col("side") == side) & pl.col("has_state"))
        key = pl.col(by) if len(found) == 1 else pl.lit(label)
        bins = result.tables["histograms"].filter((pl.col("side") == side) & (pl.col("histogram") == which))
        placed = bins.join(own.select("name", key.alias("group")), on="name")
        inside = placed.filter(pl.col("lower").is_finite() & pl.col("upper").is_finite())
        at = ((pl.col("lower") + pl.col("upper")) / 2 / STEP).floor() * STEP + STEP / 2
        added = inside.group_by("group", at.alias("at")).agg(pl.col("count").sum()).sort("at")
        total = placed.group_by("group").agg(pl.col("count").sum().alias("of"))
        shares = added.join(total, on="group").with_columns((pl.col("count") / pl.col("of")).alias("share")).sort("at")
        order = quantities.modules(own) if by == "module" else list(KINDS)
        parts = {str(group): frame for (group,), frame in shares.group_by("group", maintain_order=True)}
        lines |= {group: parts[group] for group in (order if len(found) == 1 else [label]) if group in parts}
    return lines


def _spread(fig: Canvas, lines: dict[str, pl.DataFrame], which: str) -> None:
    every = [x for frame in lines.values() for x in frame["at"]]
    for position, (label, frame) in enumerate(lines.items()):
        name = style.safe(label, 30)
        rows = frame.select("at", "share", "count", "of").rows()
        fig.add_scatter(
            x=[float(f"{10**at:.4g}") for at, *_ in rows], y=[float(f"{share:.4g}") for _, share, *_ in rows], name=name,
            legendgroup=label, mode="lines", line=style.line(position), hoverinfo="text",
            hovertext=[
                f"{name}<br>{number(10 ** (at - STEP / 2))} to {number(10 ** (at + STEP / 2))}: <b>{percent(share)}</b>"
                f"<br>{count:,} of {of:,} elements"
                for at, share, count, of in rows
            ],
        )  # fmt: skip
    axis = style.log_axis([10 ** min(every), 10 ** max(every)], most=5)
    fig.update(xaxis={"title": {"text": BINS[which]}, **axis})
    share = {"title": {"text": f"share of elements, per {STEP:g} decades"}, "tickformat": ".0%", "rangemode": "tozero"}
    fig.update(yaxis=share)


def _rates(fig: Canvas, rates: dict[str, pl.DataFrame]) -> None:
    """The right panel: medians, with the range that holds 98 % of the elements as bars."""
    seen: list[float] = []
    axes = {"xaxis": "x2", "yaxis": "y2"}
    several = len(rates) > 1
    for position, (label, frame) in enumerate(rates.items()):
        known = frame.filter(pl.col("layer").is_not_null() & pl.col("eff_lr_p50").is_not_null()).sort("layer")
        if not known.height:
            continue
        low, mid, high = (known[name].to_numpy() for name in ("eff_lr_p1", "eff_lr_p50", "eff_lr_p99"))
        seen += [float(v) for part in (low, high) for v in part if np.isfinite(v) and v > 0]
        name = style.safe(label, 30)
        shift = 0.12 * (position - (len(rates) - 1) / 2)
        fig.add_scatter(
            x=[layer + shift for layer in known["layer"].to_list()], y=mid.tolist(), name=name, legendgroup=label,
            showlegend=False, mode="markers", hoverinfo="text", **axes,
            marker={"color": style.COLOURS[position % len(style.COLOURS)] if several else style.INK, "size": 6},
            error_y={"array": (high - mid).tolist(), "arrayminus": (mid - low).tolist(), "thickness": 1.2, "width": 3},
            hovertext=[
                f"{name}, layer {layer}<br>median: <b>{number(m)}</b><br>1 % to 99 %: {number(a)} to {number(b)}"
                for layer, a, m, b in zip(known["layer"], low, mid, high, strict=True)
            ],
        )  # fmt: skip
    text = "effective learning rate"
    note = None if seen else "not known: no learning rate"
    if note:
        fig.add_annotation(text=note, xref="x2 domain", yref="y2 domain", x=0.5, y=0.5, showarrow=False)
    fig.update(
        xaxis2={"title": {"text": "layer"}, "tickformat": "d"},
        yaxis2={"title": {"text": text}, **style.log_axis(seen or [0.1, 1])},
    )


def _alt(found: dict[str, tuple[Moments, str]], lines: dict[str, pl.DataFrame]) -> str:
    said = []
    for label, (result, side) in found.items():
        whole = result.by(side=side).row(0, named=True)
        rate = f"median effective learning rate {number(whole['eff_lr_p50'])}"
        rate += f" (1 % to 99 %: {number(whole['eff_lr_p1'])} to {number(whole['eff_lr_p99'])})"
        said.append(
            f"{label}: √v̂ {number(whole['sqrt_vhat_mean'])} on average, {rate if whole['eff_lr_p50'] else 'no rate known'}"
        )
    of = f"Spread of Adam's second moment over the elements, {len(lines)} lines, and effective learning rates"
    return f"{of}. {'; '.join(said)}."
