"""How percentages, labels and the ticks of an axis are written, for any number and any name."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramdiff import wording
from paramdiff.plots import style
from tests.cli.test_errors import CONTROL


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
