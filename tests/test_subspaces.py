"""Leading singular vectors, principal angles and mask counts, against numpy, scipy, closed forms and full sorting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from paramdiff import subspaces

Matrix = np.ndarray[Any, Any]

SHAPES = [(40, 70), (70, 40), (64, 64), (1, 9), (9, 1), (256, 256), (300, 500), (700, 257), (320, 320), (9, 5000), (5000, 9)]
U = 2.0**-53


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small problems gain nothing from BLAS's threads, which wait for each other on a busy machine."""
    with threadpool_limits(1, user_api="blas"):
        yield


def orthonormal(rng: np.random.Generator, rows: int, k: int) -> Matrix:
    return np.linalg.qr(rng.standard_normal((rows, k)))[0]


def spiked(rng: np.random.Generator, shape: tuple[int, int], k: int) -> Matrix:
    """k well separated singular values of 3 and more above others of 1 and less."""
    noise = rng.standard_normal(shape)
    noise /= np.linalg.norm(noise, 2)
    k = min(k, *shape)
    return orthonormal(rng, shape[0], k) * np.linspace(3.0 + k, 4.0, k) @ orthonormal(rng, shape[1], k).T + noise


def with_spectrum(rng: np.random.Generator, shape: tuple[int, int], sigma: Matrix) -> Matrix:
    """A matrix of these singular values: they stay when a diagonal matrix is reflected on both sides."""
    a = np.zeros(shape)
    np.fill_diagonal(a, sigma)
    x, y = (v / np.linalg.norm(v) for v in (rng.standard_normal(n) for n in shape))
    a -= 2 * np.outer(x, x @ a)
    return a - 2 * np.outer(a @ y, y)


def angle_tolerance(w: Matrix, sigma: Matrix, k: int) -> float:
    """By how much leading spaces found from a Gram matrix may turn: its error over the gap of squares (Davis & Kahan)."""
    behind = sigma[k] if k < len(sigma) else 0.0
    return 1e-13 + 4 * sum(w.shape) * U * float((sigma**2).sum()) / float(sigma[k - 1] ** 2 - behind**2)


# leading


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_values_and_spaces_are_those_of_numpys_svd(shape: tuple[int, int], dtype: type) -> None:
    rng = np.random.default_rng(sum(shape))
    w = spiked(rng, shape, 6).astype(dtype)
    k = min(6, *shape)
    found = subspaces.leading(w, k)
    u, sigma, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    assert found.sigma.dtype == found.u.dtype == found.v.dtype == np.float64
    assert found.sigma == pytest.approx(sigma, rel=1e-9, abs=1e-7 * sigma[0])
    assert found.sigma[:k] == pytest.approx(sigma[:k], rel=1e-13)
    assert (np.diff(found.sigma) <= 0).all()
    assert (found.u.shape, found.v.shape) == ((shape[0], k), (shape[1], k))
    tolerance = angle_tolerance(w, sigma, k)
    for mine, theirs in ((found.u, u[:, :k]), (found.v, vt[:k].T)):
        assert np.abs(mine.T @ mine - np.eye(k)).max() < 1e-13
        assert np.linalg.norm(theirs - mine @ (mine.T @ theirs), 2) < tolerance  # the sine of the largest angle
        for i in range(k):  # well separated: each vector is determined up to its sign
            assert abs(mine[:, i] @ theirs[:, i]) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (64, 64), (300, 500), (700, 257), (320, 320)], ids=str)
def test_projecting_on_the_leading_vectors_gives_the_best_approximation_of_that_rank(shape: tuple[int, int]) -> None:
    w = spiked(np.random.default_rng(1), shape, 5)
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    best = u[:, :5] * sigma[:5] @ vt[:5]
    found = subspaces.leading(w, 5)
    assert np.abs(found.u @ (found.u.T @ w) - best).max() < 1e-12
    assert np.abs(w @ found.v @ found.v.T - best).max() < 1e-12


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (64, 64), (300, 500), (700, 257), (320, 320)], ids=str)
def test_left_vectors_times_values_times_right_vectors_are_the_best_approximation_of_that_rank(
    shape: tuple[int, int],
) -> None:
    w = spiked(np.random.default_rng(2), shape, 5)
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    found = subspaces.leading(w, 5)
    off = np.abs(found.u * found.sigma[:5] @ found.v.T - u[:, :5] * sigma[:5] @ vt[:5]).max()
    assert off < 1e-10


