"""How many elements changed, by each notion of metrics.md §1."""

from __future__ import annotations

from typing import Any

import numpy as np

from paramdiff import dtypes
from paramdiff.arrays import Array, Arrays
from paramdiff.measures.accumulator import Accumulator
from paramdiff.measures.block import PairBlock, differ
from paramdiff.measures.options import Options
from paramdiff.pairing import Aligned

NAME = "change"
ULP_BINS = 66  # distances 0, 1, 2, 3-4, 5-8, …, up to 2^64


def update(acc: Accumulator, block: PairBlock, options: Options) -> None:
    """Fold one block into `acc`: exact counts, whatever the block size, device or order."""
    x, tensor = block.x, block.tensor
    acc.add_count("numel", block.numel)
    acc.add_count("nonfinite_base", block.nonfinite[0])
    acc.add_count("nonfinite_tuned", block.nonfinite[1])
    acc.add_count("nonfinite_either", block.nonfinite[2])
    if block.nothing_moved:
        return
    acc.add_count("changed", block.changed_count)
    if block.same_type:
        acc.add_count("changed_bits", block.moved)
    if tensor.compute != "i64" and not _exact_in_bf16(tensor):
        acc.add_count("changed_bf16", x.count(_changed_in_bf16(block)))
    if options.compat is None:
        for tolerance in options.tolerances:
            above = block.abs_raw_delta > threshold(x, tolerance, block.abs_raw_delta.dtype)
            acc.add_count(above_name(tolerance), x.count(above))
    acc.add_count("sign_flips", _sign_flips(block))
    if _has_ulps(tensor):
        acc.add_array("ulp", x.doubling_bins(_ulp_distance(block), ULP_BINS), size=ULP_BINS)


def columns(acc: Accumulator, tensor: Aligned, options: Options) -> dict[str, Any]:
    """The columns of `tensors.parquet` that this measure gives for one tensor."""
    n, count = tensor.numel, acc.counts
    exact = _exact_in_bf16(tensor)
    # No export rounds integers, so what it shows of them is the change in value.
    changed_bf16 = count["changed"] if exact or tensor.compute == "i64" else count["changed_bf16"]
    row: dict[str, Any] = {
        "changed": count["changed"],
        "sparsity": unchanged(count["changed"], n),
        "changed_bits": count["changed_bits"] if tensor.sides[0].type == tensor.sides[1].type else None,
        "changed_bf16": changed_bf16,
    }
    row["sparsity_bits"] = unchanged(row["changed_bits"], n)
    row["sparsity_bf16"] = unchanged(changed_bf16, n)
    if options.compat is None:
        row |= above_columns(acc, tensor, options)
    row |= {name: count[name] for name in ("sign_flips", "nonfinite_base", "nonfinite_tuned")}
    return row


def above_columns(acc: Accumulator, tensor: Aligned, options: Options) -> dict[str, Any]:
    """`above[τ]` and `sparsity[τ]` for every tolerance."""
    row: dict[str, Any] = {}
    for tolerance in options.tolerances:
        row[above_name(tolerance)] = acc.counts[above_name(tolerance)]
        row[f"sparsity[{tolerance!r}]"] = unchanged(row[above_name(tolerance)], tensor.numel)
    return row


def tables(acc: Accumulator, tensor: Aligned) -> dict[str, list[dict[str, Any]]]:
    """Rows of `histograms.parquet`: ULP distances in bins 0, 1, 2, 3-4, 5-8, … (`lower` to `upper`, both included)."""
    if not _has_ulps(tensor):
        return {}
    counts = acc.arrays.get("ulp", np.zeros(ULP_BINS, dtype=np.int64)).copy()
    counts[0] = tensor.numel - acc.counts["nonfinite_either"] - int(counts[1:].sum())  # blocks in which nothing moved
    edges = [(0.0, 0.0), (1.0, 1.0)] + [(2.0 ** (k - 2) + 1, 2.0 ** (k - 1)) for k in range(2, ULP_BINS)]
    rows = [
        {"histogram": "ulp", "lower": low, "upper": high, "count": int(count)}
        for (low, high), count in zip(edges, counts, strict=True)
        if count
    ]
    return {"histograms": rows}


def unchanged(changed: int | None, numel: int) -> float | None:
    """Sparsity: the unchanged share. None where nothing was counted."""
    return None if changed is None or not numel else 1 - changed / numel


def threshold(x: Arrays, tolerance: float, dtype: Any) -> Any:
    """The largest value of `dtype` that is at most `tolerance`: `d > threshold` ⇔ `d > tolerance` for every d of that type.

    Comparing float32 values with a float64 tolerance rounds the tolerance first, which can put a value that lies exactly
    on it on the wrong side.
    """
    if dtype != x.f32:
        return tolerance
    single = np.float32(tolerance)
    if float(single) > tolerance:
        single = np.nextafter(single, np.float32(-np.inf))
    return single if x.eager else float(single)


def above_name(tolerance: float) -> str:
    return f"above[{tolerance!r}]"


def _exact_in_bf16(tensor: Aligned) -> bool:
    return all(side.type.within_bf16 for side in tensor.sides)


def round_to_bf16(x: Arrays, value: Array, *, may_hold_nan: bool) -> Array:
    """float32 or float64 → the nearest bf16 value, ties to even, as float32 (float64 goes through float32)."""
    single = x.cast(value, x.f32)
    bits = single.view(x.i32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) & -0x10000).view(x.f32)
    return x.where(x.isnan(single), single, rounded) if may_hold_nan else rounded


def _changed_in_bf16(block: PairBlock) -> Array:
    nan = block.finite is not None
    a, b = (round_to_bf16(block.x, v, may_hold_nan=nan) for v in (block.raw_a, block.raw_b))
    return differ(block.x, a, b, may_hold_nan=nan)


def _sign_flips(block: PairBlock) -> Any:
    a, b, x = block.raw_a, block.raw_b, block.x
    if x.eager and _has_ulps(block.tensor) and block.types[0].width > 8:
        a, b = a[block.opposite], b[block.opposite]
    return x.count(((a < 0) & (b > 0)) | ((a > 0) & (b < 0)))


def _has_ulps(tensor: Aligned) -> bool:
    a, b = (side.type for side in tensor.sides)
    return a.ordered and b.ordered


def _ulp_distance(block: PairBlock) -> Array:
    """Distance in representable values of the common type: the stored one if both sides share it, else the wider."""
    x = block.x
    if block.same_type:
        pairs = [dtypes.sign_and_magnitude(x, block.types[0], bits) for bits in block.moved_bits]
        (a, width), (b, _) = pairs
    else:
        a, b = block.moved_bits
        width = 32 if block.tensor.compute == "f32" else 64
    distance = x.ulps(a, b, width)
    return distance if block.finite is None else x.where(block.finite, distance, 0)
