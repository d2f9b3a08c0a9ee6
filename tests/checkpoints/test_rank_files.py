"""Rank files of FSDP against what FSDP itself gathers: every tensor bit by bit; broken sets of files are refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import paramdiff
from paramdiff import checkpoints
from paramdiff.errors import BrokenFile, CheckpointError, UnsupportedFormat
from tests.checkpoints.test_dcp import assert_same, model, raw, read
from tests.cli.helpers import assert_sentence, run, run_json
from tests.real.make_ranks import KINDS, PLACED

ROOT = Path(__file__).parents[2]
UNREAD = {"fsdp2_tp"}  # cut twice along one dimension, from the inside out


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    made = subprocess.run(
        [sys.executable, "-m", "tests.real.make_ranks", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*KINDS} - UNREAD))
def test_every_tensor_is_what_the_framework_gathers(real: Path, kind: str) -> None:
    expected = torch.load(real / f"{kind}.pt")
    checkpoint = checkpoints.open(str(real / kind / "global_step_2"))
    assert checkpoint.facts()["format"] == "ranks"
    assert checkpoint.warnings == []
    assert_same(checkpoint, expected)


@pytest.mark.slow
def test_what_is_cut_in_an_order_that_is_not_read_is_named(real: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="_StridedShard") as caught:
        checkpoints.open(str(real / "fsdp2_tp" / "global_step_2" / "actor"))
    assert caught.value.hint


@pytest.mark.slow
def test_two_runs_through_the_command(real: Path, tmp_path: Path) -> None:
    """What verl leaves: the path of a step is enough, whatever the number of ranks and the way of sharding."""
    base, tuned = real / "fsdp2" / "global_step_2", real / "fsdp2_tied" / "global_step_2"
    told = run_json("sparsity", base, real / "fsdp1_mesh" / "global_step_2")
    before, after = torch.load(real / "fsdp2.pt"), torch.load(real / "fsdp1_mesh.pt")
    assert told["changed"] == sum(int((before[name] != after[name]).sum()) for name in before)
    assert told["coverage"]["only_base"] == told["coverage"]["only_tuned"] == []
    # the config in huggingface/ says that the tuned side's head is its embedding
    diff = paramdiff.compare(base, tuned)
    assert diff.run["tuned"]["format"] == "ranks"
    assert diff.coverage.height == 0
    assert_sentence(run("sparsity", base.parent, tuned), 2, "several steps", "global_step_2")


@pytest.mark.slow
def test_masters_against_a_bf16_export(real: Path, tmp_path: Path) -> None:
    """Values of masters differ from their own bf16 export nearly everywhere, and not at all after rounding."""
    from safetensors.torch import save_file

    whole = torch.load(real / "fsdp2.pt")
    save_file({name: weight.bfloat16().contiguous() for name, weight in whole.items()}, str(tmp_path / "model.safetensors"))
    summary = paramdiff.compare(tmp_path, real / "fsdp2" / "global_step_2").summary()
    assert summary["changed"] == sum(int((w != w.bfloat16().float()).sum()) for w in whole.values()) > 0
    assert summary["changed_bf16"] == 0


@pytest.mark.slow
def test_sets_of_files_that_are_not_whole(real: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(real / "fsdp2" / "global_step_2" / "actor", tmp_path / name))

    name = "model_world_size_2_rank_{}.pt".format
    missing = copied("missing")
    (missing / name(1)).unlink()
    with pytest.raises(BrokenFile, match="rank 1 of 2"):
        checkpoints.open(str(missing))
    mixed = copied("mixed")
    shutil.copy(mixed / name(0), mixed / "model_world_size_4_rank_3.pt")
    with pytest.raises(BrokenFile, match="world sizes"):
        checkpoints.open(str(mixed))
    beyond = copied("beyond")
    shutil.move(beyond / name(1), beyond / name(7))
    with pytest.raises(BrokenFile, match="do not fit a world size"):
        checkpoints.open(str(beyond))
    twice = copied("twice")
    shutil.copy(twice / name(0), twice / name(1))  # the same part from both
    with pytest.raises(BrokenFile, match=r"disagree|fill|incomplete"):
        checkpoints.open(str(twice))
    shutil.copy(real / "fsdp2_bf16" / "global_step_2" / "actor" / name(1), missing / name(1))
    with pytest.raises(BrokenFile, match="BF16"):
        checkpoints.open(str(missing))

    with pytest.raises(UnsupportedFormat, match="a part of a tensor"):
        checkpoints.open(str(real / "fsdp2" / "global_step_2" / "actor" / name(0)))


@pytest.mark.slow
def test_every_cut_of_every_file_is_refused(real: Path, tmp_path: Path) -> None:
    actor = Path(shutil.copytree(real / "placed" / "global_step_2" / "actor", tmp_path / "a"))
    path = actor / "model_world_size_4_rank_2.pt"
    whole = path.read_bytes()
    for keep in range(0, len(whole), max(len(whole) // 40, 1)):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError):
            checkpoints.open(str(actor))
    path.write_bytes(whole)
    checkpoints.open(str(actor)).close()


def test_the_placements_that_are_made_cover_what_there_is() -> None:
    assert {len(how) for _, how in PLACED.values()} == {2}


# --- by hand: plain tensors, as one process and save_lora_only leave them --------------------------


def ranks(path: Path, *contents: Any) -> Path:
    path.mkdir(parents=True)
    for rank, content in enumerate(contents):
        torch.save(content, path / f"model_world_size_{len(contents)}_rank_{rank}.pt")
    return path


def test_one_process(tmp_path: Path) -> None:
    assert_same(checkpoints.open(str(ranks(tmp_path / "a", model()))), model())


def test_plain_tensors_that_all_ranks_hold(tmp_path: Path) -> None:
    checkpoint = checkpoints.open(str(ranks(tmp_path / "a", model(), model(), model())))
    assert read(checkpoint, "model.norm.weight") == raw(model()["model.norm.weight"])
    checkpoint.close()


def test_names_of_adapters_stay(tmp_path: Path) -> None:
    content = {
        "base_model.model.q.lora_A.default.weight": torch.ones(2, 3),
        "base_model.model.q.base_layer.weight": torch.ones(3),
    }
    assert_same(checkpoints.open(str(ranks(tmp_path / "a", content))), content)


CONTENTS: dict[str, tuple[Callable[[], Any], type[CheckpointError], str]] = {
    "no mapping": (lambda: [torch.ones(2)], BrokenFile, "no tensors by name"),
    "nothing": (lambda: {"step": 3}, BrokenFile, "without a tensor"),
    "not contiguous": (lambda: {"w": torch.ones(3, 4).T}, UnsupportedFormat, "not contiguous"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_are_not_read(tmp_path: Path, case: str) -> None:
    content, kind, words = CONTENTS[case]
    with pytest.raises(kind, match=words):
        checkpoints.open(str(ranks(tmp_path / "a", content())))


def test_what_is_no_tensor_is_said(tmp_path: Path) -> None:
    path = ranks(tmp_path / "a", {**model(), "step": 3, 7: torch.ones(2)})
    checkpoint = checkpoints.open(str(path))
    assert checkpoint.warnings == [f"{path}: 'step', 7 ignored; not tensors by name."]
    assert_same(checkpoint, model())


def test_an_entry_is_not_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="rank files have not"):
        checkpoints.open(f"{ranks(tmp_path / 'a', model())}::model")
