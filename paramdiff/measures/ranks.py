"""The ranks of a matrix, by every definition in use, from its singular values (metrics.md §4)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from paramdiff.singular import Spectrum

CUTS = {"rank_at_1e-2": 1e-2, "rank_at_1e-3": 1e-3}
ENERGIES = {"energy_rank_90": 0.90, "energy_rank_95": 0.95, "energy_rank_99": 0.99}
SINGLE = 2.0**-23  # float32's machine epsilon, as torch.linalg.matrix_rank takes it
TIE = 1e-12  # relative: a cumulated energy this close below its share counts as having reached it


def numeric_cut(sigma_1: float, shape: tuple[int, int]) -> float:
    """σ₁·max(m, n)·2⁻²³, above which `torch.linalg.matrix_rank` counts singular values of a float32 matrix.

    arXiv 2505.11711, Table 2, counts so.
    """
    return sigma_1 * max(shape) * SINGLE


def definitions(spectrum: Spectrum, shape: tuple[int, int], energy: float, exponent: int = 0) -> dict[str, Any]:
    """The columns of `ranks.parquet` for one m × n matrix whose squared elements sum to `energy`.

    `spectrum` and `energy` are those of the matrix times 2^−`exponent`.

    A sketch knows its leading singular values only, and those within `sigma_error`: counts that cannot be told from them are
    null, energy ranks are upper bounds, stable rank is too large and top-1 share too small by what σ₁ is off.

    >>> from paramdiff import singular
    >>> found = definitions(singular.of_matrix(np.diag([3.0, 4.0])), (2, 2), 25.0)
    >>> found["numeric_rank"], found["energy_rank_90"], found["stable_rank"], found["top1_share"]
    (2, 2, 1.5625, 0.8)
    """
    sigma, full = spectrum.sigma, min(shape)
    row: dict[str, Any] = {"method": spectrum.method, "full_rank": full}
    if energy == 0.0:
        return row | _zero()
    first, frobenius = float(sigma[0]), math.sqrt(energy)
    whole = spectrum.method != "sketch"
    cut = numeric_cut(first, shape)
    row["numeric_rank"] = int(np.count_nonzero(sigma > cut)) if whole else None
    for name, share in CUTS.items():
        row[name] = _count_above(spectrum, share * first)
    squares = np.cumsum(sigma**2)
    for name, share in ENERGIES.items():
        row[name] = _energy_rank(squares, share, float(squares[-1]) if whole else energy)
    for name in ("numeric_rank", *ENERGIES):
        row[f"{name}_percent"] = None if row[name] is None else 100 * row[name] / full
    row["stable_rank"] = max(1.0, energy / first**2)
    row["entropy_rank"] = entropy_rank(sigma) if whole else None
    row |= {"sigma_1": _ldexp(first, exponent), "frobenius": _ldexp(frobenius, exponent)}
    row["top1_share"] = min(1.0, first / frobenius)
    row["energy_error"] = abs(float(squares[-1]) - energy) / energy if whole else None
    row["rank_uncertain"] = spectrum.uncertain_at(cut) if whole else None
    row["resolution"] = _ldexp(spectrum.resolution, exponent)
    row |= {"structural_rank": spectrum.structural_rank, "components": spectrum.components, "note": spectrum.note}
    return row


def _ldexp(value: float, exponent: int) -> float:
    with np.errstate(over="ignore", under="ignore"):  # beyond float64: infinity
        return float(np.ldexp(value, exponent))


def _zero() -> dict[str, Any]:
    """A zero update has rank 0 by every definition and no shares."""
    zeros: dict[str, Any] = dict.fromkeys(("numeric_rank", *CUTS, *ENERGIES), 0)
    zeros |= dict.fromkeys((f"{name}_percent" for name in ("numeric_rank", *ENERGIES)), 0.0)
    zeros |= dict.fromkeys(("stable_rank", "entropy_rank", "sigma_1", "frobenius", "resolution"), 0.0)
    zeros |= dict.fromkeys(("structural_rank", "components"), 0)
    return zeros | {"top1_share": None, "energy_error": None, "rank_uncertain": False, "note": None}


def _count_above(spectrum: Spectrum, cut: float) -> int | None:
    above = int(np.count_nonzero(spectrum.sigma > cut))
    if spectrum.method == "sketch" and (above == len(spectrum.sigma) or spectrum.uncertain_at(cut)):
        return None
    return above


def _energy_rank(squares: np.ndarray[Any, Any], share: float, total: float) -> int | None:
    reached = np.flatnonzero(squares >= share * total * (1 - TIE))
    return int(reached[0]) + 1 if len(reached) else None


def entropy_rank(sigma: np.ndarray[Any, Any]) -> float:
    """exp(−Σ p log p) with p = σ/Σσ: the effective rank of Roy & Vetterli, *EUSIPCO* 2007.

    >>> round(entropy_rank(np.ones(5)), 12)
    5.0
    """
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-np.sum(p * np.log(p))))
