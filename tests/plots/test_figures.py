"""Figures: what they draw against numpy on the files, their words, names that want to break them, and odd checkpoints."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import paramdiff
from paramdiff import Diff, Moments, plots, wording
from paramdiff.errors import OptionError
from paramdiff.plots import quantities, style
from tests.cli.test_errors import CONTROL, HOSTILE

SAMPLE = Path(__file__).parents[2] / "sample_data"
BASE, SGD, ADAMW, SFT = (SAMPLE / name for name in ("base", "rl-sgd", "rl-adamw", "sft"))
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


@pytest.fixture(scope="module")
def sgd() -> Diff:
    return paramdiff.compare(BASE, SGD, measures=["change", "magnitude", "rows", "spectrum", "subspace"], ks=[4, 8])


@pytest.fixture(scope="module")
def sft() -> Diff:
    return paramdiff.compare(BASE, SFT, measures=["change", "magnitude", "rows", "spectrum"])


@pytest.fixture(scope="module")
def state() -> Moments:
    return paramdiff.adam(STATES / "checkpoint-200")


@pytest.fixture(scope="module")
def states() -> Moments:
    return paramdiff.adam(STATES / "checkpoint-199", STATES / "checkpoint-200")


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


# --- heat maps -------------------------------------------------------------------------------------------------------


def test_cells_are_the_changed_share_of_the_files(sgd: Diff) -> None:
    a, b = values(BASE), values(SGD)
    fig = plots.heatmap(sgd)
    found, expected = cells(fig), {}
    for cell, names in by_cell(a).items():
        changed, numel = (sum(int(count) for count in each) for each in ([(a[n] != b[n]).sum() for n in names],
                                                                         [a[n].size for n in names]))  # fmt: skip
        if changed:
            expected[cell] = math.log10(changed / numel)
    assert set(found) == set(expected)
    assert found == pytest.approx(expected, rel=1e-4)
    assert set(cells(fig, zeros=True)) == set(by_cell(a)) - set(expected)
    assert_described(fig)


def test_hovering_tells_exact_counts_and_the_tensor(sgd: Diff) -> None:
    a, b = values(BASE), values(SGD)
    told = cells(plots.heatmap(sgd), key="hovertext")
    singles = 0
    for cell, text in told.items():
        names = by_cell(a)[cell]
        changed, numel = sum(int((a[n] != b[n]).sum()) for n in names), sum(a[n].size for n in names)
        assert f"{changed:,} of {numel:,} parameters" in text
        if len(names) == 1:
            singles += 1
            assert text.startswith(f"{names[0]}<br>")
        else:
            assert f"{len(names)} tensors" in text
    assert 0 < singles < len(told)


def test_zero_is_grey_and_nothing_is_empty(tmp_path: Path) -> None:
    diff = in_steps(tmp_path, {UP.format(0): 0, UP.format(1): 7, "model.layers.1.mlp.down_proj.weight": 0})
    fig = plots.heatmap(diff)
    assert cells(fig) == {("up_proj", "1"): pytest.approx(math.log10(7 / 10_000), rel=1e-4)}
    assert set(cells(fig, zeros=True)) == {("up_proj", "0"), ("down_proj", "1")}
    assert [note.text for note in fig.layout.annotations if "zero" in note.text]
    assert all(trace.hoverongaps is False for trace in fig.data), "empty cells say nothing"


def test_norms_are_pooled_over_the_tensors_of_a_cell(sgd: Diff) -> None:
    a, d = values(BASE), deltas(SGD)
    expected = {}
    for cell, names in by_cell(a).items():
        up, down = (math.sqrt(sum(float((side[n] ** 2).sum()) for n in names)) for side in (d, a))
        if up and down:
            expected[cell] = math.log10(up / down)
    assert cells(plots.heatmap(sgd, "rel_l2")) == pytest.approx(expected, rel=1e-4)


def test_a_signed_quantity_is_symmetric_around_zero(sgd: Diff) -> None:
    d = deltas(SGD)
    expected = {c: float(np.concatenate([d[n].ravel() for n in names]).mean()) for c, names in by_cell(d).items()}
    fig = plots.heatmap(sgd, "mean_delta")
    assert cells(fig) == pytest.approx(expected, rel=1e-4, abs=1e-15)
    colours = fig.layout.coloraxis
    assert min(expected.values()) < 0 < max(expected.values())
    assert -colours.cmin == colours.cmax == pytest.approx(max(map(abs, expected.values())), rel=1e-9)
    assert colours.colorscale != plots.heatmap(sgd, "rel_l2").layout.coloraxis.colorscale


def test_several_runs_share_one_scale(sgd: Diff, sft: Diff) -> None:
    fig = plots.heatmap({"first": sgd, "second": sft})
    shown = [cells(fig, panel) for panel in (0, 1)]
    for found, alone in zip(shown, (sgd, sft), strict=True):
        assert found == cells(plots.heatmap(alone))
    every = [z for found in shown for z in found.values()]
    assert fig.layout.coloraxis.cmax == pytest.approx(max(every), rel=1e-4)
    assert fig.layout.coloraxis.cmin <= np.quantile(every, 0.1)
    assert {trace.coloraxis for trace in fig.data if trace.coloraxis} == {"coloraxis"}
    assert [note.text for note in fig.layout.annotations][:2] == ["<b>first</b>", "<b>second</b>"]
    assert "2 runs" in fig.layout.title.text
    assert all(label in fig.layout.meta["alt"] for label in ("first: ", "second: "))


def test_a_cell_far_below_all_others_does_not_take_their_colours(tmp_path: Path) -> None:
    counts = {UP.format(layer): 4000 + 10 * layer for layer in range(39)} | {UP.format(39): 1}
    fig = plots.heatmap(in_steps(tmp_path, counts))
    bar = fig.layout.coloraxis
    lowest = min(trace_z for line in fig.data[-1].z for trace_z in line)
    assert lowest == pytest.approx(-4, abs=1e-3)
    assert bar.cmin > -1
    assert bar.colorbar.ticktext[0].startswith("≤ ")
    assert bar.colorbar.tickvals[0] == bar.cmin
    assert list(bar.colorbar.tickvals) == sorted(set(bar.colorbar.tickvals))


def test_without_such_a_cell_nothing_is_clipped(sgd: Diff) -> None:
    bar = plots.heatmap(sgd).layout.coloraxis.colorbar
    assert not any("≤" in text for text in bar.ticktext)


def experts(layers: int = 2, count: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A small mixture of experts: expert e of layer l has 1 + l + 2e changes; the router none."""
    made = {}
    for layer in range(layers):
        for expert in range(count):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            made[name] = stepped((5, 8), 1 + layer + 2 * expert)
        made[f"model.layers.{layer}.mlp.gate.weight"] = stepped((3, 8), 0)
    return made


