"""Pages of other results: experts, odd checkpoints, optimizer states, equal names and many modules."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import paramdiff
from tests.helpers import model_dir
from tests.report import SAMPLES, changes
from tests.report.browser import drawn, everything, figure, heads, opened
from tests.report.helpers import MATRIX, STATES, Build, slow, sound, status

if TYPE_CHECKING:
    from playwright.sync_api import Browser


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
