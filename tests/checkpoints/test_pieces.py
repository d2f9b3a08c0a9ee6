"""Tensors in pieces against numpy: any cut into boxes, any range of bytes, and boxes that are no cut of a tensor."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdiff.checkpoints.base import TensorInfo
from paramdiff.checkpoints.files import Files
from paramdiff.checkpoints.pieces import Assembled, Piece, assemble
from paramdiff.errors import BrokenFile, UnsupportedFormat

TYPES = {"U8": np.uint8, "BF16": np.uint16, "F32": np.uint32, "F64": np.uint64}


def cuts(draw: Any, size: int) -> list[int]:
    inner = draw(st.sets(st.integers(1, max(size - 1, 1)), max_size=3)) if size > 1 else set()
    return [0, *sorted(inner), size]


@st.composite
def pieced(draw: Any) -> tuple[str, tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]], int]:
    """A type, a shape, boxes that together are the whole, and a seed for their order in the file."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size in shape:
        edges = cuts(draw, size)
        boxes = [((*o, a), (*n, b - a)) for o, n in boxes for a, b in itertools.pairwise(edges)]
    return draw(st.sampled_from(sorted(TYPES))), shape, boxes, draw(st.integers(0, 1000))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pieces")


@settings(max_examples=150)
@given(case=pieced(), start=st.integers(0, 400), length=st.integers(1, 400))
def test_any_range_of_any_cut(scratch: Path, case: Any, start: int, length: int) -> None:
    dtype, shape, boxes, seed = case
    rng = np.random.default_rng(seed)
    whole = rng.integers(0, np.iinfo(TYPES[dtype]).max, shape, dtype=TYPES[dtype])
    data, pieces = bytearray(b"head"), []
    for number in rng.permutation(len(boxes)):
        offset, size = boxes[number]
        pieces.append(Piece(0, len(data), offset, size))
        data += whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].tobytes()
    (scratch / "file").write_bytes(data)
    files = Files()
    files.add(str(scratch / "file"))
    entry = assemble(TensorInfo("w", dtype, shape), [*pieces, pieces[0]], "here")  # a copy of a box is read once
    checkpoint = Assembled("here", "pieces", files, {"w": entry}, None)
    expected = whole.tobytes()
    start = min(start, len(expected) - 1)
    got = bytearray(min(length, len(expected) - start))
    checkpoint.read_into("w", start, memoryview(got))
    assert got == expected[start : start + len(got)]
    everything = bytearray(len(expected))
    checkpoint.read_into("w", 0, memoryview(everything))
    assert everything == expected
    checkpoint.close()


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 4))],  # half of it
        [((0, 0), (2, 4)), ((1, 0), (2, 4))],  # overlapping, with the right number of elements
        [((0, 0), (4, 2)), ((0, 1), (4, 2))],
        [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2)), ((1, 1), (2, 2))],
        [((0, 0), (4, 4)), ((0, 0), (2, 4))],  # more than all of it
        [((2, 0), (4, 4))],  # beyond its end
        [((-1, 0), (4, 4))],
        [((0, 0), (4, -4))],
        [((0,), (16,))],  # of another number of dimensions
        [],
    ],
)
def test_boxes_that_are_no_cut(boxes: list[Any]) -> None:
    with pytest.raises(BrokenFile, match="'w' in here is incomplete or broken"):
        assemble(TensorInfo("w", "F32", (4, 4)), [Piece(0, 0, offset, size) for offset, size in boxes], "here")


def test_what_is_cut_too_finely_or_packed() -> None:
    fine = [Piece(0, 0, (n, 0), (1, 1)) for n in range(5000)] + [Piece(0, 0, (n, 1), (1, 1)) for n in range(5000)]
    with pytest.raises(UnsupportedFormat, match="several axes"):
        assemble(TensorInfo("w", "F32", (5000, 2)), fine, "here")
    with pytest.raises(UnsupportedFormat, match="packed"):
        assemble(TensorInfo("w", "F4", (4, 4)), [Piece(0, 0, (0, 0), (4, 4))], "here")
    huge = 1 << 21
    columns = [Piece(0, 0, (0, row, col), (huge, 1, 1)) for row in range(2) for col in range(2)]
    with pytest.raises(UnsupportedFormat, match="more strips"):
        assemble(TensorInfo("w", "F32", (huge, 2, 2)), columns, "here")


def test_thousands_of_rows_are_checked_at_once() -> None:
    rows = [Piece(0, 16 * n, (n, 0), (1, 4)) for n in range(100_000)]
    assert len(assemble(TensorInfo("w", "F32", (100_000, 4)), rows, "here").strips) == 100_000
