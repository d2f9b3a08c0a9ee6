"""The page on paper, without JavaScript, and its contrast."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tests.report import SAMPLES, changes
from tests.report.browser import figure, opened
from tests.report.helpers import ONE_RUN, slow

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@slow
def test_print(browser: Browser, one: Path, tmp_path: Path) -> None:
    with opened(browser, one) as page:
        page.emulate_media(media="print")
        for which in ("nav", ".menus", ".pager button", ".modebar"):
            found = page.locator(which)
            assert found.count() > 0
            assert not any(element.is_visible() for element in found.all())
        for group in ONE_RUN:
            assert figure(page, group).locator("svg.main-svg").first.is_visible()
        page.pdf(path=tmp_path / "report.pdf", format="A4")
        assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")
        assert (tmp_path / "report.pdf").stat().st_size > 50_000


@slow
def test_a_printed_table_is_whole_or_says_that_it_is_not(browser: Browser, one: Path) -> None:
    with opened(browser, one) as page:
        page.emulate_media(media="print")
        section = page.locator("section[aria-labelledby=tensors]")
        assert section.locator("tbody tr").count() == 50 or re.search(r"\b50\b", section.inner_text())


@slow
def test_nothing_is_cut_off_in_print(browser: Browser, one: Path) -> None:
    with opened(browser, one) as page:
        page.set_viewport_size({"width": 718, "height": 1000})  # A4 without its margins
        page.emulate_media(media="print")
        page.wait_for_timeout(300)
        beyond = page.evaluate("""() => [...document.querySelectorAll("td, th, svg.main-svg")]
            .filter((e) => e.getBoundingClientRect().right > window.innerWidth + 1).length""")
        assert beyond == 0


@slow
def test_without_javascript(browser: Browser, many: Path) -> None:
    with opened(browser, many, javascript=False) as page:
        text = page.locator("body").inner_text()
        assert re.search(r"need JavaScript", text)
        changed = sum(int(part.sum()) for part in changes(SAMPLES / "base", SAMPLES / "rl-sgd").values())
        assert f"{changed:,} of 334,944" in text
        assert "torch 2." in text or f"torch {torch.__version__}" in text
        for section in ("overall", "spectra", "directions", "adam"):
            assert page.locator(f"section[aria-labelledby={section}] tbody tr").count() >= 8


@slow
def test_without_javascript_there_are_no_menus(browser: Browser, one: Path) -> None:
    with opened(browser, one, javascript=False) as page:
        assert not any(select.is_visible() for select in page.locator("main select, main input, main button").all())


LUMINANCE = """(which) => [...document.querySelectorAll(which)].filter((e) => e.offsetParent).map((e) => {
    let behind = e;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    return [getComputedStyle(e).color, behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)"];
})"""


TEXTS = (
    "p.soft", "figcaption", "a:not(.skip)", "th", "td", "dt", "dd", "footer", ".evidence", "label", "select", "th button",
    "h1", "h2", "h3", "[role=status]", ".pager button:enabled",
)  # fmt: skip


def contrast(first: str, second: str) -> float:
    """WCAG 2: (L₁ + 0.05)/(L₂ + 0.05)."""
    found = []
    for colour in (first, second):
        r, g, b = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b)]
        found.append(float(np.dot((0.2126, 0.7152, 0.0722), linear)))
    return (max(found) + 0.05) / (min(found) + 0.05)


@slow
def test_contrast(browser: Browser, many: Path) -> None:
    with opened(browser, many) as page:
        for which in TEXTS:
            pairs = page.evaluate(LUMINANCE, which)
            assert pairs, which
            assert min(contrast(*pair) for pair in pairs) >= 4.5, which
        drawn_text = page.evaluate("""() => [...document.querySelectorAll("svg.main-svg text")]
            .filter((e) => e.textContent.trim()).map((e) => getComputedStyle(e).fill)""")
        assert len(drawn_text) > 50
        assert min(contrast(colour, "rgb(255, 255, 255)") for colour in set(drawn_text)) >= 4.5
