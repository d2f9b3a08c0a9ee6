"""Singular values against float64 numpy, for matrices of every kind and by every route; structure against networkx."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.linalg import LinAlgError
from threadpoolctl import threadpool_limits

import paramdiff
from paramdiff import singular
from tests.helpers import save

Matrix = np.ndarray[Any, Any]
U = 2.0**-53
SMALL = 65536


@pytest.fixture(autouse=True, scope="module")
def one_blas_thread() -> Iterator[None]:
    """The two libraries of BLAS that numpy and scipy bring along fight over the cores otherwise."""
    with threadpool_limits(1):
        yield


# Matrices


def _bf16(a: Matrix) -> Matrix:
    return torch.from_numpy(a.astype(np.float32)).bfloat16().float().numpy()


def _low_rank(rng: np.random.Generator, m: int, n: int) -> Matrix:
    return rng.standard_normal((m, 3)) @ rng.standard_normal((3, n)) * 1e-3


def _rounded(rng: np.random.Generator, m: int, n: int) -> Matrix:
    base = _bf16(rng.standard_normal((m, n)) * 0.02)
    return _bf16(base + _low_rank(rng, m, n)) - base


def _integers_of_half_rank(rng: np.random.Generator, m: int, n: int) -> Matrix:
    inner = max(1, min(m, n) // 2)
    return rng.integers(-3, 4, (m, inner)) @ rng.integers(-3, 4, (inner, n))


def _graded(rng: np.random.Generator, m: int, n: int) -> Matrix:
    rows, cols = (10.0 ** np.linspace(0, -6, k)[:, None] for k in (m, n))
    return rng.standard_normal((m, n)) * rows * cols.T


def _decades(rng: np.random.Generator, m: int, n: int) -> Matrix:
    """Singular values over 12 decades in directions that no axis knows; in float32 the last ones drown in rounding."""
    k = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((side, k)))[0] for side in (m, n))
    return u * 10.0 ** np.linspace(0, -12, k) @ v.T


def _sparse(density: float) -> Callable[[np.random.Generator, int, int], Matrix]:
    return lambda rng, m, n: rng.standard_normal((m, n)) * (rng.random((m, n)) < density)


def _blocks(rng: np.random.Generator, m: int, n: int) -> Matrix:
    """Block-diagonal, with blocks of many sizes and gaps between them, rows and columns shuffled."""
    a = np.zeros((m, n))
    row = col = 0
    while row < m and col < n:
        height, width = rng.integers(1, 9, 2)
        block = a[row : row + height, col : col + width]
        block[:] = rng.standard_normal(block.shape) * (rng.random(block.shape) < 0.7)
        row, col = row + height + rng.integers(0, 3), col + width + rng.integers(0, 3)
    return a[rng.permutation(m)][:, rng.permutation(n)]


def _one_entry(rng: np.random.Generator, m: int, n: int) -> Matrix:
    a = np.zeros((m, n))
    a[rng.integers(m), rng.integers(n)] = -0.3
    return a


def _holed(rng: np.random.Generator, m: int, n: int) -> Matrix:
    """Dense where it holds anything; most rows and columns hold nothing."""
    return rng.standard_normal((m, n)) * (rng.random((m, 1)) < 0.3) * (rng.random((1, n)) < 0.4)


KINDS: dict[str, Callable[[np.random.Generator, int, int], Matrix]] = {
    "gaussian": lambda rng, m, n: rng.standard_normal((m, n)),
    "low rank": _low_rank,
    "low rank rounded to bf16": _rounded,
    "integers of half rank": _integers_of_half_rank,
    "zero": lambda rng, m, n: np.zeros((m, n)),
    "graded rows and columns": _graded,
    "twelve decades": _decades,
    "duplicated rows": lambda rng, m, n: rng.standard_normal((m, n))[rng.integers(0, m // 4 + 1, m)],
    "scale 1e-38": lambda rng, m, n: rng.standard_normal((m, n)) * 1e-38,
    "subnormal": lambda rng, m, n: rng.standard_normal((m, n)) * 1e-43,
    "scale 1e30": lambda rng, m, n: rng.standard_normal((m, n)) * 1e30,
    "blocks": _blocks,
    "one entry": _one_entry,
    "holed": _holed,
    "one row": lambda rng, m, n: rng.standard_normal((m, n)) * (np.arange(m) == m // 2)[:, None],
    "one column": lambda rng, m, n: rng.standard_normal((m, n)) * (np.arange(n) == n // 2),
    "negative zeros": lambda rng, m, n: np.where(rng.random((m, n)) < 0.3, rng.standard_normal((m, n)), -0.0),
    **{f"density {d}": _sparse(d) for d in (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.5)},
}
BELOW = [(1, 1), (1, 9), (9, 1), (2, 2), (5, 3), (3, 5), (40, 40), (64, 200), (200, 64), (30000, 2), (3, 30000)]
ABOVE = [(300, 300), (300, 500), (700, 257), (2000, 34), (35, 2000)]


def make(kind: str, shape: tuple[int, int]) -> Matrix:
    rng = np.random.default_rng([sorted(KINDS).index(kind), *shape])
    return KINDS[kind](rng, *shape).astype(np.float32)


# References


def reference(a: Matrix) -> Matrix:
    return np.linalg.svd(a.astype(np.float64), compute_uv=False)


def check(found: singular.Spectrum, a: Matrix, wanted: Matrix | None = None) -> None:
    """Every value within the stated error, beside the reference's own; in order; none missing; all the energy."""
    wanted = reference(a) if wanted is None else wanted
    sigma, own = found.sigma, (max(a.shape) + 8) * U * float(wanted[0])
    assert (sigma.dtype, sigma.shape) == (np.float64, (min(a.shape),))
    assert (sigma >= 0).all()
    assert (np.diff(sigma) <= 0).all()
    close = np.abs(sigma - wanted) <= found.sigma_error + own
    close |= np.abs(sigma**2 - wanted**2) <= found.square_error + own * (2 * wanted + own)
    assert close.all(), (sigma[~close], wanted[~close], found.sigma_error, found.square_error)
    energy = float((a.astype(np.float64) ** 2).sum())
    assert float((sigma**2).sum()) == pytest.approx(energy, rel=1e-12, abs=0)
    # errors that promise nothing would pass all of the above
    assert found.sigma_error <= max(a.shape) * 8 * U * float(wanted[0])
    assert found.square_error <= 4 * max(a.shape) * U * energy


