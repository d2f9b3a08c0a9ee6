"""Histograms of how far parameters moved: every bin against numpy on the files."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import paramdiff
from paramdiff import Diff, plots
from paramdiff.errors import OptionError
from tests.plots.helpers import (
    BASE,
    GROUPS,
    SFT,
    SGD,
    UP,
    Array,
    assert_described,
    compared,
    deltas,
    lines,
    patterns,
    values,
)


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
