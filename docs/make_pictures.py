"""Draw the pictures of the README: what the terminal shows, figures, and a report in a browser. Run by `make figures`.

Needs Chromium (or Chrome), as every static picture does.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from pathlib import Path

from paramdiff_cli import render
from rich.console import Console
from rich.text import Text

import paramdiff
from paramdiff import plots

HERE = Path(__file__).parent
COMMAND = "paramdiff sparsity sample_data/base sample_data/rl-sgd --tol 1e-5"
MEASURES = ("change", "magnitude", "rows", "spectrum")
RUNS = {"GRPO, SGD": "rl-sgd", "GRPO, AdamW": "rl-adamw", "SFT": "sft"}
STATES = {"GRPO, AdamW": "rl-adamw", "SFT": "sft"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def terminal() -> None:
    """docs/sparsity.svg: what `paramdiff sparsity` prints."""
    diff = paramdiff.compare("sample_data/base", "sample_data/rl-sgd", tolerances=[1e-5])
    console = Console(record=True, width=96, file=io.StringIO(), highlight=False)
    console.print(Text(f"$ {COMMAND}", style="bold"))
    render.show(console, diff)
    svg = console.export_svg(title="paramdiff", unique_id="paramdiff")
    # rich would fetch its font from elsewhere; any monospace font will do
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code, monospace", "DejaVu Sans Mono, Menlo, Consolas, monospace")
    (HERE / "sparsity.svg").write_text(svg, encoding="utf-8")


def figures() -> None:
    """docs/figures/*.svg, one of each kind."""
    diffs = {
        name: paramdiff.compare("sample_data/base", f"sample_data/{run}", tolerances=[1e-5], measures=MEASURES)
        for name, run in RUNS.items()
    }
    states = {name: paramdiff.adam(f"sample_data/checkpoints/{run}/checkpoint-200") for name, run in STATES.items()}
    drawn = {
        "heatmap": plots.heatmap(diffs),
        "layers": plots.layers(diffs["GRPO, SGD"]),
        "histogram": plots.histogram(diffs, "ulp"),
        "spectrum": plots.spectrum(diffs),
        "stripes": plots.stripes(diffs["GRPO, SGD"], "q_proj"),
        "adam": plots.adam(states),
    }
    for name, fig in drawn.items():
        plots.save(fig, HERE / "figures" / f"{name}.svg")


def report() -> None:
    """docs/figures/report.png: the beginning of a report, in a browser."""
    from playwright.sync_api import sync_playwright

    diff = paramdiff.compare("sample_data/base", "sample_data/rl-sgd", tolerances=[1e-5], measures=MEASURES)
    browser = next(found for name in BROWSERS if (found := shutil.which(name)))
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as driver:
        page = Path(scratch) / "report.html"
        paramdiff.write_report(page, diff)
        with driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"]) as chromium:
            view = chromium.new_context(offline=True, viewport={"width": 1180, "height": 1480}).new_page()
            view.goto(page.absolute().as_uri())
            view.wait_for_selector("body[data-ready=yes]")
            view.screenshot(path=HERE / "figures" / "report.png")


if __name__ == "__main__":
    terminal()
    figures()
    report()
