"""The leading singular values of a matrix at a fraction of the cost of all: random subspace iteration, with an error bound.

`ROUNDS` rounds of Q ← orth(A·Aᵀ·Q) from a Gaussian start, then the singular values of QᵀA (Halko, Martinsson & Tropp, *SIAM
Review* 53, 2011, Alg. 4.4 and 5.1). But for rounding they never exceed the true ones, and each lies within ‖A·v − σ·u‖ of
some true singular value (Parlett, *The Symmetric Eigenvalue Problem*, §4.5): that residual is what `Spectrum.sigma_error`
states, the largest over all that are given. The start depends on the shape alone, so that a run repeats itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from paramdiff.singular import Spectrum

KEPT = 64  # leading singular values that are given
EXTRA = 16  # more directions than that, which are cut off again
ROUNDS = 4
FAR = 40  # exponents of two: products of float32 are safe within
ABOVE = 512  # a shorter side up to which the exact spectrum costs little more


def of_matrix(a: Any) -> Spectrum:
    """The `KEPT` leading singular values of a numpy or scipy sparse matrix of float32 or float64.

    >>> a = np.outer(np.arange(700.0), np.ones(600))
    >>> found = of_matrix(a)
    >>> bool(abs(found.sigma[0] / np.linalg.norm(a) - 1) < 1e-12), found.sigma_error < 1e-3
    (True, True)
    """
    random = np.random.Generator(np.random.PCG64(seed=list(a.shape)))
    kind = a.dtype.type
    exponent = int(np.frexp(max(a.max(), -a.min()))[1])
    exponent = exponent if abs(exponent) > FAR else 0  # a power of two brings it back from the ends of the type's range
    if exponent:
        a = _scaled(a, -exponent)
    turned = random.standard_normal((a.shape[1], min(KEPT + EXTRA, *a.shape)), dtype=np.float32).astype(kind)
    for _ in range(ROUNDS):
        basis = _orthonormal(a @ turned)
        turned = _orthonormal(a.T @ basis)
    basis = _orthonormal(a @ turned)
    # Aᵀu = σv holds for these by construction; the residual is in Av = σu alone.
    right, sigma, left = np.linalg.svd((a.T @ basis).astype(np.float64), full_matrices=False)
    sigma, right, left = sigma[:KEPT], right[:, :KEPT].astype(kind), basis @ left[:KEPT].T.astype(kind)
    residuals = np.linalg.norm((a @ right).astype(np.float64) - left * sigma, axis=0)
    return Spectrum(np.ldexp(sigma, exponent), "sketch", sigma_error=float(np.ldexp(residuals.max(), exponent)))


def _scaled(a: Any, exponent: int) -> Any:
    if sparse.issparse(a):
        scaled = a.copy()
        scaled.data = np.ldexp(a.data, exponent)
        return scaled
    return np.ldexp(a, exponent)


def of_entries(positions: Any, values: Any, shape: tuple[int, int]) -> Spectrum:
    """The same for a sparse matrix; arguments as for `singular.of_entries`."""
    return of_matrix(sparse.csr_array((values, np.divmod(positions, shape[1])), shape=shape))


def _orthonormal(a: Any) -> Any:
    return np.linalg.qr(a)[0]
