"""`paramdiff subspace`: its numbers against numpy and scipy, how it shows them, what it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.linalg
from threadpoolctl import threadpool_limits

import paramdiff
from paramdiff.columns import CHANGE, IDENTITY, TABLES

from .helpers import SAMPLE, assert_sentence, run, run_json, squeezed, write_checkpoint
from .test_errors import HOSTILE, PLACES
from .test_rank import (
    ATTENTION,
    MLP,
    assert_harmless,
    assert_schema,
    assert_shows,
    assert_strict,
    changed_by,
    hostile,
    layer_of,
    matrices,
    module_of,
    rows_below,
    saved,
    shown_and_found,
)

Matrix = np.ndarray[Any, Any]
Row = dict[str, Any]

BASE, ADAMW, SFT = (SAMPLE / name for name in ("base", "rl-adamw", "sft"))
F32, F64 = np.float32, np.float64
pytestmark = pytest.mark.slow
KEYS = {"subspaces", "subspaces_by_module", "subspaces_by_layer", "subspaces_by_matrix"}
OUT = {"tensors", "histograms", "subspaces", "angles", "weight_spectra", "coverage"}
KS = (4, 16)
OF_ANGLES = tuple(
    f"{name}_{side}{of}" for side in "uv" for name, of in (("angle", "_max"), ("angle", "_mean"), ("overlap", ""))
)


# --- the reference ---------------------------------------------------------------------------------------------------


def among_smallest(magnitudes: Matrix, changed: Matrix, share: float) -> float:
    """How many of the changed elements are among the `share` with the smallest magnitudes, ties in proportion."""
    wanted = share * magnitudes.size
    threshold = np.sort(magnitudes, axis=None)[min(int(np.ceil(wanted)) - 1, magnitudes.size - 1)]
    below, tied = magnitudes < threshold, magnitudes == threshold
    return float((below & changed).sum() + (wanted - below.sum()) / tied.sum() * (tied & changed).sum())


def subspaces_of(base: Matrix, tuned: Matrix, ks: Sequence[int], alpha: float = 0.5) -> dict[int, Row]:
    """What metrics.md §4 defines, from whole SVDs. Both sides hold bf16 values, so that rounding changes nothing."""
    (u0, s0, vt0), (u1, s1, vt1) = (np.linalg.svd(w.astype(F64), full_matrices=False) for w in (base, tuned))
    changed, shift = base != tuned, s1 - s0
    common: Row = {"rows": base.shape[0], "cols": base.shape[1], "changed_bf16": changed.sum()}
    common |= {"alpha": alpha, "chance": alpha}
    common |= {"nss": np.linalg.norm(shift) / np.linalg.norm(s0), "largest_sigma_shift": np.abs(shift).max()}
    common["sigma_shift_share"] = np.linalg.norm(shift) / np.linalg.norm((tuned - base).astype(F64))
    common["low_overlap"] = among_smallest(np.abs(base), changed, alpha) / changed.sum()
    found = {}
    for k in ks:
        row = common | {"k": k, "gap": (s0[k - 1] - (s0[k] if k < len(s0) else 0)) / s0[0]}
        for side, before, after in (("u", u0, u1), ("v", vt0.T, vt1.T)):
            turned = scipy.linalg.subspace_angles(before[:, :k], after[:, :k])[::-1]
            row |= {f"angles_{side}": np.degrees(turned), f"chance_{side}": k / len(before)}
            row |= {f"angle_{side}_max": np.degrees(turned.max()), f"angle_{side}_mean": np.degrees(turned.mean())}
            row[f"overlap_{side}"] = np.mean(np.cos(turned) ** 2)
        principal = np.abs((u0[:, :k] * s0[:k]) @ vt0[:k]).astype(F32)
        row["principal_overlap"] = 1 - among_smallest(principal, changed, 1 - alpha) / changed.sum()
        found[k] = row
    return found


def assert_row(found: Row, expected: Row) -> None:
    for name in ("rows", "cols", "k", "changed_bf16", "alpha", "chance"):
        assert found[name] == expected[name], name
    for name in ("gap", "nss", "largest_sigma_shift", "sigma_shift_share", "low_overlap", "chance_u", "chance_v"):
        assert found[name] == pytest.approx(expected[name], rel=1e-8), name
    for name in OF_ANGLES:
        assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-8), name
    assert found["principal_overlap"] == pytest.approx(expected["principal_overlap"], abs=1.5 / expected["changed_bf16"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The reference needs no threads of BLAS's, which wait for each other on a busy machine."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, int], Row]:
    before, after = matrices(BASE), matrices(ADAMW)
    return {(name, k): row for name, w in before.items() for k, row in subspaces_of(w, after[name], KS).items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, Path]:
    """The JSON of base against rl-adamw, and where its tables are."""
    out = tmp_path_factory.mktemp("subspace") / "out"
    return run_json("subspace", BASE, ADAMW, "--k", "4,16", "--out", out), out


@pytest.fixture(scope="module")
def found(written: tuple[Row, Path]) -> Row:
    return written[0]


@pytest.fixture(scope="module")
def shown() -> str:
    done = run("subspace", BASE, ADAMW, "--k", "4,16")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def by_key(found: Row) -> dict[tuple[str, int], Row]:
    return {(row["name"], row["k"]): row for row in found["subspaces_by_matrix"]}


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_json_holds_every_matrix_at_every_k(found: Row, expected: dict[tuple[str, int], Row]) -> None:
    assert set(found) > KEYS
    rows = by_key(found)
    assert set(rows) == set(expected)
    assert len(found["subspaces_by_matrix"]) == 29 * 2
    for (name, k), row in rows.items():
        assert list(row) == list(TABLES["subspaces"])
        assert_row(row, expected[name, k])
        assert (row["layer"], row["module"], row["expert"]) == (layer_of(name), module_of(name), None)
        assert row["note"] is None


def test_the_theorems_hold_in_what_is_printed_as_json(found: Row) -> None:
    ranks = {row["name"]: row for row in run_json("rank", BASE, ADAMW)["ranks_by_matrix"]}
    for row in found["subspaces_by_matrix"]:
        assert row["largest_sigma_shift"] <= ranks[row["name"]]["sigma_1"] * (1 + 1e-9), "Weyl"
        assert row["sigma_shift_share"] <= 1 + 1e-9, "Mirsky"
        for side in "uv":
            assert 0 <= row[f"angle_{side}_mean"] <= row[f"angle_{side}_max"] <= 90
            assert 0 <= row[f"overlap_{side}"] <= 1 + 1e-12


def rolled_up(rows: Sequence[Row]) -> Row:
    changed = sum(row["changed_bf16"] for row in rows)
    pooled: Row = {"matrices": len(rows), "left_out": 0, "changed_bf16": changed, "chance": rows[0]["alpha"]}
    for name in ("angle_u_max", "angle_v_max"):
        pooled |= {f"{name}_median": np.median([row[name] for row in rows]), name: max(row[name] for row in rows)}
    for name in ("overlap_u", "chance_u", "overlap_v", "chance_v", "nss", "sigma_shift_share"):
        pooled[f"{name}_mean"] = np.mean([row[name] for row in rows])
    pooled["nss_max"] = max(row["nss"] for row in rows)
    for name in ("principal_overlap", "low_overlap"):
        pooled[name] = sum(row[name] * row["changed_bf16"] for row in rows) / changed
    return pooled


@pytest.mark.parametrize("key", [None, "module", "layer"])
def test_json_rolls_up(found: Row, expected: dict[tuple[str, int], Row], key: str | None) -> None:
    of = {None: lambda name: None, "module": module_of, "layer": layer_of}[key]
    groups: dict[tuple[Any, int], list[Row]] = {}
    for (name, k), row in expected.items():
        groups.setdefault((of(name), k), []).append(row)
    rows = found["subspaces" if key is None else f"subspaces_by_{key}"]
    assert len(rows) == len(groups)
    for row in rows:
        pooled = rolled_up(groups.pop((row.get(key) if key else None, row["k"])))
        for name, value in pooled.items():
            if name in ("matrices", "left_out", "changed_bf16", "chance"):
                assert row[name] == value, name
            else:
                assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-4 if name == "principal_overlap" else 1e-8), name
    assert groups == {}


def test_reinforcement_learning_turns_the_leading_directions_less_than_sft(found: Row) -> None:
    """Recorded of the sample data, at k = 4: every module, every matrix, both sides."""
    sft = run_json("subspace", BASE, SFT, "--k", "4")
    theirs = {row["module"]: row for row in sft["subspaces_by_module"]}
    ours = {row["module"]: row for row in found["subspaces_by_module"] if row["k"] == 4}
    assert set(ours) == set(theirs) == {"embed_tokens", *ATTENTION, *MLP}
    for module, rl in ours.items():
        for side in "uv":
            assert rl[f"angle_{side}_max_median"] < theirs[module][f"angle_{side}_max_median"], module
            assert rl[f"angle_{side}_max"] < theirs[module][f"angle_{side}_max"], module
            assert rl[f"overlap_{side}_mean"] > theirs[module][f"overlap_{side}_mean"], module
        assert rl["nss_mean"] < theirs[module]["nss_mean"], module
        assert rl["principal_overlap"] < theirs[module]["principal_overlap"] < 0.5, module
        assert rl["low_overlap"] > theirs[module]["low_overlap"] > 0.5, module


def test_alpha_moves_the_masks_and_nothing_else(found: Row, tmp_path: Path) -> None:
    text, diff = shown_and_found(tmp_path / "out", "subspace", BASE, ADAMW, "--k", "4", "--alpha", "0.1")
    before, after = matrices(BASE), matrices(ADAMW)
    half = by_key(found)
    masks = {"principal_overlap", "low_overlap", "alpha", "chance"}
    for row in diff.subspaces.to_dicts():
        name = row["name"]
        assert_row(row, subspaces_of(before[name], after[name], [4], 0.1)[4])
        assert {**half[name, 4], **dict.fromkeys(masks)} == {**row, **dict.fromkeys(masks)}
    assert "chance gives 10.00 %" in text
    assert "50.00 %" not in text


def test_an_unchanged_pair(tmp_path: Path) -> None:
    text, diff = shown_and_found(tmp_path / "out", "subspace", BASE, BASE, "--k", "4")
    for row in diff.subspaces.to_dicts():
        assert row["angle_u_max"] < 1e-6
        assert row["angle_v_max"] < 1e-6
        assert row["overlap_u"] == pytest.approx(1, abs=1e-12)
        assert (row["changed_bf16"], row["nss"], row["largest_sigma_shift"], row["note"]) == (0, 0, 0, None)
        assert row["principal_overlap"] is row["low_overlap"] is row["sigma_shift_share"] is None
    assert diff.subspaces_by()["principal_overlap"].to_list() == [None]
    for _, u, v, *_, nss, principal, low in rows_below(text, "by module").values():
        assert (u, v, nss, principal, low) == ("0°", "0°", "0", "–", "–")


# --- tables for people -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["module", "layer"])
def test_a_table_for_each_k_by_module_and_by_layer(shown: str, expected: dict[tuple[str, int], Row], key: str) -> None:
    of = module_of if key == "module" else layer_of
    for k in KS:
        table = rows_below(shown, f"The {k} leading directions, by {key}")
        groups: dict[Any, list[Row]] = {}
        for (name, at), row in expected.items():
            if at == k:
                groups.setdefault(of(name), []).append(row)
        assert set(table) == {"outside" if value is None else str(value) for value in groups}
        if key == "layer":
            assert list(table) == ["outside", "0", "1", "2", "3"]
        for value, rows in groups.items():
            pooled = rolled_up(rows)
            count, *cells = table["outside" if value is None else str(value)]
            assert int(count) == len(rows)
            for cell, name in zip(cells[:2], ("angle_u_max_median", "angle_v_max_median"), strict=True):
                assert cell.endswith("°")
                assert float(cell.removesuffix("°")) == pytest.approx(pooled[name], rel=0.0051, abs=1e-6)
            overlaps = ("overlap_u_mean", "chance_u_mean", "overlap_v_mean", "chance_v_mean")
            for cell, name in zip(cells[2:6], overlaps, strict=True):
                assert float(cell.removesuffix(" %")) == pytest.approx(100 * pooled[name], abs=0.0051), name
            assert_shows(cells[6], pooled["nss_mean"])
            for cell, name in zip(cells[7:], ("principal_overlap", "low_overlap"), strict=True):
                assert float(cell.removesuffix(" %")) == pytest.approx(100 * pooled[name], abs=0.02)


def test_around_the_tables(shown: str) -> None:
    text = squeezed(shown)
    assert f"base {BASE} tuned {ADAMW} 334,944 parameters in 50 tensors" in text
    assert "chance gives 50.00 %" in text
    assert "1.3 MB read in" in text
    titles = re.findall(r"The (\d+) leading directions, by (\w+)", shown)
    assert set(titles) == {(str(k), key) for k in KS for key in ("module", "layer")}
    assert len(titles) == 4


def test_vectors_alone_are_no_matrices_and_that_is_said(tmp_path: Path) -> None:
    pair = saved(tmp_path, *changed_by(1, {"layers.0.norm.weight": (8,), "bias": (1,)}))
    done = run("subspace", *pair)
    assert (done.returncode, done.stderr) == (0, "")
    assert "No tensor that was compared is a matrix" in done.stdout
    assert "leading directions" not in done.stdout
    found = run_json("subspace", *pair, "--out", tmp_path / "out")
    assert all(found[key] == [] for key in KEYS)
    for name in ("subspaces", "angles", "weight_spectra"):
        assert_schema(pl.read_parquet(tmp_path / "out" / f"{name}.parquet"), name)


def test_nan_in_one_matrix_is_said_and_the_others_are_there(tmp_path: Path) -> None:
    base, tuned = changed_by(2, {f"layers.0.{name}.weight": (6, 5) for name in ("q_proj", "k_proj")})
    tuned["layers.0.k_proj.weight"][1, 1] = np.nan
    pair = saved(tmp_path, base, tuned)
    done = run("subspace", *pair, "--k", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "layers.0.k_proj.weight: holds NaN or infinite elements" in done.stdout.splitlines()
    table = rows_below(done.stdout, "by module")
    assert table["k_proj"] == ["0", *["–"] * 9]
    assert table["q_proj"][0] == "1"
    found = assert_strict(run("subspace", *pair, "--k", "2", "--json").stdout)
    rows = {row["module"]: row for row in found["subspaces_by_matrix"]}
    assert rows["q_proj"]["note"] is None
    u0, u1 = (np.linalg.svd(side["layers.0.q_proj.weight"].astype(F64))[0][:, :2] for side in (base, tuned))
    assert rows["q_proj"]["angle_u_max"] == pytest.approx(np.degrees(scipy.linalg.subspace_angles(u0, u1).max()), rel=1e-6)
    assert rows["k_proj"]["angle_u_max"] is rows["k_proj"]["nss"] is None
    assert (found["subspaces"][0]["matrices"], found["subspaces"][0]["left_out"]) == (2, 1)


def test_experts_of_a_stack_are_matrices_of_their_own(tmp_path: Path) -> None:
    stack = "model.layers.0.mlp.experts.down_proj"
    base, tuned = changed_by(3, {stack: (3, 6, 5), "conv.weight": (4, 3, 2, 2)})
    tuned[stack][1, 0, 0] = np.inf
    text, diff = shown_and_found(tmp_path / "out", "subspace", *saved(tmp_path, base, tuned), "--k", "2")
    rows = {(row["name"], row["expert"]): row for row in diff.subspaces.to_dicts()}
    assert set(rows) == {(stack, 0), (stack, 1), (stack, 2), ("conv.weight", None)}
    assert (rows["conv.weight", None]["rows"], rows["conv.weight", None]["cols"]) == (4, 12)
    for expert in (0, 2):
        sigma = [np.linalg.svd(side[stack][expert].astype(F64), compute_uv=False) for side in (base, tuned)]
        drift = np.linalg.norm(sigma[1] - sigma[0]) / np.linalg.norm(sigma[0])
        assert rows[stack, expert]["nss"] == pytest.approx(drift, rel=1e-9)
    assert f"{stack} (expert 1): holds NaN or infinite elements" in text
    assert rows_below(text, "by module")["experts.down_proj"][0] == "2"


# --- --k and --alpha -------------------------------------------------------------------------------------------------


def test_several_k_in_any_order(tmp_path: Path) -> None:
    found = run_json("subspace", BASE, ADAMW, "--include", "layers.0.*q_proj.weight", "--k", " 16,4,,16", "--out", tmp_path)
    assert [row["k"] for row in found["subspaces_by_matrix"]] == [row["k"] for row in found["subspaces"]] == [4, 16]
    assert json.loads((tmp_path / "run.json").read_text())["options"]["ks"] == [4, 16]


@pytest.mark.parametrize("given", ["0", "a,b", "", ",", "-3", "4,0", "1.5", "4,\x1b[31m", "9" * 5000])
def test_k_that_makes_no_sense(tmp_path: Path, given: str) -> None:
    said = assert_sentence(run("subspace", BASE, ADAMW, f"--k={given}", "--out", tmp_path / "out"), 2)
    assert "\x1b" not in said
    assert len(said) < 300
    assert re.search(r"--k\b|\bk\b", said)
    assert not (tmp_path / "out").exists()


def test_k_beyond_int64_is_refused_or_kept() -> None:
    given = str(2**63)
    done = run("subspace", BASE, ADAMW, "--include", "q_proj.weight", "--k", given, "--json")
    if done.returncode:
        assert_sentence(done, 2)
        return
    assert {row["k"] for row in json.loads(done.stdout)["subspaces_by_matrix"]} == {int(given)}


def test_k_beyond_the_rank_leaves_matrices_out_and_says_so(tmp_path: Path) -> None:
    args = ("subspace", BASE, ADAMW, "--include", "self_attn", "--k", "64,10000")
    found = run_json(*args, "--out", tmp_path / "out")
    narrow = {row["name"] for row in found["subspaces_by_matrix"] if min(row["rows"], row["cols"]) < 64}
    assert {module_of(name) for name in narrow} == {"k_proj", "v_proj"}
    for row in found["subspaces_by_matrix"]:
        left_out = row["k"] == 10000 or row["name"] in narrow
        assert (row["note"] is not None, row["angle_u_max"] is None) == (left_out, left_out)
        assert row["nss"] > 0, "the spectra are there whatever k is"
        assert row["low_overlap"] > 0
        if left_out:
            assert row["note"] == f"has fewer than {row['k']} singular values above zero"
    assert {row["k"]: (row["matrices"], row["left_out"]) for row in found["subspaces"]} == {64: (16, 8), 10000: (16, 16)}
    angles = pl.read_parquet(tmp_path / "out" / "angles.parquet")
    assert set(angles["k"]) == {64}
    assert not set(angles["name"]) & narrow
    done = run(*args)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"k_proj\.weight.* and 5 more: has fewer than 64 singular values above zero", done.stdout)
    assert re.search(r" and 13 more: has fewer than 10,?000 singular values above zero", done.stdout)
    assert rows_below(done.stdout, "The 64 leading directions, by module")["k_proj"] == ["0", *["–"] * 9]
    assert rows_below(done.stdout, "The 64 leading directions, by module")["q_proj"][0] == "4"
    assert "The 10000 leading directions" not in done.stdout, "a table without a number"


@pytest.mark.parametrize("given", ["0", "1", "2", "-0.5", "nan"])
def test_alpha_that_is_no_share(tmp_path: Path, given: str) -> None:
    assert_sentence(run("subspace", BASE, ADAMW, f"--alpha={given}", "--out", tmp_path / "out"), 2, "alpha", given)
    assert not (tmp_path / "out").exists()


def test_alpha_that_is_no_number() -> None:
    done = run("subspace", BASE, ADAMW, "--alpha", "half")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--alpha" in done.stderr
    assert "Traceback" not in done.stderr


# --- --out -----------------------------------------------------------------------------------------------------------


def test_out_writes_the_tables_of_columns_py(written: tuple[Row, Path], expected: dict[tuple[str, int], Row]) -> None:
    found, out = written
    assert {path.name for path in out.iterdir()} == {*(f"{name}.parquet" for name in OUT), "run.json"}
    frames = {name: pl.read_parquet(out / f"{name}.parquet") for name in OUT}
    for name in OUT - {"tensors"}:
        assert_schema(frames[name], name)
    tensors = {name: str(kind) for name, kind in frames["tensors"].schema.items()}
    assert tensors == {name: kind for name, (kind, _) in (IDENTITY | CHANGE).items() if "τ" not in name}
    assert frames["subspaces"].to_dicts() == found["subspaces_by_matrix"]
    groups = frames["angles"].partition_by("name", "k", "side", as_dict=True)
    assert set(groups) == {(name, k, side) for name, k in expected for side in "uv"}
    for (name, k, side), angles in groups.items():
        assert angles["index"].to_list() == list(range(1, k + 1))
        assert angles["degrees"].to_numpy() == pytest.approx(expected[name, k][f"angles_{side}"], rel=1e-6, abs=1e-8)
    before, after = matrices(BASE), matrices(ADAMW)
    spectra = frames["weight_spectra"].partition_by("name", as_dict=True)
    assert {name for (name,) in spectra} == set(before)
    for (name,), spectrum in spectra.items():
        assert spectrum["index"].to_list() == list(range(1, min(before[name].shape) + 1))
        for column, w in (("sigma_base", before[name]), ("sigma_tuned", after[name])):
            wanted = np.linalg.svd(w.astype(F64), compute_uv=False)
            assert spectrum[column].to_numpy() == pytest.approx(wanted, rel=1e-9), column


def test_run_json_records_the_options(written: tuple[Row, Path]) -> None:
    told = json.loads((written[1] / "run.json").read_text())
    options = told["options"]
    assert (options["measures"], options["ks"], options["alpha"]) == (["change", "subspace"], [4, 16], 0.5)
    assert (options["include"], options["exclude"], options["tolerances"]) == ([], [], [])
    assert set(told["tables"]) == OUT
    assert (told["base"]["ref"], told["tuned"]["ref"]) == (str(BASE), str(ADAMW))
    assert "scipy" in told["versions"]


def test_what_was_written_loads_again(written: tuple[Row, Path]) -> None:
    found, out = written
    diff = paramdiff.load(out)
    assert diff.subspaces.to_dicts() == found["subspaces_by_matrix"]
    assert diff.subspaces_by("module").to_dicts() == found["subspaces_by_module"]
    assert all(found[name] == value for name, value in diff.summary().items())


# --- which tensors, how quiet, how many workers ----------------------------------------------------------------------


def test_include_and_exclude(tmp_path: Path) -> None:
    args = ("subspace", BASE, ADAMW, "--k", "4", "--include", "layers", "--exclude", "mlp|norm", "--exclude", "[ko]_proj")
    found = run_json(*args)
    names = {name for name in matrices(BASE) if re.search(r"[qv]_proj", name)}
    assert {row["name"] for row in found["subspaces_by_matrix"]} == names
    done = run(*args, "--out", tmp_path / "out")
    assert f"{50 - found['tensors']} tensors left out by --include/--exclude" in done.stdout
    assert squeezed(done.stdout).endswith(f"Tables written to {tmp_path / 'out'}")
    assert set(rows_below(done.stdout, "by module")) == {"q_proj", "v_proj"}
    options = json.loads((tmp_path / "out" / "run.json").read_text())["options"]
    assert (options["include"], options["exclude"]) == (["layers"], ["mlp|norm", "[ko]_proj"])


def test_quiet_says_nothing_but_writes(tmp_path: Path) -> None:
    for name in ("model", "old"):  # a file that is ignored is worth a warning
        write_checkpoint(tmp_path / "base" / f"{name}.safetensors", {"w": ("F32", (4, 4))})
    pair = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    done = run("subspace", *pair, "-q", "--k", "2", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.stem for path in (tmp_path / "out").glob("*.parquet")} == OUT


def test_workers_do_not_change_the_result(found: Row) -> None:
    results = [found, *(run_json("subspace", BASE, ADAMW, "--k", "4,16", "--threads", n) for n in (1, 2))]
    one, *others = (json.dumps({**result, "seconds": 0}) for result in results)
    assert others == [one, one]


# --- usage, and what goes wrong --------------------------------------------------------------------------------------


def test_help_shows_examples_and_options() -> None:
    done = run("subspace", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = squeezed(done.stdout)
    assert "Examples: paramdiff subspace base/ tuned/ paramdiff subspace base/ tuned/ --k 16,64,256 --alpha 0.1" in text
    assert "'embed|lm_head'" in text
    for option in ("k", "alpha", "include", "exclude", "out", "json", "quiet", "threads", "device"):
        assert f"--{option} " in text, option


def test_the_default_is_16_and_64_at_one_half(tmp_path: Path) -> None:
    found = run_json("subspace", BASE, ADAMW, "--include", "layers.0.*q_proj.weight", "--out", tmp_path)
    assert [(row["k"], row["alpha"]) for row in found["subspaces_by_matrix"]] == [(16, 0.5), (64, 0.5)]


def test_nothing_to_compare(tmp_path: Path) -> None:
    a, b = saved(tmp_path, {"one": np.zeros((2, 2), F32)}, {"two": np.zeros((2, 2), F32)})
    for more in ([], ["--json"], ["--out", tmp_path / "out"]):
        assert_sentence(run("subspace", a, b, *more), 3, str(a), str(b), "'one'", "'two'")
    assert_sentence(run("subspace", BASE, ADAMW, "--exclude", "."), 3, "--include/--exclude")
    assert_sentence(run("subspace", BASE, tmp_path / "nowhere", "--out", tmp_path / "out"), 2, str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_subspaces_asked_for_beside_sparsity_do_not_vanish() -> None:
    """`--measures` names them among those it knows: they are shown, or they are refused."""
    args = ("sparsity", BASE, ADAMW, "--include", "layers.0", "--measures", "change,subspace")
    done = run(*args, "--json")
    if done.returncode:
        assert_sentence(done, 2, "subspace")
        return
    assert "subspaces" in json.loads(done.stdout)
    assert "leading directions" in run(*args).stdout


# --- names from hostile files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["alone", "module"])
def test_hostile_names(tmp_path: Path, place: str) -> None:
    pair, names = hostile(tmp_path, place)
    done = run("subspace", *pair, "--k", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert_harmless(done.stdout)
    assert re.search(rf" and {len(names) - 1 - 3} more: holds NaN or infinite elements$", done.stdout, re.MULTILINE)
    without_blanks = re.sub(r"\s", "", done.stdout)
    for case in ("markup", "markup that closes", "emoji code"):
        assert HOSTILE[case] in without_blanks, case
    done = run("subspace", *pair, "--k", "2", "--json", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert_harmless(done.stdout.rstrip("\n"))
    assert {row["name"] for row in assert_strict(done.stdout)["subspaces_by_matrix"]} == set(names)
    assert set(pl.read_parquet(tmp_path / "out" / "subspaces.parquet")["name"]) == set(names)


def test_a_name_of_10_kb_does_not_flood_the_tables(tmp_path: Path) -> None:
    name = PLACES["module"].format(HOSTILE["10 kB"])
    done = run("subspace", *saved(tmp_path, *changed_by(4, {name: (4, 4)})), "--k", "2,9")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("xxxx") > 1
    assert done.stdout.count("x") < 1000, "names are cut at 200 characters elsewhere"
