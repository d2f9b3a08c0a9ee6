"""The page in Chromium, offline: figures, menus, tables, hostile names, print, no JavaScript, contrast, odd results.

Whatever the page logs as an error or a warning, or asks for from elsewhere, fails a test (see `browser.opened`).
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
import torch

import paramdiff
from tests.helpers import model_dir
from tests.report import RUNS, SAMPLES, changes, layer, module, near, stored
from tests.report.browser import drawn, everything, figure, heads, launched, opened, rows, title

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ALL = ["change", "magnitude", "rows", "spectrum", "subspace"]
ONE_RUN = ["heat", "layers", "histograms", "spectra", "stripes", "directions"]
STATES = tuple(SAMPLES / "checkpoints" / run / "checkpoint-200" for run in ("rl-adamw", "sft"))
MATRIX = torch.arange(1.0, 49).reshape(8, 6)
Build = Callable[..., Path]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def samples() -> dict[str, paramdiff.Diff]:
    """Each run against the base."""
    return {run: paramdiff.compare(SAMPLES / "base", SAMPLES / run, measures=ALL, ks=[4], tolerances=[1e-5]) for run in RUNS}


@pytest.fixture(scope="module")
def one(samples: dict[str, paramdiff.Diff], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run."""
    path = tmp_path_factory.mktemp("one") / "report.html"
    paramdiff.write_report(path, samples["rl-sgd"])
    return path


@pytest.fixture(scope="module")
def many(samples: dict[str, paramdiff.Diff], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three runs and two optimizer states."""
    path = tmp_path_factory.mktemp("many") / "report.html"
    paramdiff.write_report(path, [*samples.values(), paramdiff.adam(*STATES)])
    return path


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Compare two made-up checkpoints and write their report."""

    def made(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], **options: Any) -> Path:
        options = {"measures": ALL, "ks": [2], **options}
        found = paramdiff.compare(model_dir(tmp_path / "base", base), model_dir(tmp_path / "tuned", tuned), **options)
        paramdiff.write_report(tmp_path / "report.html", found)
        return tmp_path / "report.html"

    return made


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


# ---- menus ----------------------------------------------------------------------------------------------------------------


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


# ---- drawn numbers --------------------------------------------------------------------------------------------------------


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


# ---- the table of tensors -------------------------------------------------------------------------------------------------


def status(page: Page, table: str = "tensors-0") -> str:
    return page.locator(f"#{table} [role=status]").text_content() or ""


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


# ---- hostile names --------------------------------------------------------------------------------------------------------

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


# ---- print, no JavaScript, contrast ---------------------------------------------------------------------------------------


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


# ---- other results --------------------------------------------------------------------------------------------------------


@slow
def test_a_layout_with_experts(browser: Browser, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    spec = importlib.util.spec_from_file_location("bench_report", SAMPLES.parent / "benchmarks" / "report.py")
    assert spec
    assert spec.loader
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    base, tuned = bench.make(tmp_path, layers=8, experts=16)
    diff = paramdiff.compare(base, tuned, tolerances=[1e-5], measures=["change", "magnitude", "rows", "spectrum"])
    paramdiff.write_report(tmp_path / "report.html", diff)
    assert (tmp_path / "report.html").stat().st_size < 15e6
    where = changes(base, tuned)
    with opened(browser, tmp_path / "report.html") as page:
        sound(page)
        group = figure(page, "experts")
        group.get_by_label("Module").select_option("experts.up_proj")
        expect(group.locator(".gtitle")).to_contain_text("experts.up_proj")
        (cells,) = [trace["z"] for trace in drawn(page, "experts") if trace["coloured"]]
        assert status(page).endswith(f"of {len(where):,}")
    for expert in range(16):
        for x, number in enumerate(range(3, 8)):
            share = where[f"model.layers.{number}.mlp.experts.{expert}.up_proj.weight"].mean()
            assert 10 ** cells[expert][x] == pytest.approx(share, rel=1e-3)


EMPTY = torch.zeros(0, 4)
NAN = torch.full((8, 6), math.nan)
ODD: dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any], str]] = {
    "identical": ({"layers.0.a.weight": MATRIX}, {"layers.0.a.weight": MATRIX}, {}, "do not differ"),
    "vectors only": ({"a": MATRIX[0], "b": MATRIX[1]}, {"a": MATRIX[0] + 1, "b": MATRIX[1]}, {}, "6 of 12"),
    "one scalar": ({"a": torch.tensor(1.0)}, {"a": torch.tensor(2.0)}, {}, "1 of 1"),
    "no layers": ({"a.weight": MATRIX, "b.weight": MATRIX}, {"a.weight": MATRIX + 1, "b.weight": MATRIX}, {}, "48 of 96"),
    "change only": (
        {"layers.0.a.weight": MATRIX}, {"layers.0.a.weight": MATRIX + 1}, {"measures": ["change"]}, "48 of 48",
    ),
    "no spectrum": (
        {"layers.0.a.weight": MATRIX}, {"layers.0.a.weight": MATRIX + 1}, {"measures": ["change", "magnitude", "rows"]},
        "48 of 48",
    ),
    "other types": (
        {"a.weight": MATRIX + 0.01}, {"a.weight": (MATRIX + 0.01).bfloat16()}, {}, "after rounding to bf16 0 differ",
    ),
    "integers": ({"a": torch.arange(5)}, {"a": torch.arange(5) + 1}, {}, "5 of 5"),
    "booleans": ({"a": torch.tensor([True, False])}, {"a": torch.tensor([True, True])}, {}, "1 of 2"),
    "nothing finite": ({"layers.0.a.weight": NAN}, {"layers.0.a.weight": MATRIX}, {}, "48 elements are NaN or infinite"),
    "some infinite": (
        {"layers.0.a.weight": MATRIX}, {"layers.0.a.weight": torch.where(MATRIX > 40, math.inf, MATRIX)}, {}, "8 of 48",
    ),
    "no elements": ({"a.weight": EMPTY}, {"a.weight": EMPTY}, {}, "no elements were compared"),
    "no elements beside others": (
        {"layers.0.a.weight": EMPTY, "b.weight": MATRIX}, {"layers.0.a.weight": EMPTY, "b.weight": MATRIX + 1}, {},
        "48 of 48",
    ),
    "no columns": (
        {"a.weight": torch.zeros(4, 0), "b.weight": MATRIX}, {"a.weight": torch.zeros(4, 0), "b.weight": MATRIX + 1}, {},
        "48 of 48",
    ),
    "huge values": (
        {"a.weight": MATRIX.double() * 1e300}, {"a.weight": MATRIX.double() * -1e300}, {}, "48 of 48",
    ),
    "tiny values": (
        {"a.weight": MATRIX.double() * 1e-310}, {"a.weight": MATRIX.double() * -1e-310}, {}, "48 of 48",
    ),
    "huge layer number": (
        {"layers.999999999.a.weight": MATRIX, "layers.0.a.weight": MATRIX},
        {"layers.999999999.a.weight": MATRIX + 1, "layers.0.a.weight": MATRIX}, {}, "48 of 96",
    ),
    "convolution": ({"a.weight": torch.ones(4, 3, 2, 2)}, {"a.weight": torch.ones(4, 3, 2, 2) * 2}, {}, "48 of 48"),
    "stack of experts": (
        {"layers.0.mlp.experts.up_proj": MATRIX.reshape(2, 4, 6)},
        {"layers.0.mlp.experts.up_proj": MATRIX.reshape(2, 4, 6) + 1}, {}, "48 of 48",
    ),
}  # fmt: skip


