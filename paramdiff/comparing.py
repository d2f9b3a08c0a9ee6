"""`compare`: two references in, a `Diff` out."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from os import PathLike, fspath
from threading import Thread
from typing import TYPE_CHECKING

from paramdiff import checkpoints
from paramdiff.collect import Progress, collect
from paramdiff.measures import MEASURES, Measure, make_options, select
from paramdiff.pairing import align

if TYPE_CHECKING:
    from paramdiff.diff import Diff

Ref = str | PathLike[str]


def compare(
    base: Ref,
    tuned: Ref,
    *,
    measures: Sequence[str | Measure] = tuple(MEASURES),
    tolerances: Sequence[float] = (),
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    compat: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints, reading each once, in memory bounded by the block size.

    Args:
        base, tuned: checkpoint directories or files (see `checkpoints.open`).
        measures: names from `measures.MEASURES`, or objects of your own (see `measures.Measure`).
        tolerances: each gives `above[τ]`, the elements with |Δ| > τ, and `sparsity[τ]`.
        device: "auto", "cpu", "cuda" or "cuda:N". Counts are the same on all of them; sums agree to float64 rounding.
        include, exclude: regular expressions searched in parameter names.
        compat: "mukherjee2025" reproduces the counts of that paper's script (see `measures.compat`).
        threads: CPU workers; all cores by default.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: a side cannot be read. NothingToCompare: no tensor has a partner. OptionError, DeviceError.

    >>> diff = compare("sample_data/base", "sample_data/rl-sgd", tolerances=[1e-5])
    >>> diff.summary()["changed"]
    105071
    """
    # polars takes longer to import than a small model to compare: let it, beside the reading.
    Thread(target=import_module, args=("paramdiff.diff",)).start()
    options = make_options(tolerances, compat)
    chosen = select(measures, options)
    sides: list[checkpoints.Checkpoint] = []
    try:
        for ref in (base, tuned):
            sides.append(checkpoints.open(fspath(ref)))
        alignment = align(sides[0], sides[1], include=include, exclude=exclude, resized=compat is None)
        began = datetime.now(UTC)
        result = collect(alignment, chosen, options, device=device, threads=threads, progress=progress)
    finally:
        for side in sides:
            side.close()
    from paramdiff import tables
    from paramdiff.diff import Diff

    frames = {"tensors": tables.frame("tensors", result.rows)}
    frames |= {name: tables.frame(name, rows) for name, rows in result.tables.items()}
    frames["coverage"] = tables.coverage_frame(alignment.coverage)
    run = {
        "base": sides[0].facts(),
        "tuned": sides[1].facts(),
        "options": {
            "measures": [measure.NAME for measure in chosen],
            "tolerances": list(options.tolerances),
            "include": list(include),
            "exclude": list(exclude),
            "compat": compat,
            "device": result.device,
        },
        "warnings": [warning for side in sides for warning in side.warnings],
        "versions": {name: version(name) for name in ("paramdiff", "numpy", "polars")}
        | {"python": platform.python_version()},
        "started": began.isoformat(timespec="seconds"),
        "bytes_read": result.bytes_read,
        "seconds": round(result.seconds, 6),
        "tables": list(frames),
    }
    return Diff(frames, run)
