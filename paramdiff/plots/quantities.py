"""What can be drawn: the columns of every table, what they are called on an axis, and on which scale they are legible.

A column that is not listed here (of a measure of one's own) is drawn as its values demand: log where they are positive and
span two decades, diverging where both signs occur.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from paramdiff import tables
from paramdiff.columns import TABLES
from paramdiff.diff import Diff
from paramdiff.errors import OptionError
from paramdiff.moments import Moments
from paramdiff.names import KINDS
from paramdiff.pairing import CODES
from paramdiff.wording import percent

SHARE, LOG, LINEAR, SIGNED, PERCENT, UNIT = "share", "log", "linear", "signed", "percent", "unit"
FAMILIAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # the order of the forward pass


@dataclass(frozen=True, slots=True)
class Quantity:
    """How a column is drawn: `scale` is share (log, as %), log, linear, percent (0–100), unit (0–1) or signed.

    `count` names the column whose value over that of `of` is drawn instead: the changed share where the column says the
    unchanged one, so that 99.99 % and 99.999 % can be told apart. `pooled` says what stands for several tensors where their
    elements cannot be pooled. `digits` are those of a value in words.
    """

    column: str
    label: str
    scale: str = LINEAR
    count: str | None = None
    of: str = "numel"
    unit: str = ""
    pooled: str = ""
    digits: int = 3

    @property
    def is_log(self) -> bool:
        return self.scale in (SHARE, LOG)

    def said(self, value: float | None) -> str:
        """A value in words."""
        if value is None:
            return "–"
        if self.scale == SHARE:
            return percent(value)
        if self.scale == PERCENT:
            return f"{value:.3g} %"
        if abs(value) >= 1000 and value.is_integer():
            return f"{value:,.0f}"
        return f"{value:.{self.digits}g}" + (f" {self.unit}" if self.unit else "")

    @property
    def elements(self) -> str:
        """What `count` counts."""
        return {"numel": "parameters", "cols": "columns"}.get(self.of, self.of)


MEAN, MEDIAN, LARGEST = "mean over tensors", "median over matrices that changed", "largest of the matrices"
_QUANTITIES = [
    Quantity("sparsity", "share of parameters changed", SHARE, "changed"),
    Quantity("sparsity_bits", "share with changed bits", SHARE, "changed_bits"),
    Quantity("sparsity_bf16", "share changed after rounding to bf16", SHARE, "changed_bf16"),
    Quantity("changed", "share of parameters changed", SHARE, "changed"),
    Quantity("sign_flips", "share with another sign", SHARE, "sign_flips"),
    Quantity("rel_l2", "‖Δ‖ / ‖base‖", LOG),
    Quantity("l2_delta", "‖Δ‖", LOG),
    Quantity("l2_base", "‖base‖", LOG),
    Quantity("l2_tuned", "‖tuned‖", LOG),
    Quantity("mean_abs_delta", "mean |Δ|", LOG),
    Quantity("max_abs_delta", "largest |Δ|", LOG),
    Quantity("mean_delta", "mean Δ", SIGNED),
    Quantity("cosine", "cosine of base and tuned", LINEAR, digits=9),
    Quantity("numel", "parameters", LOG),
    Quantity("top1pct_rows_share", "changes in the 1 % of rows with most", SHARE, pooled=MEAN),
    Quantity("top1pct_cols_share", "changes in the 1 % of columns with most", SHARE, pooled=MEAN),
    Quantity("rows_touched", "share of rows with a change", SHARE, "rows_touched", "rows"),
    Quantity("cols_touched", "share of columns with a change", SHARE, "cols_touched", "cols"),
    Quantity("numeric_rank_percent", "numeric rank, % of full", PERCENT),
    Quantity("rank_at_1e-2_percent", "σ > σ₁/100, % of full", PERCENT),
    Quantity("rank_at_1e-3_percent", "σ > σ₁/1000, % of full", PERCENT),
    Quantity("energy_rank_90_percent", "directions for 90 % of the energy, % of full", PERCENT),
    Quantity("energy_rank_95_percent", "directions for 95 % of the energy, % of full", PERCENT),
    Quantity("energy_rank_99_percent", "directions for 99 % of the energy, % of full", PERCENT),
    Quantity("stable_rank", "stable rank", LOG, pooled=MEDIAN),
    Quantity("entropy_rank", "entropy rank", LOG, pooled=MEDIAN),
    Quantity("top1_share", "σ₁ / ‖Δ‖_F", UNIT, pooled=MEDIAN),
    Quantity("sigma_1", "σ₁ of Δ", LOG, pooled=LARGEST),
    Quantity("angle_u_max", "largest angle of leading left directions", LINEAR, unit="degrees", pooled=LARGEST),
    Quantity("angle_v_max", "largest angle of leading right directions", LINEAR, unit="degrees", pooled=LARGEST),
    Quantity("nss", "drift of the spectrum, NSS", LOG, pooled="mean over matrices"),
    Quantity("overlap_u", "overlap of leading left directions", UNIT, pooled="mean over matrices"),
    Quantity("overlap_v", "overlap of leading right directions", UNIT, pooled="mean over matrices"),
    Quantity("principal_overlap", "changes on principal weights", UNIT),
    Quantity("low_overlap", "changes on low-magnitude weights", UNIT),
    Quantity("adaptivity", "adaptivity, 1 − cos(u, m̂)", UNIT),
    Quantity("log10_eff_lr_std", "spread of the effective learning rate", LINEAR, unit="decades"),
    Quantity("eff_lr_p50", "median effective learning rate", LOG),
    Quantity("equivalent_sgd_lr", "equivalent SGD learning rate", LOG),
    Quantity("sqrt_vhat_mean", "mean √v̂", LOG),
    Quantity("sqrt_vhat_std", "standard deviation of √v̂", LOG),
    Quantity("v_std", "standard deviation of v", LOG),
    Quantity("v_zero", "share with v = 0", SHARE),
    Quantity("update_rms", "root mean square of the step", LOG),
    Quantity("update_saturated", "share with |u| > 0.9", SHARE),
    Quantity("update_small", "share with |u| < 0.1", SHARE),
    Quantity("bf16_visible", "share of weights the step changes in bf16", SHARE),
    Quantity("grad_norm", "norm of the gradient", LOG),
    Quantity("momentum_grad_cosine", "cos(momentum, gradient)", SIGNED),
]
QUANTITIES = {quantity.column: quantity for quantity in _QUANTITIES}
# what the pooling of a group calls a column whose values do not add up
_POOLED = {
    "stable_rank": "stable_rank_median", "entropy_rank": "entropy_rank_median", "top1_share": "top1_share_median",
    "sigma_1": "sigma_1_max", "nss": "nss_mean", "overlap_u": "overlap_u_mean", "overlap_v": "overlap_v_mean",
}  # fmt: skip
_SUMMED = ("rows", "rows_touched", "cols", "cols_touched")
_POOLS: dict[str, Any] = {
    "tensors": tables.pooled, "ranks": tables.pooled_ranks, "subspaces": tables.pooled_subspaces,
}  # fmt: skip


def quantity(column: str, values: pl.Series | None = None) -> Quantity:
    """How to draw a column. `values` decide for one that is not known.

    >>> quantity("sparsity[1e-05]").label
    'share of parameters with |Δ| > 1e-05'
    """
    if column in QUANTITIES:
        return QUANTITIES[column]
    if column.startswith(("sparsity[", "above[")):
        tolerance = column.partition("[")[2].rstrip("]")
        return Quantity(column, f"share of parameters with |Δ| > {tolerance}", SHARE, f"above[{tolerance}]")
    finite = values.drop_nulls().cast(pl.Float64) if values is not None else pl.Series([], dtype=pl.Float64)
    finite = finite.filter(finite.is_finite())
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)  # type: ignore[arg-type]
    if low < 0 < high:
        return Quantity(column, column, SIGNED, pooled=_pooling(column))
    return Quantity(column, column, LOG if low > 0 and high / low > 100 else LINEAR, pooled=_pooling(column))


def _pooling(column: str) -> str:
    """What stands for several tensors in a column that is not listed; those of `columns.py` have a roll-up of their own."""
    return "" if column in TABLES["tensors"] or column in TABLES["adam"] else MEAN


def over_groups(what: Quantity, frames: Iterable[pl.DataFrame]) -> Quantity:
    """The quantity with what `pooled` says in its label, where any row of the frames stands for several tensors."""
    several = any((frame["tensors"] > 1).any() for frame in frames)
    return replace(what, label=f"{what.label}, {what.pooled}") if what.pooled and several else what


def table_of(result: Diff | Moments, column: str) -> str:
    """The table that a column is taken from. Raises `OptionError` for one that cannot be drawn."""
    for table in ("adam",) if isinstance(result, Moments) else ("tensors", "ranks", "subspaces"):
        if column in drawable(result, table):
            return table
    every = [name for table in result.tables for name in drawable(result, table)]
    raise OptionError(
        f"There is no column {column[:80]!r} to draw.", hint=f"Columns here: {', '.join(dict.fromkeys(every))}."
    )


def side_of(result: Diff | Moments, column: str) -> str:
    """The first side of two optimizer states that has values in this column (a gradient is the second's)."""
    if isinstance(result, Moments) and column in result.parameters.columns:
        known = set(result.parameters.filter(pl.col(column).is_not_null())["side"].unique().to_list())
        return next((side for side in result.sides if side in known), "first")
    return "first"


def drawable(result: Diff | Moments, table: str) -> list[str]:
    """The columns of a table that can be drawn by layer and module: numbers, without those that number something."""
    if table not in ("tensors", "ranks", "subspaces", "adam") or table not in result.tables:
        return []
    frame = result.tables[table]
    numbering = {"layer", "expert", "k", "alpha", "rows", "cols", "full_rank", "components", "structural_rank"}
    found = [c for c, kind in frame.schema.items() if kind.is_numeric() and c not in numbering]
    if table == "ranks":
        found += [f"{name}_percent" for name in ("rank_at_1e-2", "rank_at_1e-3")]
        found = [c for c in found if not c.startswith(("numeric_rank", "rank_at", "energy_rank")) or c.endswith("_percent")]
    return [c for c in found if c not in frame.columns or frame[c].null_count() != frame.height]


def rolled(
    result: Diff | Moments, table: str, keys: Sequence[str], side: str = "first", k: int | None = None
) -> pl.DataFrame:
    """One row per group of `keys`: the pooled columns of `table`, how many `tensors` there are, the `name` of a single one.

    Columns that have no pooling of their own (those of one's own measures) are means over tensors, each counted by its
    elements. `k` picks the subspaces (by default the smallest).

    Raises `OptionError` for a side or k that is not there.
    """
    frame = result.tables[table]
    if table == "subspaces" and frame.height:
        k = k or frame.select(pl.col("k").min()).item()
        if k not in frame["k"]:
            known = ", ".join(str(own) for own in frame["k"].drop_nulls().unique().sort())
            raise OptionError(f"Subspaces of {k} directions were not measured.", hint=f"There are those of {known}.")
        frame = frame.filter(pl.col("k") == k)
    if isinstance(result, Moments) and side not in result.sides:
        raise OptionError(f"There is no side {side[:40]!r} here.", hint=f"Draw {' or '.join(result.sides)}.")
    if "duplicate_of" in frame.columns:
        frame = frame.filter(pl.col("duplicate_of").is_null())
    if table == "tensors":
        frame = frame.filter(pl.col("pairing_rule") != CODES)
    if isinstance(result, Moments):
        pooled, frame = result.by(*keys, side=side), frame.filter(pl.col("side") == side)
    elif frame.select(keys).is_unique().all():  # nothing to pool
        return _single(frame, table, keys)
    else:
        pooled = tables.grouped(frame, keys, _POOLS[table])
    pooled = pooled.rename({new: old for old, new in _POOLED.items() if new in pooled.columns})
    names = pl.when(pl.len() == 1).then(pl.col("name").first()).otherwise(None).alias("name")
    weight = pl.col("numel").cast(pl.Float64) if "numel" in frame.columns else pl.lit(1.0)
    sums = [c for c in _SUMMED if c in frame.columns]
    own = [c for c in drawable(result, table) if c in frame.columns and c not in (*pooled.columns, *sums)]
    weights = [pl.when(pl.col(c).is_not_null()).then(weight).otherwise(0.0).sum() for c in own]
    means = [((pl.col(c).cast(pl.Float64) * weight).sum() / w).alias(c) for c, w in zip(own, weights, strict=True)]
    extra = frame.group_by(keys, maintain_order=True).agg(pl.len().alias("tensors"), names, pl.col(sums).sum(), *means)
    return pooled.drop("tensors", strict=False).join(extra, on=list(keys), how="left", nulls_equal=True)


def _single(frame: pl.DataFrame, table: str, keys: Sequence[str]) -> pl.DataFrame:
    if table == "ranks":
        parts = [(100 * pl.col(c) / pl.col("full_rank")).alias(f"{c}_percent") for c in ("rank_at_1e-2", "rank_at_1e-3")]
        frame = frame.with_columns(parts)
    return frame.with_columns(pl.lit(1).alias("tensors"))


def drawn(frame: pl.DataFrame, what: Quantity) -> list[float | None]:
    """The values of a rolled-up frame as they are drawn; None where there is none, or none that is finite."""
    if what.count is not None and what.of in frame.columns:
        column = frame[what.count] / frame[what.of]
    else:
        column = frame[what.column].cast(pl.Float64)
    return [value if value is not None and math.isfinite(value) else None for value in column.to_list()]


def modules(frame: pl.DataFrame) -> list[str]:
    """The modules of a frame, those of one kind together; the familiar ones in their usual order, others in the model's."""
    first = frame.unique("module", keep="first", maintain_order=True).select("module", "kind").rows()

    def place(row: tuple[str, str]) -> tuple[int, int]:
        leaf = row[0].rpartition(".")[2]
        return KINDS.index(row[1]), FAMILIAR.index(leaf) if leaf in FAMILIAR else len(FAMILIAR)

    return [module for module, _ in sorted(first, key=place)]
