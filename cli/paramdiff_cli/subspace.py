"""`paramdiff subspace`: did training turn the weights' leading directions?"""

from __future__ import annotations

from typing import Annotated

import typer

from paramdiff_cli import options, sink


def subspace(
    base: options.Base,
    tuned: options.Tuned,
    k: Annotated[str, typer.Option("--k", help="How many leading directions to compare.", metavar="K,K,…")] = "16,64",
    alpha: Annotated[float, typer.Option(help="Share of elements in the principal and in the low-magnitude mask.")] = 0.5,
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
    """Did training turn the weights' leading directions, and does it avoid them? (arXiv 2511.08567)

    Principal angles between the K leading singular directions before and after, spectrum drift (NSS), and the share of
    changed elements that fall on principal and on low-magnitude weights, each with the level that chance would give.
    Embeddings take long and say little; leave them out with --exclude 'embed|lm_head'.

    Examples:

        paramdiff subspace base/ tuned/

        paramdiff subspace base/ tuned/ --k 16,64,256 --alpha 0.1 --exclude 'embed|lm_head'
    """
    from paramdiff.errors import OptionError

    try:
        ks = [int(part) for part in k.split(",") if part.strip()]
    except ValueError:
        raise OptionError(f"--k {k[:40]!r} is no list of whole numbers.", hint="Write --k 16,64.") from None
    diff = sink.compared(
        base,
        tuned,
        quiet=quiet,
        out=out,
        download=download,
        measures=["change", "subspace"],
        ks=ks,
        alpha=alpha,
        device=device,
        include=include or [],
        exclude=exclude or [],
        renames=renames or [],
        threads=threads,
    )
    if json:
        sink.print_json(diff.summary() | sink.subspaces(diff))
    elif not quiet:
        from paramdiff_cli import render, render_subspaces

        console = sink.console()
        console.print(render.heading(diff), soft_wrap=True)
        render_subspaces.show(console, diff)
        render.ending(console, diff, out)
