"""The page in Chromium, offline: it opens without a complaint (see `browser.opened`), is in order and fits the window."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.report import RUNS
from tests.report.browser import opened
from tests.report.helpers import MATRIX, ONE_RUN, Build, slow, sound

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_a_report_opens(browser: Browser, build: Build) -> None:
    """The one test of a browser that `make check` has."""
    path = build(
        {"layers.0.q.weight": MATRIX}, {"layers.0.q.weight": MATRIX + 1}, measures=["change", "magnitude", "spectrum"]
    )
    with opened(browser, path) as page:
        sound(page)
        assert "48 of 48" in (page.locator("section").first.text_content() or "")


@slow
def test_one_run(browser: Browser, one: Path) -> None:
    with opened(browser, one) as page:
        sound(page)
        groups = page.locator("figure").evaluate_all("(all) => all.map((e) => e.dataset.group)")
        assert groups == ONE_RUN
        assert page.locator("h1").text_content() == "base → rl-sgd"


@slow
def test_several_runs_and_states(browser: Browser, many: Path) -> None:
    with opened(browser, many) as page:
        sound(page)
        groups = set(page.locator("figure").evaluate_all("(all) => all.map((e) => e.dataset.group)"))
        together = {"runs-layers", "runs-heat", "runs-histograms", "runs-spectra"}
        assert groups == {*ONE_RUN, *together, "adam-states", "adam-spread", "adam-heat", "adam-layers"}
        summary = page.locator("section[aria-labelledby=summary] h3").all_text_contents()
        assert summary == [*RUNS, "checkpoint-200"]


@slow
@pytest.mark.parametrize("width", [1440, 1024, 600])
def test_nothing_is_wider_than_the_window(browser: Browser, many: Path, width: int) -> None:
    with opened(browser, many, width=width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        beyond = page.evaluate("""() => [...document.querySelectorAll("svg.main-svg, select, figcaption, h2")]
            .filter((e) => e.getBoundingClientRect().right > window.innerWidth + 1).length""")
        assert beyond == 0


@slow
def test_boxes_that_scroll_have_names(browser: Browser, many: Path) -> None:
    with opened(browser, many) as page:
        found = page.locator("[role=region]").evaluate_all("(all) => all.map((e) => e.getAttribute('aria-label').trim())")
        assert len(found) > 4
        assert all(found)
