"""Tables of ranks for people: all definitions side by side, since one alone says what one wants it to say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from paramdiff.wording import number
from paramdiff_cli.render import LISTED, LONGEST, by_kind, make_table, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paramdiff import Diff

NARROW = 120  # columns of a terminal; below it the tables leave some of theirs out
SUSPECT = 1e-5  # energy_error beyond which something is wrong
DEFINITIONS = (
    ("numeric_rank", "numeric rank, σ > σ₁·max(m,n)·2⁻²³"),
    ("rank_at_1e-3", "σ > σ₁/1000"),
    ("rank_at_1e-2", "σ > σ₁/100"),
    ("energy_rank_99", "99 % of the energy Σσ²"),
    ("energy_rank_95", "95 %"),
    ("energy_rank_90", "90 %"),
)


def show(console: Console, diff: Diff) -> None:
    """Everything that `paramdiff rank` says of ranks."""
    total = diff.ranks_by().row(0, named=True)
    if not total["matrices"]:
        console.print("No tensor that was compared is a matrix, so there is no rank to speak of.")
        return
    for line in _remarks(diff, total):
        console.print(line, soft_wrap=True)
    if total["matrices"] == total["without_spectrum"]:
        return
    console.print(_overall(total))
    console.print(_one_direction(total), soft_wrap=True)
    for key in ["module", "layer"] if diff.ranks["layer"].drop_nulls().len() else ["module"]:
        console.print(f"\n[bold]Ranks by {key}, in % of full rank[/bold]")
        console.print(_rolled_up(diff, key, narrow=console.width < NARROW))


def _remarks(diff: Diff, total: dict[str, Any]) -> list[Text]:
    matrices = total["matrices"] - total["without_spectrum"]
    said = f"{matrices} {'matrix' if matrices == 1 else 'matrices'}, of full rank {total['full_rank']:,} in all"
    if total["zero"]:
        said += f"; {total['zero']} of them did not change (rank 0)"
    lines = [Text(said)]
    if "sketch" in total["methods"]:
        sketched = diff.ranks["method"].to_list().count("sketch")
        lines.append(
            Text(f"{sketched} of them sketched: leading σ only, each within `resolution` (ranks.parquet) of a true one")
        )
    lines += notes(diff.ranks)
    if total["uncertain"]:
        names = [_label(row) for row in diff.ranks.filter(diff.ranks["rank_uncertain"]).to_dicts()]
        lines.append(_listed(names, "numeric rank uncertain, a σ lies within the arithmetic's error of the cut"))
    if (total["energy_error_max"] or 0.0) > SUSPECT:
        lines.append(Text(f"Self-check failed: Σσ² is off by {total['energy_error_max']:.1e} of ‖Δ‖_F²; please report this"))
    return lines


def notes(table: Any) -> list[Text]:
    """What the column `note` says, a line for each thing that is said."""
    said: dict[str, list[str]] = {}
    for row in table.filter(table["note"].is_not_null()).to_dicts():
        said.setdefault(row["note"], []).append(_label(row))
    return [_listed(names, note) for note, names in said.items()]


def _listed(names: list[str], note: str) -> Text:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return plain(f"{', '.join(names[:LISTED])}{more}: {note}")


def _label(row: dict[str, Any]) -> str:
    """The name of a matrix, with the number of the expert where the name does not hold it."""
    in_stack = row["expert"] is not None and f"experts.{row['expert']}." not in row["name"] + "."
    cut = "…" if len(row["name"]) > LONGEST else ""
    return str(row["name"])[:LONGEST] + cut + (f" (expert {row['expert']})" if in_stack else "")


def _overall(total: dict[str, Any]) -> Table:
    table = make_table(["rank", "of full", "sum over matrices"])
    for name, label in DEFINITIONS:
        count = total[name]
        table.add_row(label, _percent(total[f"{name}_percent"]), "–" if count is None else f"{count:,}")
    return table


def _one_direction(total: dict[str, Any]) -> Text:
    parts = [f"stable rank {number(total['stable_rank_median'])}", f"entropy rank {number(total['entropy_rank_median'])}"]
    parts.append(f"σ₁/‖Δ‖_F {number(total['top1_share_median'])} (medians over matrices that changed)")
    parts.append(f"numeric rank {_percent(total['numeric_rank_percent_mean'])} on average over matrices")
    return Text(" · ".join(parts))


def _rolled_up(diff: Diff, key: str, *, narrow: bool) -> Table:
    heads = [key, "matrices", "numeric", "lowest", "σ>σ₁/1000", "σ>σ₁/100", "99 %", "95 %", "90 %"]
    heads += ["stable", "entropy", "σ₁/‖Δ‖_F", "largest σ₁"]
    shown = [heads.index(head) for head in (key, "matrices", "numeric", "σ>σ₁/100", "99 %", "90 %", "stable")]
    shown = shown if narrow else list(range(len(heads)))
    table = make_table([heads[column] for column in shown])
    rows = diff.ranks_by(key).to_dicts()
    if key == "module":
        by_kind(rows, diff.ranks)
    else:
        rows.sort(key=lambda row: (row[key] is not None, row[key] or 0))
    for row in rows:
        label = "outside" if row[key] is None else str(row[key])
        cells = [_percent(row["numeric_rank_percent"]), _percent(row["numeric_rank_percent_min"])]
        cells += [_percent(row[f"{name}_percent"]) for name, _ in DEFINITIONS[1:]]
        cells += [number(row[f"{name}_median"]) for name in ("stable_rank", "entropy_rank", "top1_share")]
        known = str(row["matrices"] - row["without_spectrum"])
        line: list[str | Text] = [plain(label[:LONGEST]), known, *cells, number(row["sigma_1_max"])]
        table.add_row(*(line[column] for column in shown))
    return table


def every_matrix(diff: Diff) -> Table:
    """One row per matrix, ranks as counts."""
    heads = ["matrix", "m × n", "numeric", "σ>σ₁/1000", "σ>σ₁/100", "99 %", "95 %", "90 %", "stable", "entropy", "σ₁"]
    table = make_table([*heads, "σ₁/‖Δ‖_F", "method"])
    for row in diff.ranks.to_dicts():
        name = _label(row)
        counts = ["–" if row[key] is None else f"{row[key]:,}" for key, _ in DEFINITIONS]
        if row["rank_uncertain"]:
            counts[0] += " ?"
        rest = [number(row[key]) for key in ("stable_rank", "entropy_rank", "sigma_1", "top1_share")]
        shape = "–" if row["rows"] is None else f"{row['rows']:,} × {row['cols']:,}"
        table.add_row(plain(name), shape, *counts, *rest, row["method"] or "–")
    return table


def _percent(value: float | None) -> str:
    """Already in percent. What is just below 100 is not shown as 100.

    >>> _percent(99.996), _percent(100.0), _percent(None)
    ('99.99 %', '100 %', '–')
    """
    if value is None:
        return "–"
    return f"{value:.0f} %" if value in (0, 100) else f"{min(value, 99.99):.2f} %"
