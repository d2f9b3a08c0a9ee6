"""Optimizer state in rank files of verl and SkyRL: `optim_world_size_W_rank_R.pt`, in each what one process of FSDP held.

Parameters are numbered; their names and shapes come from the model's rank files beside, which keep the order of the model.
What a number stands for depends on FSDP: a parameter in parts (FSDP2: DTensors; FSDP1 with `use_orig_params`: pieces of it,
flat), or a unit of FSDP1, whose parameters lie end to end in one flat vector that was cut into equal parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from os import fspath
from typing import Any

from paramdiff import checkpoints
from paramdiff.checkpoints import Checkpoint, layouts, rank_files
from paramdiff.checkpoints.base import TensorInfo, check_name
from paramdiff.checkpoints.files import Files
from paramdiff.checkpoints.pickles import Opaque, StoredTensor
from paramdiff.checkpoints.pieces import Assembled, Entry, assemble
from paramdiff.checkpoints.places import place
from paramdiff.checkpoints.torch_file import read_file
from paramdiff.checkpoints.zero import Opened, Row
from paramdiff.errors import BrokenFile, UnsupportedFormat
from paramdiff.optimizers import orders
from paramdiff.optimizers.find import RANK_FILE
from paramdiff.optimizers.naming import Order, Shape, assign
from paramdiff.optimizers.state import OptimizerState, Parameter, as_steps
from paramdiff.optimizers.torch_state import SCALARS, scalar, settings

LAYER = re.compile(r"(?P<unit>.*?\b(layers?|h|blocks?|block)\.\d+)\.")  # what FSDP's usual policy wraps
WAY_OUT = "Save with FSDP2 or use_orig_params, or save the full state by name."
Held = list[dict[Any, Mapping[str, Any]]]  # the state of each rank, by number


def open(ref: str, path: str, key: str | None) -> OptimizerState:
    """Open the directory with the files of all ranks.

    Raises `BrokenFile` where one is missing, `UnsupportedFormat` where parameters cannot be named.
    """
    if key:
        raise UnsupportedFormat(f"{ref} names an entry, which rank files have not.")
    found = [match for file in place(path).iterdir() if (match := RANK_FILE.fullmatch(file.name))]
    names = layouts.all_ranks(place(path), found)
    files = Files()
    try:
        model = _model(path)
        try:
            return _opened(ref, path, [_open_rank(fspath(place(path) / name), files) for name in names], model, files)
        finally:
            model.close()
    except BaseException:
        files.close()
        raise


def _model(path: str) -> Checkpoint:
    found = [match for file in place(path).iterdir() if (match := layouts.RANK_FILE.fullmatch(file.name))]
    if not found:
        raise UnsupportedFormat(f"{path} holds optimizer state by number, and no model_world_size files to name it by.")
    return checkpoints.open(path)


def _open_rank(path: str, files: Files) -> Opened:
    file = files.add(path)
    content, storages = read_file(files, file)
    if not (isinstance(content, Mapping) and isinstance(content.get("state"), Mapping) and content.get("param_groups")):
        raise BrokenFile(f"{path} holds no optimizer state: no mapping with 'state' and 'param_groups'.")
    return Opened(path, file, content, storages)


def _opened(ref: str, path: str, ranks: list[Opened], model: Checkpoint, files: Files) -> OptimizerState:
    first = ranks[0]
    held: Held = [dict(rank.content["state"]) for rank in ranks]
    numbers = [[*group["params"]] for group in first.content["param_groups"]]
    plain = [settings(group, files, first.file, first.storages, first.path) for group in first.content["param_groups"]]
    kept = _slots(held)
    members, naming, entries, order = _named(path, ranks, held, kept, numbers, model)
    parameters = []
    for group, own in enumerate(numbers):
        for number in own:
            steps = _steps(ranks, held, number, plain[group], files)
            for name in members[number]:
                slots = tuple(slot for slot in kept if name in entries[slot])
                parameters.append(Parameter(name, group, steps if slots else None, slots, order.shapes[name]))
    moments: dict[str, Checkpoint] = {slot: Assembled(ref, "ranks", files, entries[slot], None) for slot in kept}
    return OptimizerState(
        ref, "ranks", moments, parameters, plain, directory=path, naming=naming, open_weights=partial(checkpoints.open, path)
    )


def _named(
    path: str, ranks: Sequence[Opened], held: Held, kept: Sequence[str], numbers: Sequence[Sequence[int]], model: Checkpoint
) -> tuple[dict[int, list[str]], str, dict[str, dict[str, Entry]], Order]:
    """The names of each number, how they were found, where the moments lie, and the order that fits."""
    in_parts = any(isinstance(value, Opaque) for state in held for one in state.values() for value in one.values())
    refusal: UnsupportedFormat | None = None
    for order in orders.of_state_dict(model, "the model's rank files"):
        try:
            return *(_in_parts if in_parts else _flat)(path, ranks, held, kept, numbers, order), order
        except UnsupportedFormat as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _slots(held: Held) -> list[str]:
    """What is kept for parameters, but for numbers."""
    return [*dict.fromkeys(slot for state in held for kept in state.values() for slot in kept if slot not in SCALARS)]


def _steps(
    ranks: Sequence[Opened], held: Held, number: Any, group: Mapping[str, Any], files: Files
) -> tuple[int, int] | None:
    """The fewest and the most steps of all ranks that hold a part of it."""
    found = []
    for rank, state in zip(ranks, held, strict=True):
        if number in state:
            count = state[number].get("step", group.get("step"))
            if isinstance(count, Opaque):  # a DTensor that all ranks have whole
                count = getattr(count.state, "get", lambda _: None)("_local_tensor") if count.holds_tensor else None
            steps = as_steps(scalar(count, files, rank.file, rank.storages, rank.path))
            found += [steps] if steps is not None else []
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


# A parameter in parts that say where they belong


def _in_parts(
    path: str, ranks: Sequence[Opened], held: Held, kept: Sequence[str], numbers: Sequence[Sequence[int]], order: Order
) -> tuple[dict[int, list[str]], str, dict[str, dict[str, Entry]]]:
    parts: dict[tuple[str, int], list[rank_files.Local]] = {}
    for rank, (opened, state) in enumerate(zip(ranks, held, strict=True)):
        for number, moments in state.items():
            for slot in kept:
                if slot in moments:
                    label = f"{slot} of parameter {number}"
                    found = rank_files.parts_of(label, moments[slot], rank, opened.file, opened.storages, opened.path)
                    parts.setdefault((slot, number), []).extend(found or [])
    shapes = {number: found[0].shape for (_, number), found in parts.items() if found}
    named, naming = assign(numbers, shapes, [order], path)
    entries: dict[str, dict[str, Entry]] = {slot: {} for slot in kept}
    for (slot, number), found in parts.items():
        entries[slot][named[number]] = rank_files.entry(named[number], found, path)
    return {number: [name] for number, name in named.items()}, naming, entries


# Flat vectors of FSDP1


def _flat(
    path: str, ranks: Sequence[Opened], held: Held, kept: Sequence[str], numbers: Sequence[Sequence[int]], order: Order
) -> tuple[dict[int, list[str]], str, dict[str, dict[str, Entry]]]:
    """Names of each number, how they were found, and where moments lie. Each is a parameter, whole or flat, or a unit.

    Where ranks hold the same several times over (HSDP), the first of them hold everything: as many as the sizes ask for.
    """
    everything = [number for group in numbers for number in group]
    whole = {number: value.shape for number in everything if (value := _moment(held[0], number, kept)) is not None}
    if len(ranks) == 1 and any(len(shape) > 1 for shape in whole.values()):  # not cut, and not flattened
        named, naming = assign(numbers, whole, [order], path)
        members = {number: [name] for number, name in named.items()}
        return members, naming, _laid_out(path, ranks, held, kept, members, order)
    for count in (n for n in range(1, len(ranks) + 1) if len(ranks) % n == 0):
        sizes = {
            number: sum(value.shape[0] for state in held[:count] if (value := _moment(state, number, kept)) is not None)
            for number in everything
            if any(number in state for state in held)
        }
        found = _as_parameters(numbers, sizes, order, path) or _as_units(everything, sizes, order, count)
        if found is not None:
            return *found, _laid_out(path, ranks[:count], held[:count], kept, found[0], order)
    raise UnsupportedFormat(
        f"{path} holds {len(everything):,} flat vectors of FSDP, whose sizes fit neither the model's {len(order.shapes):,} "
        "parameters nor its layers.",
        hint=WAY_OUT,
    )


def _moment(state: Mapping[Any, Mapping[str, Any]], number: Any, kept: Sequence[str]) -> StoredTensor | None:
    return next((v for slot in kept if isinstance(v := state.get(number, {}).get(slot), StoredTensor) and v.shape), None)


def _as_parameters(
    numbers: Sequence[Sequence[int]], sizes: Mapping[int, int], order: Order, path: str
) -> tuple[dict[int, list[str]], str] | None:
    """Each number a parameter, flat (`use_orig_params`); None where sizes do not fit."""
    flat = Order(order.source, {name: (math.prod(shape),) for name, shape in order.shapes.items()})
    shapes: dict[int, Shape] = {number: (size,) for number, size in sizes.items()}
    try:
        named, naming = assign(numbers, shapes, [flat], path)
    except UnsupportedFormat:
        return None
    return {number: [name] for number, name in named.items()}, naming


def _as_units(
    everything: Sequence[int], sizes: Mapping[int, int], order: Order, count: int
) -> tuple[dict[int, list[str]], str] | None:
    """Each number a unit: the root with what is outside layers, then the layers; or all in one. None where sizes, padded to
    a multiple of `count`, do not fit."""
    layers: dict[str, list[str]] = {"": []}
    for name in order.shapes:
        match = LAYER.match(name)
        layers.setdefault(match["unit"] if match else "", []).append(name)
    for units in ([*layers.values()], [[*order.shapes]]):
        units = [unit for unit in units if unit]
        if len(units) != len(everything) or not all(number in sizes for number in everything):
            continue
        taken = [sum(math.prod(order.shapes[name]) for name in unit) for unit in units]
        if all(0 <= sizes[n] - size < max(count, 1) for n, size in zip(everything, taken, strict=True)):
            what = "units of FSDP, the root and the layers" if len(units) > 1 else "the one unit of FSDP"
            return dict(zip(everything, units, strict=True)), f"named by {order.source}, in {what}"
    return None


def _laid_out(
    path: str,
    ranks: Sequence[Opened],
    held: Held,
    kept: Sequence[str],
    members: Mapping[int, Sequence[str]],
    order: Order,
) -> dict[str, dict[str, Entry]]:
    """Where each parameter's moments lie: its elements follow those of the ones before it, from rank to rank."""
    entries: dict[str, dict[str, Entry]] = {slot: {} for slot in kept}
    for slot in kept:
        for number, names in members.items():
            vectors = [
                rank.vector(state[number][slot], f"{slot} of parameter {number}")
                for rank, state in zip(ranks, held, strict=True)
                if slot in state.get(number, {})
            ]
            if not vectors:
                continue
            row, at = Row(vectors, path), 0
            for name in names:
                check_name(name, path)
                info = TensorInfo(name, row.dtype, order.shapes[name])
                pieces = [piece for _, _, piece in row.pieces(at, info.numel)]
                entries[slot][name] = assemble(info, pieces, path, shape=(info.numel,))
                at += info.numel
    return entries
