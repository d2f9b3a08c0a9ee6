"""Measures: one file per question, each a module with `NAME`, `update`, `columns` and `tables`.

`update(acc, block, options)` folds one block of a pair into an accumulator; `columns` turns the finished accumulator
into columns of `tensors.parquet`, `tables` into rows of further tables. Nothing else knows what is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np

from paramdiff.arrays import Array, Arrays
from paramdiff.errors import OptionError
from paramdiff.measures import change, compat, magnitude, rows
from paramdiff.measures.accumulator import Accumulator
from paramdiff.measures.block import PairBlock
from paramdiff.measures.options import Options, make_options
from paramdiff.pairing import Aligned
from paramdiff.streaming import Window

__all__ = [
    "MEASURES", "Accumulator", "Measure", "Options", "PairBlock", "fold", "make_options", "merge", "portable", "restored",
    "select",
]  # fmt: skip


class Measure(Protocol):
    """What a measure offers. A module does, and so does any object with these four."""

    NAME: str

    def update(self, acc: Accumulator, block: PairBlock, options: Options) -> None: ...
    def columns(self, acc: Accumulator, tensor: Aligned, options: Options) -> dict[str, Any]: ...
    def tables(self, acc: Accumulator, tensor: Aligned) -> dict[str, list[dict[str, Any]]]: ...


MEASURES: dict[str, Measure] = {module.NAME: module for module in (change, magnitude, rows)}


def select(names: Sequence[str | Measure], options: Options) -> list[Measure]:
    """Measures by name, or given as they are; `compat` adds its own. `change` is always there: it counts.

    Raises `OptionError` for an unknown name.
    """
    chosen: list[Measure] = [MEASURES["change"]]
    for item in names:
        if isinstance(item, str) and item not in MEASURES:
            raise OptionError(f"Unknown measure {item!r}; known: {', '.join(MEASURES)}.")
        measure = MEASURES[item] if isinstance(item, str) else item
        if measure not in chosen:
            chosen.append(measure)
    return [*chosen, compat] if options.compat else chosen


def portable(measures: Sequence[Measure]) -> list[str | Measure]:
    """Measures as a pickle can carry them: modules by their name."""
    return [measure.__name__ if isinstance(measure, ModuleType) else measure for measure in measures]


def restored(named: Sequence[str | Measure]) -> list[Measure]:
    """The inverse of `portable`."""
    return [cast("Measure", import_module(item)) if isinstance(item, str) else item for item in named]


def fold(
    x: Arrays,
    tensor: Aligned,
    blocks: Iterable[tuple[Window, Sequence[Array]]],
    measures: Sequence[Measure],
    options: Options,
) -> dict[str, Accumulator]:
    """Run measures over blocks of one tensor. Returns one settled accumulator for each, by name."""
    accumulators = {measure.NAME: Accumulator() for measure in measures}
    # NaN and infinity in weights are data here, not accidents: inf - inf is meant to be NaN, in silence.
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        for window, raw in blocks:
            block = PairBlock(x, tensor, window, raw)
            for measure in measures:
                measure.update(accumulators[measure.NAME], block, options)
    return {name: accumulator.settle(x) for name, accumulator in accumulators.items()}


def merge(into: dict[str, Accumulator], other: dict[str, Accumulator]) -> None:
    """Merge the accumulators of two parts of one tensor, measure by measure."""
    for name, accumulator in other.items():
        if name in into:
            into[name].merge(accumulator)
        else:
            into[name] = accumulator
