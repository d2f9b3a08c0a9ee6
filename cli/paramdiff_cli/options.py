"""Options that several commands share, written once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

Base = Annotated[
    str,
    typer.Argument(help="Checkpoint before training: a directory or file, of any kind that trainers write.", metavar="BASE"),
]
Tuned = Annotated[str, typer.Argument(help="Checkpoint after training.", metavar="TUNED")]
Tol = Annotated[
    list[float] | None,
    typer.Option("--tol", help="Also count elements with |Δ| > TOL, strictly; may be repeated.", metavar="TOL"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", metavar="DEVICE")]
Include = Annotated[
    list[str] | None, typer.Option("--include", help="Only parameters whose name matches this regex.", metavar="RE")
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="Leave out parameters whose name matches this regex.", metavar="RE")
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map", help="Rename parameters before pairing, on both sides: a regex and its replacement.", metavar="OLD=NEW"
    ),
]
Download = Annotated[
    bool, typer.Option("--download", help="Put models of the Hub into the local cache first, instead of streaming them.")
]
Out = Annotated[str | None, typer.Option("--out", help="Write all tables as Parquet, and run.json, into this directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no tables, progress or warnings.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU workers; all cores by default.")]


class Method(StrEnum):
    """How spectra are found."""

    exact = "exact"
    sketch = "sketch"


MethodOption = Annotated[
    Method,
    typer.Option("--method", help="exact: every singular value. sketch: the leading ones of large matrices, with a bound."),
]


class Compat(StrEnum):
    """Published scripts whose numbers can be reproduced."""

    mukherjee2025 = "mukherjee2025"


CompatOption = Annotated[
    Compat | None,
    typer.Option(
        "--compat", help="Count as this paper's script does (arXiv 2505.11711, 2602.07729), at each --tol or 1e-5."
    ),
]

Measures = Annotated[
    str | None,
    typer.Option(
        "--measures",
        help="What to measure in the one pass: change,magnitude,rows (the default), spectrum, subspace.",
        metavar="A,B,…",
    ),
]


def chosen(measures: str | None) -> dict[str, Any]:
    """The `measures` argument of `compare` for a list with commas; nothing where none was given.

    >>> chosen("change, spectrum"), chosen(None)
    ({'measures': ['change', 'spectrum']}, {})
    """
    return {} if measures is None else {"measures": [name.strip() for name in measures.split(",") if name.strip()]}
