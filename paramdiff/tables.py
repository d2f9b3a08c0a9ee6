"""Rows → polars frames, and roll-ups of them: sums of counts divided by sums of n, never means of ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from paramdiff.columns import ADAM_HISTOGRAMS, TABLES, meaning
from paramdiff.errors import OptionError
from paramdiff.measures.accumulator import exact_sum
from paramdiff.measures.change import unchanged
from paramdiff.measures.magnitude import derived
from paramdiff.pairing import Uncompared

_TYPES: dict[str, Any] = {
    "String": pl.String, "Int64": pl.Int64, "Float64": pl.Float64,
    "Boolean": pl.Boolean, "List(Int64)": pl.List(pl.Int64), "List(UInt32)": pl.List(pl.UInt32),
}  # fmt: skip
_EXPLODED = {
    ADAM_HISTOGRAMS: ["lower", "upper", "count"],
    "spectra": ["index", "sigma"],
    "angles": ["index", "degrees"],
    "weight_spectra": ["index", "sigma_base", "sigma_tuned"],
}  # given as arrays, stored as one row for each of their elements
_SUMMED = ("numel", "changed", "changed_bits", "changed_bf16", "sign_flips", "nonfinite_base", "nonfinite_tuned", "finite")
_SHARES = {"sparsity": "changed", "sparsity_bits": "changed_bits", "sparsity_bf16": "changed_bf16"}


def frame(table: str, rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """A frame with the types of `columns.py`; columns of a user's own measure get the type of their values."""
    known = rows[0] if rows else dict.fromkeys(c for c in TABLES.get(table, {}) if "[" not in c)
    schema = {}
    for name in known:
        try:
            schema[name] = _TYPES[meaning(table, name)[0]]
        except KeyError:
            schema[name] = None
    # numpy arrays become list columns without passing through Python integers
    data = {name: [row[name] for row in rows] for name in known}
    lists = _EXPLODED.get(table, ())
    series = [pl.Series(n, v, dtype=pl.List(schema[n]) if n in lists else schema[n], strict=False) for n, v in data.items()]
    return pl.DataFrame(series).explode(lists) if lists else pl.DataFrame(series)


def coverage_frame(coverage: Sequence[Uncompared]) -> pl.DataFrame:
    """What was not compared, one row per tensor and side."""
    return frame("coverage", [{**asdict(entry), "shape": list(entry.shape)} for entry in coverage])


