"""From an alignment to plain rows: run the measures, finish each tensor as soon as it is complete. Imports no polars."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from paramdiff import engines, names
from paramdiff.measures import Accumulator, Measure, Options, merge
from paramdiff.pairing import Aligned, Alignment
from paramdiff.streaming import spans

Progress = Callable[[int, int], None]  # (bytes done, bytes in all), called as work finishes


@dataclass
class Collected:
    """One row per compared tensor, in the base's order; rows of further tables by name; what it cost."""

    rows: list[dict[str, Any]]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    device: str = "cpu"
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    bytes_read: int = 0
    seconds: float = 0.0


def collect(
    alignment: Alignment,
    measures: Sequence[Measure],
    options: Options,
    *,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    identify: Callable[[Aligned], dict[str, Any]] | None = None,
) -> Collected:
    """Read everything once and measure it. Accumulators live only until their tensor is complete.

    `identify` gives the columns that say which tensor a row speaks of (by default those of a pair).

    Raises what reading raises (`BrokenFile`, `ChangedWhileReading`) and `DeviceError`.
    """
    identify = identify or identity
    began, started = time.perf_counter(), datetime.now(UTC)
    total = sum(span.nbytes for span in spans(alignment))
    missing = {index: tensor.numel for index, tensor in enumerate(alignment.tensors)}
    partial: dict[int, dict[str, Accumulator]] = {}
    finished: dict[int, tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]] = {}
    used, results = engines.run(alignment, measures, options, device=device, threads=threads)
    done = 0
    with closing(results):  # an exception on the way ends the workers
        for span, result in results:
            merge(partial.setdefault(span.tensor, {}), result)
            missing[span.tensor] -= span.numel
            done += span.nbytes
            if progress is not None:
                progress(done, total)
            if not missing[span.tensor]:
                tensor = alignment.tensors[span.tensor]
                finished[span.tensor] = _finish(tensor, identify(tensor), measures, options, partial.pop(span.tensor))
    collected = Collected([], device=used, started=started, bytes_read=done)
    for index, tensor in enumerate(alignment.tensors):
        if index not in finished:  # a tensor without elements has no spans
            nothing = {measure.NAME: Accumulator() for measure in measures}
            finished[index] = _finish(tensor, identify(tensor), measures, options, nothing)
        row, tables = finished[index]
        collected.rows.append(row)
        for name, rows in tables.items():
            collected.tables.setdefault(name, []).extend(rows)
    for checkpoint in alignment.checkpoints:
        checkpoint.verify()
    collected.seconds = time.perf_counter() - began
    return collected


def _finish(
    tensor: Aligned,
    row: dict[str, Any],
    measures: Sequence[Measure],
    options: Options,
    accumulators: dict[str, Accumulator],
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    tables: dict[str, list[dict[str, Any]]] = {}
    for measure in measures:
        row |= measure.columns(accumulators[measure.NAME], tensor, options)
        for name, rows in measure.tables(accumulators[measure.NAME], tensor).items():
            tables.setdefault(name, []).extend({"name": tensor.name, **r} for r in rows)
    return row, tables


def identity(tensor: Aligned) -> dict[str, Any]:
    """The columns that say which tensor a row speaks of."""
    place, (base, tuned) = names.place(tensor.name), tensor.sides[:2]
    return {
        "name": tensor.name,
        "layer": place.layer,
        "module": place.module,
        "kind": place.kind,
        "expert": place.expert,
        "shape": list(tensor.shape),
        "dtype_base": base.dtype,
        "dtype_tuned": tuned.dtype,
        "compared_in": {"f32": "float32", "f64": "float64", "i64": "int64"}[tensor.compute],
        "stored_base": base.stored,
        "stored_tuned": tuned.stored,
        "numel": tensor.numel,
        "pairing_rule": tensor.rule,
        "name_base": base.name,
        "name_tuned": tuned.name,
        "duplicate_of": tensor.duplicate_of,
    }
