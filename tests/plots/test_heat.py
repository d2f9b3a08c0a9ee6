"""Heat maps: every cell against numpy on the files, its colours and its words, and what cannot be drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
import torch

import paramdiff
from paramdiff import Diff, Moments, plots
from paramdiff.errors import OptionError
from tests.plots.helpers import (
    BASE,
    SGD,
    STATES,
    UP,
    assert_described,
    axis,
    by_cell,
    cells,
    compared,
    deltas,
    in_steps,
    layer_of,
    module_of,
    normal,
    stepped,
    values,
)


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
