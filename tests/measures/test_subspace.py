"""Every column of `subspaces.parquet` against numpy and scipy on whole matrices, theorems, and what has no row or value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits

import paramdiff
from paramdiff import columns, engines
from tests import helpers

Matrix = np.ndarray[Any, Any]
Tensors = Mapping[str, torch.Tensor]
Row = dict[str, Any]

DATA = Path(__file__).parent.parent.parent / "sample_data"
U = 2.0**-53
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
F8 = torch.float8_e4m3fn
MEASURED = ["change", "subspace"]
PER_MATRIX = ("nss", "largest_sigma_shift", "sigma_shift_share", "changed_bf16", "low_overlap", "alpha", "chance")
OF_ANGLES = tuple(
    f"{name}_{side}{of}" for side in "uv" for name, of in (("angle", "_max"), ("angle", "_mean"), ("overlap", ""))
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small problems gain nothing from BLAS's threads, which wait for each other on a busy machine."""
    with threadpool_limits(1, user_api="blas"):
        yield


def compare(tmp: Path, a: Tensors, b: Tensors, **options: Any) -> paramdiff.Diff:
    for name, tensors in (("a", a), ("b", b)):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp / f"{name}.safetensors")
    return paramdiff.compare(tmp / "a.safetensors", tmp / "b.safetensors", measures=MEASURED, **{"device": "cpu"} | options)


def one(tmp: Path, a: torch.Tensor, b: torch.Tensor, k: int, **options: Any) -> Row:
    """The row of one matrix at one k."""
    return compare(tmp, {"w": a}, {"w": b}, ks=[k], **options).subspaces.row(0, named=True)


def in_a_span(rng: np.random.Generator, length: int, k: int) -> Matrix:
    return np.linalg.qr(rng.standard_normal((length, k)))[0]


def pair(seed: int, shape: tuple[int, int], kind: torch.dtype, *, k: int = 4, share: float = 0.2) -> list[torch.Tensor]:
    """A matrix with k directions that stand out, and one in which the size and sign of a `share` of elements changed."""
    rng = np.random.default_rng(seed)
    rows, cols = shape
    a = rng.standard_normal(shape) * 0.02
    k = min(k, rows, cols)
    strong = 0.02 * (math.sqrt(rows) + math.sqrt(cols)) * np.linspace(2.0 + k, 3.0, k)
    a += in_a_span(rng, rows, k) * strong @ in_a_span(rng, cols, k).T
    b = a + 0.03 * rng.standard_normal(shape) * (rng.random(shape) < share)
    return [torch.from_numpy(side).to(kind) for side in (a, b)]


# The reference


def share_of_mask(magnitudes: Matrix, changed: Matrix, alpha: float, *, largest: bool, blur: float) -> tuple[float, float]:
    """|M ∩ mask|/|M| by full sorting, ties in proportion, and by how much that is uncertain where magnitudes within `blur`
    of the threshold cannot be told from it."""
    values, moved = magnitudes.ravel(), changed.ravel()
    if largest:
        values = -values
    wanted = alpha * values.size
    threshold = np.sort(values)[min(math.ceil(wanted - 1e-9), values.size) - 1]
    inside, tied = values < threshold, values == threshold
    count = moved[inside].sum() + (wanted - inside.sum()) / tied.sum() * moved[tied].sum()
    near = moved[np.abs(values - threshold) <= blur].sum() if blur else 0
    return float(count / moved.sum()), float(near / moved.sum())


def reference(a: torch.Tensor, b: torch.Tensor, ks: list[int], alpha: float) -> tuple[list[Row], dict[str, Any]]:
    """Rows for two matrices by definition, each number beside the error that it may have, and the spectra."""
    w0, w1 = a.to(F64).numpy(), b.to(F64).numpy()
    rounded = [t.to(F32).to(BF16).to(F32).numpy() for t in (a, b)]
    changed = rounded[0] != rounded[1]
    exponent = int(np.frexp(np.abs(w0).max())[1])
    w0, w1 = (np.ldexp(w, -exponent) for w in (w0, w1))
    delta = w1 - w0
    (u0, s0, v0), (u1, s1, v1) = (np.linalg.svd(w, full_matrices=False) for w in (w0, w1))
    rows, cols = w0.shape
    common: Row = {
        "rows": (rows, 0),
        "cols": (cols, 0),
        "nss": (np.linalg.norm(s1 - s0) / np.linalg.norm(s0), 1e-9),
        "largest_sigma_shift": (np.ldexp(np.abs(s1 - s0).max(), exponent), np.ldexp(1e-9 * s0[0], exponent)),
        "changed_bf16": (int(changed.sum()), 0),
        "alpha": (alpha, 0),
        "chance": (alpha, 0),
    }
    if delta.any():
        common["sigma_shift_share"] = (np.linalg.norm(s1 - s0) / np.linalg.norm(delta), 1e-8)
    if changed.any():
        common["low_overlap"] = (share_of_mask(np.abs(w0), changed, alpha, largest=False, blur=0.0)[0], 1e-9)
    found = []
    for k in ks:
        row = common | {"k": (k, 0), "chance_u": (k / rows, 1e-15), "chance_v": (k / cols, 1e-15)}
        behind = s0[k] if k < len(s0) else 0.0
        row["gap"] = ((s0[k - 1] - behind) / s0[0], 1e-9)
        gaps = [s[k - 1] ** 2 - (s[k] if k < len(s) else 0.0) ** 2 for s in (s0, s1)]
        turn = 1e-13 + 8 * (rows + cols) * U * sum(float((s**2).sum()) / g for s, g in zip((s0, s1), gaps, strict=True))
        for side, x, y in (("u", u0[:, :k], u1[:, :k]), ("v", v0[:k].T, v1[:k].T)):
            angles = scipy.linalg.subspace_angles(x, y)[::-1]
            error = turn + (1e-7 if angles[-1] >= math.pi / 4 - 1e-6 else 0.0)  # see test_subspaces.py
            row[f"angle_{side}_max"] = (np.degrees(angles.max()), np.degrees(error))
            row[f"angle_{side}_mean"] = (np.degrees(angles.mean()), np.degrees(error))
            row[f"overlap_{side}"] = (np.square(np.linalg.norm(x.T @ y)) / k, 1e-13 + 2 * error)  # Σcos² = ‖XᵀY‖_F²
            row[f"angles_{side}"] = (np.degrees(angles), np.degrees(error))
        if changed.any():
            part = np.abs(u0[:, :k] * s0[:k] @ v0[:k])
            high = share_of_mask(part, changed, alpha, largest=True, blur=(1e-7 + turn) * part.max())
            row["principal_overlap"] = (high[0], 1e-9 + high[1])
        found.append(row)
    return found, {"sigma_base": np.ldexp(s0, exponent), "sigma_tuned": np.ldexp(s1, exponent)}


