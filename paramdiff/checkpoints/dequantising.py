"""The arithmetic of quantised weights: codes times scales, in float32, for any range of elements.

Each class is a `Made` tensor of `derived`. Products are rounded once per factor, in float32, as the formats' own kernels
have it; libraries that dequantise to bf16 round once more.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramdiff.arrays import Array, numpy_arrays
from paramdiff.checkpoints.base import Checkpoint, TensorInfo
from paramdiff.dtypes import DTYPES, float_table, patterns, values

_kept = threading.local()  # the last expert's values of each thread


def numbers(source: Checkpoint, name: str, first: int, last: int, dtype: str | None = None) -> Array:
    """Elements `first` to `last` of a stored tensor as float32; `dtype` where it is not the one they are stored as."""
    info = source.tensors[name]
    kind = DTYPES[dtype or info.dtype]
    raw = np.empty((last - first) * kind.bits // 8, dtype=np.uint8)
    source.read_into(name, first * kind.bits // 8, memoryview(raw))  # type: ignore[arg-type]
    x = numpy_arrays()
    return np.asarray(values(x, kind, patterns(x, kind, raw), "f64" if kind.name == "F64" else "f32"), dtype=np.float32)


def fill(buffer: memoryview, offset: int, floats: Any, first: int) -> None:
    """Copy float32 `floats`, of which the first is element `first`, to a buffer that begins at byte `offset`."""
    raw = np.ascontiguousarray(floats, dtype=np.float32).reshape(-1).view(np.uint8)
    np.frombuffer(buffer, dtype=np.uint8)[:] = raw[offset - 4 * first :][: len(buffer)]


@dataclass(frozen=True)
class Blocks:
    """A matrix, or a stack of them, of codes with a scale for each block: W[i, j] = code[i, j] · scale[i // b, j // c].

    `matrix` and `grid` are the (rows, columns) of one matrix and of its scales, `read_as` the scales' type. One more number
    may multiply or divide each scale first.
    """

    info: TensorInfo
    codes: str
    scale: str
    read_as: str
    matrix: tuple[int, int]
    grid: tuple[int, int]
    block: tuple[int, int]
    multiply: str | None = None
    divide: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for name in (self.codes, self.scale, self.multiply, self.divide) if name is not None)

    def read_into(self, source: Checkpoint, offset: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        width = self.matrix[1]
        first, last = offset // 4 // width, -(-(offset + len(buffer)) // (4 * width))
        assert self.info.codes is not None
        code = self.info.codes.type
        begin = first * width * code.bits // 8
        raw = np.empty(-(-last * width * code.bits // 8) - begin, dtype=np.uint8)
        source.read_into(self.codes, begin, memoryview(raw))  # type: ignore[arg-type]
        found = numpy_arrays().lookup(float_table(code.name), patterns(numpy_arrays(), code, raw)).reshape(-1)
        skipped = first * width - begin * 8 // code.bits
        whole = found[skipped : skipped + (last - first) * width].reshape(last - first, width)
        fill(buffer, offset, whole * self._scales(source, first, last), first * width)

    def _scales(self, source: Checkpoint, first: int, last: int) -> Array:
        """The scale of every element of rows `first` to `last`, counted through the whole stack."""
        rows = np.arange(first, last)
        of_grid = rows // self.matrix[0] * self.grid[0] + rows % self.matrix[0] // self.block[0]
        low, high = int(of_grid[0]), int(of_grid[-1]) + 1
        found = numbers(source, self.scale, low * self.grid[1], high * self.grid[1], self.read_as).reshape(-1, self.grid[1])
        if self.multiply is not None:
            found = found * numbers(source, self.multiply, 0, 1)[0]
        if self.divide is not None:
            found = found / numbers(source, self.divide, 0, 1)[0]
        if self.grid[1] == 1:
            return found[of_grid - low]
        return np.repeat(found, self.block[1], axis=1)[:, : self.matrix[1]][of_grid - low]


@dataclass(frozen=True)
class Lookup:
    """bitsandbytes' 4-bit weights: W[n] = table[code[n]] · absmax[n // block]; the code in the high half of a byte first.

    With `nested` > 0 the absmax is itself a code of 8 bits: table[code] · nested_absmax[m // nested] + `offset`.
    """

    info: TensorInfo
    name: str
    state: str
    block: int
    nested: int
    offset: float

    @property
    def sources(self) -> tuple[str, ...]:
        parts = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if self.nested else [])]
        return (self.name, self.state, *(f"{self.name}.{part}" for part in parts))

    def read_into(self, source: Checkpoint, offset: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        first, last = offset // 8 * 2, min(-(-(offset + len(buffer)) // 8) * 2, self.info.numel)  # whole bytes of codes
        raw = np.empty(-(-last // 2) - first // 2, dtype=np.uint8)
        source.read_into(self.name, first // 2, memoryview(raw))  # type: ignore[arg-type]
        codes = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)[: last - first]
        table = numbers(source, f"{self.name}.quant_map", 0, 16)
        low, high = first // self.block, (last - 1) // self.block + 1
        scales = self._absmax(source, low, high)
        fill(buffer, offset, table[codes] * scales[np.arange(first, last) // self.block - low], first)

    def _absmax(self, source: Checkpoint, low: int, high: int) -> Array:
        if not self.nested:
            return numbers(source, f"{self.name}.absmax", low, high)
        codes = np.empty(high - low, dtype=np.uint8)
        source.read_into(f"{self.name}.absmax", low, memoryview(codes))  # type: ignore[arg-type]
        table = numbers(source, f"{self.name}.nested_quant_map", 0, 256)
        begin = low // self.nested
        outer = numbers(source, f"{self.name}.nested_absmax", begin, (high - 1) // self.nested + 1)
        return table[codes] * outer[np.arange(low, high) // self.nested - begin] + np.float32(self.offset)


@dataclass(frozen=True)
class Expert:
    """gpt-oss's expert stacks, given as transformers gives them: (experts, in, out), each stored as (out, in).

    Turning a matrix needs all of it: one expert's values are kept by each thread, at most.
    """

    info: TensorInfo
    blocks: str
    scales: str

    @property
    def sources(self) -> tuple[str, ...]:
        return self.blocks, self.scales

    def read_into(self, source: Checkpoint, offset: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        size = 4 * math.prod(self.info.shape[1:])
        done = 0
        while done < len(buffer):
            expert, at = divmod(offset + done, size)
            length = min(size - at, len(buffer) - done)
            fill(buffer[done : done + length], at, self._values(source, expert), 0)
            done += length

    def _values(self, source: Checkpoint, expert: int) -> Array:
        key = (id(source), self.blocks, expert)
        if getattr(_kept, "key", None) != key:
            _, cols, rows = self.info.shape
            count = rows * cols
            codes = numbers(source, self.blocks, expert * count, (expert + 1) * count, "F4").reshape(-1, 32)
            groups = count // 32
            scales = numbers(source, self.scales, expert * groups, (expert + 1) * groups, "F8_E8M0")
            _kept.key, _kept.source = key, source
            _kept.values = np.ascontiguousarray((codes * scales[:, None]).reshape(rows, cols).T)
        found: Array = _kept.values
        return found