def test_experts_one_by_one(tmp_path: Path) -> None:
    made = experts()
    diff = compared(tmp_path, {n: a for n, (a, _) in made.items()}, {n: b for n, (_, b) in made.items()})
    fig = plots.heatmap(diff, module="experts.up_proj")
    expected = {(str(e), str(la)): math.log10((1 + la + 2 * e) / 40) for e in range(3) for la in range(2)}
    assert cells(fig) == pytest.approx(expected, rel=1e-4)
    assert axis(fig, "y").title.text == "expert"
    assert "experts.up_proj" in fig.layout.title.text
    assert_described(fig, 2)
    together = cells(plots.heatmap(diff))
    assert together["experts.up_proj", "1"] == pytest.approx(math.log10((2 + 4 + 6) / 120), rel=1e-4)
    for module in ("gate", "no such", "up_proj"):
        with pytest.raises(OptionError, match="There are no single experts of"):
            plots.heatmap(diff, module=module)


def test_experts_in_one_stack(tmp_path: Path) -> None:
    stack = {f"model.layers.{layer}.mlp.experts.gate_up_proj": normal(layer, 3, 4, 6) for layer in range(2)}
    moved = {name: tensor + 0.5 * normal(9, 3, 4, 6) for name, tensor in stack.items()}
    diff = compared(tmp_path, stack, moved, measures=["change", "magnitude", "rows", "spectrum"])
    assert set(cells(plots.heatmap(diff))) == {("experts.gate_up_proj", "0"), ("experts.gate_up_proj", "1")}
    with pytest.raises(OptionError, match="single experts"):
        plots.heatmap(diff, module="experts.gate_up_proj")
    fig = plots.heatmap(diff, "energy_rank_90_percent", module="experts.gate_up_proj")  # spectra know the experts
    expected = {}
    for layer, name in enumerate(stack):
        delta = (moved[name].float() - stack[name].float()).double().numpy()
        for expert in range(3):
            squares = np.cumsum(np.linalg.svd(delta[expert], compute_uv=False) ** 2)
            expected[str(expert), str(layer)] = 100 * (1 + int((squares < 0.9 * squares[-1]).sum())) / 4
    assert cells(fig) == pytest.approx(expected, rel=1e-4)


class NameLength:
    """A measure of one's own, with a value that differs between the weight and the bias of a module."""

    NAME = "name_length"

    def update(self, acc: Any, block: Any, options: Any) -> None:
        pass

    def columns(self, acc: Any, tensor: Any, options: Any) -> dict[str, Any]:
        return {"my_letters": float(len(tensor.name)), "odd": None if "q_proj.bias" in tensor.name else -1.0}

    def tables(self, acc: Any, tensor: Any) -> dict[str, list[dict[str, Any]]]:
        return {}


def test_a_column_of_ones_own_is_a_mean_weighted_by_elements() -> None:
    diff = paramdiff.compare(BASE, SGD, measures=["change", NameLength()], threads=1)
    a = values(BASE)
    expected = {
        cell: sum(len(n) * a[n].size for n in names) / sum(a[n].size for n in names) for cell, names in by_cell(a).items()
    }
    assert any(value % 1 for value in expected.values()), "some cells must pool"
    fig = plots.heatmap(diff, "my_letters")
    assert cells(fig) == pytest.approx(expected, rel=1e-4)
    assert "my_letters" in fig.layout.title.text
    assert set(cells(plots.heatmap(diff, "odd")).values()) == {-1.0}, "a missing value does not count as zero"


def test_ranks_and_subspaces(sgd: Diff) -> None:
    a, b, d = values(BASE), values(SGD), deltas(SGD)
    matrices = {n: delta for n, delta in d.items() if delta.ndim == 2 and delta.any()}
    expected = {}
    for name, delta in matrices.items():
        squares = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2)
        reached = 1 + int((squares < 0.99 * squares[-1]).sum())
        expected[module_of(name), layer_of(name)] = 100 * reached / min(delta.shape)
    assert cells(plots.heatmap(sgd, "energy_rank_99_percent")) == pytest.approx(expected, rel=1e-4)
    drawn = [cells(plots.heatmap(sgd, "overlap_u", k=k)) for k in (4, 8)]
    assert drawn[0] != drawn[1]
    for k, found in zip((4, 8), drawn, strict=True):
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn.k_proj.weight"
            left = [np.linalg.svd(side[name], full_matrices=False)[0][:, :k] for side in (a, b)]
            overlap = float(((left[0].T @ left[1]) ** 2).sum() / k)
            assert found["k_proj", str(layer)] == pytest.approx(overlap, rel=1e-4), (k, layer)
    assert cells(plots.heatmap(sgd, "overlap_u")) == drawn[0], "the smallest k"


def test_columns_of_adam_and_the_side_that_has_them(state: Moments, states: Moments) -> None:
    with closing(paramdiff.optimizer(STATES / "checkpoint-200")) as opened:
        roots = {n: np.sqrt(opened[n]["exp_avg_sq"].astype(np.float64) / (1 - 0.999**200)) for n in opened}
    expected = {
        cell: math.log10(np.concatenate([roots[n].ravel() for n in names]).mean()) for cell, names in by_cell(roots).items()
    }
    assert cells(plots.heatmap(state, "sqrt_vhat_mean")) == pytest.approx(expected, rel=1e-4)
    assert "adaptivity" in plots.heatmap(state).layout.title.text
    fig = plots.heatmap(states, "grad_norm")
    rows = states.parameters.filter((pl.col("side") == "second") & pl.col("grad_norm").is_not_null())
    squares = {(row["module"], "none" if row["layer"] is None else str(row["layer"])): 0.0 for row in rows.to_dicts()}
    for row in rows.to_dicts():
        squares[row["module"], "none" if row["layer"] is None else str(row["layer"])] += row["grad_norm"] ** 2
    assert cells(fig) == pytest.approx({cell: math.log10(math.sqrt(s)) for cell, s in squares.items()}, rel=1e-4)
    assert fig.layout.title.text.endswith("checkpoint-200"), "a gradient is the second's"
    own = [cells(plots.heatmap(states, "sqrt_vhat_mean", side=side)) for side in ("first", "second")]
    assert own[0] != own[1] == cells(plots.heatmap(state, "sqrt_vhat_mean"))
    assert plots.heatmap(states, "sqrt_vhat_mean").layout.title.text.endswith("checkpoint-199")


