"""Tensors that lie in several places: parts of one tensor in the files of many ranks, read as if they were one.

A distributed checkpoint cuts tensors into boxes, each stored row by row. What a reader of ranges needs of a box is where its
rows go in the whole tensor: a *strip* is rows of equal length, one after the other in the file, at equal distances in the
tensor. A box of the whole width is one strip of one long row, and is read straight into place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramdiff.checkpoints.base import TensorInfo
from paramdiff.checkpoints.files import Files, OnFiles
from paramdiff.errors import BrokenFile, UnsupportedFormat

MOST_STRIPS = 1 << 20  # of one tensor; no cut that a framework makes comes near
MOST_CROSSED = 4096  # boxes of one tensor that are cut on several axes, which are checked pair by pair


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor: elements `offset` to `offset + shape`, stored row-major from byte `start` of file `file` on."""

    file: int
    start: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Strip:
    """`count` rows of `run` bytes, adjoining in the file from `start` on, `pitch` apart in the tensor from byte `at` on."""

    file: int
    start: int
    at: int
    run: int
    pitch: int
    count: int

    @property
    def end(self) -> int:
        return self.at + (self.count - 1) * self.pitch + self.run


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor and the strips that it is made of, in the order in which they begin."""

    info: TensorInfo
    strips: tuple[Strip, ...]

    @property
    def file(self) -> int:
        return self.strips[0].file if self.strips else 0

    @property
    def start(self) -> int:
        return self.strips[0].start if self.strips else 0


def assemble(info: TensorInfo, pieces: Sequence[Piece], where: str, shape: tuple[int, ...] | None = None) -> Entry:
    """The entry of a tensor made of `pieces`, which must cover it exactly; copies of the same box are read once.

    `shape` is the shape that the boxes are cut from, where it is not the tensor's own: `(numel,)` for flat parts. `where`
    names the checkpoint in errors. The pieces' bytes must have been checked to lie within their files.

    Raises `BrokenFile` where pieces overlap, stick out or leave something uncovered, `UnsupportedFormat` for cuts too fine.
    """
    shape = info.shape if shape is None else shape
    if info.type.bits < 8:
        raise UnsupportedFormat(f"Tensor {info.name!r} in {where} is cut into parts of a packed type ({info.dtype}).")
    boxes = {(piece.offset, piece.shape): piece for piece in reversed(pieces) if math.prod(piece.shape)}
    for offset, size in boxes:
        inside = len(offset) == len(size) == len(shape) and all(
            min(o, n) >= 0 and o + n <= full for o, n, full in zip(offset, size, shape, strict=True)
        )
        if not inside:
            raise _broken(info, where, f"a part of {list(size)} at {list(offset)} does not fit into {list(shape)}")
    held = sum(math.prod(size) for _, size in boxes)
    if held != info.numel:
        raise _broken(info, where, f"its parts hold {held:,} of {info.numel:,} elements")
    _check_apart(info, list(boxes), shape, where)
    if sum(_strip_count(box.shape, shape) for box in boxes.values()) > MOST_STRIPS:
        raise UnsupportedFormat(f"Tensor {info.name!r} in {where} is cut into more strips than this version reads.")
    strips = [strip for piece in boxes.values() for strip in _strips(piece, shape, info.type.bits // 8)]
    return Entry(info, tuple(sorted(strips, key=lambda strip: strip.at)))


def _broken(info: TensorInfo, where: str, why: str) -> BrokenFile:
    return BrokenFile(
        f"Tensor {info.name!r} in {where} is incomplete or broken: {why}.", hint="Copy the checkpoint again, with all ranks."
    )


def _check_apart(info: TensorInfo, boxes: list[Any], shape: tuple[int, ...], where: str) -> None:
    """Raise `BrokenFile` where two boxes overlap. With the right number of elements in all, apart means complete."""
    if len(boxes) < 2:
        return
    lows = np.array([offset for offset, _ in boxes], dtype=np.int64)
    highs = lows + np.array([size for _, size in boxes], dtype=np.int64)
    cut = [axis for axis, full in enumerate(shape) if (highs[:, axis] - lows[:, axis] != full).any()]
    if len(cut) == 1:
        order = np.argsort(lows[:, cut[0]])
        overlap = bool((lows[order[1:], cut[0]] < highs[order[:-1], cut[0]]).any())
    elif len(boxes) <= MOST_CROSSED:
        overlap = False
        for number in range(len(boxes) - 1):
            others = slice(number + 1, None)
            overlap |= bool(((lows[number] < highs[others]) & (lows[others] < highs[number])).all(axis=1).any())
    else:
        raise UnsupportedFormat(f"Tensor {info.name!r} in {where} is cut into {len(boxes):,} parts along several axes.")
    if overlap:
        raise _broken(info, where, "two of its parts overlap")


def _merged(box: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, full size) of the axes left when every whole axis is joined to the one before it.

    >>> _merged((2, 8, 4), (6, 8, 4)), _merged((6, 3), (6, 9))
    ([(64, 192)], [(6, 6), (3, 9)])
    """
    axes: list[tuple[int, int]] = []
    for size, full in zip(box, shape, strict=True):
        if axes and size == full:
            axes[-1] = axes[-1][0] * size, axes[-1][1] * full
        else:
            axes.append((size, full))
    return axes or [(1, 1)]