@pytest.mark.parametrize("shape", [(100, 60), (300, 500), (700, 257)], ids=str)
def test_a_spectrum_in_closed_form_is_found(shape: tuple[int, int]) -> None:
    sigma = np.linspace(10.0, 1.0, min(shape))
    found = subspaces.leading(with_spectrum(np.random.default_rng(3), shape, sigma), 16)
    assert found.sigma == pytest.approx(sigma, rel=1e-12)


@pytest.mark.parametrize("shape", [(100, 60), (300, 500), (700, 257)], ids=str)
def test_what_lies_below_the_resolution_is_not_taken_for_a_direction(shape: tuple[int, int]) -> None:
    sigma = np.concatenate([np.linspace(2.0, 1.0, 20), np.zeros(min(shape) - 20)])
    found = subspaces.leading(with_spectrum(np.random.default_rng(4), shape, sigma), 40)
    assert found.sigma[:20] == pytest.approx(sigma[:20], rel=1e-12)
    assert found.sigma[20:].max() <= found.resolution < 1e-5
    assert subspaces.ks_within([1, 20, 21, 40, 1000], found) == [1, 20]


@pytest.mark.parametrize("shape", [(30, 20), (300, 500), (500, 300)], ids=str)
def test_a_matrix_of_zeros_has_no_direction(shape: tuple[int, int]) -> None:
    found = subspaces.leading(np.zeros(shape, np.float32), 4)
    assert not found.sigma.any()
    assert subspaces.ks_within([1, 4], found) == []


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (300, 500), (500, 300)], ids=str)
def test_more_directions_than_the_shorter_side_has_are_cut(shape: tuple[int, int]) -> None:
    w, short = np.random.default_rng(5).standard_normal(shape), min(shape)
    found = subspaces.leading(w, short + 100)
    assert (found.u.shape, found.v.shape) == ((shape[0], short), (shape[1], short))
    assert subspaces.ks_within([short, short + 1], found) == [short]
    # the whole shorter side is one space, whatever the matrix
    whole = found.v if shape[0] > shape[1] else found.u
    assert np.abs(whole @ whole.T - np.eye(short)).max() < 1e-12


@pytest.mark.parametrize("shape", [(300, 500), (700, 257)], ids=str)
@pytest.mark.parametrize("step", [1, 1000, 77_777, 1 << 24])
def test_how_many_elements_are_taken_at_a_time_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], step: int
) -> None:
    w = spiked(np.random.default_rng(6), shape, 4).astype(np.float32)
    whole = subspaces.leading(w, 4)
    monkeypatch.setattr(subspaces, "STEP", step)
    found = subspaces.leading(w, 4)
    assert found.sigma == pytest.approx(whole.sigma, rel=1e-10)
    for mine, theirs in ((found.u, whole.u), (found.v, whole.v)):
        assert np.abs(mine @ mine.T - theirs @ theirs.T).max() < 1e-12
    for matrix in (np.asfortranarray(w), w[::1, ::1]):
        assert subspaces.leading(matrix, 4).sigma == pytest.approx(whole.sigma, rel=1e-10)


@pytest.mark.parametrize("shape", [(30, 20), (300, 500), (700, 257)], ids=str)
@pytest.mark.parametrize("exponent", [-100, 100])
def test_a_power_of_two_moves_the_values_and_leaves_the_vectors(shape: tuple[int, int], exponent: int) -> None:
    w = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    one, other = subspaces.leading(w, 3), subspaces.leading(np.ldexp(w, exponent), 3)
    assert np.ldexp(one.sigma, exponent) == pytest.approx(other.sigma, rel=1e-12)
    for mine, theirs in ((one.u, other.u), (one.v, other.v)):
        assert np.abs(mine @ mine.T - theirs @ theirs.T).max() < 1e-11


# angles


