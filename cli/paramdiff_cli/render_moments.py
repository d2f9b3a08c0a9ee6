"""Tables of optimizer state for people: one checkpoint, or two with the ratio between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from paramdiff import wording
from paramdiff_cli import render, render_ranks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paramdiff import Moments

SHOWN = (  # column, head, how it is written, whether a narrow terminal has room for it
    ("sqrt_vhat_mean", "√v̂ mean", wording.number, True),
    ("sqrt_vhat_std", "√v̂ std", wording.number, True),
    ("eff_lr_p1", "lr_eff 1 %", wording.number, False),
    ("eff_lr_p50", "median", wording.number, True),
    ("eff_lr_p99", "99 %", wording.number, False),
    ("log10_eff_lr_std", "decades", wording.number, True),
    ("update_rms", "step rms", wording.number, False),
    ("adaptivity", "adaptivity", wording.number, True),
    ("equivalent_sgd_lr", "SGD lr", wording.number, True),
    ("bf16_visible", "bf16 visible", wording.percent, True),
)
COMPARED = (
    ("v_std", "std of v"),
    ("sqrt_v_std", "std of √v"),
    ("sqrt_vhat_mean", "mean of √v̂"),
    ("sqrt_vhat_std", "std of √v̂"),
    ("eff_lr_p50", "median effective learning rate"),
    ("log10_eff_lr_std", "its spread, in decades"),
    ("update_rms", "step, rms"),
    ("adaptivity", "adaptivity, 1 − cos(u, m̂)"),
    ("equivalent_sgd_lr", "equivalent SGD learning rate"),
    ("bf16_visible", "share of the step that bf16 shows"),
)
LEGEND = (
    "lr_eff: η/(√v̂ + ε), percentiles over elements; decades: spread of its log10; step: η·u, u = m̂/(√v̂ + ε); adaptivity: "
    "1 − cos(u, m̂), 0 where SGD with momentum would have gone the same way; SGD lr: the rate at which it would have come "
    "nearest; bf16 visible: share of weights that the step changes once rounded to bf16"
)


def show(console: Console, found: Moments, out: str | None) -> None:
    """Everything that `paramdiff adam` says."""
    summary = found.summary()
    for side in found.sides:
        console.print(_heading(found, side, summary[side]), soft_wrap=True)
    if len(found.sides) == 1:
        for line in _verdict(summary["first"]):
            console.print(line, soft_wrap=True)
        for key in _keys(found):
            console.print(f"\n[bold]By {key}[/bold]")
            console.print(_table(found, key, narrow=console.width < render_ranks.NARROW))
        console.print(LEGEND)
    else:
        console.print(_side_by_side(summary))
        console.print(f"\n[bold]By {_keys(found)[0]}: second / first[/bold]")
        console.print(_ratios(found, _keys(found)[0]))
        for line in _gradient(found, summary):
            console.print(line, soft_wrap=True)
    for line in _coverage(found):
        console.print(line, soft_wrap=True)
    run = found.run
    console.print(Text(f"{run['bytes_read'] / 1e6:,.1f} MB read in {run['seconds']:.2f} s on {run['options']['device']}"))
    if out is not None:
        console.print(render.plain(f"Tables written to {out}"), soft_wrap=True)


def _keys(found: Moments) -> list[str]:
    return ["module", "layer"] if found.parameters["layer"].drop_nulls().len() else ["module"]


def _heading(found: Moments, side: str, total: dict[str, Any]) -> Text:
    label = {1: "state "}.get(len(found.sides), side.ljust(6))
    steps = [total["step_min"], total["step_max"]]
    at = (
        "steps not counted"
        if steps[0] is None
        else f"step {steps[0]}"
        if steps[0] == steps[1]
        else f"steps {steps[0]} to {steps[1]}"
    )
    kinds = "/".join(dict.fromkeys(kind for kind in (total["dtype_m"], total["dtype_v"]) if kind))
    said = f"{total['optimizer'] or 'no state'}, {at}, moments in {kinds}" if kinds else f"{total['optimizer']}, {at}"
    settings = [("β₁", total["beta1"]), ("β₂", total["beta2"]), ("ε", total["eps"]), ("weight decay", total["weight_decay"])]
    listed = " · ".join(f"{name} {value:g}" for name, value in settings if value is not None)
    rate = "learning rate not known" if total["lr"] is None else f"learning rate {total['lr']:g}"
    rates = found.parameters.filter(found.parameters["side"] == side)["lr"].drop_nulls().unique().sort()
    if len(rates) > 1:
        rate = f"learning rates {rates[0]:g} to {rates[-1]:g}"
    return Text(
        f"{label} {wording.printable(total['ref'])}\n"
        f"       {total['numel']:,} parameters in {total['tensors']} tensors; {said}\n"
        f"       {listed}{' · ' if listed else ''}{rate} ({total['lr_source']}); {total['naming']}"
    )


def _verdict(total: dict[str, Any]) -> list[Text]:
    lines = []
    if total["adaptivity"] is not None:
        said = f"adaptivity {wording.number(total['adaptivity'])}"
        if total["equivalent_sgd_lr"] is not None:
            said += f" · equivalent SGD learning rate {wording.number(total['equivalent_sgd_lr'])}"
        if total["log10_eff_lr_std"] is not None:
            said += f" · effective learning rate {wording.number(total['eff_lr_p50'])} (1 % to 99 %: "
            said += f"{wording.number(total['eff_lr_p1'])} to {wording.number(total['eff_lr_p99'])})"
        lines.append(Text(said))
    if total["update_rms"] is not None:
        said = f"step: rms {wording.number(total['update_rms'])}, largest {wording.number(total['update_max'])}"
        saturated, small = (wording.percent(total[f"update_{name}"]) for name in ("saturated", "small"))
        said += f" · |u| > 0.9 in {saturated}, < 0.1 in {small}"
        if total["bf16_visible"] is not None:
            said += f" · {wording.percent(total['bf16_visible'])} of the weights would change in bf16"
        lines.append(Text(said))
    if total["v_zero"]:
        lines.append(Text(f"v is zero in {wording.percent(total['v_zero'])} of the elements: no gradient ever reached them"))
    if total["nonfinite"]:
        lines.append(Text(f"{total['nonfinite']:,} elements with NaN, infinite or negative moments left out"))
    return lines


def _table(found: Moments, key: str, *, narrow: bool) -> Table:
    shown = [one for one in SHOWN if one[3] or not narrow]
    table = render.make_table([key, "tensors", "parameters", *(head for _, head, _, _ in shown)])
    for row in _sorted(found, found.by(key).to_dicts(), key):
        label = "outside" if row[key] is None else str(row[key])
        cells: list[Any] = [write(row[column]) for column, _, write, _ in shown]
        table.add_row(render.plain(label[: render.LONGEST]), str(row["tensors"]), f"{row['numel']:,}", *cells)
    return table


def _sorted(found: Moments, rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    if key == "module":
        render.by_kind(rows, found.parameters)
        return rows
    return sorted(rows, key=lambda row: (row[key] is not None, row[key] or 0))


def _side_by_side(summary: dict[str, Any]) -> Table:
    table = render.make_table(["", "first", "second", "second / first"])
    ratios = summary["ratios"] or {}
    for column, label in COMPARED:
        first, second = summary["first"][column], summary["second"][column]
        if first is None and second is None:
            continue
        table.add_row(label, wording.number(first), wording.number(second), _times(ratios.get(column)))
    return table


def _ratios(found: Moments, key: str) -> Table:
    columns = ("v_std", "sqrt_v_std", "sqrt_vhat_mean", "eff_lr_p50", "update_rms", "adaptivity", "equivalent_sgd_lr")
    heads = dict(COMPARED)
    table = render.make_table([key, "tensors", *(heads[column] for column in columns)])
    for row in _sorted(found, found.ratios(key).to_dicts(), key):
        label = "outside" if row[key] is None else str(row[key])
        table.add_row(
            render.plain(label[: render.LONGEST]),
            str(row["tensors"]),
            *(_times(row[f"{column}_ratio"]) for column in columns),
        )
    return table


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3g} ×"


def _gradient(found: Moments, summary: dict[str, Any]) -> list[Text]:
    """The gradient between two saves, or why there is none."""
    total = summary["second"]
    if total["grad_norm"] is None:
        return [render.plain(f"No gradient: {summary['no_gradient']}.")]
    check = "" if total["grad_check"] is None else f" (v agrees within {total['grad_check']:.1e})"
    return [
        Text(
            f"gradient of the second's step, as Adam saw it: norm {wording.number(total['grad_norm'])} · "
            f"cos(momentum, gradient) {wording.number(total['momentum_grad_cosine'])}{check}"
        )
    ]


def _coverage(found: Moments) -> list[Text]:
    """What was not measured, and why."""
    from paramdiff.optimizers.plan import REASONS

    lines = []
    for (side, reason), group in found.coverage.group_by("side", "reason", maintain_order=True):
        names = group["name"].to_list()
        more = f" and {len(names) - render.LISTED} more" if len(names) > render.LISTED else ""
        listed = ", ".join(name[: render.LONGEST] for name in names[: render.LISTED])
        which = f"{side}: " if len(found.sides) == 2 and not str(reason).startswith("only_") else ""
        lines.append(
            render.plain(
                f"{which}{len(names)} tensor{'s' if len(names) > 1 else ''}, {REASONS[str(reason)]}: {listed}{more}"
            )
        )
    notes = found.parameters["note"].drop_nulls().unique(maintain_order=True)
    return [*lines, *(render.plain(note) for note in notes)]