def entries(a: Matrix, rng: np.random.Generator | None = None) -> tuple[Matrix, Matrix, tuple[int, int]]:
    positions = np.flatnonzero(a)
    if rng is not None:
        positions = rng.permutation(positions)
    return positions, a.reshape(-1)[positions], a.shape  # type: ignore[return-value]


def matching(a: Matrix) -> int:
    """The most entries of which no two share a row or a column, as an assignment problem."""
    mask = a != 0
    return int(mask[scipy.optimize.linear_sum_assignment(mask, maximize=True)].sum())


def graph(a: Matrix) -> Any:
    found = nx.Graph()
    found.add_edges_from((("row", i), ("col", j)) for i, j in np.argwhere(a).tolist())
    return found


# Every route


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*BELOW, *ABOVE], ids=str)
def test_every_kind_of_matrix(kind: str, shape: tuple[int, int]) -> None:
    a = make(kind, shape)
    wanted = reference(a)
    for form in (a, a.astype(np.float64), np.asfortranarray(a)):
        check(singular.of_matrix(form), a, wanted)
    found = singular.of_entries(*entries(a))
    check(found, a, wanted)
    assert found.method == "sparse"
    assert found.note is None
    # Exact zeros of the structure are exact.
    assert not found.sigma[found.structural_rank :].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 3), (64, 200), (300, 500), (700, 257)], ids=str)
def test_a_gram_matrix_is_enough(kind: str, shape: tuple[int, int]) -> None:
    a = make(kind, shape).astype(np.float64)
    tall = a if shape[0] >= shape[1] else a.T
    gram = np.tril(tall.T @ tall) + np.triu(np.full((min(shape),) * 2, np.nan), 1)  # nobody looks at the upper triangle
    found = singular.of_gram(np.asfortranarray(gram), max(shape))
    check(found, a)
    assert (found.method, found.note) == ("gram", None)


