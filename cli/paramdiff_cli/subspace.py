"""`paramdiff subspace`: did training turn the weights' leading directions?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from paramdiff_cli import options, sink

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paramdiff import Diff


def subspace(
    base: options.Base,
    tuned: options.Tuned,
    k: Annotated[str, typer.Option("--k", help="How many leading directions to compare.", metavar="K,K,…")] = "16,64",
    alpha: Annotated[float, typer.Option(help="Share of elements in the principal and in the low-magnitude mask.")] = 0.5,
    device: options.Device = "auto",
    include: options.Include = None,
    exclude: options.Exclude = None,
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
        measures=["change", "subspace"],
        ks=ks,
        alpha=alpha,
        device=device,
        include=include or [],
        exclude=exclude or [],
        threads=threads,
    )
    if json:
        found = {
            "subspaces": diff.subspaces_by().to_dicts(),
            "subspaces_by_module": diff.subspaces_by("module").to_dicts(),
            "subspaces_by_layer": diff.subspaces_by("layer").to_dicts(),
            "matrices": diff.subspaces.to_dicts(),
        }
        sink.print_json(diff.summary() | found)
    elif not quiet:
        from paramdiff_cli import render

        console = sink.console()
        console.print(render.heading(diff), soft_wrap=True)
        _show(console, diff)
        for line in render.coverage(diff):
            console.print(line, soft_wrap=True)
        console.print(render.cost(diff), soft_wrap=True)
        if out is not None:
            console.print(render.plain(f"Tables written to {out}"), soft_wrap=True)


def _show(console: Console, diff: Diff) -> None:
    from paramdiff_cli import render, render_ranks

    if not diff.subspaces.height:
        console.print("No tensor that was compared is a matrix.")
        return
    for line in render_ranks.notes(diff.subspaces.unique(["name", "expert", "note"], maintain_order=True)):
        console.print(line, soft_wrap=True)
    chance = render.percent(diff.run["options"]["alpha"])
    for key in ("module", "layer"):
        for k in diff.run["options"]["ks"]:
            console.print(f"\n[bold]The {k} leading directions, by {key}[/bold]")
            console.print(_table(diff, key, k))
    console.print(
        f"changed elements (after rounding to bf16) on principal and on low-magnitude weights; chance gives {chance}"
    )


def _table(diff: Diff, key: str, k: int) -> Table:
    from paramdiff_cli import render

    heads = [
        key,
        "matrices",
        "θ_max(U)",
        "θ_max(V)",
        "overlap U",
        "chance",
        "overlap V",
        "chance",
        "NSS",
        "principal",
        "low",
    ]
    table = render.make_table(heads)
    rows: list[dict[str, Any]] = [row for row in diff.subspaces_by(key).to_dicts() if row["k"] == k]
    if key == "module":
        render.by_kind(rows, diff.subspaces)
    else:
        rows.sort(key=lambda row: (row[key] is not None, row[key] or 0))
    for row in rows:
        label = "outside" if row[key] is None else str(row[key])
        cells = [_degrees(row["angle_u_max_median"]), _degrees(row["angle_v_max_median"])]
        cells += [render.percent(row[f"{name}_mean"]) for name in ("overlap_u", "chance_u", "overlap_v", "chance_v")]
        cells += [
            render.number(row["nss_mean"]),
            render.percent(row["principal_overlap"]),
            render.percent(row["low_overlap"]),
        ]
        table.add_row(render.plain(label), str(row["matrices"] - row["left_out"]), *cells)
    return table


def _degrees(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}°"
