"""How large is the report of a 671B mixture of experts, how long does it take to write, how soon can it be used?

    python benchmarks/report.py [DIR]

The checkpoints have DeepSeek-V3's names (61 layers, 3 of them dense, 256 routed experts and a shared one: 45,000 matrices)
with matrices of 16 × 32, since only names, counts and spectra reach a report. Needs playwright and Debian's chromium, as the
tests do.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYERS, DENSE, EXPERTS, SHAPE = 61, 3, 256, (16, 32)
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def names(layers: int = LAYERS, experts: int = EXPERTS) -> list[str]:
    """The matrices of the layout."""
    found = ["model.embed_tokens.weight", "lm_head.weight"]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found += [f"{at}.self_attn.{name}.weight" for name in ATTENTION]
        if layer < DENSE:
            found += [f"{at}.mlp.{name}.weight" for name in MLP]
            continue
        found.append(f"{at}.mlp.gate.weight")
        found += [f"{at}.mlp.shared_experts.{name}.weight" for name in MLP]
        found += [f"{at}.mlp.experts.{expert}.{name}.weight" for expert in range(experts) for name in MLP]
    return found


def make(directory: Path, layers: int = LAYERS, experts: int = EXPERTS) -> tuple[Path, Path]:
    """Write the pair: in each matrix of the tuned side some elements moved, more of them in later layers."""
    random = np.random.default_rng(0)
    base = {name: random.standard_normal(SHAPE, dtype=np.float32) for name in names(layers, experts)}
    tuned = {}
    for place, (name, value) in enumerate(base.items()):
        moved = random.random(SHAPE) < 0.3 * (place + 1) / len(base)
        tuned[name] = value + moved * random.standard_normal(SHAPE, dtype=np.float32) * np.float32(1e-3)
    for side, tensors in (("base", base), ("tuned", tuned)):
        (directory / side).mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / side / "model.safetensors")
    return directory / "base", directory / "tuned"


def opened(path: Path) -> dict[str, float]:
    """Seconds in Chromium: until the first figure is there and until all are; for a search, a sort, another figure."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        page = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}).new_page()
        times, began = {}, time.perf_counter()
        page.goto(path.absolute().as_uri())
        page.wait_for_selector("figure[data-group=heat] .main-svg")
        times["first figure"] = time.perf_counter() - began
        page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
        times["all drawn"] = time.perf_counter() - began
        began = time.perf_counter()
        found = page.locator("#tensors-0 [role=status]")
        page.fill("#tensors-0 input", "layers.60 experts.255 down")
        found.filter(has_text="of 1 found").wait_for()
        times["search"] = time.perf_counter() - began
        page.fill("#tensors-0 input", "")
        found.filter(has_text="1–25 of").filter(has_not_text="found").wait_for()
        began = time.perf_counter()
        page.locator("#tensors-0 thead button").nth(6).dispatch_event("click")
        page.wait_for_selector("#tensors-0 th[aria-sort=descending]")
        times["sort"] = time.perf_counter() - began
        began = time.perf_counter()
        experts = page.locator("figure[data-group=experts]")
        experts.locator("select").last.select_option(index=1)
        page.wait_for_selector("figure[data-group=experts][data-drawn*=bf16]", state="attached")
        times["other quantity"] = time.perf_counter() - began
        browser.close()
    return times


def main() -> None:
    """Make the pair, compare it, write the report and open it."""
    import paramdiff

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        where = options.directory or Path(scratch)
        base, tuned = make(where, options.layers, options.experts)
        began = time.perf_counter()
        diff = paramdiff.compare(base, tuned, tolerances=[1e-5], measures=("change", "magnitude", "rows", "spectrum"))
        print(f"{diff.tensors.height:,} tensors compared in {time.perf_counter() - began:.1f} s")
        began = time.perf_counter()
        paramdiff.write_report(where / "report.html", diff)
        size = (where / "report.html").stat().st_size / 1e6
        print(f"report written in {time.perf_counter() - began:.1f} s: {size:.1f} MB, of which plotly.js is 4.8 MB")
        for name, seconds in opened(where / "report.html").items():
            print(f"{name}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
