"""What tests of the page share: checkpoints, names of figures, and what holds for every report."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.report import SAMPLES

if TYPE_CHECKING:
    from playwright.sync_api import Page

ALL = ["change", "magnitude", "rows", "spectrum", "subspace"]
ONE_RUN = ["heat", "layers", "histograms", "spectra", "stripes", "directions"]
STATES = tuple(SAMPLES / "checkpoints" / run / "checkpoint-200" for run in ("rl-adamw", "sft"))
MATRIX = torch.arange(1.0, 49).reshape(8, 6)
Build = Callable[..., Path]
slow = pytest.mark.slow


def sound(page: Page) -> None:
    """What holds for every report: all figures are drawn, and the document is in order."""
    from playwright.sync_api import expect

    for group in page.locator("figure[data-group]").all():
        expect(group.locator("svg.main-svg").first).to_be_visible()
        assert (group.locator("figcaption").text_content() or "").strip()
        alt = group.locator(".plot").get_attribute("aria-label")
        assert alt == group.locator("figcaption").text_content()
    found = page.evaluate("""() => {
        const all = (which) => [...document.querySelectorAll(which)];
        const named = (e) => e.getAttribute("aria-label")?.trim() || [...(e.labels || [])].some((l) => l.textContent.trim());
        return {
            ids: all("[id]").map((e) => e.id),
            targets: all("a[href^='#']").map((e) => e.getAttribute("href").slice(1)),
            headings: all("h1, h2, h3, h4, h5, h6").map((e) => Number(e.tagName[1])),
            empty: all("h1, h2, h3, nav a, main button:not(.modebar button)")
                .filter((e) => !e.textContent.trim()).length,
            unnamed: all("select, input, [role=img]").filter((e) => !named(e))
                .map((e) => e.outerHTML.slice(0, 90)),
            elsewhere: all("[src], link, iframe, object, embed").map((e) => e.outerHTML.slice(0, 90)),
            lang: document.documentElement.lang, title: document.title, h1: document.querySelector("h1").textContent,
            wide: document.documentElement.scrollWidth - window.innerWidth,
        };
    }""")
    assert len(set(found["ids"])) == len(found["ids"])
    assert set(found["targets"]) <= set(found["ids"])
    assert len(found["targets"]) >= 3
    levels = found["headings"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert found["empty"] == 0
    assert found["unnamed"] == []
    assert found["elsewhere"] == []
    assert found["lang"] == "en"
    assert found["title"].strip() == found["h1"].strip() != ""
    assert found["wide"] <= 0


def status(page: Page, table: str = "tensors-0") -> str:
    return page.locator(f"#{table} [role=status]").text_content() or ""
