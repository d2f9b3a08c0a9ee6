"""Of what rank is the change? Singular values of Δ for every matrix, and every definition of rank (metrics.md §4).

This measure sees each tensor whole (see `WholeTensorMeasure`): a Gram matrix is too large to hand around in parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.linalg import LinAlgError

from paramdiff import names
from paramdiff.arrays import Arrays
from paramdiff.columns import TABLES
from paramdiff.machine import memory
from paramdiff.measures.accumulator import Accumulator
from paramdiff.measures.block import PairBlock
from paramdiff.measures.gathering import Found, Gathering, gather
from paramdiff.measures.options import Options
from paramdiff.measures.ranks import definitions
from paramdiff.pairing import Aligned

NAME = "spectrum"
_COLUMNS = [column for column in TABLES["ranks"] if column != "name"]  # which is added to the rows of every table


@dataclass
class _State:
    """Of the tensor that streams by: the matrix in progress (one expert of a stack), and what came before it."""

    number: int = 0
    gathering: Gathering | None = None
    beyond: list[Any] = field(default_factory=list)  # counts of elements that are NaN or infinite on either side
    found: list[Found] = field(default_factory=list)


def update(acc: Accumulator, block: PairBlock, options: Options) -> None:
    """Take in one block. Blocks come in order and may begin and end amid a matrix."""
    tensor = block.tensor
    if not tensor.is_matrix or tensor.duplicate_of or _too_large(tensor):
        return
    if acc.state is None:
        acc.state = _State()
    state: _State = acc.state
    for number, start, part in _parts(tensor, block):
        if number != state.number:
            _complete(state, block.x)
            state.number = number
        if state.gathering is None:
            pieces = block.window.cols < tensor.cols
            state.gathering = gather(block.x, tensor.matrices[1:], tensor.compute, method=options.method, pieces=pieces)
        _take(state, state.gathering, block, start, part)


def _parts(tensor: Aligned, block: PairBlock) -> Iterator[tuple[int, int, slice]]:
    """The matrices that a block touches: number, first element within it, elements within the block."""
    _, rows, cols = tensor.matrices
    size, begin = rows * cols, block.window.start
    end = begin + block.numel
    for number in range(begin // size, (end - 1) // size + 1):
        first, last = max(begin, number * size), min(end, (number + 1) * size)
        yield number, first - number * size, slice(first - begin, last - begin)


def _take(state: _State, gathering: Gathering, block: PairBlock, start: int, part: slice) -> None:
    if not block.x.eager or block.nonfinite[2]:
        state.beyond.append(block.beyond(part))
    if block.nothing_moved:
        return
    if block.index is None:
        gathering.add(start, part.stop - part.start, None, block.delta64[part])
        return
    low, high = np.searchsorted(block.index, (part.start, part.stop))
    if low < high:
        gathering.add(start, part.stop - part.start, block.index[low:high] - part.start, block.delta64[low:high])


def _complete(state: _State, x: Arrays) -> None:
    assert state.gathering is not None
    beyond = sum(x.scalars_to_host(state.beyond, x.i64))
    if beyond:
        state.found.append(Found(note=f"{beyond} elements are NaN or infinite"))
    else:
        try:
            state.found.append(state.gathering.finish())
        except (LinAlgError, MemoryError) as error:
            state.found.append(Found(note=str(error) or "out of memory"))
    state.gathering, state.beyond = None, []


def finish(acc: Accumulator, tensor: Aligned, options: Options, x: Arrays) -> None:
    """After the last block: turn what was gathered into spectra, `acc.results["found"]`, one for each matrix."""
    if acc.state is not None:
        _complete(acc.state, x)
        acc.results["found"] = acc.state.found
        acc.state = None


def columns(acc: Accumulator, tensor: Aligned, options: Options) -> dict[str, Any]:
    """Nothing for `tensors.parquet`: a tensor may hold many matrices, which have a table of their own."""
    return {}


def tables(acc: Accumulator, tensor: Aligned) -> dict[str, list[dict[str, Any]]]:
    """Rows of `ranks.parquet`, one per matrix, and of `spectra.parquet`, one per singular value."""
    ranks: list[dict[str, Any]] = []
    spectra: list[dict[str, Any]] = []
    if not tensor.is_matrix:
        return {"ranks": ranks, "spectra": spectra}
    place = names.place(tensor.name)
    count, rows, cols = tensor.matrices
    found: list[Found] = acc.results.get("found") or [Found(note=_why_none(tensor))] * max(count, 1)
    for number, one in enumerate(found):
        expert = number if tensor.is_stack else place.expert
        row = dict.fromkeys(_COLUMNS) | {"layer": place.layer, "module": place.module, "kind": place.kind}
        row |= {"expert": expert, "rows": rows, "cols": cols, "note": one.note}
        if one.spectrum is not None:
            row |= definitions(one.spectrum, (rows, cols), one.energy, one.exponent)
            with np.errstate(over="ignore", under="ignore"):
                sigma = np.ldexp(one.spectrum.sigma, one.exponent)
            spectra.append({"expert": expert, "index": np.arange(1, len(sigma) + 1), "sigma": sigma})
        ranks.append(row)
    return {"ranks": ranks, "spectra": spectra}


def scratch(tensor: Aligned) -> int:
    """Bytes that one worker needs at most while it works on a tensor (see `gathering`)."""
    if not tensor.is_matrix or tensor.duplicate_of:
        return 0
    _, rows, cols = tensor.matrices
    kept = rows * cols * (8 if tensor.compute == "f64" else 4) if rows < cols or tensor.compute == "f64" else 8 * cols**2
    return kept + 16 * min(rows, cols) ** 2


def _too_large(tensor: Aligned) -> bool:
    return scratch(tensor) > memory()


def _why_none(tensor: Aligned) -> str:
    if tensor.duplicate_of:
        return f"tied to {tensor.duplicate_of}, whose spectrum is its own"
    if not tensor.numel:
        return "no elements"
    return f"needs {scratch(tensor) / 1e9:.0f} GB of memory"