@pytest.mark.parametrize("column", ["nonsense", "name", "layer", "shape", "pairing_rule", "above[7.0]", "adaptivity"])
def test_unknown_columns_are_refused_with_the_known_ones(sgd: Diff, column: str) -> None:
    for draw in (plots.heatmap, plots.layers):
        with pytest.raises(OptionError, match=re.escape(f"no column {column!r}")) as caught:
            draw(sgd, column)
        for known in ("rel_l2", "changed_bf16", "stable_rank", "nss"):
            assert known in str(caught.value)


def test_what_is_no_result_of_this_kind_is_refused(sgd: Diff, state: Moments) -> None:
    for draw in (plots.heatmap, plots.layers, plots.histogram, plots.spectrum, plots.adam):
        with pytest.raises(OptionError, match="nothing to draw"):
            draw([])
    for draw in (plots.histogram, plots.spectrum, plots.stripes):
        with pytest.raises(OptionError, match="Optimizer state has no comparison"):
            draw(state)
    with pytest.raises(OptionError, match="no optimizer state to draw"):
        plots.adam(sgd)
    with pytest.raises(OptionError, match="no figure 'pie'"):
        sgd.plot("pie")
    assert sgd.plot("layers", "rel_l2").layout.title.text == plots.layers(sgd, "rel_l2").layout.title.text


@pytest.mark.parametrize("draw", [plots.heatmap, plots.layers])
@pytest.mark.parametrize("side", ["second", "third"])
def test_a_side_that_is_not_there(state: Moments, draw: Callable[..., go.Figure], side: str) -> None:
    with pytest.raises(OptionError):
        draw(state, side=side)


@pytest.mark.parametrize("draw", [plots.heatmap, plots.layers])
def test_a_k_that_is_not_there(sgd: Diff, draw: Callable[..., go.Figure]) -> None:
    with pytest.raises(OptionError):
        draw(sgd, "overlap_u", k=999)


# --- along the layers ------------------------------------------------------------------------------------------------


def test_lines_of_modules_and_of_all_together(sgd: Diff) -> None:
    a, b = values(BASE), values(SGD)
    fig = plots.layers(sgd)
    drawn = lines(fig)
    inside = [name for name in a if layer_of(name) != "none"]
    assert next(iter(drawn)) == "all modules"
    assert set(drawn) == {"all modules", *map(module_of, inside)}
    for label, trace in drawn.items():
        assert list(trace.x) == [0, 1, 2, 3]
        for layer, share in zip(trace.x, trace.y, strict=True):
            own = [n for n in inside if layer_of(n) == str(layer) and label in ("all modules", module_of(n))]
            changed, numel = sum(int((a[n] != b[n]).sum()) for n in own), sum(a[n].size for n in own)
            if changed:
                assert share == pytest.approx(changed / numel, rel=1e-12), (label, layer)
            assert f"{changed:,} of {numel:,} parameters" in trace.hovertext[layer]
    assert_described(fig, 2)
    assert axis(fig, "y").type == "log"


def test_zeros_are_open_triangles_on_the_lower_edge(tmp_path: Path) -> None:
    fig = plots.layers(in_steps(tmp_path, {UP.format(0): 50, UP.format(1): 0, UP.format(2): 200}))
    trace = lines(fig)["up_proj"]
    assert list(trace.marker.symbol) == ["circle", "triangle-down-open", "circle"]
    assert [trace.y[0], trace.y[2]] == pytest.approx([0.005, 0.02])
    assert trace.y[1] < 0.005
    ticks = dict(zip(axis(fig, "y").ticktext, axis(fig, "y").tickvals, strict=True))
    assert ticks["0"] == trace.y[1]
    low, high = axis(fig, "y").range
    assert low <= math.log10(trace.y[1]) < math.log10(0.02) <= high
    assert "<b>0 %</b><br>0 of 10,000 parameters" in trace.hovertext[1]


def test_several_runs_are_a_line_each(sgd: Diff, sft: Diff) -> None:
    fig = plots.layers([sgd, sft], "rel_l2")
    assert list(lines(fig)) == ["rl-sgd", "sft"]
    for name, tuned in (("rl-sgd", SGD), ("sft", SFT)):
        a, d = values(BASE), deltas(tuned)
        for layer, value in zip(lines(fig)[name].x, lines(fig)[name].y, strict=True):
            own = [n for n in a if layer_of(n) == str(layer)]
            norms = [math.sqrt(sum(float((side[n] ** 2).sum()) for n in own)) for side in (d, a)]
            assert value == pytest.approx(norms[0] / norms[1], rel=1e-9)


def test_a_module_called_as_all_together_does_not_take_its_place(tmp_path: Path) -> None:
    diff = in_steps(tmp_path, {"model.layers.0.all modules.weight": 100, UP.format(0): 300})
    assert sorted(trace.y[0] for trace in plots.layers(diff).data) == pytest.approx([0.01, 0.02, 0.03])


# --- histograms ------------------------------------------------------------------------------------------------------


def distances(tuned: Path, name: str) -> Array:
    """How many bf16 values lie between before and after."""
    sides = []
    for directory in (BASE, tuned):
        bits = patterns(directory)[name].astype(np.int64).ravel()
        sides.append(np.where(bits & 0x8000, -(bits & 0x7FFF), bits))
    return np.abs(sides[1] - sides[0])


def binned(distance: Array) -> dict[str, int]:
    """Counts by the labels of the bins 0, 1, 2, 3–4, 5–8, …, those below a thousand."""
    found = {"0": int((distance == 0).sum()), "1": int((distance == 1).sum()), "2": int((distance == 2).sum())}
    for low in (2, 4, 8, 16, 32, 64, 128, 256):
        found[f"{low + 1}–{2 * low}"] = int(((distance > low) & (distance <= 2 * low)).sum())
    return found


GROUPS: dict[str | None, Callable[[str], str]] = {
    None: lambda _: "rl-sgd",
    "module": module_of,
    "kind": lambda n: "norm" if "norm" in n else "attention" if "attn" in n else "mlp" if "mlp" in n else "embedding",
}


@pytest.mark.parametrize("by", list(GROUPS))
def test_distances_in_ulps(sgd: Diff, by: str | None) -> None:
    fig = plots.histogram(sgd, "ulp", by=by)
    groups: dict[str, list[str]] = {}
    for name in values(BASE):
        groups.setdefault(GROUPS[by](name), []).append(name)
    assert set(lines(fig)) == set(groups)
    for label, trace in lines(fig).items():
        every = np.concatenate([distances(SGD, name) for name in groups[label]])
        drawn = dict(zip(trace.x, trace.y, strict=True))
        told = dict(zip(trace.x, trace.hovertext, strict=True))
        for text, count in binned(every).items():
            if text in drawn:
                assert drawn[text] == (pytest.approx(count / every.size, rel=1e-12) if count else None), (label, text)
                assert f"{count:,} of {every.size:,} elements" in told[text]
            else:
                assert not count
        assert sum(share or 0 for share in trace.y) == pytest.approx(1, rel=1e-9)
    assert_described(fig, 2)


