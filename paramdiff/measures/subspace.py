"""Did training turn the weights' leading directions, and does it avoid them? (metrics.md §4, arXiv 2511.08567; `subspaces`)

Holds one matrix of both sides at a time, as float32 (float64 where a side is). The linear algebra runs on the CPU, on
whatever device the elements were read to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.linalg import LinAlgError

from paramdiff import subspaces
from paramdiff.arrays import Arrays, numpy_arrays
from paramdiff.columns import TABLES
from paramdiff.measures.accumulator import Accumulator
from paramdiff.measures.block import PairBlock
from paramdiff.measures.change import round_to_bf16
from paramdiff.measures.matrices import identities, refused, why_not
from paramdiff.measures.options import Options
from paramdiff.pairing import Aligned

NAME = "subspace"
_COLUMNS = [column for column in TABLES["subspaces"] if column != "name"]


@dataclass
class _State:
    """Of the tensor that streams by: the matrix in progress, and the rows made of those before it."""

    sides: list[Any]
    seen: int = 0
    found: list[list[dict[str, Any]]] = field(default_factory=list)


def update(acc: Accumulator, block: PairBlock, options: Options) -> None:
    """Keep the elements of one block. Blocks come in order and may begin and end amid a matrix."""
    tensor = block.tensor
    if refused(acc, tensor, scratch(tensor, options)):
        return
    _, rows, cols = tensor.matrices
    size = rows * cols
    if acc.state is None:
        dtype = np.float32 if tensor.compute == "f32" else np.float64
        acc.state = _State([np.empty(size, dtype) for _ in range(2)])
    state: _State = acc.state
    values = [block.x.to_host(block.whole(side)) for side in range(2)]
    done = 0
    while done < block.numel:
        taken = min(block.numel - done, size - state.seen)
        for kept, value in zip(state.sides, values, strict=True):
            kept[state.seen : state.seen + taken] = value[done : done + taken]
        state.seen += taken
        done += taken
        if state.seen == size:
            base, tuned = (kept.reshape(rows, cols) for kept in state.sides)
            state.found.append(_rows(base, tuned, options))
            state.seen = 0


def finish(acc: Accumulator, tensor: Aligned, options: Options, x: Arrays) -> None:
    """After the last block: keep what was found, let go of the weights."""
    if acc.state is not None:
        acc.results["found"] = acc.state.found
        acc.state = None


def _rows(base: Any, tuned: Any, options: Options) -> list[dict[str, Any]]:
    """One row for each k; `angles` and `sigma` in it become rows of further tables."""
    blank = {"alpha": options.alpha, "chance": options.alpha}
    if not (np.isfinite(base).all() and np.isfinite(tuned).all()):
        return [blank | {"k": k, "note": "holds NaN or infinite elements"} for k in options.ks]

    def changed(rows: slice) -> Any:
        return _in_bf16(base[rows]) != _in_bf16(tuned[rows])

    count = sum(int(np.count_nonzero(changed(slice(at, at + 1024)))) for at in range(0, len(base), 1024))
    exponent, scaled = 0, [base, tuned]
    if base.dtype == np.float64:  # squares of its ends are beyond it; a power of two changes nothing below
        exponent = int(np.frexp(max(np.abs(base).max(), np.abs(tuned).max()))[1])
        scaled = [np.ldexp(side, -exponent) for side in (base, tuned)]
    try:
        before, after = (subspaces.leading(side, max(options.ks)) for side in scaled)
    except (LinAlgError, MemoryError) as error:
        return [blank | {"k": k, "note": str(error) or "out of memory"} for k in options.ks]
    shift, moved = np.linalg.norm(after.sigma - before.sigma), _distance(*scaled)
    common: dict[str, Any] = blank | {
        "changed_bf16": count,
        "nss": subspaces.drift(before.sigma, after.sigma),
        "largest_sigma_shift": float(np.ldexp(np.abs(after.sigma - before.sigma).max(), exponent)),
        "sigma_shift_share": float(shift / moved) if moved else None,
        "low_overlap": _share(subspaces.magnitudes(scaled[0], changed), base.size, options.alpha, count),
    }
    common["sigma"] = [np.ldexp(side.sigma, exponent) for side in (before, after)]
    defined = set(subspaces.ks_within(options.ks, before)) & set(subspaces.ks_within(options.ks, after))
    rows = []
    for k in options.ks:
        if k not in defined:
            rows.append(common | {"k": k, "note": f"has fewer than {k} singular values above zero"})
            continue
        turned = {side: subspaces.angles(getattr(before, side)[:, :k], getattr(after, side)[:, :k]) for side in ("u", "v")}
        gap = before.sigma[k - 1] - (before.sigma[k] if k < len(before.sigma) else 0.0)
        row = common | {"k": k, "gap": float(gap / before.sigma[0]), "angles": turned}
        for side, length in (("u", base.shape[0]), ("v", base.shape[1])):
            row |= {
                f"angle_{side}_max": float(np.degrees(turned[side].max())),
                f"angle_{side}_mean": float(np.degrees(turned[side].mean())),
                f"overlap_{side}": float(np.mean(np.cos(turned[side]) ** 2)),
                f"chance_{side}": k / length,
            }
        principal = subspaces.principal_magnitudes(scaled[0], before.v[:, :k], changed)
        below = _share(principal, base.size, 1 - options.alpha, count)
        row["principal_overlap"] = None if below is None else 1 - below
        rows.append(row)
    return rows


def _in_bf16(values: Any) -> Any:
    return round_to_bf16(numpy_arrays(), values, may_hold_nan=False)


def _distance(base: Any, tuned: Any) -> float:
    """‖tuned − base‖_F in float64, which no difference of float32 leaves."""
    parts = []
    for at in range(0, len(base), 1024):
        rows = slice(at, at + 1024)
        parts.append(np.linalg.norm(tuned[rows].astype(np.float64) - base[rows].astype(np.float64)))
    return float(np.linalg.norm(parts))


def _share(slices: subspaces.Slices, numel: int, share: float, changed: int) -> float | None:
    """Of the changed elements, those among the smallest `share` of all; None where nothing changed."""
    return subspaces.changed_among_smallest(slices, numel, share) / changed if changed else None


def columns(acc: Accumulator, tensor: Aligned, options: Options) -> dict[str, Any]:
    """Nothing for `tensors.parquet`: a tensor may hold many matrices, which have a table of their own."""
    return {}


def tables(acc: Accumulator, tensor: Aligned) -> dict[str, list[dict[str, Any]]]:
    """Rows of `subspaces.parquet` (matrix × k), `angles.parquet` and `weight_spectra.parquet`."""
    made: dict[str, list[dict[str, Any]]] = {"subspaces": [], "angles": [], "weight_spectra": []}
    found: list[list[dict[str, Any]]] = acc.results.get("found", [])
    for number, identity in enumerate(identities(tensor)):
        of_matrix: list[dict[str, Any]] = found[number] if found else [{"note": why_not(tensor) or acc.results.get("note")}]
        expert = {"expert": identity["expert"]}
        for one in of_matrix:
            known = {key: value for key, value in one.items() if key in _COLUMNS}
            made["subspaces"].append(dict.fromkeys(_COLUMNS) | identity | known)
            for side, turned in one.get("angles", {}).items():
                index = np.arange(1, len(turned) + 1)
                made["angles"].append(expert | {"k": one["k"], "side": side, "index": index, "degrees": np.degrees(turned)})
        if "sigma" in of_matrix[0]:
            before, after = of_matrix[0]["sigma"]
            index = np.arange(1, len(before) + 1)
            made["weight_spectra"].append(expert | {"index": index, "sigma_base": before, "sigma_tuned": after})
    return made


def scratch(tensor: Aligned, options: Options) -> int:
    """Bytes that one worker needs at most: both sides, float64 ones scaled as well, and two or three Gram matrices."""
    if why_not(tensor):
        return 0
    _, rows, cols = tensor.matrices
    return rows * cols * (8 if tensor.compute == "f32" else 32) + 24 * min(rows, cols) ** 2


def on_cpu(options: Options) -> bool:
    """The linear algebra is done on the CPU, whatever the device."""
    return True
