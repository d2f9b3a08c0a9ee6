"""Tables of subspaces for people, each number beside what chance would give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paramdiff import wording
from paramdiff_cli import render, render_ranks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paramdiff import Diff

NO_ANGLE = 1e-6  # degrees


def show(console: Console, diff: Diff) -> None:
    """Everything that `paramdiff subspace` says of subspaces."""
    if not diff.subspaces.height:
        console.print("No tensor that was compared is a matrix.")
        return
    for line in render_ranks.notes(diff.subspaces.unique(["name", "expert", "note"], maintain_order=True)):
        console.print(line, soft_wrap=True)
    chance = wording.percent(diff.run["options"]["alpha"])
    known = sorted(set(diff.subspaces.filter(diff.subspaces["angle_u_max"].is_not_null())["k"]))
    if not known:
        return
    for key in ["module", "layer"] if diff.subspaces["layer"].drop_nulls().len() else ["module"]:
        for k in known:
            console.print(f"\n[bold]The {k} leading directions, by {key}[/bold]")
            console.print(_table(diff, key, k, narrow=console.width < render_ranks.NARROW))
    said = (
        "θ_max: largest angle between the leading directions before and after, median over matrices; overlap: mean cos² of "
        "the angles; NSS: ‖σ₊ − σ₀‖/‖σ₀‖; principal, low: changed elements (after rounding to bf16) on principal and on "
        f"low-magnitude weights, where chance gives {chance}"
    )
    console.print(said)


def _table(diff: Diff, key: str, k: int, *, narrow: bool) -> Table:
    """One row per module or layer."""
    heads = [key, "matrices", "θ_max(U)", "θ_max(V)", "overlap U", "chance", "overlap V", "chance"]
    heads += ["NSS", "principal", "low"]
    shown = [0, 1, 2, 3, 8, 9, 10] if narrow else list(range(len(heads)))
    table = render.make_table([heads[column] for column in shown])
    rows: list[dict[str, Any]] = [row for row in diff.subspaces_by(key).to_dicts() if row["k"] == k]
    if key == "module":
        render.by_kind(rows, diff.subspaces)
    else:
        rows.sort(key=lambda row: (row[key] is not None, row[key] or 0))
    for row in rows:
        label = "outside" if row[key] is None else str(row[key])
        cells = [_degrees(row["angle_u_max_median"]), _degrees(row["angle_v_max_median"])]
        cells += [wording.percent(row[f"{name}_mean"]) for name in ("overlap_u", "chance_u", "overlap_v", "chance_v")]
        cells += [
            wording.number(row["nss_mean"]),
            *(wording.percent(row[f"{mask}_overlap"]) for mask in ("principal", "low")),
        ]
        line: list[Any] = [render.plain(label[: render.LONGEST]), str(row["matrices"] - row["left_out"]), *cells]
        table.add_row(*(line[column] for column in shown))
    return table


def _degrees(value: float | None) -> str:
    """An angle; below what float64 resolves it is none.

    >>> _degrees(1.5), _degrees(1e-13), _degrees(None)
    ('1.5°', '0°', '–')
    """
    return "–" if value is None else "0°" if value < NO_ANGLE else f"{value:.3g}°"