@pytest.mark.parametrize("which", ["log2_abs_delta", "log2_rel_delta"])
def test_powers_of_two(sgd: Diff, which: str) -> None:
    expected: Counter[int] = Counter()
    for name, delta in deltas(SGD).items():
        before = np.abs(values(BASE)[name][delta != 0])
        moved = np.abs(delta[delta != 0])
        moved = moved if which == "log2_abs_delta" else moved[before > 0] / before[before > 0]
        expected.update((np.frexp(moved)[1] - 1).tolist())
    total = sum(array.size for array in values(BASE).values())
    fig = plots.histogram(sgd, which, by=None)
    (trace,) = fig.data
    found = {round(math.log2(x) - 0.5, 6): y for x, y in zip(trace.x, trace.y, strict=True) if y is not None}
    assert found == pytest.approx({float(power): count / total for power, count in expected.items()}, rel=1e-12)
    assert f"of {total:,} elements" in trace.hovertext[0]
    assert_described(fig, 2)


def test_a_line_breaks_where_bins_are_empty(tmp_path: Path) -> None:
    a, b = torch.zeros(4, 4), torch.zeros(4, 4)
    b[0, :3], b[1, :2] = 0.25, 2.0**-7
    (trace,) = plots.histogram(compared(tmp_path, {UP.format(0): a}, {UP.format(0): b}), by=None).data
    drawn = list(zip(trace.x, trace.y, strict=True))
    assert [y for _, y in drawn] == [2 / 16, None, 3 / 16]
    assert [drawn[0][0], drawn[2][0]] == pytest.approx([2**-6.5, 2**-1.5])


def test_several_runs_and_what_is_refused(sgd: Diff, sft: Diff) -> None:
    fig = plots.histogram({"one": sgd, "two": sft}, "ulp")
    for label, tuned in (("one", SGD), ("two", SFT)):
        every = np.concatenate([distances(tuned, name) for name in values(BASE)])
        drawn = dict(zip(lines(fig)[label].x, lines(fig)[label].y, strict=True))
        assert drawn["0"] == pytest.approx((every == 0).mean(), rel=1e-12)
    with pytest.raises(OptionError, match=r"no histogram 'mass'.*ulp.*log2_abs_delta.*log2_rel_delta"):
        plots.histogram(sgd, "mass")
    with pytest.raises(OptionError, match=r"not grouped by 'layer'.*kind.*module"):
        plots.histogram(sgd, by="layer")
    counted = paramdiff.compare(BASE, SGD, measures=["change"])
    with pytest.raises(OptionError, match="histogram"):
        plots.histogram(counted)


# --- spectra ---------------------------------------------------------------------------------------------------------


def curve(delta: Array, share: float) -> tuple[float, float]:
    """σᵢ/σ₁ and the energy of the first i directions, i the whole number in this share of them."""
    sigma = np.linalg.svd(delta, compute_uv=False)
    index = math.floor(share * min(delta.shape) + 1e-9)
    return sigma[index - 1] / sigma[0], float((sigma[:index] ** 2).sum() / (sigma**2).sum())


def test_the_spectrum_of_one_matrix(sgd: Diff) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    fig = plots.spectrum(sgd, names=[name])
    relative, energy = fig.data
    assert relative.xaxis in (None, "x")
    assert energy.xaxis == "x2"
    delta = deltas(SGD)[name]
    shares = np.geomspace(1e-4, 1, 81)
    shares = shares[np.floor(shares * 96 + 1e-9) >= 1]
    assert list(relative.x) == list(energy.x) == pytest.approx(shares.tolist(), rel=1e-3)
    assert list(zip(relative.y, energy.y, strict=True)) == [pytest.approx(curve(delta, s), rel=1e-3) for s in shares]
    assert (relative.y[0], energy.y[-1]) == (1, 1)
    assert "up_proj" in relative.name
    assert_described(fig, 4)


def test_lines_are_medians_over_matrices(sgd: Diff) -> None:
    fig = plots.spectrum(sgd)
    modules = {module_of(n) for n, delta in deltas(SGD).items() if delta.ndim == 2 and delta.any()}
    shown = {trace.name for trace in fig.data if trace.name and trace.showlegend}
    assert shown == modules
    names = [f"model.layers.{layer}.self_attn.k_proj.weight" for layer in range(4)]
    for panel, trace in enumerate(trace for trace in fig.data if trace.name == "k_proj"):
        for x, y in zip(trace.x, trace.y, strict=True):
            if abs(x * 48 - round(x * 48)) > 0.01 or x == 1:  # x is rounded, and must not cross a direction
                assert y == pytest.approx(np.median([curve(deltas(SGD)[n], x)[panel] for n in names]), rel=1e-3)
    assert_described(plots.spectrum(sgd, "layer"), 4)
    assert_described(plots.spectrum(sgd, "kind"), 4)
    assert_described(plots.spectrum(sgd, module="k_proj"), 4)


def test_spectra_of_several_runs(sgd: Diff, sft: Diff) -> None:
    fig = plots.spectrum({"a": sgd, "b": sft}, module="k_proj")
    names = [f"model.layers.{layer}.self_attn.k_proj.weight" for layer in range(4)]
    for label, tuned in (("a", SGD), ("b", SFT)):
        relative, energy = (trace for trace in fig.data if trace.name == label)
        assert relative.x[-1] == energy.x[-1] == 1
        assert relative.y[-1] == pytest.approx(np.median([curve(deltas(tuned)[n], 1)[0] for n in names]), rel=1e-3)
        first = [curve(deltas(tuned)[n], energy.x[0] * (1 + 1e-3))[1] for n in names]
        assert energy.y[0] == pytest.approx(np.median(first), rel=1e-3)


def test_unchanged_matrices_are_counted_in_words(tmp_path: Path) -> None:
    base = {UP.format(layer): normal(layer, 6, 8) for layer in range(5)}
    tuned = {name: t if "layers.1" in name or "layers.3" in name else t + 1 for name, t in base.items()}
    diff = compared(tmp_path, base, tuned, measures=["change", "spectrum"])
    assert re.search(r"\b2 matrices without a change", plots.spectrum(diff).layout.meta["alt"])
    with pytest.raises(OptionError, match="no matrix changed"):
        plots.spectrum(diff, names=[UP.format(1), UP.format(3)])
    with pytest.raises(OptionError, match="no matrix changed"):
        plots.spectrum(compared(tmp_path / "same", base, base, measures=["change", "spectrum"]))


