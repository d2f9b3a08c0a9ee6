"""Leading singular values by subspace iteration, against numpy's SVD and closed forms, alone and through `compare`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits

import paramdiff
from paramdiff import singular, sketch

Matrix = np.ndarray[Any, Any]
Row = dict[str, Any]

DATA = Path(__file__).parent.parent / "sample_data"
pytestmark = pytest.mark.slow
MEASURED = ["change", "spectrum"]
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
UNKNOWN = ("numeric_rank", "numeric_rank_percent", "entropy_rank", "energy_error", "rank_uncertain")
SHAPES = [(530, 700), (700, 530), (600, 600)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small problems gain nothing from BLAS's threads, which wait for each other on a busy machine."""
    with threadpool_limits(1, user_api="blas"):
        yield


def with_spectrum(rng: np.random.Generator, shape: tuple[int, int], sigma: Matrix) -> Matrix:
    """A full matrix of these singular values: they stay when a diagonal matrix is reflected on both sides, twice."""
    a = np.zeros(shape)
    np.fill_diagonal(a, np.pad(sigma, (0, min(shape) - len(sigma))))
    for _ in range(2):
        x, y = (v / np.linalg.norm(v) for v in (rng.standard_normal(n) for n in shape))
        a -= 2 * np.outer(x, x @ a)
        a -= 2 * np.outer(a @ y, y)
    return a


def decaying(length: int) -> Matrix:
    return 1 / np.arange(1.0, length + 1)


def low_and_noise(rng: np.random.Generator, shape: tuple[int, int]) -> Matrix:
    """Ten directions that stand out of noise."""
    strong = (math.sqrt(shape[0]) + math.sqrt(shape[1])) * np.linspace(8.0, 3.0, 10)
    return with_spectrum(rng, shape, strong) + rng.standard_normal(shape)


def true_values(a: Matrix) -> Matrix:
    return np.linalg.svd(a.astype(np.float64), compute_uv=False)


def check(found: singular.Spectrum, a: Matrix, sigma: Matrix | None = None) -> Matrix:
    """What holds for every sketch of a matrix. Returns its true singular values."""
    sigma = true_values(a) if sigma is None else sigma
    assert found.method == "sketch"
    assert found.sigma.dtype == np.float64
    assert len(found.sigma) == min(64, *a.shape)
    assert (np.diff(found.sigma) <= 0).all()
    assert found.sigma.min() >= 0
    rounding = (1e-6 if a.dtype == np.float32 else 1e-14) * sigma[0]
    assert (found.sigma <= sigma[: len(found.sigma)] * (1 + 1e-5) + rounding).all()
    nearest = np.abs(found.sigma[:, None] - sigma[None, :]).min(axis=1)
    assert (nearest <= found.sigma_error * (1 + 1e-6) + rounding).all()
    return sigma


# The sketch alone


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [*SHAPES, (513, 513), (40, 900), (900, 20)], ids=str)
def test_any_spectrum_is_approached_from_below_within_the_stated_error(shape: tuple[int, int], dtype: type) -> None:
    rng = np.random.default_rng(1)
    flat = rng.standard_normal(shape).astype(dtype)
    sigma = check(sketch.of_matrix(flat), flat)
    assert sketch.of_matrix(flat).sigma[0] == pytest.approx(sigma[0], rel=0.1)  # the hardest case
    noisy = low_and_noise(rng, shape).astype(dtype)
    check(sketch.of_matrix(noisy), noisy)
    short = min(shape)
    slow = with_spectrum(rng, shape, decaying(short))
    check(sketch.of_matrix(slow.astype(dtype)), slow.astype(dtype), decaying(short))
    fast = with_spectrum(rng, shape, 0.8 ** np.arange(short))
    check(sketch.of_matrix(fast.astype(dtype)), fast.astype(dtype), 0.8 ** np.arange(short))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_values_that_stand_out_are_found_to_a_thousandth(shape: tuple[int, int], dtype: type) -> None:
    rng = np.random.default_rng(2)
    noisy = low_and_noise(rng, shape).astype(dtype)
    assert sketch.of_matrix(noisy).sigma[:10] == pytest.approx(true_values(noisy)[:10], rel=1e-3)
    for sigma in (decaying(min(shape)), 0.9 ** np.arange(min(shape))):
        found = sketch.of_matrix(with_spectrum(rng, shape, sigma).astype(dtype))
        assert found.sigma[:20] == pytest.approx(sigma[:20], rel=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [*SHAPES, (513, 3000), (3000, 513)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 60])