@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(2, 40),
    ratio=st.floats(0.0, 1.0),
    exponent=st.integers(-13, 0),
)
@settings(max_examples=80)
@example(seed=0, rows=5, ratio=1.0, exponent=0)  # the whole space
@example(seed=1, rows=30, ratio=0.1, exponent=-10)
def test_angles_are_those_of_scipy_however_small(seed: int, rows: int, ratio: float, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    k = max(1, int(ratio * rows))
    a = orthonormal(rng, rows, k)
    b = np.linalg.qr(a + 10.0**exponent * rng.standard_normal((rows, k)))[0]
    found = subspaces.angles(a, b)
    assert found.shape == (k,)
    assert (np.diff(found) >= -1e-15).all()
    wanted = scipy.linalg.subspace_angles(a, b)[::-1]
    # where some are above 45 degrees and some below, scipy takes small ones from their cosines, which costs half the digits
    assert found == pytest.approx(wanted, rel=1e-12, abs=5e-15 if wanted[-1] < math.pi / 4 - 1e-6 else 1e-7)
    assert found == pytest.approx(subspaces.angles(b, a), rel=1e-9, abs=5e-15)


@given(seed=st.integers(0, 2**20), data=st.data())
@settings(max_examples=60)
def test_planes_turned_by_known_angles_have_these_angles(seed: int, data: st.DataObject) -> None:
    wide = st.one_of(
        st.floats(0.0, math.pi / 2),
        st.sampled_from([0.0, 1e-15, 1e-10, 1e-8, 1e-5, math.pi / 4, math.pi / 2 - 1e-10, math.pi / 2]),
    )
    turned = sorted(data.draw(st.lists(wide, min_size=1, max_size=5)))
    k, rng = len(turned), np.random.default_rng(seed)
    basis = orthonormal(rng, 2 * k + 3, 2 * k)
    a, aside = basis[:, :k], basis[:, k:]
    b = a * np.cos(turned) + aside * np.sin(turned)
    mixed_a, mixed_b = (side @ orthonormal(rng, k, k) for side in (a, b))  # other bases of the same spaces
    assert subspaces.angles(mixed_a, mixed_b) == pytest.approx(turned, abs=2e-15)


def test_tiny_angles_are_resolved_where_their_cosine_is_one() -> None:
    e = np.eye(6)
    b = e[:, :2].copy()
    b[:, 1] = math.cos(1e-10) * e[:, 1] + math.sin(1e-10) * e[:, 4]
    assert math.cos(1e-10) == 1.0
    assert subspaces.angles(e[:, :2], b) == pytest.approx([0.0, 1e-10], rel=1e-9, abs=1e-20)


@pytest.mark.parametrize(("rows", "k"), [(3, 1), (50, 7), (50, 50), (400, 64)])
def test_a_space_has_no_angle_with_itself_in_any_basis(rows: int, k: int) -> None:
    rng = np.random.default_rng(rows)
    a = orthonormal(rng, rows, k)
    assert subspaces.angles(a, a).max() < 1e-14
    assert subspaces.angles(a, a @ orthonormal(rng, k, k)).max() < 1e-14
    assert subspaces.angles(a, -a[:, ::-1]).max() < 1e-14


@pytest.mark.parametrize(("rows", "k"), [(2, 1), (50, 7), (50, 25), (400, 64)])
def test_orthogonal_spaces_are_a_right_angle_apart(rows: int, k: int) -> None:
    basis = orthonormal(np.random.default_rng(rows), rows, 2 * k)
    assert subspaces.angles(basis[:, :k], basis[:, k:]) == pytest.approx([math.pi / 2] * k, abs=1e-14)


def test_spaces_too_large_to_miss_each_other_share_directions() -> None:
    rng = np.random.default_rng(8)
    found = subspaces.angles(orthonormal(rng, 10, 8), orthonormal(rng, 10, 8))
    assert (found[:6] < 1e-14).all()  # 8 + 8 - 10
    assert (found[6:] > 1e-3).all()


# masks


def expected(magnitudes: Matrix, changed: Matrix, share: float) -> Fraction:
    """By full sorting: the changed elements strictly below the threshold, and of those at it the part that is wanted."""
    values, touched = magnitudes.ravel().tolist(), changed.ravel().tolist()
    wanted = Fraction(share) * len(values)
    threshold = sorted(values)[min(math.ceil(wanted), len(values)) - 1]
    below = [moved for value, moved in zip(values, touched, strict=True) if value < threshold]
    tied = [moved for value, moved in zip(values, touched, strict=True) if value == threshold]
    return sum(below) + (wanted - len(below)) / len(tied) * sum(tied)


def in_pieces(magnitudes: Matrix, changed: Matrix, cuts: Sequence[int] = ()) -> subspaces.Slices:
    """The elements in slices that begin at `cuts`."""
    edges = [0, *sorted(cuts), magnitudes.size]

    def slices() -> Iterator[tuple[Matrix, Matrix]]:
        for begin, end in itertools.pairwise(edges):
            yield magnitudes.ravel()[begin:end], changed.ravel()[begin:end]

    return slices


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
def test_distinct_magnitudes_are_counted_exactly(share: float) -> None:
    rng = np.random.default_rng(9)
    magnitudes = rng.permutation(np.unique(np.abs(rng.standard_normal(13_000)).astype(np.float32))[:12_000])
    changed = rng.random(12_000) < 0.2
    rank = magnitudes.argsort().argsort()
    found = subspaces.changed_among_smallest(in_pieces(magnitudes, changed), 12_000, share)
    assert found == pytest.approx(int(changed[rank < round(share * 12_000)].sum()), abs=1e-8)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.33, 0.5, 0.75, 0.99])
