"""Tables for people. Shares near 100 % keep as many digits as it takes to see what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from paramdiff import wording
from paramdiff.names import KINDS

if TYPE_CHECKING:
    from rich.console import Console

    from paramdiff import Diff

NOTIONS = (
    ("changed", "sparsity", "in value"),
    ("changed_bits", "sparsity_bits", "in stored bits"),
    ("changed_bf16", "sparsity_bf16", "after rounding to bf16"),
)
LISTED = 3  # names shown for each reason in the coverage
LONGEST = 200  # characters of a name
TIED = "tied to the embedding: compared, and counted once"


def make_table(columns: Sequence[str], *, right_from: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(plain(column), justify="right" if number >= right_from else "left", overflow="fold")
    return table


def plain(text: str) -> Text:
    """Text from a file: never read as markup, and without control codes."""
    return Text(wording.printable(text))


def show(console: Console, diff: Diff, out: str | None = None) -> None:
    """Everything that `paramdiff sparsity` says; `out` is where tables were written."""
    console.print(heading(diff), soft_wrap=True)
    console.print(overall(diff))
    console.print(magnitudes(diff), soft_wrap=True)
    keys = ["kind", "layer"] if diff.tensors["layer"].drop_nulls().len() else ["kind"]
    for key in keys:
        console.print(f"\n[bold]By {key}[/bold]")
        console.print(rolled_up(diff, key))
    if "ranks" in diff.tables:
        from paramdiff_cli import render_ranks

        render_ranks.show(console, diff)
    if "subspaces" in diff.tables:
        from paramdiff_cli import render_subspaces

        render_subspaces.show(console, diff)
    ending(console, diff, out)


def heading(diff: Diff) -> Text:
    summary = diff.summary()
    types = summary["dtype_base"], summary["dtype_tuned"]
    said = f"both sides stored in {types[0]}" if types[0] == types[1] else f"base stored in {types[0]}, tuned in {types[1]}"
    from_what = [f"{side} from {summary[f'stored_{side}']}" for side in ("base", "tuned") if f"stored_{side}" in summary]
    said += f" ({', '.join(from_what)})" if from_what else ""
    plural = "" if summary["tensors"] == 1 else "s"
    return Text(
        f"base   {wording.printable(summary['base'])}\ntuned  {wording.printable(summary['tuned'])}\n"
        f"{summary['numel']:,} parameters in {summary['tensors']} tensor{plural}; {said}; "
        f"compared in {summary['compared_in'].replace('+', ' and ')}"
    )


def overall(diff: Diff) -> Table:
    """What changed, by every notion. One that is undefined for some tensor has no total, and says so."""
    summary = diff.summary()
    table = make_table(["unchanged", "share", "changed", f"of {summary['numel']:,}"])
    for count, share, label in NOTIONS:
        if summary[count] is None:
            undefined = diff.tensors[count].null_count()
            every = undefined == diff.tensors.height
            label += " (the types differ)" if every else f" (the types of {undefined} tensors differ)"
        shown = "–" if summary[count] is None else f"{summary[count]:,}"
        table.add_row(label, wording.percent(summary[share]), shown, wording.percent(_density(summary[share])))
    for entry in summary["tolerances"]:
        label = f"{summary.get('compat', '|Δ|')} ≤ {entry['tol']:g}"
        table.add_row(
            label, wording.percent(entry["sparsity"]), f"{entry['above']:,}", wording.percent(_density(entry["sparsity"]))
        )
    return table


def magnitudes(diff: Diff) -> Text:
    """How far it went, in a line."""
    summary = diff.summary()
    parts = []
    if summary["max_abs_delta"] is not None:
        parts = [
            f"‖Δ‖/‖base‖ {wording.number(summary['rel_l2'])}",
            f"largest |Δ| {wording.number(summary['max_abs_delta'])}",
        ]
    parts.append(f"{summary['sign_flips']:,} sign flips")
    for side in ("base", "tuned"):
        if summary[f"nonfinite_{side}"]:
            parts.append(f"{summary[f'nonfinite_{side}']:,} NaN or infinite in the {side} side")
    if "codes" in summary:
        parts.append(f"{summary['codes_changed']:,} of {summary['codes']:,} quantised codes changed")
    return Text(" · ".join(parts))


def _density(sparsity: float | None) -> float | None:
    return None if sparsity is None else 1 - sparsity


def rolled_up(diff: Diff, key: str) -> Table:
    """One row per kind or layer, elements pooled."""
    tolerances = [float(t) for t in diff.run["options"]["tolerances"]]
    heads = [
        key,
        "tensors",
        "parameters",
        "changed",
        "unchanged",
        *(f"≤ {t:g}" for t in tolerances),
        "‖Δ‖/‖base‖",
        "mean |Δ|",
    ]
    table = make_table(heads)
    rows = diff.by(key).to_dicts()
    order = {kind: position for position, kind in enumerate(KINDS)}
    rows.sort(key=lambda r: order.get(r[key], -1) if key == "kind" else (r[key] is not None, r[key] or 0))
    for row in rows:
        label = "outside" if row[key] is None else str(row[key])
        shares = [wording.percent(row["sparsity"]), *(wording.percent(row[f"sparsity[{t!r}]"]) for t in tolerances)]
        cells: list[str | Text] = [plain(label), str(row["tensors"]), f"{row['numel']:,}", f"{row['changed']:,}", *shares]
        table.add_row(*cells, wording.number(row.get("rel_l2")), wording.number(row.get("mean_abs_delta")))
    return table


def by_kind(rows: list[dict[str, Any]], table: Any) -> None:
    """Sort rows for modules by what kind they are, in the order of `KINDS`."""
    kinds = dict(zip(table["module"], table["kind"], strict=True))
    rows.sort(key=lambda row: KINDS.index(kinds[row["module"]]))


def layers_by_modules(diff: Diff, column: str) -> tuple[Table, Text]:
    """A pivot, one row per layer and one column per module with `column` in the cells; and what lies outside layers."""
    cells = {(row["layer"], row["module"]): row for row in diff.by("layer", "module").to_dicts()}
    layers = sorted({layer for layer, _ in cells if layer is not None})
    modules = list(dict.fromkeys(module for layer, module in cells if layer is not None))
    shown = wording.percent if column.startswith("sparsity") else wording.number
    table = make_table(["layer", *modules])
    for layer in layers:
        found: list[Any] = [cells.get((layer, module)) for module in modules]
        table.add_row(str(layer), *(shown(cell[column]) if cell else "" for cell in found))
    outside = [f"{module} {shown(row[column])}" for (layer, module), row in cells.items() if layer is None]
    return table, plain("Outside layers: " + " · ".join(outside) if outside else "")


def coverage(diff: Diff) -> Iterator[Text]:
    """What was not compared, or not counted twice, and why."""
    from paramdiff.pairing import REASONS

    found = diff.summary()["coverage"]
    for reason, said in {**REASONS, "tied": TIED}.items():
        names = found[reason]
        if reason == "excluded" or not names:
            continue
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        listed = ", ".join(name[:LONGEST] + ("…" if len(name) > LONGEST else "") for name in names[:LISTED])
        yield plain(f"{len(names)} tensor{'s' if len(names) > 1 else ''}, {said}: {listed}{more}")
    if found["excluded"]:
        yield plain(f"{found['excluded']} tensor{'s' if found['excluded'] > 1 else ''} {REASONS['excluded']}")


def ending(console: Console, diff: Diff, out: str | None) -> None:
    """What every comparison ends with: what was not compared, what it took, where the tables are."""
    for line in coverage(diff):
        console.print(line, soft_wrap=True)
    if diff.run.get("same_file"):
        console.print(
            f"{diff.run['same_file']} tensors lie in files that are the same on both sides, by their hash: read once"
        )
    console.print(cost(diff), soft_wrap=True)
    if out is not None:
        console.print(plain(f"Tables written to {out}"), soft_wrap=True)


def cost(diff: Diff) -> Text:
    seconds, read = diff.run["seconds"], diff.run["bytes_read"]
    return Text(f"{read / 1e6:,.1f} MB read in {seconds:.2f} s on {diff.run['options']['device']}")
