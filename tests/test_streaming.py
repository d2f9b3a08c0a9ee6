"""Blocks tile a matrix, and spans take up every block, once and in order."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdiff import checkpoints
from paramdiff.pairing import align
from paramdiff.streaming import Grid, spans
from tests.helpers import save


@given(rows=st.integers(0, 60), cols=st.integers(0, 400), block=st.integers(1, 130))
@settings(max_examples=300)
def test_blocks_tile_the_matrix_in_order(rows, cols, block):
    grid, position = Grid(rows, cols, block), 0
    for number in range(len(grid)):
        window = grid[number]
        assert window.start == position == window.row * cols + window.col
        assert 1 <= window.numel <= block or (window.rows == 1 and cols <= block)
        assert window.row + window.rows <= rows
        assert window.col + window.cols <= cols
        assert window.rows == 1 or (window.col == 0 and window.cols == cols)
        position += window.numel
    assert position == rows * cols


@given(cols=st.integers(1, 5000), block=st.integers(1, 300).map(lambda n: 4 * n))
def test_pieces_of_a_row_start_on_whole_bytes_of_packed_types(cols, block):
    grid = Grid(1, cols, block)
    assert all(grid[n].start * bits % 8 == 0 for n in range(len(grid)) for bits in (4, 6))


SHAPES = st.one_of(
    st.tuples(), st.tuples(st.integers(0, 70)), st.tuples(st.integers(0, 9), st.integers(0, 70)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
)  # fmt: skip


@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=5),
    kinds=st.tuples(*[st.sampled_from([torch.bfloat16, torch.float32, torch.uint8])] * 2),
    block=st.integers(1, 64),
    span_bytes=st.integers(1, 600),
)
@settings(max_examples=60, deadline=None)
def test_spans_take_up_every_block_once(shapes, kinds, block, span_bytes):
    with tempfile.TemporaryDirectory() as folder:
        refs = []
        for side, kind in enumerate(kinds):
            tensors = {f"t{i}": torch.zeros(shape, dtype=kind) for i, shape in enumerate(shapes)}
            refs.append(checkpoints.open(str(save(Path(folder) / f"{side}.safetensors", tensors))))
        alignment = align(*refs)
        work = spans(alignment, block, span_bytes)
        for checkpoint in refs:
            checkpoint.close()
    size = sum(torch.empty(0, dtype=kind).element_size() for kind in kinds)
    for index, tensor in enumerate(alignment.tensors):
        grid, mine = Grid(tensor.rows, tensor.cols, block), [span for span in work if span.tensor == index]
        assert tensor.rows * tensor.cols == tensor.numel
        assert [n for span in mine for n in range(span.first, span.last)] == list(range(len(grid)))
        for span in mine:
            assert span.numel == sum(grid[n].numel for n in range(span.first, span.last))
            assert span.nbytes == span.numel * size
            assert span.last - span.first == 1 or span.numel * size <= span_bytes
    assert sum(span.numel for span in work) == sum(tensor.numel for tensor in alignment.tensors)
    places = [alignment.checkpoints[0].position(alignment.tensors[span.tensor].sides[0].name) for span in work]
    assert places == sorted(places)
