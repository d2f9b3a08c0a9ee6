"""A real browser, Debian's Chromium, that opens reports offline. Whatever a page complains of fails the test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
HERE = ("file:", "data:", "blob:")


@contextmanager
def launched() -> Iterator[Browser]:
    """Chromium; the test is skipped where there is none."""
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, path: Path, *, width: int = 1280, javascript: bool = True) -> Iterator[Page]:
    """The page, when all of it is drawn. Errors, warnings, dialogs and requests to anywhere fail the test in the end."""
    context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, java_script_enabled=javascript)
    problems: list[str] = []
    try:
        page = context.new_page()
        page.on("console", lambda m: problems.append(m.text[:500]) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)[:500]))
        page.on("request", lambda r: problems.append(r.url[:200]) if not r.url.startswith(HERE) else None)
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.goto(path.absolute().as_uri())
        if javascript:
            page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
        yield page
        if javascript:
            page.evaluate("new Promise((resolve) => setTimeout(resolve, 50))")  # what is still on its way
    finally:
        context.close()
    assert not problems, problems


def figure(page: Page, group: str) -> Locator:
    return page.locator(f"figure[data-group={group}]")


def drawn(page: Page, group: str) -> list[dict[str, Any]]:
    """The data of a figure as plotly holds it."""
    found = page.evaluate(
        """(group) => document.querySelector(`figure[data-group=${group}] .plot`).data.map((trace) => ({
            name: trace.name, x: trace.x && [...trace.x], y: trace.y && [...trace.y],
            z: trace.z && [...trace.z].map((row) => [...row]), hovertext: trace.hovertext,
            axis: trace.xaxis, coloured: Boolean(trace.coloraxis),
        }))""",
        group,
    )
    assert isinstance(found, list)
    return found


def title(page: Page, group: str) -> str:
    """The title as it is drawn, not as it was asked for."""
    return figure(page, group).locator(".gtitle").text_content() or ""


def rows(page: Page, table: str = "tensors-0") -> list[list[str]]:
    """The cells that a large table shows."""
    found = page.evaluate(
        """(id) => [...document.querySelectorAll(`#${id} tbody tr`)]
            .map((row) => [...row.cells].map((cell) => cell.textContent))""",
        table,
    )
    assert isinstance(found, list)
    return found


def heads(page: Page, table: str = "tensors-0") -> list[str]:
    return page.locator(f"#{table} thead th").all_text_contents()


def everything(page: Page, table: str = "tensors-0") -> list[dict[str, str]]:
    """All rows of a large table, page after page."""
    names, found = heads(page, table), []
    following = page.locator(f"#{table} .pager button").last
    while True:
        found += [dict(zip(names, row, strict=True)) for row in rows(page, table)]
        if following.is_disabled():
            return found
        following.click()
