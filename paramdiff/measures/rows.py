"""Where in a matrix the changes lie: how many rows and columns are touched, how concentrated they are (metrics.md §3)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from paramdiff.measures.accumulator import Accumulator
from paramdiff.measures.block import PairBlock
from paramdiff.measures.options import Options
from paramdiff.pairing import Aligned

NAME = "rows"
FEW = 1 / 16  # below this share of moved elements, counting by position is cheaper than summing the mask
TOP_SHARE = 0.01


def update(acc: Accumulator, block: PairBlock, options: Options) -> None:
    """Add the changed elements of one block to the counts per row and per column."""
    tensor, window, x = block.tensor, block.window, block.x
    if not tensor.is_matrix or block.nothing_moved:
        return
    if block.index is not None and block.moved < FEW * block.numel:
        row, col = np.divmod(block.index[block.changed], window.cols)
        in_rows, in_cols = x.histogram(row, window.rows), x.histogram(col, window.cols)
    else:
        mask = block.changed_everywhere
        in_rows = x.row_counts(mask, window.rows, window.cols)
        in_cols = x.col_counts(mask, window.rows, window.cols)
    acc.add_array("rows", in_rows, size=tensor.rows, at=window.row)
    acc.add_array("cols", in_cols, size=tensor.cols, at=window.col)


def columns(acc: Accumulator, tensor: Aligned, options: Options) -> dict[str, Any]:
    """The columns of `tensors.parquet` that this measure gives for one tensor; null for vectors and scalars."""
    row: dict[str, Any] = {}
    for axis, size in (("rows", tensor.rows), ("cols", tensor.cols)):
        counts = _counts(acc, tensor, axis)
        row[axis] = size if tensor.is_matrix else None
        row[f"{axis}_touched"] = None if counts is None else int(np.count_nonzero(counts))
        row[f"top1pct_{axis}_share"] = None if counts is None else _top_share(counts)
    return row


def tables(acc: Accumulator, tensor: Aligned) -> dict[str, list[dict[str, Any]]]:
    """Rows of `rows.parquet`: per tensor and axis, the changed elements of every row (column), in order."""
    table = []
    for axis, across in (("rows", tensor.cols), ("cols", tensor.rows)):
        counts = _counts(acc, tensor, axis)
        if counts is not None:
            table.append({"axis": axis, "length": len(counts), "across": across, "changed": counts.astype(np.uint32)})
    return {"rows": table}


def _counts(acc: Accumulator, tensor: Aligned, axis: str) -> np.ndarray[Any, Any] | None:
    if not tensor.is_matrix:
        return None
    empty = np.zeros(tensor.rows if axis == "rows" else tensor.cols, dtype=np.int64)
    counts: np.ndarray[Any, Any] = acc.arrays.get(axis, empty)
    return counts


def _top_share(counts: np.ndarray[Any, Any]) -> float | None:
    """The share of all changes that lie in the 1 % of rows with most of them (at least one row)."""
    total = int(counts.sum())
    if not total:
        return None
    top = math.ceil(TOP_SHARE * len(counts))
    return int(np.partition(counts, len(counts) - top)[-top:].sum()) / total
