"""Menus of the page: every choice draws, by pointer and by keyboard, and what was not measured is said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import paramdiff
from tests.report import RUNS, SAMPLES, stored
from tests.report.browser import figure, opened, title
from tests.report.helpers import ONE_RUN, slow

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@slow
def test_another_quantity(browser: Browser, one: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, one) as page:
        group = figure(page, "heat")
        before = (title(page, "heat"), group.locator("figcaption").text_content())
        assert before[0] == "Share of parameters changed, by layer and module: base → rl-sgd"
        group.get_by_label("Quantity").select_option("largest |Δ|")
        expect(group.locator(".gtitle")).to_have_text("Largest |Δ|, by layer and module: base → rl-sgd")
        caption = group.locator("figcaption").text_content() or ""
        assert caption != before[1]
        assert group.locator(".plot").get_attribute("aria-label") == caption
        a, b = stored(SAMPLES / "base"), stored(SAMPLES / "rl-sgd")
        largest = max(float(np.abs(b[name] - a[name]).max()) for name in a)
        assert f"to {largest:.3g} (" in caption


@slow
def test_every_choice_of_every_menu_draws(browser: Browser, one: Path) -> None:
    """No menu offers what is not there, and each figure has a title of its own."""
    with opened(browser, one) as page:
        for group in ONE_RUN:
            selects = figure(page, group).locator("select")
            for number in range(selects.count()):
                select, seen = selects.nth(number), set()
                for choice in select.locator("option").all_text_contents():
                    select.select_option(choice)
                    figure(page, group).locator("svg.main-svg").first.wait_for()
                    page.locator(f"figure[data-group={group}][data-drawn*={choice!r}]".replace("'", '"')).wait_for()
                    seen.add((title(page, group), figure(page, group).locator("figcaption").text_content()))
                assert len(seen) == select.locator("option").count()


@slow
def test_a_run_by_keyboard(browser: Browser, many: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, many) as page:
        group = figure(page, "layers")
        group.get_by_label("Run").focus()
        for run in RUNS[1:]:
            page.keyboard.press("ArrowDown")
            expect(group.locator(".gtitle")).to_have_text(f"Share of parameters changed, by layer: base → {run}")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('label').textContent").startswith("Quantity")
        page.keyboard.press("ArrowDown")
        expect(group.locator(".gtitle")).not_to_have_text(f"Share of parameters changed, by layer: base → {RUNS[-1]}")


@slow
def test_what_was_not_measured_is_said(browser: Browser, samples: dict[str, paramdiff.Diff], tmp_path: Path) -> None:
    """One run has spectra and the other has not; going there and back works, and nothing stale is left."""
    from playwright.sync_api import expect

    bare = paramdiff.compare(SAMPLES / "base", SAMPLES / "sft", measures=["change", "magnitude", "rows", "spectrum"])
    for name in ("ranks", "spectra", "rows"):
        bare.tables.pop(name)
    less = bare.tensors.drop("max_abs_delta")
    bare.tables["tensors"] = less
    with_all = samples["rl-sgd"]
    paramdiff.write_report(tmp_path / "report.html", {"with": with_all, "without": _without_ranks(bare)})
    with opened(browser, tmp_path / "report.html") as page:
        group = figure(page, "heat")
        group.get_by_label("Quantity").select_option("stable rank")
        expect(group.locator(".gtitle")).to_contain_text("Stable rank")
        group.get_by_label("Run").select_option("without")
        expect(group.locator("figcaption")).to_contain_text("Not measured here")
        expect(group.locator("svg")).to_have_count(0)
        page.set_viewport_size({"width": 900, "height": 700})
        group.get_by_label("Run").select_option("with")
        expect(group.locator(".gtitle")).to_contain_text("Stable rank")
        expect(group.locator("figcaption")).to_contain_text("stable rank")


def _without_ranks(diff: paramdiff.Diff) -> paramdiff.Diff:
    """With a table of ranks that has no rows, as a comparison of vectors has."""
    made = paramdiff.compare(
        SAMPLES / "base", SAMPLES / "sft", measures=["change", "magnitude", "spectrum"], include=["norm"]
    )
    return paramdiff.Diff(
        {**diff.tables, "tensors": made.tensors, "ranks": made.ranks, "spectra": made.tables["spectra"]}, diff.run
    )


@slow
def test_what_was_not_measured_has_no_old_text_alternative(browser: Browser, one: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, one) as page:
        group = figure(page, "heat")
        group.locator("select").evaluate("(select) => { select.options[1].value = 'no such thing'; }")
        group.get_by_label("Quantity").select_option("no such thing")
        expect(group.locator("figcaption")).to_contain_text("Not measured here")
        assert "Heat map" not in (group.locator(".plot").get_attribute("aria-label") or "")
