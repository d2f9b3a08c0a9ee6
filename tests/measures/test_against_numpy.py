"""Every number of one tensor against float64 numpy, for every pair of types, dense and sparse updates, and odd values."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import paramdiff
from tests.measures.reference import exponents, reference, ulp_distance

TOLERANCES = [0.0, 1e-8, 1e-5, 2.0**-9, 1e-2]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.bool,
]
SPECIALS = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, -1e-40, 6e-8, 1.0, -1.0, 3.3e38, 1e-30]


def compare(tmp: Path, a: torch.Tensor, b: torch.Tensor, device: str = "cpu", **options: object) -> paramdiff.Diff:
    save_file({"layers.0.w": a.contiguous()}, tmp / "a.safetensors")
    save_file({"layers.0.w": b.contiguous()}, tmp / "b.safetensors")
    return paramdiff.compare(tmp / "a.safetensors", tmp / "b.safetensors", device=device, **options)  # type: ignore[arg-type]


def check(tmp: Path, a: torch.Tensor, b: torch.Tensor, device: str = "cpu") -> None:
    row = compare(tmp, a, b, device, tolerances=TOLERANCES).tensors.row(0, named=True)
    wanted = reference(a, b, TOLERANCES)
    for name, value in wanted.items():
        if isinstance(value, float):
            # Signed sums may cancel: their error is measured against the sum of magnitudes.
            scale = {"dot": float(wanted["l2_base"]) * float(wanted["l2_tuned"]), "mean_delta": wanted["mean_abs_delta"]}
            assert row[name] == pytest.approx(value, rel=1e-12, abs=1e-13 * float(scale.get(name) or 0.0) + 1e-300), name
        else:
            assert row[name] == value, name
    assert row["sparsity"] == 1 - row["changed"] / row["numel"]
    assert (row["changed_bits"] is None) == (a.dtype != b.dtype)


def update(seed: int, shape: tuple[int, ...], share: float, kind_a: torch.dtype, kind_b: torch.dtype) -> list[torch.Tensor]:
    """A tensor and an update of about `share` of it, specials strewn over both sides."""
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, generator=rng) * 0.02
    step = torch.randn(shape, generator=rng) * 1e-3 * (torch.rand(shape, generator=rng) < share)
    a, b = a.to(kind_a), (a.to(kind_a).to(torch.float32) + step).to(kind_b)
    return [a, b]


@pytest.mark.parametrize(("kind_a", "kind_b"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_every_pair_of_float_types(tmp_path: Path, kind_a: torch.dtype, kind_b: torch.dtype) -> None:
    a, b = update(1, (37, 41), 0.3, kind_a, kind_b)
    check(tmp_path, a, b)


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_integers_and_booleans(tmp_path: Path, kind: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(2)
    high = 2 if kind == torch.bool else 100
    a = torch.randint(0, high, (13, 7), generator=rng)
    b = torch.where(torch.rand(13, 7, generator=rng) < 0.3, torch.randint(0, high, (13, 7), generator=rng), a)
    if kind in (torch.int8, torch.int16, torch.int32, torch.int64):
        a, b = a - 50, b - 50
    check(tmp_path, a.to(kind), b.to(kind))


@pytest.mark.parametrize(
    ("kind_a", "kind_b"), [(torch.int8, torch.int64), (torch.uint8, torch.float32), (torch.bool, torch.int16)]
)
def test_mixed_kinds(tmp_path: Path, kind_a: torch.dtype, kind_b: torch.dtype) -> None:
    a = torch.arange(100).remainder(2).to(kind_a)
    check(tmp_path, a, torch.arange(100).remainder(3).to(kind_b))


def test_64_bit_integers_compare_beyond_float64(tmp_path: Path) -> None:
    big = 2**53
    a = torch.tensor([big, big + 1, -big], dtype=torch.int64)
    row = compare(tmp_path, a, a + torch.tensor([1, 0, 0]), tolerances=[0.5]).tensors.row(0, named=True)
    assert (row["changed"], row["above[0.5]"], row["max_abs_delta"]) == (1, 1, 1.0)
    top = torch.tensor([2**63 + 5, 3], dtype=torch.uint64)
    row = compare(tmp_path, top, torch.tensor([2**63 + 6, 3], dtype=torch.uint64)).tensors.row(0, named=True)
    assert (row["changed"], row["max_abs_delta"], row["sign_flips"]) == (1, 1.0, 0)
    assert row["l2_base"] == pytest.approx(math.hypot(2.0**63 + 5, 3), rel=1e-15)


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_sparse_and_dense_updates_with_specials(tmp_path: Path, kind: torch.dtype, share: float, device: str) -> None:
    a, b = update(3, (64, 50), share, kind, kind)
    grid = list(itertools.product(SPECIALS, SPECIALS))
    for column, side in enumerate((a, b)):
        side.view(-1)[: len(grid)] = torch.tensor([pair[column] for pair in grid], dtype=torch.float64).to(kind)
    check(tmp_path, a, b, device)


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("share", [0.05, 1.0])
@pytest.mark.parametrize("special", [False, True])
def test_histograms(tmp_path: Path, kind: torch.dtype, share: float, special: bool, device: str) -> None:
    a, b = update(4, (60, 70), share, kind, kind)
    if special:  # zeros and subnormals take the long way round
        pairs = [(x, y) for x in SPECIALS for y in SPECIALS]
        a.view(-1)[: len(pairs)] = torch.tensor([p[0] for p in pairs], dtype=kind)
        b.view(-1)[: len(pairs)] = torch.tensor([p[1] for p in pairs], dtype=kind)
    table = compare(tmp_path, a, b, device).tables["histograms"]
    deltas, ratios = exponents(a, b)
    wanted: Counter[float] = Counter()
    for exponent, count in deltas.items():
        wanted[max(exponent, -127)] += count
    assert _counts(table, "log2_abs_delta", -127) == wanted
    clipped: Counter[float] = Counter()
    for ratio, count in ratios.items():
        clipped[ratio if ratio == math.inf else min(max(ratio, -64), 63)] += count
    assert _counts(table, "log2_rel_delta", -64) == clipped
    ulps: Counter[tuple[float, float]] = Counter()
    for distance in ulp_distance(a, b):
        power = 1 << max(0, (distance - 1).bit_length())
        ulps[(0.0, 0.0) if distance == 0 else (1.0, 1.0) if distance == 1 else (power / 2 + 1, float(power))] += 1
    found = table.filter(pl.col("histogram") == "ulp")
    assert {(row["lower"], row["upper"]): row["count"] for row in found.to_dicts()} == ulps


def _counts(table: pl.DataFrame, histogram: str, lowest: int) -> Counter[float]:
    rows = table.filter(pl.col("histogram") == histogram).to_dicts()
    return Counter({lowest if row["lower"] == -math.inf else row["lower"]: row["count"] for row in rows})


@pytest.mark.parametrize(
    ("tolerance", "nudge"), [(1e-5, 0), (1e-5, 1), (0.1, 0), (0.1, 1), (2.0**-7, 0), (2.0**-7, 1), (0.0, 1)]
)
@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_tolerance_is_strict_and_not_rounded_to_float32(tmp_path: Path, tolerance: float, nudge: int, device: str) -> None:
    near = np.float32(tolerance)
    near = np.nextafter(near, np.float32(1)) if nudge else near
    b = torch.tensor([float(near)], dtype=torch.float32)
    row = compare(tmp_path, torch.zeros(1), b, device, tolerances=[tolerance]).tensors.row(0, named=True)
    assert row[f"above[{tolerance!r}]"] == int(float(near) > tolerance)


def test_one_ulp_in_bf16_can_hide_below_a_tolerance(tmp_path: Path) -> None:
    a = torch.full((4,), 2.0**-11, dtype=torch.bfloat16)
    b = (a.view(torch.int16) + 1).view(torch.bfloat16)
    row = compare(tmp_path, a, b, tolerances=[1e-5]).tensors.row(0, named=True)
    assert (row["changed"], row["above[1e-05]"]) == (4, 0)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,), (1, 1), (3, 4, 5), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_odd_shapes(tmp_path: Path, shape: tuple[int, ...], device: str) -> None:
    a = torch.randn(shape)
    b = a + 1
    row = compare(tmp_path, a, b, device).tensors.row(0, named=True)
    assert row["changed"] == a.numel() == row["numel"]
    assert row["sparsity"] == (0.0 if a.numel() else None)
    if len(shape) >= 2 and a.numel():
        assert (row["rows"], row["cols"]) == (shape[0], a.numel() // shape[0])
        assert (row["rows_touched"], row["cols_touched"]) == (row["rows"], row["cols"])


def test_profiles_of_rows_and_columns(tmp_path: Path) -> None:
    a, b = update(5, (300, 40), 0.02, torch.bfloat16, torch.bfloat16)
    b[7] = a[7] + 1
    table = compare(tmp_path, a, b).tables["rows"]
    mask = (a != b).numpy()
    assert table["changed"][0].to_list() == mask.sum(1).tolist()
    assert table["changed"][1].to_list() == mask.sum(0).tolist()
    assert table["axis"].to_list() == ["rows", "cols"]


@given(
    st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535)), min_size=1, max_size=200),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
@settings(max_examples=60, deadline=None)
def test_any_16_bit_patterns(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]], kind: torch.dtype
) -> None:
    a, b = (torch.tensor([p[side] for p in pairs], dtype=torch.int32).to(torch.int16).view(kind) for side in (0, 1))
    check(tmp_path_factory.mktemp("bits"), a, b)


@given(
    st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1)), min_size=1, max_size=100),
    st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_any_float32_patterns(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]], keep: float) -> None:
    a = torch.tensor([p[0] for p in pairs], dtype=torch.int32)
    b = torch.tensor([p[1] for p in pairs], dtype=torch.int32)
    same = int(keep * len(pairs))
    b[:same] = a[:same]
    check(tmp_path_factory.mktemp("bits"), a.view(torch.float32), b.view(torch.float32))


def test_base_of_zeros_has_no_relative_norm(tmp_path: Path) -> None:
    row = compare(tmp_path, torch.zeros(8, 8), torch.ones(8, 8)).tensors.row(0, named=True)
    assert row["rel_l2"] is None
    assert row["cosine"] is None


def test_norm_of_the_tuned_side_survives_cancellation(tmp_path: Path) -> None:
    a = torch.randn(256, 64)
    b = a.clone()
    a[0] = 1e18  # a tenth of a percent of the elements holds all the energy, and shrinks away
    row = compare(tmp_path, a, b).tensors.row(0, named=True)
    assert row["l2_tuned"] == pytest.approx(float(b.double().norm()), rel=1e-13)


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_products_survive_cancellation(tmp_path: Path, device: str) -> None:
    a = torch.full((100,), 1e-6)
    a[0] = 3e4  # an outlier that holds all the energy, and is pruned
    b = a.clone()
    b[0] = 0
    row = compare(tmp_path, a, b, device).tensors.row(0, named=True)
    dot = float(a.double() @ b.double())
    assert row["dot"] == pytest.approx(dot, rel=1e-12)
    assert row["cosine"] == pytest.approx(dot / float(a.double().norm() * b.double().norm()), rel=1e-12)


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_ratios_beyond_every_bin_are_in_the_outer_ones(tmp_path: Path, device: str) -> None:
    a = torch.tensor([1e-30] * 16 + [1e30] * 4)
    b = torch.tensor([1e30] * 16 + [1e30 * (1 + 2**-23)] * 4)
    table = compare(tmp_path, a, b, device).tables["histograms"].filter(pl.col("histogram") == "log2_rel_delta")
    assert table["count"].sum() == 20
    assert table.filter(pl.col("upper") == math.inf)["count"].to_list() == [16]


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_float64_beyond_its_own_squares(tmp_path: Path, device: str) -> None:
    a = torch.tensor([1e200, 4.0], dtype=torch.float64)
    found = compare(tmp_path, a, -a, device)
    row = found.tensors.row(0, named=True)
    assert (row["l2_base"], row["cosine"], row["changed"]) == (math.inf, None, 2)
    ulps = found.tables["histograms"].filter(pl.col("histogram") == "ulp")
    assert (ulps["upper"].to_list(), ulps["count"].to_list()) == ([2.0**64], [2])


def test_any_true_is_true(tmp_path: Path) -> None:
    for name, byte in (("a", b"\x01"), ("b", b"\x02")):
        header = b'{"w":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}}'
        (tmp_path / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + byte)
    row = paramdiff.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").tensors.row(0, named=True)
    assert (row["changed"], row["changed_bits"]) == (0, 1)
