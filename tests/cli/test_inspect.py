"""`paramdiff inspect`: what is in a checkpoint, from its headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .helpers import SAMPLE, assert_sentence, run, run_json, squeezed, write_checkpoint


def test_text_names_every_tensor() -> None:
    done = run("inspect", SAMPLE / "rl-sgd")
    assert (done.returncode, done.stderr) == (0, "")
    text = squeezed(done.stdout)
    assert f"{SAMPLE / 'rl-sgd'}: safetensors, 4 file(s)" in text
    assert "50 tensors, 334,944 elements (334,944 in BF16), 669,888 bytes of data" in text
    assert "model.layers.0.mlp.down_proj.weight BF16 96 × 192 18,432 36,864" in text
    for name in run_json("inspect", SAMPLE / "rl-sgd")["tensors"]:
        assert f"{name['name']} " in text


def test_json_says_the_same() -> None:
    found = run_json("inspect", SAMPLE / "base")
    assert found["ref"] == str(SAMPLE / "base")
    assert found["format"] == "safetensors"
    assert found["files"] == [{"name": "model.safetensors", "bytes": (SAMPLE / "base" / "model.safetensors").stat().st_size}]
    assert (found["numel"], found["bytes"], found["dtypes"]) == (334_944, 669_888, {"BF16": 334_944})
    assert found["warnings"] == []
    assert len(found["tensors"]) == 50
    assert {"name": "model.norm.weight", "dtype": "BF16", "shape": [96], "numel": 96, "bytes": 192} in found["tensors"]


def test_json_agrees_with_the_reference_implementation() -> None:
    safetensors = pytest.importorskip("safetensors")
    found = {t["name"]: t for t in run_json("inspect", SAMPLE / "rl-adamw-fp32")["tensors"]}
    with safetensors.safe_open(SAMPLE / "rl-adamw-fp32" / "model.safetensors", "numpy") as file:
        assert set(file.keys()) == set(found)
        for name in found:
            part = file.get_slice(name)
            assert (part.get_dtype(), part.get_shape()) == (found[name]["dtype"], found[name]["shape"])


def test_include_several() -> None:
    found = run_json("inspect", SAMPLE / "base", "--include", "embed_tokens", "--include", r"^model\.norm")
    assert [t["name"] for t in found["tensors"]] == ["model.embed_tokens.weight", "model.norm.weight"]
    assert found["numel"] == 16 * 96 + 96


def test_include_nothing() -> None:
    done = run("inspect", SAMPLE / "base", "--include", "zzz")
    assert done.returncode == 0, done.stderr
    assert "0 tensors, 0 elements" in squeezed(done.stdout)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "w.safetensors", {"s": ("F32", ()), "e": ("BF16", (0, 7))})
    text = squeezed(run("inspect", file).stdout)
    assert "s F32 scalar 1 4" in text
    assert "e BF16 0 × 7 0 0" in text


def test_a_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "w.safetensors", {"w": ("BF16", (1 << 20, 1 << 20))})
    assert run_json("inspect", file)["bytes"] == 2 << 40


def test_warnings_go_to_stderr(tmp_path: Path) -> None:
    for name in ("model", "old"):
        write_checkpoint(tmp_path / f"{name}.safetensors", {"w": ("F32", (4,))})
    for more in ([], ["--json"]):
        done = run("inspect", tmp_path, *more)
        assert done.returncode == 0
        assert done.stderr.count("\n") == 1
        assert "old.safetensors" in done.stderr
    assert len(json.loads(done.stdout)["warnings"]) == 1


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_errors(tmp_path: Path, name: str) -> None:
    assert_sentence(run("inspect", tmp_path / name), 2, str(tmp_path))


def test_bad_regex() -> None:
    assert_sentence(run("inspect", SAMPLE / "base", "--include", "("), 2, "--include")
