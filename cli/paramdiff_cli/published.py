"""`paramdiff published`: numbers from papers, and the same measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from paramdiff import wording
from paramdiff_cli import options, sink

if TYPE_CHECKING:
    from paramdiff import Diff
    from paramdiff.published import Published

SCRIPT = "2505.11711"  # whose counts --compat mukherjee2025 reproduces


def published(
    name: Annotated[
        str | None, typer.Argument(help="A pair of the table, or an unmistakable part of its name.", metavar="NAME")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Read the base from here instead.", metavar="REF")] = None,
    tuned: Annotated[str | None, typer.Option("--tuned", help="Read the tuned side from here.", metavar="REF")] = None,
    device: options.Device = "auto",
    download: options.Download = False,
    out: options.Out = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    threads: options.Threads = None,
) -> None:
    """Numbers that papers report for checkpoints on the Hub; with NAME, the pair is compared and set beside them.

    Where the paper counted with its own script (arXiv 2505.11711), it is counted in the same way.

    Examples:

        paramdiff published

        paramdiff published tulu-3-8b-dpo
    """
    from paramdiff import published as table
    from paramdiff.errors import OptionError

    if name is None:
        if json:
            sink.print_json([_entry(entry) for entry in table.entries()])
        else:
            _print_table(table.entries())
        return
    found = table.of(name)
    if not found[0].is_on_hub and (base is None or tuned is None):
        raise OptionError(
            f"{found[0].tuned} against {found[0].base} names no two repositories of the Hub.",
            hint="Give --base and --tuned.",
        )
    tolerances = [entry.tolerance for entry in found if entry.tolerance is not None]
    diff = sink.compared(
        base or f"hf://{found[0].base}",
        tuned or f"hf://{found[0].tuned}",
        quiet=quiet,
        out=out,
        download=download,
        tolerances=tolerances,
        compat="mukherjee2025" if any(SCRIPT in entry.source for entry in found) else None,
        device=device,
        threads=threads,
    )
    rows = [_entry(entry) | {"measured": _measured(entry, diff)} for entry in found]
    if json:
        sink.print_json({"published": rows} | diff.summary())
    elif not quiet:
        _print_pair(diff, rows)


def _entry(entry: Published) -> dict[str, Any]:
    return {
        "name": entry.name, "base": entry.base, "tuned": entry.tuned, "algorithm": entry.algorithm, "notion": entry.notion,
        "tolerance": entry.tolerance, "published": entry.sparsity, "source": entry.source,
    }  # fmt: skip


def _measured(entry: Published, diff: Diff) -> float | None:
    summary = diff.summary()
    if entry.notion == "changed_bf16":
        found: float | None = summary["sparsity_bf16"]
        return found
    shares = {one["tol"]: one["sparsity"] for one in summary["tolerances"]}
    return shares.get(entry.tolerance)


def _print_table(entries: Any) -> None:
    from paramdiff_cli import render

    table = render.make_table(["pair", "base", "algorithm", "unchanged by", "published", "source"], right_from=9)
    for entry in entries:
        table.add_row(entry.name, entry.base, entry.algorithm, _notion(entry), wording.percent(entry.sparsity), entry.source)
    sink.console().print(table)


def _notion(entry: Any) -> str:
    return "bf16 value" if entry.notion == "changed_bf16" else f"|Δ| ≤ {entry.tolerance:g}"


def _print_pair(diff: Diff, rows: list[dict[str, Any]]) -> None:
    from paramdiff_cli import render

    console = sink.console()
    console.print(render.heading(diff), soft_wrap=True)
    table = render.make_table(["unchanged by", "published", "measured", "source"])
    for row in rows:
        notion = "bf16 value" if row["notion"] == "changed_bf16" else f"|Δ| ≤ {row['tolerance']:g}"
        table.add_row(notion, wording.percent(row["published"]), wording.percent(row["measured"]), row["source"])
    console.print(table)
    if diff.run["options"]["compat"]:
        console.print("measured as the paper's script counts (--compat mukherjee2025)")
    for line in render.coverage(diff):
        console.print(line, soft_wrap=True)
    console.print(render.cost(diff), soft_wrap=True)
