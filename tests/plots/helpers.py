"""What tests of figures share: checkpoints read and written without paramdiff, and the contents of a figure."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from safetensors.torch import save_file

import paramdiff
from paramdiff import Diff

SAMPLE = Path(__file__).parents[2] / "sample_data"
BASE, SGD, SFT = (SAMPLE / name for name in ("base", "rl-sgd", "sft"))
STATES = SAMPLE / "checkpoints" / "rl-adamw"
UP = "model.layers.{}.mlp.up_proj.weight"
Array = np.ndarray[Any, Any]
Tensors = Mapping[str, torch.Tensor]


# --- files, read and written without paramdiff -----------------------------------------------------------------------


@cache
def patterns(directory: Path) -> dict[str, Array]:
    """The bf16 patterns of every tensor of a checkpoint."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        content = file.read_bytes()
        begin = 8 + struct.unpack("<Q", content[:8])[0]
        for name, entry in json.loads(content[8:begin]).items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16"
                start, end = (begin + at for at in entry["data_offsets"])
                found[name] = np.frombuffer(content[start:end], "<u2").reshape(entry["shape"])
    return found


@cache
def values(directory: Path) -> dict[str, Array]:
    """The same as float64: bf16 is the upper half of a float32."""
    return {n: (p.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for n, p in patterns(directory).items()}


@cache
def deltas(tuned: Path) -> dict[str, Array]:
    """Δ of every tensor, taken in float32 as it is defined."""
    a, b = values(BASE), values(tuned)
    return {name: (b[name].astype(np.float32) - a[name].astype(np.float32)).astype(np.float64) for name in a}


def layer_of(name: str) -> str:
    found = re.search(r"layers\.(\d+)\.", name)
    return found[1] if found else "none"


def module_of(name: str) -> str:
    return name.split(".")[-2]


def by_cell(names: Any) -> dict[tuple[str, str], list[str]]:
    """Names of tensors by module and layer."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found.setdefault((module_of(name), layer_of(name)), []).append(name)
    return found


GROUPS: dict[str | None, Callable[[str], str]] = {
    None: lambda _: "rl-sgd",
    "module": module_of,
    "kind": lambda n: "norm" if "norm" in n else "attention" if "attn" in n else "mlp" if "mlp" in n else "embedding",
}


def pair(directory: Path, base: Tensors, tuned: Tensors) -> tuple[Path, Path]:
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "a.safetensors", directory / "b.safetensors"
    for path, tensors in zip(paths, (base, tuned), strict=True):
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return paths


def compared(directory: Path, base: Tensors, tuned: Tensors, **options: Any) -> Diff:
    return paramdiff.compare(*pair(directory, base, tuned), threads=1, **options)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stepped(shape: tuple[int, int], changed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros, and the same with so many ones at the front."""
    before = torch.zeros(shape)
    after = before.clone()
    after.view(-1)[:changed] = 1.0
    return before, after


def in_steps(directory: Path, counts: Mapping[str, int], shape: tuple[int, int] = (100, 100)) -> Diff:
    """A comparison in which this many elements of each tensor changed."""
    made = {name: stepped(shape, changed) for name, changed in counts.items()}
    return compared(directory, {n: a for n, (a, _) in made.items()}, {n: b for n, (_, b) in made.items()})


# --- figures, read ---------------------------------------------------------------------------------------------------


def axis(fig: go.Figure, which: str, panel: int = 0) -> Any:
    return fig.layout[f"{which}axis{panel + 1 if panel else ''}"]


def cells(fig: go.Figure, panel: int = 0, *, zeros: bool = False, key: str = "z") -> dict[tuple[str, str], Any]:
    """What a panel of a heat map holds, by the labels of its axes: {(row, column): value}, without empty ones."""
    name = f"x{panel + 1}" if panel else None
    own = [trace for trace in fig.data if (trace.xaxis or None) in ((name,) if name else (None, "x"))]
    picked = [trace for trace in own if (trace.coloraxis is None) == zeros]
    if not picked:
        return {}
    (trace,) = picked
    rows, columns = axis(fig, "y", panel), axis(fig, "x", panel)
    assert list(rows.tickvals) == list(range(len(trace[key])))
    found = {}
    for y, line in enumerate(trace[key]):
        for x, value in enumerate(line):
            if trace.z[y][x] is not None:
                found[rows.ticktext[y], columns.ticktext[list(columns.tickvals).index(x)]] = value
    return found


def lines(fig: go.Figure) -> dict[str, Any]:
    return {trace.name: trace for trace in fig.data if trace.name is not None}


def assert_described(fig: go.Figure, axes: int = 1) -> None:
    """It has a title, words for those who do not see it, and titles on the axes that need one."""
    assert fig.layout.title.text.strip()
    alt = fig.layout.meta["alt"]
    assert len(alt) > 20
    assert alt.endswith(".")
    titles = [fig.layout[key].title.text for key in fig.layout if re.fullmatch(r"[xy]axis\d*", key)]
    assert sum(bool(title) for title in titles) >= axes, titles
    json.loads(fig.to_json())
