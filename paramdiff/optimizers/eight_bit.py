"""bitsandbytes' 8-bit optimizers: moments as codes into a table of 256 values, scaled block by block.

`x[i] = qmap[code[i]] · absmax[i // block]` (bitsandbytes functional.dequantize_blockwise); blocks of its optimizers have 256
elements, and had 2048 before version 0.44.
Small parameters (under 4096 elements) are kept in float32 under the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from paramdiff.checkpoints import Checkpoint, TensorInfo
from paramdiff.errors import BrokenFile
from paramdiff.optimizers.state import Parameter

NEST = "__bnb_optimizer_quant_state__"  # where versions after 0.46 put what was flat before
BLOCKS = (256, 2048)
QUANTISED = re.compile(r"(state|qmap|absmax|max|new_max)[12]")
CODES = {"state1": "exp_avg", "state2": "exp_avg_sq"}  # of optimizers with two moments, which are Adam and its relatives


class Scaled:
    """One moment of all parameters, worked out of its codes as it is read; see `Checkpoint` for the interface.

    `codes` holds codes (or, of small parameters, values), `tables` and `scales` what they are multiplied out with, `others`
    the moment of parameters that another optimizer trained.
    Raises `BrokenFile` where a table or the scales do not fit.
    """

    def __init__(
        self, codes: Checkpoint, tables: Checkpoint | None, scales: Checkpoint | None, others: Checkpoint | None
    ) -> None:
        self.ref, self.warnings, self.config = codes.ref, list[str](), codes.config
        self._codes, self._tables, self._scales, self._others = codes, tables, scales, others
        self._blocks: dict[str, int] = {}  # by name, of those that are codes
        self.tensors: Mapping[str, TensorInfo] = {
            **(others.tensors if others else {}),
            **{name: self._info(info) if info.dtype == "U8" else info for name, info in codes.tensors.items()},
        }

    def _info(self, info: TensorInfo) -> TensorInfo:
        table, scales = (part.tensors.get(info.name) if part else None for part in (self._tables, self._scales))
        fits = table is not None and scales is not None and table.dtype == scales.dtype == "F32" and table.numel == 256
        block = next((b for b in BLOCKS if fits and scales is not None and scales.numel == -(-info.numel // b)), None)
        if block is None:
            raise BrokenFile(
                f"{self.ref} holds a moment of {info.name!r} in 8 bits, but no table of 256 values and a scale for every "
                f"{' or '.join(map(str, BLOCKS))} elements with it."
            )
        self._blocks[info.name] = block
        return TensorInfo(info.name, "F32", info.shape, stored="bnb_8bit", read_bits=8)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name not in self._blocks or self._tables is None or self._scales is None:
            self._at(name).read_into(name, offset, buffer)
            return
        size = self._blocks[name]
        first, count = offset // 4, len(buffer) // 4
        block = first // size
        codes = np.empty(count, dtype=np.uint8)
        self._codes.read_into(name, first, memoryview(codes))  # type: ignore[arg-type]
        values = np.empty(256, dtype=np.float32)
        self._tables.read_into(name, 0, memoryview(values.view(np.uint8)))  # type: ignore[arg-type]
        largest = np.empty((first + count - 1) // size + 1 - block if count else 0, dtype=np.float32)
        self._scales.read_into(name, 4 * block, memoryview(largest.view(np.uint8)))  # type: ignore[arg-type]
        out = np.frombuffer(buffer, dtype=np.float32)
        np.multiply(values[codes], np.repeat(largest, size)[first - block * size :][:count], out=out)

    @property
    def is_local(self) -> bool:
        return self._codes.is_local

    def content(self, name: str) -> tuple[str, int] | None:
        return None

    def announce(self, parts: Iterable[tuple[str, int, int]]) -> None:
        """Codes are read in blocks of the file's own."""

    def _at(self, name: str) -> Checkpoint:
        return self._codes if self._others is None or name in self._codes.tensors else self._others

    def position(self, name: str) -> tuple[int, int]:
        return self._at(name).position(name)

    def verify(self) -> None:
        self._codes.verify()

    def facts(self) -> dict[str, Any]:
        return self._codes.facts()

    def close(self) -> None:
        self._codes.close()


def dequantised(
    slots: Mapping[str, Checkpoint], parameters: Sequence[Parameter]
) -> tuple[dict[str, Checkpoint], list[Parameter]]:
    """Slots and parameters with bitsandbytes' moments under the usual names, worked out where they are codes."""
    if not {*CODES} <= slots.keys():
        return dict(slots), list(parameters)
    found = {slot: checkpoint for slot, checkpoint in slots.items() if not QUANTISED.fullmatch(slot)}
    for state, slot in CODES.items():
        table, scales = slots.get(f"qmap{state[-1]}"), slots.get(f"absmax{state[-1]}")
        found[slot] = Scaled(slots[state], table, scales, slots.get(slot))
    renamed = [
        replace(p, slots=tuple(CODES.get(slot, slot) for slot in p.slots if slot in CODES or not QUANTISED.fullmatch(slot)))
        for p in parameters
    ]
    return found, renamed
