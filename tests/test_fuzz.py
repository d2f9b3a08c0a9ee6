"""A short round of tests/fuzz.py, in a process of its own because it limits memory and listens to everything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.test_dcp import LAYOUTS, model, write

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_damaged_checkpoints_are_read_or_refused(tmp_path: Path) -> None:
    write(tmp_path / "dcp", LAYOUTS["prime-rl"](model()))
    (tmp_path / "safetensors").mkdir()
    save_file(model(), str(tmp_path / "safetensors" / "model.safetensors"))
    (tmp_path / "torch").mkdir()
    torch.save({"model": model()}, tmp_path / "torch" / "pytorch_model.bin")
    real = [
        "megatron/iter_0000002",
        "zero/stage2",
        "zero/stage3_groups",
        "zero/stage3_groups_universal",
        "quantised/nf4_double",
    ]
    corpus = [tmp_path / "dcp", tmp_path / "safetensors", tmp_path / "torch", *(ROOT / "tests/real" / name for name in real)]
    assert_nothing_escapes(corpus)


def assert_nothing_escapes(corpus: list[Path], *options: str) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *map(str, corpus), "--seconds", "15", *options],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout[-4000:] + told.stderr[-2000:]
    assert ", 0 of them" in told.stdout


@pytest.mark.slow
def test_damaged_optimizer_states_are_measured_or_refused(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sample_data/checkpoints/rl-adamw/checkpoint-200", tmp_path / "trainer")
    shutil.copytree(ROOT / "tests/real/optimizers/adam8bit", tmp_path / "bnb")
    (tmp_path / "ppo").mkdir()
    shutil.copy(ROOT / "tests/real/optimizers/ppo.zip", tmp_path / "ppo")
    real = [ROOT / "tests/real/zero" / name for name in ("stage2", "stage3_groups", "stage3_groups_universal")]
    assert_nothing_escapes([tmp_path / "trainer", tmp_path / "bnb", tmp_path / "ppo", *real], "--state")
