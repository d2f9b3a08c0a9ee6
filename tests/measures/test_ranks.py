"""Every definition of rank: closed forms, theorems, and each written out again in exact or plain float64 arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from paramdiff import columns, singular
from paramdiff.measures.ranks import definitions
from paramdiff.singular import Spectrum

PERCENT = {"energy_rank_90": 90, "energy_rank_95": 95, "energy_rank_99": 99}
RANKS = ("numeric_rank", "rank_at_1e-2", "rank_at_1e-3", *PERCENT)


@pytest.fixture(autouse=True, scope="module")
def one_blas_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def of(sigma: Any, shape: tuple[int, int] | None = None, **facts: Any) -> dict[str, Any]:
    """The definitions for singular values that are taken to be exact."""
    sigma = np.asarray(sigma, dtype=np.float64)
    shape = shape or (len(sigma), len(sigma))
    assert len(sigma) == min(shape)
    return definitions(Spectrum(sigma, facts.pop("method", "svd"), **facts), shape, math.fsum(sigma**2))


# Closed forms


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 19, 20, 21, 99, 100, 101, 1000, 4096])
@pytest.mark.parametrize("scale", [1.0, 0.1, 3e-9, 7e20])
def test_identity(n: int, scale: float) -> None:
    row = of(np.full(n, scale))
    for name, percent in PERCENT.items():
        assert row[name] == -(-percent * n // 100), name
        assert row[f"{name}_percent"] == 100 * row[name] / n
    assert row["numeric_rank"] == row["rank_at_1e-2"] == row["rank_at_1e-3"] == row["full_rank"] == n
    assert row["numeric_rank_percent"] == 100
    assert row["stable_rank"] == pytest.approx(n, rel=1e-12)
    assert row["entropy_rank"] == pytest.approx(n, rel=1e-12)
    assert row["sigma_1"] == scale
    assert row["frobenius"] == pytest.approx(scale * math.sqrt(n), rel=1e-14)
    assert row["top1_share"] == pytest.approx(1 / math.sqrt(n), rel=1e-14)
    assert row["energy_error"] < 1e-12
    assert row["rank_uncertain"] is False


@pytest.mark.parametrize("n", [1, 2, 50, 1000])
def test_rank_one_is_one_by_every_definition(n: int) -> None:
    row = of([3.7, *[0.0] * (n - 1)])
    assert [row[name] for name in RANKS] == [1] * len(RANKS)
    assert row["stable_rank"] == pytest.approx(1, rel=1e-14)
    assert row["entropy_rank"] == 1
    assert row["top1_share"] == 1
    assert row["energy_rank_99_percent"] == 100 / n


@pytest.mark.parametrize("shape", [(5, 3), (40, 200), (300, 257), (900, 40)], ids=str)
def test_rank_one_by_way_of_a_matrix(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    a = np.outer(rng.integers(1, 9, shape[0]), rng.integers(-9, 0, shape[1])).astype(np.float64)
    row = definitions(singular.of_matrix(a), shape, float((a**2).sum()))
    assert [row[name] for name in RANKS] == [1] * len(RANKS)
    assert row["stable_rank"] == pytest.approx(1, rel=1e-13)
    assert row["top1_share"] == pytest.approx(1, rel=1e-13)
    assert row["entropy_rank"] == pytest.approx(1, rel=1e-3)  # a Gram matrix leaves 1e-8 where zeros belong
    assert row["sigma_1"] == pytest.approx(np.linalg.norm(a), rel=1e-13)
    assert row["energy_error"] < 1e-12


def test_cuts_are_strict() -> None:
    row = of([1, 1e-1, 1e-2, 1e-3, 1e-4])
    assert (row["rank_at_1e-2"], row["rank_at_1e-3"], row["numeric_rank"]) == (2, 3, 5)
    above = np.nextafter([1e-2, 1e-3], 1)
    row = of([1, 1e-1, *above, 1e-4])
    assert (row["rank_at_1e-2"], row["rank_at_1e-3"]) == (3, 4)
    cut = 8 * 2.0**-23
    assert of([1, cut], (2, 8))["numeric_rank"] == 1
    assert of([1, np.nextafter(cut, 1)], (8, 2))["numeric_rank"] == 2


def test_the_numeric_cut_takes_the_longer_side() -> None:
    sigma = [2.0, 2.0 * 1001 * 2.0**-23, 2.0 * 999 * 2.0**-23]
    for shape in ((3, 1000), (1000, 3)):
        assert of(sigma, shape)["numeric_rank"] == 2


def test_energy_ranks_reach_their_share() -> None:
    row = of(np.sqrt([0.9, 0.05, 0.04, 0.01]))
    assert [row[name] for name in PERCENT] == [1, 2, 3]
    row = of(np.sqrt([0.9 - 1e-9, 0.05, 0.04, 0.01 + 1e-9]))
    assert [row[name] for name in PERCENT] == [2, 3, 4]


@pytest.mark.parametrize("method", ["svd", "gram", "sparse"])
def test_a_zero_update_has_rank_zero_and_no_shares(method: str) -> None:
    row = of([0.0, 0.0, 0.0], (3, 5), method=method)
    assert [row[name] for name in RANKS] == [0] * len(RANKS)
    assert [row[f"{name}_percent"] for name in ("numeric_rank", *PERCENT)] == [0.0] * 4
    assert [row[name] for name in ("stable_rank", "entropy_rank", "sigma_1", "frobenius")] == [0.0] * 4
    assert (row["top1_share"], row["energy_error"], row["rank_uncertain"]) == (None, None, False)
    assert (row["method"], row["full_rank"]) == (method, 3)


def test_every_row_has_the_same_documented_columns() -> None:
    documented = set(columns.RANKS) - {"name", "layer", "module", "kind", "expert", "rows", "cols", "duplicate_of"}
    assert set(of([2.0, 1.0])) == set(of([0.0, 0.0])) == documented


def test_facts_of_the_spectrum_are_handed_on() -> None:
    row = of([2.0, 1.0], method="sparse", structural_rank=2, components=1, note="odd", sigma_error=1e-9, square_error=1e-10)
    assert (row["method"], row["structural_rank"], row["components"], row["note"]) == ("sparse", 2, 1, "odd")
    assert row["resolution"] == pytest.approx(1e-5)


# Theorems

values = st.one_of(st.just(0.0), st.floats(1e-12, 1.0), st.floats(0.5, 1.0), st.sampled_from([1.0, 0.1, 0.01, 0.001]))


@st.composite
def spectra(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
    sigma = np.array(sorted([draw(st.floats(1e-6, 1.0)), *draw(st.lists(values, max_size=60))], reverse=True))
    scale = draw(st.sampled_from([1.0, 1e-30, 1e25, 2.0**-149]))
    longer = len(sigma) + draw(st.integers(0, 500))
    return sigma * scale, (longer, len(sigma)) if draw(st.booleans()) else (len(sigma), longer)


@given(spectra())
def test_what_holds_of_every_spectrum(case: tuple[np.ndarray[Any, Any], tuple[int, int]]) -> None:
    sigma, shape = case
    row, nonzero = of(sigma, shape), int(np.count_nonzero(sigma))
    little = 1e-12
    assert 1 - little <= row["stable_rank"] <= nonzero * (1 + little)
    assert 1 - little <= row["entropy_rank"] <= nonzero * (1 + little)
    assert 1 <= row["energy_rank_90"] <= row["energy_rank_95"] <= row["energy_rank_99"] <= nonzero
    assert 1 <= row["rank_at_1e-2"] <= row["rank_at_1e-3"] <= nonzero
    assert 1 <= row["numeric_rank"] <= nonzero <= row["full_rank"]
    assert row["top1_share"] ** 2 * row["stable_rank"] == pytest.approx(1, rel=1e-12)
    assert 0 < row["top1_share"] <= 1
    assert row["energy_error"] < 1e-12
    for name in ("numeric_rank", *PERCENT):
        assert row[f"{name}_percent"] == pytest.approx(100 * row[name] / min(shape))


@given(spectra())
def test_each_definition_written_out_again(case: tuple[np.ndarray[Any, Any], tuple[int, int]]) -> None:
    sigma, shape = case
    row, exact = of(sigma, shape), [Fraction(s) for s in sigma.tolist()]
    cut = exact[0] * max(shape) / 2**23
    away = [abs(s / cut - 1) > Fraction(1, 10**14) for s in exact]
    if all(away):
        assert row["numeric_rank"] == sum(s > cut for s in exact)
    for name, share in (("rank_at_1e-2", 1e-2), ("rank_at_1e-3", 1e-3)):
        assert row[name] == sum(s > share * sigma[0] for s in sigma.tolist())
    total, near = sum(s * s for s in exact), Fraction(1, 10**11)
    for name, percent in PERCENT.items():
        k = row[name]
        assert sum(s * s for s in exact[:k]) >= total * percent / 100 * (1 - near)
        assert sum(s * s for s in exact[: k - 1]) < total * percent / 100
    p = [s / math.fsum(sigma) for s in sigma.tolist() if s > 0]
    assert row["entropy_rank"] == pytest.approx(math.exp(-math.fsum(q * math.log(q) for q in p if q > 0)), rel=1e-11)
    assert row["stable_rank"] == pytest.approx(float(total / exact[0] ** 2), rel=1e-12)
    assert row["frobenius"] == pytest.approx(float(sigma[0]) * math.sqrt(total / exact[0] ** 2), rel=1e-12)
    assert row["sigma_1"] == sigma[0]


@given(spectra(), st.integers(-100, 100))
def test_scale_changes_nothing_but_the_norms(case: tuple[np.ndarray[Any, Any], tuple[int, int]], power: int) -> None:
    sigma, shape = case
    one, other = of(sigma, shape), of(np.ldexp(sigma, power), shape)
    for name in one.keys() - {"sigma_1", "frobenius", "resolution", "rank_uncertain"}:
        assert one[name] == other[name], name
    for name in ("sigma_1", "frobenius"):
        assert other[name] == math.ldexp(one[name], power)


@pytest.mark.parametrize("exponent", [0, 5, -900, 900, 1020, -1100])
def test_an_exponent_scales_the_norms_alone(exponent: int) -> None:
    sigma = np.array([3.0, 2.0, 1e-4])
    plain = definitions(Spectrum(sigma, "svd", sigma_error=0.25), (3, 4), math.fsum(sigma**2))
    row = definitions(Spectrum(sigma, "svd", sigma_error=0.25), (3, 4), math.fsum(sigma**2), exponent)
    for name in ("sigma_1", "frobenius", "resolution"):
        assert row[name] == np.ldexp(plain[name], exponent), name
    assert {k: v for k, v in row.items() if k not in ("sigma_1", "frobenius", "resolution")} == {
        k: v for k, v in plain.items() if k not in ("sigma_1", "frobenius", "resolution")
    }


def test_norms_beyond_float64_are_infinite_and_ranks_are_not_lost() -> None:
    sigma = np.array([3.0, 2.0])
    row = definitions(Spectrum(sigma, "svd"), (2, 2), 13.0, 1024)
    assert (row["sigma_1"], row["frobenius"], row["numeric_rank"]) == (math.inf, math.inf, 2)
    assert row["stable_rank"] == pytest.approx(13 / 9)


# What hangs on the last digits


def diagonal(sigma: list[float], n: int) -> np.ndarray[Any, Any]:
    return np.diag(np.array([*sigma, *[0.0] * (n - len(sigma))]))


def uncertain(found: Spectrum, sigma: list[float], n: int) -> bool:
    value = definitions(found, (n, n), math.fsum(np.square(sigma)))["rank_uncertain"]
    assert isinstance(value, bool)
    return value


@pytest.mark.parametrize("n", [20, 300])
def test_a_value_on_the_cut_is_uncertain_and_one_far_away_is_not(n: int) -> None:
    cut = n * 2.0**-23
    for factor, expected in ((1.0, True), (1.1, False), (0.9, False), (100.0, False), (0.01, False)):
        sigma = [1.0, 0.5, cut * factor]
        turn = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
        for a in (diagonal(sigma, n), turn * np.diag(diagonal(sigma, n))):
            assert uncertain(singular.of_matrix(a), sigma, n) is expected
        found = singular.of_entries(np.arange(n) * (n + 1), np.diag(diagonal(sigma, n)), (n, n))
        assert uncertain(found, sigma, n) is expected


def test_a_gram_matrix_is_uncertain_where_a_direct_svd_is_not() -> None:
    n = 300
    sigma = [1.0, 0.5, n * 2.0**-23 * (1 + 1e-7)]
    a = diagonal(sigma, n)
    by_gram = singular.of_gram(np.asfortranarray(a.T @ a), n)
    by_entries = singular.of_entries(np.arange(n) * (n + 1), np.diag(a), (n, n))
    assert uncertain(by_gram, sigma, n)
    assert not uncertain(by_entries, sigma, n)
    assert definitions(by_entries, (n, n), 1.25)["numeric_rank"] == 3


@pytest.mark.parametrize("n", [30, 300, 500])
@pytest.mark.parametrize("seed", range(5))
def test_where_it_is_not_uncertain_the_count_is_that_of_a_float64_svd(n: int, seed: int) -> None:
    """A spectrum that crosses the cut slowly: some of these values come as close as it gets."""
    rng = np.random.default_rng([n, seed])
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    a = u * 10.0 ** -np.sort(rng.uniform(0, 9, n)) @ v.T
    sigma = np.linalg.svd(a, compute_uv=False)
    row = definitions(singular.of_matrix(a), (n, n), float((a**2).sum()))
    assert row["rank_uncertain"] or row["numeric_rank"] == np.count_nonzero(sigma > sigma[0] * n * 2.0**-23)
    assert row["rank_at_1e-2"] == np.count_nonzero(sigma > 1e-2 * sigma[0])
    assert row["rank_at_1e-3"] == np.count_nonzero(sigma > 1e-3 * sigma[0])


# Sketches


def test_a_sketch_leaves_open_what_it_cannot_know() -> None:
    leading = np.array([4.0, 2.0, 1.0])
    row = definitions(Spectrum(leading, "sketch", sigma_error=0.1), (700, 600), 25.0)
    for name in ("numeric_rank", "numeric_rank_percent", "rank_at_1e-2", "rank_at_1e-3", "entropy_rank", "rank_uncertain"):
        assert row[name] is None, name
    assert (row["energy_error"], row["energy_rank_90"], row["energy_rank_90_percent"]) == (None, None, None)
    assert (row["sigma_1"], row["frobenius"], row["top1_share"], row["stable_rank"]) == (4.0, 5.0, 0.8, 25 / 16)
    row = definitions(Spectrum(leading, "sketch"), (700, 600), 22.0)
    assert (row["energy_rank_90"], row["energy_rank_95"], row["energy_rank_99"]) == (2, 3, None)
    row = definitions(Spectrum(np.array([4.0, 0.03, 0.003]), "sketch"), (700, 600), 16.1)
    assert (row["rank_at_1e-2"], row["rank_at_1e-3"]) == (1, 2)