@pytest.mark.parametrize("kind", ["gaussian", "holed", "density 0.01", "low rank"])
@pytest.mark.parametrize("shape", [(40, 30), (700, 257)], ids=str)
@pytest.mark.parametrize("step", [1, 7, 256, 1000])
def test_a_gram_matrix_adds_up_in_any_steps(kind: str, shape: tuple[int, int], step: int) -> None:
    a = make(kind, shape)
    for form in (a, a.astype(np.float64), np.asfortranarray(a), np.asfortranarray(a.astype(np.float64))):
        gram = singular.new_gram(shape[1])
        for at in range(0, shape[0], step):
            singular.add_gram(gram, form[at : at + step])
        wanted = a.astype(np.float64).T @ a.astype(np.float64)
        assert np.abs(np.tril(gram - wanted)).max() <= 2 * shape[0] * U * np.trace(wanted)
        assert not np.triu(gram, 1).any()


@pytest.mark.parametrize(
    ("shape", "method"),
    [((256, 256), "svd"), ((257, 256), "gram"), ((256, 257), "gram"), ((5000, 32), "svd"), ((5000, 33), "gram"),
     ((32, 5000), "svd"), ((33, 5000), "gram")],
)  # fmt: skip
def test_small_and_thin_matrices_get_a_direct_svd_and_others_a_gram_matrix(shape: tuple[int, int], method: str) -> None:
    found = singular.of_matrix(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    assert found.method == method
    assert (found.sigma_error > 0, found.square_error > 0) == (method == "svd", method == "gram")
    assert found.resolution == max(found.sigma_error, math.sqrt(found.square_error))


def test_what_is_small_without_its_empty_rows_and_columns_gets_a_direct_svd() -> None:
    a = np.zeros((900, 900), np.float32)
    a[100:300, 200:400] = np.random.default_rng(0).standard_normal((200, 200))
    found = singular.of_matrix(a)
    assert (found.method, len(found.sigma)) == ("svd", 900)
    check(found, a)


def test_a_long_matrix_goes_through_several_slices() -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((34000, 40), dtype=np.float32)  # more than 2^20 elements
    wanted = reference(a)
    check(singular.of_matrix(a), a, wanted)
    check(singular.of_matrix(a.T), a.T, wanted)
    check(singular.of_matrix(np.ascontiguousarray(a.T)), a.T, wanted)


def _exact(a: list[list[float]]) -> tuple[Fraction, Fraction]:
    """Trace and determinant of AᵀA for two columns, exactly."""
    (p, q), (r, s) = ([Fraction(x) for x in row] for row in a)
    return p * p + q * q + r * r + s * s, (p * s - q * r) ** 2


def _is_within(value: float, error: float, trace: Fraction, det: Fraction, *, largest: bool) -> bool:
    """Whether a root of x² − trace·x + det, the smaller or the larger one, lies between (value ± error)²."""

    def below_or_at_root(x: Fraction) -> bool:
        square = x * x if x > 0 else Fraction(0)
        polynomial = square * square - trace * square + det
        if largest:
            return square <= trace / 2 or polynomial <= 0
        return square <= trace / 2 and polynomial >= 0

    low, high = Fraction(value) - Fraction(error), Fraction(value) + Fraction(error)
    return (low <= 0 or below_or_at_root(low)) and not below_or_at_root(high)


def test_the_stated_error_holds_for_the_smallest_matrices_in_exact_arithmetic() -> None:
    rng, outside = np.random.default_rng(5), []
    cases = [rng.standard_normal((2, 2)) * 10.0 ** rng.uniform(-6, 6, (2, 2)) for _ in range(2000)]
    cases += [np.array([[27.58037567138672, -151.307861328125], [-2.440748539811466e-05, -0.0062163579277694225]])]
    for case in cases:
        a = case.astype(np.float32)
        found, (trace, det) = singular.of_matrix(a), _exact(a.tolist())
        for value, largest in zip(found.sigma.tolist(), (True, False), strict=True):
            if not _is_within(value, found.sigma_error, trace, det, largest=largest):
                outside.append((a.tolist(), value, found.sigma_error))
    assert not outside, f"{len(outside)} of {2 * len(cases)} lie outside, such as {outside[-1]}"


# Structure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 3), (40, 40), (64, 200), (200, 64), (300, 310)], ids=str)
def test_structural_rank_is_a_largest_matching_and_bounds_the_rank(kind: str, shape: tuple[int, int]) -> None:
    a = make(kind, shape)
    found, sigma = singular.of_entries(*entries(a)), reference(a)
    assert found.structural_rank == matching(a)
    assert found.structural_rank >= np.count_nonzero(sigma > 10 * max(shape) * U * sigma[0])


@pytest.mark.parametrize("kind", [k for k in KINDS if "density" in k or k in ("blocks", "zero", "one entry", "holed")])
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (5, 3), (64, 200), (200, 64), (250, 260)], ids=str)
def test_components_are_those_of_the_bipartite_graph(kind: str, shape: tuple[int, int]) -> None:
    a = make(kind, shape)
    found = singular.of_entries(*entries(a))
    assert found.components == nx.number_connected_components(graph(a))