def roll_up(tensors: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Pool tensors by `keys` (none: all in one row). Tied duplicates are left out; shares, norms and means are pooled.

    Raises `OptionError` for a key that is no column.
    """
    return grouped(tensors, keys, pooled)


def roll_up_ranks(ranks: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Pool matrices by `keys` (none: all in one row); see `pooled_ranks`. Raises `OptionError` as `roll_up` does."""
    return grouped(ranks, keys, pooled_ranks)


def roll_up_subspaces(found: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Pool matrices by k and `keys`; see `pooled_subspaces`. Raises `OptionError` as `roll_up` does."""
    return grouped(found, ["k", *keys], pooled_subspaces)


def grouped(table: pl.DataFrame, keys: Sequence[str], pool: Callable[[pl.DataFrame], dict[str, Any]]) -> pl.DataFrame:
    """One row of `pool` for each group. Raises `OptionError` for a key that is no column, or one of lists."""
    unknown = [key for key in keys if key not in table.columns]
    if unknown:
        raise OptionError(f"There is no column {unknown[0]!r} to group by.", hint="Try layer, module, kind or expert.")
    nested = [key for key in keys if table.schema[key].is_nested()]
    if nested:
        raise OptionError(f"Column {nested[0]!r} holds lists and cannot group.", hint="Try layer, module or kind.")
    if "duplicate_of" in table.columns:
        table = table.filter(pl.col("duplicate_of").is_null())
    if not keys:
        return pl.DataFrame([pool(table)], infer_schema_length=None)
    groups = table.partition_by(list(keys), as_dict=True, maintain_order=True)
    rows = [{**dict(zip(keys, key, strict=True)), **pool(group)} for key, group in groups.items()]
    # A group in which a column is null throughout must not decide its type.
    types = {name: table.schema[name] for name in rows[0] if name in table.schema} if rows else {}
    return pl.DataFrame(rows, schema_overrides=types, infer_schema_length=None)


def pooled(group: pl.DataFrame) -> dict[str, Any]:
    """One row for a group of tensors, as if their elements were one long vector."""
    row: dict[str, Any] = {"tensors": group.height}
    tolerances = [name for name in group.columns if name.startswith("above[")]
    for name in [*_SUMMED, *tolerances]:
        if name in group.columns:
            column = group[name]
            # A notion that is undefined for one tensor (bits across types) is undefined for the whole.
            row[name] = None if column.null_count() else int(column.sum())
    shares = {**_SHARES, **{name.replace("above", "sparsity", 1): name for name in tolerances}}
    for share, count in shares.items():
        if count in row:
            row[share] = unchanged(row[count], row["numel"])
    if "l2_delta" in group.columns:
        row["max_abs_delta"] = float(group["max_abs_delta"].max() or 0.0)  # type: ignore[arg-type]
        row |= derived(_sums(group), row["finite"])
    return row


def pooled_ranks(group: pl.DataFrame) -> dict[str, Any]:
    """One row for a group of matrices.

    Ranks are added up, and their percentages taken of the added-up full ranks: the rank of all matrices side by side on one
    diagonal. `numeric_rank_percent_mean` is the plain mean over matrices that papers report. Stable rank, entropy rank and
    top-1 share have no such sum; their medians over matrices that changed are given. A sum over values of which one is
    unknown is null.
    """
    known = group.filter(pl.col("method").is_not_null())
    changed = known.filter(pl.col("frobenius") > 0)
    full = int(known["full_rank"].sum())
    row: dict[str, Any] = {
        "matrices": group.height,
        "without_spectrum": group.height - known.height,
        "zero": known.height - changed.height,
        "methods": "+".join(known["method"].unique().sort()),
        "full_rank": full,
    }
    for name in ("numeric_rank", "rank_at_1e-2", "rank_at_1e-3", "energy_rank_90", "energy_rank_95", "energy_rank_99"):
        total = None if known[name].null_count() or not known.height else int(known[name].sum())
        row[name] = total
        row[f"{name}_percent"] = None if total is None or not full else 100 * total / full
    each = known["numeric_rank_percent"]
    row["numeric_rank_percent_mean"] = None if each.null_count() else each.mean()
    row["numeric_rank_percent_min"] = None if each.null_count() else each.min()
    for name in ("stable_rank", "entropy_rank", "top1_share"):
        row[f"{name}_median"] = None if changed[name].null_count() else changed[name].median()
    row["sigma_1_max"] = known["sigma_1"].max()
    row["energy_error_max"] = known["energy_error"].max()
    row["uncertain"] = int(known["rank_uncertain"].sum())
    return row


def pooled_subspaces(group: pl.DataFrame) -> dict[str, Any]:
    """One row for a group of matrices at one k: means, medians and maxima over matrices; the two mask overlaps over all
    changed elements of the group."""
    known = group.filter(pl.col("note").is_null())
    moved = known.filter(pl.col("changed_bf16") > 0)
    row: dict[str, Any] = {"matrices": group.height, "left_out": group.height - known.height}
    for name in ("angle_u_max", "angle_v_max"):
        row[f"{name}_median"], row[name] = known[name].median(), known[name].max()
    for name in ("overlap_u", "chance_u", "overlap_v", "chance_v", "nss", "sigma_shift_share"):
        row[f"{name}_mean"] = known[name].mean()
    row |= {"nss_max": known["nss"].max(), "changed_bf16": int(known["changed_bf16"].sum())}
    for name in ("principal_overlap", "low_overlap"):
        row[name] = float((moved[name] * moved["changed_bf16"]).sum()) / row["changed_bf16"] if row["changed_bf16"] else None
    return row | {"chance": group["chance"].max()}


def _sums(group: pl.DataFrame) -> dict[str, float]:
    def total(values: Any) -> float:
        return exact_sum([value for value in values if value is not None])

    finite = group["finite"]
    return {
        "aa": total(group["l2_base"] ** 2),
        "bb": total(group["l2_tuned"] ** 2),
        "dd": total(group["l2_delta"] ** 2),
        "ab": total(group["dot"]),
        "d": total(group["mean_delta"] * finite),
        "abs_d": total(group["mean_abs_delta"] * finite),
    }