def _strip_count(box: tuple[int, ...], shape: tuple[int, ...]) -> int:
    return math.prod(size for size, _ in _merged(box, shape)[:-2])


def _strips(piece: Piece, shape: tuple[int, ...], size: int) -> list[Strip]:
    axes = _merged(piece.shape, shape)
    first = 0  # where the box begins in the tensor, in elements
    for offset, full in zip(piece.offset, shape, strict=True):
        first = first * full + offset
    run, width = axes[-1]
    count = axes[-2][0] if len(axes) > 1 else 1
    pitches = [math.prod(full for _, full in axes[axis + 1 :]) for axis in range(max(len(axes) - 2, 0))]
    found = []
    for number, where in enumerate(itertools.product(*(range(n) for n, _ in axes[:-2]))):
        at = first + sum(index * pitch for index, pitch in zip(where, pitches, strict=True))
        start = piece.start + number * count * run * size
        found.append(Strip(piece.file, start, at * size, run * size, width * size, count))
    return found


class Assembled(OnFiles):
    """A checkpoint of tensors in pieces; see `Checkpoint` for the interface. Containers make its entries."""

    def __init__(
        self,
        ref: str,
        kind: str,
        files: Files,
        entries: Mapping[str, Entry],
        config: Mapping[str, Any] | None,
        warnings: Sequence[str] = (),
    ) -> None:
        self.ref, self.format, self.config, self.warnings = ref, kind, config, list(warnings)
        self._files, self._entries = files, entries
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info for name, entry in entries.items()}

    def content(self, name: str) -> tuple[str, int] | None:
        return None  # of several files

    def _stored(self, name: str, start: int, end: int) -> Iterable[tuple[int, int, int]]:
        for strip in self._entries[name].strips:
            if strip.at < end and strip.end > start:
                first = max(0, (start - strip.at) // strip.pitch)
                last = min(strip.count - 1, (end - 1 - strip.at) // strip.pitch)
                low = min(max(0, start - strip.at - first * strip.pitch), strip.run)
                high = min(end - strip.at - last * strip.pitch, strip.run)
                yield strip.file, strip.start + first * strip.run + low, strip.start + last * strip.run + high

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        for strip in self._entries[name].strips:
            if strip.at >= end:
                break
            if strip.end > offset:
                self._read_strip(name, strip, offset, buffer)

    def _read_strip(self, name: str, strip: Strip, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        first = max(0, (offset - strip.at) // strip.pitch)
        last = min(strip.count - 1, (end - 1 - strip.at) // strip.pitch)
        if strip.at + first * strip.pitch < offset or first == last:
            self._read_row(name, strip, first, offset, buffer)
            first += 1
        if first <= last and strip.at + last * strip.pitch + strip.run > end:
            self._read_row(name, strip, last, offset, buffer)
            last -= 1
        if first > last:
            return
        rows = np.empty((last - first + 1, strip.run), dtype=np.uint8)  # whole rows, at most what the buffer holds
        self._files.read_into(strip.file, strip.start + first * strip.run, memoryview(rows.reshape(-1)), name)  # type: ignore[arg-type]
        target = np.frombuffer(buffer, dtype=np.uint8)[strip.at + first * strip.pitch - offset :]
        np.lib.stride_tricks.as_strided(target, rows.shape, (strip.pitch, 1))[:] = rows

    def _read_row(self, name: str, strip: Strip, row: int, offset: int, buffer: memoryview) -> None:
        begin = strip.at + row * strip.pitch
        low, high = max(begin, offset), min(begin + strip.run, offset + len(buffer))
        if low < high:
            position = strip.start + row * strip.run + low - begin
            self._files.read_into(strip.file, position, buffer[low - offset : high - offset], name)