def test_zeros_among_the_entries_are_no_entries() -> None:
    found = singular.of_entries(np.array([0, 1, 5, 8]), np.array([3.0, 0.0, -0.0, 4.0]), (3, 3))
    assert (found.sigma.tolist(), found.structural_rank, found.components) == ([4.0, 3.0, 0.0], 2, 2)


def test_entries_may_come_in_any_order() -> None:
    rng = np.random.default_rng(3)
    for kind in ("density 0.01", "density 0.1", "blocks", "gaussian"):
        a = make(kind, (120, 90))
        check(singular.of_entries(*entries(a, rng)), a)


@pytest.mark.parametrize(
    ("shape", "density", "by_gram"),
    [((700, 800), 0.01, True), ((800, 700), 0.01, True), ((700, 800), 0.2, True), ((150, 160), 0.05, False),
     ((20, 6000), 0.02, False)],
)  # fmt: skip
def test_a_large_component_goes_through_a_gram_matrix(shape: tuple[int, int], density: float, by_gram: bool) -> None:
    a = _sparse(density)(np.random.default_rng(4), *shape).astype(np.float32)
    found = singular.of_entries(*entries(a))
    assert (found.square_error > 0) == by_gram
    check(found, a)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)], ids=str)
def test_errors_and_notes_are_those_of_the_worst_component(monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]) -> None:
    failing(monkeypatch, "evd")
    rng = np.random.default_rng(8)
    parts = [rng.standard_normal((260, 270)), 1e-3 * rng.standard_normal((4, 5)), 1e-3 * np.ones((1, 3))]
    a = scipy.linalg.block_diag(*[parts[k] for k in order]).astype(np.float32)
    found = singular.of_entries(*entries(a))
    check(found, a)
    assert (found.components, found.square_error > 0) == (3, True)
    assert found.square_error >= 260 * U * (parts[0] ** 2).sum()
    assert found.sigma_error > 0
    assert found.note == "evd did not converge; ev did"


def test_thousands_of_components_come_together() -> None:
    rng, k = np.random.default_rng(6), 1500
    rows, cols = rng.permutation(2 * k), rng.permutation(3 * k)
    blocks = rng.standard_normal((k, 2, 3))
    positions = (rows.reshape(k, 2, 1) * (3 * k) + cols.reshape(k, 1, 3)).reshape(-1)
    found = singular.of_entries(positions, blocks.reshape(-1), (2 * k, 3 * k))
    wanted = np.sort(np.linalg.svd(blocks, compute_uv=False).reshape(-1))[::-1]
    assert (found.components, found.structural_rank) == (k, 2 * k)
    assert np.abs(found.sigma - wanted).max() <= found.sigma_error + 16 * U * wanted[0]


# Properties


@st.composite
def small(draw: st.DrawFn) -> Matrix:
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    number = st.floats(-1e3, 1e3, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6)
    values = draw(st.lists(st.one_of(st.just(0.0), number), min_size=m * n, max_size=m * n))
    return np.array(values, dtype=np.float32).reshape(m, n)


def both(a: Matrix) -> list[singular.Spectrum]:
    return [singular.of_matrix(a), singular.of_entries(*entries(a))]


def same(found: singular.Spectrum, other: singular.Spectrum, shape: tuple[int, ...]) -> bool:
    own = 8 * U * float(found.sigma.max(initial=0))
    error, square = found.sigma_error + other.sigma_error + own, found.square_error + other.square_error
    n = min(len(found.sigma), len(other.sigma))
    one, two = found.sigma[:n], other.sigma[:n]
    rest = np.concatenate([found.sigma[n:], other.sigma[n:]])
    return bool(((np.abs(one - two) <= error) | (np.abs(one**2 - two**2) <= square)).all() and (rest <= error).all())


