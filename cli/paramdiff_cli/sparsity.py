"""`paramdiff sparsity`: how much did training change?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paramdiff_cli import options, sink

if TYPE_CHECKING:
    from paramdiff import Diff


def sparsity(
    base: options.Base,
    tuned: options.Tuned,
    tol: options.Tol = None,
    device: options.Device = "auto",
    include: options.Include = None,
    exclude: options.Exclude = None,
    out: options.Out = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    compat: options.CompatOption = None,
    threads: options.Threads = None,
) -> None:
    """How much did training change? Counts are exact; both files are read once.

    Sparsity is the share of parameters that did NOT change.

    Examples:

        paramdiff sparsity base/ tuned/ --tol 1e-5

        paramdiff sparsity base/ tuned/ --tol 1e-5 --tol 1e-8 --out results/ --json

        paramdiff sparsity base/ tuned/ --include 'layers\\.0\\.' --exclude norm

        paramdiff sparsity base/ tuned/ --compat mukherjee2025 --tol 1e-5
    """
    diff = sink.compared(
        base,
        tuned,
        quiet=quiet,
        out=out,
        tolerances=tol or [],
        device=device,
        include=include or [],
        exclude=exclude or [],
        compat=compat.value if compat else None,
        threads=threads,
    )
    if json:
        sink.print_json(diff.summary())
    elif not quiet:
        _show(diff, out)


def _show(diff: Diff, out: str | None) -> None:
    from paramdiff_cli import render

    console = sink.console()
    console.print(render.heading(diff))
    console.print(render.overall(diff))
    console.print(render.rolled_up(diff, "kind"))
    if diff.tensors["layer"].drop_nulls().len():
        console.print(render.rolled_up(diff, "layer"))
    for line in render.coverage(diff):
        console.print(line, soft_wrap=True)
    console.print(render.cost(diff), soft_wrap=True)
    if out is not None:
        console.print(f"Tables written to {out}", markup=False, soft_wrap=True)
