"""Of what rank is the change? Singular values of Δ for every matrix, and every definition of rank (metrics.md §4).

This measure sees each tensor whole (see `WholeTensorMeasure`): a Gram matrix is too large to hand around in parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.linalg import LinAlgError

from paramdiff.arrays import Arrays
from paramdiff.columns import TABLES
from paramdiff.measures.accumulator import Accumulator
from paramdiff.measures.block import PairBlock
from paramdiff.measures.gathering import FEW, Found, Gathering, gather
from paramdiff.measures.matrices import identities, refused, why_not
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
    if refused(acc, tensor, scratch(tensor, options)):
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
    found: list[Found] = acc.results.get("found", [])
    for number, identity in enumerate(identities(tensor)):
        one = found[number] if found else Found(note=why_not(tensor) or acc.results.get("note"))
        row = dict.fromkeys(_COLUMNS) | identity | {"note": one.note}
        if one.spectrum is not None:
            row |= definitions(one.spectrum, (identity["rows"], identity["cols"]), one.energy, one.exponent)
            with np.errstate(over="ignore", under="ignore"):
                sigma = np.ldexp(one.spectrum.sigma, one.exponent)
            spectra.append({"expert": identity["expert"], "index": np.arange(1, len(sigma) + 1), "sigma": sigma})
        ranks.append(row)
    return {"ranks": ranks, "spectra": spectra}


def scratch(tensor: Aligned, options: Options) -> int:
    """Bytes that one worker needs at most while it works on a tensor (see `gathering`)."""
    if why_not(tensor):
        return 0
    _, rows, cols = tensor.matrices
    size, square = rows * cols, min(rows, cols) ** 2
    entries = int(100 * FEW * size)  # as a list, as arrays, as a sparse matrix
    if tensor.compute == "f64":
        return 24 * size + 16 * square
    if options.method == "sketch":
        return max(entries, 12 * size)
    return max(entries, 8 * size if rows < cols else 8 * square) + 16 * square


def on_cpu(options: Options) -> bool:
    """A sketch is made on the CPU, whatever the device."""
    return options.method == "sketch"
