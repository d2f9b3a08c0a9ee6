"""The arithmetic that measures are written in: numpy on a CPU, torch on a GPU, one vocabulary.

Measures use ordinary operators (`b - a`, `mask & other`, `x >> 3`), which numpy arrays and torch tensors share, and the
methods below for the rest. Two facts shape the split:

* On a CPU numpy starts 1 s sooner than torch, releases the GIL in every loop, and its `count_nonzero` is several times
  faster; so nothing on the CPU path imports torch.
* On a GPU a Python `if` on a value waits for the device. `eager` says whether looking at values is free. Measures may
  take short cuts when it is, and must give the same counts when it is not.

Signed integers are used for bit patterns throughout, because torch has no arithmetic on unsigned ones above 8 bits.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

Array = Any  # numpy.ndarray or torch.Tensor; the two share no static type
Count = Any  # int, or a 0-d int64 tensor that has not been waited for
Number = Any  # float, or a 0-d float64 tensor that has not been waited for


class Arrays(Protocol):
    """What a backend offers; see `NumpyArrays` and `TorchArrays`."""

    eager: bool
    u8: Any
    i8: Any
    i16: Any
    i32: Any
    i64: Any
    f32: Any
    f64: Any

    def cast(self, a: Array, dtype: Any) -> Array: ...
    def where(self, mask: Array, a: Any, b: Any) -> Array: ...
    def isfinite(self, a: Array) -> Array: ...
    def isnan(self, a: Array) -> Array: ...
    def count(self, mask: Array) -> Count: ...
    def positions(self, mask: Array) -> Array: ...
    def dot(self, a: Array, b: Array) -> Number: ...
    def total(self, a: Array) -> Number: ...
    def sqrt(self, a: Array) -> Array: ...
    def log(self, a: Array) -> Array: ...
    def maximum(self, a: Array) -> Number: ...
    def clip(self, a: Array, low: int, high: int) -> Array: ...
    def histogram(self, keys: Array, bins: int) -> Array: ...
    def lookup(self, table: np.ndarray[Any, Any], codes: Array) -> Array: ...
    def half(self, bits: Array) -> Array: ...
    def ulps(self, a: Array, b: Array, width: int) -> Array: ...
    def doubling_bins(self, a: Array, bins: int) -> Array: ...
    def stack_fields(self, fields: list[Array]) -> Array: ...
    def row_counts(self, mask: Array, rows: int, cols: int) -> Array: ...
    def col_counts(self, mask: Array, rows: int, cols: int) -> Array: ...
    def to_host(self, a: Any) -> Any: ...
    def scalars_to_host(self, values: list[Any], kind: Any) -> list[Any]: ...


class NumpyArrays:
    """numpy on the CPU; every result is there when the call returns."""

    eager = True
    u8, i8, i16, i32, i64 = np.uint8, np.int8, np.int16, np.int32, np.int64
    f32, f64 = np.float32, np.float64

    def cast(self, a: Array, dtype: Any) -> Array:
        return a.astype(dtype, copy=False)

    def where(self, mask: Array, a: Any, b: Any) -> Array:
        return np.where(mask, a, b)

    def isfinite(self, a: Array) -> Array:
        return np.isfinite(a)

    def isnan(self, a: Array) -> Array:
        return np.isnan(a)

    def count(self, mask: Array) -> Count:
        return int(np.count_nonzero(mask))

    def positions(self, mask: Array) -> Array:
        return np.flatnonzero(mask)

    def dot(self, a: Array, b: Array) -> Number:
        return float(np.dot(a, b))

    def total(self, a: Array) -> Number:
        return float(np.einsum("i->", a, dtype=np.float64))

    def sqrt(self, a: Array) -> Array:
        return np.sqrt(a)

    def log(self, a: Array) -> Array:
        return np.log(a)

    def maximum(self, a: Array) -> Number:
        return a.max().item() if a.size else 0

    def clip(self, a: Array, low: int, high: int) -> Array:
        return np.clip(a, low, high)

    def histogram(self, keys: Array, bins: int) -> Array:
        counts = np.zeros(bins, dtype=np.int64)
        np.add.at(counts, keys.astype(np.intp), 1)  # since numpy 1.25 a third faster than bincount, which scans twice
        return counts

    def lookup(self, table: np.ndarray[Any, Any], codes: Array) -> Array:
        return table.take(codes)

    def half(self, bits: Array) -> Array:
        # Shifting the fields into float32 position and scaling by 2^112 is exact, subnormals included, and three
        # times as fast as astype; only infinities and NaN need their exponent set by hand.
        wide = bits.astype(np.int32)
        magnitude = (wide & 0x7FFF) << 13
        value = magnitude.view(np.float32) * np.float32(2.0**112)
        pattern = value.view(np.int32)
        if magnitude.size and magnitude.max() >= 0x7C00 << 13:
            special = magnitude >= 0x7C00 << 13
            pattern[special] = magnitude[special] | 0x7F800000
        pattern |= (wide & 0x8000) << 16
        return value

    def ulps(self, a: Array, b: Array, width: int) -> Array:
        signed, unsigned = np.dtype(f"i{width // 8}"), np.dtype(f"u{width // 8}")
        a, b = a.view(signed), b.view(signed)
        distance = np.abs(a - b).view(unsigned)  # right as it stands when the signs agree
        opposite = np.flatnonzero((a ^ b) < 0)
        if opposite.size:
            magnitude = unsigned.type((1 << (width - 1)) - 1)
            distance[opposite] = (a[opposite].view(unsigned) & magnitude) + (b[opposite].view(unsigned) & magnitude)
        return distance

    def doubling_bins(self, a: Array, bins: int) -> Array:
        # Counting against rising powers of two is ten times cheaper per pass than a bincount, most of all on bytes; and
        # training moves most weights by few ulps, so that bytes tell nearly everything.
        counts = np.zeros(bins, dtype=np.int64)
        small = a.astype(np.uint8)
        if a.itemsize > 1:
            small |= np.negative((a > 255).view(np.uint8))  # all that is larger becomes 255 (minimum() is no SIMD loop)
        left, index, threshold, limit = a.size, 0, 0, np.iinfo(a.dtype).max
        while left and threshold <= limit:
            if threshold == 256:
                small = a[np.flatnonzero(small > 128)]
            above = int(np.count_nonzero(small > small.dtype.type(threshold)))
            counts[index] = left - above
            left, index, threshold = above, index + 1, threshold * 2 or 1
        counts[min(index, bins - 1)] += left
        return counts

    def stack_fields(self, fields: list[Array]) -> Array:
        return np.stack(fields, axis=1).reshape(-1)

    def row_counts(self, mask: Array, rows: int, cols: int) -> Array:
        return np.add.reduce(mask.reshape(rows, cols).view(np.uint8), axis=1, dtype=np.uint32)

    def col_counts(self, mask: Array, rows: int, cols: int) -> Array:
        small = np.uint16 if rows < 65536 else np.uint32
        return np.add.reduce(mask.reshape(rows, cols).view(np.uint8), axis=0, dtype=small)

    def to_host(self, a: Any) -> Any:
        return a

    def scalars_to_host(self, values: list[Any], kind: Any) -> list[Any]:
        return values


class TorchArrays:
    """torch on one device; results are queued, and only `to_host`, `scalars_to_host` and `positions` wait."""

    eager = False

    def __init__(self, device: torch.device) -> None:
        import torch

        self.torch, self.device = torch, device
        self.u8, self.i8, self.i16 = torch.uint8, torch.int8, torch.int16
        self.i32, self.i64 = torch.int32, torch.int64
        self.f32, self.f64 = torch.float32, torch.float64
        self._tables: dict[bytes, torch.Tensor] = {}

    def cast(self, a: Array, dtype: Any) -> Array:
        return a.to(dtype)

    def where(self, mask: Array, a: Any, b: Any) -> Array:
        return self.torch.where(mask, a, b)

    def isfinite(self, a: Array) -> Array:
        return self.torch.isfinite(a)

    def isnan(self, a: Array) -> Array:
        return self.torch.isnan(a)

    def count(self, mask: Array) -> Count:
        return mask.sum()

    def positions(self, mask: Array) -> Array:
        return mask.nonzero().reshape(-1)

    def dot(self, a: Array, b: Array) -> Number:
        return self.torch.dot(a, b)

    def total(self, a: Array) -> Number:
        return a.sum(dtype=self.torch.float64)

    def sqrt(self, a: Array) -> Array:
        return self.torch.sqrt(a)

    def log(self, a: Array) -> Array:
        return self.torch.log(a)

    def maximum(self, a: Array) -> Number:
        return a.max() if a.numel() else self.torch.zeros((), dtype=a.dtype, device=a.device)

    def clip(self, a: Array, low: int, high: int) -> Array:
        return a.clamp(low, high)

    def histogram(self, keys: Array, bins: int) -> Array:
        if keys.numel() > 1 << 24:  # beyond what float32 counts exactly
            return self.torch.bincount(keys, minlength=bins)
        # On a GPU bincount waits for the largest key; histc with given limits does not.
        return self.torch.histc(keys.to(self.torch.float32), bins=bins, min=-0.5, max=bins - 0.5).to(self.torch.int64)

    def lookup(self, table: np.ndarray[Any, Any], codes: Array) -> Array:
        key = table.tobytes()
        if key not in self._tables:
            self._tables[key] = self.torch.from_numpy(table.copy()).to(self.device)
        return self._tables[key][codes.long()]

    def half(self, bits: Array) -> Array:
        return bits.view(self.torch.float16).to(self.torch.float32)

    def ulps(self, a: Array, b: Array, width: int) -> Array:
        # int64 holds every distance up to 32 bits. For float64 the distance between opposite signs can reach 2^63 and wrap
        # to a negative number, which `doubling_bins` reads as unsigned.
        magnitude = (1 << (width - 1)) - 1
        ma, mb = a.to(self.torch.int64) & magnitude, b.to(self.torch.int64) & magnitude
        far = ma + mb
        signed = {8: self.torch.int8, 16: self.torch.int16, 32: self.torch.int32, 64: self.torch.int64}[width]
        return self.torch.where((a ^ b).view(signed) < 0, far, (ma - mb).abs())

    def doubling_bins(self, a: Array, bins: int) -> Array:
        rest = (a - 1).clamp(min=0)
        lengths = self.torch.zeros_like(a)
        for shift in (32, 16, 8, 4, 2, 1):  # a binary search for the highest set bit, exact where a float log is not
            high = rest >> shift
            big = high > 0
            lengths = lengths + big * shift
            rest = self.torch.where(big, high, rest)
        lengths = lengths + (rest > 0)
        lengths = self.torch.where(a > 0, lengths + 1, 0)
        unsigned = self.torch.where(a == -(1 << 63), 64, 65)
        return self.histogram(self.torch.where(a < 0, unsigned, lengths).clamp(max=bins - 1), bins)

    def stack_fields(self, fields: list[Array]) -> Array:
        return self.torch.stack(fields, dim=1).reshape(-1)

    def row_counts(self, mask: Array, rows: int, cols: int) -> Array:
        return mask.reshape(rows, cols).sum(dim=1)

    def col_counts(self, mask: Array, rows: int, cols: int) -> Array:
        return mask.reshape(rows, cols).sum(dim=0)

    def to_host(self, a: Any) -> Any:
        if not isinstance(a, self.torch.Tensor):
            return a
        host = a.cpu()
        return host.item() if host.ndim == 0 else host.numpy()

    def scalars_to_host(self, values: list[Any], kind: Any) -> list[Any]:
        """All of them in one transfer."""
        if not values:
            return []
        queued = [self.torch.as_tensor(v, device=self.device).to(kind).reshape(()) for v in values]
        return list(self.torch.stack(queued).cpu().tolist())


@cache
def numpy_arrays() -> NumpyArrays:
    """The CPU backend. Also keeps glibc from returning every freed temporary to the kernel.

    glibc raises its mmap threshold to the size of the largest mapped block that was freed; without this each 1 MB
    temporary would be mapped, faulted in and unmapped again, at fifteen times the cost of the arithmetic on it.
    """
    warm = np.empty((31 << 20,), dtype=np.uint8)
    del warm
    return NumpyArrays()