def check(diff: paramdiff.Diff, matrices: Mapping[tuple[str, int | None], tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Every table that subspaces fill against the reference, for matrices by parameter and expert."""
    ks, alpha = diff.run["options"]["ks"], diff.run["options"]["alpha"]
    found = diff.subspaces
    assert found.columns == list(columns.SUBSPACES)
    assert {n: str(t) for n, t in found.schema.items()} == {n: t for n, (t, _) in columns.SUBSPACES.items()}
    assert found.select("name", "expert", "k").rows() == [(*key, k) for key in matrices for k in ks]
    for (name, expert), (a, b) in matrices.items():
        rows, spectra = reference(a, b, ks, alpha)
        for row, wanted in zip(_of(found, name, expert).to_dicts(), rows, strict=True):
            assert row["note"] is None, (name, row)
            for side in "uv":
                degrees, error = wanted.pop(f"angles_{side}")
                angles = _of(diff.tables["angles"], name, expert).filter(pl.col("side") == side, pl.col("k") == row["k"])
                assert angles["index"].to_list() == list(range(1, row["k"] + 1))
                assert np.abs(angles["degrees"].to_numpy() - degrees).max() <= error, (name, expert, side, row["k"])
                assert angles["degrees"].is_sorted()
                assert row[f"angle_{side}_max"] == angles["degrees"].max()
                assert row[f"angle_{side}_mean"] == pytest.approx(angles["degrees"].mean(), rel=1e-12, abs=1e-300)
            for column, (value, error) in wanted.items():
                assert row[column] is not None, (name, column)
                assert abs(row[column] - value) <= error, (name, expert, column, row[column], value, error)
            given = {"name", "layer", "module", "kind", "expert", "note"}
            assert {c for c, value in row.items() if value is None} - given == set(row) - set(wanted) - given
        table = _of(diff.tables["weight_spectra"], name, expert)
        assert table["index"].to_list() == list(range(1, min(a.shape) + 1))
        for column, sigma in spectra.items():
            assert np.abs(table[column].to_numpy() - sigma).max() <= 1e-7 * sigma[0], column
    assert diff.tables["angles"].height == sum(2 * k for k in ks) * len(matrices)
    assert diff.tables["weight_spectra"].height == sum(min(a.shape) for a, _ in matrices.values())


def _of(table: pl.DataFrame, name: str, expert: int | None) -> pl.DataFrame:
    same = pl.col("expert").is_null() if expert is None else pl.col("expert") == expert
    return table.filter(pl.col("name") == name, same)


# Every column


@pytest.mark.parametrize("kind", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (48, 48), (300, 500), (700, 257), (9, 2000), (2000, 9)], ids=str)
def test_every_column_of_a_matrix(tmp_path: Path, shape: tuple[int, int], kind: torch.dtype) -> None:
    a, b = pair(sum(shape), shape, kind)
    check(compare(tmp_path, {"w": a}, {"w": b}, ks=[4, 1], alpha=0.3), {("w", None): (a, b)})


@pytest.mark.parametrize("exponent", [664, -664], ids=str)
@pytest.mark.parametrize("shape", [(40, 70), (300, 500), (700, 257)], ids=str)
def test_float64_beyond_the_range_of_its_squares(tmp_path: Path, shape: tuple[int, int], exponent: int) -> None:
    a, b = (side * 2.0**exponent for side in pair(5, shape, F64))
    assert abs(math.log10(float(a.abs().max()))) > 190
    diff = compare(tmp_path, {"w": a}, {"w": b}, ks=[1, 4])
    check(diff, {("w", None): (a, b)})
    # in bf16 all of them are infinite, and differ where the sign does, or zero
    assert set(diff.subspaces["changed_bf16"]) == {int((a.sign() != b.sign()).sum()) if exponent > 0 else 0}
    assert diff.subspaces["low_overlap"].null_count() == (0 if exponent > 0 else 2)


@pytest.mark.parametrize("alpha", [0.01, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", [BF16, F32], ids=str)
def test_masks_of_any_share(tmp_path: Path, alpha: float, kind: torch.dtype) -> None:
    a, b = pair(6, (53, 71), kind, share=0.4)
    check(compare(tmp_path, {"w": a}, {"w": b}, ks=[2, 4], alpha=alpha), {("w", None): (a, b)})


@pytest.mark.parametrize("kinds", [(BF16, F32), (F32, BF16), (F16, BF16), (F32, F64), (F64, BF16), (F8, BF16)], ids=str)
def test_sides_of_two_types(tmp_path: Path, kinds: tuple[torch.dtype, torch.dtype]) -> None:
    a, b = (side.to(kind) for side, kind in zip(pair(7, (60, 50), F64), kinds, strict=True))
    check(compare(tmp_path, {"w": a}, {"w": b}, ks=[1, 3]), {("w", None): (a, b)})


def test_experts_of_a_stack_have_a_row_each(tmp_path: Path) -> None:
    name = "model.layers.3.mlp.experts.down_proj"
    sides = [torch.stack(side) for side in zip(*(pair(e, (301, 203), BF16) for e in range(5)), strict=True)]
    diff = compare(tmp_path, {name: sides[0]}, {name: sides[1]}, ks=[1, 4], alpha=0.3)  # blocks begin and end amid experts
    check(diff, {(name, e): (sides[0][e], sides[1][e]) for e in range(5)})
    places = diff.subspaces.select("layer", "module", "kind").unique().rows()
    assert places == [(3, "experts.down_proj", "mlp")]


def test_experts_in_tensors_of_their_own_keep_their_number(tmp_path: Path) -> None:
    names = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (0, 7, 12)]
    pairs = {name: pair(i, (30, 20), BF16) for i, name in enumerate(names)}
    diff = compare(tmp_path, *({n: p[i] for n, p in pairs.items()} for i in range(2)), ks=[2])
    numbers = dict(zip(names, (0, 7, 12), strict=True))
    rows = diff.subspaces.to_dicts()
    assert {row["name"]: row["expert"] for row in rows} == numbers
    assert {(row["layer"], row["module"], row["kind"]) for row in rows} == {(1, "experts.up_proj", "mlp")}
    check(diff, {(row["name"], row["expert"]): tuple(pairs[row["name"]]) for row in rows})


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (24, 5, 7), (6, 2, 3, 2, 2)], ids=str)
def test_a_convolution_is_a_matrix_of_output_channels_by_the_rest(tmp_path: Path, shape: tuple[int, ...]) -> None:
    a, b = pair(8, (shape[0], math.prod(shape[1:])), F32, k=2)
    diff = compare(tmp_path, {"w": a.reshape(shape)}, {"w": b.reshape(shape)}, ks=[2])
    check(diff, {("w", None): (a, b)})


def test_matrices_larger_than_a_block(tmp_path: Path) -> None:
    pairs = {"tall": pair(9, (9000, 40), F32), "wide": pair(10, (2, 300_000), BF16, k=1)}
    diff = compare(tmp_path, *({n: p[i] for n, p in pairs.items()} for i in range(2)), ks=[1], alpha=0.4)
    check(diff, {(row["name"], None): tuple(pairs[row["name"]]) for row in diff.subspaces.to_dicts()})


def test_a_model_of_many_matrices(tmp_path: Path) -> None:
    shapes = {
        "embed_tokens": (90, 30),
        "layers.0.q_proj": (30, 30),
        "layers.1.q_proj": (30, 20),
        "layers.1.o_proj": (20, 30),
    }
    pairs = {f"model.{n}.weight": pair(i, s, BF16) for i, (n, s) in enumerate(shapes.items())}
    diff = compare(tmp_path, *({n: p[i] for n, p in pairs.items()} for i in range(2)), ks=[1, 2, 4], alpha=0.2)
    order = diff.subspaces["name"].unique(maintain_order=True)
    check(diff, {(name, None): tuple(pairs[name]) for name in order})


def test_dimensions_are_sorted_and_each_taken_once(tmp_path: Path) -> None:
    a, b = pair(11, (20, 30), F32)
    diff = compare(tmp_path, {"w": a}, {"w": b}, ks=[4, 1, 4, 2])
    assert diff.subspaces["k"].to_list() == diff.run["options"]["ks"] == [1, 2, 4]


@given(
    seed=st.integers(0, 2**20),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    kind=st.sampled_from([BF16, F16, F32]),
    alpha=st.sampled_from([0.1, 1 / 3, 0.5, 0.75]),
    share=st.sampled_from([0.05, 0.5, 1.0]),
)
@settings(max_examples=40)
def test_small_matrices_of_any_shape(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    shape: tuple[int, int],
    kind: torch.dtype,
    alpha: float,
    share: float,
) -> None:
    a, b = pair(seed, shape, kind, k=2, share=share)
    if torch.equal(a, b):
        b = b * 2
    k = min(2, *shape)
    diff = compare(tmp_path_factory.mktemp("any"), {"w": a}, {"w": b}, ks=[1, k] if k > 1 else [1], alpha=alpha)
    check(diff, {("w", None): (a, b)})


# Theorems


@pytest.mark.parametrize("kind", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(40, 70), (300, 400), (500, 260)], ids=str)
@pytest.mark.parametrize("share", [0.001, 1.0])
def test_weyl_and_mirsky_bound_the_shift_of_the_spectrum(
    tmp_path: Path, shape: tuple[int, int], kind: torch.dtype, share: float
) -> None:
    a, b = pair(12, shape, kind, share=share)
    row = one(tmp_path, a, b, 2)
    assert row["largest_sigma_shift"] <= np.linalg.norm((b.to(F64) - a.to(F64)).numpy(), 2) * (1 + 1e-6)
    assert 0 < row["sigma_shift_share"] <= 1 + 1e-6
    assert row["nss"] * np.linalg.norm(a.to(F64)) <= np.linalg.norm(b.to(F64) - a.to(F64)) * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(30, 50), (300, 400)], ids=str)
def test_an_update_along_a_singular_direction_reaches_both_bounds(tmp_path: Path, shape: tuple[int, int]) -> None:
    a = pair(13, shape, F64)[0]
    u, _, vt = np.linalg.svd(a.numpy(), full_matrices=False)
    b = a + torch.from_numpy(0.5 * np.outer(u[:, 0], vt[0]))
    row = one(tmp_path, a, b, 1)
    assert row["largest_sigma_shift"] == pytest.approx(0.5, rel=1e-9)
    assert row["sigma_shift_share"] == pytest.approx(1.0, rel=1e-7)
    assert row["angle_u_max"] + row["angle_v_max"] < 1e-9


@pytest.mark.parametrize("shape", [(30, 50), (300, 400), (400, 300)], ids=str)
def test_a_rotation_turns_its_side_alone_and_leaves_the_spectrum(tmp_path: Path, shape: tuple[int, int]) -> None:
    rng, sigma = np.random.default_rng(14), np.linspace(5.0, 1.0, min(shape))
    u, v = in_a_span(rng, shape[0], len(sigma)), in_a_span(rng, shape[1], len(sigma))
    turned = u.copy()  # the leading direction turned by 30 degrees towards the fourth, within the fourth's plane
    turned[:, 0] = math.cos(math.pi / 6) * u[:, 0] + math.sin(math.pi / 6) * u[:, 3]
    turned[:, 3] = -math.sin(math.pi / 6) * u[:, 0] + math.cos(math.pi / 6) * u[:, 3]
    a, b = (torch.from_numpy(left * sigma @ v.T) for left in (u, turned))
    diff = compare(tmp_path, {"w": a}, {"w": b}, ks=[1, 2, 4])
    rows = diff.subspaces.to_dicts()
    assert [row["angle_u_max"] for row in rows] == pytest.approx([30.0, 30.0, 0.0], abs=1e-8)
    assert [row["angle_u_mean"] for row in rows] == pytest.approx([30.0, 15.0, 0.0], abs=1e-8)
    assert [row["overlap_u"] for row in rows] == pytest.approx([0.75, 0.875, 1.0], abs=1e-10)
    assert [row["angle_v_max"] for row in rows] == pytest.approx([0.0] * 3, abs=1e-8)
    assert all(row["nss"] < 1e-9 and row["largest_sigma_shift"] < 1e-9 for row in rows)


@pytest.mark.parametrize("shape", [(30, 50), (400, 300)], ids=str)
@pytest.mark.parametrize("angle", [1e-10, 1e-7, 1e-4])
def test_tiny_rotations_are_told_from_none(tmp_path: Path, shape: tuple[int, int], angle: float) -> None:
    rng, sigma = np.random.default_rng(15), np.linspace(4.0, 1.0, 5)
    u, v = in_a_span(rng, shape[0], 6), in_a_span(rng, shape[1], 5)
    turned = u[:, :5].copy()
    turned[:, 0] = math.cos(angle) * u[:, 0] + math.sin(angle) * u[:, 5]
    a, b = (torch.from_numpy(left * sigma @ v.T) for left in (u[:, :5], turned))
    row = one(tmp_path, a, b, 5)
    assert math.radians(row["angle_u_max"]) == pytest.approx(angle, rel=1e-3)
    assert math.radians(row["angle_v_max"]) < 1e-12


@pytest.mark.parametrize("kind", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(40, 70), (300, 400)], ids=str)
def test_the_overlap_is_the_mean_of_the_squared_cosines(tmp_path: Path, shape: tuple[int, int], kind: torch.dtype) -> None:
    diff = compare(tmp_path, *({"w": side} for side in pair(16, shape, kind)), ks=[1, 3, 4])
    for row in diff.subspaces.to_dicts():
        for side in "uv":
            angles = diff.tables["angles"].filter(pl.col("side") == side, pl.col("k") == row["k"])["degrees"].to_numpy()
            assert row[f"overlap_{side}"] == pytest.approx(np.mean(np.cos(np.radians(angles)) ** 2), rel=1e-13)


@pytest.mark.parametrize("shape", [(40, 70), (300, 400), (500, 260)], ids=str)
def test_an_unchanged_matrix_has_not_turned_and_no_overlap_with_masks(tmp_path: Path, shape: tuple[int, int]) -> None:
    a = pair(17, shape, BF16)[0]
    row = one(tmp_path, a, a, 4)
    assert [row[c] for c in ("angle_u_max", "angle_u_mean", "angle_v_max", "angle_v_mean")] == pytest.approx(
        [0] * 4, abs=1e-12
    )
    assert (row["overlap_u"], row["overlap_v"]) == pytest.approx((1.0, 1.0), abs=1e-14)
    assert (row["nss"], row["largest_sigma_shift"], row["changed_bf16"], row["note"]) == (0.0, 0.0, 0, None)
    assert row["sigma_shift_share"] is row["principal_overlap"] is row["low_overlap"] is None


@pytest.mark.parametrize("factor", [1.5, 0.75, 2.0, 0.5, -1.0, -3.0, 1 + 2.0**-10])
@pytest.mark.parametrize("shape", [(40, 70), (300, 400)], ids=str)
def test_scaling_drifts_and_does_not_turn(tmp_path: Path, shape: tuple[int, int], factor: float) -> None:
    a = pair(18, shape, BF16)[0].to(F32)  # 8 bits of 24, so that the product is exact
    row = one(tmp_path, a, a * factor, 4)
    assert row["angle_u_max"] + row["angle_v_max"] < 1e-9
    assert row["nss"] == pytest.approx(abs(abs(factor) - 1), abs=1e-12)
    if factor > 0:
        assert row["sigma_shift_share"] == pytest.approx(1.0, rel=1e-9)
    if abs(abs(factor) - 1) > 2.0**-8:
        assert row["changed_bf16"] == int((a != 0).sum())
        assert row["low_overlap"] == pytest.approx(0.5, abs=1e-9)
        assert row["principal_overlap"] == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("exponent", [-40, -1, 10, 80])
@pytest.mark.parametrize("kind", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(40, 70), (300, 400)], ids=str)
def test_a_power_of_two_on_both_sides_changes_nothing(
    tmp_path: Path, shape: tuple[int, int], kind: torch.dtype, exponent: int
) -> None:
    a, b = pair(19, shape, kind)
    plain, scaled = (one(tmp_path, a * s, b * s, 4, alpha=0.3) for s in (1.0, 2.0**exponent))
    shift = plain.pop("largest_sigma_shift"), scaled.pop("largest_sigma_shift")
    assert shift[1] == pytest.approx(math.ldexp(shift[0], exponent), rel=1e-12)
    _same(plain, scaled, rel=1e-12, abs_=1e-12)


@pytest.mark.parametrize("kind", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(40, 70), (300, 400), (500, 260), (48, 48)], ids=str)
def test_transposing_swaps_the_sides(tmp_path: Path, shape: tuple[int, int], kind: torch.dtype) -> None:
    a, b = pair(20, shape, kind)
    plain, swapped = (one(tmp_path, *sides, 4, alpha=0.3) for sides in ((a, b), (a.T, b.T)))
    assert (plain["rows"], plain["cols"]) == (swapped["cols"], swapped["rows"])
    for column in plain:
        other = column.replace("_u", "_v") if "_u" in column else column.replace("_v", "_u")
        if column == "principal_overlap":  # elements at the threshold may change places
            assert plain[column] == pytest.approx(swapped[other], abs=3 / plain["changed_bf16"])
        elif column not in ("rows", "cols"):
            _same({column: plain[column]}, {column: swapped[other]}, rel=1e-9, abs_=1e-10)


def _same(one: Row, other: Row, *, rel: float, abs_: float) -> None:
    assert one.keys() == other.keys()
    for column, value in one.items():
        if isinstance(value, float):
            assert other[column] == pytest.approx(value, rel=rel, abs=abs_), column
        else:
            assert other[column] == value, column


# Masks


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_a_random_change_overlaps_by_chance(tmp_path: Path, alpha: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(200, 300, generator=rng)
    changed = torch.rand(200, 300, generator=rng) < 0.05
    row = one(tmp_path, a, torch.where(changed, 1.5 * a, a), 8, alpha=alpha)
    assert row["changed_bf16"] == int(changed.sum())
    deviation = math.sqrt(alpha * (1 - alpha) / row["changed_bf16"])
    assert row["low_overlap"] == pytest.approx(alpha, abs=5 * deviation)
    assert row["principal_overlap"] == pytest.approx(alpha, abs=5 * deviation)
    assert row["chance"] == alpha


@pytest.mark.parametrize("shape", [(40, 70), (300, 400)], ids=str)
def test_a_change_of_the_smallest_half_is_all_in_the_mask_and_of_the_largest_none(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    values = torch.arange(1, math.prod(shape) + 1)[
        torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(1))
    ]
    a = values.reshape(shape).to(F32) * torch.where(
        torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5, 1, -1
    )
    small = a.abs() <= math.prod(shape) // 2
    assert int(small.sum()) * 2 == a.numel()
    assert one(tmp_path, a, torch.where(small, -a, a), 2)["low_overlap"] == 1.0
    assert one(tmp_path, a, torch.where(small, a, -a), 2)["low_overlap"] == 0.0
    assert one(tmp_path, a, -a, 2)["low_overlap"] == 0.5
    tenth = a.abs() <= math.prod(shape) // 10
    assert one(tmp_path, a, torch.where(tenth, -a, a), 2, alpha=0.1)["low_overlap"] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("shape", [(40, 70), (300, 400)], ids=str)
def test_a_change_of_the_largest_of_the_rank_k_part_is_all_in_the_principal_mask(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    a = pair(21, shape, F32, k=3)[0]
    u, sigma, vt = np.linalg.svd(a.to(F64).numpy(), full_matrices=False)
    part = np.abs(u[:, :3] * sigma[:3] @ vt[:3])
    top = torch.from_numpy(part > np.quantile(part, 0.8))
    assert one(tmp_path, a, torch.where(top, 1.25 * a, a), 3, alpha=0.25)["principal_overlap"] == 1.0
    assert one(tmp_path, a, torch.where(top, a, 1.25 * a), 3, alpha=0.15)["principal_overlap"] == 0.0


def test_magnitudes_of_float64_that_float32_cannot_tell_apart_have_their_order(tmp_path: Path) -> None:
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(3)).reshape(40, 30)
    a = 1 + order.to(F64) * 1e-12
    assert one(tmp_path, a, torch.where(order < 600, -a, a), 1)["low_overlap"] == pytest.approx(1.0, abs=1e-9)


def test_a_large_tuned_side_does_not_blur_the_magnitudes_of_the_base(tmp_path: Path) -> None:
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(4)).reshape(40, 30)
    a = (1 + order.to(F64)) * 1e-60
    assert one(tmp_path, a, torch.where(order < 600, -1.0, a), 1)["low_overlap"] == pytest.approx(1.0, abs=1e-9)


def test_a_difference_beyond_float32_does_not_make_the_shift_vanish(tmp_path: Path) -> None:
    row = one(tmp_path, torch.full((4, 4), 3e38), torch.full((4, 4), -2e38), 1)
    assert row["nss"] == pytest.approx(1 / 3, rel=1e-6)
    assert row["sigma_shift_share"] in (None, pytest.approx(0.2, rel=1e-6))


def test_rank_one_parts_have_their_mask_where_row_and_column_are_strong(tmp_path: Path) -> None:
    left, right = torch.arange(1, 9).to(F32), torch.arange(1, 11).to(F32)
    a = torch.outer(left, right)
    b = a.clone()
    b[7, 9] *= 2  # the largest of 80
    row = one(tmp_path, a, b, 1, alpha=1 / 80)
    assert (row["changed_bf16"], row["principal_overlap"]) == (1, pytest.approx(1.0, abs=1e-9))
    b = a.clone()
    b[0, 0] *= 2
    row = one(tmp_path, a, b, 1, alpha=1 / 80)
    assert (row["principal_overlap"], row["low_overlap"]) == pytest.approx((0.0, 1.0), abs=1e-9)


def test_only_what_bf16_shows_counts_as_changed(tmp_path: Path) -> None:
    a = torch.ones(10, 10) + torch.eye(10)
    row = one(tmp_path, a, a * (1 + 2.0**-12), 1)
    assert (row["changed_bf16"], row["low_overlap"], row["principal_overlap"]) == (0, None, None)
    assert row["nss"] == pytest.approx(2.0**-12, rel=1e-9)
    assert row["sigma_shift_share"] == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("kind", [BF16, F16, F32, F64], ids=str)
def test_as_many_elements_changed_as_the_table_of_tensors_says(tmp_path: Path, kind: torch.dtype) -> None:
    diff = compare(tmp_path, *({"w": side} for side in pair(22, (1500, 30), kind)), ks=[2])
    assert diff.subspaces["changed_bf16"].to_list() == diff.tensors["changed_bf16"].to_list()


def test_integers_are_no_weights(tmp_path: Path) -> None:
    a = torch.randint(-30_000, 30_000, (40, 30), dtype=torch.int32, generator=torch.Generator().manual_seed(5))
    diff = compare(tmp_path, {"w": a}, {"w": a + 1}, ks=[2])
    assert diff.subspaces["note"].to_list() == ["whole numbers, not weights"]
    assert diff.subspaces["k"].to_list() == [None]


# What has no value, and what has no row


def test_more_directions_than_there_are_get_a_note(tmp_path: Path) -> None:
    a, b = pair(23, (6, 40), F32)
    diff = compare(tmp_path, {"w": a}, {"w": b}, ks=[2, 6, 7, 64])
    rows = diff.subspaces.to_dicts()
    assert [row["k"] for row in rows] == [2, 6, 7, 64]
    assert [row["note"] for row in rows] == [
        None,
        None,
        *(f"has fewer than {k} singular values above zero" for k in (7, 64)),
    ]
    for row in rows[2:]:
        assert all(row[c] is None for c in (*OF_ANGLES, "chance_u", "chance_v", "gap", "principal_overlap"))
        assert {c: row[c] for c in PER_MATRIX} == {c: rows[0][c] for c in PER_MATRIX}
    assert set(diff.tables["angles"]["k"]) == {2, 6}
    assert diff.tables["weight_spectra"].height == 6


@pytest.mark.parametrize("shape", [(30, 50), (300, 400), (400, 300)], ids=str)
@pytest.mark.parametrize("side", [0, 1])
def test_more_directions_than_the_rank_of_either_side_get_a_note(tmp_path: Path, shape: tuple[int, int], side: int) -> None:
    rng = np.random.default_rng(24)
    full = rng.standard_normal(shape)
    low = in_a_span(rng, shape[0], 5) * np.arange(5, 0, -1) @ in_a_span(rng, shape[1], 5).T
    sides = [torch.from_numpy(w) for w in ((low, full) if side == 0 else (full, low))]
    diff = compare(tmp_path, {"w": sides[0]}, {"w": sides[1]}, ks=[5, 6])
    assert diff.subspaces["note"].to_list() == [None, "has fewer than 6 singular values above zero"]
    last = diff.subspaces.row(1, named=True)
    assert all(last[c] is None for c in (*OF_ANGLES, "gap", "principal_overlap"))
    assert last["low_overlap"] is not None


@pytest.mark.parametrize("shape", [(3, 4), (300, 400)], ids=str)
@pytest.mark.parametrize("zeros", ["base", "tuned", "both"])
def test_a_side_of_zeros_has_a_note_and_what_is_defined(tmp_path: Path, shape: tuple[int, int], zeros: str) -> None:
    full, none = torch.ones(shape) + torch.eye(*shape), torch.zeros(shape)
    row = one(tmp_path, none if zeros != "tuned" else full, none if zeros != "base" else full, 1)
    assert row["note"] == "has fewer than 1 singular values above zero"
    assert row["nss"] == (1.0 if zeros == "tuned" else None)
    assert row["changed_bf16"] == (0 if zeros == "both" else full.numel())
    if zeros == "both":
        assert row["sigma_shift_share"] is row["low_overlap"] is None
    else:
        assert row["sigma_shift_share"] == pytest.approx(1.0, rel=1e-9)
        assert row["low_overlap"] == pytest.approx(0.5, abs=1e-9)
        assert row["largest_sigma_shift"] == pytest.approx(np.linalg.norm(full.to(F64), 2), rel=1e-12)


@pytest.mark.parametrize("kind", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_infinity_leave_a_note_and_spare_other_matrices(
    tmp_path: Path, kind: torch.dtype, value: float, side: int
) -> None:
    sides = [torch.stack(s) for s in zip(*(pair(e, (12, 9), kind) for e in range(3)), strict=True)]
    sides[side][1, 5, 5] = value
    diff = compare(tmp_path, *({"layers.0.experts.up": s} for s in sides), ks=[1, 2])
    rows = diff.subspaces.to_dicts()
    notes = [None, None, "holds NaN or infinite elements", "holds NaN or infinite elements", None, None]
    assert [row["note"] for row in rows] == notes
    for row in rows[2:4]:
        given = {"name", "layer", "module", "kind", "expert", "rows", "cols", "k", "alpha", "chance", "note"}
        assert {c for c, v in row.items() if v is not None} == given
    assert set(diff.tables["angles"]["expert"]) == set(diff.tables["weight_spectra"]["expert"]) == {0, 2}
    for expert in (0, 2):
        wanted, _ = reference(sides[0][expert], sides[1][expert], [1, 2], 0.5)
        for row, by_hand in zip(_of(diff.subspaces, "layers.0.experts.up", expert).to_dicts(), wanted, strict=True):
            assert row["nss"] == pytest.approx(by_hand["nss"][0], rel=1e-9)
            assert row["angle_u_max"] == pytest.approx(by_hand["angle_u_max"][0], abs=1e-9)


def test_a_tied_head_is_named_and_not_computed_again(tmp_path: Path) -> None:
    a, b = pair(25, (40, 12), BF16)
    for name, side in (("base", a), ("tuned", b)):
        tensors = {"model.embed_tokens.weight": side, "lm_head.weight": side}
        helpers.model_dir(tmp_path / name, tensors, {"tie_word_embeddings": True})
    diff = paramdiff.compare(tmp_path / "base", tmp_path / "tuned", measures=MEASURED, ks=[2])
    rows = {row["name"]: row for row in diff.subspaces.to_dicts()}
    assert rows["model.embed_tokens.weight"]["note"] is None
    assert rows["lm_head.weight"]["note"] == "tied to model.embed_tokens.weight; see there"
    assert all(rows["lm_head.weight"][c] is None for c in (*OF_ANGLES, "nss", "changed_bf16", "low_overlap"))
    assert set(diff.tables["angles"]["name"]) == set(diff.tables["weight_spectra"]["name"]) == {"model.embed_tokens.weight"}


def test_vectors_and_scalars_have_no_row(tmp_path: Path) -> None:
    tensors = {"norm.weight": torch.ones(5), "scale": torch.tensor(2.0)}
    diff = compare(tmp_path, tensors, {n: 2 * t for n, t in tensors.items()})
    assert diff.subspaces.height == diff.tables["angles"].height == diff.tables["weight_spectra"].height == 0
    for table in ("subspaces", "angles", "weight_spectra"):
        found = {name: str(kind) for name, kind in diff.tables[table].schema.items()}
        assert found == {name: kind for name, (kind, _) in columns.TABLES[table].items()}
    assert diff.subspaces_by("kind").height == 0


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (4, 0, 3)], ids=str)
def test_a_matrix_without_elements_has_a_note(tmp_path: Path, shape: tuple[int, ...]) -> None:
    a, b = pair(26, (8, 6), F32)
    diff = compare(tmp_path, {"empty": torch.zeros(shape), "w": a}, {"empty": torch.zeros(shape), "w": b}, ks=[1])
    notes = dict(diff.subspaces.select("name", "note").rows())
    assert notes == {"empty": "no elements", "w": None}
    assert set(diff.tables["angles"]["name"]) == set(diff.tables["weight_spectra"]["name"]) == {"w"}


def test_every_expert_of_a_stack_without_elements_has_a_row(tmp_path: Path) -> None:
    empty = {"layers.0.experts.up_proj": torch.zeros(3, 0, 4)}
    found = compare(tmp_path, empty, empty, ks=[1]).subspaces
    assert found.select("expert", "note").rows() == [(expert, "no elements") for expert in range(3)]


def test_every_expert_of_a_stack_too_large_for_memory_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramdiff.measures.matrices.memory", lambda: 1000)
    sides = [torch.stack(s) for s in zip(*(pair(e, (12, 9), BF16) for e in range(3)), strict=True)]
    found = compare(tmp_path, *({"layers.0.experts.up_proj": s} for s in sides), ks=[1]).subspaces
    assert found["expert"].to_list() == [0, 1, 2]
    assert all("GB of memory" in note for note in found["note"])


@pytest.mark.parametrize("alpha", [0, 1, -1, 1.5, math.nan, math.inf, -math.inf])
def test_a_share_that_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(paramdiff.OptionError, match="is no share of the elements"):
        paramdiff.compare(DATA / "base", DATA / "rl-sgd", measures=MEASURED, alpha=alpha)


@pytest.mark.parametrize("ks", [[], [0], [-3], [4, 0], [1, -1]], ids=str)
def test_dimensions_below_one_or_none_are_refused(ks: list[int]) -> None:
    with pytest.raises(paramdiff.OptionError, match="number of directions"):
        paramdiff.compare(DATA / "base", DATA / "rl-sgd", measures=MEASURED, ks=ks)


def test_subspaces_that_were_not_measured_are_refused_with_a_hint() -> None:
    diff = paramdiff.compare(DATA / "base", DATA / "rl-sgd", measures=["change"])
    with pytest.raises(paramdiff.OptionError, match="has no subspaces"):
        diff.subspaces_by("kind")


# Roll-ups


def test_roll_ups_are_those_computed_by_hand(tmp_path: Path) -> None:
    kinds = {"q_proj": [(30, 40), (40, 30), (20, 20)], "up_proj": [(25, 60), (50, 16)], "o_proj": [(3, 40)]}
    pairs: dict[str, list[torch.Tensor]] = {}
    for module, shapes in kinds.items():
        for layer, shape in enumerate(shapes):
            pairs[f"model.layers.{layer}.{module}.weight"] = pair(layer, shape, BF16, share=0.1 * (1 + layer))
    pairs["model.layers.0.q_proj.weight"][1] = pairs["model.layers.0.q_proj.weight"][0]  # nothing changed
    pairs["model.layers.1.up_proj.weight"][1][0, 0] = math.nan
    diff = compare(tmp_path, *({n: p[i] for n, p in pairs.items()} for i in range(2)), ks=[2, 4], alpha=0.3)
    rolled = {(row["module"], row["k"]): row for row in diff.subspaces_by("module").to_dicts()}
    assert set(rolled) == {(module, k) for module in kinds for k in (2, 4)}
    for (module, k), row in rolled.items():
        names = [name for name in pairs if f".{module}." in name]
        known = {n: reference(*pairs[n], [k], 0.3)[0][0] for n in names if _compared(pairs[n], k)}
        assert (row["matrices"], row["left_out"], row["chance"]) == (len(names), len(names) - len(known), 0.3)
        moved = sum(found["changed_bf16"][0] for found in known.values())
        assert row["changed_bf16"] == moved

        def values(column: str, known: dict[str, Row] = known) -> list[float]:
            return [found[column][0] for found in known.values() if column in found]

        for side in "uv":
            angles = values(f"angle_{side}_max")
            if not angles:
                assert row[f"angle_{side}_max"] is row[f"angle_{side}_max_median"] is row[f"overlap_{side}_mean"] is None
                continue
            assert row[f"angle_{side}_max"] == pytest.approx(max(angles), abs=1e-9)
            assert row[f"angle_{side}_max_median"] == pytest.approx(np.median(angles), abs=1e-9)
            for column in (f"overlap_{side}", f"chance_{side}"):
                assert row[f"{column}_mean"] == pytest.approx(np.mean(values(column)), abs=1e-10)
        if known:
            assert row["nss_mean"] == pytest.approx(np.mean(values("nss")), rel=1e-9)
            assert row["nss_max"] == pytest.approx(max(values("nss")), rel=1e-9)
            assert row["sigma_shift_share_mean"] == pytest.approx(np.mean(values("sigma_shift_share")), rel=1e-7)
        for column in ("principal_overlap", "low_overlap"):
            inside = sum(found[column][0] * found["changed_bf16"][0] for found in known.values() if column in found)
            blur = sum(found[column][1] * found["changed_bf16"][0] for found in known.values() if column in found)
            assert (row[column] is None) == (moved == 0)
            if moved:
                assert row[column] == pytest.approx(inside / moved, abs=1e-9 + blur / moved), (module, column)


def _compared(sides: list[torch.Tensor], k: int) -> bool:
    return k <= min(sides[0].shape) and all(bool(torch.isfinite(side).all()) for side in sides)


def test_all_matrices_pool_into_one_row_for_each_k(tmp_path: Path) -> None:
    pairs = {f"layers.{i}.q_proj.weight": pair(i, (20, 30), BF16) for i in range(3)}
    diff = compare(tmp_path, *({n: p[i] for n, p in pairs.items()} for i in range(2)), ks=[1, 3])
    total = diff.subspaces_by()
    assert total.select("k", "matrices", "left_out").rows() == [(1, 3, 0), (3, 3, 0)]
    assert total["nss_max"].to_list() == diff.subspaces.group_by("k").agg(pl.col("nss").max()).sort("k")["nss"].to_list()
    with pytest.raises(paramdiff.OptionError, match="no column 'modul'"):
        diff.subspaces_by("modul")


# Engines, saving


def many() -> list[dict[str, torch.Tensor]]:
    """Matrices of every kind of shape, with something odd among them."""
    stack = [torch.stack(s) for s in zip(*(pair(e, (150, 90), BF16) for e in range(4)), strict=True)]
    sides: list[dict[str, torch.Tensor]] = [{}, {}]
    for i, side in enumerate(sides):
        side["model.embed_tokens.weight"] = pair(30, (700, 120), BF16)[i]
        side["model.layers.0.mlp.experts.down_proj"] = stack[i]
        side["model.layers.0.q_proj.weight"] = pair(31, (300, 400), F32)[i]
        side["model.layers.1.q_proj.weight"] = pair(32, (90, 80), F64)[i]
        side["model.layers.1.conv.weight"] = pair(33, (20, 36), F16)[i].reshape(20, 4, 3, 3)
        side["model.norm.weight"] = torch.ones(7) + i
        side["model.layers.2.q_proj.weight"] = pair(34, (20, 36), F32)[i]
    sides[1]["model.layers.2.q_proj.weight"][3, 3] = math.nan
    return sides


def equal_tables(one: paramdiff.Diff, other: paramdiff.Diff) -> None:
    for table in ("subspaces", "angles", "weight_spectra"):
        assert one.tables[table].schema == other.tables[table].schema
        for row, wanted in zip(other.tables[table].to_dicts(), one.tables[table].to_dicts(), strict=True):
            _same(wanted, row, rel=1e-9, abs_=1e-9)


def test_threads_and_the_gpu_engine_on_torch_cpu_give_the_same(tmp_path: Path) -> None:
    sides = many()
    plain = compare(tmp_path, *sides, ks=[1, 4], alpha=0.3, threads=1)
    again = compare(tmp_path, *sides, ks=[1, 4], alpha=0.3, threads=1)
    assert all(again.tables[name].equals(table) for name, table in plain.tables.items())
    equal_tables(plain, compare(tmp_path, *sides, ks=[1, 4], alpha=0.3, threads=2))
    equal_tables(plain, compare(tmp_path, *sides, ks=[1, 4], alpha=0.3, device="torch:cpu"))


def test_processes_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = many()
    plain = compare(tmp_path, *sides, ks=[1, 4], alpha=0.3, threads=1)
    monkeypatch.setattr(engines, "SMALL", 0)
    equal_tables(plain, compare(tmp_path, *sides, ks=[1, 4], alpha=0.3, threads=2))


def test_save_and_load_give_the_same_subspaces(tmp_path: Path) -> None:
    diff = compare(tmp_path, *many(), ks=[1, 4, 200], alpha=0.3)
    diff.save(tmp_path / "out")
    again = paramdiff.load(tmp_path / "out")
    assert {"subspaces.parquet", "angles.parquet", "weight_spectra.parquet"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert again.run == diff.run
    assert all(again.tables[name].equals(table) for name, table in diff.tables.items())
    assert again.subspaces_by("module").equals(diff.subspaces_by("module"))


@pytest.mark.parametrize("run", ["rl-adamw", "rl-sgd", "sft"])
def test_every_matrix_of_the_sample_data(run: str) -> None:
    base, tuned = (
        {n: t for file in (DATA / name).glob("*.safetensors") for n, t in load_file(file).items() if t.ndim == 2}
        for name in ("base", run)
    )
    diff = paramdiff.compare(DATA / "base", DATA / run, measures=MEASURED, ks=[8], alpha=0.5, device="cpu")
    names = diff.subspaces["name"].unique(maintain_order=True)
    assert sorted(names) == sorted(base)
    check(diff, {(name, None): (base[name], tuned[name]) for name in names})
