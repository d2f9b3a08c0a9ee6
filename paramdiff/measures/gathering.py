"""Δ of one matrix, gathered while its blocks stream by in order.

On the CPU it begins as a list of entries. Most updates by plain SGD stay one, and `singular.of_entries` is then orders of
magnitude cheaper than anything dense. Past `FEW` entries

* a tall matrix keeps the rows that hold anything, up to as many as it has columns, and adds them to a Gram matrix whenever
  they are full: two squares of the shorter side at most, however long the matrix;
* a wide one is kept as float32 until it is complete: its Gram matrix needs all rows at once, and reading it again column
  by column would be a second read, in tiny pieces. That is a few times the square of the shorter side.

A matrix to be sketched is kept whole, because it is gone through several times; float64 ones are, because only then the
largest element is known by which to scale: squares of the type's ends are beyond its range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from paramdiff import singular, sketch
from paramdiff.arrays import Array, Arrays
from paramdiff.measures.accumulator import exact_sum

OVERFLOW = "a difference is beyond the range of its type"
FEW = 0.02  # share of entries up to which a matrix is handled as sparse
Parts = list[tuple[int, int, Array, Array]]  # start, length, positions within it, values there


@dataclass
class Found:
    """The spectrum and the sum of squares of Δ · 2^−`exponent`; `note` says why there is none."""

    spectrum: singular.Spectrum | None = None
    energy: float = 0.0
    exponent: int = 0
    note: str | None = None


class Gathering(Protocol):
    """`add` takes the elements `start` to `start + count` of a matrix in storage order: `delta` (float64) at the positions
    `index` within them, zero elsewhere; or all of them, where `index` is None."""

    def add(self, start: int, count: int, index: Array | None, delta: Array) -> None: ...
    def finish(self) -> Found: ...


def gather(x: Arrays, shape: tuple[int, int], compute: str, *, method: str = "exact", pieces: bool = False) -> Gathering:
    """A gathering for an m × n matrix on the backend `x`; with `method` "sketch", a sketch of it if it is large.

    `pieces` says that blocks may hold a part of a row; the matrix is kept whole then.
    """
    sketched = method == "sketch" and min(shape) > sketch.ABOVE
    whole = pieces or sketched or compute == "f64"
    return OnHost(shape, compute, whole, sketched) if x.eager else OnDevice(x, shape, compute, whole, sketched)


class OnHost:
    """In numpy: entries, then rows or a Gram matrix."""

    def __init__(self, shape: tuple[int, int], compute: str, whole: bool, sketched: bool) -> None:
        self.shape, self.ranged, self.whole = shape, compute == "f64", whole
        self.of_matrix = sketch.of_matrix if sketched else singular.of_matrix
        self.of_entries = sketch.of_entries if sketched else singular.of_entries
        self.dtype = np.float32 if compute == "f32" else np.float64
        self.energy: list[float] = []
        self.parts: Parts | None = []
        self.entries = 0
        self.limit = int(FEW * shape[0] * shape[1])

    def add(self, start: int, count: int, index: Array | None, delta: Array) -> None:
        if not self.ranged:
            self.energy.append(float(np.dot(delta, delta)))
        if self.parts is None:
            self._put(start, count, index, delta)
            return
        if index is None:
            index = np.flatnonzero(delta)  # in a block that mostly changed, the rest of it is zeros
            delta = delta[index]
        self.parts.append((start, count, index, delta))
        self.entries += len(delta)
        if self.entries > self.limit:
            parts, self.parts = self.parts, None
            self._prepare()
            for part in parts:
                self._put(*part)

    def _prepare(self) -> None:
        rows, cols = self.shape
        self.gram: Array | None = None
        self.seen = 0  # rows that hold anything
        self.tall = rows >= cols and rows * cols > singular.SMALL and not self.whole
        self.kept = np.zeros((cols if self.tall else rows, cols), np.float64 if self.tall else self.dtype)

    def _put(self, start: int, count: int, index: Array | None, delta: Array) -> None:
        if not self.tall:
            part = self.kept.reshape(-1)[start : start + count]
            part[slice(None) if index is None else index] = delta
            return
        cols, room = self.shape[1], len(self.kept)
        if index is None:
            self._put_rows(delta.reshape(-1, cols))
            return
        ends = np.searchsorted(index, np.arange(0, count + 1, cols))
        at, rows = self.seen % room, count // cols
        if at and at + rows <= room and (ends[1:] > ends[:-1]).all():  # the common case, without a copy
            place = self.kept[at : at + rows].reshape(-1)
            place[:] = 0
            place[index] = delta
            self.seen += rows
        else:
            block = np.zeros(count)
            block[index] = delta
            self._put_rows(block.reshape(-1, cols))

    def _put_rows(self, block: Array) -> None:
        rows = block[block.any(axis=1)]
        while len(rows):
            at = self.seen % len(self.kept)
            if at == 0 and self.seen:
                self._flush(len(self.kept))
            taken = min(len(rows), len(self.kept) - at)
            self.kept[at : at + taken] = rows[:taken]
            rows = rows[taken:]
            self.seen += taken

    def _flush(self, rows: int) -> None:
        if self.gram is None:
            self.gram = singular.new_gram(self.shape[1])
        singular.add_gram(self.gram, self.kept[:rows])

    def finish(self) -> Found:
        if self.parts is not None:
            return self._of_entries(self.parts)
        if self.ranged:
            return _scaled(lambda values: self.of_matrix(values.reshape(self.shape)), self.kept.reshape(-1))
        energy = exact_sum(self.energy)
        if not math.isfinite(energy):
            return Found(note=OVERFLOW)
        if not self.tall:
            return Found(self.of_matrix(self.kept), energy)
        if self.gram is None:
            return Found(singular.of_matrix(self.kept[: self.seen]).padded(self.shape[1]), energy)
        self._flush((self.seen - 1) % len(self.kept) + 1)
        del self.kept
        return Found(singular.of_gram(self.gram, self.seen), energy)

    def _of_entries(self, parts: Parts) -> Found:
        parts = parts or [(0, 0, np.zeros(0, np.int64), np.zeros(0))]
        where = np.concatenate([start + index for start, _, index, _ in parts])
        values = np.concatenate([delta for *_, delta in parts])
        if self.ranged:
            return _scaled(lambda scaled: self.of_entries(where, scaled, self.shape), values)
        energy = exact_sum(self.energy)
        if not math.isfinite(energy):
            return Found(note=OVERFLOW)
        return Found(self.of_entries(where, values, self.shape), energy)


def _scaled(solve: Callable[[Array], singular.Spectrum], values: Array) -> Found:
    """`solve` on the values times the power of two that brings the largest of them near one."""
    largest = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(largest):
        return Found(note=OVERFLOW)
    exponent = math.frexp(largest)[1]
    values = np.ldexp(values, -exponent)
    return Found(solve(values), float(np.dot(values, values)), exponent)


class OnDevice:
    """In torch: a Gram matrix for tall matrices, the matrix itself for others; only the eigenvalues leave the device."""

    KEPT = 1 << 22  # elements up to which a matrix is kept whole, whatever its shape

    def __init__(self, x: Any, shape: tuple[int, int], compute: str, whole: bool, sketched: bool) -> None:
        self.x, self.torch, self.shape, self.ranged = x, x.torch, shape, compute == "f64"
        self.of_matrix = sketch.of_matrix if sketched else singular.of_matrix
        self.on_host = self.ranged or sketched or shape[0] * shape[1] <= singular.SMALL
        rows, cols = shape
        self.energy: list[Any] = []
        self.whole = whole or self.on_host or rows < cols or rows * cols <= self.KEPT
        dtype = x.f32 if compute == "f32" else x.f64
        if self.whole:
            self.kept = self.torch.zeros(rows * cols, dtype=dtype, device=x.device)
        else:
            self.gram = self.torch.zeros((cols, cols), dtype=x.f64, device=x.device)

    def add(self, start: int, count: int, index: Array | None, delta: Array) -> None:
        self.energy.append(self.x.dot(delta, delta))
        if self.whole:
            self.kept[start : start + count] = delta
        else:
            rows = delta.reshape(-1, self.shape[1])
            self.gram.addmm_(rows.T, rows)

    def finish(self) -> Found:
        if self.ranged:
            values = self.kept.cpu().numpy()
            return _scaled(lambda scaled: self.of_matrix(scaled.reshape(self.shape)), values)
        energy = exact_sum(self.x.scalars_to_host(self.energy, self.x.f64))
        if not math.isfinite(energy):
            return Found(note=OVERFLOW)
        if self.on_host:
            return Found(self.of_matrix(self.kept.reshape(self.shape).cpu().numpy()), energy)
        gram = self._gram_of_kept() if self.whole else self.gram
        try:
            squares = self.torch.linalg.eigvalsh(gram).cpu().numpy()
        except self.torch.linalg.LinAlgError:  # the host has other drivers
            spectrum = singular.of_gram(gram.cpu().numpy(), max(self.shape))
            spectrum.note = spectrum.note or "the device's eigenvalues did not converge; the host's did"
            return Found(spectrum, energy)
        return Found(singular.of_squares(squares, max(self.shape), float(gram.trace())), energy)

    def _gram_of_kept(self) -> Any:
        kept = self.kept.reshape(self.shape)
        kept = kept.T if self.shape[0] < self.shape[1] else kept
        short = kept.shape[1]
        gram = self.torch.zeros((short, short), dtype=self.x.f64, device=self.x.device)
        step = max(1, (1 << 24) // short)
        for at in range(0, kept.shape[0], step):
            rows = kept[at : at + step].to(self.x.f64)
            gram.addmm_(rows.T, rows)
        return gram
