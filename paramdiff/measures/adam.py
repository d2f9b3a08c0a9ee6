"""What Adam did with the gradients, from its saved moments (metrics.md §5): scale of v, effective learning rate, the step,
and how far plain SGD would have gone the same way.

A tensor's sides are moments and weights in the order of `Recipe.roles`. All arithmetic is in float64; sums are kept per
block. Elements whose moments are NaN, infinite or (of v) negative are counted in `nonfinite` and left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramdiff import dtypes
from paramdiff.arrays import Array, Arrays
from paramdiff.measures.accumulator import Accumulator
from paramdiff.measures.change import round_to_bf16
from paramdiff.measures.options import Options
from paramdiff.pairing import Aligned
from paramdiff.streaming import Window

# Histograms count float32 patterns by their first 15 bits: 64 bins for every power of two, each at most 1.6 % wide.
SHIFT = 17
INFINITE = 0x7F800000 >> SHIFT  # the last bin: beyond float32, or infinite
BINS = INFINITE + 1
HISTOGRAMS = ("log10_sqrt_vhat", "log10_eff_lr")
QUANTILES = {"p1": 0.01, "p50": 0.5, "p99": 0.99}
SATURATED, SMALL = 0.9, 0.1


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the moments of one tensor become a step: what `torch.optim` does with them, in numbers.

    `roles` says what each side is: m, v, d (the second moment in the denominator, where it is not v), w (weights), m0 and v0
    (moments one step earlier). `c1` and `c2` are the bias corrections 1/(1 − βᵗ), `fresh` the factor of the gradient in m.
    `decay` is decoupled weight decay. `counted`: the corrections are known (or there are none). `scales`: there is an
    effective learning rate; `steps`: the step is known.
    """

    roles: tuple[str, ...]
    lr: float | None
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    c1: float = 1.0
    c2: float = 1.0
    fresh: float = 1.0
    decay: float = 0.0
    ascends: bool = False
    counted: bool = True
    scales: bool = False
    steps: bool = False


class MomentBlock:
    """The values of one window of every side, in float64, by their roles."""

    def __init__(self, x: Arrays, tensor: Aligned, window: Window, raw: Sequence[Array]) -> None:
        self.x, self.tensor, self.numel = x, tensor, window.numel
        self.sides = []
        for side, stored in zip(tensor.sides, raw, strict=True):
            bits = dtypes.patterns(x, side.type, stored)[: window.numel]
            self.sides.append(dtypes.values(x, side.type, bits, "f64"))


class Adam:
    """The measure; `recipes` by the name of the tensor. It reads moments, so it stands alone."""

    NAME = "adam"
    block = MomentBlock

    def __init__(self, recipes: Mapping[str, Recipe]) -> None:
        self.recipes = recipes

    def update(self, acc: Accumulator, block: MomentBlock, options: Options) -> None:
        """Fold one block into `acc`."""
        recipe, x = self.recipes[block.tensor.name], block.x
        found = _finite(acc, dict(zip(recipe.roles, block.sides, strict=True)), x)
        if not len(next(iter(found.of.values()))):
            return
        if "v" in found.of:
            _second_moment(acc, found, recipe, x)
        if "m" in found.of:
            acc.add_sum("mm", found.squares["m"])
        step = _step(acc, found, recipe, x)
        if step is not None and "w" in found.of and recipe.lr is not None:
            acc.add_count("visible", _visible(found.of["w"], step, recipe, x))
        if "m0" in found.of:
            _gradient(acc, found, recipe, x)

    def columns(self, acc: Accumulator, tensor: Aligned, options: Options) -> dict[str, Any]:
        """The columns of `adam.parquet` that come from elements."""
        recipe = self.recipes[tensor.name]
        n = tensor.numel - acc.counts["nonfinite"]
        s = {name: acc.sum(name) for name in ("v", "vv", "sqrt_v", "mm", "uu", "um", "log", "loglog", "gg", "gm", "m0m0")}
        row: dict[str, Any] = {"finite": n, "nonfinite": acc.counts["nonfinite"]}
        has_v = "v" in recipe.roles and n > 0
        root = math.sqrt(recipe.c2)
        row |= _moments_of("v", s["v"], s["vv"], n if has_v else 0)
        row |= _moments_of("sqrt_v", s["sqrt_v"], s["v"], n if has_v else 0)
        hats = n if has_v and recipe.counted else 0
        row |= _moments_of("vhat", s["v"] * recipe.c2, s["vv"] * recipe.c2**2, hats)
        row |= _moments_of("sqrt_vhat", s["sqrt_v"] * root, s["v"] * recipe.c2, hats)
        row["v_zero"] = acc.counts["v_zero"] / n if has_v else None
        scaled = recipe.scales and bool(recipe.lr) and n > 0
        row |= quantiles(acc.arrays.get("eff_lr") if scaled else None)
        row |= _log_spread(s["log"], s["loglog"], n if scaled else 0)
        known = recipe.steps and n > 0
        lr = recipe.lr if known else None
        row["u_norm"] = math.sqrt(s["uu"]) if known else None
        row["mhat_norm"] = math.sqrt(s["mm"]) * recipe.c1 if "m" in recipe.roles and n and recipe.counted else None
        row["u_dot_mhat"] = s["um"] * recipe.c1 if known else None
        row["update_rms"] = lr * math.sqrt(s["uu"] / n) if lr is not None else None
        row["update_max"] = lr * float(acc.maxima["u"]) if lr is not None else None
        row["update_saturated"] = acc.counts["saturated"] / n if known else None
        row["update_small"] = acc.counts["small"] / n if known else None
        row["adaptivity"] = adaptivity(row["u_norm"], row["mhat_norm"], row["u_dot_mhat"])
        row["equivalent_sgd_lr"] = _ratio(lr, row["u_dot_mhat"], row["mhat_norm"])
        row["bf16_visible"] = acc.counts["visible"] / n if lr is not None and "w" in recipe.roles else None
        followed = "m0" in recipe.roles and n > 0
        row["grad_norm"] = math.sqrt(s["gg"]) if followed else None
        row["momentum_norm"] = math.sqrt(s["m0m0"]) if followed else None
        row["momentum_dot_grad"] = s["gm"] if followed else None
        row["momentum_grad_cosine"] = cosine(s["gm"], row["momentum_norm"], row["grad_norm"])
        row["grad_check"] = acc.sum("off") / s["v"] if followed and "v0" in recipe.roles and s["v"] else None
        return row

    def tables(self, acc: Accumulator, tensor: Aligned) -> dict[str, list[dict[str, Any]]]:
        """Histograms, each with arrays of log10 of the edges of bins that hold something (the first holds zeros, too) and of
        counts, which become the rows of `histograms.parquet`."""
        rows = []
        for name, kept in zip(HISTOGRAMS, ("sqrt_vhat", "eff_lr"), strict=True):
            counts = acc.arrays.get(kept, np.zeros(0, dtype=np.int64))
            index = np.flatnonzero(counts)
            with np.errstate(divide="ignore"):
                lower, upper = np.log10(edges(index)), np.log10(edges(index + 1))
            if index.size:
                rows.append({"histogram": name, "lower": lower, "upper": upper, "count": counts[index]})
        return {"histograms": rows}


