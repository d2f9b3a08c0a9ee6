"""`write_report`: everything that was measured, on one page that one can send to a colleague."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from os import PathLike
from typing import Any

from paramdiff import __version__
from paramdiff.diff import Diff
from paramdiff.moments import Moments
from paramdiff.output import write_aside
from paramdiff.plots import runs, style
from paramdiff.report import drawing, listing, packing, verdict
from paramdiff.report.drawing import Group
from paramdiff.report.listing import Table
from paramdiff.wording import labels, printable, shortened

TEXTS = {
    "summary": "Each claim with the numbers that carry it.",
    "overall": "Sparsity is the share that did not change. Papers mean different things by a change, so all are counted.",
    "coverage": "What was not compared, or not wholly, and why.",
    "together": "All runs in one figure.",
    "heat": "Each cell pools the elements of its tensors. Shares are of changed elements, on a log scale; grey is zero.",
    "experts": "The experts of each layer one by one.",
    "layers": "A line for each module, and one for all of them together.",
    "histograms": "Shares are of all elements of a line, changed or not.",
    "spectra": "Singular values of the update of each matrix, and the share of its energy that the first directions hold.",
    "stripes": "The changed share of each row and column, a line of cells for each layer.",
    "directions": "How far the leading singular directions turned, and on which weights the changes lie.",
    "adam": "From the saved optimizer state: its second moment v̂, the effective learning rate η/(√v̂ + ε), and the step u.",
    "tensors": "Every compared tensor. Type to search; a column's name sorts by it.",
    "provenance": "What was compared, with which options and versions.",
}  # fmt: skip


@dataclass
class Section:
    """One part of the page, under a heading of its own. A part without content is left out."""

    id: str
    title: str
    verdicts: list[tuple[str, list[verdict.Finding]]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    large: list[dict[str, str]] = field(default_factory=list)
    facts: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return TEXTS[self.id]

    @property
    def holds_something(self) -> bool:
        return bool(self.verdicts or self.tables or self.groups or self.large or self.facts)


def write_report(path: str | PathLike[str], results: runs.Results, *, title: str | None = None) -> None:
    """Write one HTML file with everything about one or several results: it works offline and fetches nothing.

    Args:
        path: the file to write.
        results: a `Diff` or a `Moments`, or several of both (a list, or a mapping from labels). Several comparisons, usually
            with one base, are set side by side.
        title: the heading; by default what was compared.

    Raises:
        OptionError: for no results. OutputError: the file cannot be written. What was there before then stays.

    >>> import paramdiff
    >>> diff = paramdiff.compare("sample_data/base", "sample_data/rl-sgd")
    >>> paramdiff.write_report("out/report.html", diff)
    """
    write_aside(path, page(results, title).encode("utf-8", "replace"))


def page(results: runs.Results, title: str | None = None) -> str:
    """The report as text."""
    found = runs.named(results)
    diffs = {label: result for label, result in found.items() if isinstance(result, Diff)}
    states = {label: result for label, result in found.items() if isinstance(result, Moments)}
    data: dict[str, Any] = {"template": {"layout": style.TEMPLATE}}
    every = [_summary(diffs, states), *_comparisons(diffs), *_states(states), *_ending(found, data)]
    sections = [section for section in every if section.holds_something]
    for section in sections:
        data |= {group.id: group.figures for group in section.groups}
    return _rendered(sections, data, title or _title(diffs, states), _subtitle(diffs, states))


def _summary(diffs: dict[str, Diff], states: dict[str, Moments]) -> Section:
    many = len(diffs) + len(states) > 1
    verdicts = [(label if many else "", verdict.findings(diff)) for label, diff in diffs.items()]
    verdicts += [(label if many else "", verdict.of_moments(state)) for label, state in states.items()]
    return Section("summary", "Summary", verdicts=[(label, told) for label, told in verdicts if told])


def _comparisons(diffs: dict[str, Diff]) -> list[Section]:
    if not diffs:
        return []
    many = len(diffs) > 1
    groups = drawing.of_runs(diffs)
    ranked = {label: diff for label, diff in diffs.items() if "ranks" in diff.tables}
    turned = {label: diff for label, diff in diffs.items() if "subspaces" in diff.tables}
    own = {name: [group] for name, group in groups.items()}
    return [
        Section("overall", "How much changed", tables=[listing.overall(diffs)]),
        Section("together", "Side by side", groups=drawing.together(diffs) if many else []),
        Section("heat", "Where: by layer and module", groups=own.get("heat", [])),
        Section("experts", "Where: by layer and expert", groups=own.get("experts", [])),
        Section("layers", "Along the layers", groups=own.get("layers", [])),
        Section("histograms", "How far: histograms", groups=own.get("histograms", [])),
        Section(
            "spectra", "Of what rank: spectra", groups=own.get("spectra", []),
            tables=[listing.ranks(label if many else "", diff) for label, diff in ranked.items() if diff.ranks.height],
        ),
        Section("stripes", "Stripes: rows and columns", groups=own.get("stripes", [])),
        Section(
            "directions", "Did the leading directions turn", groups=own.get("directions", []),
            tables=[listing.subspaces(label if many else "", diff) for label, diff in turned.items()],
        ),
    ]  # fmt: skip


def _states(states: dict[str, Moments]) -> list[Section]:
    if not states:
        return []
    tables = [listing.moments(runs.sides(states))]
    return [Section("adam", "What the optimizer did", tables=tables, groups=drawing.of_moments(states))]


def _ending(found: dict[str, Any], data: dict[str, Any]) -> list[Section]:
    """Coverage, tensors and provenance."""
    tensors, missing = [], []
    for number, (label, result) in enumerate(found.items()):
        if isinstance(result, Diff):
            data[f"tensors-{number}"] = listing.tensors(result)
            tensors.append({"id": f"tensors-{number}", "run": label})
        if result.coverage.height:
            data[f"coverage-{number}"] = listing.coverage(result)
            missing.append({"id": f"coverage-{number}", "run": label})
    facts = [(label if len(found) > 1 else "", listing.provenance(result)) for label, result in found.items()]
    return [
        Section("tensors", "All tensors", large=tensors),
        Section("coverage", "Not compared", large=missing),
        Section("provenance", "Provenance", facts=facts),
    ]


def _title(diffs: dict[str, Diff], states: dict[str, Moments]) -> str:
    if not diffs:
        return f"Optimizer state of {', '.join(runs.sides(states))}"
    bases = labels(list(dict.fromkeys(str(diff.run["base"]["ref"]) for diff in diffs.values())))
    return f"{' and '.join(bases)} → {', '.join(diffs)}"


def _subtitle(diffs: dict[str, Diff], states: dict[str, Moments]) -> str:
    """The references whole, and when it was measured."""
    results: list[Any] = [*diffs.values(), *states.values()]
    refs = [str(r.run[side]["ref"]) for r in results for side in (("base", "tuned") if isinstance(r, Diff) else r.sides)]
    told = ", ".join(shortened(printable(ref), 200) for ref in dict.fromkeys(refs))
    return f"What training did to the weights: {told}. Measured {max(str(r.run['started'])[:10] for r in results)}."


def _rendered(sections: Sequence[Section], data: dict[str, Any], title: str, subtitle: str) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    here = files("paramdiff.report")
    css, js, template = ((here / f"page.{end}").read_text(encoding="utf-8") for end in ("css", "js", "html"))
    scripts = {"plotly": get_plotlyjs(), "js": js}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    # Only these two scripts run, by their hashes: a name that looked like a script would be text even if it got through.
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts.values()
    )
    environment.filters["together"] = lambda text: text.replace(" %", "\u00a0%")  # a number and its sign on one line
    return environment.from_string(template).render(
        sections=sections,
        titles={section.id: section.title for section in sections},
        title=shortened(printable(title), 300),
        subtitle=subtitle,
        version=__version__,
        css=Markup(css),
        hashes=hashes,
        packed=[(id, Markup(packing.packed(value))) for id, value in data.items()],
        **{name: Markup(text) for name, text in scripts.items()},
    )
