"""The element types of checkpoints: how many bits, what value, and in which arithmetic two of them are compared.

Names are those of safetensors 0.8 (`BF16`, `F8_E4M3`, …). Every type but `C64` has values here: 8-, 6- and 4-bit floats
by tables written from their definition (OCP 8-bit and Microscaling formats 1.0; the *FNUZ variants by AMD/Graphcore),
*without* the scale that a quantised layer keeps in another tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from paramdiff.arrays import Array, Arrays

Compute = Literal["f32", "f64", "i64"]


@dataclass(frozen=True)
class DType:
    """One element type. `bits` is its stored size, `width` the size of the integer that holds its pattern here."""

    name: str
    bits: int
    kind: Literal["float", "int", "complex"]
    width: int
    signed: bool = True

    @property
    def ordered(self) -> bool:
        """True where the patterns are sign and magnitude, so that a distance in representable values exists."""
        return self.kind == "float"

    @property
    def within_bf16(self) -> bool:
        """True where every value is a bf16 value, so that rounding to bf16 changes nothing."""
        return self.kind == "float" and (self.bits <= 8 or self.name == "BF16")


def _make() -> dict[str, DType]:
    floats = [("BF16", 16), ("F16", 16), ("F32", 32), ("F64", 64)]
    small = [("F8_E4M3", 8), ("F8_E5M2", 8), ("F8_E4M3FNUZ", 8), ("F8_E5M2FNUZ", 8)]
    table = [DType(name, bits, "float", bits) for name, bits in floats + small]
    table.append(DType("F8_E8M0", 8, "float", 8, signed=False))
    table += [DType(name, bits, "float", 8) for name, bits in (("F6_E2M3", 6), ("F6_E3M2", 6), ("F4", 4))]
    table += [DType(f"I{bits}", bits, "int", bits) for bits in (8, 16, 32, 64)]
    table += [DType(f"U{bits}", bits, "int", bits, signed=False) for bits in (8, 16, 32, 64)]
    table += [DType("BOOL", 8, "int", 8, signed=False), DType("C64", 64, "complex", 64)]
    return {d.name: d for d in table}


DTYPES = _make()


def compute_type(a: DType, b: DType) -> Compute | None:
    """The arithmetic in which two types are compared: exact for both sides wherever one type can be.

    Integers of one kind compare as int64, floats as float32 (float64 where one side is), an integer against a float as
    float64, which rounds integers beyond 2^53. None where a type has no arithmetic (`C64`).

    >>> compute_type(DTYPES["BF16"], DTYPES["F32"]), compute_type(DTYPES["U8"], DTYPES["F16"])
    ('f32', 'f64')
    """
    if "complex" in (a.kind, b.kind):
        return None
    if a.kind == b.kind == "int":
        return "i64" if a == b or "U64" not in (a.name, b.name) else "f64"
    if a.kind == b.kind == "float" and "F64" not in (a.name, b.name):
        return "f32"
    return "f64"


def patterns(x: Arrays, dtype: DType, raw: Array) -> Array:
    """Stored bytes (uint8) → one signed integer per element (uint8 for types of 8 bits and less), no copy from 8 bits on.

    Packed types are unpacked with the first element in the lowest bits.
    """
    if dtype.bits == 4:
        return x.stack_fields([raw & 15, raw >> 4])
    if dtype.bits == 6:
        triple = x.cast(raw.reshape(-1, 3), x.i32)
        word = triple[:, 0] | (triple[:, 1] << 8) | (triple[:, 2] << 16)
        return x.cast(x.stack_fields([(word >> shift) & 63 for shift in (0, 6, 12, 18)]), x.u8)
    return raw if dtype.width == 8 else raw.view({16: x.i16, 32: x.i32, 64: x.i64}[dtype.width])


def values(x: Arrays, dtype: DType, bits: Array, compute: Compute) -> Array:
    """Bit patterns → values, exactly: float32 or float64 for floats, int64 for integers compared as such.

    `U64` at or above 2^63 wraps in int64; `as_float64` puts the magnitude back.
    """
    if dtype.kind == "int":
        whole = _integers(x, dtype, bits)
        return whole if compute == "i64" else as_float64(x, dtype, whole)
    if dtype.name == "BF16":
        value = (x.cast(bits, x.i32) << 16).view(x.f32)
    elif dtype.name == "F16":
        value = x.half(bits)
    elif dtype.name in ("F32", "F64"):
        value = bits.view(x.f32 if dtype.name == "F32" else x.f64)
    else:
        value = x.lookup(float_table(dtype.name), bits)
    return x.cast(value, x.f64) if compute == "f64" else value


def as_float64(x: Arrays, dtype: DType, whole: Array) -> Array:
    """int64 values of an integer type → float64, rounded once, with wrapped `U64` unwrapped."""
    if dtype.name == "U64":
        return x.cast((whole >> 32) & 0xFFFFFFFF, x.f64) * 2.0**32 + x.cast(whole & 0xFFFFFFFF, x.f64)
    return x.cast(whole, x.f64)


def sign_and_magnitude(x: Arrays, dtype: DType, bits: Array) -> tuple[Array, int]:
    """Patterns of an `ordered` type with the sign in the highest bit of the returned width, for `Arrays.ulps`."""
    if not dtype.signed:
        return x.cast(bits, x.i16), 16
    if dtype.bits < 8:
        sign = 1 << (dtype.bits - 1)
        return ((bits & sign) << (8 - dtype.bits)) | (bits & (sign - 1)), 8
    return bits, dtype.width


def _integers(x: Arrays, dtype: DType, bits: Array) -> Array:
    if dtype.name == "BOOL":
        return x.cast(bits != 0, x.i64)
    if dtype.name == "I8":
        return x.cast(bits.view(x.i8), x.i64)
    wide = x.cast(bits, x.i64)
    return wide & 0xFFFF if dtype.name == "U16" else wide & 0xFFFFFFFF if dtype.name == "U32" else wide


@cache
def float_table(name: str) -> np.ndarray[Any, Any]:
    """All values of a float type of at most 8 bits, by code, as float32 (256, 64 or 16 of them).

    >>> float_table("F4").tolist()[:8]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    if name == "F8_E8M0":
        return np.array([2.0 ** (code - 127) for code in range(255)] + [np.nan], dtype=np.float32)
    exponent_bits, mantissa_bits, bias = {
        "F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15), "F8_E4M3FNUZ": (4, 3, 8), "F8_E5M2FNUZ": (5, 2, 16),
        "F6_E2M3": (2, 3, 1), "F6_E3M2": (3, 2, 3), "F4": (2, 1, 1),
    }[name]  # fmt: skip
    magnitudes = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        fraction = mantissa / (1 << mantissa_bits)
        power = 2.0 ** (max(exponent, 1) - bias)
        magnitudes.append(power * (fraction + (exponent > 0)))
    table = np.array(magnitudes + [-m for m in magnitudes], dtype=np.float32)
    if name == "F8_E4M3":
        table[[0x7F, 0xFF]] = np.nan
    elif name == "F8_E5M2":
        table[[0x7C, 0xFC]] = np.inf, -np.inf
        table[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    elif name.endswith("FNUZ"):
        table[0x80] = np.nan  # no negative zero and no infinities: the one spare code is NaN
    return table
