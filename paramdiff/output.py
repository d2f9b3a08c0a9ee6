"""Results on disk: written aside and renamed, so that a killed or failing run leaves no half file and loses no old one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from paramdiff.errors import OutputError

RUN_FILE = "run.json"


def save_tables(directory: str | Path, tables: Mapping[str, pl.DataFrame], run: Mapping[str, Any]) -> None:
    """Write `<table>.parquet` for each table, then run.json, into `directory` (made if missing).

    All files are written to a temporary directory beside it first; only when that has succeeded are they moved, run.json
    last. Raises `OutputError` where the disk is full or the place cannot be written.
    """
    target = Path(directory)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        for name, table in tables.items():
            table.write_parquet(temporary / f"{name}.parquet")
        (temporary / RUN_FILE).write_text(json.dumps(run, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        target.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda path: path.name == RUN_FILE):
            os.replace(file, target / file.name)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise OutputError(f"Cannot write results to {target}: {reason}.", hint="Nothing there was changed.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def load_tables(directory: str | Path) -> tuple[dict[str, pl.DataFrame], dict[str, Any]]:
    """Read back what `save_tables` wrote. Raises `OutputError` where the directory holds no complete result."""
    source = Path(directory)
    try:
        run = json.loads((source / RUN_FILE).read_text(encoding="utf-8"))
        if not isinstance(run, dict) or "tables" not in run:
            raise OutputError(f"{source / RUN_FILE} was not written by paramdiff.")
        return {name: pl.read_parquet(source / f"{name}.parquet") for name in run["tables"]}, run
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise OutputError(f"{source} holds no result of paramdiff: {str(error).splitlines()[0]}.") from error