def test_spectra_by_layer_of_few_layers_with_many_matrices(tmp_path: Path) -> None:
    """Up to three lines have bands; by layer, lines are coloured in their order."""
    names = [f"model.layers.{layer}.mlp.{module}.weight" for layer in range(2) for module in ("a", "b", "c", "d")]
    base = {name: normal(n, 6, 8) for n, name in enumerate(names)}
    tuned = {name: t + normal(50, 6, 8) for name, t in base.items()}
    fig = plots.spectrum(compared(tmp_path, base, tuned, measures=["change", "spectrum"]), "layer")
    assert {trace.name for trace in fig.data if trace.name} == {"layer 0", "layer 1"}


def test_spectra_that_are_refused(sgd: Diff) -> None:
    matrices = sgd.ranks["name"].to_list()
    with pytest.raises(OptionError, match=f"{len(matrices)} matrices are too many"):
        plots.spectrum(sgd, names=matrices)
    assert len(plots.spectrum(sgd, names=matrices[:24]).data) == 48
    with pytest.raises(OptionError, match="no spectrum of 'nothing'"):
        plots.spectrum(sgd, names=[matrices[0], "nothing"])
    with pytest.raises(OptionError, match="no spectrum of 'input_layernorm'"):
        plots.spectrum(sgd, module="input_layernorm")
    with pytest.raises(OptionError, match=r"not grouped by 'expert'.*module, layer or kind"):
        plots.spectrum(sgd, "expert")
    with pytest.raises(OptionError, match="no spectra"):
        plots.spectrum(paramdiff.compare(BASE, SGD, measures=["change"]))


# --- stripes ---------------------------------------------------------------------------------------------------------


def striped(fig: go.Figure, panel: int) -> tuple[Array, Array]:
    """Shares of a panel, a row for each layer, with zeros put back; and where each cell is drawn."""
    own = [trace for trace in fig.data if trace.xaxis == ("x2" if panel else "x")]
    shown = own[-1]
    z = np.array([[math.nan if v is None else v for v in line] for line in shown.z])
    shares = np.where(np.isnan(z), 0.0, 10**z)
    if len(own) > 1:
        grey = np.array([[v is not None for v in line] for line in own[0].z])
        assert (grey == np.isnan(z)).all(), "exactly the zeros are grey"
    else:
        assert not np.isnan(z).any()
    return shares, shown.x0 + shown.dx * np.arange(z.shape[1])


def test_a_cell_for_each_row_and_column(sgd: Diff) -> None:
    a, b = values(BASE), values(SGD)
    fig = plots.stripes(sgd, "q_proj")
    for panel in (0, 1):
        shares, at = striped(fig, panel)
        assert shares.shape == (4, 96)
        assert at.tolist() == pytest.approx(list(range(96)))
        for layer in range(4):
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            expected = (a[name] != b[name]).mean(axis=1 - panel)
            assert shares[layer] == pytest.approx(expected, rel=1e-3)
    assert list(axis(fig, "y").ticktext) == ["0", "1", "2", "3"]
    assert_described(fig, 3)


