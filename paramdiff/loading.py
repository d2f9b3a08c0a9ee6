"""`load`: a result that was saved."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

from paramdiff.diff import Diff
from paramdiff.moments import Moments
from paramdiff.output import load_tables


def load(directory: str | PathLike[str]) -> Diff | Moments:
    """The `Diff` or (of `adam`) the `Moments` that was saved. Raises `OutputError` where the directory holds none."""
    tables, run = load_tables(Path(fspath(directory)))
    return Moments(tables, run) if run.get("command") == "adam" else Diff(tables, run)