def test_a_matrix_of_low_rank_is_found_exactly(shape: tuple[int, int], rank: int, dtype: type) -> None:
    sigma = np.linspace(3.0, 1.0, rank)
    found = sketch.of_matrix(with_spectrum(np.random.default_rng(rank), shape, sigma).astype(dtype))
    # Rounding of float32 sums of thousands of terms, which are added in another order on another processor.
    exact = 5e-6 if dtype == np.float32 else 1e-13
    assert found.sigma[:rank] == pytest.approx(sigma, rel=exact)
    assert found.sigma[rank:].max(initial=0.0) <= 3 * exact
    assert found.sigma_error <= 10 * exact


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_leading_values_are_all_found(dtype: type) -> None:
    sigma = np.concatenate([np.full(30, 2.0), np.full(570, 0.2)])
    found = sketch.of_matrix(with_spectrum(np.random.default_rng(3), (600, 700), sigma).astype(dtype))
    assert found.sigma[:30] == pytest.approx([2.0] * 30, rel=1e-5)
    assert found.sigma[30:] == pytest.approx([0.2] * 34, rel=1e-4)  # any combination of them is a singular direction


def test_a_matrix_of_zeros_has_values_of_zero() -> None:
    found = sketch.of_matrix(np.zeros((600, 520), np.float32))
    assert found.sigma.tolist() == [0.0] * 64
    assert found.sigma_error == 0.0


def test_rows_and_columns_of_zeros_do_no_harm() -> None:
    a = np.zeros((800, 600), np.float32)
    rng = np.random.default_rng(4)
    a[100:160, 300:340] = rng.standard_normal((60, 40))
    found = sketch.of_matrix(a)
    check(found, a)
    assert found.sigma[:40] == pytest.approx(true_values(a)[:40], rel=1e-5)


