"""Options that several commands share, written once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

Base = Annotated[str, typer.Argument(help="Checkpoint before training: a directory or a .safetensors file.", metavar="BASE")]
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
Out = Annotated[str | None, typer.Option("--out", help="Write all tables as Parquet, and run.json, into this directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no tables, progress or warnings.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU workers; all cores by default.")]


class Compat(StrEnum):
    """Published scripts whose numbers can be reproduced."""

    mukherjee2025 = "mukherjee2025"


CompatOption = Annotated[
    Compat | None,
    typer.Option(
        "--compat", help="Count as this paper's script does (arXiv 2505.11711, 2602.07729), at each --tol or 1e-5."
    ),
]
