"""`paramdiff sparsity`: how much did training change?"""

from __future__ import annotations

from paramdiff_cli import options, sink


def sparsity(
    base: options.Base,
    tuned: options.Tuned,
    tol: options.Tol = None,
    device: options.Device = "auto",
    include: options.Include = None,
    exclude: options.Exclude = None,
    renames: options.Map = None,
    download: options.Download = False,
    out: options.Out = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    compat: options.CompatOption = None,
    measures: options.Measures = None,
    threads: options.Threads = None,
) -> None:
    """How much did training change? Counts are exact; both files are read once.

    Sparsity is the share of parameters that did NOT change.

    Examples:

        paramdiff sparsity base/ tuned/ --tol 1e-5

        paramdiff sparsity base/ tuned/ --tol 1e-5 --tol 1e-8 --out results/ --json

        paramdiff sparsity base/ tuned/ --include 'layers\\.0\\.' --exclude norm

        paramdiff sparsity base/ run/global_step_40 --map '^actor\\.=model.'

        paramdiff sparsity base/ tuned/ --compat mukherjee2025 --tol 1e-5

        paramdiff sparsity base/ tuned/ --measures change,magnitude,spectrum
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
        compat=compat.value if compat else None,
        **options.chosen(measures),
        threads=threads,
    )
    if json:
        found = sink.subspaces(diff) if "subspaces" in diff.tables else {}
        sink.print_json(diff.summary() | found | (sink.ranks(diff) if "ranks" in diff.tables else {}))
    elif not quiet:
        from paramdiff_cli import render

        render.show(sink.console(), diff, out)