@given(seed=st.integers(0, 2**20), shape=st.tuples(st.integers(1, 90), st.integers(1, 90)), rank=st.integers(1, 90))
@settings(max_examples=40)
def test_small_matrices_of_any_shape_and_rank(seed: int, shape: tuple[int, int], rank: int) -> None:
    rng = np.random.default_rng(seed)
    rank = min(rank, *shape)
    a = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    found = sketch.of_matrix(a)
    sigma = check(found, a)
    if rank <= 80:  # all directions fit into the sketch
        assert found.sigma == pytest.approx(sigma[:64], rel=1e-9, abs=1e-13 * sigma[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sketch_repeats_itself(dtype: type) -> None:
    a = np.random.default_rng(5).standard_normal((530, 540)).astype(dtype)
    one, other = sketch.of_matrix(a), sketch.of_matrix(a.copy())
    assert np.array_equal(one.sigma, other.sigma)
    assert one.sigma_error == other.sigma_error


@pytest.mark.parametrize("density", [0.0005, 0.005, 0.02])
@pytest.mark.parametrize("shape", [(530, 700), (2000, 600), (520, 2500)], ids=str)
def test_entries_and_the_matrix_of_them_agree(shape: tuple[int, int], density: float) -> None:
    rng = np.random.default_rng(6)
    dense = rng.standard_normal(shape) * (rng.random(shape) < density)
    dense[:, 7] *= 5
    positions = np.flatnonzero(dense)
    found = sketch.of_entries(positions, dense.ravel()[positions], shape)
    order = rng.permutation(len(positions))
    shuffled = sketch.of_entries(positions[order], dense.ravel()[positions[order]], shape)
    whole = sketch.of_matrix(dense)
    check(found, dense)
    assert found.sigma == pytest.approx(whole.sigma, rel=1e-9, abs=1e-12)
    assert found.sigma_error == pytest.approx(whole.sigma_error, rel=1e-3, abs=1e-12)
    assert shuffled.sigma == pytest.approx(whole.sigma, rel=1e-9, abs=1e-12)


def test_entries_on_a_diagonal_have_their_sizes_for_values() -> None:
    values = np.array([-3.0, 0.5, 2.0, -1.0, 7.0])
    found = sketch.of_entries(np.arange(5) * 701, values, (600, 700))
    assert found.sigma == pytest.approx([7.0, 3.0, 2.0, 1.0, 0.5] + [0.0] * 59, rel=1e-12, abs=1e-12)
    nothing = sketch.of_entries(np.zeros(0, np.int64), np.zeros(0), (600, 700))
    assert nothing.sigma.tolist() == [0.0] * 64


# Through compare


def compare(tmp: Path, deltas: Mapping[str, torch.Tensor], method: str = "sketch", **options: Any) -> paramdiff.Diff:
    """Base: zeros, so that the change is the tensor itself. (Adding 0 makes +0 of −0, whose bits are no change.)"""
    save_file({n: torch.zeros_like(t) for n, t in deltas.items()}, tmp / "a.safetensors")
    save_file({n: t.contiguous() + 0 for n, t in deltas.items()}, tmp / "b.safetensors")
    options = {"device": "cpu"} | options
    return paramdiff.compare(tmp / "a.safetensors", tmp / "b.safetensors", measures=MEASURED, method=method, **options)


def energy_rank(sigma: Matrix, total: float, share: float) -> int | None:
    reached = np.flatnonzero(np.cumsum(sigma**2) >= share * total)
    return int(reached[0]) + 1 if len(reached) else None


def check_row(diff: paramdiff.Diff, name: str, delta: torch.Tensor) -> Row:
    """A row of a sketched matrix against the true spectrum."""
    row = diff.ranks.filter(pl.col("name") == name).row(0, named=True)
    sigma = diff.tables["spectra"].filter(pl.col("name") == name)["sigma"].to_numpy()
    index = diff.tables["spectra"].filter(pl.col("name") == name)["index"].to_list()
    d = delta.to(F64).numpy()
    scale = np.abs(d).max()
    true, total = true_values(d / scale) * scale, float(np.sum((d / scale) ** 2))
    assert index == list(range(1, 65))
    assert (sigma <= true[:64] * (1 + 1e-5) + 1e-6 * true[0]).all()
    nearest = np.abs(sigma[:, None] - true[None, :]).min(axis=1)
    assert (nearest <= row["resolution"] * (1 + 1e-6) + 1e-6 * true[0]).all()
    assert (row["method"], row["note"], row["full_rank"]) == ("sketch", None, min(d.shape))
    assert all(row[column] is None for column in (*UNKNOWN, "structural_rank", "components"))
    assert row["sigma_1"] == sigma[0]
    assert row["frobenius"] == pytest.approx(math.sqrt(total) * scale, rel=1e-12)
    assert row["stable_rank"] == pytest.approx(total / (sigma[0] / scale) ** 2, rel=1e-12)
    assert row["top1_share"] == pytest.approx(sigma[0] / scale / math.sqrt(total), rel=1e-12)
    for share in (90, 95, 99):
        wanted = energy_rank(sigma / scale, total, share / 100)
        assert row[f"energy_rank_{share}"] == wanted
        percent = None if wanted is None else pytest.approx(100 * wanted / min(d.shape), rel=1e-12)
        assert row[f"energy_rank_{share}_percent"] == percent
    for name_, cut in (("rank_at_1e-2", 1e-2), ("rank_at_1e-3", 1e-3)):
        above = int((sigma > cut * sigma[0]).sum())
        near = np.abs(sigma - cut * sigma[0]) <= row["resolution"]
        assert row[name_] == (None if above == 64 or near.any() else above)
    return row


@pytest.mark.parametrize("kind", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_column_of_a_sketched_matrix(tmp_path: Path, shape: tuple[int, int], kind: torch.dtype) -> None:
    rng = np.random.default_rng(7)
    sparse = rng.standard_normal(shape) * (rng.random(shape) < 0.004)
    deltas = {
        "noisy": torch.from_numpy(low_and_noise(rng, shape)).to(kind),
        "low": torch.from_numpy(with_spectrum(rng, shape, np.array([5.0, 4.0, 3.0, 2.0, 1.0]))).to(kind),
        "sparse": torch.from_numpy(sparse).to(kind),
    }
    diff = compare(tmp_path, deltas)
    rows = {name: check_row(diff, name, delta) for name, delta in deltas.items()}
    true = {name: true_values(delta.to(F64).numpy()) for name, delta in deltas.items()}
    assert [rows["low"][f"energy_rank_{p}"] for p in (90, 95, 99)] == [
        energy_rank(true["low"], float((true["low"] ** 2).sum()), p / 100) for p in (90, 95, 99)
    ]
    assert rows["noisy"]["energy_rank_99"] is None  # the noise holds more than that
    assert rows["noisy"]["sigma_1"] == pytest.approx(true["noisy"][0], rel=1e-3)
    if kind in (F32, F64):
        assert (rows["low"]["rank_at_1e-2"], rows["low"]["rank_at_1e-3"]) == (5, 5)


@pytest.mark.parametrize("exponent", [-660, 660])
@pytest.mark.parametrize("dense", [True, False])
def test_float64_beyond_the_range_of_its_squares(tmp_path: Path, exponent: int, dense: bool) -> None:
    rng, shape = np.random.default_rng(8), (530, 600)
    delta = low_and_noise(rng, shape) * (1.0 if dense else rng.random(shape) < 0.01)
    check_row(
        compare(tmp_path, {"w": torch.from_numpy(delta * 2.0**exponent)}), "w", torch.from_numpy(delta * 2.0**exponent)
    )


@pytest.mark.parametrize("exponent", [-140, -100, 100, 124])
def test_float32_near_the_ends_of_its_range(tmp_path: Path, exponent: int) -> None:
    delta = torch.from_numpy(np.random.default_rng(9).standard_normal((530, 600))).to(F32) * 2.0**exponent
    assert torch.isfinite(delta).all()
    exact = compare(tmp_path, {"w": delta}, "exact").ranks.row(0, named=True)
    assert exact["note"] is None
    row = check_row(compare(tmp_path, {"w": delta}), "w", delta)
    assert row["sigma_1"] == pytest.approx(exact["sigma_1"], rel=0.1)


def test_only_matrices_whose_shorter_side_exceeds_512_are_sketched(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(1)
    shapes = {
        "a": (512, 700),
        "b": (513, 600),
        "c": (600, 513),
        "d": (700, 512),
        "e": (20, 30),
        "f": (513, 513),
        "g": (1, 9),
    }
    deltas = {n: torch.randn(s, generator=rng).to(BF16) for n, s in shapes.items()}
    sketched, exact = compare(tmp_path, deltas), compare(tmp_path, deltas, "exact")
    methods = dict(sketched.ranks.select("name", "method").rows())
    assert methods == {"a": "gram", "b": "sketch", "c": "sketch", "d": "gram", "e": "svd", "f": "sketch", "g": "svd"}
    assert "sketch" not in set(exact.ranks["method"])
    assert (sketched.run["options"]["method"], exact.run["options"]["method"]) == ("sketch", "exact")
    large = pl.col("name").is_in(["b", "c", "f"])
    for table in ("ranks", "spectra"):  # the others are not touched by the choice
        assert sketched.tables[table].filter(~large).equals(exact.tables[table].filter(~large))
    counts = dict(sketched.tables["spectra"].group_by("name").len().rows())
    assert counts == {"a": 512, "b": 64, "c": 64, "d": 512, "e": 20, "f": 64, "g": 1}
    for row, other in zip(sketched.ranks.filter(large).to_dicts(), exact.ranks.filter(large).to_dicts(), strict=True):
        assert all(row[column] is None for column in UNKNOWN)
        assert all(other[column] is not None for column in UNKNOWN)
        assert row["sigma_1"] <= other["sigma_1"] * (1 + 1e-5)
        assert row["stable_rank"] == pytest.approx(other["stable_rank"], rel=0.25)
        assert row["frobenius"] == pytest.approx(other["frobenius"], rel=1e-12)


@pytest.mark.parametrize("kind", [BF16, F32, F64], ids=str)
def test_a_zero_update_has_rank_zero_by_every_definition(tmp_path: Path, kind: torch.dtype) -> None:
    diff = compare(tmp_path, {"w": torch.zeros(520, 600, dtype=kind)})
    row = diff.ranks.row(0, named=True)
    ranks = ["numeric_rank", "rank_at_1e-2", "rank_at_1e-3", "energy_rank_90", "energy_rank_95", "energy_rank_99"]
    assert [row[column] for column in ranks] == [0] * 6
    assert (row["stable_rank"], row["entropy_rank"], row["sigma_1"], row["frobenius"]) == (0.0, 0.0, 0.0, 0.0)
    assert row["top1_share"] is None
    assert diff.tables["spectra"]["sigma"].to_list() == [0.0] * 64


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_leave_a_note(tmp_path: Path, value: float) -> None:
    delta = torch.randn(530, 540, generator=torch.Generator().manual_seed(2))
    delta[3, 3] = value
    diff = compare(tmp_path, {"w": delta})
    assert diff.ranks["note"].to_list() == ["1 elements are NaN or infinite"]
    assert diff.tables["spectra"].height == 0


def test_experts_of_a_stack_are_sketched_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    experts = [torch.from_numpy(low_and_noise(rng, (530, 520))).to(F32) * (e + 1) for e in range(3)]
    stack = torch.stack(experts)
    stack[1] = 0
    diff = compare(tmp_path, {"model.layers.0.mlp.experts.down_proj": stack})
    assert diff.ranks.select("expert", "method").rows() == [(0, "sketch"), (1, "sketch"), (2, "sketch")]
    spectra = diff.tables["spectra"]
    for e in (0, 2):
        sigma = spectra.filter(pl.col("expert") == e)["sigma"].to_numpy()
        assert sigma[:10] == pytest.approx(true_values(experts[e].numpy())[:10], rel=1e-3)
    assert spectra.filter(pl.col("expert") == 1)["sigma"].sum() == 0


@pytest.mark.parametrize("shape", [(700, 540), (540, 700)], ids=str)
def test_sparse_and_dense_updates_of_nearly_the_same_elements_agree(tmp_path: Path, shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(3)
    few = torch.randn(shape, generator=rng) * (torch.rand(shape, generator=rng) < 0.015)
    dense = torch.where(few == 0, torch.full(shape, 1e-30), few)
    diff = compare(tmp_path, {"few": few, "dense": dense})
    few_row, dense_row = (check_row(diff, name, few) for name in ("few", "dense"))
    assert dense_row["sigma_1"] == pytest.approx(few_row["sigma_1"], rel=1e-5)
    spectra = diff.tables["spectra"].partition_by("name", as_dict=True)
    assert spectra["few",]["sigma"].to_numpy() == pytest.approx(spectra["dense",]["sigma"].to_numpy(), rel=1e-5)


def test_runs_repeat_themselves_on_threads_and_on_the_gpu_engine(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(4)
    few = torch.randn(600, 530, generator=rng) * (torch.rand(600, 530, generator=rng) < 0.01)
    deltas = {"dense": torch.randn(530, 560, generator=rng).to(BF16), "few": few, "double": few.to(F64), "v": torch.ones(3)}
    plain = compare(tmp_path, deltas, threads=1)
    again = compare(tmp_path, deltas, threads=1)
    assert all(again.tables[name].equals(table) for name, table in plain.tables.items())
    for other in (compare(tmp_path, deltas, threads=2), compare(tmp_path, deltas, device="torch:cpu")):
        for table in ("ranks", "spectra"):
            for row, wanted in zip(other.tables[table].to_dicts(), plain.tables[table].to_dicts(), strict=True):
                assert row.keys() == wanted.keys()
                for column, value in wanted.items():
                    assert row[column] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), column


def test_sketched_matrices_roll_up_to_null_where_their_ranks_are_unknown(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(5)
    deltas = {f"layers.{i}.q_proj.weight": torch.randn(520, 530, generator=rng) for i in range(2)}
    row = compare(tmp_path, deltas).ranks_by("module").row(0, named=True)
    assert (row["matrices"], row["methods"], row["full_rank"], row["numeric_rank"]) == (2, "sketch", 1040, None)
    assert row["numeric_rank_percent_mean"] is row["entropy_rank_median"] is row["energy_error_max"] is None
    assert row["stable_rank_median"] > 1


def test_a_sketch_is_saved_and_loaded(tmp_path: Path) -> None:
    diff = compare(tmp_path, {"w": torch.randn(520, 530, generator=torch.Generator().manual_seed(6))})
    diff.save(tmp_path / "out")
    again = paramdiff.load(tmp_path / "out")
    assert again.run == diff.run
    assert all(again.tables[name].equals(table) for name, table in diff.tables.items())
    assert pl.read_parquet(tmp_path / "out" / "spectra.parquet").height == 64


@pytest.mark.parametrize("method", ["", "Sketch", "svd", "gram"])
def test_an_unknown_method_is_refused(method: str) -> None:
    with pytest.raises(paramdiff.OptionError, match=r"Unknown method .*; known: exact, sketch\."):
        paramdiff.compare(DATA / "base", DATA / "rl-sgd", measures=MEASURED, method=method)
