"""`paramdiff sparsity`: its numbers, its three ways of showing them, and what it writes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import paramdiff
from paramdiff.columns import TABLES

from .helpers import (
    COMMAND,
    SAMPLE,
    assert_sentence,
    environment,
    run,
    run_json,
    sparse_pair,
    squeezed,
    write_checkpoint,
)

BASE = SAMPLE / "base"
MEASURED: dict[str, dict[str, Any]] = json.loads((SAMPLE / "runs.json").read_text())["measured"]
TOLERANCES = ("1e-5", "1e-8")
KEYS = {
    "base", "tuned", "tensors", "numel", "dtype_base", "dtype_tuned", "compared_in", "changed", "sparsity", "changed_bits",
    "sparsity_bits", "changed_bf16", "sparsity_bf16", "tolerances", "l2_delta", "rel_l2", "max_abs_delta", "coverage",
    "bytes_read", "seconds",
}  # fmt: skip
ALSO = {"sign_flips", "nonfinite_base", "nonfinite_tuned"}
COVERAGE = {"compared", "only_base", "only_tuned", "shape_mismatch", "not_numeric"}
ALSO_COVERAGE = {"resized", "tied", "excluded"}
DEFAULT_TABLES = ("tensors", "histograms", "rows", "coverage")
FILES = {*(f"{name}.parquet" for name in DEFAULT_TABLES), "run.json"}


def expanded(table: str, tolerances: tuple[float, ...]) -> dict[str, str]:
    """{column: type} of a table, with one `above[τ]` and `sparsity[τ]` for each tolerance."""
    columns = {}
    for name, (kind, _) in TABLES[table].items():
        for given in tolerances if name.endswith("[τ]") else (None,):
            columns[name if given is None else name.replace("τ", repr(given))] = kind
    return columns


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_has_the_keys_of_the_contract() -> None:
    found = run_json("sparsity", BASE, SAMPLE / "rl-sgd", "--tol", "1e-5", "--tol", "1e-8")
    assert set(found) == KEYS | ALSO
    assert set(found["coverage"]) == COVERAGE | ALSO_COVERAGE
    assert [set(entry) for entry in found["tolerances"]] == [{"tol", "above", "sparsity"}] * 2
    assert [entry["tol"] for entry in found["tolerances"]] == [1e-5, 1e-8]


def test_json_without_tolerances() -> None:
    assert run_json("sparsity", BASE, SAMPLE / "sft")["tolerances"] == []


@pytest.mark.parametrize("name", list(MEASURED))
def test_json_equals_what_the_runs_measured(name: str) -> None:
    expected = MEASURED[name]
    found = run_json("sparsity", BASE, SAMPLE / name, "--tol", "1e-5", "--tol", "1e-8")
    assert (found["base"], found["tuned"]) == (str(BASE), str(SAMPLE / name))
    assert found["tensors"] == found["coverage"]["compared"] == 50
    assert found["numel"] == expected["numel"]
    assert found["changed"] == expected["changed"]
    assert found["sparsity"] == 1 - expected["changed"] / expected["numel"]
    for entry in found["tolerances"]:
        above = expected["above"][repr(entry["tol"])]
        assert (entry["above"], entry["sparsity"]) == (above, 1 - above / expected["numel"])
    fp32 = name.endswith("fp32")
    assert (found["dtype_base"], found["dtype_tuned"]) == ("BF16", "F32" if fp32 else "BF16")
    assert found["changed_bits"] == (None if fp32 else expected["changed"])
    assert found["changed_bf16"] == expected.get("changed_after_bf16_rounding", expected["changed"])
    assert found["sparsity_bf16"] == 1 - found["changed_bf16"] / found["numel"]
    assert found["bytes_read"] == expected["numel"] * (6 if fp32 else 4)
    assert found["seconds"] > 0
    assert 0 < found["rel_l2"] < 1
    assert 0 < found["max_abs_delta"] <= found["l2_delta"]
    assert not any(found["coverage"][reason] for reason in COVERAGE - {"compared"})


def test_a_pair_of_equals_has_changed_nothing() -> None:
    found = run_json("sparsity", BASE, BASE, "--tol", "0")
    assert (found["changed"], found["sparsity"], found["l2_delta"], found["max_abs_delta"]) == (0, 1.0, 0.0, 0.0)
    assert found["tolerances"] == [{"tol": 0.0, "above": 0, "sparsity": 1.0}]


def test_order_matters_only_to_signs() -> None:
    there, back = (run_json("sparsity", *pair) for pair in ((BASE, SAMPLE / "sft"), (SAMPLE / "sft", BASE)))
    assert there["changed"] == back["changed"]
    assert there["l2_delta"] == back["l2_delta"]


def test_json_is_strict_where_numbers_are_not_finite(tmp_path: Path) -> None:
    values = struct.pack("<4f", float("inf"), float("-inf"), float("nan"), 1.0)
    for side, data in (("a", values), ("b", bytes(16))):
        write_checkpoint(tmp_path / f"{side}.safetensors", {"w": ("F32", (4,))}, data)
    done = run("sparsity", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    assert done.returncode == 0, done.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(done.stdout, parse_constant=refuse)
    assert (found["changed"], found["nonfinite_base"], found["nonfinite_tuned"]) == (4, 3, 0)
    assert found["max_abs_delta"] == 1.0


def test_coverage_names_what_was_not_compared(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", {"w": ("F32", (4,)), "x": ("F32", (4,)), "s": ("F32", (2,))})
    write_checkpoint(tmp_path / "b.safetensors", {"w": ("F32", (4,)), "y": ("F32", (4,)), "s": ("F32", (3,))})
    pair = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    found = run_json("sparsity", *pair)["coverage"]
    assert (found["compared"], found["only_base"], found["only_tuned"], found["shape_mismatch"]) == (1, ["x"], ["y"], ["s"])
    text = squeezed(run("sparsity", *pair).stdout)
    assert "1 tensor, only in the base: x" in text
    assert "1 tensor, only in the tuned side: y" in text
    assert "1 tensor, of shapes that differ, and no rule relates them: s" in text


# --- --out -----------------------------------------------------------------------------------------------------------


def test_out_writes_the_tables_of_columns_py(tmp_path: Path) -> None:
    summary = run_json("sparsity", BASE, SAMPLE / "rl-sgd", "--tol", "1e-5", "--tol", "1e-8", "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    frames = {name: pl.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in DEFAULT_TABLES}
    for name, frame in frames.items():
        assert {column: str(kind) for column, kind in frame.schema.items()} == expanded(name, (1e-5, 1e-8)), name
        if name != "tensors":
            assert frame.columns == list(TABLES[name])
    tensors = frames["tensors"]
    assert tensors.height == summary["tensors"]
    for column in ("numel", "changed", "changed_bits", "changed_bf16", "sign_flips"):
        assert tensors[column].sum() == summary[column], column
    for entry in summary["tolerances"]:
        assert tensors[f"above[{entry['tol']!r}]"].sum() == entry["above"]
    assert (tensors["l2_delta"] ** 2).sum() ** 0.5 == pytest.approx(summary["l2_delta"], rel=1e-12)
    assert tensors["max_abs_delta"].max() == summary["max_abs_delta"]
    assert (tensors["sparsity"] == 1 - tensors["changed"] / tensors["numel"]).all()
    changed_rows = frames["rows"].with_columns(pl.col("changed").list.sum())
    matrices = tensors.filter(pl.col("rows").is_not_null())
    for axis in ("rows", "cols"):
        assert changed_rows.filter(axis=axis)["changed"].sum() == matrices["changed"].sum()
    ulp = frames["histograms"].filter(histogram="ulp")
    assert ulp["count"].sum() == summary["numel"]
    assert ulp.filter(pl.col("upper") > 0)["count"].sum() == summary["changed"]
    assert frames["coverage"].is_empty()


def test_run_json_says_where_the_numbers_come_from(tmp_path: Path) -> None:
    args = (BASE, SAMPLE / "rl-sgd", "--tol", "1e-5", "--include", "layers", "--exclude", "norm", "--exclude", "mlp")
    summary = run_json("sparsity", *args, "--out", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "run.json").read_text())
    assert told["base"]["ref"] == str(BASE)
    assert told["base"]["files"] == [{"name": "model.safetensors", "bytes": (BASE / "model.safetensors").stat().st_size}]
    assert told["tuned"]["ref"] == str(SAMPLE / "rl-sgd")
    assert [file["name"] for file in told["tuned"]["files"]] == [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    options = told["options"]
    assert options["tolerances"] == [1e-5]
    assert (options["include"], options["exclude"], options["compat"]) == (["layers"], ["norm", "mlp"], None)
    assert options["device"] == "cpu"
    assert told["versions"]["paramdiff"] == paramdiff.__version__
    assert set(told["versions"]) >= {"paramdiff", "numpy", "polars", "python"}
    assert (told["bytes_read"], told["seconds"]) == (summary["bytes_read"], summary["seconds"])
    assert told["warnings"] == []
    assert set(told["tables"]) == set(DEFAULT_TABLES)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", told["started"])


def test_what_was_written_loads_to_the_same_summary(tmp_path: Path) -> None:
    summary = run_json("sparsity", BASE, SAMPLE / "sft", "--tol", "1e-8", "--out", tmp_path / "a" / "b")
    assert paramdiff.load(tmp_path / "a" / "b").summary() == summary


def test_tables_without_rows_keep_their_types(tmp_path: Path) -> None:
    for side in "ab":
        write_checkpoint(tmp_path / f"{side}.safetensors", {"bias": ("F32", (4,)), f"only_{side}": ("F32", (1,))})
    run_json("sparsity", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--out", tmp_path / "out")
    for name in DEFAULT_TABLES:
        frame = pl.read_parquet(tmp_path / "out" / f"{name}.parquet")
        assert {column: str(kind) for column, kind in frame.schema.items()} == expanded(name, ()), name


def test_the_same_run_twice_writes_the_same_tables(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_json("sparsity", BASE, SAMPLE / "rl-sgd", "--tol", "1e-5", "--out", tmp_path / name)
    for name in DEFAULT_TABLES:
        one, two = (pl.read_parquet(tmp_path / run / f"{name}.parquet") for run in ("one", "two"))
        assert one.equals(two, null_equal=True), name


def test_old_results_are_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_json("sparsity", BASE, SAMPLE / "rl-sgd", "--tol", "1e-5", "--out", out)
    # as if that run had written one more table than the next one will
    pl.DataFrame({"name": ["w"]}).write_parquet(out / "spectra.parquet")
    told = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**told, "tables": [*told["tables"], "spectra"]}))
    (out / "notes.txt").write_text("mine")
    summary = run_json("sparsity", BASE, SAMPLE / "sft", "--out", out)
    assert paramdiff.load(out).summary() == summary
    assert (out / "notes.txt").read_text() == "mine"
    assert {path.name for path in out.iterdir()} == FILES | {"notes.txt"}, "a table of the old run lies among the new ones"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_old_results_survive_a_failing_comparison(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_json("sparsity", BASE, SAMPLE / "rl-sgd", "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert_sentence(run("sparsity", BASE, tmp_path / "nowhere", "--out", out), 2)
    assert_sentence(run("sparsity", BASE, SAMPLE / "sft", "--include", "zzz", "--out", out), 3)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_out_into_the_current_directory(tmp_path: Path) -> None:
    done = run("sparsity", BASE, SAMPLE / "sft", "--out", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == FILES


# --- tables for people -----------------------------------------------------------------------------------------------


def test_the_table_shows_the_numbers_of_the_json(tmp_path: Path) -> None:
    args = ("sparsity", BASE, SAMPLE / "rl-sgd", "--tol", "1e-5", "--tol", "1e-8")
    summary, done = run_json(*args), run(*args, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    text = squeezed(done.stdout)
    for part in (
        f"base {BASE}",
        f"tuned {SAMPLE / 'rl-sgd'}",
        "334,944 parameters in 50 tensors",
        "in value 68.63 % 105,071 31.37 %",
        "in stored bits 68.63 % 105,071",
        "after rounding to bf16 68.63 % 105,071",
        "|Δ| ≤ 1e-05 70.19 % 99,853 29.81 %",
        "|Δ| ≤ 1e-08 68.63 % 105,071",
        f"‖Δ‖/‖base‖ {summary['rel_l2']:.3g}",
        f"largest |Δ| {summary['max_abs_delta']:.3g}",
        f"{summary['sign_flips']} sign flips",
        "By kind",
        "By layer",
        "1.3 MB read",
        f"Tables written to {tmp_path / 'out'}",
    ):
        assert part in text, part
    kinds = dict(paramdiff.compare(BASE, SAMPLE / "rl-sgd").by("kind").select("kind", "changed").iter_rows())
    for kind, changed in kinds.items():
        assert re.search(rf"^ *{kind} .* {changed:,} ", done.stdout, re.MULTILINE), kind


def test_different_types_are_said_and_bits_have_no_count() -> None:
    text = squeezed(run("sparsity", BASE, SAMPLE / "rl-adamw-fp32").stdout)
    assert "base stored in BF16, tuned in F32" in text
    assert "in stored bits (the types differ) – – –" in text


@pytest.mark.parametrize(
    ("numel", "changed", "unchanged", "share"),
    [
        (1_000_000, 1, "99.999900 %", "0.000100 %"),
        (300_000, 1, "99.999667 %", "0.000333 %"),
        (1_000_000, 12, "99.99880 %", "0.00120 %"),
        (1_000_000, 0, "100 %", "0 %"),
        (1_000_000, 1_000_000, "0 %", "100 %"),
        (1_000_000, 999_999, "0.000100 %", "99.999900 %"),
    ],
)
def test_shares_near_100_percent_stay_legible(tmp_path: Path, numel: int, changed: int, unchanged: str, share: str) -> None:
    layout = {"w": ("BF16", (numel,))}
    base = write_checkpoint(tmp_path / "a.safetensors", layout)
    tuned = write_checkpoint(tmp_path / "b.safetensors", layout, b"\x80\x3f" * changed)
    text = squeezed(run("sparsity", base, tuned).stdout)
    assert f"in value {unchanged} {changed:,} {share}" in text, text


def test_quiet_says_nothing_but_writes(tmp_path: Path) -> None:
    base = with_a_leftover(tmp_path)
    done = run("sparsity", base, base, "--quiet", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert run("layers", base, base, "-q").stdout == ""


def test_quiet_does_not_hush_errors(tmp_path: Path) -> None:
    assert_sentence(run("sparsity", BASE, tmp_path / "nowhere", "--quiet"), 2, "nowhere")


def with_a_leftover(directory: Path) -> Path:
    """A checkpoint directory with a file that is ignored, which is worth a warning."""
    for name in ("model", "old"):
        write_checkpoint(directory / "base" / f"{name}.safetensors", {"w": ("F32", (4,))})
    return directory / "base"


@pytest.mark.parametrize("more", [["--json"], []])
def test_warnings_go_to_stderr(tmp_path: Path, more: list[str]) -> None:
    base = with_a_leftover(tmp_path)
    done = run("sparsity", base, base, *more)
    assert done.returncode == 0
    assert done.stderr.startswith("paramdiff: warning: ")
    assert "old.safetensors" in done.stderr
    assert "warning:" not in done.stdout
    assert "old.safetensors" not in done.stdout


def test_a_warning_is_given_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "b.safetensors", {"w": ("F32", (4,))})
    done = run("sparsity", with_a_leftover(tmp_path), tmp_path / "b.safetensors")
    assert done.stderr.count("\n") == 1, done.stderr


# --- the progress bar ------------------------------------------------------------------------------------------------


def on_a_terminal(*args: object) -> tuple[int, str, str]:
    """Run with stderr on a terminal of 100 columns. Returns (exit code, stdout, what the terminal got)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [COMMAND, *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment(TERM="xterm"), text=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # EIO: the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, shown.decode()


def test_a_progress_bar_with_bytes_on_a_terminal(tmp_path: Path) -> None:
    code, out, shown = on_a_terminal("sparsity", *sparse_pair(tmp_path, 300 << 20), "--json")
    assert code == 0
    assert json.loads(out)["bytes_read"] == 600 << 20
    assert "comparing" in shown
    assert re.search(r"\d+(\.\d+)?/\d+(\.\d+)? MB", shown), shown[-300:]
    assert re.search(r"/s", shown)
    assert re.search(r"\d:\d\d:\d\d|-:--:--", shown)


def test_quiet_shows_no_bar_on_a_terminal(tmp_path: Path) -> None:
    assert on_a_terminal("sparsity", *sparse_pair(tmp_path, 100 << 20), "--quiet") == (0, "", "")


def test_no_bar_where_stderr_is_no_terminal(tmp_path: Path) -> None:
    done = run("sparsity", *sparse_pair(tmp_path, 100 << 20))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout


# --- which tensors ---------------------------------------------------------------------------------------------------


def test_include_and_exclude_several() -> None:
    args = ("--include", r"layers\.0\.", "--include", r"layers\.2\.", "--exclude", "norm", "--exclude", "bias")
    found = run_json("sparsity", BASE, SAMPLE / "rl-sgd", *args)
    expected = 2 * 7  # two layers of q, k, v, o, gate, up, down
    assert found["tensors"] == found["coverage"]["compared"] == expected
    assert found["coverage"]["excluded"] == 50 - expected
    text = squeezed(run("sparsity", BASE, SAMPLE / "rl-sgd", *args).stdout)
    assert "36 tensors left out by --include/--exclude" in text


def test_what_is_excluded_is_in_the_coverage_table(tmp_path: Path) -> None:
    run_json("sparsity", BASE, SAMPLE / "rl-sgd", "--exclude", "embed_tokens", "--out", tmp_path / "out")
    coverage = pl.read_parquet(tmp_path / "out" / "coverage.parquet")
    assert set(coverage.select("name", "side", "reason").iter_rows()) == {
        ("model.embed_tokens.weight", side, "excluded") for side in ("base", "tuned")
    }


# --- --compat --------------------------------------------------------------------------------------------------------


def test_compat_takes_1e_5_where_no_tolerance_is_given() -> None:
    found = run_json("sparsity", BASE, SAMPLE / "rl-sgd", "--compat", "mukherjee2025")
    assert found["compat"] == "mukherjee2025"
    assert [entry["tol"] for entry in found["tolerances"]] == [1e-5]
    assert "mukherjee2025 ≤ 1e-05" in squeezed(run("sparsity", BASE, SAMPLE / "rl-sgd", "--compat", "mukherjee2025").stdout)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["rl-sgd", "rl-adamw", "sft", "rl-adamw-fp32"])
