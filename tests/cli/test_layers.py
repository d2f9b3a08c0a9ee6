"""`paramdiff layers`: the table of layers × modules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import paramdiff

from .helpers import SAMPLE, assert_sentence, run, run_json, squeezed, write_checkpoint

BASE, SGD = SAMPLE / "base", SAMPLE / "rl-sgd"
MODULES = [
    "input_layernorm",
    "down_proj",
    "gate_proj",
    "up_proj",
    "post_attention_layernorm",
    "k_proj",
    "o_proj",
    "q_proj",
    "v_proj",
]


def rows(text: str) -> dict[int, list[str]]:
    """The cells of each layer in the printed table."""
    found = (re.match(r"\s*(\d+)\s{2,}(.*\S)", line) for line in text.splitlines())
    return {int(m[1]): re.split(r"\s{2,}", m[2]) for m in found if m}


def test_one_row_per_layer_one_column_per_module() -> None:
    done = run("layers", BASE, SGD)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sparsity by layer and module" in done.stdout
    assert "Outside layers: embed_tokens 33.53 % · norm 100 %" in squeezed(done.stdout)
    table = rows(done.stdout)
    assert list(table) == [0, 1, 2, 3]
    pooled = {(r["layer"], r["module"]): r for r in paramdiff.compare(BASE, SGD).by("layer", "module").to_dicts()}
    for layer, cells in table.items():
        assert len(cells) == len(MODULES)
        for module, cell in zip(MODULES, cells, strict=True):
            sparsity = pooled[layer, module]["sparsity"]
            assert float(cell.removesuffix(" %")) == pytest.approx(sparsity * 100, abs=0.005)


def test_tolerance_decides_the_cells() -> None:
    one, two = (rows(run("layers", BASE, SGD, *args).stdout) for args in ([], ["--tol", "1e-3", "--tol", "1e-8"]))
    expected = paramdiff.compare(BASE, SGD, tolerances=[1e-3]).by("layer", "module").to_dicts()
    found = {(r["layer"], r["module"]): r["sparsity[0.001]"] for r in expected}
    assert one != two
    assert float(two[0][1].removesuffix(" %")) == pytest.approx(found[0, "down_proj"] * 100, abs=0.005)


@pytest.mark.parametrize("value", ["sparsity_bits", "sparsity_bf16", "rel_l2", "mean_abs_delta", "max_abs_delta", "cosine"])
def test_every_value_can_be_shown(value: str) -> None:
    done = run("layers", BASE, SGD, "--value", value, "--tol", "1e-5", "--include", r"layers\.\d+\.mlp")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{value} by layer and module" in done.stdout
    pooled = {(r["layer"], r["module"]): r for r in paramdiff.compare(BASE, SGD).by("layer", "module").to_dicts()}
    for layer, cells in rows(done.stdout).items():
        for module, cell in zip(MODULES[1:4], cells, strict=True):
            share = value.startswith("sparsity")
            expected = pooled[layer, module][value] * (100 if share else 1)
            assert float(cell.removesuffix(" %")) == pytest.approx(expected, rel=0.005)


def test_bits_are_undefined_across_types() -> None:
    done = run("layers", BASE, SAMPLE / "rl-adamw-fp32", "--value", "sparsity_bits")
    assert done.returncode == 0, done.stderr
    assert set(rows(done.stdout)[0]) == {"–"}


def test_json_is_that_of_sparsity_with_layers() -> None:
    found, whole = run_json("layers", BASE, SGD, "--tol", "1e-5"), run_json("sparsity", BASE, SGD, "--tol", "1e-5")
    layers = found.pop("layers")
    for one in (found, whole):
        one.pop("seconds")
    assert found == whole
    assert {(r["layer"], r["module"]) for r in layers} == {(n, m) for n in range(4) for m in MODULES} | {
        (None, "embed_tokens"),
        (None, "norm"),
    }
    assert sum(r["numel"] for r in layers) == whole["numel"]
    assert sum(r["changed"] for r in layers) == whole["changed"]
    assert sum(r["above[1e-05]"] for r in layers) == whole["tolerances"][0]["above"]


def test_out_quiet_and_exclusion(tmp_path: Path) -> None:
    done = run("layers", BASE, SGD, "--exclude", "norm", "--quiet", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "norm" not in set(paramdiff.load(tmp_path / "out").tensors["kind"])


def test_a_checkpoint_without_layers(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "w.safetensors", {"w": ("F32", (2, 2)), "v": ("F32", (2,))})
    done = run("layers", file, file)
    assert (done.returncode, done.stderr) == (0, "")
    assert "w 100 %" in squeezed(done.stdout)


def test_a_missing_cell_is_left_empty(tmp_path: Path) -> None:
    layout = {"layers.0.mlp.up_proj.weight": ("F32", (2, 2)), "layers.1.mlp.down_proj.weight": ("F32", (2, 2))}
    file = write_checkpoint(tmp_path / "w.safetensors", layout)
    done = run("layers", file, file)
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout) == {0: ["100 %"], 1: ["100 %"]}


def test_bad_value_is_a_usage_error() -> None:
    done = run("layers", BASE, SGD, "--value", "beauty")
    assert done.returncode == 2
    assert "beauty" in done.stderr
    assert done.stdout == ""


def test_errors_are_those_of_sparsity(tmp_path: Path) -> None:
    assert_sentence(run("layers", BASE, tmp_path / "nowhere"), 2, "nowhere")
    assert_sentence(run("layers", BASE, SGD, "--include", "zzz"), 3)
