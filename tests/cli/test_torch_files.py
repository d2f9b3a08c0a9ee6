"""Torch files through the real command: what is read, and one sentence for what is not."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .helpers import SAMPLE, assert_sentence, run, run_json

BASE = SAMPLE / "base"


class Attack:
    """What unpickling by Python itself would run."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch attacked",)


class OfAFramework(torch.Tensor):
    pass


def torch_file(path: Path, case: str) -> str:
    """A torch file with one thing wrong; returns how to refer to it."""
    weights = {"w": torch.ones(4)}
    content = {
        "names a command": {"w": torch.ones(4), "x": Attack()},
        "two places": {"first": weights, "second": {"v": torch.ones(4)}},
        "no such key": {"model": weights},
        "nothing": {"step": 3},
        "a subclass": {"w": torch.ones(4).as_subclass(OfAFramework)},
        "complex128": {"w": torch.ones(4, dtype=torch.complex128)},
        "conjugated": {"w": torch.tensor([1 + 2j]).conj()},
    }.get(case, weights)
    torch.save(content, path)
    whole = path.read_bytes()
    if case == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    if case == "not one":
        path.write_bytes(b"no torch file")
    if case in ("compressed", "no pickle", "big-endian", "storage gone", "TorchScript"):
        with zipfile.ZipFile(io.BytesIO(whole)) as source:
            members = {name: source.read(name) for name in source.namelist()}
        root = next(iter(members)).split("/")[0]
        gone = {"no pickle": f"{root}/data.pkl", "storage gone": f"{root}/data/0"}.get(case)
        members.pop(gone or "", None)
        members |= {f"{root}/byteorder": b"big"} if case == "big-endian" else {}
        members |= {f"{root}/constants.pkl": b""} if case == "TorchScript" else {}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if case == "compressed" else zipfile.ZIP_STORED) as target:
            for name, data in members.items():
                target.writestr(name, data)
    return f"{path}::other" if case == "no such key" else str(path)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("names a command", ["system", "not executed"]),
        ("two places", ["'first'", "'second'", "::first"]),
        ("no such key", ["'other'", "'model'"]),
        ("nothing", ["no tensors by name"]),
        ("a subclass", ["OfAFramework"]),
        ("complex128", ["ComplexDoubleStorage"]),
        ("conjugated", ["conjugate"]),
        ("cut", ["damaged or no torch file"]),
        ("not one", ["no file of torch.save"]),
        ("compressed", ["compressed or encrypted"]),
        ("no pickle", ["no data.pkl"]),
        ("big-endian", ["big-endian"]),
        ("storage gone", ["'w'", "storage '0' is missing"]),
        ("TorchScript", ["TorchScript", "no module"]),
    ],
)
def test_a_torch_file_that_is_not_read_says_why(tmp_path: Path, case: str, words: list[str]) -> None:
    ref = torch_file(tmp_path / "run.pt", case)
    assert_sentence(run("sparsity", ref, BASE, cwd=tmp_path), 2, "run.pt", *words)
    assert not (tmp_path / "attacked").exists()


def test_an_entry_of_a_safetensors_checkpoint_is_refused(tmp_path: Path) -> None:
    assert_sentence(run("sparsity", f"{BASE}::model", BASE), 2, "'model'", "safetensors")


def test_a_torch_file_is_compared_as_safetensors_are(tmp_path: Path) -> None:
    torch.save({"model": load_file(BASE / "model.safetensors"), "step": 3}, tmp_path / "run.pt")
    told = run_json("sparsity", tmp_path / "run.pt", SAMPLE / "rl-sgd")
    assert told["changed"] == run_json("sparsity", BASE, SAMPLE / "rl-sgd")["changed"] == 105_071
