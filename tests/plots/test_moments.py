"""Figures of Adam's second moment, against numpy on the optimizer's files."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import polars as pl
import pytest

import paramdiff
from paramdiff import Moments, plots
from paramdiff.errors import OptionError
from tests.plots.helpers import GROUPS, SAMPLE, STATES, Array, assert_described, layer_of


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
