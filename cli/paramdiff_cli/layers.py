"""`paramdiff layers`: where did training change it?"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from paramdiff_cli import options, sink


class Value(StrEnum):
    """What the cells of the table show."""

    sparsity = "sparsity"
    sparsity_bits = "sparsity_bits"
    sparsity_bf16 = "sparsity_bf16"
    rel_l2 = "rel_l2"
    mean_abs_delta = "mean_abs_delta"
    max_abs_delta = "max_abs_delta"
    cosine = "cosine"


def layers(
    base: options.Base,
    tuned: options.Tuned,
    value: Annotated[Value, typer.Option("--value", help="What the cells show.")] = Value.sparsity,
    tol: options.Tol = None,
    device: options.Device = "auto",
    include: options.Include = None,
    exclude: options.Exclude = None,
    renames: options.Map = None,
    download: options.Download = False,
    out: options.Out = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    threads: options.Threads = None,
) -> None:
    """Where did training change it? The same pass, as a table of layers × modules.

    With --tol and the default --value, cells show the share with |Δ| ≤ TOL (the first one given).

    Examples:

        paramdiff layers base/ tuned/

        paramdiff layers base/ tuned/ --value rel_l2 --include 'mlp|self_attn'
    """
    diff = sink.compared(
        base,
        tuned,
        quiet=quiet,
        out=out,
        download=download,
        tolerances=tol or [],
        device=device,
        include=include or [],
        exclude=exclude or [],
        renames=renames or [],
        threads=threads,
    )
    if json:
        sink.print_json(diff.summary() | {"layers": diff.by("layer", "module").to_dicts()})
    elif not quiet:
        from paramdiff_cli import render

        console = sink.console()
        column = f"sparsity[{tol[0]!r}]" if tol and value is Value.sparsity else value.value
        console.print(render.heading(diff), soft_wrap=True)
        console.print(f"\n[bold]{column.replace('[', ' at ').rstrip(']')} by layer and module[/bold]")
        table, outside = render.layers_by_modules(diff, column)
        console.print(table)
        if outside:
            console.print(outside, soft_wrap=True)
        for line in render.coverage(diff):
            console.print(line, soft_wrap=True)
