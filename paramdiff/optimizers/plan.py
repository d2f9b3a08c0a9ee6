"""From an opened state (and weights, and the state one step before) to what is read side by side: moments by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paramdiff import names
from paramdiff.checkpoints import Checkpoint, TensorInfo
from paramdiff.checkpoints.derived import Derived
from paramdiff.errors import BrokenFile, PairingError
from paramdiff.measures.adam import Recipe
from paramdiff.optimizers.kinds import Kind, recognise
from paramdiff.optimizers.rates import Rate
from paramdiff.optimizers.state import Group, OptimizerState, Parameter
from paramdiff.pairing import Aligned, Alignment, Uncompared, align

SLOTS = ("m", "v", "d")  # roles that moments of the state itself have
REASONS = {
    "no_state": "without state: never stepped, frozen, or trained by plain SGD",
    "not_optimized": "among the weights, but not among the optimizer's parameters",
    "no_weights": "whose weights were not found, so that bf16_visible is not known",
    "not_measured": "of a kind without statistics here",
    "only_first": "only in the first checkpoint",
    "only_second": "only in the second checkpoint",
    "excluded": "left out by --include/--exclude",
}


@dataclass
class Plan:
    """What is to be read: one alignment for each set of roles, with the recipe of each tensor; what is known of each
    parameter without reading; what is left out."""

    alignments: dict[Any, Alignment] = field(default_factory=dict)  # by roles and the checkpoints that they are read from
    recipes: dict[str, Recipe] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # name → columns
    coverage: list[Uncompared] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Read:
    """A tensor of some side: where it is read from, what it is there, and the stored tensor that it is, or is a part of."""

    checkpoint: Checkpoint
    info: TensorInfo
    origin: str


def plan(
    state: OptimizerState,
    rates: Sequence[Rate],
    wanted: Callable[[str], bool],
    *,
    weights: Checkpoint | None = None,
    before: OptimizerState | None = None,
    renames: Sequence[str] = (),
) -> Plan:
    """Match the moments of a state with one another, with the weights, and with the moments one step `before`.

    Raises `BrokenFile` where moments of one parameter differ in shape.
    """
    made = Plan()
    beside, sides = _with_weights(made, state, weights, renames)
    earlier = _with_weights(Plan(), before, weights, renames)[1] if before is not None else {}
    for name, parameter, own in _parameters(state, sides):
        group = state.groups[parameter.group]
        kind = recognise(own, group)
        made.facts[name] = _facts(name, parameter, own, kind, group, rates[parameter.group])
        if not wanted(name):
            made.facts.pop(name)
            made.coverage.append(_left_out(name, "excluded", "name filter", own, parameter))
            continue
        if kind.name == "AdamW" and group.get("weight_decay") and "decoupled_weight_decay" not in group:
            made.warnings.append(
                f"{state.ref} does not say whether weight decay is decoupled; it is taken to be, as in AdamW."
            )
        odd = next((read.info for read in own.values() if read.info.type.kind != "float"), None)
        if odd is not None:
            made.coverage.append(_left_out(name, "not_measured", f"stored as {odd.dtype}", own, parameter))
            continue
        reads = {role: own[slot] for role, slot in _slots_of(kind).items()}
        if not reads:
            reason = "not_measured" if own else "no_state"
            made.coverage.append(_left_out(name, reason, f"{kind.name}: {kind.absent}", own, parameter))
            continue
        if kind.absent:
            made.facts[name]["note"] = f"{kind.name}: {kind.absent}"
        else:
            made.facts[name]["note"] = _unknown(kind, group, parameter)
        if weights is not None:
            if name in beside and beside[name].info.shape == reads[next(iter(reads))].info.shape:
                reads["w"] = beside[name]
            else:
                made.coverage.append(_left_out(name, "no_weights", "no tensor of this name and shape", own, parameter))
        if before is not None and not kind.absent:
            for role, slot in _slots_of(kind).items():
                if role != "d":
                    reads[f"{role}0"] = earlier[slot][name]
        _add(made, name, reads, _recipe(kind, group, rates[parameter.group], parameter, tuple(reads)), state)
    made.warnings = list(dict.fromkeys(made.warnings))
    return made


def _slots_of(kind: Kind) -> dict[str, str]:
    found = {"m": kind.m, "v": kind.v, "d": kind.denominator}
    return {role: slot for role, slot in found.items() if slot is not None}


def _parameters(
    state: OptimizerState, sides: Mapping[str, Mapping[str, Read]]
) -> list[tuple[str, Parameter, dict[str, Read]]]:
    """(name, parameter, moments by slot) for everything that is read or has no state. Names are those that the weights
    have, or else the state's own without wrappers; one stored parameter may be several of the model's."""
    origin: dict[str, Parameter] = {}
    for found in sides.values():
        for name, read in found.items():
            origin.setdefault(name, state.parameters[read.origin])
    listed = [
        (name, parameter, {s: found[name] for s, found in sides.items() if name in found})
        for name, parameter in origin.items()
    ]
    there = {parameter.name for parameter in origin.values()}
    idle = [(names.strip_wrappers(p.name), p, dict[str, Read]()) for p in state.parameters.values() if p.name not in there]
    order = {name: number for number, name in enumerate(state.parameters)}
    return sorted([*listed, *idle], key=lambda found: order[found[1].name])


def _with_weights(
    made: Plan, state: OptimizerState, weights: Checkpoint | None, renames: Sequence[str]
) -> tuple[dict[str, Read], dict[str, dict[str, Read]]]:
    """The weights by the names of moments, and the moments of each slot by the names of weights, as far as rules of pairing
    bring them together."""
    sides = {
        slot: {names.strip_wrappers(name): Read(found, info, name) for name, info in found.tensors.items()}
        for slot, found in state.slots.items()
    }
    if weights is None:
        return {}, sides
    beside: dict[str, Read] = {}
    others: dict[str, Uncompared] = {}
    known = {*state.parameters} | {names.strip_wrappers(name) for name in state.parameters}
    for slot, checkpoint in state.slots.items():
        try:
            found = align(weights, checkpoint, resized=False, renames=renames)
        except PairingError:
            continue
        rest = {entry.name for entry in found.coverage if entry.side == "tuned"}
        sides[slot] = {name: read for name, read in sides[slot].items() if name in rest}
        for tensor in found.tensors:
            stored, moment = tensor.sides
            if "tied_head" in tensor.rule:
                others[tensor.name] = _not_optimized(tensor.name, stored, "tied to the embedding")
            else:
                beside[tensor.name] = Read(found.checkpoints[0], stored, stored.name)
                whence = found.checkpoints[1]
                origin = whence.sources(moment.name)[0] if isinstance(whence, Derived) else moment.name
                sides[slot][tensor.name] = Read(whence, moment, origin)
        for entry in found.coverage:
            if entry.side == "base" and entry.name not in known:
                info = TensorInfo(entry.name, entry.dtype, entry.shape)
                others[entry.name] = _not_optimized(entry.name, info, "frozen, tied or a buffer")
    made.coverage += [entry for name, entry in others.items() if name not in beside]
    if not beside:
        made.warnings.append(f"{weights.ref} has no tensor with a name of the optimizer's, so bf16_visible is not known.")
    return beside, sides


def _not_optimized(name: str, info: TensorInfo, detail: str) -> Uncompared:
    return Uncompared(name, "weights", "not_optimized", detail, info.shape, info.dtype, info.numel)


def _facts(name: str, parameter: Parameter, own: Mapping[str, Read], kind: Kind, group: Group, rate: Rate) -> dict[str, Any]:
    place = names.place(name)
    info = next((read.info for read in own.values()), None)
    shape = info.shape if info is not None else parameter.shape
    betas = betas_of(group)
    stored = {role: own[slot].info for role, slot in _slots_of(kind).items() if slot in own}
    return {
        "name": name,
        "layer": place.layer,
        "module": place.module,
        "kind": place.kind,
        "expert": place.expert,
        "shape": list(shape) if shape is not None else None,
        "numel": _numel(shape),
        "has_state": bool(own),
        "optimizer": kind.name,
        "dtype_m": _type(stored.get("m")),
        "dtype_v": _type(stored.get("v")),
        "step_min": parameter.steps[0] if parameter.steps else None,
        "step_max": parameter.steps[1] if parameter.steps else None,
        "lr": rate.value,
        "lr_source": rate.source,
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": _setting(group, "eps"),
        "weight_decay": _setting(group, "weight_decay"),
        "note": None,
    }


def _numel(shape: tuple[int, ...] | None) -> int | None:
    return None if shape is None else TensorInfo("", "U8", shape).numel


def _type(info: TensorInfo | None) -> str | None:
    return None if info is None else info.stored or info.dtype


def _setting(group: Group, key: str) -> float | None:
    value = group.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def betas_of(group: Group) -> tuple[float | None, float | None]:
    """β₁ and β₂ of a group: `betas`, or what other optimizers call them.

    >>> betas_of({"betas": (0.9, 0.999)}), betas_of({"momentum": 0.9}), betas_of({"alpha": 0.99})
    ((0.9, 0.999), (0.9, None), (None, 0.99))
    """
    betas = group.get("betas")
    if isinstance(betas, (tuple, list)) and len(betas) >= 2 and all(isinstance(beta, (int, float)) for beta in betas[:2]):
        return float(betas[0]), float(betas[1])
    return _setting(group, "momentum"), _setting(group, "alpha")


def _recipe(kind: Kind, group: Group, rate: Rate, parameter: Parameter, roles: tuple[str, ...]) -> Recipe:
    beta1, beta2 = (beta if beta is not None else 0.0 for beta in betas_of(group))
    t = parameter.steps[1] if parameter.steps else 0
    counted = _unknown(kind, group, parameter) is None
    corrected = kind.corrected and counted
    lr = rate.value
    if kind.name == "Adagrad" and lr is not None:
        lr /= 1 + max(t - 1, 0) * (_setting(group, "lr_decay") or 0.0)
    fresh = 1 - beta1 if kind.v is not None else 1 - (_setting(group, "dampening") or 0.0)
    return Recipe(
        roles,
        lr,
        beta1,
        beta2,
        _setting(group, "eps") or 0.0,
        c1=1 / (1 - beta1**t) if corrected else 1.0,
        c2=1 / (1 - beta2**t) if corrected else 1.0,
        fresh=fresh,
        decay=(_setting(group, "weight_decay") or 0.0) if _decoupled(kind, group) else 0.0,
        ascends=bool(group.get("maximize")),
        counted=counted,
        scales=kind.scales and counted,
        steps=kind.steps and counted,
    )


def _unknown(kind: Kind, group: Group, parameter: Parameter) -> str | None:
    """What is missing to know m̂, v̂ and the step of an optimizer that has them; None where nothing is."""
    if kind.corrected and not (parameter.steps and parameter.steps[1]):
        return "nothing says how many steps it has taken, so that moments cannot be corrected for it"
    if kind.corrected and not all(beta is not None and 0 <= beta < 1 for beta in betas_of(group)):
        return "nothing says what β₁ and β₂ were, so that moments cannot be corrected for them"
    if kind.scales and _setting(group, "eps") is None:
        return "nothing says what ε was, so that the step is not known"
    return None


def _decoupled(kind: Kind, group: Group) -> bool:
    """Whether weight decay is a part of the step rather than of the gradient. AdamW where the settings do not say."""
    return group.get("decoupled_weight_decay") is True or kind.name == "AdamW"


def _add(made: Plan, name: str, reads: Mapping[str, Read], recipe: Recipe, state: OptimizerState) -> None:
    shapes = {read.info.shape for role, read in reads.items()}
    if len(shapes) > 1:
        listed = ", ".join(f"{role} {list(read.info.shape)}" for role, read in reads.items())
        raise BrokenFile(f"{state.ref} holds moments of {name!r} that differ in shape: {listed}.")
    sides = tuple(read.info for read in reads.values())
    checkpoints = tuple(read.checkpoint for read in reads.values())
    key = recipe.roles, tuple(map(id, checkpoints))
    alignment = made.alignments.setdefault(key, Alignment(checkpoints))
    alignment.tensors.append(Aligned(name, sides, sides[0].shape, "same_name", "f64"))
    made.recipes[name] = recipe


def _left_out(name: str, reason: str, detail: str, own: Mapping[str, Read], parameter: Parameter) -> Uncompared:
    info = next((read.info for read in own.values()), None)
    shape = info.shape if info is not None else parameter.shape or ()
    return Uncompared(name, "optimizer", reason, detail, shape, info.dtype if info else "", _numel(shape) or 0)
