"""Sizes that break careless readers: a tensor beyond 2^31 bytes, and memory that must not grow with the file."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import paramdiff

COMMAND = Path(sys.executable).with_name("paramdiff")


def sparse_file(path: Path, numel: int, marks: dict[int, int]) -> Path:
    """A bf16 vector of zeros that takes no disk, with the patterns `marks` at some elements."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [numel], "data_offsets": [0, 2 * numel]}}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * numel)
        for element, pattern in marks.items():
            file.seek(8 + len(header) + 2 * element)
            file.write(struct.pack("<H", pattern))
    return path


@pytest.mark.slow
def test_a_tensor_beyond_two_gigabytes(tmp_path: Path) -> None:
    numel = 2**30 + 3  # 2^31 + 6 bytes
    base = sparse_file(tmp_path / "a.safetensors", numel, {0: 0x3F80, numel - 1: 0x3F80})
    tuned = sparse_file(tmp_path / "b.safetensors", numel, {0: 0x3F80, numel - 1: 0x3F81, 2**30: 0x4000})
    row = paramdiff.compare(base, tuned, tolerances=[0.01]).tensors.row(0, named=True)
    assert (row["numel"], row["changed"], row["above[0.01]"]) == (numel, 2, 1)
    assert row["l2_base"] == 2**0.5
    assert row["max_abs_delta"] == 2.0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (200, 2000):
        numel = megabytes * 500_000
        pair = [sparse_file(tmp_path / f"{side}{megabytes}.safetensors", numel, {5: 0x3F80 + side}) for side in (0, 1)]
        code = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
        )
        command = [sys.executable, "-c", code, os.fspath(COMMAND), "sparsity", *map(os.fspath, pair), "--quiet"]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert max(peaks) < 700
    assert peaks[1] < 1.2 * peaks[0]