def test_long_axes_are_drawn_several_to_a_cell(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((500, 300)) < 0.01 * np.arange(500)[:, None] / 500
    diff = compared(tmp_path, {UP.format(0): torch.zeros(500, 300)}, {UP.format(0): torch.tensor(mask).float()})
    fig = plots.stripes(diff)
    for panel, length in enumerate((500, 300)):
        shares, at = striped(fig, panel)
        own = mask if panel == 0 else mask.T
        cell_of = np.array([row * 192 // length for row in range(length)])
        expected = [own[cell_of == cell].mean() for cell in range(192)]
        assert shares[0] == pytest.approx(expected, rel=1e-3)
        assert (expected[0] == 0) == (panel == 0)
        assert at[0] - 0.5 * (at[1] - at[0]) == pytest.approx(-0.5), "cells cover the axis from its first row"
        assert at[-1] + 0.5 * (at[1] - at[0]) == pytest.approx(length - 0.5), "to its last"
        told = [trace for trace in fig.data if trace.xaxis == ("x2" if panel else "x")][-1].hovertext[0][100]
        first, last = (f(row for row in range(length) if cell_of[row] == 100) for f in (min, max))
        assert (f"{first}–{last}" if last > first else f" {first}<br>") in told


def test_the_most_uneven_module_inside_layers_comes_first(tmp_path: Path) -> None:
    even, one_row = torch.eye(20), torch.zeros(20, 20)
    one_row[3] = 1
    tuned = {UP.format(0): even, "model.layers.0.mlp.down_proj.weight": one_row, "model.embed_tokens.weight": one_row}
    diff = compared(tmp_path, {name: torch.zeros(20, 20) for name in tuned}, tuned)
    assert "of down_proj:" in plots.stripes(diff).layout.title.text
    assert striped(plots.stripes(diff, "up_proj"), 0)[0][0] == pytest.approx(np.full(20, 0.05), rel=1e-3)


def test_stripes_that_are_refused(sgd: Diff, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no matrix of 'norm'.*q_proj"):
        plots.stripes(sgd, "norm")
    with pytest.raises(OptionError, match="no counts by row"):
        plots.stripes(paramdiff.compare(BASE, SGD, measures=["change"]))
    with pytest.raises(OptionError, match="no matrix to draw stripes of"):
        plots.stripes(compared(tmp_path, {"norm.weight": torch.zeros(3)}, {"norm.weight": torch.ones(3)}))


def test_stripes_of_several_runs_do_not_draw_one_in_the_name_of_all(sgd: Diff, sft: Diff) -> None:
    with pytest.raises(OptionError):
        plots.stripes([sgd, sft])


# --- Adam ------------------------------------------------------------------------------------------------------------


def test_how_the_second_moment_is_spread(state: Moments) -> None:
    fig = plots.adam(state, by="kind")
    groups: dict[str, list[Array]] = {}
    with closing(paramdiff.optimizer(STATES / "checkpoint-200")) as opened:
        for name in opened:
            root = np.sqrt(opened[name]["exp_avg_sq"].astype(np.float64) / (1 - 0.999**200))
            groups.setdefault(GROUPS["kind"](name), []).append(root.ravel())
    drawn = {trace.name: trace for trace in fig.data if trace.xaxis in (None, "x")}
    assert set(drawn) == set(groups)
    for label, trace in drawn.items():
        roots = np.concatenate(groups[label])
        assert 0 < sum(trace.y) <= 1 + 1e-3
        held = 0.0
        for x, share in zip(trace.x, trace.y, strict=True):
            held += share
            edge = x * 10**0.05
            # Bins of the table are at most 1.6 % wide, so an element may be in the next one of the figure.
            low, high = ((np.count_nonzero((roots <= edge * by) & (roots > 0))) / roots.size for by in (1 / 1.017, 1.017))
            assert low - 2e-3 <= held <= high + 2e-3, (label, x)
    assert_described(fig, 4)


def test_effective_learning_rates_along_the_layers(state: Moments) -> None:
    (trace,) = (trace for trace in plots.adam(state).data if trace.xaxis == "x2")
    table = state.by("layer").filter(pl.col("layer").is_not_null()).sort("layer")
    assert list(trace.x) == table["layer"].to_list() == [0, 1, 2, 3]
    assert list(trace.y) == table["eff_lr_p50"].to_list()
    assert (np.array(trace.y) + trace.error_y.array).tolist() == pytest.approx(table["eff_lr_p99"].to_list())
    assert (np.array(trace.y) - trace.error_y.arrayminus).tolist() == pytest.approx(table["eff_lr_p1"].to_list())
    with closing(paramdiff.optimizer(STATES / "checkpoint-200")) as opened:
        for layer, median in zip(trace.x, trace.y, strict=True):
            own = [opened[n]["exp_avg_sq"].astype(np.float64).ravel() for n in opened if layer_of(n) == str(int(layer))]
            rates = 3e-6 / (np.sqrt(np.concatenate(own) / (1 - 0.999**200)) + 1e-8)
            assert median == pytest.approx(np.median(rates), rel=0.017)


def test_two_checkpoints_are_a_line_each(states: Moments) -> None:
    fig = plots.adam(states)
    assert [t.name for t in fig.data if t.xaxis == "x2"] == ["checkpoint-199", "checkpoint-200"]
    for side, trace in zip(("first", "second"), (t for t in fig.data if t.xaxis == "x2"), strict=True):
        rates = states.by("layer", side=side).filter(pl.col("layer").is_not_null()).sort("layer")["eff_lr_p50"]
        assert list(trace.y) == rates.to_list()
    with pytest.raises(OptionError, match=r"not grouped by 'layer'.*module or kind"):
        plots.adam(states, by="layer")


def test_pairs_of_checkpoints_with_the_same_names_are_all_drawn(states: Moments) -> None:
    other = paramdiff.adam(*(SAMPLE / "checkpoints" / "sft" / f"checkpoint-{step}" for step in (199, 200)))
    fig = plots.adam([states, other])
    assert len({trace.name for trace in fig.data}) == 4


# --- names from hostile files ----------------------------------------------------------------------------------------

WRITTEN = ("text", "name", "ticktext", "hovertext", "categoryarray")  # what plotly draws as text
DRAW: dict[str, Callable[[Diff], go.Figure]] = {
    "heatmap": plots.heatmap,
    "layers": plots.layers,
    "histogram": lambda diff: plots.histogram(diff, by="module"),
    "ulp": lambda diff: plots.histogram(diff, "ulp", by="module"),
    "spectrum": plots.spectrum,
    "names": lambda diff: plots.spectrum(diff, names=diff.ranks["name"].to_list()[:24]),
    "stripes": lambda diff: plots.stripes(diff, str(diff.tensors["module"][-1])),
}
NAMES = {case: text for case, text in HOSTILE.items() if case != "lone surrogate"}
NAMES |= {"mathjax": "$x$", "entity": "&lt;b&gt;", "tag": "<b>bold</b><br>two", "template": "%{meta}"}
NAMES |= {"link": '<a href="javascript:1">x</a>'}


def texts(fig: go.Figure) -> Iterator[tuple[str, str]]:
    """Every text of a figure that plotly draws, with the key that holds it."""

    def walk(node: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, dict):
            for name, value in node.items():
                if name not in ("meta", "template"):
                    yield from walk(value, name)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value, key)
        elif isinstance(node, str) and key in WRITTEN:
            yield key, node

    yield from walk(json.loads(fig.to_json()), "")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Diff:
    base, tuned = {}, {}
    for layer in range(2):
        for n, text in enumerate(NAMES.values()):
            base[f"model.layers.{layer}.{text}.weight"] = normal(n, 4, 5)
    for n, (name, values_) in enumerate(base.items()):
        tuned[name] = values_ + 0.3 * normal(99 + n, 4, 5)
    directory = tmp_path_factory.mktemp("hostile")
    return compared(directory, base, tuned, measures=["change", "magnitude", "rows", "spectrum"])


@pytest.mark.parametrize("kind", DRAW)
def test_hostile_names_are_only_text(hostile: Diff, kind: str) -> None:
    fig = DRAW[kind](hostile)
    assert_described(fig)
    found = list(texts(fig))
    assert len(found) > 10
    for key, text in found:
        tags = set(re.findall(r"<[^>]*>?", text))
        assert {re.sub(r"<span style='color:#\w+'>", "<span>", tag) for tag in tags} <= {
            "<b>", "</b>", "<br>", "<span>", "</span>"
        }, (key, text[:200])  # fmt: skip
        assert not CONTROL.search(text), (key, text[:200])
        assert "\u202e" not in text
        shown = unescape(re.sub(r"<[^>]*>", "\n", text))
        assert max(map(len, shown.split("\n"))) <= (180 if key == "text" else 130), (key, text[:200])
    if kind in ("layers", "histogram", "spectrum"):
        legend = {unescape(text) for key, text in found if key == "name"}
        assert {"<b>bold</b><br>two", "$x$", "&lt;b&gt;"} <= legend


@pytest.mark.parametrize("kind", DRAW)
def test_words_about_hostile_names_are_printable_and_short(hostile: Diff, kind: str) -> None:
    alt = DRAW[kind](hostile).layout.meta["alt"]
    assert not CONTROL.search(alt)
    assert "\u202e" not in alt
    assert len(alt) < 5000


def test_the_modules_of_hostile_names_are_in_words_too(tmp_path: Path) -> None:
    """With so few modules, each is the least or the most."""
    names = [f"model.layers.0.{NAMES[case]}.weight" for case in ("escape codes", "10 kB")]
    diff = in_steps(tmp_path, {name: 5 + 90 * n for n, name in enumerate(names)}, (10, 10))
    for draw in (plots.heatmap, plots.layers, plots.stripes):
        alt = draw(diff).layout.meta["alt"]
        assert not CONTROL.search(alt)
        assert len(alt) < 5000


def test_names_are_not_read_as_templates(hostile: Diff) -> None:
    """plotly.js puts values in the place of %{…} in names of lines and in titles."""
    shown = [text for key, text in texts(plots.layers(hostile)) if key == "name"]
    assert not [text for text in shown if "%{" in text]


def test_a_column_of_a_stranger_is_only_text(tmp_path: Path) -> None:
    made = in_steps(tmp_path, {UP.format(0): 5, UP.format(1): 9})
    column = '<a href="https://example.org">click</a>'
    tables = {**made.tables, "tensors": made.tensors.with_columns(pl.lit(1.5).alias(column))}
    Diff(tables, made.run).save(tmp_path / "out")
    for draw in (plots.heatmap, plots.layers):
        fig = draw(paramdiff.load(tmp_path / "out"), column)
        assert not [text for _, text in texts(fig) if "<a" in text]


def test_labels_and_titles_of_ones_own_are_only_text(sgd: Diff) -> None:
    label = "<i>run</i>" * 50
    for draw in (plots.heatmap, plots.layers, plots.histogram, plots.spectrum):
        for found in ({label: sgd}, {label: sgd, "other": sgd}):
            for _, text in texts(draw(found)):
                assert "<i>" not in text
                assert len(unescape(text)) < 300


def test_long_names_that_look_alike_stay_apart(tmp_path: Path) -> None:
    modules = ["left" + "a" * 100 + middle + "b" * 100 + "right" for middle in "xy"]
    counts = {f"model.layers.{layer}.{m}.weight": 10 + 30 * n + layer for n, m in enumerate(modules) for layer in range(2)}
    diff = in_steps(tmp_path, counts)
    fig = plots.heatmap(diff)
    assert len(fig.data[-1].z) == len(axis(fig, "y").ticktext) == 2
    assert len(set(axis(fig, "y").ticktext)) == 1, "they must look alike for this test"
    expected = [[math.log10((10 + 30 * n + layer) / 10_000) for layer in range(2)] for n in range(2)]
    assert np.array(fig.data[-1].z).tolist() == [pytest.approx(line, rel=1e-4) for line in expected]
    assert len(plots.layers(diff).data) == 3
    assert len(plots.histogram(diff, "ulp", by="module").data) == 2


# --- odd checkpoints -------------------------------------------------------------------------------------------------


def up(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {UP.format(layer): tensor for layer, tensor in enumerate(tensors)}


W = [normal(seed, 6, 8) for seed in range(6)]
F64, BF16 = torch.float64, torch.bfloat16
NAN, INF = math.nan, math.inf


def with_elements(tensor: torch.Tensor, *elements: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[: len(elements)] = torch.tensor(elements).to(tensor.dtype)
    return changed


def integers(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    made = [torch.randint(0, 2, (6, 8), generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(2)]
    return made[0], made[1]


SHAPES = [(4, 0), (0, 0), (0,), (0, 4, 5)]
VECTORS = {f"model.layers.{layer}.input_layernorm.weight": normal(layer, 8) for layer in range(2)}
SCALARS = {f"model.layers.{layer}.scale": torch.tensor(1.0 + layer) for layer in range(2)}
QUICK: dict[str, tuple[Tensors, Tensors]] = {
    "identical": (up(*W[:3]), up(*W[:3])),
    "vectors": (VECTORS, {name: 2 * v for name, v in VECTORS.items()}),
    "no layers": ({"lm_head.weight": W[0]}, {"lm_head.weight": W[1]}),
    "some not finite": (up(*W[:3]), up(with_elements(W[0], NAN, INF, -INF), W[4], W[5])),
    "one of another type": (up(*W[:3]), up(W[3].float(), W[4], W[5])),
    "integers": tuple(up(side) for side in integers(torch.int8)),  # type: ignore[dict-item]
    "no elements": (up(torch.zeros(0, 4, dtype=BF16)),) * 2,
    "no elements beside others": (up(torch.zeros(4, 0, dtype=BF16), W[0]), up(torch.zeros(4, 0, dtype=BF16), W[1])),
}
SLOW: dict[str, tuple[Tensors, Tensors]] = {
    "scalars": (SCALARS, {name: 2 * v for name, v in SCALARS.items()}),
    "single layer": (up(W[0]), up(W[1])),
    "one element": (up(torch.zeros(1, 1)), up(torch.ones(1, 1))),
    "all NaN": (up(*W[:2]), up(*(torch.full((6, 8), NAN, dtype=BF16),) * 2)),
    "another type": (up(*W[:2]), up(*(w.float() + 1 for w in W[:2]))),
    **{f"empty {s}": (up(torch.zeros(s, dtype=BF16)),) * 2 for s in SHAPES},
    **{f"empty {s} beside others": (up(torch.zeros(s), W[0].float()), up(torch.zeros(s), W[1].float())) for s in SHAPES},
    "NaN on both sides": (up(torch.full((6, 8), NAN)),) * 2,
    "infinite on both sides": (up(torch.full((6, 8), INF)), up(torch.full((6, 8), -INF))),
    "from zero": (up(*(0 * w for w in W[:3])), up(*W[:3])),
    "to zero": (up(*W[:3]), up(*(0 * w for w in W[:3]))),
    "the sign of zero": (up(torch.zeros(3, 3)), up(-torch.zeros(3, 3))),
    "layers far apart": ({UP.format(n): W[n % 2] for n in (0, 999_999_999)}, {UP.format(n): W[2] for n in (0, 999_999_999)}),
    "a convolution": ({"layers.0.conv.weight": W[0].view(6, 4, 2)}, {"layers.0.conv.weight": W[1].view(6, 4, 2)}),
    "a thin matrix": (up(torch.zeros(1, 7)), up(torch.ones(1, 7))),
    "tied": ({"model.embed_tokens.weight": W[0], "lm_head.weight": W[0]},
             {"model.embed_tokens.weight": W[1], "lm_head.weight": W[1]}),
    "only vectors changed": ({**up(*W[:2]), **VECTORS}, {**up(*W[:2]), **{n: 2 * v for n, v in VECTORS.items()}}),
    "an empty stack": ({"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(0, 4, 5), **up(W[0])},
                       {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(0, 4, 5), **up(W[1])}),
    "a stack": ({"model.layers.0.mlp.experts.gate_up_proj": normal(1, 3, 4, 5)},
                {"model.layers.0.mlp.experts.gate_up_proj": normal(2, 3, 4, 5)}),
    "from one end of float32 to the other": (up(torch.full((4, 4), -3.4e38)), up(torch.full((4, 4), 3.4e38))),
    "the least of float32": (up(torch.zeros(4, 4)), up(torch.full((4, 4), 1e-45))),
    **{str(t): tuple(up(s) for s in integers(t)) for t in (torch.bool, torch.uint8, torch.int32, torch.int64)},  # type: ignore[dict-item]
    **{str(t): (up(W[0].to(t)), up(W[1].to(t))) for t in (torch.float16, torch.float8_e4m3fn)},
    **{
        f"{value:g} in float64": (up(torch.zeros(4, 4, dtype=F64), torch.ones(4, 4, dtype=F64)),
                                  up(torch.full((4, 4), value, dtype=F64), torch.ones(4, 4, dtype=F64) * 1.5))
        for value in (5e-324, 1e-310, 1e-200, 1e150, 1e154, 1e200, 9e307, 1.7e308)
    },
}  # fmt: skip
ODD = {**QUICK, **SLOW}
FEW = ["sparsity_bits", "max_abs_delta", "mean_delta", "energy_rank_99_percent"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Diff]:
    @cache
    def found(case: str) -> Diff:
        measures = ["change", "magnitude", "rows", "spectrum", "subspace"]
        return compared(tmp_path_factory.mktemp("odd"), *ODD[case], measures=measures, ks=[1, 2], tolerances=[0.0, 1e-5])

    return found


def attempts(diff: Diff, kind: str, columns: list[str]) -> Iterator[tuple[str, Callable[[], go.Figure]]]:
    if kind in ("heatmap", "layers"):
        yield "two runs", lambda: plots.of(kind)({"a": diff, "b": diff})
        for column in columns:
            yield column, lambda column=column: plots.of(kind)(diff, column)
    elif kind == "histogram":
        for which in ("ulp", "log2_abs_delta", "log2_rel_delta"):
            for by in ("kind", "module", None):
                yield f"{which} by {by}", lambda which=which, by=by: plots.histogram(diff, which, by=by)
    elif kind == "spectrum":
        for by in ("module", "layer", "kind"):
            yield f"by {by}", lambda by=by: plots.spectrum(diff, by)
    else:
        for module in (None, *diff.tensors["module"].unique().to_list()):
            yield f"of {module}", lambda module=module: plots.stripes(diff, module)


def assert_draws_or_says_why(diff: Diff, kind: str, columns: list[str]) -> None:
    drawn = 0
    for what, draw in attempts(diff, kind, columns):
        refused = None
        try:
            assert_described(draw())
            drawn += 1
        except OptionError as error:
            refused = error
        except Exception as error:
            error.add_note(f"{kind}: {what}")
            raise
        if refused is not None:
            assert "\n" not in str(refused), what
            assert re.match(r"[A-Z].*\.$", refused.message), what
    if kind in ("heatmap", "layers") and diff.tensors["numel"].sum():
        assert drawn >= 2, "how much changed can always be drawn"


KINDS = ("heatmap", "layers", "histogram", "spectrum", "stripes")
ENDS = [f"{value:g} in float64" for value in (1e150, 1e154, 1e200, 9e307, 1.7e308)]


def cases(names: Any) -> list[Any]:
    return [pytest.param(case, kind) for case in names for kind in KINDS]


@pytest.mark.parametrize(("case", "kind"), cases(QUICK))
def test_odd_checkpoints(odd: Callable[[str], Diff], case: str, kind: str) -> None:
    assert_draws_or_says_why(odd(case), kind, FEW)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind"), cases(ODD))
def test_more_odd_checkpoints(odd: Callable[[str], Diff], case: str, kind: str) -> None:
    """With every column that there is."""
    diff = odd(case)
    every = [name for table in ("tensors", "ranks", "subspaces") for name in quantities.drawable(diff, table)]
    assert_draws_or_says_why(diff, kind, list(dict.fromkeys(every)))


@pytest.mark.slow
def test_every_column_of_every_table(sgd: Diff, states: Moments) -> None:
    columns = [(sgd, name) for table in ("tensors", "ranks", "subspaces") for name in quantities.drawable(sgd, table)]
    columns += [(states, name) for name in quantities.drawable(states, "adam")]  # type: ignore[arg-type]
    assert len(columns) > 80
    for result, column in columns:
        for draw in (plots.heatmap, plots.layers):
            assert_described(draw(result, column))


# --- how numbers and names are written -------------------------------------------------------------------------------


@given(st.integers(1, 10**9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_percentages_have_three_digits_of_the_smaller_side(counts: tuple[int, int]) -> None:
    changed, numel = counts
    text = wording.percent(changed / numel)
    assert text.endswith(" %")
    value = float(text.removesuffix(" %"))
    if changed in (0, numel):
        assert value == 100 * changed / numel
        return
    side = 100 * min(changed, numel - changed) / numel
    assert abs(value - 100 * changed / numel) <= 0.0051 * side, text
    assert value not in (0.0, 100.0), "what is not quite nothing or all does not look so"


def test_percentages_of_the_largest_models() -> None:
    assert float(wording.percent(1 / 671e9).removesuffix(" %")) == pytest.approx(100 / 671e9, rel=0.005)


TEXT = st.text(st.sampled_from("ab/.-_@: \n\x1b…权" + "c" * 3), max_size=60)


@given(st.lists(TEXT, max_size=6))
def test_labels_are_unique(refs: list[str]) -> None:
    found = wording.labels(refs)
    assert len(found) == len(refs)
    assert len(set(found)) == len(found), (refs, found)
    for label in found:
        assert len(label) <= 40 * 10 + 5
        assert not CONTROL.search(label)


def test_labels_are_unique_where_a_number_is_in_a_name() -> None:
    assert len(set(wording.labels(["same", "same", "same (1)"]))) == 3


@given(st.floats(-300, 300), st.floats(0, 40), st.booleans(), st.integers(2, 12))
def test_ticks_lie_on_the_axis(start: float, decades: float, share: bool, most: int) -> None:
    low, high = 10.0**start, 10.0 ** min(start + decades, 305)
    at, text = style.decades(low, high, share=share, most=most)
    assert len(at) == len(text) >= 1
    assert len(at) <= max(most, 9) + 1
    assert all(math.log10(low) - 0.01 <= tick <= math.log10(high) + 0.01 for tick in at)
    if high > low * 1.01:
        assert at == sorted(set(at))
    for power, label in zip(at, text, strict=True):
        said = float(label.removesuffix(" %")) / (100 if share else 1)
        assert said == pytest.approx(10**power, rel=0.006)
