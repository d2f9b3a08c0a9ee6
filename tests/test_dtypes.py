"""Values of every element type against torch and against the definition, on both backends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdiff.arrays import NumpyArrays, TorchArrays
from paramdiff.dtypes import DTYPES, as_float64, compute_type, float_table, patterns, sign_and_magnitude, values

NUMPY, TORCH = NumpyArrays(), TorchArrays(torch.device("cpu"))
BACKENDS = pytest.mark.parametrize("x", [NUMPY, TORCH], ids=["numpy", "torch"])

TORCH_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def on(x, array: np.ndarray):
    """The same array on a backend; torch gets its own writable copy."""
    return array if x is NUMPY else torch.from_numpy(array.copy())


def host(array) -> np.ndarray:
    return np.asarray(array)


def raw_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)


def same_floats(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the last bit, the sign of zero included; any NaN for any NaN."""
    assert found.dtype == expected.dtype
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    keep = ~np.isnan(expected)
    integer = f"i{expected.itemsize}"
    assert np.array_equal(found[keep].view(integer), expected[keep].view(integer))


@BACKENDS
@pytest.mark.parametrize("name", TORCH_TYPES)
def test_every_pattern_against_torch(x, name):
    dtype = DTYPES[name]
    codes = np.arange(1 << dtype.bits, dtype=f"u{dtype.bits // 8}")
    expected = torch.from_numpy(raw_bytes(codes).copy()).view(TORCH_TYPES[name]).to(torch.float32).numpy()
    bits = patterns(x, dtype, on(x, raw_bytes(codes)))
    same_floats(host(values(x, dtype, bits, "f32")), expected)
    with np.errstate(invalid="ignore"):  # widening a signalling NaN, here and there
        same_floats(host(values(x, dtype, bits, "f64")), expected.astype(np.float64))


@BACKENDS
@pytest.mark.parametrize(("name", "kind"), [("F32", np.float32), ("F64", np.float64)])
def test_wide_floats_are_what_they_are(x, name, kind):
    info = np.finfo(kind)
    array = np.array([0, -0.0, 1, -1.5, info.max, info.tiny, info.smallest_subnormal, np.inf, -np.inf, np.nan], dtype=kind)
    bits = patterns(x, DTYPES[name], on(x, raw_bytes(array)))
    same_floats(host(values(x, DTYPES[name], bits, "f32" if kind is np.float32 else "f64")), array)
    same_floats(host(values(x, DTYPES[name], bits, "f64")), array.astype(np.float64))


@BACKENDS
def test_half_without_any_infinity(x):
    """The short cut for blocks of finite numbers, and blocks of none."""
    codes = np.array([c for c in range(1 << 16) if (c & 0x7C00) != 0x7C00], dtype=np.uint16).view(np.int16)
    same_floats(host(x.half(on(x, codes))), codes.view(np.float16).astype(np.float32))
    assert host(x.half(on(x, codes[:0]))).shape == (0,)


# OCP Microscaling Formats (MX) 1.0, tables of E2M1, E2M3 and E3M2: the codes without the sign bit, in order
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M3 = [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
        2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5]  # fmt: skip
E3M2 = [0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75,
        2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]  # fmt: skip


@pytest.mark.parametrize(("name", "half"), [("F4", E2M1), ("F6_E2M3", E2M3), ("F6_E3M2", E3M2)])
def test_small_floats_against_the_definition(name, half):
    same_floats(float_table(name), np.array(half + [-float(v) for v in half], dtype=np.float32))


def test_extremes_of_eight_bit_floats():
    """The largest and least values that the OCP and FNUZ papers name."""
    for name, largest, least in (
        ("F8_E4M3", 448, 2.0**-9),
        ("F8_E5M2", 57344, 2.0**-16),
        ("F8_E4M3FNUZ", 240, 2.0**-10),
        ("F8_E5M2FNUZ", 57344, 2.0**-17),
        ("F8_E8M0", 2.0**127, 2.0**-127),
    ):
        finite = float_table(name)[np.isfinite(float_table(name))]
        assert finite.max() == largest
        assert finite[finite > 0].min() == least


@BACKENDS
def test_four_bits_lowest_first(x):
    bits = host(patterns(x, DTYPES["F4"], on(x, np.array([0x21, 0xF3], dtype=np.uint8))))
    assert bits.tolist() == [1, 2, 3, 15]


