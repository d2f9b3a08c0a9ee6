"""Optimizer state in PyTorch Distributed Checkpoints, under whatever keys a trainer has put it.

The planner's path tells a parameter's name from what it was put under: ('app', 'optim', 'state', 'model.norm.weight',
'exp_avg'). torchtitan saves flat keys, `state.model.norm.weight.exp_avg`, and settings for each parameter:
`param_groups.model.norm.weight.lr`. Megatron's keys have the slot first, `optimizer.state.exp_avg.decoder…`, and its
settings lie beside, in common.pt.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import fspath
from typing import Any

from paramdiff import checkpoints
from paramdiff.checkpoints import Checkpoint
from paramdiff.checkpoints.dcp import OPTIMIZER_STATE, Parts, Stored, read_metadata
from paramdiff.checkpoints.files import Files
from paramdiff.checkpoints.pieces import Assembled, Entry
from paramdiff.checkpoints.places import place
from paramdiff.checkpoints.torch_file import read_file
from paramdiff.errors import BrokenFile, CheckpointError, UnsupportedFormat
from paramdiff.optimizers.state import OptimizerState, Parameter, as_steps, number
from paramdiff.optimizers.torch_state import settings

BUCKETS = re.compile(r"\.gbuf_idx_\d+\.|(^|\.)dp_group_idx_\d+\.")
COMMON = "common.pt"
MOST_PLACES = 1000  # of common.pt in which settings are looked for
UNREAD = ("params", "param_names", "foreach", "fused", "differentiable", "capturable")  # that say nothing of the moments


@dataclass
class Saved:
    """One optimizer within a checkpoint: state by parameter and slot, settings by group (a number, or a parameter)."""

    state: dict[str, dict[str, Stored]] = field(default_factory=dict)
    counts: dict[str, str] = field(default_factory=dict)  # parameter → key of a step that is no tensor
    settings: dict[str, dict[str, str | Stored]] = field(default_factory=dict)  # group → setting → its key, or tensor


def open(ref: str, path: str, key: str | None) -> OptimizerState:
    """Open the directory with `.metadata`. `key` names the optimizer where there are several (`dir::critic/optim`).

    Raises `BrokenFile`, or `UnsupportedFormat` as for weights.
    """
    metadata = read_metadata(fspath(place(path) / ".metadata"))
    found: dict[str, Saved] = {}
    for stored in metadata.tensors:
        kept, setting = _of_state(stored.path), _of_groups(stored.path)
        if setting is not None:
            owner, group, what = setting
            found.setdefault(owner, Saved()).settings.setdefault(group, {})[what] = stored
        elif kept is not None:
            owner, name, slot = kept
            found.setdefault(owner, Saved()).state.setdefault(name, {})[slot] = stored
    for where, way in metadata.values.items():
        named = tuple(map(str, way))
        kept = _of_state(named)
        if kept is not None and kept[2] == "step":
            found.setdefault(kept[0], Saved()).counts[kept[1]] = where
        setting = _of_groups(named)
        if setting is not None:
            owner, group, what = setting
            found.setdefault(owner, Saved()).settings.setdefault(group, {})[what] = where
    buckets = next((one.key for one in metadata.tensors if BUCKETS.search(one.key)), None)
    if buckets is not None:
        raise UnsupportedFormat(
            f"{path} holds moments in Megatron's buckets ({buckets[:80]!r}), which name no parameters.",
            hint="Save with --dist-ckpt-optim-fully-reshardable.",
        )
    saved = _choose({owner: one for owner, one in found.items() if one.state}, path, key)
    files = Files()
    try:
        return _opened(ref, path, saved, Parts(metadata, files, path), files)
    except BaseException:
        files.close()
        raise


def _of_state(path: tuple[str, ...]) -> tuple[str, str, str] | None:
    """(optimizer, parameter, slot) of a path, or None for what is no optimizer's state.

    >>> _of_state(("app", "optim", "state", "model.norm.weight", "exp_avg"))
    ('app/optim', 'model.norm.weight', 'exp_avg')
    >>> _of_state(("optimizer", "state.model.norm.weight.exp_avg"))
    ('optimizer', 'model.norm.weight', 'exp_avg')
    >>> _of_state(("optimizer.state.exp_avg.decoder.final_layernorm.weight",))
    ('optimizer', 'decoder.final_layernorm.weight', 'exp_avg')
    """
    if len(path) >= 3 and path[-3] == "state":
        return "/".join(path[:-3]), path[-2], path[-1]
    before, found, rest = (f".{path[-1]}").partition(".state.")
    name, _, slot = rest.rpartition(".")
    if slot not in OPTIMIZER_STATE:
        slot, _, name = rest.partition(".")
    if not found or not name or slot not in OPTIMIZER_STATE:
        return None
    return "/".join([*path[:-1], *filter(None, [before.strip(".")])]), name, slot


def _of_groups(path: tuple[str, ...]) -> tuple[str, str, str] | None:
    """(optimizer, group, setting) of a path; the group is a number, or the name of the parameter.

    >>> _of_groups(("optimizer", "param_groups", "0", "lr"))
    ('optimizer', '0', 'lr')
    >>> _of_groups(("optimizer", "param_groups.norm.weight.lr"))
    ('optimizer', 'norm.weight', 'lr')
    """
    if len(path) >= 3 and path[-3] == "param_groups":
        return "/".join(path[:-3]), path[-2], path[-1]
    rest, _, setting = path[-1].rpartition(".")
    before, found, group = (f".{rest}").partition(".param_groups.")
    if not found or not group:
        return None
    return "/".join([*path[:-1], *filter(None, [before.strip(".")])]), group, setting


def _choose(found: Mapping[str, Saved], path: str, key: str | None) -> Saved:
    listed = ", ".join(repr(name) if name else "the top level" for name in [*found][:4])
    if key is not None:
        matching = [name for name in found if name == key or name.endswith(f"/{key}")]
        if len(matching) != 1:
            raise BrokenFile(f"{path} has no optimizer state under {key!r}.", hint=f"There is: {listed or 'none at all'}.")
        return found[matching[0]]
    if not found:
        raise BrokenFile(f"{path} holds no optimizer state.", hint="Trainers often save it in a directory of its own.")
    if len(found) > 1:
        raise BrokenFile(
            f"{path} holds the state of {len(found)} optimizers ({listed}).", hint=f"Name one: {path}::{next(iter(found))}."
        )
    return next(iter(found.values()))


def _opened(ref: str, path: str, saved: Saved, parts: Parts, files: Files) -> OptimizerState:
    groups, group_of = _groups(saved, parts, files)
    common = _common(path, files) if not saved.settings else None
    groups = [common] if common else groups
    entries: dict[str, dict[str, Entry]] = {}
    parameters = []
    for name, kept in saved.state.items():
        steps = as_steps(parts.value(saved.counts[name])) if name in saved.counts else None
        for slot, stored in kept.items():
            entry = parts.entry(name, stored)
            if slot in ("step", "mu_product"):
                raw = files.read(entry.file, entry.start, entry.info.nbytes)
                steps = as_steps(number(entry.info, raw)) if slot == "step" else steps
            else:
                entries.setdefault(slot, {})[name] = entry
        steps = steps or as_steps(groups[group_of.get(name, 0)].get("step"))
        own = tuple(slot for slot, found in entries.items() if name in found)
        shape = entries[own[0]][name].info.shape if own else None
        parameters.append(Parameter(name, group_of.get(name, 0), steps, own, shape))
    for name in group_of:
        if name not in saved.state:
            parameters.append(Parameter(name, group_of[name]))
    slots: dict[str, Checkpoint] = {slot: Assembled(ref, "dcp", files, found, None) for slot, found in entries.items()}
    return OptimizerState(
        ref, "dcp", slots, parameters, groups, directory=path, naming="names in .metadata",
        open_weights=partial(_open_weights, path),
    )  # fmt: skip


def _groups(saved: Saved, parts: Parts, files: Files) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The settings of each group, and the group of each parameter. Parameters of equal settings are one group."""
    groups: list[dict[str, Any]] = []
    group_of: dict[str, int] = {}
    for group, keys in saved.settings.items():
        values = {what: _value(key, parts, files) for what, key in keys.items() if what not in UNREAD}
        listed = _value(keys["params"], parts, files) if "params" in keys and group.isdecimal() else None
        members = _members(group, listed)
        if values not in groups or group.isdecimal():
            groups.append(values)
        at = len(groups) - 1 if group.isdecimal() else groups.index(values)
        group_of |= dict.fromkeys(members, at)
    return groups or [{}], group_of


