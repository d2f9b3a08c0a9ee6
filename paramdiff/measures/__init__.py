"""Measures: one file per question, each a module with `NAME`, `update`, `columns` and `tables`.

`update(acc, block, options)` folds one block of a pair into an accumulator; `columns` turns the finished accumulator
into columns of `tensors.parquet`, `tables` into rows of further tables. Nothing else knows what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from paramdiff.arrays import Array, Arrays
from paramdiff.errors import OptionError
from paramdiff.measures.accumulator import Accumulator
from paramdiff.measures.block import PairBlock
from paramdiff.measures.options import Options, make_options
from paramdiff.pairing import Aligned
from paramdiff.streaming import Window

__all__ = [
    "DEFAULT", "MEASURES", "Accumulator", "Measure", "Options", "PairBlock", "WholeTensorMeasure", "fold", "make_options",
    "merge", "on_cpu", "portable", "restored", "scratch", "select", "whole_tensors",
]  # fmt: skip


class Measure(Protocol):
    """What a measure offers. A module does, and so does any object with these four."""

    NAME: str

    def update(self, acc: Accumulator, block: Any, options: Options) -> None: ...
    def columns(self, acc: Accumulator, tensor: Aligned, options: Options) -> dict[str, Any]: ...
    def tables(self, acc: Accumulator, tensor: Aligned) -> dict[str, list[dict[str, Any]]]: ...


@runtime_checkable
class WholeTensorMeasure(Protocol):
    """A measure that also has these three sees each tensor whole: all its blocks, in order, in one worker.

    `finish` is called after the last block; it turns `acc.state` into something small in `acc.results`. `scratch` says how
    many bytes a worker needs meanwhile, `on_cpu` whether the work is done there whatever the device.
    """

    def finish(self, acc: Accumulator, tensor: Aligned, options: Options, x: Arrays) -> None: ...
    def scratch(self, tensor: Aligned, options: Options) -> int: ...
    def on_cpu(self, options: Options) -> bool: ...


@runtime_checkable
class OtherBlocks(Protocol):
    """A measure that reads something other than a pair says what its blocks are made with. It is run without others."""

    block: Callable[[Arrays, Aligned, Window, Sequence[Array]], Any]


MEASURES = {name: f"paramdiff.measures.{name}" for name in ("change", "magnitude", "rows", "spectrum", "subspace")}
DEFAULT = ("change", "magnitude", "rows")  # what costs no more than reading


def select(names: Sequence[str | Measure], options: Options) -> list[Measure]:
    """Measures by name, or given as they are; `compat` adds its own. `change` is always there: it counts.

    Raises `OptionError` for an unknown name.
    """
    chosen: list[Measure] = []
    for item in ("change", *names, *(("compat",) if options.compat else ())):
        if isinstance(item, str) and item not in (*MEASURES, "compat"):
            raise OptionError(f"Unknown measure {item[:40]!r}; known: {', '.join(MEASURES)}.")
        measure = _imported(f"paramdiff.measures.{item}") if isinstance(item, str) else item
        if measure not in chosen:
            chosen.append(measure)
    return chosen


def _imported(module: str) -> Measure:
    """A measure by the name of its module. Some import much (scipy), so only those that are asked for are imported."""
    return cast("Measure", import_module(module))


def whole_tensors(measures: Sequence[Measure]) -> bool:
    """Whether any measure must see tensors whole."""
    return any(isinstance(measure, WholeTensorMeasure) for measure in measures)


def scratch(measures: Sequence[Measure], tensor: Aligned, options: Options) -> int:
    """Bytes that a worker needs for one tensor beyond its buffers."""
    return sum(measure.scratch(tensor, options) for measure in measures if isinstance(measure, WholeTensorMeasure))


def on_cpu(measures: Sequence[Measure], options: Options) -> bool:
    """Whether a GPU would only read: most of the work is linear algebra that is done on the CPU."""
    return any(measure.on_cpu(options) for measure in measures if isinstance(measure, WholeTensorMeasure))


def portable(measures: Sequence[Measure]) -> list[str | Measure]:
    """Measures as a pickle can carry them: modules by their name."""
    return [measure.__name__ if isinstance(measure, ModuleType) else measure for measure in measures]


def restored(named: Sequence[str | Measure]) -> list[Measure]:
    """The inverse of `portable`."""
    return [_imported(item) if isinstance(item, str) else item for item in named]


def fold(
    x: Arrays,
    tensor: Aligned,
    blocks: Iterable[tuple[Window, Sequence[Array]]],
    measures: Sequence[Measure],
    options: Options,
) -> dict[str, Accumulator]:
    """Run measures over blocks of one tensor. Returns one settled accumulator for each, by name."""
    accumulators = {measure.NAME: Accumulator() for measure in measures}
    make_block = next((measure.block for measure in measures if isinstance(measure, OtherBlocks)), PairBlock)
    # NaN and infinity in weights are data here, not accidents: inf - inf is meant to be NaN, in silence.
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        for window, raw in blocks:
            block = make_block(x, tensor, window, raw)
            for measure in measures:
                measure.update(accumulators[measure.NAME], block, options)
        for measure in measures:
            if isinstance(measure, WholeTensorMeasure):
                measure.finish(accumulators[measure.NAME], tensor, options, x)
    return {name: accumulator.settle(x) for name, accumulator in accumulators.items()}


def merge(into: dict[str, Accumulator], other: dict[str, Accumulator]) -> None:
    """Merge the accumulators of two parts of one tensor, measure by measure."""
    for name, accumulator in other.items():
        if name in into:
            into[name].merge(accumulator)
        else:
            into[name] = accumulator
