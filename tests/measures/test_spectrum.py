"""Spectra and ranks of whole checkpoints against float64 numpy on the float32 difference, matrix by matrix."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits

import paramdiff
from paramdiff import checkpoints, columns
from paramdiff.arrays import numpy_arrays
from paramdiff.engines import processes, threads, torch_device
from paramdiff.measures import fold, gathering, make_options, select, spectrum
from paramdiff.measures.gathering import Found
from paramdiff.pairing import Alignment, align
from paramdiff.streaming import Buffers, spans, whole_spans, windows

DATA = Path(__file__).parent.parent.parent / "sample_data"
DEVICES = ["cpu", "torch:cpu"]
U = 2.0**-53
ENERGIES = {"energy_rank_90": 0.90, "energy_rank_95": 0.95, "energy_rank_99": 0.99}
WHOLE = ("numeric_rank", "rank_at_1e-2", "rank_at_1e-3", *ENERGIES)
Tensors = dict[str, torch.Tensor]
Matrix = np.ndarray[Any, Any]


@pytest.fixture(autouse=True, scope="module")
def one_blas_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def write(tmp: Path, a: Tensors, b: Tensors) -> tuple[Path, Path]:
    for name, tensors in (("a", a), ("b", b)):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp / f"{name}.safetensors")
    return tmp / "a.safetensors", tmp / "b.safetensors"


def measure(tmp: Path, a: Tensors, b: Tensors, device: str = "cpu", **options: Any) -> paramdiff.Diff:
    return paramdiff.compare(*write(tmp, a, b), measures=["change", "spectrum"], device=device, **options)


# The reference


def difference(a: torch.Tensor, b: torch.Tensor) -> Matrix:
    """Δ in the arithmetic of metrics.md §1, in float64, as (out, the rest)."""
    if a.is_floating_point() or b.is_floating_point():
        wide = torch.float64 in (a.dtype, b.dtype) or not (a.is_floating_point() and b.is_floating_point())
        kind = torch.float64 if wide else torch.float32
    else:
        kind = torch.int64
    delta = (b.to(kind) - a.to(kind)).double().numpy()
    return delta.reshape(delta.shape[0], -1)


def scaled(delta: Matrix) -> tuple[Matrix, int]:
    """Δ · 2^−exponent with its largest element near one: float64 does not hold the squares of its own ends."""
    exponent = int(np.frexp(np.abs(delta).max(initial=0.0))[1])
    return np.ldexp(delta, -exponent), exponent


_known: dict[tuple[tuple[int, ...], bytes], Matrix] = {}


def svd(a: Matrix) -> Matrix:
    """Most matrices of this file are looked at more than once."""
    key = (a.shape, hashlib.sha256(a.tobytes()).digest())
    if key not in _known:
        _known[key] = np.linalg.svd(a, compute_uv=False)
    return _known[key]


def check(row: dict[str, Any], sigma: Matrix, delta: Matrix) -> None:
    """One row of ranks.parquet and its singular values, all recomputed from Δ."""
    assert (row["rows"], row["cols"], row["full_rank"]) == (*delta.shape, min(delta.shape)), row
    assert row["note"] is None
    small, exponent = scaled(delta)
    true, energy = svd(small), float((small**2).sum())
    ours, resolution = np.ldexp(sigma, -exponent), math.ldexp(row["resolution"], -exponent)
    own = (max(delta.shape) + 8) * U * float(true[0])
    assert (len(ours), sigma[0] if energy else 0.0) == (min(delta.shape), row["sigma_1"])
    assert (np.diff(ours) <= 0).all()
    close = np.abs(ours - true) <= own + (resolution if row["method"] == "svd" else 0)
    close |= np.abs(ours**2 - true**2) <= resolution**2 + own * (2 * true + own)
    assert close.all(), (row["name"], ours[~close], true[~close])
    if not energy:
        assert [row[name] for name in WHOLE] == [0] * len(WHOLE)
        assert (row["sigma_1"], row["frobenius"], row["stable_rank"], row["entropy_rank"]) == (0.0, 0.0, 0.0, 0.0)
        assert (row["top1_share"], row["energy_error"], row["rank_uncertain"]) == (None, None, False)
        return
    assert resolution < 1e-5 * true[0]
    assert row["sigma_1"] == pytest.approx(np.ldexp(true[0], exponent), rel=1e-12)
    assert row["frobenius"] == pytest.approx(np.ldexp(math.sqrt(energy), exponent), rel=1e-12)
    assert float((ours**2).sum()) == pytest.approx(energy, rel=1e-12)
    assert 0 <= row["energy_error"] < 1e-12
    cut = float(true[0]) * max(delta.shape) * 2.0**-23
    if not row["rank_uncertain"]:
        assert row["numeric_rank"] == np.count_nonzero(true > cut), row["name"]
    assert row["rank_at_1e-2"] == np.count_nonzero(true > 1e-2 * true[0]), row["name"]
    assert row["rank_at_1e-3"] == np.count_nonzero(true > 1e-3 * true[0]), row["name"]
    for name, share in ENERGIES.items():
        shares = np.cumsum(true**2) / (true**2).sum()
        assert row[name] == np.count_nonzero(shares < share - 1e-11) + 1, (row["name"], name)
    for name in ("numeric_rank", *ENERGIES):
        assert row[f"{name}_percent"] == pytest.approx(100 * row[name] / min(delta.shape))
    assert row["stable_rank"] == pytest.approx(energy / true[0] ** 2, rel=1e-12)
    assert row["top1_share"] == pytest.approx(true[0] / math.sqrt(energy), rel=1e-12)
    spread = entropy_rank(np.sqrt(true**2 + resolution**2)) / entropy_rank(true) - 1
    assert row["entropy_rank"] == pytest.approx(entropy_rank(true), rel=1e-11 + 2 * abs(spread))
    if row["method"] == "sparse":
        assert np.count_nonzero(true > own) <= row["structural_rank"] <= min(delta.shape)
        assert row["components"] >= 1
    else:
        assert (row["structural_rank"], row["components"]) == (None, None)


def entropy_rank(sigma: Matrix) -> float:
    p = sigma[sigma > 0] / sigma.sum()
    return math.exp(-math.fsum(p * np.log(p)))


def sigmas(diff: paramdiff.Diff, name: str, expert: int | None = None) -> Matrix:
    table = diff.tables["spectra"].filter(pl.col("name") == name)
    if expert is not None:
        table = table.filter(pl.col("expert") == expert)
    assert table["index"].to_list() == list(range(1, table.height + 1))
    return table["sigma"].to_numpy()


def check_all(diff: paramdiff.Diff, a: Tensors, b: Tensors) -> dict[str, dict[str, Any]]:
    rows = {row["name"]: row for row in diff.ranks.to_dicts()}
    assert list(rows) == [name for name in diff.tensors["name"] if a[name].ndim > 1]
    for name, row in rows.items():
        check(row, sigmas(diff, name), difference(a[name], b[name]))
    return rows


# Updates of every kind


def gaussian(rng: torch.Generator, m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=rng, dtype=torch.float64)


def sparse(density: float) -> Callable[[torch.Generator, int, int], torch.Tensor]:
    return lambda rng, m, n: gaussian(rng, m, n) * (torch.rand(m, n, generator=rng) < density)


def blocks(rng: torch.Generator, m: int, n: int) -> torch.Tensor:
    size = max(m, n)
    a = torch.block_diag(*[gaussian(rng, 1 + k % 4, 1 + k % 3) for k in range(size)])[:m, :n]
    return a[torch.randperm(m, generator=rng)][:, torch.randperm(n, generator=rng)]


def few_rows(rng: torch.Generator, m: int, n: int) -> torch.Tensor:
    return gaussian(rng, m, n) * (torch.arange(m) % 9 == 2)[:, None]


KINDS: dict[str, Callable[[torch.Generator, int, int], torch.Tensor]] = {
    "gaussian": gaussian,
    "low_rank": lambda rng, m, n: gaussian(rng, m, 3) @ gaussian(rng, 3, n),
    "zero": lambda rng, m, n: torch.zeros(m, n, dtype=torch.float64),
    "graded": lambda rng, m, n: gaussian(rng, m, n) * 10.0 ** -torch.linspace(0, 12, m, dtype=torch.float64)[:, None],
    "duplicated": lambda rng, m, n: gaussian(rng, m, n)[torch.arange(m) // 3],
    "one_entry": lambda rng, m, n: gaussian(rng, m, n) * (torch.arange(m * n).view(m, n) == m * n // 2),
    "one_row": lambda rng, m, n: gaussian(rng, m, n) * (torch.arange(m) == m // 2)[:, None],
    "one_column": lambda rng, m, n: gaussian(rng, m, n) * (torch.arange(n) == n // 2),
    "few_rows": few_rows,
    "blocks": blocks,
    **{f"density_{d}".replace(".", "_"): sparse(d) for d in (0.0005, 0.005, 0.015, 0.1, 0.5, 0.8)},
}
SHAPES = [(1, 1), (1, 70), (70, 1), (48, 48), (60, 200), (200, 60), (200, 340), (700, 100), (2500, 30)]


@cache
def everything(kind: torch.dtype, *, on_zeros: bool = False) -> tuple[Tensors, Tensors]:
    """A pair with every kind of update in every shape, on a base of weights or of zeros."""
    rng, a, b = torch.Generator().manual_seed(1), {}, {}
    for m, n in SHAPES:
        for name, make in KINDS.items():
            base = torch.zeros(m, n, dtype=torch.float64) if on_zeros else gaussian(rng, m, n) * 0.05
            key = f"layers.{m}.{name}_{m}x{n}"
            a[key] = base.to(kind)
            b[key] = (a[key].double() + 1e-2 * make(rng, m, n)).to(kind)
    return a, b


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("on_zeros", [False, True], ids=["on weights", "on zeros"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_kind_of_update(tmp_path: Path, kind: torch.dtype, on_zeros: bool, device: str) -> None:
    a, b = everything(kind, on_zeros=on_zeros)
    rows = check_all(measure(tmp_path, a, b, device), a, b)
    methods = {row["method"] for row in rows.values()}
    assert methods == ({"svd", "gram", "sparse"} if device == "cpu" else {"svd", "gram"})
    assert {row["energy_rank_90"] for row in rows.values()} >= {0, 1, 2}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "scale"),
    [(torch.float32, 1e-38), (torch.float32, 1e-43), (torch.float32, 1e30), (torch.bfloat16, 1e-38), (torch.bfloat16, 1e30),
     (torch.float64, 1e200), (torch.float64, 1e-200), (torch.float64, 1e300), (torch.float64, 1e-305)],
)  # fmt: skip
def test_every_scale(tmp_path: Path, kind: torch.dtype, scale: float, device: str) -> None:
    a, b = everything(torch.float64)
    some = ("48x48", "gaussian_200x340", "density_0_015_200x340", "low_rank_700x100", "few_rows_700x100")
    a = {name: (tensor * scale).to(kind) for name, tensor in a.items() if name.endswith(some)}
    b = {name: (b[name] * scale).to(kind) for name in a}
    check_all(measure(tmp_path, a, b, device), a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_norms_beyond_float64_are_infinite_and_ranks_are_not_lost(tmp_path: Path, device: str) -> None:
    a = {"w": torch.zeros(20, 30, dtype=torch.float64)}
    b = {"w": torch.full((20, 30), 1.5e308, dtype=torch.float64)}
    row = measure(tmp_path, a, b, device).ranks.row(0, named=True)
    assert (row["sigma_1"], row["frobenius"], row["numeric_rank"], row["note"]) == (math.inf, math.inf, 1, None)
    assert row["stable_rank"] == pytest.approx(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind_a", "kind_b"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16),
     (torch.float32, torch.float64), (torch.float8_e4m3fn, torch.bfloat16), (torch.int8, torch.float32)],
    ids=str,
)  # fmt: skip
def test_sides_of_two_types(tmp_path: Path, kind_a: torch.dtype, kind_b: torch.dtype, device: str) -> None:
    rng = torch.Generator().manual_seed(2)
    a = {f"w{m}": gaussian(rng, m, n).mul(3).to(kind_a) for m, n in ((40, 50), (300, 400))}
    b = {name: (tensor.double() + gaussian(rng, *tensor.shape) * 0.1).to(kind_b) for name, tensor in a.items()}
    check_all(measure(tmp_path, a, b, device), a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.uint16, torch.bool], ids=str)
def test_integers_are_no_weights_and_have_no_rank(tmp_path: Path, kind: torch.dtype, device: str) -> None:
    rng, high = torch.Generator().manual_seed(3), 2 if kind == torch.bool else 100
    old, new = (torch.randint(0, high, (40, 30), generator=rng).to(kind) for _ in range(2))
    row = measure(tmp_path, {"w": old}, {"w": new}, device).ranks.row(0, named=True)
    assert (row["method"], row["numeric_rank"], row["note"]) == (None, None, "whole numbers, not weights")


# Matrices that are not stored as such


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", [(1, 40, 30), (5, 40, 30), (3, 300, 500), (4, 500, 300), (7, 1, 9), (7, 9, 1), (2, 1100, 130)], ids=str
)
def test_stacks_of_experts_are_split(tmp_path: Path, shape: tuple[int, int, int], device: str) -> None:
    name, rng = "model.layers.4.mlp.experts.down_proj", torch.Generator().manual_seed(4)
    a, b = torch.randn(shape, generator=rng), torch.empty(shape)
    makes = [gaussian, sparse(0.01), KINDS["zero"], KINDS["low_rank"], few_rows, sparse(0.3)]
    for expert in range(shape[0]):
        b[expert] = a[expert] + makes[expert % len(makes)](rng, *shape[1:])
    diff = measure(tmp_path, {name: a}, {name: b}, device)
    assert diff.ranks["expert"].to_list() == list(range(shape[0]))
    assert set(diff.ranks["layer"]) == {4}
    assert set(diff.ranks["module"]) == {"experts.down_proj"}
    for row in diff.ranks.to_dicts():
        expert = row["expert"]
        check(row, sigmas(diff, name, expert), difference(a[expert], b[expert]))
    if device == "cpu" and shape == (4, 500, 300):  # a block ends amid an expert
        assert diff.ranks["method"].to_list() == ["gram", "sparse", "sparse", "gram"]


@pytest.mark.parametrize("device", DEVICES)
def test_experts_in_tensors_of_their_own(tmp_path: Path, device: str) -> None:
    rng = torch.Generator().manual_seed(5)
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in (0, 1) for e in (0, 3)]
    a = {name: torch.randn(20, 30, generator=rng) for name in names}
    b = {name: tensor + torch.randn(20, 30, generator=rng) for name, tensor in a.items()}
    diff = measure(tmp_path, a, b, device)
    check_all(diff, a, b)
    assert diff.ranks.select("name", "layer", "expert", "module").rows() == [
        (name, int(name.split(".")[2]), int(name.split(".")[5]), "experts.up_proj") for name in names
    ]
    assert diff.tables["spectra"].filter(pl.col("name") == names[1])["expert"].unique().to_list() == [3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (16, 5, 7), (300, 20, 5, 5), (1, 2, 3, 4), (6, 1, 1, 1)], ids=str)
def test_kernels_of_convolutions_are_rows_of_output_channels(tmp_path: Path, shape: tuple[int, ...], device: str) -> None:
    rng = torch.Generator().manual_seed(6)
    a = {"conv.weight": torch.randn(shape, generator=rng)}
    b = {"conv.weight": a["conv.weight"] + torch.randn(shape, generator=rng)}
    diff = measure(tmp_path, a, b, device)
    check_all(diff, a, b)
    assert diff.ranks["expert"].to_list() == [None]


@pytest.mark.parametrize("device", DEVICES)
def test_vectors_and_scalars_have_no_row(tmp_path: Path, device: str) -> None:
    a = {"norm.weight": torch.ones(9), "scale": torch.tensor(1.0), "up.weight": torch.zeros(2, 3), "nothing": torch.ones(0)}
    diff = measure(tmp_path, a, {name: tensor + 1 for name, tensor in a.items()}, device)
    assert diff.ranks["name"].to_list() == ["up.weight"]
    assert diff.tensors.height == 4


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_of_vectors_has_empty_tables(tmp_path: Path, device: str) -> None:
    diff = measure(tmp_path, {"norm.weight": torch.ones(9)}, {"norm.weight": torch.zeros(9)}, device)
    for table in ("ranks", "spectra"):
        assert diff.tables[table].height == 0
        assert {k: str(v) for k, v in diff.tables[table].schema.items()} == types(table)
    assert diff.ranks_by()["matrices"].to_list() == [0]
    assert diff.ranks_by("layer").height == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 3, 2, 2)], ids=str)
def test_matrices_without_elements_have_a_note(tmp_path: Path, shape: tuple[int, ...], device: str) -> None:
    a = {"layers.0.none": torch.zeros(shape), "layers.1.some": torch.zeros(4, 3)}
    b = {"layers.0.none": torch.zeros(shape), "layers.1.some": torch.eye(4, 3)}
    diff = measure(tmp_path, a, b, device)
    none, some = diff.ranks.to_dicts()
    assert (none["note"], none["method"], none["full_rank"], none["numeric_rank"]) == ("no elements", None, None, None)
    assert (some["note"], some["numeric_rank"], some["energy_rank_90"]) == (None, 3, 3)
    assert diff.tables["spectra"]["name"].unique().to_list() == ["layers.1.some"]


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_stacks_without_elements_have_a_note(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "layers.0.experts.up"
    diff = measure(tmp_path, {name: torch.zeros(shape)}, {name: torch.zeros(shape)})
    assert set(diff.ranks["note"]) == {"no elements"}
    assert diff.ranks.height >= 1
    assert diff.tables["spectra"].height == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_tied_head_has_a_note_instead_of_a_spectrum(tmp_path: Path, device: str) -> None:
    embedding = torch.randn(12, 4)
    sides = {
        "base": {"model.embed_tokens.weight": embedding},
        "tuned": {"model.embed_tokens.weight": embedding + 1, "lm_head.weight": embedding + 1},
    }
    for name, tensors in sides.items():
        (tmp_path / name).mkdir()
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"tie_word_embeddings": true}')
    diff = paramdiff.compare(tmp_path / "base", tmp_path / "tuned", measures=["change", "spectrum"], device=device)
    rows = {row["name"]: row for row in diff.ranks.to_dicts()}
    head, first = rows["lm_head.weight"], rows["model.embed_tokens.weight"]
    assert "tied to model.embed_tokens.weight" in head["note"]
    assert (head["method"], head["full_rank"], head["numeric_rank"]) == (None, None, None)
    check(first, sigmas(diff, "model.embed_tokens.weight"), difference(embedding, embedding + 1))
    assert diff.tables["spectra"]["name"].unique().to_list() == ["model.embed_tokens.weight"]
    pooled = diff.ranks_by().row(0, named=True)
    assert (pooled["matrices"] - pooled["without_spectrum"], pooled["full_rank"]) == (1, 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(300, 310), (310, 300), (10, 12)], ids=str)
def test_of_a_resized_vocabulary_the_common_rows_count(tmp_path: Path, rows: tuple[int, int], device: str) -> None:
    name, rng, common = "model.embed_tokens.weight", torch.Generator().manual_seed(8), min(rows)
    a, b = (torch.randn(count, 250, generator=rng) for count in rows)
    diff = measure(tmp_path, {name: a}, {name: b}, device)
    check(diff.ranks.row(0, named=True), sigmas(diff, name), difference(a[:common], b[:common]))


# Values that have no difference


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(
    ("old", "new"),
    [(1.0, math.nan), (math.nan, 1.0), (math.nan, math.nan), (math.inf, math.inf), (math.inf, -math.inf), (2.0, math.inf),
     (-math.inf, 3.0), (math.inf, math.nan)],
    ids=str,
)  # fmt: skip
def test_nan_and_infinity_on_either_side_leave_a_note(
    tmp_path: Path, kind: torch.dtype, share: float, old: float, new: float, device: str
) -> None:
    rng = torch.Generator().manual_seed(9)
    a, b = {}, {}
    for name, (m, n) in {"layers.0.bad": (30, 40), "layers.1.bad": (660, 100), "layers.2.good": (30, 40)}.items():
        a[name] = gaussian(rng, m, n).to(kind)
        b[name] = (a[name].double() + sparse(share)(rng, m, n)).to(kind)
        if name.endswith("bad"):
            for place in ((0, 0), (m // 2, 3), (m - 1, n - 1)):
                a[name][place], b[name][place] = old, new
    diff = measure(tmp_path, a, b, device)
    *bad, good = diff.ranks.to_dicts()
    for row in bad:
        assert row["note"] == "3 elements are NaN or infinite"
        assert {k for k, v in row.items() if v is not None} == {"name", "layer", "module", "kind", "rows", "cols", "note"}
    check(good, sigmas(diff, "layers.2.good"), difference(a["layers.2.good"], b["layers.2.good"]))
    assert diff.tables["spectra"]["name"].unique().to_list() == ["layers.2.good"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.001, 1.0])
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("shape", [(4, 20, 30), (4, 300, 500)], ids=str)
def test_one_expert_with_nan_leaves_the_others_theirs(
    tmp_path: Path, shape: tuple[int, int, int], moved: bool, share: float, device: str
) -> None:
    name, rng = "layers.0.mlp.experts.down_proj", torch.Generator().manual_seed(10)
    a = torch.randn(shape, generator=rng)
    b = torch.stack([x + sparse(share)(rng, *shape[1:]).float() for x in a])
    a[2, 5, 7] = b[2, 5, 7] = a[2, -1, -1] = math.nan
    b[2, -1, -1] = 1.0 if moved else math.nan
    diff = measure(tmp_path, {name: a}, {name: b}, device)
    notes = diff.ranks["note"].to_list()
    assert notes == [None, None, "2 elements are NaN or infinite", None]
    for expert in (0, 1, 3):
        check(diff.ranks.row(expert, named=True), sigmas(diff, name, expert), difference(a[expert], b[expert]))
    assert diff.tables["spectra"]["expert"].unique().sort().to_list() == [0, 1, 3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "high"), [(torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float64, 1.7e308)], ids=str
)
@pytest.mark.parametrize("shape", [(20, 30), (300, 400), (700, 100)], ids=str)
@pytest.mark.parametrize("share", [0.001, 1.0])
def test_a_difference_beyond_its_type_leaves_a_note(
    tmp_path: Path, kind: torch.dtype, high: float, shape: tuple[int, int], share: float, device: str
) -> None:
    rng = torch.Generator().manual_seed(11)
    a = {name: gaussian(rng, *shape).to(kind) for name in ("layers.0.over", "layers.1.fine")}
    b = {name: (tensor.double() + sparse(share)(rng, *shape)).to(kind) for name, tensor in a.items()}
    a["layers.0.over"][3, 4], b["layers.0.over"][3, 4] = high, -high
    diff = measure(tmp_path, a, b, device)
    over, fine = diff.ranks.to_dicts()
    assert "beyond the range" in over["note"]
    assert (over["method"], over["numeric_rank"], over["sigma_1"]) == (None, None, None)
    check(fine, sigmas(diff, "layers.1.fine"), difference(a["layers.1.fine"], b["layers.1.fine"]))


def test_float16_differences_cannot_overflow(tmp_path: Path) -> None:
    a = {"w": torch.full((20, 30), 6e4, dtype=torch.float16)}
    b = {"w": torch.full((20, 30), -6e4, dtype=torch.float16)}
    check_all(measure(tmp_path, a, b), a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(20, 30), (500, 200), (200, 500)], ids=str)
def test_zeros_that_change_their_sign_are_no_update(tmp_path: Path, shape: tuple[int, int], device: str) -> None:
    a, b = {"w": torch.zeros(shape)}, {"w": -torch.zeros(shape)}
    rows = check_all(measure(tmp_path, a, b, device), a, b)
    assert rows["w"]["numeric_rank"] == 0


def test_a_matrix_too_large_for_memory_leaves_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = {"layers.0.large": torch.zeros(300, 500), "layers.1.small": torch.zeros(3, 5)}
    b = {name: tensor + torch.eye(*tensor.shape) for name, tensor in a.items()}
    monkeypatch.setattr("paramdiff.measures.matrices.memory", lambda: 1_000_000)
    diff = measure(tmp_path, a, b)
    large, small = diff.ranks.to_dicts()
    assert "GB of memory" in large["note"]
    assert (large["method"], small["numeric_rank"], small["note"]) == (None, 3, None)


# Real updates


@pytest.mark.parametrize("run", ["rl-adamw", "rl-sgd", "sft"])
def test_numeric_rank_is_that_of_torch_on_real_updates(run: str) -> None:
    def tensors(directory: Path) -> Tensors:
        return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}

    a, b = tensors(DATA / "base"), tensors(DATA / run)
    diff = paramdiff.compare(DATA / "base", DATA / run, measures=["change", "spectrum"])
    rows, certain = diff.ranks.to_dicts(), 0
    for row in rows:
        name = row["name"]
        delta = (b[name].float() - a[name].float()).reshape(a[name].shape[0], -1)
        check(row, sigmas(diff, name), delta.double().numpy())
        if not row["rank_uncertain"]:
            certain += 1
            assert row["numeric_rank"] == int(torch.linalg.matrix_rank(delta)), name
    assert certain >= len(rows) - 1
    assert len(rows) == sum(tensor.ndim > 1 for tensor in a.values())


# Routes, blocks, engines

OPTIONS = make_options()
MEASURED = select(["spectrum"], OPTIONS)


def sheet(rng: torch.Generator, m: int, n: int, touched: int) -> torch.Tensor:
    """An m × n update that touches some of the rows, in no order."""
    a = torch.zeros(m, n)
    a[torch.randperm(m, generator=rng)[:touched]] = torch.randn(touched, n, generator=rng)
    return a


ROUTES: dict[str, tuple[Callable[[torch.Generator], torch.Tensor], str]] = {
    "nothing": (lambda rng: torch.zeros(300, 300), "sparse"),
    "entries alone": (lambda rng: sparse(0.01)(rng, 400, 200).float(), "sparse"),
    "entries alone, wide": (lambda rng: sparse(0.01)(rng, 60, 1500).float(), "sparse"),
    "small": (lambda rng: torch.randn(60, 70, generator=rng), "svd"),
    "tall, fewer rows than columns": (lambda rng: sheet(rng, 1100, 64, 50), "svd"),
    "tall, as many rows as columns": (lambda rng: sheet(rng, 1100, 64, 64), "svd"),
    "tall, one row more": (lambda rng: sheet(rng, 1100, 64, 65), "gram"),
    "tall, twice as many": (lambda rng: sheet(rng, 1100, 64, 128), "gram"),
    "tall, one row more than that": (lambda rng: sheet(rng, 1100, 64, 129), "gram"),
    "tall, all rows": (lambda rng: torch.randn(1100, 64, generator=rng), "gram"),
    "tall, many touched, few at first": (lambda rng: sparse(0.04)(rng, 1100, 64).float(), "gram"),
    "tall, every row a little": (lambda rng: sparse(0.3)(rng, 1100, 64).float(), "gram"),
    "tall, fewer rows than columns, many": (lambda rng: sheet(rng, 450, 400, 300), "gram"),
    "square": (lambda rng: torch.randn(260, 260, generator=rng), "gram"),
    "thin": (lambda rng: torch.randn(9000, 8, generator=rng), "gram"),
    "wide": (lambda rng: torch.randn(64, 1100, generator=rng), "gram"),
    "wide, few columns": (lambda rng: sheet(rng, 1100, 64, 60).T.contiguous(), "svd"),
    "wide and thin": (lambda rng: torch.randn(5, 14000, generator=rng), "svd"),
    "holed": (lambda rng: torch.randn(400, 300, generator=rng) * (torch.arange(300) % 3 == 0), "gram"),
}


def pairs(route: str, kind: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    rng = torch.Generator().manual_seed(12)
    update = ROUTES[route][0](rng)
    a = torch.randn(update.shape, generator=rng).to(kind)
    return {"w": a}, {"w": (a.double() + update).to(kind)}


def opened(a: Path, b: Path) -> Alignment:
    return align(checkpoints.open(str(a)), checkpoints.open(str(b)))


def folded(alignment: Alignment, block: int) -> list[list[Found]]:
    """What the measure finds of every tensor, read in blocks of a given size."""
    work = sorted(whole_spans(alignment, block), key=lambda span: span.tensor)
    found = []
    for span in work:
        steps = windows(alignment, span, Buffers(2), block)
        found.append(fold(numpy_arrays(), alignment.tensors[span.tensor], steps, MEASURED, OPTIONS))
    return [result["spectrum"].results["found"] for result in found]


def as_row(found: Found, delta: Matrix, name: str = "w") -> dict[str, Any]:
    assert found.spectrum is not None
    row = spectrum.definitions(found.spectrum, delta.shape, found.energy, found.exponent)  # type: ignore[arg-type]
    return row | {"rows": delta.shape[0], "cols": delta.shape[1], "name": name}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_taken_where_it_should_be(tmp_path: Path, route: str) -> None:
    a, b = pairs(route)
    rows = check_all(measure(tmp_path, a, b), a, b)
    assert rows["w"]["method"] == ROUTES[route][1]


@pytest.mark.parametrize("shape", [(3000, 40), (40, 3000), (300, 300)], ids=str)
def test_no_more_is_held_than_the_shorter_side_bounds(shape: tuple[int, int]) -> None:
    found, values = (
        gathering.OnHost(shape, "f32", whole=False, sketched=False),
        np.random.default_rng(0).standard_normal(shape),
    )
    values = values.astype(np.float32).astype(np.float64)
    for at in range(0, shape[0], 10):
        rows = values[at : at + 10]
        found.add(at * shape[1], rows.size, None, rows.reshape(-1).copy())
    assert found.parts is None
    assert found.kept.shape == ((min(shape),) * 2 if shape[0] >= shape[1] else shape)
    done = found.finish()
    assert done.spectrum is not None
    check(as_row(done, values), done.spectrum.sigma, values)


def same_ranks_in_blocks(tmp_path: Path, route: str, block: int) -> None:
    a, b = pairs(route)
    delta = difference(a["w"], b["w"])
    alignment = opened(*write(tmp_path, a, b))
    rows = []
    for size in (block, 1 << 16):
        ((found,),) = folded(alignment, size)
        assert found.spectrum is not None
        rows.append(as_row(found, delta))
        check(rows[-1], found.spectrum.sigma, delta)
    one, other = rows
    assert [one[name] for name in WHOLE] == [other[name] for name in WHOLE]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("block", [400, 1000, 1 << 18])
def test_blocks_of_any_size_give_the_same_ranks(tmp_path: Path, route: str, block: int) -> None:
    same_ranks_in_blocks(tmp_path, route, block)


@pytest.mark.parametrize(
    "route", ["nothing", "entries alone", "small", "thin", "wide", "wide, few columns", "wide and thin", "tall, all rows",
              "tall, fewer rows than columns"],
)  # fmt: skip
def test_blocks_shorter_than_a_row_give_the_same_ranks(tmp_path: Path, route: str) -> None:
    same_ranks_in_blocks(tmp_path, route, 16)


@pytest.mark.parametrize("block", [64, 400, 1000, 1 << 18])
@pytest.mark.parametrize("shape", [(1100, 64), (64, 1100)], ids=str)
def test_zeros_that_change_their_sign_amid_an_update_count_for_nothing(
    tmp_path: Path, shape: tuple[int, int], block: int
) -> None:
    rng = torch.Generator().manual_seed(18)
    update = sparse(0.2)(rng, *shape).float() * (torch.arange(shape[0]) % 3 > 0)[:, None]
    a = torch.zeros(shape)
    b = torch.where((update == 0) & (torch.rand(shape, generator=rng) < 0.2), -0.0, update)
    ((found,),) = folded(opened(*write(tmp_path, {"w": a}, {"w": b})), block)
    assert found.spectrum is not None
    check(as_row(found, difference(a, b)), found.spectrum.sigma, difference(a, b))


@pytest.mark.parametrize("block", [60, 1000, 7777, 1 << 18])
@pytest.mark.parametrize("shape", [(5, 40, 30), (3, 30, 40), (3, 90, 800), (1, 4, 3)], ids=str)
def test_blocks_that_straddle_experts_change_nothing(tmp_path: Path, shape: tuple[int, int, int], block: int) -> None:
    name, rng = "layers.0.mlp.experts.down_proj", torch.Generator().manual_seed(13)
    a = torch.randn(shape, generator=rng)
    b = torch.stack([x + sparse((1.0, 0.01, 0.4)[i % 3])(rng, *shape[1:]).float() for i, x in enumerate(a)])
    a[0, 0, 0] = math.nan
    (found,) = folded(opened(*write(tmp_path, {name: a}, {name: b})), block)
    assert len(found) == shape[0]
    assert found[0].note == "1 elements are NaN or infinite"
    for expert in range(1, shape[0]):
        delta = difference(a[expert], b[expert])
        assert found[expert].spectrum is not None
        check(as_row(found[expert], delta), found[expert].spectrum.sigma, delta)


def every_route(kind: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    a, b = {}, {}
    for number, route in enumerate(ROUTES):
        (a[f"w{number}"],), (b[f"w{number}"],) = (side.values() for side in pairs(route, kind))
    stack = torch.randn(3, 300, 400, generator=torch.Generator().manual_seed(14))
    a["layers.0.experts.up"], b["layers.0.experts.up"] = stack, stack + stack.flip(0) * 1e-3
    return a, b


def results(alignment: Alignment, run: Any) -> list[Any]:
    found = {span.tensor: result["spectrum"].results["found"] for span, result in run}
    return [
        [(one.note, one.energy, one.exponent, one.spectrum.method, one.spectrum.sigma.tobytes()) for one in found[index]]
        for index in range(len(alignment.tensors))
    ]


@pytest.mark.parametrize("block", [2048, 1 << 18])
def test_workers_of_any_number_and_kind_change_no_bit(tmp_path: Path, block: int) -> None:
    alignment = opened(*write(tmp_path, *every_route()))
    work = whole_spans(alignment, block)
    wanted = results(alignment, threads.run(alignment, work, MEASURED, OPTIONS, threads=1, block=block))
    assert results(alignment, threads.run(alignment, work, MEASURED, OPTIONS, threads=2, block=block)) == wanted
    backwards = work[::-1]
    assert results(alignment, threads.run(alignment, backwards, MEASURED, OPTIONS, threads=2, block=block)) == wanted
    if block > 2048:
        assert results(alignment, processes.run(alignment, work, MEASURED, OPTIONS, workers=2, block=block)) == wanted


def test_work_for_spectra_is_never_split(tmp_path: Path) -> None:
    alignment = opened(*write(tmp_path, *every_route()))
    work = whole_spans(alignment, 1000)
    assert sorted(span.tensor for span in work) == list(range(len(alignment.tensors)))
    assert sum(span.numel for span in work) == sum(span.numel for span in spans(alignment))


def test_threads_change_no_bit_of_a_single_matrix(tmp_path: Path) -> None:
    a = {"w": torch.randn(600, 400, generator=torch.Generator().manual_seed(15))}
    paths = write(tmp_path, a, {"w": a["w"] * 1.01 + 1e-3})
    one, two = (paramdiff.compare(*paths, measures=["spectrum"], threads=count) for count in (1, 2))
    assert one.tables["spectra"].equals(two.tables["spectra"]), (
        "streaming.py: the same to the last bit for any number of threads"
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kept", [0, 1 << 22])
def test_a_device_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, kept: int) -> None:
    monkeypatch.setattr(gathering.OnDevice, "KEPT", kept)  # 0: no tall matrix is kept whole
    a, b = every_route(kind)
    paths = write(tmp_path, a, b)
    host, device = (paramdiff.compare(*paths, measures=["spectrum"], device=where) for where in DEVICES)
    for one, other in zip(host.ranks.to_dicts(), device.ranks.to_dicts(), strict=True):
        if not (one["rank_uncertain"] or other["rank_uncertain"]):
            assert one["numeric_rank"] == other["numeric_rank"]
        assert [one[name] for name in WHOLE[1:]] == [other[name] for name in WHOLE[1:]], one["name"]
        x, y = (sigmas(diff, one["name"], one["expert"]) for diff in (host, device))
        assert np.abs(x - y).max() <= 1e-7 * x[0] + one["resolution"] + other["resolution"]
        delta = difference(a[one["name"]], b[one["name"]])
        if one["expert"] is not None:
            delta = difference(a[one["name"]][one["expert"]], b[one["name"]][one["expert"]])
        check(other, y, delta)


@pytest.mark.parametrize("kept", [0, 1 << 22])
@pytest.mark.parametrize("block", [100, 1000, 1 << 23])
@pytest.mark.parametrize("shape", [(120, 600), (600, 120), (2, 90, 750)], ids=str)
def test_a_device_takes_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], block: int, kept: int
) -> None:
    monkeypatch.setattr(gathering.OnDevice, "KEPT", kept)
    name, rng = "layers.0.experts.up", torch.Generator().manual_seed(16)
    a = torch.randn(shape, generator=rng)
    b = a + torch.randn(shape, generator=rng)
    alignment = opened(*write(tmp_path, {name: a}, {name: b}))
    ((_, result),) = torch_device.run(alignment, MEASURED, OPTIONS, device=torch.device("cpu"), block=block)
    found = result["spectrum"].results["found"]
    stacked = (a, b) if len(shape) == 3 else (a[None], b[None])
    for one, old, new in zip(found, *stacked, strict=True):
        check(as_row(one, difference(old, new)), one.spectrum.sigma, difference(old, new))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_entries_and_dense_storage_find_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str, kind: torch.dtype
) -> None:
    a, b = pairs(route, kind)
    if a["w"].numel() > 100_000 and float((a["w"] != b["w"]).double().mean()) > 0.5:
        a, b = {"w": a["w"][:300]}, {"w": b["w"][:300]}
    found = {}
    for few in (0, 1):
        monkeypatch.setattr(gathering, "FEW", few)
        found[few] = check_all(measure(tmp_path, a, b), a, b)["w"]
    assert found[1]["method"] == "sparse"
    assert found[0]["method"] in (("svd", "gram") if found[0]["numeric_rank"] else ("sparse",))
    assert [found[0][name] for name in WHOLE] == [found[1][name] for name in WHOLE]
    assert found[0]["frobenius"] == pytest.approx(found[1]["frobenius"], rel=1e-14)


# Tables


def types(table: str) -> dict[str, str]:
    return {name: kind for name, (kind, _) in columns.TABLES[table].items()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[paramdiff.Diff, Tensors, Tensors]:
    """Layers with attention, experts in a stack, a norm, a matrix that did not move, one with NaN, one without elements."""
    rng, a, b = torch.Generator().manual_seed(17), {}, {}

    def add(name: str, shape: tuple[int, ...], update: torch.Tensor | float) -> None:
        a[name] = torch.randn(shape, generator=rng)
        b[name] = (a[name].double() + update).float()

    add("model.embed_tokens.weight", (500, 40), sparse(0.003)(rng, 500, 40))
    for layer in range(3):
        for module, shape in (("q_proj", (64, 64)), ("k_proj", (16, 64))):
            add(f"model.layers.{layer}.self_attn.{module}.weight", shape, gaussian(rng, *shape) if layer else 0.0)
        add(f"model.layers.{layer}.mlp.experts.down_proj", (3, 32, 24), torch.randn(3, 32, 24, generator=rng))
        add(f"model.layers.{layer}.input_layernorm.weight", (64,), 1.0)
    add("model.layers.2.mlp.router.weight", (3, 64), KINDS["low_rank"](rng, 3, 64))
    add("model.layers.2.mlp.empty.weight", (0, 64), 0.0)
    a["model.layers.1.self_attn.q_proj.weight"][4, 4] = math.nan
    return measure(tmp_path_factory.mktemp("mixed"), a, b), a, b


def test_tables_have_the_documented_columns_and_types(mixed: tuple[paramdiff.Diff, Tensors, Tensors]) -> None:
    for table in ("ranks", "spectra"):
        assert {k: str(v) for k, v in mixed[0].tables[table].schema.items()} == types(table)


def test_the_table_of_spectra_holds_every_singular_value_once(mixed: tuple[paramdiff.Diff, Tensors, Tensors]) -> None:
    diff, seen = mixed[0], 0
    for row in diff.ranks.to_dicts():
        expert = pl.col("expert").is_null() if row["expert"] is None else pl.col("expert") == row["expert"]
        table = diff.tables["spectra"].filter((pl.col("name") == row["name"]) & expert)
        seen += table.height
        if row["method"] is None:
            assert table.height == 0
            continue
        assert table["index"].to_list() == list(range(1, min(row["rows"], row["cols"]) + 1))
        assert table["sigma"].is_sorted(descending=True)
        assert table["sigma"].min() >= 0
        assert table["sigma"][0] == row["sigma_1"]
        assert float((table["sigma"] ** 2).sum()) == pytest.approx(row["frobenius"] ** 2, rel=1e-12)
    assert seen == diff.tables["spectra"].height
    assert diff.ranks["method"].null_count() == 2
    assert diff.tensors.filter(pl.col("shape").list.len() > 1).height + 2 * 3 == diff.ranks.height


def test_frobenius_is_the_norm_of_the_update(mixed: tuple[paramdiff.Diff, Tensors, Tensors]) -> None:
    diff, a, b = mixed
    for row in diff.ranks.drop_nulls("method").to_dicts():
        old, new = a[row["name"]], b[row["name"]]
        if old.ndim == 3:
            old, new = old[row["expert"]], new[row["expert"]]
        check(row, sigmas(diff, row["name"], row["expert"]), difference(old, new))


@pytest.mark.parametrize(
    "keys", [(), ("module",), ("kind", "layer"), ("expert",), ("layer", "module", "kind", "expert")], ids=str
)
def test_roll_ups_of_ranks_by_hand(mixed: tuple[paramdiff.Diff, Tensors, Tensors], keys: tuple[str, ...]) -> None:
    diff = mixed[0]
    found = diff.ranks_by(*keys).to_dicts()
    rows, seen = diff.ranks.to_dicts(), 0
    for pooled in found:
        group = [row for row in rows if all(row[key] == pooled[key] for key in keys)]
        known = [row for row in group if row["method"] is not None]
        moved = [row for row in known if row["frobenius"] > 0]
        seen += len(group)
        full = sum(row["full_rank"] for row in known)
        assert pooled["matrices"] == len(group)
        assert pooled["without_spectrum"] == len(group) - len(known)
        assert pooled["zero"] == len(known) - len(moved)
        assert pooled["full_rank"] == full
        assert pooled["methods"] == "+".join(sorted({row["method"] for row in known}))
        for name in WHOLE:
            total = sum(row[name] for row in known) if known else None
            assert pooled[name] == total
            assert pooled[f"{name}_percent"] == (pytest.approx(100 * total / full) if known else None)
        percents = [100 * row["numeric_rank"] / row["full_rank"] for row in known]
        assert pooled["numeric_rank_percent_mean"] == (pytest.approx(np.mean(percents)) if known else None)
        assert pooled["numeric_rank_percent_min"] == (min(percents) if known else None)
        for name in ("stable_rank", "entropy_rank", "top1_share"):
            wanted = pytest.approx(float(np.median([row[name] for row in moved]))) if moved else None
            assert pooled[f"{name}_median"] == wanted
        assert pooled["sigma_1_max"] == max((row["sigma_1"] for row in known), default=None)
        assert pooled["energy_error_max"] == max((row["energy_error"] for row in moved), default=None)
        assert pooled["uncertain"] == sum(row["rank_uncertain"] for row in known)
    assert seen == len(rows)


def test_an_unknown_key_of_ranks_is_named(mixed: tuple[paramdiff.Diff, Tensors, Tensors]) -> None:
    with pytest.raises(paramdiff.OptionError, match="no column 'layre'"):
        mixed[0].ranks_by("layre")


def test_ranks_that_were_not_measured_are_an_error(tmp_path: Path) -> None:
    paths = write(tmp_path, {"w": torch.zeros(2, 2)}, {"w": torch.ones(2, 2)})
    diff = paramdiff.compare(*paths)
    for ask in (lambda: diff.ranks, diff.ranks_by):
        with pytest.raises(paramdiff.OptionError, match="no spectra"):
            ask()
    diff.save(tmp_path / "out")
    with pytest.raises(paramdiff.OptionError, match="no spectra"):
        _ = paramdiff.load(tmp_path / "out").ranks


def test_save_and_load_give_the_same_ranks(mixed: tuple[paramdiff.Diff, Tensors, Tensors], tmp_path: Path) -> None:
    diff = mixed[0]
    diff.save(tmp_path / "out")
    again = paramdiff.load(tmp_path / "out")
    for table in ("ranks", "spectra"):
        assert again.tables[table].equals(diff.tables[table])
        assert pl.read_parquet(tmp_path / "out" / f"{table}.parquet").equals(diff.tables[table])
    assert again.ranks_by("module").equals(diff.ranks_by("module"))


def test_infinite_norms_survive_saving(tmp_path: Path) -> None:
    a = {"w": torch.zeros(20, 30, dtype=torch.float64)}
    diff = measure(tmp_path, a, {"w": torch.full((20, 30), 1.5e308, dtype=torch.float64)})
    diff.save(tmp_path / "out")
    assert paramdiff.load(tmp_path / "out").ranks.equals(diff.ranks)
