"""What the user asked the measures for: a small picklable value that travels with the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from paramdiff.errors import OptionError

COMPATS = ("mukherjee2025",)
METHODS = ("exact", "sketch")


@dataclass(frozen=True, slots=True)
class Options:
    """`tolerances` for `above[τ]`, in the order given; `compat` the name of a published script to reproduce, or None;
    `method` how spectra are found; `ks` and `alpha` the dimensions and the mask share of `subspace`."""

    tolerances: tuple[float, ...] = ()
    compat: str | None = None
    method: str = "exact"
    ks: tuple[int, ...] = (16, 64)
    alpha: float = 0.5


def make_options(
    tolerances: Sequence[float] = (),
    compat: str | None = None,
    method: str = "exact",
    ks: Sequence[int] = (16, 64),
    alpha: float = 0.5,
) -> Options:
    """Validated options. Raises `OptionError` for a negative or non-finite tolerance, an unknown compat or method name, a k
    below 1 or an alpha that is no share.

    >>> make_options([1e-5, 1e-5], None)
    Options(tolerances=(1e-05,), compat=None, method='exact', ks=(16, 64), alpha=0.5)
    """
    for tolerance in tolerances:
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise OptionError(f"The tolerance {tolerance!r} is not a number from 0 up.")
    if compat is not None and compat not in COMPATS:
        raise OptionError(f"Unknown compat name {compat!r}; known: {', '.join(COMPATS)}.")
    if method not in METHODS:
        raise OptionError(f"Unknown method {method[:40]!r}; known: {', '.join(METHODS)}.")
    if not ks:
        raise OptionError("No number of directions k was given.", hint="Give one or more, such as 16,64.")
    for k in ks:
        if not 1 <= k < 1 << 31:
            raise OptionError(f"k = {k} is no number of directions.", hint="Give whole numbers from 1 on.")
    if not 0 < alpha < 1:
        raise OptionError(f"alpha = {alpha!r} is no share of the elements.", hint="Give a number between 0 and 1.")
    unique = tuple(dict.fromkeys(float(t) for t in tolerances))
    return Options(unique or ((1e-5,) if compat else ()), compat, method, tuple(sorted(set(ks))), alpha)