@slow
@pytest.mark.parametrize("case", ODD)
def test_odd_results(browser: Browser, build: Build, case: str) -> None:
    base, tuned, options, truth = ODD[case]
    with opened(browser, build(base, tuned, **options)) as page:
        sound(page)
        assert truth in page.locator("section").first.inner_text()
        text = page.locator("body").inner_text()
        assert not re.search(r"\b(undefined|None|NaN %|nan %)\b", text)
        assert {row["tensor"] for row in everything(page)} == set(base)


@slow
@pytest.mark.parametrize("states", [STATES[:1], STATES])
def test_optimizer_states_alone(browser: Browser, states: tuple[Path, ...], tmp_path: Path) -> None:
    paramdiff.write_report(tmp_path / "report.html", paramdiff.adam(*states))
    with opened(browser, tmp_path / "report.html") as page:
        sound(page)
        found = page.locator("section[aria-labelledby=adam] thead th").all_text_contents()
        assert len(found) == 1 + len(states)
        assert page.locator("#tensors-0").count() == 0
        if len(states) > 1:
            menu = figure(page, "adam-heat").get_by_label("Checkpoint")
            assert menu.locator("option").count() == 2


@slow
def test_a_state_without_a_second_moment(browser: Browser, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    optimizer = torch.optim.RMSprop(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    paramdiff.write_report(tmp_path / "report.html", paramdiff.adam(tmp_path / "a.pt"))
    with opened(browser, tmp_path / "report.html") as page:
        sound(page)
        assert "RMSprop" in page.locator("main").inner_text() or "rmsprop" in page.locator("main").inner_text().lower()


@slow
def test_results_of_one_name(browser: Browser, tmp_path: Path) -> None:
    """Two saved results whose tuned sides are called the same are both there, with numbers of their own."""
    found = []
    for number in (1, 2):
        here = tmp_path / str(number)
        tuned = MATRIX.clone()
        tuned[:number] += 1
        sides = (
            model_dir(here / "base", {"layers.0.q.weight": MATRIX}),
            model_dir(here / "tuned", {"layers.0.q.weight": tuned}),
        )
        diff = paramdiff.compare(*sides, measures=["change", "magnitude", "rows", "spectrum"])
        diff.run["tuned"]["ref"], diff.run["base"]["ref"] = "runs/tuned", "base"
        diff.save(tmp_path / f"saved-{number}")
        found.append(paramdiff.load(tmp_path / f"saved-{number}"))
    paramdiff.write_report(tmp_path / "report.html", found)
    with opened(browser, tmp_path / "report.html") as page:
        sound(page)
        assert page.locator("section[aria-labelledby=overall] tbody tr").nth(1).locator("td").all_text_contents() == [
            "6 (12.50 %)", "12 (25.00 %)",
        ]  # fmt: skip
        titles = figure(page, "heat").get_by_label("Run").locator("option").all_text_contents()
        assert len(set(titles)) == 2


@slow
def test_many_modules(browser: Browser, tmp_path: Path) -> None:
    """Sixty modules: menus hold all of them, and the page is still no wider than the window."""
    base = {f"layers.{i % 2}.block_{i // 2:02}_with_a_long_name_to_it.weight": MATRIX + i for i in range(120)}
    tuned = {name: value + (torch.arange(48).reshape(8, 6) % 5 == 0) for name, value in base.items()}
    sides = model_dir(tmp_path / "base", base), model_dir(tmp_path / "tuned", tuned)
    diff = paramdiff.compare(*sides, measures=["change", "magnitude", "rows", "spectrum"])
    paramdiff.write_report(tmp_path / "report.html", diff)
    with opened(browser, tmp_path / "report.html", width=1024) as page:
        sound(page)
        assert figure(page, "stripes").get_by_label("Module").locator("option").count() == 60
        assert heads(page)[0] == "tensor"
        assert {row["tensor"] for row in everything(page)} == set(base)
