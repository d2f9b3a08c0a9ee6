"""The one accumulator of all measures: named counts, sums, maxima and arrays that merge in any order."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from paramdiff.arrays import Arrays, Count, Number


class Accumulator:
    """What one measure has seen of one tensor, or of a part of it. Small, picklable, mergeable.

    Counts are integers and arrays of integers, so merging is exact. Sums are kept as the list of their float64 parts, one
    for each block, and added once by `math.fsum`, whose result is correctly rounded and so depends on no order.

    >>> left, right = Accumulator(), Accumulator()
    >>> left.add_sum("s", 1e16); right.add_sum("s", 1.0); right.add_sum("s", -1e16)
    >>> left.merge(right); left.sum("s")
    1.0
    """

    def __init__(self) -> None:
        self.counts: dict[str, Count] = defaultdict(int)
        self.sums: dict[str, list[Number]] = defaultdict(list)
        self.maxima: dict[str, Number] = {}
        self.arrays: dict[str, Any] = {}
        self.state: Any = None  # what a whole-tensor measure gathers; gone before the accumulator travels
        self.results: dict[str, Any] = {}  # what it makes of it

    def add_count(self, name: str, count: Count) -> None:
        self.counts[name] = self.counts[name] + count

    def add_sum(self, name: str, part: Number) -> None:
        self.sums[name].append(part)

    def add_max(self, name: str, value: Number, x: Arrays) -> None:
        before = self.maxima.get(name)
        if before is None:
            self.maxima[name] = value
        elif x.eager:
            self.maxima[name] = max(before, value)
        else:
            self.maxima[name] = x.where(before > value, before, value)

    def add_array(self, name: str, counts: Any, *, size: int, at: int = 0) -> None:
        """Add `counts` into the int64 array `name` of length `size`, from position `at` on."""
        if name not in self.arrays:
            if isinstance(counts, np.ndarray):
                self.arrays[name] = np.zeros(size, dtype=np.int64)
            else:
                self.arrays[name] = counts.new_zeros(size)  # int64, as every backend counts
        self.arrays[name][at : at + len(counts)] += counts

    def settle(self, x: Arrays) -> Accumulator:
        """Wait for the device, and bring everything to plain Python and numpy values in few transfers."""
        if not x.eager:
            counts = x.scalars_to_host(list(self.counts.values()), x.i64)
            self.counts = defaultdict(int, zip(self.counts, counts, strict=True))
            self.sums = defaultdict(list, {k: x.scalars_to_host(v, x.f64) for k, v in self.sums.items()})
            maxima = x.scalars_to_host(list(self.maxima.values()), x.f64)
            self.maxima = dict(zip(self.maxima, maxima, strict=True))
            self.arrays = {k: x.to_host(v) for k, v in self.arrays.items()}
        return self

    def merge(self, other: Accumulator) -> None:
        for name, count in other.counts.items():
            self.counts[name] += count
        for name, parts in other.sums.items():
            self.sums[name].extend(parts)
        for name, value in other.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, value), value)
        for name, array in other.arrays.items():
            if name in self.arrays:
                self.arrays[name] += array
            else:
                self.arrays[name] = array
        self.results |= other.results

    def sum(self, name: str) -> float:
        return exact_sum(self.sums[name])


def exact_sum(parts: Sequence[float]) -> float:
    """The correctly rounded sum; inf or NaN where float64 has no other answer.

    >>> exact_sum([1e308, 1e308]), exact_sum([])
    (inf, 0.0)
    """
    try:
        return math.fsum(parts)
    except (OverflowError, ValueError):  # beyond float64, or inf - inf
        with np.errstate(all="ignore"):
            return float(np.sum(parts))
