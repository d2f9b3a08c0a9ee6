"""`paramdiff rank`, and ranks beside `paramdiff sparsity`: its numbers against numpy, how it shows them, what it writes."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits

import paramdiff
from paramdiff.columns import CHANGE, IDENTITY, TABLES

from .helpers import (
    COMMAND,
    SAMPLE,
    alive,
    assert_sentence,
    environment,
    finished,
    run,
    run_json,
    sparse_pair,
    squeezed,
    started,
    wait_for,
    write_checkpoint,
)
from .test_errors import CONTROL, HOSTILE, PLACES
from .test_interrupt import children_of, contents, opened
from .test_startup import HEAVY, imported

Matrix = np.ndarray[Any, Any]
Row = dict[str, Any]

BASE, ADAMW, SGD, SFT = (SAMPLE / name for name in ("base", "rl-adamw", "rl-sgd", "sft"))
F32, F64 = np.float32, np.float64
pytestmark = pytest.mark.slow  # CI runs it; the quick suite has the measure itself
KEYS = {"ranks", "ranks_by_module", "ranks_by_layer", "ranks_by_matrix"}
OUT = {"tensors", "histograms", "ranks", "spectra", "coverage"}
SUMMED = ("numeric_rank", "rank_at_1e-3", "rank_at_1e-2", "energy_rank_99", "energy_rank_95", "energy_rank_90")  # as printed
MEDIANS = ("stable_rank", "entropy_rank", "top1_share")
ATTENTION, MLP = ("k_proj", "o_proj", "q_proj", "v_proj"), ("down_proj", "gate_proj", "up_proj")


# --- checkpoints: made, and read without paramdiff -------------------------------------------------------------------


def saved(directory: Path, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> tuple[Path, Path]:
    """A pair of .safetensors files."""
    paths = directory / "a.safetensors", directory / "b.safetensors"
    for path, tensors in zip(paths, (base, tuned), strict=True):
        save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path)
    return paths


def stored(directory: Path) -> dict[str, Matrix]:
    """All tensors of a checkpoint in bf16, which is the upper half of a float32."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        content = file.read_bytes()
        begin = 8 + struct.unpack("<Q", content[:8])[0]
        for name, entry in json.loads(content[8:begin]).items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16"
                start, end = (begin + at for at in entry["data_offsets"])
                values = (np.frombuffer(content[start:end], "<u2").astype(np.uint32) << 16).view(F32)
                found[name] = values.reshape(entry["shape"])
    return found


def matrices(directory: Path) -> dict[str, Matrix]:
    return {name: values for name, values in stored(directory).items() if values.ndim == 2}


