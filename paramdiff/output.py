"""Results on disk: written aside and renamed, so that a killed or failing run leaves no half file and loses no old one."""

from __future__ import annotations

import errno
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

    All files are written to a temporary directory beside it first. Only when that has succeeded do they take the places
    of an older result, whose other tables go; a failure on the way puts everything back. Other files are left alone.
    Raises `OutputError` where the disk is full or the place cannot be written.
    """
    target = Path(directory)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        (temporary / "new").mkdir()
        for name, table in tables.items():
            table.write_parquet(temporary / "new" / f"{name}.parquet")
        text = json.dumps(run, indent=2, allow_nan=False) + "\n"
        (temporary / "new" / RUN_FILE).write_text(text, encoding="utf-8")
        target.mkdir(exist_ok=True)
        _replace(target, temporary)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise OutputError(f"Cannot write results to {target}: {reason}.", hint="Nothing there was changed.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_aside(path: str | os.PathLike[str], content: bytes) -> None:
    """Write one file under another name and rename it. Raises `OutputError`; what was there before then stays."""
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(target))
        handle, name = tempfile.mkstemp(prefix=".paramdiff.", suffix=".part", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # as any file that is written here, where mkstemp's is for its owner only
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror or error}.", hint="Nothing there was changed.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _replace(target: Path, temporary: Path) -> None:
    """Move the older result out and the new one in, or neither."""
    new = sorted(path.name for path in (temporary / "new").iterdir())
    old = [name for name in {*new, *_files_of(target)} if (target / name).exists()]
    for name in old:
        if (target / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} is a directory", str(target / name))
    (temporary / "old").mkdir()
    moves = [(target / name, temporary / "old" / name) for name in sorted(old, key=RUN_FILE.__ne__)]  # run.json leaves first
    moves += [(temporary / "new" / name, target / name) for name in sorted(new, key=RUN_FILE.__eq__)]  # and comes last
    done = []
    try:
        for source, destination in moves:
            os.replace(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.replace(destination, source)
        raise


def _files_of(directory: Path) -> list[str]:
    """The files of an older result, by its run.json."""
    try:
        run = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
        return [RUN_FILE, *(f"{name}.parquet" for name in run["tables"] if isinstance(name, str) and "/" not in name)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def is_result(directory: str | Path) -> bool:
    """True for a directory that `save_tables` has written, by its run.json."""
    return len(_files_of(Path(directory))) > 1


def load_tables(directory: str | Path) -> tuple[dict[str, pl.DataFrame], dict[str, Any]]:
    """Read back what `save_tables` wrote. Raises `OutputError` where the directory holds no complete result."""
    source = Path(directory)
    try:
        run = json.loads((source / RUN_FILE).read_text(encoding="utf-8"))
        sides = ("first",) if isinstance(run, dict) and run.get("command") == "adam" else ("base", "tuned")
        if not isinstance(run, dict) or not {"tables", "options", *sides} <= run.keys():
            raise OutputError(f"{source / RUN_FILE} was not written by paramdiff.")
        return {name: pl.read_parquet(source / f"{name}.parquet") for name in run["tables"]}, run
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise OutputError(f"{source} holds no result of paramdiff: {str(error).splitlines()[0]}.") from error
