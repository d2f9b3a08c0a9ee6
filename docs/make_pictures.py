"""Draw docs/sparsity.svg: what `paramdiff sparsity` prints on a terminal for a pair of sample_data. Run by `make docs`."""

from __future__ import annotations

import io
import re
from pathlib import Path

from paramdiff_cli import render
from rich.console import Console
from rich.text import Text

import paramdiff

COMMAND = "paramdiff sparsity sample_data/base sample_data/rl-sgd --tol 1e-5"


def main() -> None:
    """Write the picture beside this file."""
    diff = paramdiff.compare("sample_data/base", "sample_data/rl-sgd", tolerances=[1e-5])
    console = Console(record=True, width=96, file=io.StringIO(), highlight=False)
    console.print(Text(f"$ {COMMAND}", style="bold"))
    render.show(console, diff)
    svg = console.export_svg(title="paramdiff", unique_id="paramdiff")
    # rich would fetch its font from elsewhere; any monospace font will do
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code, monospace", "DejaVu Sans Mono, Menlo, Consolas, monospace")
    Path(__file__).with_name("sparsity.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