def test_compat_mukherjee2025_counts_what_the_script_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM

    def parameters(directory: Path) -> dict[str, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        return {key: value.detach() for key, value in model.named_parameters()}

    before, after = parameters(BASE), parameters(SAMPLE / name)
    assert before.keys() == after.keys()
    changed = dict.fromkeys(TOLERANCES, 0)
    for key in before:
        delta = after[key] - before[key]
        assert delta.dtype == torch.bfloat16
        for tolerance in TOLERANCES:
            close = torch.isclose(delta, torch.zeros_like(delta), atol=float(tolerance))
            changed[tolerance] += int((~close).sum())
    args = [option for tolerance in TOLERANCES for option in ("--tol", tolerance)]
    found = run_json("sparsity", BASE, SAMPLE / name, "--compat", "mukherjee2025", *args)
    assert {repr(entry["tol"]): entry["above"] for entry in found["tolerances"]} == {
        repr(float(tolerance)): count for tolerance, count in changed.items()
    }
    assert found["numel"] == sum(value.numel() for value in before.values())


# --- the other ways in and out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", ["0", "1e-5", "1"])
def test_workers_do_not_change_the_result(tmp_path: Path, tolerance: str) -> None:
    base, tuned = sparse_pair(tmp_path, 40 << 20, tensors=4)
    with tuned.open("r+b") as file:
        file.seek(20 << 20)
        file.write(os.urandom(64) * 50_000)
    results = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        found = run_json("sparsity", base, tuned, "--tol", tolerance, "--threads", workers, "--out", out)
        found.pop("seconds")
        results.append((found, [pl.read_parquet(out / f"{name}.parquet").to_dicts() for name in DEFAULT_TABLES]))
    assert repr(results[0]) == repr(results[1])
    assert results[0][0]["changed"] > 0


def test_one_file_an_index_and_a_directory_are_the_same() -> None:
    sgd = SAMPLE / "rl-sgd"
    results = [
        run_json("sparsity", BASE / "model.safetensors", sgd / "model.safetensors.index.json"),
        run_json("sparsity", BASE, sgd),
    ]
    for found in results:
        for key in ("base", "tuned", "seconds"):
            found.pop(key)
    assert results[0] == results[1]


def test_relative_paths_are_shown_as_typed() -> None:
    done = run("sparsity", "base", "rl-sgd/", "--json", cwd=SAMPLE)
    assert (json.loads(done.stdout)["base"], json.loads(done.stdout)["tuned"]) == ("base", "rl-sgd/")
