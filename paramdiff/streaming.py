"""Streaming: aligned tensors as a sequence of small windows, in file order, in memory bounded by the window.

A tensor is cut into *blocks* of whole rows (or pieces of one long row). The cut depends on the shape alone, never on
threads, shards or the order of reading, and every sum is kept per block until the tensor is complete; that is why results
are the same to the last bit for any number of threads and any shard layout. (Spectra of matrices that take seconds are so
but for their last bits, where there are more cores than tensors: see `engines.run`.)

Blocks are grouped into *spans*, the unit of work: a small picklable value that any worker can take up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from paramdiff.arrays import Array
from paramdiff.pairing import Aligned, Alignment

BLOCK = 1 << 18  # elements; float32 temporaries of 1 MB stay in a core's share of the cache
SPAN_BYTES = 32 << 20  # of all sides together; small enough to balance threads, large enough to cost nothing


@dataclass(frozen=True, slots=True)
class Window:
    """One block: elements `start` to `start + numel` of the compared part, `rows` × `cols` at (`row`, `col`)."""

    start: int
    row: int
    col: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class Span:
    """A unit of work: blocks `first` to `last` (exclusive) of tensor number `tensor` of an alignment.

    `numel` elements are compared, for which `nbytes` are read from all sides together.
    """

    tensor: int
    first: int
    last: int
    numel: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The blocks of a `rows` × `cols` matrix, numbered in storage order."""

    rows: int
    cols: int
    block: int = BLOCK

    @property
    def rows_per_block(self) -> int:
        return max(1, self.block // max(self.cols, 1))

    @property
    def pieces_per_row(self) -> int:
        return max(1, -(-self.cols // self.block))

    def __len__(self) -> int:
        if not self.rows or not self.cols:
            return 0
        return self.rows * self.pieces_per_row if self.pieces_per_row > 1 else -(-self.rows // self.rows_per_block)

    def __getitem__(self, number: int) -> Window:
        if self.pieces_per_row > 1:
            row, piece = divmod(number, self.pieces_per_row)
            col = piece * self.block
            return Window(row * self.cols + col, row, col, 1, min(self.block, self.cols - col))
        row = number * self.rows_per_block
        return Window(row * self.cols, row, 0, min(self.rows_per_block, self.rows - row), self.cols)


def spans(alignment: Alignment, block: int = BLOCK, span_bytes: int = SPAN_BYTES) -> list[Span]:
    """All work of an alignment, in the order in which the first checkpoint lies on disk."""
    order = sorted(range(len(alignment.tensors)), key=lambda i: _place_on_disk(alignment, i))
    work = []
    for index in order:
        tensor = alignment.tensors[index]
        grid = Grid(tensor.rows, tensor.cols, block)
        bytes_per_element = sum(side.bits_read for side in tensor.sides[: 1 if tensor.same_file else None]) / 8
        step = max(1, int(span_bytes * 8 / sum(side.type.bits for side in tensor.sides) / block))
        for first in range(0, len(grid), step):
            last = min(first + step, len(grid))
            end = grid[last - 1]
            elements = end.start + end.numel - grid[first].start
            work.append(Span(index, first, last, elements, int(elements * bytes_per_element)))
    return work


def whole_spans(alignment: Alignment, block: int = BLOCK) -> list[Span]:
    """The same work with one span for each tensor, the one with most to do for a spectrum first: what is begun last should
    not take long."""
    return sorted(spans(alignment, block, span_bytes=1 << 62), key=lambda s: -effort(alignment.tensors[s.tensor]))


def effort(tensor: Aligned) -> int:
    """Roughly the floating-point operations that the spectra of a tensor take: a Gram matrix and its eigenvalues."""
    if not tensor.is_matrix:
        return tensor.numel
    count, rows, cols = tensor.matrices
    short = min(rows, cols)
    return tensor.numel * (short + 1) + 4 * count * short**3


def _place_on_disk(alignment: Alignment, index: int) -> tuple[int, int]:
    return alignment.checkpoints[0].position(alignment.tensors[index].sides[0].name)


BATCH = 64 << 20  # bytes of all sides that are announced together, where a side is read over a network


def batches(alignment: Alignment, work: Sequence[Span]) -> list[list[Span]]:
    """Spans that one worker does one after the other. Over a network those that lie together, so that neighbours are fetched
    in one request; else each by itself."""
    if all(checkpoint.is_local for checkpoint in alignment.checkpoints):
        return [[span] for span in work]
    found: list[list[Span]] = []
    room = 0
    for span in work:
        if not found or room < span.nbytes:
            found.append([])
            room = BATCH
        found[-1].append(span)
        room -= span.nbytes
    return found


def announce(alignment: Alignment, work: Sequence[Span], block: int = BLOCK) -> None:
    """Tell every checkpoint which bytes these spans will read."""
    for number, checkpoint in enumerate(alignment.checkpoints):
        if checkpoint.is_local:
            continue
        parts = []
        for span in work:
            tensor = alignment.tensors[span.tensor]
            if number and tensor.same_file:
                continue
            side, grid = tensor.sides[number], Grid(tensor.rows, tensor.cols, block)
            first, last = grid[span.first], grid[span.last - 1]
            end = ((last.start + last.numel) * side.type.bits + 7) // 8
            parts.append((side.name, first.start * side.type.bits // 8, end))
        checkpoint.announce(parts)


def ahead(alignment: Alignment, work: Sequence[Span], block: int = BLOCK) -> Iterator[Span]:
    """The spans in turn, each batch announced while the one before it is in work."""
    groups = batches(alignment, work)
    for number, group in enumerate(groups):
        for near in groups[number + (number > 0) : number + 2]:
            announce(alignment, near, block)
        yield from group


class Room(Protocol):
    """Where the raw bytes of one window go: `take` gives a buffer of `nbytes` for a side, valid until the next window."""

    def take(self, side: int, nbytes: int) -> Array: ...


class Buffers:
    """Reused memory for the raw bytes of one window, one buffer for each side."""

    def __init__(self, sides: int) -> None:
        self._buffers = [np.empty(0, dtype=np.uint8) for _ in range(sides)]

    def take(self, side: int, nbytes: int) -> Array:
        if self._buffers[side].size < nbytes:
            self._buffers[side] = np.empty(nbytes, dtype=np.uint8)
        return self._buffers[side][:nbytes]


def windows(
    alignment: Alignment, span: Span, buffers: Buffers, block: int = BLOCK
) -> Iterator[tuple[Window, Sequence[Array]]]:
    """Read one span: each window with the stored bytes (uint8) of every side. The bytes are valid until the next step."""
    tensor = alignment.tensors[span.tensor]
    grid = Grid(tensor.rows, tensor.cols, block)
    for number in range(span.first, span.last):
        window = grid[number]
        yield window, read_window(alignment, tensor, window, buffers)


def read_window(alignment: Alignment, tensor: Aligned, window: Window, buffers: Room) -> list[Array]:
    """The stored bytes of one window, one uint8 array for each side."""
    raw: list[Array] = []
    for number, (checkpoint, side) in enumerate(zip(alignment.checkpoints, tensor.sides, strict=True)):
        # Packed types are never split by rows, and BLOCK is a multiple of 4 elements: offsets are whole bytes.
        buffer = buffers.take(number, (window.numel * side.type.bits + 7) // 8)
        if number and tensor.same_file:
            buffer[:] = raw[0]
            raw.append(buffer)
            continue
        checkpoint.read_into(side.name, window.start * side.type.bits // 8, memoryview(buffer))
        raw.append(buffer)
    return raw
