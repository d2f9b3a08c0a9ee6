"""Optimizer state in files of torch.save: Trainer's optimizer.pt, FSDP's full optimizer.bin, a checkpoint with the optimizer
nested in it (Lightning, plain scripts), the zip archives of Stable-Baselines3.

All hold what `torch.optim.Optimizer.state_dict()` gives: `state`, a mapping from numbers (or names) to moments, and
`param_groups`, which list the numbers.
"""

from __future__ import annotations

import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from os import fspath
from typing import Any

from paramdiff import checkpoints
from paramdiff.checkpoints import Checkpoint, safetensors
from paramdiff.checkpoints.base import Located, check_name
from paramdiff.checkpoints.files import Files, Region
from paramdiff.checkpoints.locate import read_config
from paramdiff.checkpoints.pickles import Opaque, StoredTensor
from paramdiff.checkpoints.places import matching, place
from paramdiff.checkpoints.torch_file import (
    Entry,
    Storages,
    TorchTensors,
    entry_of,
    find_weights,
    member_start,
    read_archive,
    read_file,
)
from paramdiff.errors import BrokenFile, CheckpointError, NotFound, UnsupportedFormat
from paramdiff.optimizers import eight_bit, orders
from paramdiff.optimizers.kinds import MOMENTS
from paramdiff.optimizers.naming import Order, Shape, assign
from paramdiff.optimizers.state import OptimizerState, Parameter, as_steps, number

MOST_PARTS = 10  # of a setting
DEEPEST = 3  # mappings and lists within one another in which state is looked for
NUMBERED = re.compile(r"optimizer_(?P<number>\d+)\.(bin|pt)")
SCALARS = ("step", "mu_product")  # numbers that are kept for each parameter, and no moments
GATHERED_ELSEWHERE = "Save the full state: torch.distributed.checkpoint.state_dict.get_optimizer_state_dict."


def open(ref: str, path: str, key: str | None) -> OptimizerState:
    """Open the state in one file. `key` names the one to read where the file holds several (`optimizer_states/1`).

    Raises `UnsupportedFormat` where parameters cannot be named, `BrokenFile`.
    """
    files = Files()
    try:
        file = files.add(path)
        inner = _archives(path, files, file)
        if inner:
            return _of_archives(ref, path, files, file, inner, key)
        content, storages = read_file(files, file)
        state, where = _choose(dict(_states(content)), path, key)
        open_weights = partial(_open_weights, path, nested=bool(where))
        return _of_state_dict(
            ref, state, files, file, storages, path, "torch",
            orders=partial(_orders, path, open_weights), open_weights=open_weights,
        )  # fmt: skip
    except BaseException:
        files.close()
        raise


def _of_state_dict(
    ref: str,
    state: Mapping[str, Any],
    files: Files,
    file: int,
    storages: Storages,
    path: str,
    kind: str,
    *,
    orders: Callable[[], Iterable[Order]],
    open_weights: Callable[[], Checkpoint] | None,
) -> OptimizerState:
    """The state of one optimizer, from its `state_dict()`. `orders` gives candidates for the order of its parameters."""
    held = _flattened(state["state"], path)
    groups = [settings(group, files, file, storages, path) for group in state["param_groups"]]
    numbers = _numbers(state["param_groups"], path)
    strays = [key for key in held if key not in {number for group in numbers for number in group}]
    if strays:
        raise BrokenFile(f"{path} holds state of a parameter {strays[0]!r} that no group lists.")
    shapes = {number: shape for number, value in held.items() if (shape := _shape(value)) is not None}
    named, naming = _names_of(state["param_groups"], numbers, shapes, orders, path)
    entries: dict[str, dict[str, Entry]] = {}
    parameters = []
    for group, members in enumerate(numbers):
        for key in members:
            name = named[key]
            check_name(name, path)
            kept: dict[str, Any] = held.get(key, {})
            for slot, value in kept.items():
                if isinstance(value, Opaque) and value.holds_tensor:
                    raise UnsupportedFormat(
                        f"{path} holds {slot!r} of {name!r} as a {value.kind.rpartition('.')[2]}, which is not read here.",
                        hint=GATHERED_ELSEWHERE,
                    )
                if isinstance(slot, str) and isinstance(value, StoredTensor) and slot not in SCALARS:
                    entries.setdefault(slot, {})[name] = entry_of(name, value, file, storages, path)
            steps = _steps_of(kept, state["param_groups"][group], files, file, storages, path)
            slots = tuple(slot for slot in kept if slot in entries and name in entries[slot])
            parameters.append(Parameter(name, group, steps, slots, shapes.get(key)))
    stored = {slot: TorchTensors(ref, files, found) for slot, found in entries.items()}
    moments, parameters = eight_bit.dequantised(stored, parameters)
    return OptimizerState(
        ref,
        kind,
        moments,
        parameters,
        groups,
        directory=fspath(place(path).parent),
        naming=naming,
        open_weights=open_weights,
    )