@BACKENDS
def test_six_bits_lowest_first(x):
    codes = [1, 2, 3, 63, 0, 33, 17, 40]
    packed = b"".join(
        sum(code << (6 * i) for i, code in enumerate(codes[k : k + 4])).to_bytes(3, "little") for k in (0, 4)
    )  # fmt: skip
    raw = np.frombuffer(packed, dtype=np.uint8)
    for name in ("F6_E2M3", "F6_E3M2"):
        bits = patterns(x, DTYPES[name], on(x, raw))
        assert host(bits).tolist() == codes
        same_floats(host(values(x, DTYPES[name], bits, "f32")), float_table(name)[codes])


INTEGERS = {"BOOL": "u1", **{f"{k}{b}": f"{k.lower()}{b // 8}" for k in "IU" for b in (8, 16, 32, 64)}}


@BACKENDS
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(x, name):
    kind = np.dtype(INTEGERS[name])
    limits = np.iinfo(kind)
    numbers = [0, 1] if name == "BOOL" else sorted({0, 1, limits.min, limits.max, limits.max // 2 + 1, limits.min // 2, 77})
    array = np.array(numbers, dtype=kind)
    bits = patterns(x, DTYPES[name], on(x, raw_bytes(array)))
    whole = values(x, DTYPES[name], bits, "i64")
    assert host(whole).dtype == np.int64
    assert [int(v) % 2**64 for v in host(whole)] == [v % 2**64 for v in numbers]
    if name != "U64":
        assert host(whole).tolist() == numbers
    assert host(values(x, DTYPES[name], bits, "f64")).tolist() == [float(v) for v in numbers]
    assert host(as_float64(x, DTYPES[name], whole)).tolist() == [float(v) for v in numbers]


@BACKENDS
@pytest.mark.parametrize("value", [2**63, 2**63 + 2**62, 2**64 - 1, 2**64 - 2**11, 2**63 - 1, 2**53 + 1])
def test_large_unsigned_as_float64(x, value):
    whole = on(x, np.array([value], dtype=np.uint64).view(np.int64))
    assert host(as_float64(x, DTYPES["U64"], whole)).tolist() == [float(value)]


@BACKENDS
@given(numbers=st.lists(st.integers(0, 2**64 - 1) | st.just(2**63 + 1025), min_size=1, max_size=20))
def test_unsigned_as_float64_is_rounded_once(x, numbers):
    """To the nearest float64, as Python and numpy round."""
    whole = on(x, np.array(numbers, dtype=np.uint64).view(np.int64))
    assert host(as_float64(x, DTYPES["U64"], whole)).tolist() == [float(n) for n in numbers]


def test_compute_types_are_symmetric_and_wide_enough():
    for a in DTYPES.values():
        for b in DTYPES.values():
            compute = compute_type(a, b)
            assert compute == compute_type(b, a)
            assert (compute is None) == ("C64" in (a.name, b.name))
            if compute == "i64":
                assert a.kind == b.kind == "int"
            if compute == "f32":
                assert a.kind == b.kind == "float"
                assert "F64" not in (a.name, b.name)


# --- distances ------------------------------------------------------------------------------------------------------


def steps(value: float, table: np.ndarray) -> int:
    """How many distinct values of a type lie between zero and a value, with its sign."""
    return int(np.searchsorted(table, abs(value))) * (-1 if value < 0 else 1)


@BACKENDS
@pytest.mark.parametrize("name", [n for n, d in DTYPES.items() if d.ordered and d.bits <= 8])
def test_distance_counts_values_between(x, name):
    """All pairs of finite codes of the small types: the distance is the number of steps from value to value."""
    dtype, table = DTYPES[name], float_table(name)
    codes = np.flatnonzero(np.isfinite(table)).astype(np.uint8)
    a, b = (m.reshape(-1).copy() for m in np.meshgrid(codes, codes))
    steps_of = np.zeros(len(table), dtype=np.int64)
    magnitudes = np.unique(np.abs(table[codes]))
    steps_of[codes] = [steps(v, magnitudes) for v in table[codes].tolist()]
    pa, width = sign_and_magnitude(x, dtype, on(x, a))
    pb, _ = sign_and_magnitude(x, dtype, on(x, b))
    found = host(x.ulps(pa, pb, width)).astype(np.int64)
    assert np.array_equal(found, np.abs(steps_of[a] - steps_of[b]))


def ordered(pattern: int, width: int) -> int:
    sign = 1 << (width - 1)
    return -(pattern & (sign - 1)) if pattern & sign else pattern


@BACKENDS
@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
@given(data=st.data())
@settings(max_examples=60)
def test_distance_of_wide_types(x, name, data):
    width = DTYPES[name].width
    special = [0, 1, 1 << (width - 1), (1 << (width - 1)) | 1, (1 << width) - 1, (1 << (width - 1)) - 1]
    number = st.integers(0, (1 << width) - 1) | st.sampled_from(special)
    pairs = data.draw(st.lists(st.tuples(number, number), min_size=1, max_size=30))
    a, b = (np.array(side, dtype=f"u{width // 8}") for side in zip(*pairs, strict=True))
    pa, w = sign_and_magnitude(x, DTYPES[name], patterns(x, DTYPES[name], on(x, raw_bytes(a))))
    pb, _ = sign_and_magnitude(x, DTYPES[name], patterns(x, DTYPES[name], on(x, raw_bytes(b))))
    assert w == width
    expected = [abs(ordered(p, width) - ordered(q, width)) for p, q in pairs]
    found = [d % (1 << 64) for d in host(x.ulps(pa, pb, w)).tolist()]  # torch has no unsigned type: it wraps
    assert found == expected
    bins = [0 if d == 0 else 1 + (d - 1).bit_length() for d in expected]
    assert host(x.doubling_bins(x.ulps(pa, pb, w), 66)).tolist() == np.bincount(bins, minlength=66).tolist()


def test_distance_is_one_for_the_next_float():
    for kind, name in ((np.float16, "F16"), (np.float32, "F32"), (np.float64, "F64")):
        a = np.array([1, -1, 0, 60000 if kind is np.float16 else 3e38, 2**-14], dtype=kind)
        b = np.nextafter(a, kind(np.inf))
        width = DTYPES[name].width
        signed = [side.view(f"i{width // 8}") for side in (a, b)]
        assert NUMPY.ulps(*signed, width).tolist() == [1, 1, 1, 1, 1]


def bin_of(distance: int) -> int:
    """0, 1, 2, 3–4, 5–8, …"""
    return 0 if distance == 0 else 1 + (distance - 1).bit_length()


EDGES = sorted({max(0, (1 << k) + d) for k in range(64) for d in (-1, 0, 1)})


@BACKENDS
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@given(data=st.data())
@settings(max_examples=40)
def test_doubling_bins(x, bits, data):
    top = (1 << bits) - 1 if x is NUMPY else (1 << min(bits, 63)) - 1
    small = st.sampled_from([e for e in EDGES if e <= top])
    distances = data.draw(st.lists(small | st.integers(0, top) | st.integers(0, 9), max_size=60))
    expected = [0] * 66
    for distance in distances:
        expected[bin_of(distance)] += 1
    array = np.array(distances, dtype=f"u{bits // 8}")
    counts = x.doubling_bins(array if x is NUMPY else torch.tensor(distances, dtype=torch.int64), 66)
    assert host(counts).tolist() == expected


# --- counts ---------------------------------------------------------------------------------------------------------


@BACKENDS
@given(rows=st.integers(1, 12), cols=st.integers(1, 300), share=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_row_and_column_counts(x, rows, cols, share, seed):
    mask = np.random.default_rng(seed).random(rows * cols) < share
    square = mask.reshape(rows, cols).tolist()
    assert host(x.row_counts(on(x, mask), rows, cols)).tolist() == [sum(row) for row in square]
    assert host(x.col_counts(on(x, mask), rows, cols)).tolist() == [sum(col) for col in zip(*square, strict=True)]


@BACKENDS
def test_counts_do_not_wrap(x):
    tall = np.ones(70_000, dtype=bool)
    assert host(x.col_counts(on(x, tall), 70_000, 1)).tolist() == [70_000]
    assert host(x.col_counts(on(x, tall[:65_535]), 65_535, 1)).tolist() == [65_535]
    assert host(x.row_counts(on(x, tall), 1, 70_000)).tolist() == [70_000]
    assert int(x.count(on(x, tall))) == 70_000


@BACKENDS
@given(keys=st.lists(st.integers(0, 9), max_size=50))
@settings(max_examples=30)
def test_histogram(x, keys):
    found = host(x.histogram(on(x, np.array(keys, dtype=np.int64)), 10))
    assert found.tolist() == [keys.count(k) for k in range(10)]


@BACKENDS
def test_sums_are_float64(x):
    """65,536 times 0.1 against the exact sum, closer than float32 could come; and nothing at all."""
    array = np.full(1 << 16, 0.1, dtype=np.float32)
    expected = math.fsum(array.tolist())
    assert abs(float(x.total(on(x, array))) - expected) < 1e-9 * expected
    assert float(x.total(on(x, array[:0]))) == 0
    assert float(x.maximum(on(x, array[:0]))) == 0