@dataclass(frozen=True, slots=True)
class Values:
    """One block without elements that have no place in a sum: values by role, roots of the second moments among them, sums
    of squares of first moments."""

    of: dict[str, Array]
    roots: dict[str, Array]
    squares: dict[str, Any]


SECOND = ("v", "d", "v0")


def _values(sides: dict[str, Array], x: Arrays) -> Values:
    roots = {role: x.sqrt(values) for role, values in sides.items() if role in SECOND}
    squares = {role: x.dot(values, values) for role, values in sides.items() if role in ("m", "m0")}
    return Values(sides, roots, squares)


def _finite(acc: Accumulator, sides: dict[str, Array], x: Arrays) -> Values:
    """The values of a block. What is NaN, infinite, or a negative second moment shows in the sums, which are needed anyway;
    looking costs a wait on a GPU, once for each block."""
    found = _values(sides, x)
    total = sum([x.total(root) for root in found.roots.values()] + [*found.squares.values()])
    if math.isfinite(float(x.to_host(total))):
        return found
    moments = {role: values for role, values in sides.items() if role != "w"}
    keep = x.isfinite(next(iter(moments.values())))
    for role, values in moments.items():
        keep = keep & x.isfinite(values)
        if role in SECOND:
            keep = keep & (values >= 0)
    acc.add_count("nonfinite", x.count(~keep))
    where = x.positions(keep)
    return _values({role: values[where] for role, values in sides.items()}, x)


def _second_moment(acc: Accumulator, block: Values, recipe: Recipe, x: Arrays) -> None:
    v, root = block.of["v"], block.roots["v"]
    acc.add_sum("v", x.total(v))
    acc.add_sum("vv", x.dot(v, v))
    acc.add_sum("sqrt_v", x.total(root))
    acc.add_count("v_zero", x.count(v == 0))
    if recipe.counted:
        acc.add_array("sqrt_vhat", _binned(root * math.sqrt(recipe.c2), x), size=BINS)


def _step(acc: Accumulator, block: Values, recipe: Recipe, x: Arrays) -> Array | None:
    """u = m̂/(√v̂ + ε), or m where there is no v; None where the optimizer's step is another one."""
    denominator = None
    if recipe.scales:
        denominator = block.roots["d" if "d" in block.roots else "v"] * math.sqrt(recipe.c2) + recipe.eps
        if recipe.lr:
            effective = recipe.lr / denominator
            acc.add_array("eff_lr", _binned(effective, x), size=BINS)
            logs = x.log(effective)
            acc.add_sum("log", x.total(logs))
            acc.add_sum("loglog", x.dot(logs, logs))
    if not recipe.steps:
        return None
    m = block.of["m"]
    u = m if denominator is None else m * recipe.c1 / denominator
    if not recipe.eps and denominator is not None:  # a moment that never moved, and makes no step
        u = x.where(m == 0, 0.0, u)
    size = abs(u)
    acc.add_sum("uu", x.dot(u, u))
    acc.add_sum("um", x.dot(u, m))
    acc.add_max("u", x.maximum(size), x)
    acc.add_count("saturated", x.count(size > SATURATED))
    acc.add_count("small", x.count(size < SMALL))
    return u


