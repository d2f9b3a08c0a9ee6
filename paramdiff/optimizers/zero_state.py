"""Optimizer state of DeepSpeed: moments are cut as the float32 masters are, and put together in the same way.

ZeRO's `state` has an entry for each group (of ZeRO-3: for each sub-group) with flat moments. A universal checkpoint has
files `exp_avg.pt` and `exp_avg_sq.pt` beside each parameter's `fp32.pt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from os import fspath
from typing import Any

from paramdiff import checkpoints
from paramdiff.checkpoints import Checkpoint, universal, zero
from paramdiff.checkpoints.base import understood
from paramdiff.checkpoints.files import Files
from paramdiff.checkpoints.pickles import StoredTensor
from paramdiff.checkpoints.pieces import Assembled, Entry
from paramdiff.checkpoints.places import matching, place
from paramdiff.checkpoints.torch_file import read_file
from paramdiff.checkpoints.zero import Opened, Shapes
from paramdiff.errors import BrokenFile, UnsupportedFormat
from paramdiff.optimizers.kinds import MOMENTS
from paramdiff.optimizers.state import OptimizerState, Parameter, as_steps
from paramdiff.optimizers.torch_state import SCALARS, scalar, settings

NAMING = "names in DeepSpeed's files"
CONVERT = "Convert it with DeepSpeed's ds_to_universal.py first."


def open(ref: str, path: str, key: str | None) -> OptimizerState:
    """Open the directory of a tag, or a universal checkpoint.

    Raises `BrokenFile`, or `UnsupportedFormat` for tensor and pipeline parallelism and for elastic checkpoints.
    """
    if key:
        raise UnsupportedFormat(f"{ref} names an entry, which DeepSpeed's directories have not.")
    files = Files()
    try:
        with understood(path, CONVERT):
            names = sorted(fspath(file) for file in place(path).iterdir() if file.name.endswith("_states.pt"))
            return _of_universal(ref, path, files) if (place(path) / "zero").is_dir() else _of_tag(ref, path, names, files)
    except BaseException:
        files.close()
        raise


def _of_tag(ref: str, path: str, names: Sequence[str], files: Files) -> OptimizerState:
    tag = zero.open_tag(names, files)
    bases = [_base(optimizer, path) for optimizer in tag.optimizers]
    held = [base["state"] for base in bases]
    count = len(tag.groups)
    kept = [slot for slot, value in held[0].get(0, {}).items() if slot not in SCALARS and isinstance(value, StoredTensor)]
    if any(set(state) != set(range(count)) for state in held) and any(held):
        raise BrokenFile(
            f"{path} holds moments of {len(held[0])} groups, where the model has {count}.", hint="Copy it again."
        )
    slots: dict[str, Checkpoint] = {
        slot: Assembled(
            ref, f"zero{tag.stage}", files,
            dict(tag.laid_out([[state[number][slot] for number in range(count)] for state in held])), None,
        )
        for slot in (kept if any(held) else ())
    }  # fmt: skip
    first = tag.states[0]
    plain = _groups(bases[0], first, files)
    parameters = []
    for number, shapes in enumerate(tag.groups):
        group = _group_of(number, bases[0], len(plain))
        steps = _steps(
            [(one, state.get(number, {})) for one, state in zip(tag.states, held, strict=True)], plain[group], files
        )
        parameters += [Parameter(name, group, steps, tuple(slots), shape) for name, shape in shapes.items()]
    return OptimizerState(
        ref, f"zero{tag.stage}", slots, parameters, plain, directory=path, naming=NAMING,
        open_weights=partial(checkpoints.open, path),
    )  # fmt: skip


def _base(optimizer: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The `state_dict()` of the optimizer that ZeRO wraps."""
    found = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict"))
    if not (isinstance(found, Mapping) and isinstance(found.get("state"), Mapping) and found.get("param_groups")):
        raise UnsupportedFormat(
            f"{path} holds the state of an elastic checkpoint, or none, which is not read.", hint=CONVERT
        )
    return found


def _groups(base: Mapping[str, Any], opened: Opened, files: Files) -> list[dict[str, Any]]:
    return [settings(group, files, opened.file, opened.storages, opened.path) for group in base["param_groups"]]


def _group_of(number: int, base: Mapping[str, Any], count: int) -> int:
    """Which of `param_groups` a group of shapes belongs to: as it lists it; of ZeRO-3, several sub-groups are one group."""
    listed = (group for group, found in enumerate(base["param_groups"]) if number in (found.get("params") or ()))
    return next(listed, min(number, count - 1))


def _steps(
    held: Sequence[tuple[Opened, Mapping[str, Any]]], group: Mapping[str, Any], files: Files
) -> tuple[int, int] | None:
    """The fewest and the most steps of all ranks."""
    found = []
    for opened, state in held:
        steps = as_steps(scalar(state.get("step", group.get("step")), files, opened.file, opened.storages, opened.path))
        found += [steps] if steps is not None else []
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


def _of_universal(ref: str, path: str, files: Files) -> OptimizerState:
    where = place(path)
    beside = universal.beside_of(where, files)
    held: dict[str, dict[str, Entry]] = {}
    for file in matching(where, "zero/*/*.pt"):
        if file.stem in MOMENTS:
            held.setdefault(file.stem, {})[file.parent.name] = universal.entry(file.parent.name, fspath(file), files, beside)
    optimizer = zero.open_state(fspath(where / "zero" / "optimizer_state.pt"), files)
    inner = optimizer.content.get("optimizer_state_dict", optimizer.content)
    plain = _groups(inner, optimizer, files)
    shapes: Sequence[Shapes] = beside.groups if beside is not None else []
    numbers = {name: number for number, group in enumerate(shapes) for name in group}
    common = _steps([(optimizer, state) for state in (inner.get("state") or {}).values()], plain[0], files)
    parameters = []
    for name in {**numbers, **{name: 0 for found in held.values() for name in found}}:
        group = _group_of(numbers.get(name, 0), inner, len(plain))
        own = where / "zero" / name / "step.pt"
        steps = _step_file(fspath(own), files) if own.is_file() else common
        shape = next((found[name].info.shape for found in held.values() if name in found), None)
        parameters.append(Parameter(name, group, steps, tuple(slot for slot in held if name in held[slot]), shape))
    slots: dict[str, Checkpoint] = {slot: Assembled(ref, "universal", files, found, None) for slot, found in held.items()}
    return OptimizerState(
        ref,
        "universal",
        slots,
        parameters,
        plain,
        directory=path,
        naming=NAMING,
        open_weights=partial(checkpoints.open, path),
    )


def _step_file(path: str, files: Files) -> tuple[int, int] | None:
    file = files.add(path)
    content, storages = read_file(files, file)
    return as_steps(scalar(content, files, file, storages, path))
