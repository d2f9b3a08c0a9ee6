"""Lines along the layers: every point against numpy on the files, zeros, and several runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from paramdiff import Diff, plots
from tests.plots.helpers import (
    BASE,
    SFT,
    SGD,
    UP,
    assert_described,
    axis,
    deltas,
    in_steps,
    layer_of,
    lines,
    module_of,
    values,
)


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
