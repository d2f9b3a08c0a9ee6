"""How far the elements moved: norms, means, the largest step, and histograms of |Δ| and |Δ|/|a| (metrics.md §2).

Elements that are NaN or infinite on either side are counted (`nonfinite_…`) and left out of every number here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from paramdiff.arrays import Array, Arrays
from paramdiff.measures.accumulator import Accumulator
from paramdiff.measures.block import PairBlock
from paramdiff.measures.options import Options
from paramdiff.pairing import Aligned

NAME = "magnitude"

# |Δ|: one bin per power of two, as float32 exponents name them. Bin e holds 2^(e-127) ≤ |Δ| < 2^(e-126); bin 0 what is
# smaller than 2^-126.
DELTA_BINS, DELTA_BIAS = 256, 127
# |Δ|/|a|: bin r holds 2^(r-64) ≤ |Δ|/|a| < 2^(r-63), the first and last without their outer bound; the one after them
# the elements that left zero.
RATIO_BINS, RATIO_BIAS = 128, 64
SMALLEST_NORMAL = 2.0**-126


def update(acc: Accumulator, block: PairBlock, options: Options) -> None:
    """Fold one block into `acc`. Sums are float64, one part for each block."""
    x = block.x
    acc.add_count("nonfinite_either", block.nonfinite[2])
    acc.add_sum("aa", block.energy_a)
    if block.nothing_moved:
        acc.add_sum("bb", block.energy_a)
        acc.add_sum("ab", block.energy_a)
        return
    acc.add_sum("bb", block.energy_b)
    acc.add_sum("ab", block.inner)
    delta = block.delta64
    acc.add_sum("dd", x.dot(delta, delta))
    acc.add_sum("d", x.total(delta))
    acc.add_sum("abs_d", x.total(abs(delta)))
    acc.add_max("max", x.maximum(block.abs_delta), x)
    delta_counts, ratio_counts = _histograms(block)
    acc.add_array("delta", delta_counts, size=DELTA_BINS)
    acc.add_array("ratio", ratio_counts, size=RATIO_BINS + 1)


def columns(acc: Accumulator, tensor: Aligned, options: Options) -> dict[str, Any]:
    """The columns of `tensors.parquet` that this measure gives for one tensor."""
    finite = tensor.numel - acc.counts["nonfinite_either"]
    sums = {name: acc.sum(name) for name in ("aa", "bb", "ab", "dd", "d", "abs_d")}
    return {"finite": finite, "max_abs_delta": float(acc.maxima.get("max", 0.0)), **derived(sums, finite)}


def derived(sums: dict[str, float], finite: int) -> dict[str, float | None]:
    """Norms and means from the sums Σa², Σb², Σab, ΣΔ², ΣΔ, Σ|Δ| over `finite` elements; null where undefined."""
    l2_base, l2_tuned, l2_delta = (math.sqrt(max(sums[name], 0.0)) for name in ("aa", "bb", "dd"))
    return {
        "l2_base": l2_base,
        "l2_tuned": l2_tuned,
        "l2_delta": l2_delta,
        "rel_l2": l2_delta / l2_base if l2_base else None,
        "mean_abs_delta": sums["abs_d"] / finite if finite else None,
        "mean_delta": sums["d"] / finite if finite else None,
        "dot": sums["ab"],
        "cosine": _cosine(sums["ab"], l2_base, l2_tuned),
    }


def _cosine(dot: float, l2_base: float, l2_tuned: float) -> float | None:
    cosine = dot / l2_base / l2_tuned if l2_base and l2_tuned else math.nan
    return min(1.0, max(-1.0, cosine)) if math.isfinite(cosine) else None


def tables(acc: Accumulator, tensor: Aligned) -> dict[str, list[dict[str, Any]]]:
    """Rows of `histograms.parquet`: powers of two from `lower` (included) to `upper`; elements with Δ = 0 are in none."""
    rows = []
    for name, bins, bias in (("log2_abs_delta", DELTA_BINS, DELTA_BIAS), ("log2_rel_delta", RATIO_BINS, RATIO_BIAS)):
        counts = acc.arrays.get("delta" if bins == DELTA_BINS else "ratio", np.zeros(0, dtype=np.int64))
        for index in np.flatnonzero(counts).tolist():
            low, high = float(index - bias), float(index - bias + 1)
            if index == 0:
                low = -math.inf
            if index == bins - 1:
                high = math.inf
            if index == bins:
                low = high = math.inf
            rows.append({"histogram": name, "lower": low, "upper": high, "count": int(counts[index])})
    return {"histograms": rows}


def _histograms(block: PairBlock) -> tuple[Array, Array]:
    if block.x.eager and block.tensor.compute == "f32":
        joint = _joint_histogram(block)
        if joint is not None:
            return joint
    return _histograms_float64(block.x, block.delta64, block.a64)


def _joint_histogram(block: PairBlock) -> tuple[Array, Array] | None:
    """Both histograms from one count over (ratio bin, exponent of Δ), in integer arithmetic on the float32 patterns.

    For normal numbers d = m_d·2^e_d and a = m_a·2^e_a, ⌊log₂(d/a)⌋ = e_d − e_a − [m_d < m_a], which is the difference of
    the patterns, shifted down. Elements with a zero or subnormal base are counted apart; None where they are many, or where
    a Δ is subnormal.
    """
    x = block.x
    if block.finite is not None:
        return None
    odd = np.flatnonzero(block.abs_a < SMALLEST_NORMAL)
    if odd.size > block.moved_numel // 8:
        return None
    d_bits = block.abs_delta.view(np.int32)
    keys = d_bits - block.abs_a.view(np.int32)
    np.clip(keys, -RATIO_BIAS << 23, ((RATIO_BINS - RATIO_BIAS) << 23) - 1, out=keys)
    keys += RATIO_BIAS << 23
    keys >>= 15
    keys &= -DELTA_BINS  # the ratio bin, times DELTA_BINS
    keys += d_bits >> 23
    keys[odd] = 0
    joint = x.histogram(keys, RATIO_BINS * DELTA_BINS).reshape(RATIO_BINS, DELTA_BINS)
    still = block.moved_numel - block.changed_count - int(np.count_nonzero(block.delta[odd] == 0))
    if joint[:, 0].sum() != still + odd.size:  # the exponent of 0 is also that of a subnormal Δ
        return None
    joint[:, 0] = 0
    apart = _histograms_float64(x, block.delta64[odd], block.a64[odd])
    return joint.sum(axis=0) + apart[0], np.append(joint.sum(axis=1), 0) + apart[1]


def _histograms_float64(x: Arrays, delta: Array, base: Array) -> tuple[Array, Array]:
    """The same by way of float64, in which every float32, subnormals included, is normal; any backend."""
    d_bits, a_bits = abs(delta).view(x.i64), abs(base).view(x.i64)
    zero = d_bits == 0
    exponent = x.clip((d_bits >> 52) - 1023, -DELTA_BIAS, DELTA_BINS - DELTA_BIAS - 1) + DELTA_BIAS
    ratio = x.clip((d_bits - a_bits) >> 52, -RATIO_BIAS, RATIO_BINS - RATIO_BIAS - 1) + RATIO_BIAS
    ratio = x.where(a_bits == 0, RATIO_BINS, ratio)
    # Elements with Δ = 0 go to a bin of their own, which is cut off.
    delta_counts = x.histogram(x.where(zero, DELTA_BINS, exponent), DELTA_BINS + 1)[:-1]
    return delta_counts, x.histogram(x.where(zero, RATIO_BINS + 1, ratio), RATIO_BINS + 2)[:-1]
