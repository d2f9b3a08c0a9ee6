"""One block of a pair of tensors, with what several measures need of it computed once."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from paramdiff import dtypes
from paramdiff.arrays import Array, Arrays, Count, Number
from paramdiff.pairing import Aligned
from paramdiff.streaming import Window

DENSE_SHARE = 0.6  # above this share of differing elements, gathering them costs more than computing on all


class PairBlock:
    """Base (`a`) and tuned (`b`) values of one window, on one device.

    Most blocks of most updates hardly differ, so everything but the norm of the base is computed on the *moved* elements
    alone: those whose bit patterns differ (a superset of the changed ones). Where most moved, and always where looking
    costs a wait (on a GPU), all elements count as moved.

    Values are float32 (float64 where a side is float64 or an integer). `a`, `b` and `delta` hold zeros at elements that
    are NaN or infinite on either side; `raw_a`, `raw_b` and `raw_delta` hold what the files say.
    """

    def __init__(self, x: Arrays, tensor: Aligned, window: Window, raw: Any) -> None:
        self.x, self.tensor, self.window = x, tensor, window
        self.numel = window.numel
        self.types = (tensor.sides[0].type, tensor.sides[1].type)
        self.same_type = self.types[0] == self.types[1]
        bits = [dtypes.patterns(x, t, r)[: self.numel] for t, r in zip(self.types, raw, strict=True)]
        if self.same_type:
            self._stored: list[Array] = bits
        else:  # compare what both sides are worth in the arithmetic that holds both
            self._stored = [self._bits_of(self._values(side, b)) for side, b in enumerate(bits)]
        self.differs = self._stored[0] != self._stored[1]
        self.moved: Count = x.count(self.differs)
        self.index: Array | None = None
        if x.eager and self.moved < DENSE_SHARE * self.numel:
            self.index = x.positions(self.differs)
        self.moved_bits = [b if self.index is None else b[self.index] for b in self._stored]

    @property
    def nothing_moved(self) -> bool:
        """True where it is known, without waiting, that both sides are bit for bit the same."""
        return bool(self.x.eager and self.moved == 0)

    @property
    def moved_numel(self) -> int:
        return int(self.moved_bits[0].shape[0])

    def _values(self, side: int, bits: Array) -> Array:
        return dtypes.values(self.x, self.types[side], bits, self.tensor.compute)

    def _bits_of(self, values: Array) -> Array:
        if self.tensor.compute == "i64":
            return values
        return values.view(self.x.i32 if self.tensor.compute == "f32" else self.x.i64)

    def _from_stored(self, side: int, bits: Array) -> Array:
        if self.same_type:
            return self._values(side, bits)
        return bits if self.tensor.compute == "i64" else bits.view(self._float)

    @property
    def _float(self) -> Any:
        return self.x.f32 if self.tensor.compute == "f32" else self.x.f64

    def _as_float(self, side: int, value: Array) -> Array:
        return dtypes.as_float64(self.x, self.types[side], value) if self.tensor.compute == "i64" else value

    # Moved elements, as the files have them

    @cached_property
    def exact(self) -> list[Array]:
        """Both sides in the type in which they are compared (int64 for integers)."""
        return [self._from_stored(side, bits) for side, bits in enumerate(self.moved_bits)]

    @cached_property
    def raw_a(self) -> Array:
        return self._as_float(0, self.exact[0])

    @cached_property
    def raw_b(self) -> Array:
        return self._as_float(1, self.exact[1])

    @cached_property
    def raw_delta(self) -> Array:
        delta = self.exact[1] - self.exact[0]
        if self.tensor.compute != "i64":
            return delta
        # Exact in int64 unless that overflows, which the float64 difference shows.
        rough = self.raw_b - self.raw_a
        return self.x.where(abs(rough) < 2.0**62, self.x.cast(delta, self.x.f64), rough)

    @cached_property
    def finite(self) -> Array | None:
        """Mask over moved elements: finite on both sides. None where all are known to be.

        A finite sum of squares proves every term finite, and is needed anyway; that spares the common case the masks.
        """
        x = self.x
        if self.tensor.compute == "i64" or (x.eager and all(math.isfinite(energy) for energy in self._raw_energies)):
            return None
        mask = x.isfinite(self.raw_a) & x.isfinite(self.raw_b)
        return None if x.eager and x.count(mask) == self.moved_numel else mask

    @cached_property
    def _raw64(self) -> tuple[Array, Array]:
        return self.x.cast(self.raw_a, self.x.f64), self.x.cast(self.raw_b, self.x.f64)

    @cached_property
    def _raw_energies(self) -> tuple[Number, Number]:
        a, b = self._raw64
        return self.x.dot(a, a), self.x.dot(b, b)

    @cached_property
    def opposite(self) -> Array:
        """Positions, among the moved elements, whose stored signs differ. Only where `eager`, and for ordered types."""
        assert self.x.eager
        return self.x.positions((self.moved_bits[0] ^ self.moved_bits[1]) < 0)

    @cached_property
    def changed_count(self) -> Count:
        """How many elements changed in value. ±0 are equal; NaN equals NaN."""
        if self._bits_tell:
            a, b = (v[self.opposite] for v in self.exact)
            return self.moved - self.x.count((a == 0) & (b == 0))
        return self.x.count(self.changed)

    @property
    def _bits_tell(self) -> bool:
        """True where values differ exactly when patterns do, but for +0 against -0."""
        signed = self.types[0].signed and self.types[0].width > 8 and self.types[0].kind == "float"
        return self.x.eager and self.same_type and signed and self.finite is None

    @cached_property
    def changed(self) -> Array:
        """Mask over moved elements: the values differ."""
        return differ(self.x, *self.exact, may_hold_nan=self.finite is not None)

    # Moved elements, with non-finite ones set to zero

    def _finite_only(self, value: Array) -> Array:
        return value if self.finite is None else self.x.where(self.finite, value, 0)

    @cached_property
    def a(self) -> Array:
        return self._finite_only(self.raw_a)

    @cached_property
    def delta(self) -> Array:
        return self._finite_only(self.raw_delta)

    @cached_property
    def abs_raw_delta(self) -> Array:
        return abs(self.raw_delta)

    @cached_property
    def abs_delta(self) -> Array:
        return self.abs_raw_delta if self.finite is None else abs(self.delta)

    @cached_property
    def abs_a(self) -> Array:
        return abs(self.a)

    @cached_property
    def a64(self) -> Array:
        return self._finite_only(self._raw64[0])

    @cached_property
    def b64(self) -> Array:
        return self._finite_only(self._raw64[1])

    @cached_property
    def energies(self) -> tuple[Number, Number]:
        """Sums of squares of both sides over the moved elements."""
        if self.finite is None and self.x.eager:
            return self._raw_energies
        return self.x.dot(self.a64, self.a64), self.x.dot(self.b64, self.b64)

    @cached_property
    def delta64(self) -> Array:
        return self.x.cast(self.delta, self.x.f64)

    # All elements of the block

    @cached_property
    def _whole_base(self) -> tuple[Array, Number, Count]:
        """The base over the whole block in float64 (zero where not finite), its sum of squares, its non-finite count.

        A sum of squares that is finite proves every term finite, which spares the common case a mask.
        """
        x = self.x
        if self.index is None:
            beyond = 0 if self.finite is None else x.count(~x.isfinite(self.raw_a))
            return self.a64, self.energies[0], beyond
        whole = self.whole(0)
        energy = x.dot(whole, whole)
        if math.isfinite(energy) and self.finite is None:
            return whole, energy, 0
        finite = x.isfinite(whole)
        beyond = self.numel - x.count(finite)
        whole = x.where(finite, whole, 0)
        if self.finite is not None:
            whole[self.index[~self.finite]] = 0
        return whole, x.dot(whole, whole), beyond

    @property
    def energy_a(self) -> Number:
        """Sum of squares of the base."""
        return self._whole_base[1]

    @cached_property
    def _whole_tuned(self) -> Array | None:
        """The tuned side over the whole block, or None where sums over what moved give the rest without cancellation."""
        moved_a, _ = self.energies
        if moved_a <= 0.5 * self.energy_a:  # at least half of the base's energy stays: a difference loses a bit at most
            return None
        whole = self._whole_base[0].copy()
        whole[self.index] = self.b64
        return whole

    @property
    def energy_b(self) -> Number:
        """Sum of squares of the tuned side."""
        moved_a, moved_b = self.energies
        if self.index is None:
            return moved_b
        whole = self._whole_tuned
        return self.energy_a - moved_a + moved_b if whole is None else self.x.dot(whole, whole)

    @property
    def inner(self) -> Number:
        """Inner product of both sides."""
        x = self.x
        if self.index is None:
            return x.dot(self.a64, self.b64)
        if self._whole_tuned is not None:
            return x.dot(self._whole_base[0], self._whole_tuned)
        return self.energy_a - self.energies[0] + x.dot(self.a64, self.b64)

    @cached_property
    def nonfinite(self) -> tuple[Count, Count, Count]:
        """How many elements are NaN or infinite: in the base, in the tuned side, in either."""
        x, in_a = self.x, self._whole_base[2]
        if self.finite is None:
            return in_a, in_a if self.index is not None else 0, in_a if self.index is not None else 0
        moved_a, moved_b = x.count(~x.isfinite(self.raw_a)), x.count(~x.isfinite(self.raw_b))
        moved_either = x.count(~self.finite)
        if self.index is None:
            return moved_a, moved_b, moved_either
        still = in_a - moved_a  # elements that did not move are the same on both sides
        return in_a, still + moved_b, still + moved_either

    def beyond(self, part: slice) -> Count:
        """How many of some elements of the block are NaN or infinite on either side."""
        if self.index is None:
            return 0 if self.finite is None else self.x.count(~self.finite[part])
        return self.x.count(self._beyond[part])

    @cached_property
    def _beyond(self) -> Array:
        return ~(self.x.isfinite(self.whole(0)) & self.x.isfinite(self.whole(1)))

    def whole(self, side: int) -> Array:
        """Every value of one side, as the file has it, in float64."""
        value = self._as_float(side, self._from_stored(side, self._stored[side]))
        return self.x.cast(value, self.x.f64)

    @cached_property
    def changed_everywhere(self) -> Array:
        """Mask over all elements of the block: the values differ."""
        if self.x.eager and self.changed_count == self.moved:
            return self.differs
        if self.index is None:
            return self.changed
        mask = self.differs.copy()
        mask[self.index] = self.changed
        return mask


def differ(x: Arrays, a: Array, b: Array, *, may_hold_nan: bool) -> Array:
    """`a != b` in value, with NaN equal to NaN (metrics.md §1)."""
    different = a != b
    return different & ~(x.isnan(a) & x.isnan(b)) if may_hold_nan else different
