"""`compare`: two references in, a `Diff` out."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from os import PathLike, fspath
from threading import Thread
from typing import TYPE_CHECKING, Any

from paramdiff import checkpoints
from paramdiff.collect import Collected, Progress, collect
from paramdiff.errors import OptionError
from paramdiff.measures import DEFAULT, Measure, make_options, select
from paramdiff.pairing import Alignment, align

if TYPE_CHECKING:
    from paramdiff.diff import Diff

Ref = str | PathLike[str]


def compare(
    base: Ref,
    tuned: Ref,
    *,
    measures: Sequence[str | Measure] = DEFAULT,
    tolerances: Sequence[float] = (),
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renames: Sequence[str] = (),
    compat: str | None = None,
    method: str = "exact",
    ks: Sequence[int] = (16, 64),
    alpha: float = 0.5,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints, reading each once, in memory bounded by the block size (spectra and subspaces: by the largest
    matrix).

    Args:
        base, tuned: checkpoint directories or files (see `checkpoints.open`).
        measures: names from `measures.MEASURES`, or objects of your own (see `measures.Measure`). "spectrum" gives singular
            values and ranks of Δ, "subspace" compares the leading directions of both sides; both take longer than reading.
        tolerances: each gives `above[τ]`, the elements with |Δ| > τ, and `sparsity[τ]`.
        device: "auto", "cpu", "cuda" or "cuda:N". Counts are the same on all of them; sums agree to float64 rounding.
        include, exclude: regular expressions searched in parameter names.
        renames: "OLD=NEW", a regular expression and what stands in its place, for names that no rule of pairing brings
            together; applied to both sides, the first that matches.
        compat: "mukherjee2025" reproduces the counts of that paper's script (see `measures.compat`).
        method: "exact" finds every singular value; "sketch" only the leading ones of large matrices, with a bound on their
            error (see `paramdiff.sketch`).
        ks, alpha: for "subspace": how many leading directions to compare, and the share of elements in each mask.
        threads: CPU workers; all cores by default.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: a side cannot be read. NothingToCompare: no tensor has a partner. OptionError, DeviceError.

    >>> diff = compare("sample_data/base", "sample_data/rl-sgd", tolerances=[1e-5])
    >>> diff.summary()["changed"]
    105071
    """
    options = make_options(tolerances, compat, method, ks, alpha)
    if threads is not None and threads < 1:
        raise OptionError(f"{threads} is no number of workers.", hint="Give 1 or more.")
    chosen = select(measures, options)
    sides: list[checkpoints.Checkpoint] = []
    try:
        sides.extend(checkpoints.open_pair(fspath(base), fspath(tuned)))
        alignment = align(sides[0], sides[1], include=include, exclude=exclude, resized=compat is None, renames=renames)
        # polars takes longer to import than a small model to compare: let it, beside the reading.
        background = Thread(target=_import_tables, daemon=True)  # for whose end Ctrl-C need not wait
        background.start()
        result = collect(alignment, chosen, options, device=device, threads=threads, progress=progress)
        background.join()
    finally:
        for side in sides:
            side.close()
    asked = {
        "measures": [measure.NAME for measure in chosen],
        "tolerances": list(options.tolerances),
        "include": list(include),
        "exclude": list(exclude),
        "renames": list(renames),
        "compat": compat,
        "method": method,
        "ks": list(options.ks),
        "alpha": alpha,
    }
    return _diff(alignment, result, asked)


def _import_tables() -> None:
    # If the program is ending meanwhile (Ctrl-C), the import fails; nobody needs it then, and nobody wants to read of it.
    with suppress(Exception):
        import_module("paramdiff.diff")


def _quantisation(alignment: Alignment) -> list[str]:
    """What to say where one side is quantised and the other not, or otherwise."""
    kinds = {
        tuple(side.stored or side.dtype for side in tensor.sides)
        for tensor in alignment.tensors
        if len({side.stored for side in tensor.sides} - {"lora", "dora"}) > 1
    }
    listed = ", ".join(sorted(f"{base} against {tuned}" for base, tuned in kinds))
    return [f"The change contains the error of quantisation: {listed}."] if kinds else []


def _diff(alignment: Alignment, result: Collected, asked: dict[str, Any]) -> Diff:
    from paramdiff import tables
    from paramdiff.diff import Diff

    base, tuned = alignment.checkpoints
    frames = {"tensors": tables.frame("tensors", result.rows)}
    frames |= {name: tables.frame(name, rows) for name, rows in result.tables.items()}
    frames["coverage"] = tables.coverage_frame(alignment.coverage)
    packages = ("paramdiff", "numpy", "polars", "scipy", "torch")
    run = {
        "base": base.facts(),
        "tuned": tuned.facts(),
        "options": asked | {"device": result.device},
        "same_file": sum(tensor.same_file for tensor in alignment.tensors),
        "warnings": [*base.warnings, *tuned.warnings, *_quantisation(alignment)],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "started": result.started.isoformat(timespec="seconds"),
        "bytes_read": result.bytes_read,
        "seconds": round(result.seconds, 6),
        "tables": list(frames),
    }
    return Diff(frames, run)
