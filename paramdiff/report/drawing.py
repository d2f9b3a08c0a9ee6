"""Which figures a report has: groups of them, each with menus to choose one by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from paramdiff import wording
from paramdiff.columns import TABLES
from paramdiff.diff import Diff
from paramdiff.errors import OptionError
from paramdiff.moments import Moments
from paramdiff.plots import heat, histograms, profiles, quantities, runs, spectra, striped
from paramdiff.plots import moments as adams
from paramdiff.plots.canvas import Canvas
from paramdiff.report import packing

EXPERTS = ("sparsity", "sparsity_bf16", "rel_l2", "max_abs_delta", "energy_rank_99_percent", "top1_share")
ADAM = (
    "adaptivity", "eff_lr_p50", "log10_eff_lr_std", "sqrt_vhat_mean", "sqrt_vhat_std", "v_zero", "equivalent_sgd_lr",
    "update_rms", "update_saturated", "update_small", "bf16_visible", "grad_norm", "momentum_grad_cosine",
)  # fmt: skip
LEFT_OUT = ("numel", "l2_base", "l2_tuned")  # nearly the same in every run: in the menu of the heat map only
JOIN = "\x1f"  # between the choices that name a figure


@dataclass
class Group:
    """Figures of which one is shown at a time. `menus` are labels with their choices, `figures` by their choices joined."""

    id: str
    menus: list[tuple[str, list[str]]] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, choices: list[tuple[str, str]], draw: Callable[..., Canvas], *args: Any, **options: Any) -> None:
        """Draw a figure and note its choices, one for each menu. One that cannot be drawn for these is left out."""
        try:
            canvas = draw(*args, **options)
        except OptionError:  # nothing of this kind in this run
            return
        while JOIN.join(choice for _, choice in choices) in self.figures:  # two long names that were shortened alike
            *before, (menu, choice) = choices
            choices = [*before, (menu, f"{choice} ′")]
        for position, (menu, choice) in enumerate(choices):
            if position == len(self.menus):
                self.menus.append((menu, []))
            if choice not in self.menus[position][1]:
                self.menus[position][1].append(choice)
        self.figures[JOIN.join(choice for _, choice in choices)] = packing.figure(canvas)

    @property
    def alt(self) -> str:
        """What the figure shown first says."""
        return str(next(iter(self.figures.values()))["layout"]["meta"]["alt"])

    @property
    def height(self) -> int:
        return int(next(iter(self.figures.values()))["layout"]["height"])


def short(module: str) -> str:
    """A module's name in a menu."""
    return wording.shortened(wording.printable(module), 60)


def together(diffs: dict[str, Diff]) -> list[Group]:
    """Several runs in one figure."""
    lines, cells, bins, sigmas = (Group(f"runs-{name}") for name in ("layers", "heat", "histograms", "spectra"))
    subject = f"{len(diffs)} runs"
    pooled = {
        (label, table): (_cells(diff, table), quantities.rolled(diff, table, ["layer"]), names)
        for label, diff in diffs.items()
        for table, names, _ in _tables(diff)
    }
    for table, name in dict.fromkeys((table, name) for (_, table), (*_, names) in pooled.items() for name in names):
        have = [label for label in diffs if name in pooled.get((label, table), (0, 0, ()))[2]]
        what = quantities.quantity(name, pooled[have[0], table][0][name])
        lines.add(
            [("Quantity", what.label)], profiles.draw, {label: pooled[label, table][1] for label in have}, what, subject
        )
        if len(have) > 1:
            frames = {label: pooled[label, table][0] for label in have}
            cells.add([("Quantity", what.label)], heat.draw, frames, what, subject)
    for which, label in histograms.AXES.items():
        bins.add([("Histogram of", label)], histograms.histogram, diffs, which)
    spectral = {name: diff for name, diff in diffs.items() if "ranks" in diff.tables}
    if spectral:
        sigmas.add([], spectra.spectrum, spectral)
    return [group for group in (lines, cells, bins, sigmas) if group.figures]


def _cells(diff: Diff, table: str) -> pl.DataFrame:
    """A table by layer and module, in the order in which it is drawn."""
    return heat.in_order(quantities.rolled(diff, table, ["layer", "module"]), diff.tables[table])


def of_runs(diffs: dict[str, Diff]) -> dict[str, Group]:
    """The figures of each run, by what they show. With several runs, the first menu picks one."""
    groups = {name: Group(name) for name in ("heat", "experts", "layers", "histograms", "spectra", "stripes", "directions")}
    for label, diff in diffs.items():
        chosen = [("Run", label)] if len(diffs) > 1 else []
        named = {label: diff}
        for table, names, others in _tables(diff):
            cells = _cells(diff, table)
            whole = quantities.rolled(diff, table, ["layer"])
            lines = {profiles.ALL: whole, **profiles.by_module(cells)}
            subject = runs.subject(named)
            for name in [*names, *others]:
                what = quantities.quantity(name, cells[name] if name in cells.columns else None)
                if name not in cells.columns or (what.count or name) not in cells.columns:
                    continue
                choices = [*chosen, ("Quantity", what.label)]
                groups["heat"].add(choices, heat.draw, {label: cells}, what, subject)
                if name in names and len(lines) > 1:
                    groups["layers"].add(choices, profiles.draw, lines, what, subject)
        _experts(groups["experts"], diff, chosen, runs.subject(named))
        _bins(groups["histograms"], named, chosen)
        if "ranks" in diff.tables:
            _sigmas(groups["spectra"], named, chosen)
        if "rows" in diff.tables:
            for module in striped.striped_modules(diff):
                groups["stripes"].add([*chosen, ("Module", short(module))], striped.stripes, named, module)
        if "subspaces" in diff.tables:
            for k in diff.subspaces["k"].drop_nulls().unique().sort().to_list():
                for name in ("angle_u_max", "angle_v_max", "nss", "principal_overlap", "low_overlap"):
                    choices = [*chosen, ("Directions", f"k = {k}"), ("Quantity", quantities.quantity(name).label)]
                    groups["directions"].add(choices, heat.heatmap, named, name, k=k)
    return {name: group for name, group in groups.items() if group.figures}