@given(a=small(), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_transposing_and_permuting_change_nothing(a: Matrix, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mixed = a[rng.permutation(a.shape[0])][:, rng.permutation(a.shape[1])]
    for before, turned, shuffled in zip(both(a), both(a.T.copy()), both(mixed), strict=True):
        assert same(before, turned, a.shape)
        assert same(before, shuffled, a.shape)
        assert before.structural_rank == turned.structural_rank == shuffled.structural_rank
        assert before.components == turned.components == shuffled.components


@given(a=small(), power=st.integers(-60, 60))
@settings(max_examples=60)
def test_scaling_by_a_power_of_two_scales_exactly(a: Matrix, power: int) -> None:
    for before, after in zip(both(a), both(np.ldexp(a, power)), strict=True):
        assert np.array_equal(after.sigma, np.ldexp(before.sigma, power))
        assert after.sigma_error == math.ldexp(before.sigma_error, power)


@given(a=small(), rows=st.integers(0, 5), cols=st.integers(0, 5))
@settings(max_examples=60)
def test_zero_rows_and_columns_change_nothing(a: Matrix, rows: int, cols: int) -> None:
    wide = np.pad(a, ((0, rows), (0, cols)))
    for before, after in zip(both(a), both(wide), strict=True):
        assert len(after.sigma) == min(wide.shape)
        assert same(before, after, wide.shape)
        assert (before.structural_rank, before.components) == (after.structural_rank, after.components)


@given(a=small())
@settings(max_examples=60)
def test_small_matrices_and_their_structure(a: Matrix) -> None:
    for found in both(a):
        check(found, a)
    assert found.structural_rank == len(nx.max_weight_matching(graph(a), maxcardinality=True))
    assert found.components == nx.number_connected_components(graph(a))


@pytest.mark.parametrize("shape", [(300, 310), (700, 257)], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "low rank", "density 0.01", "blocks", "duplicated rows"])
def test_the_same_holds_for_large_ones(kind: str, shape: tuple[int, int]) -> None:
    a, rng = make(kind, shape), np.random.default_rng(7)
    mixed = a[rng.permutation(shape[0])][:, rng.permutation(shape[1])]
    for before, turned, shuffled, wide, scaled in zip(
        both(a), both(a.T.copy()), both(mixed), both(np.pad(a, ((3, 4), (5, 0)))), both(np.ldexp(a, -20)), strict=True
    ):
        assert same(before, turned, shape)
        assert same(before, shuffled, shape)
        assert same(before, wide, shape)
        assert np.array_equal(scaled.sigma, np.ldexp(before.sigma, -20))
        assert scaled.square_error == math.ldexp(before.square_error, -40)


def test_uncertain_is_what_lies_within_either_error() -> None:
    sigma = np.array([4.0, 2.0, 1.0])
    assert singular.Spectrum(sigma, "svd", sigma_error=0.1).uncertain_at(1.95)
    assert not singular.Spectrum(sigma, "svd", sigma_error=0.01).uncertain_at(1.95)
    assert singular.Spectrum(sigma, "gram", square_error=0.25).uncertain_at(1.95)
    assert not singular.Spectrum(sigma, "gram", square_error=0.15).uncertain_at(1.95)
    assert not singular.Spectrum(sigma, "gram", square_error=0.15, sigma_error=0.04).uncertain_at(3.0)


# Drivers that do not converge


def failing(monkeypatch: pytest.MonkeyPatch, *drivers: str) -> None:
    """LAPACK drivers that never converge, by name; all of them for "all"."""

    def spoilt(real: Callable[..., Any], option: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "all" in drivers or kwargs.get(option) in drivers:
                raise LinAlgError("did not converge")
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(scipy.linalg, "eigh", spoilt(scipy.linalg.eigh, "driver"))
    monkeypatch.setattr(scipy.linalg, "svd", spoilt(scipy.linalg.svd, "lapack_driver"))


@pytest.mark.parametrize("drivers", [("evd",), ("evd", "ev")], ids="+".join)
def test_another_eigenvalue_driver_steps_in_and_is_named(monkeypatch: pytest.MonkeyPatch, drivers: tuple[str, ...]) -> None:
    failing(monkeypatch, *drivers)
    a = make("gaussian", (300, 500))
    then = ("evd", "ev", "evx")[len(drivers)]
    gram = a.astype(np.float64) @ a.T
    for found in (singular.of_matrix(a), singular.of_gram(gram, 500), singular.of_entries(*entries(a))):
        check(found, a)
        assert found.note is not None
        assert f"{' and '.join(drivers)} did not converge" in found.note
        assert f"; {then} did" in found.note


def test_another_svd_driver_steps_in_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "gesdd")
    a = make("gaussian", (40, 40))
    for found in (singular.of_matrix(a), singular.of_entries(*entries(a))):
        check(found, a)
        assert found.note is not None
        assert "gesdd did not converge" in found.note
        assert "gesvd did" in found.note


@pytest.mark.parametrize("shape", [(40, 40), (300, 500)], ids=str)
def test_where_no_driver_converges_that_is_an_error(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    failing(monkeypatch, "all")
    a = make("gaussian", shape)
    with pytest.raises(LinAlgError, match="driver converged"):
        singular.of_matrix(a)
    with pytest.raises(LinAlgError, match="driver converged"):
        singular.of_entries(*entries(a))


def _pair(tmp_path: Path) -> tuple[Path, Path]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"0.small": (40, 40), "1.large": (300, 500), "2.row": (1, 9), "3.sparse": (500, 400)}
    base = {f"layers.{name}": torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    tuned = {name: tensor + torch.randn(tensor.shape, generator=rng) for name, tensor in base.items()}
    tuned["layers.3.sparse"] = base["layers.3.sparse"].clone()
    tuned["layers.3.sparse"][7, 3:9] += 1  # one row: its norm needs no driver
    return save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", tuned)


def test_a_matrix_on_which_all_drivers_fail_gets_a_note_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing(monkeypatch, "evd", "ev", "evx")
    diff = paramdiff.compare(*_pair(tmp_path), measures=["change", "spectrum"])
    rows = {row["name"]: row for row in diff.ranks.to_dicts()}
    assert "driver converged" in rows["layers.1.large"]["note"]
    assert {k for k, v in rows["layers.1.large"].items() if v is not None} <= {
        "name", "layer", "module", "kind", "rows", "cols", "note",
    }  # fmt: skip
    assert "layers.1.large" not in diff.tables["spectra"]["name"].to_list()
    assert diff.tensors["changed"].to_list()[1] > 149_900
    assert (rows["layers.0.small"]["method"], rows["layers.0.small"]["numeric_rank"]) == ("svd", 40)
    monkeypatch.undo()
    failing(monkeypatch, "all")
    diff = paramdiff.compare(*_pair(tmp_path), measures=["change", "spectrum"])
    assert diff.ranks["method"].to_list() == [None, None, None, "sparse"]
    assert diff.ranks_by()["without_spectrum"].to_list() == [3]


def test_a_note_on_another_driver_reaches_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, "evd", "gesdd")
    rows = paramdiff.compare(*_pair(tmp_path), measures=["spectrum"]).ranks.to_dicts()
    assert [row["note"] for row in rows] == [
        "gesdd did not converge; gesvd did", "evd did not converge; ev did", "gesdd did not converge; gesvd did", None,
    ]  # fmt: skip


def test_a_device_that_does_not_converge_leaves_it_to_the_host_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spoilt(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    pair = _pair(tmp_path)
    wanted = paramdiff.compare(*pair, measures=["spectrum"]).ranks
    monkeypatch.setattr(torch.linalg, "eigvalsh", spoilt)
    found = paramdiff.compare(*pair, measures=["spectrum"], device="torch:cpu").ranks
    for name in ("numeric_rank", "rank_at_1e-2", "rank_at_1e-3", "energy_rank_90", "energy_rank_95", "energy_rank_99"):
        assert found[name].to_list() == wanted[name].to_list()
    notes = dict(zip(found["name"], found["note"], strict=True))
    assert notes["layers.1.large"] is not None, "metrics.md §4: a routine that falls back to another driver says so"
    assert notes["layers.0.small"] is None
