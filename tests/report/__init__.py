"""Tests of the report: what its sentences and tables say, and the page in a real browser.

Here is what they check against: values read from files by hand, a few lines of numpy, and numbers as people write them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.register_assert_rewrite("tests.report.helpers")

SAMPLES = Path(__file__).parents[2] / "sample_data"
RUNS = ("rl-sgd", "rl-adamw", "sft")
TYPES = {"F32": np.float32, "F64": np.float64, "F16": np.float16, "I64": np.int64, "BF16": np.uint16}
Values = dict[str, NDArray[Any]]


def stored(directory: Path) -> Values:
    """Every tensor in the safetensors files of a directory, read without any library."""
    found: Values = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                raw = np.frombuffer(data[start:end], TYPES[entry["dtype"]])
                bf16 = entry["dtype"] == "BF16"
                found[name] = ((raw.astype(np.uint32) << 16).view(np.float32) if bf16 else raw).reshape(entry["shape"])
    assert found
    return found


def moved(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """Where two arrays differ in value; NaN is NaN."""
    return (a != b) & ~(np.isnan(a) & np.isnan(b))


def changes(base: Path, tuned: Path) -> dict[str, NDArray[np.bool_]]:
    """Where each tensor of two directories differs."""
    a, b = stored(base), stored(tuned)
    assert a.keys() == b.keys()
    return {name: moved(a[name], b[name]) for name in a}


def module(name: str) -> str:
    """model.layers.0.mlp.up_proj.weight → up_proj."""
    return name.split(".")[-2]


def layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def near(text: str, value: float) -> bool:
    """True for a number that is written as precisely as it is: half a unit of its last digit away, or less.

    Whole numbers are exact.
    """
    mantissa, _, power = text.replace(",", "").partition("e")
    decimals = len(mantissa.partition(".")[2])
    step = 10.0 ** (int(power or 0) - decimals) if decimals or power else 1e-9
    return abs(float(text.replace(",", "")) - value) <= 0.501 * step


def three_digits(text: str, value: float) -> bool:
    """True for a number rounded to three significant digits."""
    if value == 0:
        return float(text) == 0
    return abs(float(text) - value) <= 0.501 * 10.0 ** (math.floor(math.log10(abs(value))) - 2)
