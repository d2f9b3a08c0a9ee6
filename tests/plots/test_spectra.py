"""Spectra: every curve against numpy's singular values of the files, and what cannot be drawn."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

import paramdiff
from paramdiff import Diff, plots
from paramdiff.errors import OptionError
from tests.plots.helpers import BASE, SFT, SGD, UP, Array, assert_described, compared, deltas, module_of, normal


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
