"""An optimizer's state as it lies on disk: names of parameters → moments that are read when they are asked for."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paramdiff import dtypes
from paramdiff.arrays import numpy_arrays
from paramdiff.checkpoints import Checkpoint, TensorInfo
from paramdiff.errors import UnsupportedFormat

Group = Mapping[str, Any]  # the settings of one of `param_groups`, without the list of parameters
FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter that an optimizer has. `steps` are the fewest and the most that any part of it has taken, None where
    nothing says; `slots` what is kept for it (`exp_avg`, `exp_avg_sq`), nothing where it was never stepped."""

    name: str
    group: int
    steps: tuple[int, int] | None = None
    slots: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None


class OptimizerState(Mapping[str, "ParameterState"]):
    """The state of an optimizer: a mapping from names of parameters to their `ParameterState`.

    `slots` holds a checkpoint for each kind of moment, names → tensors; `parameters` all that the optimizer has, those
    without state included; `groups` their settings; `naming` how names were found. `open_weights` opens the weights that
    belong to the state, where there are any.
    """

    def __init__(
        self,
        ref: str,
        kind: str,
        slots: Mapping[str, Checkpoint],
        parameters: Sequence[Parameter],
        groups: Sequence[Group],
        *,
        directory: str,
        naming: str,
        open_weights: Callable[[], Checkpoint] | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        self.ref, self.format, self.slots, self.groups = ref, kind, dict(slots), list(groups)
        self.parameters = {parameter.name: parameter for parameter in parameters}
        self.directory, self.naming, self.open_weights, self.warnings = directory, naming, open_weights, list(warnings)

    def __getitem__(self, name: str) -> ParameterState:
        parameter = self.parameters[name]
        return ParameterState(parameter, self.groups[parameter.group], self.slots)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __repr__(self) -> str:
        stepped = sum(1 for parameter in self.parameters.values() if parameter.slots)
        return (
            f"<OptimizerState of {self.ref}: {len(self)} parameters, {stepped} with {', '.join(self.slots) or 'no state'}>"
        )

    def facts(self) -> dict[str, Any]:
        """What run.json keeps of it: ref, format, files with their sizes, how names were found."""
        files = next(iter(self.slots.values())).facts()["files"] if self.slots else []
        return {
            "ref": self.ref,
            "format": self.format,
            "files": files,
            "parameters": len(self),
            "slots": list(self.slots),
            "naming": self.naming,
        }

    def close(self) -> None:
        for checkpoint in self.slots.values():
            checkpoint.close()


@dataclass(frozen=True)
class ParameterState(Mapping[str, FloatArray]):
    """What an optimizer keeps for one parameter: slots → arrays, read when they are asked for.

    Arrays have the parameter's shape, float32 (float64 where stored so).
    """

    parameter: Parameter
    group: Group
    _slots: Mapping[str, Checkpoint] = field(repr=False)

    @property
    def step(self) -> int | None:
        """How many steps it has taken; None where nothing says."""
        return self.parameter.steps[1] if self.parameter.steps else None

    def __getitem__(self, slot: str) -> FloatArray:
        if slot not in self.parameter.slots:
            raise KeyError(slot)
        return read(self._slots[slot], self.parameter.name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameter.slots)

    def __len__(self) -> int:
        return len(self.parameter.slots)


def read(checkpoint: Checkpoint, name: str) -> FloatArray:
    """A whole tensor of floats as float32 (of F64: float64). Raises `UnsupportedFormat` for other kinds."""
    info = checkpoint.tensors[name]
    if info.type.kind != "float":
        raise UnsupportedFormat(f"{name!r} in {checkpoint.ref} is {info.dtype}, which is no floating-point type.")
    raw = np.empty(info.nbytes, dtype=np.uint8)
    checkpoint.read_into(name, 0, memoryview(raw))  # type: ignore[arg-type]
    x = numpy_arrays()
    bits = dtypes.patterns(x, info.type, raw)[: info.numel]
    found: FloatArray = dtypes.values(x, info.type, bits, "f64" if info.dtype == "F64" else "f32").reshape(info.shape)
    return found


def number(info: TensorInfo, raw: bytes) -> float | int | None:
    """The value of a tensor of one element, or None for types that no count or rate has.

    >>> number(TensorInfo("step", "F32", ()), struct.pack("<f", 3.0))
    3.0
    """
    codes = {"F32": "f", "F64": "d", "I64": "q", "I32": "i"}
    if info.dtype not in codes or len(raw) != info.nbytes:
        return None
    value: float | int = struct.unpack(f"<{codes[info.dtype]}", raw)[0]
    return value


def as_steps(value: Any) -> tuple[int, int] | None:
    """The number of steps from what a file says, or None for what is no such number.

    >>> as_steps(3.0), as_steps(None), as_steps(float("nan"))
    ((3, 3), None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        return None
    return int(value), int(value)
