"""Hostile names and labels are only text on the page, whole, and run nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import paramdiff
from tests.helpers import model_dir
from tests.report.browser import everything, figure, opened
from tests.report.helpers import ALL, MATRIX, slow, sound

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOSTILE = [
    "<script>window.x=1</script>",
    "<img src=x onerror=window.x=1>",
    '"><svg onload=window.x=1>',
    "' onmouseover='window.x=1",
    "</script><script>window.x=1</script>",
    "<!--<script>",
    "{{7*7}}",
    "{% raw %}",
    "%{y}",
    "<b>bold</b>&lt;i&gt;&amp;",
    "<a href='javascript:window.x=1'>x</a>",
    "$\\frac{1}{0}$",
    "__proto__",
    "constructor",
    "toString",
    "hasOwnProperty",
    "权重.мир.🎲",
    "abc\u202efdp.exe",
    "a\u0000b\u001fc\u007fd\re\nf\tg",
    "é" * 300,
    "n" * 10_000,
    " ",
    "z\u0301" * 90,
]


def hostile(where: Path, directory: str) -> paramdiff.Diff:
    """Names in every place: of tensors in layers, of modules, of the checkpoint itself."""
    base = {f"layers.{i}.{name}.weight": MATRIX + i for i in range(2) for name in HOSTILE}
    base |= dict.fromkeys(HOSTILE, MATRIX[0])
    tuned = {name: value + (torch.arange(value.numel()).reshape(value.shape) % 3 == 0) for name, value in base.items()}
    gone = {f"gone.{name}": MATRIX for name in HOSTILE}
    sides = model_dir(where / "base", {**base, **gone}), model_dir(where / directory, tuned)
    return paramdiff.compare(*sides, measures=ALL, ks=[2])


@slow
def test_hostile_names(browser: Browser, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    found = hostile(tmp_path, "<img src=x onerror=window.x=1>")
    paramdiff.write_report(tmp_path / "report.html", found)
    with opened(browser, tmp_path / "report.html", width=1024) as page:
        sound(page)
        assert page.evaluate("window.x") is None
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.locator("h1").text_content() == "base → <img src=x onerror=window.x=1>"
        assert page.locator("main img, main script, main b, body a[href^=javascript]").count() == 0
        shown = {row["tensor"] for row in everything(page)}
        listed = {row["tensor"] for row in everything(page, "coverage-0")}
        for name in HOSTILE[:16]:
            assert name in shown
            assert f"layers.1.{name}.weight" in shown
            assert f"gone.{name}" in listed
        assert "权重.мир.🎲" in shown
        assert "abc\\u202efdp.exe" in shown
        assert "a\\x00b\\x1fc\\x7fd\\re\\nf\\tg" in shown
        assert all(character.isprintable() for name in shown for character in name)
        assert len(shown) >= len(HOSTILE) * 3 - 1
        menu = figure(page, "stripes").get_by_label("Module")
        for choice in menu.locator("option").all_text_contents():
            menu.select_option(choice)
            expect(figure(page, "stripes").locator("figcaption")).to_contain_text("Changed share of the rows")
            figure(page, "stripes").locator("svg.main-svg").first.wait_for()
        assert {"__proto__", "constructor", "toString"} <= set(menu.locator("option").all_text_contents())
        labels = figure(page, "heat").locator(".yaxislayer-above text, .ytick text").all_text_contents()
        assert "x=1</script>" in labels  # names are cut at dots
        assert "{{7*7}}" in labels
        assert page.evaluate("window.x") is None
        assert page.evaluate("({}).polluted") is None


@slow
def test_hostile_names_when_pointed_at(browser: Browser, tmp_path: Path) -> None:
    """What plotly shows beside the pointer is text too: %{y} stays as it is, and tags do nothing."""
    paramdiff.write_report(tmp_path / "report.html", hostile(tmp_path, "tuned"))
    with opened(browser, tmp_path / "report.html") as page:
        plot = figure(page, "heat").locator(".plot")
        plot.scroll_into_view_if_needed()
        seen = set()
        cells = plot.locator(".heatmaplayer").first.bounding_box()
        assert cells
        for step in range(1, 24):
            page.mouse.move(cells["x"] + cells["width"] * 0.6, cells["y"] + cells["height"] * step / 24)
            page.wait_for_timeout(60)
            seen |= set(plot.locator(".hoverlayer text").all_text_contents())
        assert len(seen) > 5
        assert any("<script>" in text or "%{y}" in text for text in seen)
        assert page.evaluate("window.x") is None


@slow
@pytest.mark.parametrize(
    "names", [("</title><script>window.x=1</script>", '"><svg onload=window.x=1>'), ("{{7*7}}", "a" * 200)]
)
def test_hostile_labels(browser: Browser, tmp_path: Path, names: tuple[str, str]) -> None:
    """Names that a user gives to runs and to the page."""
    from playwright.sync_api import expect

    sides = (
        model_dir(tmp_path / "a", {"layers.0.q.weight": MATRIX}),
        model_dir(tmp_path / "b", {"layers.0.q.weight": MATRIX + 1}),
    )
    diff = paramdiff.compare(*sides, measures=ALL, ks=[2])
    paramdiff.write_report(tmp_path / "report.html", dict.fromkeys(names, diff), title="<h1>{{ x }}</h1>" + names[0])
    with opened(browser, tmp_path / "report.html", width=1024) as page:
        assert page.locator("h1").text_content() == "<h1>{{ x }}</h1>" + names[0]
        assert page.locator("h1").count() == 1
        group = figure(page, "heat")
        group.get_by_label("Run").select_option(index=1)
        expect(group.locator("svg.main-svg").first).to_be_visible()
        expect(group.locator("figcaption")).to_contain_text("Heat map")
        assert page.evaluate("window.x") is None
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


CHANGED = ["a\rb", "a\x00b", "\ud800", "a\r\nb"]


@slow
@pytest.mark.parametrize("label", [*CHANGED, "a\x1fb", "  spaces  ", ""])
def test_labels_that_html_would_change(browser: Browser, tmp_path: Path, label: str) -> None:
    """A menu finds its figure although HTML has no NUL, no CR and no lone surrogates."""
    sides = (
        model_dir(tmp_path / "a", {"layers.0.q.weight": MATRIX}),
        model_dir(tmp_path / "b", {"layers.0.q.weight": MATRIX + 1}),
    )
    diff = paramdiff.compare(*sides, measures=["change", "magnitude", "spectrum"])
    paramdiff.write_report(tmp_path / "report.html", {"first": diff, label: diff})
    with opened(browser, tmp_path / "report.html") as page:
        group = figure(page, "heat")
        group.get_by_label("Run").select_option(index=1)
        page.wait_for_timeout(200)
        assert "Not measured" not in (group.locator("figcaption").text_content() or "")
        assert group.locator("svg.main-svg").count() > 0