def _value(key: str | Stored, parts: Parts, files: Files) -> Any:
    """A setting: whatever was saved under a key, or the number in a tensor."""
    if isinstance(key, str):
        return parts.value(key)
    entry = parts.entry(key.key, key)
    return number(entry.info, files.read(entry.file, entry.start, entry.info.nbytes)) if entry.info.numel == 1 else None


def _common(path: str, files: Files) -> dict[str, Any] | None:
    """Megatron's settings, of common.pt: those on which all groups agree, as nothing says which parameter is in which."""
    if not (place(path) / COMMON).is_file():
        return None
    file = files.add(fspath(place(path) / COMMON))
    content, storages = read_file(files, file)
    pending = deque([content])
    for _ in range(MOST_PLACES):
        held = pending.popleft() if pending else None
        if isinstance(held, Mapping):
            listed = held.get("param_groups")
            if isinstance(listed, list) and listed and all(isinstance(group, Mapping) for group in listed):
                plain = [settings(group, files, file, storages, path) for group in listed]
                return {key: value for key, value in plain[0].items() if all(one.get(key) == value for one in plain)}
            pending.extend(held.values())
    return None


def _members(group: str, listed: Any) -> Sequence[str]:
    if listed is None:
        return () if group.isdecimal() else [group]
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, (list, tuple)) else ()


def _open_weights(path: str) -> Checkpoint:
    """The weights in the same checkpoint, or in the directories above, where trainers put them beside the state."""
    above = [fspath(place(path).parents[n]) for n in range(min(2, len(place(path).parents)))]
    for where in (path, *above[:-1]):
        try:
            return checkpoints.open(where)
        except CheckpointError:
            continue
    return checkpoints.open(above[-1] if above else path)
