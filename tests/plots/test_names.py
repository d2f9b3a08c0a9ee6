"""Names from hostile files are drawn as short, printable text, and never as tags or templates."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest

import paramdiff
from paramdiff import Diff, plots
from tests.cli.test_errors import CONTROL, HOSTILE
from tests.plots.helpers import UP, assert_described, axis, compared, in_steps, normal

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
