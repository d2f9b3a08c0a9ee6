"""The learning rate that was in force at the save, and which source gave it.

A group's `lr` is the rate *after* the scheduler's step: that of the step to come, 0.0 at the end of a linear schedule.
Trainer logs the rate that was applied; without its log, `initial_lr` and `lr` bracket it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paramdiff.checkpoints.places import Place, place, read_small
from paramdiff.errors import CheckpointError
from paramdiff.optimizers.state import Group

STATE_FILE = "trainer_state.json"
MAX_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Rate:
    """The learning rate of a group, None where nothing says, and its source in words."""

    value: float | None
    source: str


def in_force(groups: Sequence[Group], directory: str, given: float | None = None) -> list[Rate]:
    """The rate of each group. `given`, if any, is what the user says, for all of them.

    Sources in turn: `given`; the log of Trainer's trainer_state.json beside the state, at the save or the last entry before
    it, scaled for groups whose `initial_lr` differs from the first one's; a group's `lr`, unless it is zero; its
    `initial_lr`.
    """
    if given is not None:
        return [Rate(given, "given")] * len(groups)
    logged = _logged(place(directory))
    first = _rate(groups[0], "initial_lr") or _rate(groups[0], "lr") if groups else None
    rates = []
    for group in groups:
        initial, after = _rate(group, "initial_lr"), _rate(group, "lr")
        if logged is not None and logged.value is not None and first and (initial or after):
            rates.append(Rate(logged.value * (initial or after or 0.0) / first, logged.source))
        elif after:
            constant = initial is None or initial == after
            rates.append(Rate(after, "group's lr" if constant else "group's lr, which is that of the step to come"))
        elif initial:
            rates.append(Rate(initial, "initial_lr, as the group's lr is 0 after the last step of the schedule"))
        else:
            rates.append(Rate(None, "none found"))
    return rates


def _rate(group: Group, key: str) -> float | None:
    value = group.get(key)
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return float(value) if usable else None  # type: ignore[arg-type]


def _logged(directory: Place) -> Rate | None:
    """What Trainer logged at the save, or last before it; None without its log. A rate of 0 was not in force: older
    Trainers logged that of the step to come."""
    state = trainer_state(directory)
    step, history = state.get("global_step"), state.get("log_history")
    found: tuple[int, float] | None = None
    for entry in history if isinstance(history, list) else ():
        at = entry.get("step") if isinstance(entry, dict) else None
        value = _rate(entry, "learning_rate") if isinstance(entry, dict) else None
        if isinstance(at, int) and value and (not isinstance(step, int) or at <= step):
            found = at, value
    if found is None:
        return None
    exact = found[0] == step
    return Rate(found[1], f"{STATE_FILE}, logged at step {found[0]}" + ("" if exact else f", the last before step {step}"))


def trainer_state(directory: Place) -> dict[str, Any]:
    """trainer_state.json in a directory or the one above (DeepSpeed's lies in checkpoint-N); empty where there is none."""
    for where in (directory, directory.parent):
        path = where / STATE_FILE
        try:
            if path.is_file():
                content = json.loads(read_small(path, MAX_BYTES).decode("utf-8"))
                return content if isinstance(content, dict) else {}
        except (OSError, ValueError, RecursionError, CheckpointError):
            return {}
    return {}
