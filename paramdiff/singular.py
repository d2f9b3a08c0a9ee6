"""Singular values of one matrix in float64, by the cheapest route that is exact for it.

Four routes, named in `Spectrum.method`:

* `svd`: LAPACK on the matrix itself, for small ones. Resolves σ down to about 1e-15·σ₁.
* `gram`: eigenvalues of AᵀA or AAᵀ, whichever is smaller, for all others; several times faster. Squaring costs half the
  digits: σ is resolved down to about 1e-8·σ₁, and `Spectrum` says how far.
* `sparse`: rows and columns without entries are dropped, and what is left is split into connected components of the graph
  whose edges are the entries; each is a small problem of its own, and their singular values together are the matrix's.
* `sketch`: see `paramdiff.sketch`.

How the errors are bounded (u = 2⁻⁵³): a Gram matrix summed over k terms is off by at most k·u·‖A‖_F² in norm (Higham,
*Accuracy and Stability of Numerical Algorithms*, §3.5), its eigenvalues by another n·u·‖A‖_F²; singular values of a
direct SVD are off by a modest multiple of u·σ₁, here taken as 6·max(m, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.linalg import LinAlgError
from scipy import sparse
from scipy.linalg import blas
from scipy.sparse import csgraph

Matrix = np.ndarray[Any, Any]

U = 2.0**-53  # unit roundoff of float64
SMALL = 1 << 16  # elements up to which a direct SVD costs little
THIN = 32  # a short side up to which it does, too
SLICE = 1 << 20  # elements of a matrix that are brought to float64 at a time
DENSE = 0.1  # above this share of entries a component is handled as a dense matrix


@dataclass
class Spectrum:
    """Singular values of an m × n matrix: `sigma`, float64, min(m, n) of them, descending.

    Each differs from the true one by at most `sigma_error`, and its square by at most `square_error`, or by whichever of
    the two is more. `structural_rank` bounds the rank by where the entries are, and `components` counts the connected
    parts, both known for sparse matrices only. `note` says what went other than planned.
    """

    sigma: Matrix
    method: str
    sigma_error: float = 0.0
    square_error: float = 0.0
    structural_rank: int | None = None
    components: int | None = None
    note: str | None = None

    @property
    def resolution(self) -> float:
        """The size below which a singular value cannot be told from zero."""
        return max(self.sigma_error, float(np.sqrt(self.square_error)))

    def uncertain_at(self, cut: float) -> bool:
        """Whether a singular value lies so close to `cut` that the arithmetic cannot say on which side."""
        near = np.abs(self.sigma - cut) <= self.sigma_error
        near |= np.abs(self.sigma**2 - cut**2) <= self.square_error
        return bool(near.any())

    def padded(self, length: int) -> Spectrum:
        """With zeros at the end, the singular values of rows and columns that were dropped as empty."""
        self.sigma = np.concatenate([self.sigma, np.zeros(length - len(self.sigma))])
        return self


def of_matrix(a: Matrix) -> Spectrum:
    """Singular values of a dense float32 or float64 matrix whose squares are within float64.

    >>> of_matrix(np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])).sigma.tolist()
    [4.0, 3.0]
    """
    length = min(a.shape)
    rows, cols = a.any(axis=1), a.any(axis=0)
    if not rows.any():
        return Spectrum(np.zeros(length), "svd")
    used = np.count_nonzero(rows) / a.shape[0], np.count_nonzero(cols) / a.shape[1]
    if min(used) < 0.5:  # otherwise copying costs more than it saves
        a = a[np.ix_(rows, cols)]
    if a.size <= SMALL or min(a.shape) <= THIN:
        return _svd(a.astype(np.float64, copy=False)).padded(length)
    return of_gram(gram_of(a), max(a.shape)).padded(length)


def gram_of(a: Matrix) -> Matrix:
    """The lower triangle of the smaller of AᵀA and AAᵀ, in float64."""
    gram, tall = new_gram(min(a.shape)), a.shape[0] >= a.shape[1]
    step = max(1, SLICE // min(a.shape))
    for at in range(0, max(a.shape), step):
        add_gram(gram, a[at : at + step] if tall else a[:, at : at + step].T)
    return gram


def new_gram(n: int) -> Matrix:
    """An n × n matrix of zeros for `add_gram`."""
    return np.zeros((n, n), order="F")


def add_gram(gram: Matrix, rows: Matrix) -> None:
    """gram += rowsᵀ·rows in float64, in the lower triangle only."""
    transposed = rows.T.astype(np.float64, order="F" if rows.flags.c_contiguous else "C", copy=False)
    if transposed.flags.f_contiguous:
        blas.dsyrk(1.0, transposed, beta=1.0, c=gram, overwrite_c=1, lower=1)
    else:
        blas.dsyrk(1.0, transposed.T, beta=1.0, c=gram, overwrite_c=1, lower=1, trans=1)


def of_gram(gram: Matrix, terms: int) -> Spectrum:
    """Singular values of A from the lower triangle of AᵀA, each element of which is a sum of `terms` products.

    >>> of_gram(np.array([[16.0, 0.0], [0.0, 9.0]]), 2).sigma.tolist()
    [4.0, 3.0]
    """
    used = np.flatnonzero(gram.diagonal() > 0)  # an empty column of A is an empty row and column of its Gram matrix
    length, energy = len(gram), float(gram.diagonal().sum())
    if len(used) < length:
        gram = gram[np.ix_(used, used)]
    squares, note = eigenvalues(gram) if len(used) else (np.zeros(0), None)
    return of_squares(squares, terms, energy, note).padded(length)


def of_squares(squares: Matrix, terms: int, energy: float, note: str | None = None) -> Spectrum:
    """Singular values of A from the ascending eigenvalues of a Gram matrix with trace `energy`; see `of_gram`."""
    sigma = np.sqrt(np.maximum(squares[::-1], 0.0))
    return Spectrum(sigma, "gram", square_error=(terms + len(squares)) * U * energy, note=note)


def eigenvalues(gram: Matrix) -> tuple[Matrix, str | None]:
    """Ascending eigenvalues of a symmetric matrix given by its lower triangle. Another driver where one fails."""
    failed: list[str] = []
    for driver in ("evd", "ev", "evx"):
        try:
            values = scipy.linalg.eigh(gram, lower=True, eigvals_only=True, driver=driver, check_finite=False)
            return values, _fell_back(failed, driver)
        except LinAlgError:
            failed.append(driver)
    raise LinAlgError("no eigenvalue driver converged")


def _svd(a: Matrix) -> Spectrum:
    failed: list[str] = []
    for driver in ("gesdd", "gesvd"):
        try:
            sigma = scipy.linalg.svd(a, compute_uv=False, lapack_driver=driver, check_finite=False)
            return of_svd(sigma, a.shape, _fell_back(failed, driver))
        except LinAlgError:
            failed.append(driver)
    raise LinAlgError("no SVD driver converged")


def of_svd(sigma: Matrix, shape: tuple[int, ...], note: str | None = None) -> Spectrum:
    """Singular values that LAPACK found for an m × n matrix, with the bound on their error."""
    return Spectrum(sigma, "svd", sigma_error=6 * max(shape) * U * float(sigma[0]), note=note)


def _fell_back(failed: list[str], driver: str) -> str | None:
    return f"{' and '.join(failed)} did not converge; {driver} did" if failed else None


def of_entries(positions: Matrix, values: Matrix, shape: tuple[int, int]) -> Spectrum:
    """Singular values of a sparse m × n matrix with `values` at the flat, distinct `positions` and zero elsewhere.

    >>> of_entries(np.array([0, 4, 7]), np.array([3.0, 5.0, 12.0]), (3, 3)).sigma.round(12).tolist()
    [13.0, 3.0, 0.0]
    """
    kept = np.flatnonzero(values)
    values = values[kept].astype(np.float64)
    row_numbers, col_numbers = np.divmod(positions[kept], shape[1])
    rows, row_of = np.unique(row_numbers, return_inverse=True)
    cols, col_of = np.unique(col_numbers, return_inverse=True)
    length = min(shape)
    if not len(values):
        return Spectrum(np.zeros(length), "sparse", structural_rank=0, components=0)
    matrix = sparse.csr_array((values, (row_of, col_of)), shape=(len(rows), len(cols)))
    bound = int(csgraph.structural_rank(matrix))
    edges = sparse.coo_array(
        (np.ones(len(values), np.int8), (row_of, len(rows) + col_of)), shape=(len(rows) + len(cols),) * 2
    )
    count, label = csgraph.connected_components(edges, directed=False)
    heights = np.bincount(label[: len(rows)], minlength=count)
    widths = np.bincount(label[len(rows) :], minlength=count)
    single = np.minimum(heights, widths) == 1  # one row or one column: its norm is its only singular value
    squares = np.bincount(label[row_of], weights=values**2, minlength=count)
    parts = [np.sqrt(squares[single])]
    spectrum = Spectrum(np.zeros(0), "sparse", structural_rank=bound, components=int(count))
    if single.any():
        spectrum.sigma_error = float(np.max(np.maximum(heights, widths)[single] * U * parts[0]))
    for part in np.flatnonzero(~single):
        in_rows, in_cols = label[: len(rows)] == part, label[len(rows) :] == part
        found = _component(matrix[in_rows][:, in_cols])
        parts.append(found.sigma)
        spectrum.sigma_error = max(spectrum.sigma_error, found.sigma_error)
        spectrum.square_error = max(spectrum.square_error, found.square_error)
        spectrum.note = spectrum.note or found.note
    sigma = np.sort(np.concatenate(parts))[::-1]
    spectrum.sigma = sigma[:bound]  # the rest are zero in exact arithmetic, whatever rounding made of them
    return spectrum.padded(length)


def _component(matrix: Any) -> Spectrum:
    """Singular values of one connected component, a scipy sparse matrix without empty rows or columns."""
    height, width = matrix.shape
    if height * width <= SMALL or min(height, width) <= THIN or matrix.nnz > DENSE * height * width:
        return of_matrix(matrix.toarray())
    tall = matrix if height >= width else matrix.T.tocsr()
    terms = int(np.bincount(tall.indices).max())  # of any column; a product of two has no more
    return of_gram((tall.T @ tall).toarray(order="F"), terms)
