"""Tables of the page: values, search, order, keyboard, other runs, and what was not compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
import torch

import paramdiff
from tests.helpers import model_dir
from tests.report import RUNS, SAMPLES, changes, module, near, stored
from tests.report.browser import everything, opened, rows
from tests.report.helpers import MATRIX, Build, slow, sound, status

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@slow
def test_values_of_the_table(browser: Browser, one: Path) -> None:
    where = changes(SAMPLES / "base", SAMPLES / "rl-sgd")
    with opened(browser, one) as page:
        assert status(page) == f"1–25 of {len(where)}"
        found = {row["tensor"]: row for row in everything(page)}
        assert status(page) == f"{len(where) // 25 * 25 - (0 if len(where) % 25 else 25) + 1}–{len(where)} of {len(where)}"
    assert set(found) == set(where)
    for name, part in where.items():
        row, changed, n = found[name], int(part.sum()), part.size
        assert (row["parameters"], row["changed"]) == (f"{n:,}", f"{changed:,}")
        share = row["changed, %"].removesuffix(" %")
        assert near(share, 100 * changed / n)
        assert (share == "0") is (changed == 0)
        assert (share == "100") is (changed == n)
        assert row["shape"] == "×".join(map(str, part.shape))
        assert (row["σ₁"] == "–") is (part.ndim != 2)


@slow
def test_next_and_previous(browser: Browser, one: Path) -> None:
    with opened(browser, one) as page:
        before, after = page.locator("#tensors-0 .pager button").all()
        assert before.is_disabled()
        first = rows(page)
        after.click()
        second = rows(page)
        assert status(page) == "26–50 of 50"
        assert after.is_disabled()
        assert not {row[0] for row in first} & {row[0] for row in second}
        assert len(first) == len(second) == 25
        before.click()
        assert rows(page) == first
        assert before.is_disabled()


@slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("up_proj", lambda n: "up_proj" in n),
        ("UP_Proj", lambda n: "up_proj" in n),
        ("  bias   layers.2 ", lambda n: n.endswith("bias") and "layers.2" in n),
        ("attention q_proj", lambda n: "self_attn.q_proj" in n),  # a kind and a module
        ("model", lambda n: True),
        ("(", lambda n: False),
        ("no such thing", lambda n: False),
    ],
)
def test_search(browser: Browser, one: Path, words: str, expected: Callable[[str], bool]) -> None:
    from playwright.sync_api import expect

    names = {name for name in stored(SAMPLES / "base") if expected(name)}
    with opened(browser, one) as page:
        page.locator("#tensors-0 .pager button").last.click()
        page.locator("#tensors-0").get_by_label("Search").fill(words)
        if not names:
            expect(page.locator("#tensors-0 [role=status]")).to_have_text("None of 50 found")
            assert rows(page) == []
            page.locator("#tensors-0").get_by_label("Search").fill("")
            expect(page.locator("#tensors-0 [role=status]")).to_have_text("1–25 of 50")
            return
        found = f" of {len(names)}" + (" found among 50" if len(names) != 50 else "")
        expect(page.locator("#tensors-0 [role=status]")).to_have_text(f"1–{min(25, len(names))}{found}")
        assert {row["tensor"] for row in everything(page)} == names


def sort(page: Page, head: str, times: int = 1) -> str | None:
    """Click a head; what it then says of the order."""
    button = page.locator("#tensors-0 thead").get_by_text(head, exact=True)
    for _ in range(times):
        button.click()
    sorted_by = page.locator("#tensors-0 th[aria-sort]")
    assert sorted_by.count() == 1
    assert sorted_by.text_content() == head
    return sorted_by.get_attribute("aria-sort")


@slow
def test_sort_by_numbers(browser: Browser, one: Path) -> None:
    a, b = stored(SAMPLES / "base"), stored(SAMPLES / "rl-sgd")
    counts = {name: int(part.sum()) for name, part in changes(SAMPLES / "base", SAMPLES / "rl-sgd").items()}
    sigma = {n: float(np.linalg.svd(b[n].astype(float) - a[n], compute_uv=False)[0]) for n in a if a[n].ndim == 2}
    with opened(browser, one) as page:
        assert page.locator("#tensors-0 th[aria-sort]").count() == 0
        assert sort(page, "changed") == "descending"
        assert [int(row["changed"].replace(",", "")) for row in everything(page)] == sorted(counts.values(), reverse=True)
        assert sort(page, "changed") == "ascending"
        assert status(page).startswith("1–25")
        assert [int(row["changed"].replace(",", "")) for row in everything(page)] == sorted(counts.values())
        for times, reverse in ((1, True), (1, False)):
            sort(page, "σ₁", times)
            names = [row["tensor"] for row in everything(page)]
            expected = sorted(sigma, key=lambda name: sigma[name], reverse=reverse)
            assert names[: len(sigma)] == expected
            assert not set(names[len(sigma) :]) & set(sigma)  # those without a value come last, whichever way
            assert len(names) == len(a)


@slow
def test_sort_by_text(browser: Browser, one: Path) -> None:
    with opened(browser, one) as page:
        assert sort(page, "module") == "ascending"
        up = [row["module"] for row in everything(page)]
        assert up == sorted(up)
        assert len(set(up)) == len({module(name) for name in stored(SAMPLES / "base")})
        assert sort(page, "module") == "descending"
        assert [row["module"] for row in everything(page)] == up[::-1]
        assert sort(page, "kind") == "ascending"  # a new column begins anew


@slow
def test_sort_and_search_go_together(browser: Browser, one: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, one) as page:
        sort(page, "changed")
        page.locator("#tensors-0").get_by_label("Search").fill("k_proj.weight")
        expect(page.locator("#tensors-0 [role=status]")).to_have_text("1–4 of 4 found among 50")
        counts = [int(row["changed"].replace(",", "")) for row in everything(page)]
        where = changes(SAMPLES / "base", SAMPLES / "rl-sgd")
        assert counts == sorted((int(p.sum()) for n, p in where.items() if n.endswith("k_proj.weight")), reverse=True)


@slow
def test_the_table_by_keyboard(browser: Browser, one: Path) -> None:
    with opened(browser, one) as page:
        page.locator("#tensors-0").get_by_label("Search").focus()
        seen = []
        for _ in range(9):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("document.activeElement.textContent"))
            if seen[-1] == "changed":
                break
        assert seen[1:3] == ["tensor", "layer"]  # after the box that scrolls
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"
        page.keyboard.press("Enter")
        assert page.locator("#tensors-0 th[aria-sort=descending]").text_content() == "changed"
        page.keyboard.press("Space")
        assert page.locator("#tensors-0 th[aria-sort=ascending]").text_content() == "changed"


@slow
def test_the_table_of_another_run(browser: Browser, many: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, many) as page:
        select = page.locator("select[data-tables=tensors]")
        assert select.locator("option").all_text_contents() == list(RUNS)
        for number, run in enumerate(RUNS):
            select.select_option(label=run)
            expect(page.locator(f"#tensors-{number} tbody tr")).to_have_count(25)
            assert page.locator(".table[data-set=tensors]:visible").count() == 1
            found = {row["tensor"]: row["changed"] for row in everything(page, f"tensors-{number}")}
            where = changes(SAMPLES / "base", SAMPLES / run)
            assert found == {name: f"{int(part.sum()):,}" for name, part in where.items()}


@slow
def test_missing_and_infinite_values_come_last(browser: Browser, tmp_path: Path) -> None:
    base = dict.fromkeys(("a.weight", "b.weight", "c.weight", "d.weight"), MATRIX)
    sides = model_dir(tmp_path / "base", base), model_dir(tmp_path / "tuned", {n: v + 1 for n, v in base.items()})
    found = paramdiff.compare(*sides, measures=["change", "magnitude", "spectrum"])
    found.tables["tensors"] = found.tensors.with_columns(pl.Series("mine", [math.inf, 2.0, None, -3.0]))
    paramdiff.write_report(tmp_path / "report.html", found)
    with opened(browser, tmp_path / "report.html") as page:
        sort(page, "mine")
        assert [row["mine"] for row in everything(page)] == ["2", "-3", "inf", "–"]
        sort(page, "mine")
        assert [row["mine"] for row in everything(page)] == ["-3", "2", "inf", "–"]


# ---- what was not compared ------------------------------------------------------------------------------------------------


@slow
def test_coverage(browser: Browser, build: Build) -> None:
    base = {
        "a.weight": MATRIX, "gone.weight": MATRIX, "turned.weight": MATRIX, "model.embed_tokens.weight": MATRIX,
        "left.out": MATRIX, "mask": torch.tensor([1 + 1j]),
    }  # fmt: skip
    tuned = {
        "a.weight": MATRIX + 1, "new.weight": MATRIX, "turned.weight": MATRIX.T.contiguous(), "left.out": MATRIX,
        "model.embed_tokens.weight": torch.cat([MATRIX + 1, MATRIX[:3]]), "mask": torch.tensor([1 + 2j]),
    }  # fmt: skip
    path = build(base, tuned, exclude=["left"])
    with opened(browser, path) as page:
        sound(page)
        listed = {(row["tensor"], row["side"]): row for row in everything(page, "coverage-0")}
        compared = {row["tensor"] for row in everything(page)}
    assert compared | {name for name, _ in listed} >= set(base) | set(tuned)
    assert "only in the base" in listed["gone.weight", "base"]["reason"]
    assert "only in the tuned" in listed["new.weight", "tuned"]["reason"]
    for side in ("base", "tuned"):
        assert "shapes" in listed["turned.weight", side]["reason"]
        assert "--exclude" in listed["left.out", side]["reason"]
        assert "without arithmetic" in listed["mask", side]["reason"]
    vocabulary = listed["model.embed_tokens.weight", "tuned"]
    assert "rows that only one side has" in vocabulary["reason"]
    assert vocabulary["elements not compared"] == str(3 * 6)
