"""Stripes: the share of each row and column against numpy on the files, and what cannot be drawn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import paramdiff
from paramdiff import Diff, plots
from paramdiff.errors import OptionError
from tests.plots.helpers import BASE, SGD, UP, Array, assert_described, axis, compared, values


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
