"""`compare`, and the `Diff` it returns: tables of what changed, with where they came from."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import polars as pl

from paramdiff import checkpoints, tables
from paramdiff.collect import Progress, collect
from paramdiff.measures import MEASURES, Measure, make_options, select
from paramdiff.output import load_tables, save_tables
from paramdiff.pairing import align

Ref = str | PathLike[str]


@dataclass
class Diff:
    """The result of a comparison.

    `tensors` has one row per compared tensor, `coverage` one per tensor that was not compared, `tables` holds those two
    and all others by name (`histograms`, `rows`, …), `run` what run.json says: references, options, versions, cost.
    The meaning of every column is in `paramdiff.columns`.
    """

    tables: dict[str, pl.DataFrame]
    run: dict[str, Any]

    @property
    def tensors(self) -> pl.DataFrame:
        return self.tables["tensors"]

    @property
    def coverage(self) -> pl.DataFrame:
        return self.tables["coverage"]

    def by(self, *keys: str) -> pl.DataFrame:
        """Roll up by one or more columns (`"layer"`, `"module"`, `"kind"`, `"expert"`), pooling elements.

        >>> diff = compare("sample_data/base", "sample_data/rl-sgd")
        >>> diff.by("kind").columns[:3]
        ['kind', 'tensors', 'numel']
        """
        return tables.roll_up(self.tensors, keys)

    def summary(self) -> dict[str, Any]:
        """The whole comparison as one dictionary, the object that `paramdiff sparsity --json` prints.

        Counts cover every compared tensor but tied duplicates. A notion that is undefined for some tensor is None.
        """
        total = self.by().row(0, named=True)
        tolerances = [float(t) for t in self.run["options"]["tolerances"]]
        result: dict[str, Any] = {
            "base": self.run["base"]["ref"],
            "tuned": self.run["tuned"]["ref"],
            "tensors": total["tensors"],
            "numel": total["numel"],
            "dtype_base": self._dtypes("dtype_base"),
            "dtype_tuned": self._dtypes("dtype_tuned"),
        }
        for name in ("changed", "sparsity", "changed_bits", "sparsity_bits", "changed_bf16", "sparsity_bf16"):
            result[name] = total[name]
        result["tolerances"] = [
            {"tol": t, "above": total[f"above[{t!r}]"], "sparsity": total[f"sparsity[{t!r}]"]} for t in tolerances
        ]
        for name in ("l2_delta", "rel_l2", "max_abs_delta"):
            result[name] = total.get(name)
        for name in ("sign_flips", "nonfinite_base", "nonfinite_tuned"):
            result[name] = total[name]
        if self.run["options"]["compat"]:
            result["compat"] = self.run["options"]["compat"]
        result["coverage"] = self._coverage()
        return result | {"bytes_read": self.run["bytes_read"], "seconds": self.run["seconds"]}

    def save(self, directory: Ref) -> None:
        """Write every table as Parquet, and run.json. Raises `OutputError`; what was there before then stays."""
        save_tables(Path(fspath(directory)), self.tables, self.run)

    def _dtypes(self, column: str) -> str:
        counts = self.tensors.group_by(column).agg(pl.col("numel").sum()).sort("numel", descending=True)
        return "+".join(counts[column])

    def _coverage(self) -> dict[str, Any]:
        def names(reason: str) -> list[str]:
            return self.coverage.filter(pl.col("reason") == reason)["name"].unique(maintain_order=True).to_list()

        lists = {r: names(r) for r in ("only_base", "only_tuned", "shape_mismatch", "not_numeric", "resized")}
        tied = self.tensors.filter(pl.col("duplicate_of").is_not_null())["name"].to_list()
        return {"compared": self.tensors.height, **lists, "tied": tied, "excluded": len(names("excluded"))}

    def __repr__(self) -> str:
        total = self.by().row(0, named=True)
        return (
            f"<Diff {self.run['base']['ref']} → {self.run['tuned']['ref']}: {total['changed']:,} of {total['numel']:,} "
            f"parameters changed in {total['tensors']} tensors>"
        )

    def _repr_html_(self) -> str:
        from html import escape

        keep = [c for c in ("kind", "tensors", "numel", "changed", "sparsity", "rel_l2") if c in self.by("kind").columns]
        return f"<p>{escape(repr(self))}</p>" + self.by("kind").select(keep)._repr_html_()


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


def load(directory: Ref) -> Diff:
    """A `Diff` that was saved. Raises `OutputError` where the directory holds none."""
    return Diff(*load_tables(Path(fspath(directory))))