def changed_by(seed: int, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """Normally distributed tensors before and after each element took a step."""
    rng = np.random.default_rng(seed)
    base = {name: rng.standard_normal(shape).astype(F32) for name, shape in shapes.items()}
    return base, {name: (w + 0.01 * rng.standard_normal(w.shape)).astype(F32) for name, w in base.items()}


# --- the reference ---------------------------------------------------------------------------------------------------


def ranks_of(base: Matrix, tuned: Matrix) -> Row:
    """Every definition of metrics.md §4, from numpy's SVD of Δ. Δ is taken in the type of the comparison."""
    delta = (tuned - base).astype(F64)
    sigma = np.linalg.svd(delta, compute_uv=False)
    full, squares = min(delta.shape), np.cumsum(sigma**2)
    p = sigma[sigma > 0] / sigma.sum()
    row: Row = {"rows": delta.shape[0], "cols": delta.shape[1], "full_rank": full}
    row["numeric_rank"] = int((sigma > sigma[0] * max(delta.shape) * 2.0**-23).sum())
    for name, share in (("rank_at_1e-2", 1e-2), ("rank_at_1e-3", 1e-3)):
        row[name] = int((sigma > share * sigma[0]).sum())
    for percent in (90, 95, 99):
        row[f"energy_rank_{percent}"] = 1 + int((squares < percent / 100 * squares[-1]).sum())
    for name in ("numeric_rank", "energy_rank_90", "energy_rank_95", "energy_rank_99"):
        row[f"{name}_percent"] = 100 * row[name] / full
    norm = float(np.linalg.norm(delta))
    row |= {"stable_rank": norm**2 / sigma[0] ** 2, "entropy_rank": np.exp(-(p * np.log(p)).sum())}
    return row | {"sigma_1": sigma[0], "frobenius": norm, "top1_share": sigma[0] / norm}


def rolled_up(rows: Sequence[Row]) -> Row:
    full = sum(row["full_rank"] for row in rows)
    pooled: Row = {"matrices": len(rows), "without_spectrum": 0, "zero": 0, "uncertain": 0, "full_rank": full}
    for name in SUMMED:
        pooled[name] = sum(row[name] for row in rows)
        pooled[f"{name}_percent"] = 100 * pooled[name] / full
    shares = [row["numeric_rank_percent"] for row in rows]
    pooled |= {"numeric_rank_percent_mean": np.mean(shares), "numeric_rank_percent_min": min(shares)}
    pooled |= {f"{name}_median": np.median([row[name] for row in rows]) for name in MEDIANS}
    return pooled | {"sigma_1_max": max(row["sigma_1"] for row in rows)}


def assert_holds(found: Row, expected: Row) -> None:
    """`found` has all of `expected`: counts exactly, everything else to 9 digits."""
    for name, value in expected.items():
        exact = value is None or isinstance(value, (int, str))
        assert found[name] == (value if exact else pytest.approx(value, rel=1e-9)), name


def module_of(name: str) -> str:
    return name.split(".")[-2]


def layer_of(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The reference needs no threads of BLAS's, which wait for each other on a busy machine."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(scope="module")
def expected() -> dict[str, Row]:
    before, after = matrices(BASE), matrices(ADAMW)
    assert len(before) == 29
    return {name: ranks_of(before[name], after[name]) for name in before}


@pytest.fixture(scope="module")
def found() -> Row:
    return run_json("rank", BASE, ADAMW)


@pytest.fixture(scope="module")
def shown() -> str:
    done = run("rank", BASE, ADAMW, "--matrices")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def plain() -> Row:
    return run_json("sparsity", BASE, ADAMW)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What is printed of base against rl-sgd, and where its tables are."""
    out = tmp_path_factory.mktemp("rank") / "a" / "b"
    done = run("rank", BASE, SGD, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, out


# --- reading what was printed ----------------------------------------------------------------------------------------


def rows_below(text: str, title: str) -> dict[str, list[str]]:
    """The cells of the first table below `title`, by the first of each row."""
    lines = iter(text.split(title, 1)[1].splitlines())
    next(line for line in lines if "──" in line)
    cells = []
    while (line := next(lines).strip()) != "":
        cells.append(re.split(r"\s{2,}", line))
    return {first: rest for first, *rest in cells}


def assert_shows(cell: str, value: float | None) -> None:
    """A share in percent to two digits after the point, or a number to three digits."""
    if value is None:
        assert cell == "–"
    elif cell.endswith("%"):
        assert float(cell.removesuffix(" %")) == pytest.approx(value, abs=0.0051)
        assert cell != "100 %" or value == 100
    else:
        assert float(cell.replace(",", "")) == pytest.approx(value, rel=0.0051)


def nonfinite(text: str) -> dict[str, int]:
    """How many elements are said to be NaN or infinite, by the names before that."""
    notes = re.findall(r"^(.*): ([^:\n]*NaN or infinite[^:\n]*)$", text, re.MULTILINE)
    return {names: int(re.sub(r"\D", "", said)) for names, said in notes}


def shown_and_found(out: Path, *args: object) -> tuple[str, paramdiff.Diff]:
    """What `paramdiff ARGS… --out OUT` prints, and what it writes."""
    done = run(*args, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, paramdiff.load(out)


def assert_strict(text: str) -> Row:
    """JSON without NaN and Infinity, which JSON lacks."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_json_holds_every_rank_of_every_matrix(found: Row, expected: dict[str, Row]) -> None:
    assert set(found) > KEYS
    assert {row["name"] for row in found["ranks_by_matrix"]} == set(expected)
    for row in found["ranks_by_matrix"]:
        assert list(row) == list(TABLES["ranks"])
        assert_holds(row, expected[row["name"]])
        assert (row["layer"], row["module"], row["expert"]) == (layer_of(row["name"]), module_of(row["name"]), None)
        assert (row["method"], row["rank_uncertain"], row["note"]) == ("svd", False, None)
        assert 0 <= row["energy_error"] < 1e-5
        assert 0 < row["resolution"] < 1e-9 * row["sigma_1"]


def test_json_rolls_up_over_everything_by_module_and_by_layer(found: Row, expected: dict[str, Row]) -> None:
    assert_holds(found["ranks"], rolled_up(list(expected.values())))
    assert found["ranks"]["methods"] == "svd"
    for key, of in (("module", module_of), ("layer", layer_of)):
        groups = {row[key]: row for row in found[f"ranks_by_{key}"]}
        assert len(groups) == len(found[f"ranks_by_{key}"])
        assert set(groups) == {of(name) for name in expected}
        for value, row in groups.items():
            assert_holds(row, rolled_up([one for name, one in expected.items() if of(name) == value]))


def test_json_holds_what_sparsity_says_as_well(found: Row, plain: Row) -> None:
    lengths = {"l2_delta", "rel_l2", "max_abs_delta"}  # not measured
    assert set(found) == set(plain) | KEYS
    for name in set(plain) - lengths - {"seconds"}:
        assert found[name] == plain[name], name
    assert all(found[name] is None for name in lengths)


def test_json_has_no_numbers_that_json_lacks(tmp_path: Path) -> None:
    """σ₁ beyond float64, a Δ beyond float32, NaN and an infinity: null, and everything else is there."""
    zeros = {name: np.zeros((3, 3), kind) for name, kind in (("huge", F64), ("over", F32), ("nan", F32), ("fine", F32))}
    over = {**zeros, "over": np.full((3, 3), -3e38, F32)}
    tuned = {"huge": np.full((3, 3), 1.5e308), "over": np.full((3, 3), 3e38, F32), "fine": np.eye(3, dtype=F32)}
    pair = saved(tmp_path, over, {**tuned, "nan": np.full((3, 3), np.nan, F32)})
    done = run("rank", *pair, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row["name"]: row for row in assert_strict(done.stdout)["ranks_by_matrix"]}
    assert (rows["huge"]["sigma_1"], rows["huge"]["frobenius"]) == (None, None)
    assert (rows["huge"]["numeric_rank"], rows["huge"]["top1_share"]) == (1, pytest.approx(1.0))
    assert rows["fine"]["numeric_rank"] == 3
    assert rows["nan"]["method"] is rows["over"]["method"] is None
    assert "beyond the range" in rows["over"]["note"]
    text = run("rank", *pair).stdout
    assert "over: a difference is beyond the range of its type" in text.splitlines()
    assert nonfinite(text) == {"nan": 9}


def test_a_rank_that_hangs_on_the_last_digit_is_said_to_be_uncertain(tmp_path: Path) -> None:
    cut = 2 * 2.0**-23  # σ₁·max(m, n)·2⁻²³
    pair = saved(tmp_path, {"w": np.zeros((2, 2), F32)}, {"w": np.diag([1, cut]).astype(F32)})
    text, diff = shown_and_found(tmp_path / "out", "rank", *pair, "--matrices")
    row = diff.ranks.row(0, named=True)
    assert (row["rank_uncertain"], row["numeric_rank"]) == (True, 1), "strictly above the cut"
    assert re.search(r"^w: numeric rank.* uncertain", text, re.MULTILINE)
    assert rows_below(text, "Every matrix")["w"][:2] == ["2 × 2", "1 ?"]


def test_what_did_not_change_has_rank_zero_and_no_shares(tmp_path: Path) -> None:
    base, tuned = changed_by(1, {"layers.0.q_proj.weight": (6, 5), "layers.0.k_proj.weight": (6, 5), "norm.weight": (9,)})
    tuned["layers.0.k_proj.weight"] = base["layers.0.k_proj.weight"]
    text, diff = shown_and_found(tmp_path / "out", "rank", *saved(tmp_path, base, tuned))
    zero, moved = diff.ranks.sort("name").to_dicts()
    for name in (*SUMMED, *(f"energy_rank_{p}_percent" for p in (90, 95, 99)), "stable_rank", "entropy_rank", "sigma_1"):
        assert zero[name] == 0, name
    assert zero["top1_share"] is zero["energy_error"] is zero["note"] is None
    assert zero["full_rank"] == 5
    assert_holds(moved, ranks_of(base["layers.0.q_proj.weight"], tuned["layers.0.q_proj.weight"]))
    total = diff.ranks_by().row(0, named=True)
    assert (total["matrices"], total["zero"], total["full_rank"], total["numeric_rank"]) == (2, 1, 10, 5)
    assert (total["numeric_rank_percent_mean"], total["numeric_rank_percent_min"]) == (50, 0)
    assert total["stable_rank_median"] == pytest.approx(moved["stable_rank"]), "medians are of matrices that changed"
    assert "2 matrices, of full rank 10 in all; 1 of them did not change (rank 0)" in text
    assert rows_below(text, "by module")["k_proj"][1:8] == ["0 %"] * 7
    assert rows_below(text, "by module")["k_proj"][8:11] == ["–"] * 3


def test_an_unchanged_pair(tmp_path: Path) -> None:
    text, diff = shown_and_found(tmp_path / "out", "rank", BASE, BASE)
    assert "29 matrices, of full rank 2,320 in all; 29 of them did not change (rank 0)" in text
    assert {tuple(cells) for cells in rows_below(text, "in all").values()} == {("0 %", "0")}
    total = diff.ranks_by().row(0, named=True)
    assert (total["zero"], total["numeric_rank"], total["sigma_1_max"]) == (29, 0, 0)
    assert all(total[f"{name}_median"] is None for name in MEDIANS)


# --- tables for people -----------------------------------------------------------------------------------------------


def test_the_headline_counts_matrices_and_ranks(shown: str, expected: dict[str, Row]) -> None:
    total = rolled_up(list(expected.values()))
    text = squeezed(shown)
    assert f"base {BASE} tuned {ADAMW} 334,944 parameters in 50 tensors" in text
    assert f"29 matrices, of full rank {total['full_rank']:,} in all" in text
    assert "did not change" not in text
    assert "uncertain" not in text
    cells = list(rows_below(shown, "in all").items())
    assert cells[0][0] == "numeric rank, σ > σ₁·max(m,n)·2⁻²³"
    assert [label for label, _ in cells[1:3]] == ["σ > σ₁/1000", "σ > σ₁/100"]
    assert [label.split(" %")[0] for label, _ in cells[3:]] == ["99", "95", "90"]
    for name, (_, (share, count)) in zip(SUMMED, cells, strict=True):
        assert count == f"{total[name]:,}"
        assert_shows(share, total[f"{name}_percent"])
    line = next(line for line in shown.splitlines() if line.startswith("stable rank"))
    for number, name in zip(re.findall(r"(?:rank|_F) ([\d.]+) (?:·|\(med)", line), MEDIANS, strict=True):
        assert_shows(number, total[f"{name}_median"])
    assert "numeric rank 100 % on average over matrices" in line
    assert "1.3 MB read in" in text


def test_a_rank_just_below_full_is_not_shown_as_full(written: tuple[str, Path]) -> None:
    """SGD leaves one matrix of 29 one short of full rank."""
    before, after = matrices(BASE), matrices(SGD)
    total = rolled_up([ranks_of(before[name], after[name]) for name in before])
    assert total["numeric_rank"] == total["full_rank"] - 1
    text = written[0]
    assert next(iter(rows_below(text, "in all").values())) == ["99.96 %", "2,319"]
    assert f"numeric rank {total['numeric_rank_percent_mean']:.2f} % on average over matrices" in text


@pytest.mark.parametrize("key", ["module", "layer"])
def test_a_table_by_module_and_one_by_layer(shown: str, expected: dict[str, Row], key: str) -> None:
    of = module_of if key == "module" else layer_of
    table = rows_below(shown, f"Ranks by {key}, in % of full rank")
    groups: dict[Any, list[Row]] = {}
    for name, row in expected.items():
        groups.setdefault(of(name), []).append(row)
    assert set(table) == {"outside" if value is None else str(value) for value in groups}
    if key == "layer":
        assert list(table) == ["outside", "0", "1", "2", "3"]
    else:
        assert next(iter(table)) == "embed_tokens"
        assert (set(list(table)[1:5]), set(list(table)[5:])) == (set(ATTENTION), set(MLP)), "grouped by kind"
    for value, rows in groups.items():
        total = rolled_up(rows)
        count, numeric, lowest, *rest = table["outside" if value is None else str(value)]
        assert int(count) == total["matrices"]
        assert_shows(numeric, total["numeric_rank_percent"])
        assert_shows(lowest, total["numeric_rank_percent_min"])
        names = [*(f"{name}_percent" for name in SUMMED[1:]), *(f"{name}_median" for name in MEDIANS), "sigma_1_max"]
        for cell, name in zip(rest, names, strict=True):
            assert_shows(cell, total[name])


def test_matrices_lists_every_matrix(shown: str, expected: dict[str, Row]) -> None:
    table = rows_below(shown, "Every matrix")
    assert set(table) == set(expected)
    for name, (size, *cells, method) in table.items():
        row = expected[name]
        assert (size, method) == (f"{row['rows']} × {row['cols']}", "svd")
        assert cells[:6] == [str(row[rank]) for rank in SUMMED]
        for cell, column in zip(cells[6:], ("stable_rank", "entropy_rank", "sigma_1", "top1_share"), strict=True):
            assert_shows(cell, row[column])


def test_no_table_by_layer_where_there_are_no_layers(tmp_path: Path) -> None:
    text = run("rank", *saved(tmp_path, *changed_by(2, {"w": (4, 4)}))).stdout
    assert "Ranks by module" in text
    assert "Ranks by layer" not in text


def test_vectors_alone_have_no_rank_and_that_is_said(tmp_path: Path) -> None:
    pair = saved(tmp_path, *changed_by(3, {"layers.0.norm.weight": (8,), "bias": (1,)}))
    done = run("rank", *pair, "--matrices")
    assert (done.returncode, done.stderr) == (0, "")
    assert "No tensor that was compared is a matrix" in done.stdout
    assert "Ranks by" not in done.stdout
    found = run_json("rank", *pair, "--out", tmp_path / "out")
    assert (found["ranks_by_matrix"], found["ranks_by_module"], found["ranks_by_layer"]) == ([], [], [])
    assert (found["ranks"]["matrices"], found["ranks"]["full_rank"], found["ranks"]["numeric_rank"]) == (0, 0, None)
    for name in ("ranks", "spectra"):
        assert_schema(pl.read_parquet(tmp_path / "out" / f"{name}.parquet"), name)


# --- notes -----------------------------------------------------------------------------------------------------------


def test_nan_in_one_matrix_is_said_and_the_others_are_there(tmp_path: Path) -> None:
    base, tuned = changed_by(4, {f"layers.0.{name}.weight": (6, 5) for name in ("q_proj", "k_proj", "v_proj")})
    for side in (base, tuned):  # on both sides: one element
        side["layers.0.k_proj.weight"][0, 0] = np.nan
    tuned["layers.0.k_proj.weight"][1, 1] = np.nan
    base["layers.0.k_proj.weight"][2, 2] = np.inf
    pair = saved(tmp_path, base, tuned)
    done = run("rank", *pair, "--matrices")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 matrices, of full rank 10 in all" in done.stdout
    assert nonfinite(done.stdout) == {"layers.0.k_proj.weight": 3}
    assert set(rows_below(done.stdout, "by module")["k_proj"][1:]) == {"–"}
    assert set(rows_below(done.stdout, "Every matrix")["layers.0.k_proj.weight"][1:]) == {"–"}
    found = assert_strict(run("rank", *pair, "--json").stdout)
    rows = {row["module"]: row for row in found["ranks_by_matrix"]}
    for module in ("q_proj", "v_proj"):
        name = f"layers.0.{module}.weight"
        assert_holds(rows[module], ranks_of(base[name], tuned[name]))
    assert f"layers.0.k_proj.weight: {rows['k_proj']['note']}" in done.stdout.splitlines()
    assert all(rows["k_proj"][name] is None for name in (*SUMMED, *MEDIANS, "method", "sigma_1", "frobenius", "full_rank"))
    assert (found["ranks"]["matrices"], found["ranks"]["without_spectrum"], found["ranks"]["numeric_rank"]) == (3, 1, 10)


def test_where_every_matrix_holds_nan_there_is_no_table(tmp_path: Path) -> None:
    base, tuned = changed_by(5, {f"layers.{i}.q_proj.weight": (4, 3) for i in range(5)})
    for values in tuned.values():
        values[0, 0] = np.nan
    done = run("rank", *saved(tmp_path, base, tuned))
    assert (done.returncode, done.stderr) == (0, "")
    listed = ", ".join(f"layers.{i}.q_proj.weight" for i in range(3))
    assert nonfinite(done.stdout) == {f"{listed} and 2 more": 1}
    assert "Ranks by" not in done.stdout
    assert "MB read in" in done.stdout


def test_experts_of_a_stack_are_matrices_of_their_own(tmp_path: Path) -> None:
    stack, single = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.7.up_proj.weight"
    base, tuned = changed_by(6, {stack: (3, 4, 5), single: (4, 5), "conv.weight": (4, 3, 2, 2)})
    tuned[stack][1, 0, 0] = np.nan
    text, diff = shown_and_found(tmp_path / "out", "rank", *saved(tmp_path, base, tuned), "--matrices")
    rows = {(row["name"], row["expert"]): row for row in diff.ranks.to_dicts()}
    assert set(rows) == {(stack, 0), (stack, 1), (stack, 2), (single, 7), ("conv.weight", None)}
    for expert in (0, 2):
        assert_holds(rows[stack, expert], ranks_of(base[stack][expert], tuned[stack][expert]))
        assert (rows[stack, expert]["layer"], rows[stack, expert]["module"]) == (0, "experts.down_proj")
    assert_holds(rows[single, 7], ranks_of(base[single], tuned[single]))
    assert_holds(rows["conv.weight", None], ranks_of(*(side["conv.weight"].reshape(4, 12) for side in (base, tuned))))
    assert nonfinite(text) == {f"{stack} (expert 1)": 1}
    listed = rows_below(text, "Every matrix")
    assert set(listed) == {*(f"{stack} (expert {i})" for i in range(3)), single, "conv.weight"}
    assert listed[f"{stack} (expert 2)"][0] == "4 × 5"


def test_a_tied_head_is_not_counted_twice(tmp_path: Path) -> None:
    base, tuned = changed_by(7, {"model.embed_tokens.weight": (6, 4)})
    pair = saved(tmp_path, base, {**tuned, "lm_head.weight": tuned["model.embed_tokens.weight"]})
    done = run("rank", *pair)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^1 matri(x|ces), of full rank 4 in all$", done.stdout, re.MULTILINE)
    assert re.search(r"^lm_head\.weight: tied to model\.embed_tokens\.weight", done.stdout, re.MULTILINE)
    assert next(iter(rows_below(done.stdout, "in all").values())) == ["100 %", "4"]


# --- --method sketch -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two matrices that are sketched, one of a flat spectrum and one of which five values stand out, and one that is not."""
    base, tuned = changed_by(8, {"flat.weight": (600, 700), "low.weight": (600, 700), "small.weight": (60, 70)})
    rng = np.random.default_rng(9)
    left, right = (np.linalg.qr(rng.standard_normal((n, 5)))[0] for n in (600, 700))
    tuned["low.weight"] = (base["low.weight"] + left * np.linspace(50, 10, 5) @ right.T).astype(F32)
    return saved(tmp_path_factory.mktemp("large"), base, tuned)


def loaded(pair: tuple[Path, Path]) -> list[dict[str, Matrix]]:
    return [load_file(path) for path in pair]


def test_sketch_gives_leading_values_within_the_error_it_states(large: tuple[Path, Path], tmp_path: Path) -> None:
    found = run_json("rank", *large, "--method", "sketch", "--out", tmp_path / "out")
    rows = {row["module"]: row for row in found["ranks_by_matrix"]}
    assert {name: row["method"] for name, row in rows.items()} == {"flat": "sketch", "low": "sketch", "small": "svd"}
    spectra = pl.read_parquet(tmp_path / "out" / "spectra.parquet")
    before, after = loaded(large)
    for module in ("flat", "low"):
        delta = (after[f"{module}.weight"] - before[f"{module}.weight"]).astype(F64)
        true = np.linalg.svd(delta, compute_uv=False)
        rounding = 1e-6 * true[0]  # a float32 matrix is sketched in float32
        sigma = spectra.filter(name=f"{module}.weight")["sigma"].to_numpy()
        row = rows[module]
        assert 0 < len(sigma) < 600
        assert (sigma <= true[: len(sigma)] + rounding).all(), "an approach from below"
        for value in sigma:
            assert np.abs(true - value).min() <= row["resolution"] + rounding
        assert row["sigma_1"] == sigma[0]
        assert row["frobenius"] == pytest.approx(np.linalg.norm(delta), rel=1e-9)
        unknown = ("numeric_rank", "numeric_rank_percent", "entropy_rank", "energy_error", "rank_uncertain")
        assert all(row[name] is None for name in unknown)
        assert row["full_rank"] == 600
    wanted = ranks_of(before["low.weight"], after["low.weight"])
    for name in ("rank_at_1e-2", "energy_rank_90", "energy_rank_95", "energy_rank_99"):
        assert rows["low"][name] == wanted[name], name
        assert rows["flat"][name] is None, f"{name} needs values that a sketch does not have"
    assert rows["low"]["stable_rank"] == pytest.approx(wanted["stable_rank"], rel=1e-4)
    assert_holds(rows["small"], ranks_of(before["small.weight"], after["small.weight"]))
    assert found["ranks"]["methods"] == "sketch+svd"
    assert found["ranks"]["numeric_rank"] is None
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["method"] == "sketch"


@pytest.fixture(scope="module")
def sketched(large: tuple[Path, Path]) -> str:
    done = run("rank", *large, "--method", "sketch", "--matrices")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_sketch_says_that_it_is_one(sketched: str, shown: str) -> None:
    assert re.search(r"^2 of them sketched: .*resolution", sketched, re.MULTILINE)
    table = rows_below(sketched, "Every matrix")
    assert {name: cells[-1] for name, cells in table.items()} == {
        "flat.weight": "sketch", "low.weight": "sketch", "small.weight": "svd",
    }  # fmt: skip
    assert table["flat.weight"][1] == table["low.weight"][1] == "–"
    assert rows_below(sketched, "by module")["flat"][1] == "–"
    assert "sketched" not in shown


def test_a_mean_over_matrices_is_not_given_where_some_of_them_are_unknown(large: tuple[Path, Path], sketched: str) -> None:
    """Two matrices of three are sketched, so nobody knows their numeric rank: there is no average over matrices."""
    assert "numeric rank 100 % on average over matrices" not in sketched
    total = run_json("rank", *large, "--method", "sketch")["ranks"]
    assert total["numeric_rank"] is total["numeric_rank_percent"] is None
    assert total["numeric_rank_percent_mean"] is total["numeric_rank_percent_min"] is None


def test_exact_on_the_same_matrices(large: tuple[Path, Path]) -> None:
    before, after = loaded(large)
    rows = {row["name"]: row for row in run_json("rank", *large, "--method", "exact")["ranks_by_matrix"]}
    assert {name: row["method"] for name, row in rows.items()} == {
        "flat.weight": "gram", "low.weight": "gram", "small.weight": "svd",
    }  # fmt: skip
    for name, row in rows.items():
        wanted = ranks_of(before[name], after[name])
        entropy = wanted.pop("entropy_rank")
        assert_holds(row, wanted)
        assert row["entropy_rank"] == pytest.approx(entropy, rel=1e-5)


def test_an_unknown_method_is_a_usage_error(tmp_path: Path) -> None:
    done = run("rank", BASE, ADAMW, "--method", "nonsense", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    for word in ("--method", "nonsense", "exact", "sketch"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# --- --out -----------------------------------------------------------------------------------------------------------


def assert_schema(frame: pl.DataFrame, table: str) -> None:
    assert {name: str(kind) for name, kind in frame.schema.items()} == {
        name: kind for name, (kind, _) in TABLES[table].items()
    }, table
    assert frame.columns == list(TABLES[table])


def test_out_writes_the_tables_of_columns_py(tmp_path: Path, expected: dict[str, Row]) -> None:
    args = ("--include", "layers", "--exclude", "mlp", "--exclude", "norm")
    found = run_json("rank", BASE, ADAMW, *args, "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*(f"{name}.parquet" for name in OUT), "run.json"}
    frames = {name: pl.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in OUT}
    for name in OUT - {"tensors"}:
        assert_schema(frames[name], name)
    tensors = {name: str(kind) for name, kind in frames["tensors"].schema.items()}
    assert tensors == {name: kind for name, (kind, _) in (IDENTITY | CHANGE).items() if "τ" not in name}
    assert frames["tensors"].height == found["tensors"] == 28
    assert frames["ranks"].to_dicts() == found["ranks_by_matrix"]
    before, after = matrices(BASE), matrices(ADAMW)
    names = {name for name in before if "self_attn" in name}
    assert set(frames["ranks"]["name"]) == set(frames["spectra"]["name"]) == names
    for (name,), spectrum in frames["spectra"].partition_by("name", as_dict=True).items():
        assert spectrum["index"].to_list() == list(range(1, expected[name]["full_rank"] + 1))
        sigma = np.linalg.svd((after[name] - before[name]).astype(F64), compute_uv=False)
        assert spectrum["sigma"].to_numpy() == pytest.approx(sigma, rel=1e-9)
    told = json.loads((tmp_path / "out" / "run.json").read_text())
    options = told["options"]
    assert (options["measures"], options["method"], options["device"]) == (["change", "spectrum"], "exact", "cpu")
    assert (options["include"], options["exclude"]) == (["layers"], ["mlp", "norm"])
    assert (options["tolerances"], options["compat"]) == ([], None)
    assert set(told["tables"]) == OUT
    assert {"scipy", "numpy", "paramdiff"} <= set(told["versions"])
    assert (told["base"]["ref"], told["tuned"]["ref"]) == (str(BASE), str(ADAMW))


def test_what_was_written_loads_again(written: tuple[str, Path]) -> None:
    text, out = written
    assert squeezed(text).endswith(f"Tables written to {out}")
    diff, found = paramdiff.load(out), run_json("rank", BASE, SGD)
    assert diff.ranks.to_dicts() == found["ranks_by_matrix"]
    assert diff.ranks_by().row(0, named=True) == found["ranks"]
    assert {**diff.summary(), "seconds": 0} == {key: 0 if key == "seconds" else found[key] for key in diff.summary()}


def test_ranks_do_not_survive_a_comparison_without_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("rank", BASE, SGD, "--quiet", "--out", out).returncode == 0
    before = contents(out)
    assert_sentence(run("rank", BASE, tmp_path / "nowhere", "--out", out), 2)
    assert contents(out) == before
    run_json("sparsity", BASE, SGD, "--out", out)
    assert not {"ranks.parquet", "spectra.parquet"} & set(contents(out))
    assert "ranks" not in paramdiff.load(out).tables


# --- which tensors, how quiet, how many workers ----------------------------------------------------------------------


def test_include_and_exclude(expected: dict[str, Row]) -> None:
    args = ("rank", BASE, ADAMW, "--include", r"self_attn", "--exclude", "o_proj")
    found = run_json(*args)
    names = {name for name in expected if "self_attn" in name and "o_proj" not in name}
    assert {row["name"] for row in found["ranks_by_matrix"]} == names
    assert_holds(found["ranks"], rolled_up([expected[name] for name in names]))
    text = run(*args).stdout
    assert f"{len(names)} matrices, of full rank {found['ranks']['full_rank']:,} in all" in text
    assert f"{50 - found['tensors']} tensors left out by --include/--exclude" in text
    assert set(rows_below(text, "by module")) == {"q_proj", "k_proj", "v_proj"}
    assert "Every matrix" not in text, "only with --matrices"


def test_quiet_says_nothing_but_writes(tmp_path: Path) -> None:
    for name in ("model", "old"):  # a file that is ignored is worth a warning
        write_checkpoint(tmp_path / "base" / f"{name}.safetensors", {"w": ("F32", (4, 4))})
    pair = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    done = run("rank", *pair, "--quiet", "--matrices", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "spectra.parquet").exists()


def test_workers_do_not_change_the_result(found: Row) -> None:
    results = [found, *(run_json("rank", BASE, ADAMW, "--threads", n) for n in (1, 2))]
    one, *others = (json.dumps({**result, "seconds": 0}) for result in results)
    assert others == [one, one]


def test_one_matrix_for_several_workers_is_the_same_as_for_one(large: tuple[Path, Path]) -> None:
    one, two = (run_json("rank", *large, "--include", "flat", "--threads", n) for n in (1, 2))
    assert one["ranks_by_matrix"][0]["method"] == "gram"
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


# --- usage, and what goes wrong --------------------------------------------------------------------------------------


def test_help_shows_examples_and_options() -> None:
    done = run("rank", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = squeezed(done.stdout)
    assert "Examples:" in text
    assert "paramdiff rank base/ tuned/ paramdiff rank base/ tuned/ --include self_attn --matrices --out results/" in text
    assert "| jq .ranks.numeric_rank_percent" in text
    for option in ("method", "matrices", "include", "exclude", "out", "json", "quiet", "threads", "device"):
        assert f"--{option} " in text, option


def test_the_example_for_jq_is_a_key_that_exists(found: Row) -> None:
    assert found["ranks"]["numeric_rank_percent"] == 100


def test_help_of_the_command_lists_rank_and_subspace() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("sparsity", "layers", "rank", "subspace", "inspect"):
        assert re.search(rf"^│ {name} +\S", done.stdout, re.MULTILINE), name


def test_nothing_in_common(tmp_path: Path) -> None:
    a, b = saved(tmp_path, {"one": np.zeros((2, 2), F32)}, {"two": np.zeros((2, 2), F32)})
    for more in ([], ["--json"], ["--quiet"], ["--out", tmp_path / "out"]):
        assert_sentence(run("rank", a, b, *more), 3, str(a), str(b), "'one'", "'two'")
    assert_sentence(run("rank", BASE, ADAMW, "--include", "zzz"), 3, "--include/--exclude")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("position", [0, 1])
def test_a_missing_path(tmp_path: Path, position: int) -> None:
    pair = [BASE, BASE]
    pair[position] = tmp_path / "nowhere"
    assert_sentence(run("rank", *pair, "--out", tmp_path / "out"), 2, str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "word"),
    [(["--include", "("], "regular expression"), (["--device", "gpu"], "gpu"), (["--threads", "0"], "threads")],
)
def test_options_that_make_no_sense(args: list[str], word: str) -> None:
    done = run("rank", BASE, ADAMW, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["rank", "subspace"])
def test_a_terminal_that_cannot_show_greek(command: str) -> None:
    done = run(command, BASE, SFT, "--include", "layers.0.self_attn", env=environment(PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "q_proj" in done.stdout


def test_a_pipe_that_is_closed_and_a_disk_that_is_full() -> None:
    args = ("rank", BASE, SFT, "--include", "layers.0.self_attn")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = run(*args, stdout=pipe)
    assert (done.returncode, done.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        done = run(*args, stdout=full)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Traceback" not in done.stderr


# --- names from hostile files ----------------------------------------------------------------------------------------


def hostile(directory: Path, place: str) -> tuple[tuple[Path, Path], list[str]]:
    """A pair in which every hostile name is that of a matrix with a number of NaNs of its own, so that each gets a line.

    The last one has numbers; two more of them have no partner.
    """
    names = [PLACES[place].format(text) for case, text in HOSTILE.items() if case != "lone surrogate"]
    base, tuned = changed_by(10, dict.fromkeys(names, (5, 5)))
    for count, name in enumerate(names[:-1], 1):
        tuned[name].reshape(-1)[:count] = np.nan
    shorter = {**base, f"{names[0]}.base": np.zeros(1, F32)}, {**tuned, f"{names[6]}.tuned": np.zeros(1, F32)}
    return saved(directory, *shorter), names


def assert_harmless(text: str) -> None:
    assert not CONTROL.search(text), CONTROL.findall(text)
    assert "\u202e" not in text


@pytest.mark.parametrize("place", PLACES)
def test_hostile_names(tmp_path: Path, place: str) -> None:
    pair, names = hostile(tmp_path, place)
    done = run("rank", *pair, "--matrices")
    assert (done.returncode, done.stderr) == (0, "")
    assert_harmless(done.stdout)
    without_blanks = re.sub(r"\s", "", done.stdout)
    for case in ("markup", "markup that closes", "markup that links", "emoji code", "html", "unicode"):
        assert re.sub(r"\s", "", PLACES[place].format(HOSTILE[case])) in without_blanks, case
    for case in ("newline", "carriage return", "escape codes", "title of the terminal", "right to left", "null"):
        assert HOSTILE[case].encode("unicode_escape").decode() in without_blanks, case
    notes = nonfinite(done.stdout)
    assert set(notes.values()) == set(range(1, len(names)))
    assert max(map(len, notes)) <= 201


def test_a_name_of_10_kb_does_not_flood_the_tables(tmp_path: Path) -> None:
    name = PLACES["module"].format(HOSTILE["10 kB"])
    done = run("rank", *saved(tmp_path, *changed_by(11, {name: (4, 4)})), "--matrices")
    assert done.returncode == 0
    assert done.stdout.count("xxxx") > 1
    assert done.stdout.count("x") < 1000, "names are cut at 200 characters elsewhere"


def test_hostile_names_in_json_and_parquet(tmp_path: Path) -> None:
    pair, names = hostile(tmp_path, "alone")
    done = run("rank", *pair, "--json", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert_harmless(done.stdout.rstrip("\n"))
    assert sorted(row["name"] for row in assert_strict(done.stdout)["ranks_by_matrix"]) == sorted(names)
    assert set(paramdiff.load(tmp_path / "out").ranks["name"]) == set(names)
    assert set(pl.read_parquet(tmp_path / "out" / "spectra.parquet")["name"]) == {names[-1]}


@pytest.mark.parametrize("command", ["rank", "subspace"])
def test_a_name_that_is_no_text_is_refused_or_shown(tmp_path: Path, command: str) -> None:
    layout = {HOSTILE["lone surrogate"]: ("F32", (2, 2)), "w": ("F32", (2, 2))}
    a = write_checkpoint(tmp_path / "a.safetensors", layout)
    b = write_checkpoint(tmp_path / "b.safetensors", layout, b"\0\0\x80\x3f")
    for more in ([], ["--json"]):
        done = run(command, a, b, *more)
        assert "Traceback" not in done.stderr
        if done.returncode:
            assert_sentence(done, 2, str(a))


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def slow_pair(directory: Path) -> tuple[Path, Path]:
    """Matrices whose spectra take tens of seconds."""
    values = np.random.default_rng(12).standard_normal((2048, 2048)).astype(np.float16)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(10)]
    return saved(directory, dict.fromkeys(names, values[::-1]), dict.fromkeys(names, values))


def imports_are_done(pid: int) -> bool:
    return "polars" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["rank", "subspace"])
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, command: str, workers: int) -> None:
    pair = slow_pair(tmp_path)
    with started(command, *pair, "--threads", workers, "--out", tmp_path / "out" / "new") as process:
        wait_for(lambda: opened(process.pid, pair) and imports_are_done(process.pid))
        if workers > 1:
            wait_for(lambda: len(children_of(process)) == workers)
        time.sleep(0.5)
        crew = children_of(process)
        os.killpg(process.pid, signal.SIGINT)
        done = finished(process, timeout=30)
    assert_sentence(done, 130, "nterrupted")
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}
    wait_for(lambda: not any(alive(pid) for pid in crew), seconds=1)


@pytest.mark.slow
def test_ctrl_c_in_the_first_moments_does_not_hang(tmp_path: Path) -> None:
    """While a thread imports what writes the tables. It takes a few attempts to hit the moment."""
    pair = slow_pair(tmp_path)
    for attempt in range(12):
        with started("rank", *pair, "--threads", "1") as process:
            wait_for(lambda: opened(process.pid, pair))
            os.killpg(process.pid, signal.SIGINT)
            assert_sentence(finished_soon(process, f"at attempt {attempt + 1}"), 130, "nterrupted")


def finished_soon(process: subprocess.Popen[str], when: str) -> subprocess.CompletedProcess[str]:
    try:
        return finished(process, timeout=10)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still there 10 s after Ctrl-C, {when}")


def test_ctrl_c_does_not_wait_for_an_import(tmp_path: Path) -> None:
    """Whatever holds up the thread that imports polars meanwhile: here a slow disk."""
    (tmp_path / "polars").mkdir()
    (tmp_path / "polars" / "__init__.py").write_text("import time; time.sleep(60)")
    pair = sparse_pair(tmp_path, 2 << 30)
    with started("sparsity", *pair, "--threads", "1", env=environment(PYTHONPATH=str(tmp_path))) as process:
        wait_for(lambda: opened(process.pid, pair))
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        assert_sentence(finished_soon(process, "because of an import"), 130, "nterrupted")


@pytest.mark.slow
def test_ctrl_c_keeps_old_results(tmp_path: Path) -> None:
    run_json("rank", BASE, SGD, "--out", tmp_path / "out")
    before = contents(tmp_path / "out")
    pair = slow_pair(tmp_path)
    with started("rank", *pair, "--threads", "2", "--json", "--out", tmp_path / "out") as process:
        workers = wait_for(lambda: len(found := children_of(process)) == 2 and found)
        wait_for(lambda: all(opened(pid, pair) for pid in workers) and imports_are_done(process.pid))
        os.killpg(process.pid, signal.SIGINT)
        done = finished(process, timeout=30)
    assert_sentence(done, 130, "nterrupted")
    assert contents(tmp_path / "out") == before


# --- sparsity --measures ---------------------------------------------------------------------------------------------


def without_seconds(text: str) -> str:
    return re.sub(r"read in [\d.]+ s", "read in … s", text)


def of_ranks(text: str) -> str:
    """From the headline of the ranks to the end of the table by layer."""
    lines = [line.rstrip() for line in text.split("\nEvery matrix")[0].splitlines() if " MB read in " not in line]
    begin = next(number for number, line in enumerate(lines) if re.match(r"\d+ matrices, of full rank", line))
    return "\n".join(lines[begin:]).rstrip()


def test_sparsity_and_ranks_in_one_pass(found: Row, shown: str, plain: Row) -> None:
    args = ("sparsity", BASE, ADAMW, "--measures", "change,magnitude,rows,spectrum")
    done = run(*args)
    assert (done.returncode, done.stderr) == (0, "")
    usual, _, cost = without_seconds(run("sparsity", BASE, ADAMW).stdout).rstrip().rpartition("\n")
    assert without_seconds(done.stdout).startswith(usual)
    assert without_seconds(done.stdout).rstrip().endswith(cost)
    assert of_ranks(done.stdout) == of_ranks(shown)
    both = run_json(*args)
    assert set(both) == set(plain) | KEYS
    for name in set(plain) - {"seconds"}:
        assert both[name] == plain[name], name
    assert plain["bytes_read"] == both["bytes_read"] == 334_944 * 4
    for name in KEYS:
        assert both[name] == found[name], name


def test_change_and_spectrum_alone(found: Row, shown: str, tmp_path: Path) -> None:
    args = ("sparsity", BASE, ADAMW, "--measures", "change, spectrum")
    done = run(*args)
    assert (done.returncode, done.stderr) == (0, "")
    text = squeezed(done.stdout)
    assert f"in value {100 * found['sparsity']:.2f} % {found['changed']:,}" in text
    assert "By kind" in text
    assert "By layer" in text
    assert of_ranks(done.stdout) == of_ranks(shown)
    got = run_json(*args, "--out", tmp_path / "out")
    assert {**got, "seconds": 0} == {**found, "seconds": 0}
    assert {path.stem for path in (tmp_path / "out").glob("*.parquet")} == OUT


def test_plain_sparsity_has_no_ranks(plain: Row) -> None:
    assert not KEYS & set(plain)


@pytest.mark.parametrize("measures", ["nonsense", "change,nonsense,spectrum", "change;spectrum", "\x1b[31mred"])
def test_unknown_measures_are_refused_with_the_known_names(tmp_path: Path, measures: str) -> None:
    done = run("sparsity", BASE, ADAMW, "--measures", measures, "--out", tmp_path / "out")
    said = assert_sentence(done, 2, "change", "magnitude", "rows", "spectrum", "subspace")
    assert "\x1b" not in said
    assert not (tmp_path / "out").exists()


def test_no_measures_at_all_still_count_changes(plain: Row) -> None:
    got = run_json("sparsity", BASE, ADAMW, "--measures", "")
    for name in ("tensors", "numel", "changed", "changed_bits", "changed_bf16", "sparsity", "sign_flips", "bytes_read"):
        assert got[name] == plain[name], name
    assert got["l2_delta"] is None
    assert not KEYS & set(got)


def test_compat_beside_spectra(found: Row) -> None:
    args = ("sparsity", BASE, ADAMW, "--compat", "mukherjee2025")
    plain, got = run_json(*args), run_json(*args, "--measures", "change,spectrum")
    assert got["compat"] == "mukherjee2025"
    assert got["tolerances"] == plain["tolerances"]
    assert [entry["tol"] for entry in got["tolerances"]] == [1e-5]
    for name in KEYS:
        assert got[name] == found[name], name


# --- what is imported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["rank", "--help"], ["subspace", "--help"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    assert imported(COMMAND, *args) & {*HEAVY, "scipy"} == set()


def test_sparsity_imports_neither_scipy_nor_torch_nor_plotly() -> None:
    found = imported(COMMAND, "sparsity", BASE, ADAMW)
    assert found & {"scipy", "torch", "plotly"} == set()
    assert "polars" in found


@pytest.mark.parametrize("command", ["rank", "subspace"])
def test_spectra_on_the_cpu_need_no_torch(command: str) -> None:
    found = imported(COMMAND, command, BASE, ADAMW, "--include", "layers.0", "--device", "cpu")
    assert found & {"torch", "plotly", "transformers"} == set()
    assert "scipy" in found
