"""One result or several: what every figure takes, and what each of them is called there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paramdiff.diff import Diff
from paramdiff.errors import OptionError
from paramdiff.moments import Moments
from paramdiff.wording import labels, printable, shortened, unique

Result = Diff | Moments
Results = Result | Sequence[Result] | Mapping[str, Result]


def named(results: Results) -> dict[str, Any]:
    """Results by label: those of a mapping, or the last part of the tuned side's reference.

    Raises `OptionError` for none.
    """
    if isinstance(results, Mapping):
        names = unique([shortened(printable(str(label)), 40) for label in results])
        found = dict(zip(names, results.values(), strict=True))
    else:
        listed: list[Any] = list(results) if isinstance(results, list | tuple) else [results]
        if not all(isinstance(result, Diff | Moments) for result in listed):
            raise OptionError("Only results of `compare` and `adam` can be drawn.")
        diffs, states = ([result for result in listed if isinstance(result, kind)] for kind in (Diff, Moments))
        found = dict(zip(labels([reference(result) for result in diffs]), diffs, strict=True))
        for label, state in zip(labels([reference(result) for result in states]), states, strict=True):
            found[f"{label}, optimizer" if label in found else label] = state  # weights and state of one checkpoint
    if not all(isinstance(result, Diff | Moments) for result in found.values()):
        raise OptionError("Only results of `compare` and `adam` can be drawn.")
    if not found:
        raise OptionError("There is nothing to draw.", hint="Give at least one result of `compare` or `adam`.")
    return found


def sides(results: Results) -> dict[str, tuple[Moments, str]]:
    """Optimizer states by label: each checkpoint of each result, with the side it is on."""
    every: list[tuple[str, Moments, str]] = []
    given = isinstance(results, Mapping)
    for label, result in named(results).items():
        if not isinstance(result, Moments):
            raise OptionError("A comparison of weights has no optimizer state to draw.", hint="Give a result of `adam`.")
        for side in result.sides:
            ref = str(result.run[side]["ref"])
            own = label if len(result.sides) == 1 else f"{label}: {labels([ref])[0]}"
            every.append((own if given else ref, result, side))
    names = [name for name, *_ in every] if given else labels([name for name, *_ in every])
    return {name: (result, side) for name, (_, result, side) in zip(unique(names), every, strict=True)}


def diffs(results: Results) -> dict[str, Diff]:
    """Comparisons by label. Raises `OptionError` where one is a result of `adam`."""
    found = named(results)
    if any(isinstance(result, Moments) for result in found.values()):
        raise OptionError("Optimizer state has no comparison of weights to draw.", hint="Draw it with `adam`.")
    return found


def subject(found: Mapping[str, Any], side: str = "first") -> str:
    """What a figure of these results shows, for its title."""
    label, result = next(iter(found.items()))
    return between(result, label, side) if len(found) == 1 else f"{len(found)} runs"


def reference(result: Result) -> str:
    """The reference that tells a result from others of the same base."""
    run = result.run
    return str(run["tuned" if isinstance(result, Diff) else "first"]["ref"])


def between(result: Result, label: str, side: str = "first") -> str:
    """What was compared, for a title; of two optimizer states, the one on this side."""
    if isinstance(result, Diff):
        compat = result.run["options"]["compat"]
        counted = f" (tolerances as {compat} counts)" if compat else ""
        return f"{labels([str(result.run['base']['ref'])])[0]} → {label}{counted}"
    if len(result.sides) == 1:
        return label
    return labels([str(result.run[name]["ref"]) for name in result.sides])[result.sides.index(side)]
