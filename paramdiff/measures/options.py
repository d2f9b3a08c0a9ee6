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
    `method` how spectra are found."""

    tolerances: tuple[float, ...] = ()
    compat: str | None = None
    method: str = "exact"


def make_options(tolerances: Sequence[float], compat: str | None, method: str = "exact") -> Options:
    """Validated options. Raises `OptionError` for a negative or non-finite tolerance or an unknown compat or method name.

    >>> make_options([1e-5, 1e-5], None)
    Options(tolerances=(1e-05,), compat=None, method='exact')
    """
    for tolerance in tolerances:
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise OptionError(f"The tolerance {tolerance!r} is not a number from 0 up.")
    if compat is not None and compat not in COMPATS:
        raise OptionError(f"Unknown compat name {compat!r}; known: {', '.join(COMPATS)}.")
    if method not in METHODS:
        raise OptionError(f"Unknown method {method[:40]!r}; known: {', '.join(METHODS)}.")
    unique = tuple(dict.fromkeys(float(t) for t in tolerances))
    return Options(unique or ((1e-5,) if compat else ()), compat, method)