def _flattened(held: Any, path: str) -> dict[Any, dict[str, Any]]:
    """State by number or name, with what bitsandbytes nests put beside the rest."""
    if not isinstance(held, Mapping):
        raise BrokenFile(f"{path} holds optimizer state that is no mapping.")
    found = {}
    for key, value in held.items():
        if not isinstance(value, Mapping):
            raise BrokenFile(f"{path} holds optimizer state of {key!r} that is no mapping.")
        nested = value.get(eight_bit.NEST)
        found[key] = {**value, **nested} if isinstance(nested, Mapping) else dict(value)
    return found


def _shape(kept: Mapping[str, Any]) -> Shape | None:
    """The shape of a parameter, from the largest of what is kept for it."""
    shapes = [value.shape for slot, value in kept.items() if isinstance(value, StoredTensor) and slot in MOMENTS]
    return max(shapes, key=len) if shapes else None


def _numbers(groups: Any, path: str) -> list[list[Any]]:
    if not (isinstance(groups, list) and groups and all(isinstance(group, Mapping) for group in groups)):
        raise BrokenFile(f"{path} has no param_groups.")
    numbers = [list(group.get("params") or ()) for group in groups]
    if len({key for group in numbers for key in group if isinstance(key, (int, str))}) != sum(map(len, numbers)):
        raise BrokenFile(f"{path} lists a parameter twice in its groups, or one by neither number nor name.")
    return numbers


def _names_of(
    groups: Sequence[Mapping[str, Any]],
    numbers: Sequence[Sequence[Any]],
    shapes: Mapping[Any, Shape],
    orders: Callable[[], Iterable[Order]],
    path: str,
) -> tuple[dict[Any, str], str]:
    """The name of each number, and how it was found: as stored, else by the order of parameters."""
    everything = [number for group in numbers for number in group]
    if all(isinstance(number, str) for number in everything):
        return {number: number for number in everything}, "names in the file"
    stored = [group.get("param_names") for group in groups]
    if all(isinstance(n, (list, tuple)) and len(n) == len(m) for n, m in zip(stored, numbers, strict=True)):
        found = [name for group in stored for name in group or ()]
        if all(isinstance(name, str) for name in found) and len({*found}) == len(found):
            return dict(zip(everything, found, strict=True)), "param_names of the groups"
    return assign(numbers, shapes, orders(), path)


def settings(group: Mapping[str, Any], files: Files, file: int, storages: Storages, path: str) -> dict[str, Any]:
    """The settings of a group as plain values; tensors of one element (lr and betas may be such) as numbers."""
    plain = {}
    for key, value in group.items():
        if key in ("params", "param_names"):
            continue
        parts = value if isinstance(value, (tuple, list)) and len(value) < MOST_PARTS else None
        read = [scalar(part, files, file, storages, path) for part in ([value] if parts is None else parts)]
        found = read[0] if parts is None else tuple(read)
        if isinstance(found, (bool, int, float, str, type(None))) or (
            isinstance(found, (tuple, list)) and all(isinstance(part, (int, float)) for part in found)
        ):
            plain[str(key)] = found
    return plain


def _steps_of(
    kept: Mapping[str, Any], group: Mapping[str, Any], files: Files, file: int, storages: Storages, path: str
) -> tuple[int, int] | None:
    """How many steps a parameter has taken: its own count, else its group's (Apex, Transformer Engine)."""
    if not kept:
        return None
    return as_steps(scalar(kept.get("step", group.get("step")), files, file, storages, path))


def scalar(value: Any, files: Files, file: int, storages: Storages, path: str) -> Any:
    """A tensor of one element as a number; anything else as it is."""
    if not (isinstance(value, StoredTensor) and value.shape in ((), (1,))):
        return value
    entry = entry_of("a number", value, file, storages, path)
    raw = files.read(file, entry.start, entry.info.nbytes)
    return number(entry.info, raw)