def test_tied_magnitudes_count_in_proportion(share: float) -> None:
    rng = np.random.default_rng(10)
    magnitudes = (rng.integers(0, 9, 5_000) / 8).astype(np.float32)
    changed = rng.random(5_000) < 0.1
    found = subspaces.changed_among_smallest(in_pieces(magnitudes, changed), 5_000, share)
    assert found == pytest.approx(float(expected(magnitudes, changed, share)), abs=1e-9)


@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=6),
    changed=st.lists(st.booleans(), min_size=6, max_size=6),
    data=st.data(),
)
@settings(max_examples=60)
def test_ties_count_as_the_mean_over_all_ways_of_breaking_them(
    values: list[float], changed: list[bool], data: st.DataObject
) -> None:
    wanted = data.draw(st.integers(1, len(values)))
    orders = list(itertools.permutations(range(len(values))))
    total = 0
    for order in orders:  # a stable sort breaks ties by the order in which they come
        smallest = sorted(order, key=values.__getitem__)[:wanted]
        total += sum(changed[i] for i in smallest)
    magnitudes, touched = np.array(values, np.float32), np.array(changed[: len(values)])
    found = subspaces.changed_among_smallest(in_pieces(magnitudes, touched), len(values), wanted / len(values))
    assert found == pytest.approx(total / len(orders), abs=1e-9)


TINY = float(np.finfo(np.float32).smallest_subnormal)
MAGNITUDES = st.one_of(
    st.sampled_from([0.0, TINY, 2 * TINY, 3 * TINY, 65535 * TINY, 65536 * TINY, 65537 * TINY, 1.0, 3.4028235e38]),
    st.floats(0.0, 3.4028234663852886e38, width=32),
    st.integers(0, 5).map(lambda i: 1.0 + i * 2.0**-23),  # of one upper half
    st.integers(0, 5).map(lambda i: 1.0 + i * 2.0**-7),  # bf16 neighbours
)


@given(
    values=st.lists(MAGNITUDES, min_size=1, max_size=40),
    share=st.one_of(st.floats(0.01, 0.99), st.sampled_from([0.01, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.99])),
    seed=st.integers(0, 2**20),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
@settings(max_examples=100)
@example(values=[0.0] * 7, share=0.3, seed=0, density=0.5, cuts=[])
@example(values=[TINY] * 5 + [0.0] * 5, share=0.5, seed=1, density=0.5, cuts=[3])
def test_any_magnitudes_at_any_share_in_any_slices(
    values: list[float], share: float, seed: int, density: float, cuts: list[int]
) -> None:
    magnitudes = np.array(values, np.float32)
    changed = np.random.default_rng(seed).random(len(values)) < density
    slices = in_pieces(magnitudes, changed, [min(cut, len(values)) for cut in cuts])
    found = subspaces.changed_among_smallest(slices, len(values), share)
    assert found == pytest.approx(float(expected(magnitudes, changed, share)), abs=1e-9)
    unchanged = subspaces.changed_among_smallest(in_pieces(magnitudes, ~changed), len(values), share)
    assert found + unchanged == pytest.approx(share * len(values), abs=1e-9)  # the mask is full, whatever it holds


CLOSE = st.one_of(
    MAGNITUDES,
    st.floats(0.0, allow_nan=False, allow_infinity=False),
    st.integers(0, 5).map(lambda i: 1.0 + i * 2.0**-52),  # which float32 cannot tell apart
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)).map(
        lambda i: 1.0 + i[0] * 2.0**-4 + i[1] * 2.0**-20 + i[2] * 2.0**-36  # a difference in each 16 bits
    ),
    st.sampled_from([5e-324, 1e-323, 2.2250738585072014e-308, 1e200, 1.7976931348623157e308]),
)


