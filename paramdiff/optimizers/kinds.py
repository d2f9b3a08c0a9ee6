"""Which optimizer left a state, by the keys that it keeps and its settings, and what is defined for it.

A new optimizer is one more line of `KINDS`; the measure knows moments, not optimizers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

MOMENTS = {  # slots that have the shape of their parameter
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum", "exp_inf",
    "state1", "state2", "variance",
}  # fmt: skip
BESIDE = {"RMS", "unorm_vec", "unorm"}  # numbers that some keep beside moments, and that no step is made of


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of one kind of optimizer.

    `needs` are slots that a parameter must have (`alone`: and no other that is known or of its shape), `hints` settings of
    which the group must have one. `m` and `v` are the
    slots of its first and second moment, `denominator` that of the second moment in the step where it is another one.
    `corrected`: moments are divided by 1 − βᵗ. `scales`: η/(√v̂ + ε) is what it multiplies with. `steps`: the step is
    η·m̂/(√v̂ + ε), or η·m where there is no v. `absent` says what is not defined, and why.
    """

    name: str
    needs: frozenset[str]
    hints: tuple[str, ...] = ()
    alone: bool = False
    m: str | None = None
    v: str | None = None
    denominator: str | None = None
    corrected: bool = False
    scales: bool = False
    steps: bool = False
    absent: str | None = None


def _kind(name: str, needs: str, **more: Any) -> Kind:
    return Kind(name, frozenset(needs.split()), **more)


RECTIFIED = "its step is rectified, so that update, adaptivity and bf16_visible are not given"
NESTEROV = "its step looks a gradient ahead, so that update, adaptivity and bf16_visible are not given"
FACTORED = "it keeps v as a row and a column, not for each element, so that no statistics of v are given"
TO_SCALE = "its step is scaled to the weights, so that update, adaptivity and bf16_visible are not given"
NO_GRADIENT = "it keeps no first moment, so that update and adaptivity are not known"
KINDS = (  # the first that fits
    _kind("Adafactor", "exp_avg exp_avg_sq", hints=("clip_threshold", "relative_step"), m="exp_avg", v="exp_avg_sq",
          absent=TO_SCALE),
    _kind("NAdam", "exp_avg exp_avg_sq", hints=("momentum_decay",), m="exp_avg", v="exp_avg_sq", corrected=True, scales=True,
          absent=NESTEROV),
    _kind("AMSGrad", "exp_avg exp_avg_sq max_exp_avg_sq", alone=True, m="exp_avg", v="exp_avg_sq",
          denominator="max_exp_avg_sq", corrected=True, scales=True, steps=True),
    _kind("Adam", "exp_avg exp_avg_sq", alone=True, m="exp_avg", v="exp_avg_sq", corrected=True, scales=True, steps=True),
    _kind("Adamax", "exp_avg exp_inf", m="exp_avg", absent="it divides by the largest gradient, not by √v"),
    _kind("Adafactor", "exp_avg_sq_row exp_avg_sq_col", absent=FACTORED),  # of transformers
    _kind("Adafactor", "row_var col_var", absent=FACTORED),  # of torch
    _kind("Adafactor", "exp_avg_sq", alone=True, v="exp_avg_sq", absent=TO_SCALE),
    _kind("Adafactor", "variance", v="variance", absent=TO_SCALE),
    _kind("Lion", "exp_avg", alone=True, m="exp_avg", absent="its steps are signs; it has no v"),
    _kind("Adadelta", "square_avg acc_delta", v="square_avg", absent="it has no learning rate of this meaning"),
    _kind("RMSprop", "square_avg grad_avg", v="square_avg", absent="it divides by the centred second moment, not by √v"),
    _kind("RMSprop", "square_avg", v="square_avg", scales=True, absent=NO_GRADIENT),
    _kind("Adagrad", "sum", alone=True, v="sum", scales=True, absent=NO_GRADIENT),
    _kind("Muon", "momentum_buffer", hints=("ns_steps", "use_muon"), m="momentum_buffer",
          absent="its step is the momentum made orthogonal; it has no v"),
    _kind("SGD with momentum", "momentum_buffer", alone=True, m="momentum_buffer", steps=True),
)  # fmt: skip
UNKNOWN = Kind("unknown", frozenset(), absent="no optimizer that is known keeps such state")
STATELESS = Kind("no state", frozenset(), absent="nothing is kept for it: it was never stepped, or plain SGD trained it")


def recognise(slots: Collection[str], group: Mapping[str, Any]) -> Kind:
    """The kind of optimizer that keeps `slots` for a parameter of `group`.

    >>> recognise(["exp_avg", "exp_avg_sq"], {"decoupled_weight_decay": True, "amsgrad": False}).name
    'AdamW'
    >>> recognise(["momentum_buffer"], {"nesterov": False}).name
    'SGD with momentum'
    """
    if not slots:
        return STATELESS
    kept = {slot for slot in slots if slot not in BESIDE}
    found = next((k for k in KINDS if (k.needs == kept if k.alone else k.needs <= kept) and _has_hint(k, group)), UNKNOWN)
    if found.name == "Adam":
        return _of_adam(found, group)
    if found.name == "SGD with momentum" and group.get("nesterov"):
        return Kind(found.name, found.needs, m=found.m, absent=NESTEROV)
    return found


def _has_hint(kind: Kind, group: Mapping[str, Any]) -> bool:
    return not kind.hints or any(hint in group for hint in kind.hints)


def _of_adam(found: Kind, group: Mapping[str, Any]) -> Kind:
    """Adam, AdamW or RAdam, which keep the same; only the settings differ."""
    if "decoupled_weight_decay" in group and "amsgrad" not in group:
        return Kind("RAdam", found.needs, m=found.m, v=found.v, corrected=True, absent=RECTIFIED)
    name = "Adam" if group.get("decoupled_weight_decay") is False or group.get("adam_w_mode") is False else "AdamW"
    corrected = group.get("bias_correction") not in (False, 0)
    return Kind(name, found.needs, m=found.m, v=found.v, corrected=corrected, scales=True, steps=True)
