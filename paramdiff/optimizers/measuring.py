"""`adam`: the optimizer state of one checkpoint, or two, in; a `Moments` out. Imports no polars until there is a result."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from importlib.metadata import version
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from paramdiff import checkpoints
from paramdiff.checkpoints import Checkpoint
from paramdiff.checkpoints.places import place
from paramdiff.collect import Collected, Progress, collect
from paramdiff.errors import CheckpointError, NothingToCompare, OptionError
from paramdiff.measures.adam import Adam
from paramdiff.measures.options import Options
from paramdiff.optimizers import optimizer
from paramdiff.optimizers.kinds import recognise
from paramdiff.optimizers.plan import Plan, betas_of, plan
from paramdiff.optimizers.rates import in_force, trainer_state
from paramdiff.optimizers.state import OptimizerState, as_steps
from paramdiff.pairing import Uncompared, name_filter
from paramdiff.streaming import spans

if TYPE_CHECKING:
    from paramdiff.moments import Moments

Ref = str | PathLike[str]
SIDES = ("first", "second")
# How far v₊ may be from β₂v + (1 − β₂)g², as a share of v₊, for two saves to count as consecutive: rounding of the moments.
FOLLOWS = {"F64": 1e-12, "F32": 1e-5, "BF16": 2e-2, "F16": 2e-3}


def adam(
    checkpoint: Ref,
    other: Ref | None = None,
    *,
    weights: Ref | None = None,
    other_weights: Ref | None = None,
    lr: float | None = None,
    gradient: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renames: Sequence[str] = (),
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Moments:
    """What Adam's saved state says of a run: scale of the second moment, effective learning rate, the size of the step, and
    whether plain SGD would have gone the same way (metrics.md §5, after arXiv 2602.07729).

    Args:
        checkpoint: anything that `optimizer` opens.
        other: another one, to be set beside the first. Where it was saved one step later in the same run, the gradient of
            that step is recovered from the first moments.
        weights, other_weights: where the weights lie, if not beside the state; for `bf16_visible`.
        lr: the learning rate in force, for both, instead of what the files say.
        gradient: insist on the gradient: raise where the two are not consecutive saves.
        include, exclude, renames: as in `compare`.
        device, threads, progress: as in `compare`.

    Raises:
        CheckpointError: a state cannot be read, or its parameters not be named. NothingToCompare: no moments are left, or
        (with `gradient`) the two saves are not consecutive. OptionError, DeviceError.

    >>> found = adam("sample_data/checkpoints/rl-adamw/checkpoint-200")
    >>> found.summary()["first"]["optimizer"], found.summary()["first"]["step_max"]
    ('AdamW', 200)
    """
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise OptionError(f"{lr!r} is no learning rate.", hint="Give a number above 0.")
    if threads is not None and threads < 1:
        raise OptionError(f"{threads} is no number of workers.", hint="Give 1 or more.")
    if other is None and (gradient or other_weights is not None):
        raise OptionError("A gradient and second weights need a second checkpoint.", hint="Give two consecutive saves.")
    wanted = name_filter(include, exclude)
    with ExitStack() as stack:
        states = [_opened(stack, ref) for ref in (checkpoint, other) if ref is not None]
        found_weights = [_weights(stack, s, w) for s, w in zip(states, (weights, other_weights), strict=False)]
        apart = _apart(*states) if len(states) == 2 else "there is one checkpoint"
        if gradient and apart:
            raise NothingToCompare(f"No gradient can be recovered: {apart}.", hint="Give the saves of two steps in a row.")
        plans = []
        for number, (state, (opened, said)) in enumerate(zip(states, found_weights, strict=True)):
            before = states[0] if number and not apart else None
            rates = in_force(state.groups, state.directory, lr)
            made = plan(state, rates, wanted, weights=opened, before=before, renames=renames)
            made.warnings = [*state.warnings, *said, *made.warnings, *_reset(state)]
            plans.append(made)
        if not any(made.alignments for made in plans):
            raise NothingToCompare(_nothing(plans, states))
        results = _measured(plans, device, threads, progress)
        facts = [state.facts() | {"weights": opened.facts() if opened else None}
                 for state, (opened, _) in zip(states, found_weights, strict=True)]  # fmt: skip
    asked = {"lr": lr, "gradient": gradient, "include": list(include), "exclude": list(exclude), "renames": list(renames)}
    return _moments(facts, plans, results, asked, apart)


def _opened(stack: ExitStack, ref: Ref) -> OptimizerState:
    state = optimizer(ref)
    stack.callback(state.close)
    return state


def _weights(stack: ExitStack, state: OptimizerState, given: Ref | None) -> tuple[Checkpoint | None, list[str]]:
    """The weights that belong to a state, and what to say where there are none."""
    try:
        if given is not None:
            found = checkpoints.open(fspath(given))
        elif state.open_weights is not None:
            found = state.open_weights()
        else:
            return None, [f"{state.ref} has no weights beside it, so bf16_visible is not known; give --weights."]
    except CheckpointError as error:
        if given is not None:
            raise
        return None, [f"No weights for bf16_visible: {error.message}"]
    stack.callback(found.close)
    return found, list(found.warnings)


def _reset(state: OptimizerState) -> list[str]:
    """A sentence where Adam counts fewer steps than the run has had: its state was reset (Adam-Rel, arXiv 2412.17113)."""
    total = trainer_state(place(state.directory)).get("global_step")
    most = max((p.steps[1] for p in state.parameters.values() if p.steps), default=None)
    if isinstance(total, int) and most is not None and most < total:
        return [
            f"{state.ref} is at step {total}, but its optimizer has counted {most} steps: its state was reset on the way, "
            "or steps were skipped."
        ]
    return []


def _apart(first: OptimizerState, second: OptimizerState) -> str | None:
    """Why the second state is not the first one step later; None where nothing speaks against it."""
    for state in (first, second):
        stored = {info.stored for checkpoint in state.slots.values() for info in checkpoint.tensors.values()}
        if stored - {None}:
            return f"{state.ref} keeps its moments in 8 bits, too coarse for a difference"
    if first.parameters.keys() != second.parameters.keys():
        name = next(iter(first.parameters.keys() ^ second.parameters.keys()))
        return f"{name!r} is a parameter of only one of them"
    compared = 0
    for name, before in first.parameters.items():
        after = second.parameters[name]
        groups = first.groups[before.group], second.groups[after.group]
        kind = recognise(before.slots, groups[0])
        if before.slots != after.slots:
            return f"{name!r} has {' and '.join(before.slots) or 'no state'} in one, and in the other not"
        if kind.m is None or kind.absent:
            continue
        if any(first.slots[s].tensors[name].shape != second.slots[s].tensors[name].shape for s in before.slots):
            return f"{name!r} has another shape in one than in the other"
        if betas_of(groups[0]) != betas_of(groups[1]):
            return f"β differs: {betas_of(groups[0])} and {betas_of(groups[1])}"
        counts = before.steps or _total(first), after.steps or _total(second)
        if counts[0] is None or counts[1] is None:
            return "they do not say how many steps they have taken"
        if (counts[0][0] + 1, counts[0][1] + 1) != counts[1]:
            return f"{first.ref} is at step {_range(counts[0])} and {second.ref} at {_range(counts[1])}"
        compared += 1
    return None if compared else "neither keeps a first moment"


def _total(state: OptimizerState) -> tuple[int, int] | None:
    """The steps of a run, as Trainer counts them: of optimizers that keep no count."""
    return as_steps(trainer_state(place(state.directory)).get("global_step"))


def _range(steps: tuple[int, int]) -> str:
    return f"{steps[0]}" if steps[0] == steps[1] else f"{steps[0]} to {steps[1]}"


def _nothing(plans: Sequence[Plan], states: Sequence[OptimizerState]) -> str:
    reasons = {entry.reason: entry for made in plans for entry in made.coverage if entry.reason != "not_optimized"}
    where = " and ".join(state.ref for state in states)
    if "excluded" in reasons:
        return f"No parameter of {where} is left after --include/--exclude."
    if "not_measured" in reasons:
        return f"{where} holds no moments that are measured: {reasons['not_measured'].detail}."
    return f"{where} holds no moments: plain SGD keeps none, and neither does an optimizer that has not stepped."


def _measured(plans: Sequence[Plan], device: str, threads: int | None, progress: Progress | None) -> list[list[Collected]]:
    """Read everything. One progress for all of it."""
    total = sum(span.nbytes for made in plans for alignment in made.alignments.values() for span in spans(alignment))
    done = 0
    found = []
    for made in plans:
        collected = []
        for alignment in made.alignments.values():
            collected.append(
                collect(
                    alignment, [Adam(made.recipes)], Options(), device=device, threads=threads,
                    progress=_from(done, total, progress), identify=lambda tensor, made=made: made.facts[tensor.name],  # type: ignore[misc]
                )
            )  # fmt: skip
            done += collected[-1].bytes_read
        found.append(collected)
    return found


def _from(begun: int, total: int, progress: Progress | None) -> Progress | None:
    return None if progress is None else lambda done, _: progress(begun + done, total)


def _moments(
    facts: Sequence[dict[str, Any]],
    plans: Sequence[Plan],
    results: Sequence[Sequence[Collected]],
    asked: dict[str, Any],
    apart: str | None,
) -> Moments:
    from paramdiff import tables
    from paramdiff.columns import ADAM, ADAM_HISTOGRAMS
    from paramdiff.moments import Moments

    rows: list[dict[str, Any]] = []
    histograms: list[dict[str, Any]] = []
    coverage: list[Uncompared] = []
    for side, made, collected in zip(SIDES, plans, results, strict=False):
        measured = {row["name"]: row for one in collected for row in one.rows}
        for name, known in made.facts.items():
            row = measured.get(name, known)
            rows.append({column: side if column == "side" else row.get(column) for column in ADAM})
        histograms += [{"side": side, **row} for one in collected for row in one.tables.get("histograms", ())]
        coverage += [_on(side, entry) for entry in made.coverage]
    if len(plans) == 2:
        here, there = (made.facts for made in plans)
        for reason, mine, theirs in (("only_first", here, there), ("only_second", there, here)):
            coverage += [_lone(mine[name], reason) for name in mine if name not in theirs]
    if apart is None:
        apart = _contradicted(rows)
        if apart and asked["gradient"]:
            raise NothingToCompare(f"No gradient can be recovered: {apart}.", hint="Give the saves of two steps in a row.")
    everything = [one for collected in results for one in collected]
    packages = ("paramdiff", "numpy", "polars", "scipy", "torch")
    started: datetime = min(one.started for one in everything)
    frames = {
        "adam": tables.frame("adam", rows),
        "histograms": tables.frame(ADAM_HISTOGRAMS, histograms),
        "coverage": tables.coverage_frame(coverage),
    }
    run = {
        "command": "adam",
        "first": facts[0],
        "second": facts[1] if len(facts) == 2 else None,
        "options": asked | {"device": everything[0].device},
        "no_gradient": apart,
        "warnings": list(dict.fromkeys(sentence for made in plans for sentence in made.warnings)),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "started": started.isoformat(timespec="seconds"),
        "bytes_read": sum(one.bytes_read for one in everything),
        "seconds": round(sum(one.seconds for one in everything), 6),
        "tables": list(frames),
    }
    return Moments(frames, run)


def _contradicted(rows: Sequence[dict[str, Any]]) -> str | None:
    """Why the gradients that were found cannot be such: the second moments do not follow from them. Takes them out then."""
    checked = [row for row in rows if row["grad_check"] is not None]
    worst = max(checked, key=lambda row: row["grad_check"] / _rounding(row), default=None)
    if worst is None or worst["grad_check"] <= _rounding(worst):
        return None
    for row in rows:
        row.update(dict.fromkeys(("grad_norm", "momentum_norm", "momentum_dot_grad", "momentum_grad_cosine", "grad_check")))
    return f"the second moment of {worst['name']!r} does not follow from the first save, so that they are of different runs"


def _rounding(row: dict[str, Any]) -> float:
    """What rounding of the moments leaves of the check, by the coarser of their types."""
    return max(FOLLOWS.get(row["dtype_m"], 1e-12), FOLLOWS.get(row["dtype_v"], 1e-12))


def _lone(facts: dict[str, Any], reason: str) -> Uncompared:
    """A parameter that only one of the two checkpoints has."""
    side = reason.removeprefix("only_")
    return Uncompared(facts["name"], side, reason, "", tuple(facts["shape"] or ()), "", facts["numel"] or 0)


def _on(side: str, entry: Uncompared) -> Uncompared:
    """The same with the checkpoint that it speaks of."""
    return Uncompared(entry.name, side, entry.reason, entry.detail, entry.shape, entry.dtype, entry.numel)
