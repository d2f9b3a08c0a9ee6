"""Base against tuned weights: principal angles, spectrum drift, and where the changed elements lie (arXiv 2511.08567).

For two m × n matrices W₀ and W₊ whose leading k singular vectors are the columns of U₀, V₀ and U₊, V₊:

* principal angles: cos θᵢ(U) = σᵢ(U₀ᵀU₊), the same for V. Small angles are taken from their sines, which cosines near one
  cannot resolve (Björck & Golub, *Mathematics of Computation* 27, 1973).
* spectrum drift: NSS = ‖σ(W₊) − σ(W₀)‖₂ / ‖σ(W₀)‖₂. By Mirsky's theorem the numerator is at most ‖W₊ − W₀‖_F.
* overlap of the changed elements with the principal mask (the α·m·n largest elements of the rank-k part of |W₀|) and with
  the low-magnitude mask (the α·m·n smallest of |W₀|). An update that does not care has overlap α.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from paramdiff.singular import SMALL, THIN, eigenvalues, gram_of, of_squares, of_svd

Matrix = np.ndarray[Any, Any]
Slices = Callable[[], Iterator[tuple[Matrix, Matrix]]]  # (magnitudes, which of them changed), piece by piece

STEP = 1 << 20  # elements handled at a time


@dataclass
class Leading:
    """All singular values of a matrix, and the leading singular vectors as columns of `u` and `v`.

    Values below `resolution` cannot be told from zero.
    """

    sigma: Matrix
    u: Matrix
    v: Matrix
    resolution: float


def leading(w: Matrix, k: int) -> Leading:
    """Singular values and the k leading singular vectors, in float64. Squares of elements must be within float64.

    >>> found = leading(np.diag([1.0, 3.0, 2.0]), 2)
    >>> found.sigma.round(12).tolist(), abs(found.u).round(12).tolist()
    ([3.0, 2.0, 1.0], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    """
    short = min(w.shape)
    k = min(k, short)
    if w.size <= SMALL or short <= THIN:
        u, sigma, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
        return Leading(sigma, u[:, :k], vt[:k].T, of_svd(sigma, w.shape).resolution)
    tall = w.shape[0] >= w.shape[1]
    gram = gram_of(w)
    spectrum = of_squares(eigenvalues(gram)[0], max(w.shape), float(gram.trace()))
    try:
        asked = {"subset_by_index": [short - k, short - 1], "driver": "evr"}
        vectors = scipy.linalg.eigh(gram, lower=True, check_finite=False, **asked)[1]
    except np.linalg.LinAlgError:
        vectors = scipy.linalg.eigh(gram, lower=True, check_finite=False, driver="ev")[1][:, -k:]
    near = vectors[:, ::-1]  # singular vectors of the short side, largest first
    far = _times(w if tall else w.T, near)
    far, norms = np.linalg.qr(far)  # the norms are the singular values; orthogonal up to the error of the Gram matrix
    far = far * np.where(norms.diagonal() < 0, -1.0, 1.0)
    u, v = (far, near) if tall else (near, far)
    return Leading(spectrum.sigma, u, v, spectrum.resolution)


def _times(w: Matrix, vectors: Matrix) -> Matrix:
    """w @ vectors in float64, piece by piece."""
    step = max(1, STEP // w.shape[1])
    return np.concatenate([w[at : at + step].astype(np.float64) @ vectors for at in range(0, w.shape[0], step)])


def angles(a: Matrix, b: Matrix) -> Matrix:
    """Principal angles in radians, ascending, between the spaces that the orthonormal columns of a and b span.

    >>> angles(np.eye(3)[:, :2], np.eye(3)[:, 1:]).round(6).tolist()
    [0.0, 1.570796]
    """
    inner = a.T @ b
    cosines = np.linalg.svd(inner, compute_uv=False)
    sines = np.linalg.svd(b - a @ inner, compute_uv=False)[::-1]
    result: Matrix = np.arctan2(np.maximum(sines, 0.0), np.maximum(cosines, 0.0))
    return result


def principal_magnitudes(w: Matrix, vectors: Matrix, changed: Callable[[slice], Matrix]) -> Slices:
    """|the part of w in the span of right singular `vectors`|, by rows, beside which elements of those rows changed."""
    step = max(1, STEP // w.shape[1])

    def slices() -> Iterator[tuple[Matrix, Matrix]]:
        for at in range(0, w.shape[0], step):
            rows = slice(at, min(at + step, w.shape[0]))
            part = (w[rows].astype(np.float64) @ vectors) @ vectors.T
            yield np.abs(part).astype(w.dtype), changed(rows)

    return slices


def magnitudes(w: Matrix, changed: Callable[[slice], Matrix]) -> Slices:
    """|w|, by rows, beside which elements of those rows changed."""
    step = max(1, STEP // w.shape[1])

    def slices() -> Iterator[tuple[Matrix, Matrix]]:
        for at in range(0, w.shape[0], step):
            rows = slice(at, min(at + step, w.shape[0]))
            yield np.abs(w[rows]), changed(rows)

    return slices


def changed_among_smallest(slices: Slices, numel: int, share: float) -> float:
    """How many of the changed elements are among the share·numel smallest magnitudes.

    The threshold is found by counting bit patterns of the float32 or float64 magnitudes, 16 bits at a time from the top, so
    that nothing is sorted or kept. Elements equal to it (bf16 weights have many) count in proportion: what breaking ties at
    random gives on average.

    >>> w, changed = np.float32([[1, 2, 2, 3]]), np.array([[True, True, False, False]])
    >>> changed_among_smallest(lambda: iter([(w, changed)]), 4, 0.5)
    1.5
    """
    wanted = share * numel
    prefix, below, below_changed, shift = 0, 0, 0, None
    while shift != 0:
        everything, of_changed, shift = _digits(slices, prefix, shift)
        cumulated = np.cumsum(everything)
        digit = min(int(np.searchsorted(cumulated, wanted - below)), len(everything) - 1)
        below_changed += int(of_changed[:digit].sum())
        below += int(cumulated[digit] - everything[digit])
        prefix = prefix << 16 | digit
    tied, tied_changed = int(everything[digit]), int(of_changed[digit])
    return below_changed + (min(1.0, (wanted - below) / tied) * tied_changed if tied else 0.0)


def _digits(slices: Slices, prefix: int, after: int | None) -> tuple[Matrix, Matrix, int]:
    """Histograms of the next 16 bits of those magnitudes whose bits above them are `prefix`, over all and over changed
    elements, and the position of those bits. `after` is that of the 16 bits before, None at the top."""
    everything, of_changed = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64)
    shift = 0
    for values, changed in slices():
        bits: Matrix = values.view(np.int32 if values.dtype == np.float32 else np.int64).reshape(-1)
        shift = (8 * bits.itemsize if after is None else after) - 16
        kept = np.ones(len(bits), np.bool_) if after is None else bits >> after == prefix
        digits = bits >> shift & 0xFFFF
        everything += np.bincount(digits[kept], minlength=1 << 16)
        of_changed += np.bincount(digits[kept & changed.reshape(-1)], minlength=1 << 16)
    return everything, of_changed, shift


def drift(before: Matrix, after: Matrix) -> float | None:
    """Normalised spectral shift ‖after − before‖₂ / ‖before‖₂; None for a base of zeros.

    >>> drift(np.array([3.0, 4.0]), np.array([3.0, 9.0]))
    1.0
    """
    norm = float(np.linalg.norm(before))
    return float(np.linalg.norm(after - before)) / norm if norm else None


def ks_within(ks: Sequence[int], side: Leading) -> list[int]:
    """Those k for which a leading subspace is defined: as many singular values are above what can be told from zero."""
    return [k for k in ks if k <= len(side.sigma) and side.sigma[k - 1] > side.resolution]