def _experts(group: Group, diff: Diff, chosen: list[tuple[str, str]], subject: str) -> None:
    """Layer × expert, for each module whose experts are stored one by one."""
    for table in ("tensors", "ranks"):
        if table not in diff.tables:
            continue
        single = diff.tables[table].filter(pl.col("expert").is_not_null() & pl.col("layer").is_not_null())
        for module in quantities.modules(single) if single.height else []:
            own = Diff({table: single.filter(pl.col("module") == module)}, diff.run)
            cells = quantities.rolled(own, table, ["layer", "expert"])
            for name in EXPERTS:
                if name not in cells.columns or (table == "ranks") != (name in EXPERTS[4:]):
                    continue
                what = quantities.quantity(name)
                choices = [*chosen, ("Module", short(module)), ("Quantity", what.label)]
                group.add(choices, heat.draw, {"": cells}, what, subject, across="expert", of=module)


def _bins(group: Group, named: dict[str, Diff], chosen: list[tuple[str, str]]) -> None:
    for which, label in histograms.AXES.items():
        for by in ("kind", "module"):
            choices = [*chosen, ("Histogram of", label), ("Lines", f"by {by}")]
            group.add(choices, histograms.histogram, named, which, by=by)


def _sigmas(group: Group, named: dict[str, Diff], chosen: list[tuple[str, str]]) -> None:
    ((label, diff),) = named.items()
    every = {label: spectra.curves(diff, spectra.chosen(diff))}
    subject = runs.subject(named)
    for by in ("module", "kind", "layer"):
        group.add([*chosen, ("Lines", f"by {by}")], spectra.compose, every, subject, by)
    for module in quantities.modules(diff.ranks) if diff.ranks.height else []:
        if diff.ranks.filter(pl.col("module") == module)["layer"].n_unique() > 1:
            group.add([*chosen, ("Lines", f"{short(module)}, by layer")], spectra.compose, every, subject, "layer", module)


def of_moments(found: dict[str, Moments]) -> list[Group]:
    """The figures of optimizer states: all together, then one by one."""
    many, spread, cells, lines = (Group(f"adam-{name}") for name in ("states", "spread", "heat", "layers"))
    every = runs.sides(found)
    if len(every) > 1:
        many.add([("Show", "all checkpoints")], adams.adam, found)
    for label, (result, side) in every.items():
        single = one_side(result, side)
        many.add([("Show", label)], adams.adam, {label: single})
        chosen = [("Checkpoint", label)] if len(every) > 1 else []
        for which, text in adams.BINS.items():
            choices = [*chosen, ("Spread of", text.partition(",")[0])]
            spread.add(choices, adams.spread, {label: single}, which)
        for column in ADAM:
            if column in quantities.drawable(single, "adam"):
                choices = [*chosen, ("Quantity", quantities.quantity(column).label)]
                cells.add(choices, heat.heatmap, {label: single}, column)
                lines.add(choices, profiles.layers, {label: single}, column)
    return [group for group in (many, spread, cells, lines) if group.figures]


def one_side(result: Moments, side: str) -> Moments:
    """One of two optimizer states as a result of its own."""
    as_first = pl.lit("first").alias("side")
    tables = {name: table.filter(pl.col("side") == side).with_columns(as_first) for name, table in result.tables.items()}
    return Moments(tables, {**result.run, "first": result.run[side], "second": None})


def _tables(diff: Diff) -> Iterator[tuple[str, list[str], list[str]]]:
    """Tables by layer and module: the columns that matter, in the order of `quantities`, with those of one's own measures at
    the end; and the rest, which only the heat map offers. A count is left out where its share is there."""
    for table in ("tensors", "ranks"):
        if table not in diff.tables:
            continue
        known = quantities.drawable(diff, table)
        counts = {quantities.quantity(name).count for name in known} | {"changed"}
        tolerances = [name for name in known if name.startswith("sparsity[")]
        familiar = [
            n for n in quantities.QUANTITIES if n in known and n not in LEFT_OUT and (n not in counts or n == "sign_flips")
        ]
        own = [n for n in known if n not in TABLES[table] and "[" not in n and n not in familiar]
        at = familiar.index("sparsity_bf16") + 1 if "sparsity_bf16" in familiar else len(familiar)
        chosen = [*familiar[:at], *tolerances, *familiar[at:], *own]
        yield table, chosen, [name for name in known if name not in chosen and name not in counts]
