"""Numbers that the page draws, as plotly holds them in the browser, against numpy on the files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.report import RUNS, SAMPLES, changes, layer, module, stored
from tests.report.browser import drawn, figure, opened
from tests.report.helpers import slow

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def pooled(run: str) -> dict[tuple[str, int | None], tuple[int, int]]:
    """Changed and all elements by module and layer."""
    found: dict[tuple[str, int | None], tuple[int, int]] = {}
    for name, where in changes(SAMPLES / "base", SAMPLES / run).items():
        some, n = found.get((module(name), layer(name)), (0, 0))
        found[module(name), layer(name)] = some + int(where.sum()), n + where.size
    return found


@slow
@pytest.mark.parametrize("run", RUNS)
def test_cells_of_the_heat_map(browser: Browser, many: Path, run: str) -> None:
    from playwright.sync_api import expect

    with opened(browser, many) as page:
        figure(page, "heat").get_by_label("Run").select_option(run)
        expect(figure(page, "heat").locator(".gtitle")).to_contain_text(run)
        traces = drawn(page, "heat")
        names = page.evaluate("document.querySelector('figure[data-group=heat] .plot').layout.yaxis.ticktext")
        at = page.evaluate("document.querySelector('figure[data-group=heat] .plot').layout.xaxis.ticktext")
    expected, seen = pooled(run), 0
    (colours,) = [trace["z"] for trace in traces if trace["coloured"]]
    grey = [trace["z"] for trace in traces if not trace["coloured"]]
    for y, name in enumerate(names):
        for x, where in enumerate(at):
            some, n = expected.get((name, None if where == "none" else int(where)), (0, 0))
            is_grey = bool(grey) and grey[0][y][x] is not None
            seen += n > 0
            if some:
                assert colours[y][x] == pytest.approx(math.log10(some / n), abs=2e-4)
            else:
                assert colours[y][x] is None
            assert is_grey is (n > 0 and some == 0)
    assert seen == len(expected)


@slow
def test_lines_along_the_layers(browser: Browser, one: Path) -> None:
    with opened(browser, one) as page:
        lines = {trace["name"]: trace for trace in drawn(page, "layers")}
    expected = {key: counts for key, counts in pooled("rl-sgd").items() if key[1] is not None}
    assert set(lines) == {"all modules", *(name for name, _ in expected)}
    for (name, place), (some, n) in expected.items():
        if some:
            line = lines[name]
            assert line["y"][line["x"].index(place)] == pytest.approx(some / n)
    whole = lines["all modules"]
    for place in sorted({place for _, place in expected if place is not None}):
        counts = [counts for (_, where), counts in expected.items() if where == place]
        some, n = (sum(column) for column in zip(*counts, strict=True))
        assert whole["y"][whole["x"].index(place)] == pytest.approx(some / n)


@slow
def test_points_of_the_histograms(browser: Browser, many: Path) -> None:
    """All runs in one figure: distances in ulps of all elements."""
    with opened(browser, many) as page:
        lines = {trace["name"]: dict(zip(trace["x"], trace["y"], strict=True)) for trace in drawn(page, "runs-histograms")}
    a = stored(SAMPLES / "base")
    for run in RUNS:
        b, places = stored(SAMPLES / run), []
        for side in (a, b):
            bits = np.concatenate([side[name].ravel().view(np.uint32) >> 16 for name in a]).astype(np.int64)
            places.append(np.where(bits & 0x8000, -(bits & 0x7FFF), bits))
        distance = np.abs(places[0] - places[1])
        for label, low, high in (("0", 0, 0), ("1", 1, 1), ("2", 2, 2), ("3–4", 3, 4), ("65–128", 65, 128)):
            count = int(((distance >= low) & (distance <= high)).sum())
            assert (lines[run][label] or 0) == pytest.approx(count / len(distance))


@slow
def test_lines_of_stripes(browser: Browser, one: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, one) as page:
        figure(page, "stripes").get_by_label("Module").select_option("o_proj")
        expect(figure(page, "stripes").locator(".gtitle")).to_contain_text("o_proj")
        panels = {trace["axis"] or "x": trace["z"] for trace in drawn(page, "stripes") if trace["coloured"]}
    where = [part for name, part in changes(SAMPLES / "base", SAMPLES / "rl-sgd").items() if name.endswith("o_proj.weight")]
    for axis, sums in (("x", [part.mean(axis=1) for part in where]), ("x2", [part.mean(axis=0) for part in where])):
        assert len(panels[axis]) == len(where) == 4
        for cells, shares in zip(panels[axis], sums, strict=True):  # 96 rows, a cell each
            assert [cell is None for cell in cells] == [share == 0 for share in shares]
            found = [0.0 if cell is None else 10**cell for cell in cells]
            assert found == pytest.approx(shares.tolist(), rel=1e-3)