def _visible(w: Array, u: Array, recipe: Recipe, x: Arrays) -> Any:
    """How many weights differ after the step once both are rounded to bf16."""
    assert recipe.lr is not None
    stepped = w * (1 - recipe.lr * recipe.decay) if recipe.decay else w
    stepped = stepped + recipe.lr * u if recipe.ascends else stepped - recipe.lr * u
    before, after = (round_to_bf16(x, values, may_hold_nan=True) for values in (w, stepped))
    return x.count((before != after) & ~(x.isnan(before) & x.isnan(after)))


def _gradient(acc: Accumulator, block: Values, recipe: Recipe, x: Arrays) -> None:
    """g = (m₊ − β₁m)/(1 − β₁), against m, and against what v says of it: v₊ = β₂v + (1 − β₂)g²."""
    m0 = block.of["m0"]
    g = (block.of["m"] - recipe.beta1 * m0) / recipe.fresh
    acc.add_sum("gg", x.dot(g, g))
    acc.add_sum("gm", x.dot(g, m0))
    acc.add_sum("m0m0", block.squares["m0"])
    if "v0" in block.of:
        off = block.of["v"] - recipe.beta2 * block.of["v0"] - (1 - recipe.beta2) * g * g
        acc.add_sum("off", x.total(abs(off)))


def _binned(values: Array, x: Arrays) -> Array:
    """Counts of positive values by the first bits of their float32 patterns."""
    keys = x.cast(values, x.f32).view(x.i32) >> SHIFT
    return x.histogram(x.clip(keys, 0, INFINITE), BINS)


def edges(index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Lower edges of bins of the histograms, as float64.

    >>> edges(np.array([127 * 64, 127 * 64 + 32])).tolist()
    [1.0, 1.5]
    """
    patterns = np.minimum(np.asarray(index, dtype=np.uint32), INFINITE) << np.uint32(SHIFT)
    found: np.ndarray[Any, Any] = patterns.view(np.float32).astype(np.float64)
    return found


def quantiles(counts: np.ndarray[Any, Any] | None) -> dict[str, float | None]:
    """`eff_lr_p1` and so on from a histogram, interpolated within a bin."""
    if counts is None or not counts.any():
        return {f"eff_lr_{name}": None for name in QUANTILES}
    index = np.flatnonzero(counts)
    return {f"eff_lr_{name}": quantile(edges(index), edges(index + 1), counts[index], q) for name, q in QUANTILES.items()}


def quantile(lower: np.ndarray[Any, Any], upper: np.ndarray[Any, Any], counts: np.ndarray[Any, Any], q: float) -> float:
    """The value below which a share q of elements lies, those of a bin spread evenly over it. Bins are in rising order.

    >>> quantile(np.array([0.0, 2.0]), np.array([1.0, 4.0]), np.array([10, 10]), 0.75)
    3.0
    """
    before = np.cumsum(counts)
    rank = q * float(before[-1])
    at = min(int(np.searchsorted(before, rank)), len(counts) - 1)
    share = (rank - float(before[at] - counts[at])) / float(counts[at])
    return float(lower[at] + share * (upper[at] - lower[at])) if math.isfinite(upper[at]) else float(lower[at])


def _moments_of(name: str, total: float, squares: float, n: int) -> dict[str, float | None]:
    """Mean and population standard deviation from Σ and Σ²."""
    if not n:
        return {f"{name}_mean": None, f"{name}_std": None}
    mean = total / n
    return {f"{name}_mean": mean, f"{name}_std": math.sqrt(max(squares / n - mean * mean, 0.0))}


def _log_spread(total: float, squares: float, n: int) -> dict[str, float | None]:
    """Mean and spread of log10 of the effective learning rate, from sums of natural logarithms."""
    found = _moments_of("log10_eff_lr", total, squares, n)
    return {name: None if value is None else value / math.log(10) for name, value in found.items()}


def cosine(dot: float, a: float | None, b: float | None) -> float | None:
    """dot/(a·b), null where that is not defined."""
    if a is None or b is None:
        return None
    found = dot / a / b if a and b else math.nan
    return min(1.0, max(-1.0, found)) if math.isfinite(found) else None


def adaptivity(u_norm: float | None, mhat_norm: float | None, dot: float | None) -> float | None:
    """1 − cos(u, m̂); null without a step."""
    found = None if dot is None else cosine(dot, u_norm, mhat_norm)
    return None if found is None else 1 - found


def _ratio(lr: float | None, dot: float | None, norm: float | None) -> float | None:
    """η·⟨u, m̂⟩/⟨m̂, m̂⟩; null where m̂ is zero throughout."""
    return None if lr is None or dot is None or not norm else lr * dot / norm**2
