"""`paramdiff rank`: of what rank is the change?"""

from __future__ import annotations

from typing import Annotated

import typer

from paramdiff_cli import options, sink


def rank(
    base: options.Base,
    tuned: options.Tuned,
    device: options.Device = "auto",
    include: options.Include = None,
    exclude: options.Exclude = None,
    renames: options.Map = None,
    method: options.MethodOption = options.Method.exact,
    matrices: Annotated[bool, typer.Option("--matrices", help="List every matrix as well.")] = False,
    download: options.Download = False,
    out: options.Out = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    threads: options.Threads = None,
) -> None:
    """Of what rank is the change? Singular values of Δ = tuned − base for every matrix, and every definition of rank.

    Matrices are 2-D tensors, the experts of a stack one by one, and convolutions as (out, rest).

    Examples:

        paramdiff rank base/ tuned/

        paramdiff rank base/ tuned/ --include self_attn --matrices --out results/

        paramdiff rank base/ tuned/ --json | jq .ranks.numeric_rank_percent
    """
    diff = sink.compared(
        base,
        tuned,
        quiet=quiet,
        out=out,
        download=download,
        measures=["change", "spectrum"],
        method=method.value,
        device=device,
        include=include or [],
        exclude=exclude or [],
        renames=renames or [],
        threads=threads,
    )
    if json:
        sink.print_json(diff.summary() | sink.ranks(diff))
    elif not quiet:
        from paramdiff_cli import render, render_ranks

        console = sink.console()
        console.print(render.heading(diff), soft_wrap=True)
        render_ranks.show(console, diff)
        if matrices:
            console.print("\n[bold]Every matrix[/bold]")
            console.print(render_ranks.every_matrix(diff))
        render.ending(console, diff, out)