def _states(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every optimizer's `state_dict()` in what a file holds, by its path (`optimizer`, `optimizer_states/0`)."""
    pending = deque([("", content, 0)])
    while pending:
        where, content, depth = pending.popleft()
        if isinstance(content, Mapping) and {"state", "param_groups"} <= content.keys():
            yield where, content
        elif depth <= DEEPEST and isinstance(content, Mapping):
            pending.extend((f"{where}/{k}" if where else k, v, depth + 1) for k, v in content.items() if isinstance(k, str))
        elif depth <= DEEPEST and isinstance(content, list) and len(content) < 100:
            pending.extend((f"{where}/{number}", value, depth + 1) for number, value in enumerate(content))


def _choose(found: Mapping[str, Mapping[str, Any]], path: str, key: str | None) -> tuple[Mapping[str, Any], str]:
    listed = ", ".join(repr(name) for name in [*found][:4])
    if key is not None:
        if key not in found:
            raise BrokenFile(f"{path} has no optimizer state under {key!r}.", hint=f"There is: {listed or 'none at all'}.")
        return found[key], key
    if not found:
        raise BrokenFile(f"{path} holds no optimizer state: no mapping with 'state' and 'param_groups'.")
    if len(found) > 1:
        raise BrokenFile(
            f"{path} holds the state of {len(found)} optimizers ({listed}).", hint=f"Name one: {path}::{next(iter(found))}."
        )
    where = next(iter(found))
    return found[where], where


def _open_weights(path: str, *, nested: bool) -> Checkpoint:
    """The weights that the state belongs to: in the same file, or else in its directory; of the second model and so on, by
    the number in the names of accelerate's files."""
    directory = place(path).parent
    if nested:
        with suppress(CheckpointError):
            return checkpoints.open(path)
    if numbered := NUMBERED.fullmatch(place(path).name):
        for pattern in (f"*_{numbered['number']}.safetensors", f"*model*_{numbered['number']}.bin"):
            for found in matching(directory, pattern):
                return checkpoints.open(fspath(found))
        raise NotFound(f"{directory} holds no weights of model {numbered['number']}.")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).is_file() and (directory / "adapter_config.json").is_file():  # the factors themselves
            located = Located([fspath(directory / name)], fspath(directory))
            if name.endswith(".safetensors"):
                return safetensors.open(str(directory), located, read_config(fspath(directory)), None)
            return checkpoints.torch_file.open(str(directory), located, read_config(fspath(directory)), None)
    return checkpoints.open(fspath(directory))


def _orders(path: str, open_weights: Callable[[], Checkpoint]) -> Iterator[Order]:
    """The orders that the parameters may have, by the weights beside the state and by its config.json."""
    directory = fspath(place(path).parent)
    config = read_config(directory)
    try:
        weights = open_weights()
    except CheckpointError:
        weights = None
    if weights is not None:
        try:
            if isinstance(weights, TorchTensors):
                yield from orders.of_state_dict(weights, "the weights' file")
            yield from orders.of_words(weights.tensors, config)
        finally:
            weights.close()
    yield from orders.of_transformers(directory, config)


# Stable-Baselines3: a zip archive of files of torch.save, such as policy.pth and policy.optimizer.pth


def _archives(path: str, files: Files, file: int) -> dict[str, tuple[int, int]]:
    """(first byte, bytes) of the files of torch.save in a zip archive; nothing for any other file."""
    if files.read(file, 0, 4)[:2] != b"PK":
        return {}
    found = {}
    try:
        with zipfile.ZipFile(Region(files, file, 0, files.size(file))) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".pth") and info.compress_type == zipfile.ZIP_STORED and "/" not in info.filename:
                    found[info.filename] = member_start(files, file, info, 0, files.size(file)), info.file_size
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        return {}
    return found


def _of_archives(
    ref: str, path: str, files: Files, file: int, inner: Mapping[str, tuple[int, int]], key: str | None
) -> OptimizerState:
    states = [name.removesuffix(".pth") for name in inner if name.endswith("optimizer.pth")]
    if key is None and len(states) == 1:
        key = states[0]
    if key not in states:
        listed = ", ".join(states)
        raise BrokenFile(
            f"{path} holds the state of {len(states) or 'no'} optimizers{f' ({listed})' if states else ''}.",
            hint=f"Name one: {path}::{states[0]}." if states else None,
        )
    content, storages = read_archive(files, file, *inner[f"{key}.pth"])
    state, _ = _choose(dict(_states(content)), path, None)
    owner = key.removesuffix(".optimizer")

    def open_weights() -> Checkpoint:
        again = Files()
        again.add(path)
        tensors, places = read_archive(again, 0, *inner["policy.pth"])
        weights, said = find_weights(tensors, path, None)
        return TorchTensors(ref, again, {n: entry_of(n, t, 0, places, path) for n, t in weights.items()}, None, said)

    def candidates() -> Iterator[Order]:
        weights = open_weights()
        try:
            for order in orders.of_state_dict(weights, "policy.pth"):
                yield order if owner == "policy" else orders.below(order, f"{owner}.")
        finally:
            weights.close()

    return _of_state_dict(
        ref, state, files, file, storages, path, "torch", orders=candidates,
        open_weights=open_weights if "policy.pth" in inner else None,
    )  # fmt: skip