@given(
    values=st.lists(CLOSE, min_size=1, max_size=40),
    share=st.one_of(st.floats(0.01, 0.99), st.sampled_from([0.1, 0.5, 0.99])),
    seed=st.integers(0, 2**20),
    cuts=st.lists(st.integers(0, 40), max_size=3),
)
@settings(max_examples=80)
def test_magnitudes_of_float64_are_told_apart_to_the_last_bit(
    values: list[float], share: float, seed: int, cuts: list[int]
) -> None:
    magnitudes, changed = np.array(values), np.random.default_rng(seed).random(len(values)) < 0.5
    slices = in_pieces(magnitudes, changed, [min(cut, len(values)) for cut in cuts])
    found = subspaces.changed_among_smallest(slices, len(values), share)
    assert found == pytest.approx(float(expected(magnitudes, changed, share)), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, TINY, 1e-40, 1.0, 3.4028235e38])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_equal_magnitudes_hold_their_share_of_the_changes(value: float, share: float) -> None:
    magnitudes, changed = np.full(1000, value, np.float32), np.arange(1000) < 123
    found = subspaces.changed_among_smallest(in_pieces(magnitudes, changed), 1000, share)
    assert found == pytest.approx(share * 123, abs=1e-9)


def test_values_of_the_same_upper_half_are_told_apart() -> None:
    magnitudes = (1 + np.arange(100) * 2.0**-23).astype(np.float32)
    assert len(np.unique(magnitudes)) == 100
    assert len(np.unique(magnitudes.view(np.int32) >> 16)) == 1
    changed = np.arange(100) >= 95
    assert subspaces.changed_among_smallest(in_pieces(magnitudes, changed), 100, 0.97) == pytest.approx(2.0, abs=1e-9)
    assert subspaces.changed_among_smallest(in_pieces(magnitudes, changed), 100, 0.95) == pytest.approx(0.0, abs=1e-9)


def test_where_nothing_or_everything_changed_the_count_is_none_or_the_mask() -> None:
    magnitudes = np.random.default_rng(11).random(500).astype(np.float32)
    for share in (0.1, 0.5, 0.9):
        assert subspaces.changed_among_smallest(in_pieces(magnitudes, np.zeros(500, bool)), 500, share) == 0
        everything = subspaces.changed_among_smallest(in_pieces(magnitudes, np.ones(500, bool)), 500, share)
        assert everything == pytest.approx(share * 500, abs=1e-9)


def test_matrices_as_slices_count_like_flat_ones() -> None:
    rng = np.random.default_rng(12)
    magnitudes, changed = rng.random((30, 20)).astype(np.float32), rng.random((30, 20)) < 0.3
    found = subspaces.changed_among_smallest(lambda: iter([(magnitudes, changed)]), 600, 0.4)
    by_rows = subspaces.changed_among_smallest(
        lambda: iter([(magnitudes[:11], changed[:11]), (magnitudes[11:], changed[11:])]), 600, 0.4
    )
    assert found == by_rows == pytest.approx(float(expected(magnitudes, changed, 0.4)), abs=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("step", [1, 90, 1000, 1 << 20])
def test_slices_hold_every_row_once_beside_its_changes(monkeypatch: pytest.MonkeyPatch, step: int, dtype: type) -> None:
    monkeypatch.setattr(subspaces, "STEP", step)
    rng = np.random.default_rng(13)
    w, mask = rng.standard_normal((41, 30)).astype(dtype), rng.random((41, 30)) < 0.5
    u, sigma, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)

    def changed(rows: slice) -> Matrix:
        return mask[rows]

    def gathered(slices: Callable[[], Iterator[tuple[Matrix, Matrix]]]) -> Matrix:
        parts = list(slices())
        assert all(values.dtype == w.dtype for values, _ in parts)
        assert np.array_equal(np.concatenate([touched for _, touched in parts]), mask)
        assert len(list(slices())) == len(parts)  # they are gone through twice
        return np.concatenate([values for values, _ in parts])

    assert np.array_equal(gathered(subspaces.magnitudes(w, changed)), np.abs(w))
    best = np.abs(u[:, :7] * sigma[:7] @ vt[:7])
    assert gathered(subspaces.principal_magnitudes(w, vt[:7].T, changed)) == pytest.approx(best, abs=1e-6)


# drift


def test_drift_is_relative_to_the_base_and_undefined_for_zeros() -> None:
    assert subspaces.drift(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == 0.0
    assert subspaces.drift(np.array([3.0, 4.0]), np.zeros(2)) == 1.0
    assert subspaces.drift(np.array([3.0, 4.0]), np.array([6.0, 8.0])) == pytest.approx(1.0)
    assert subspaces.drift(np.zeros(2), np.ones(2)) is None
