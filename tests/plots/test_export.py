"""Figures as files: one page that works offline, pictures of the size that was asked for, and what stays on failure."""

from __future__ import annotations

import os
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest

import paramdiff
from paramdiff import plots
from paramdiff.errors import OptionError, OutputError

SAMPLE = Path(__file__).parents[2] / "sample_data"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
needs_browser = pytest.mark.skipif(
    not any(shutil.which(name) for name in BROWSERS), reason="no chromium, chromium-browser or google-chrome on the PATH"
)


@pytest.fixture(scope="module")
def fig() -> go.Figure:
    return plots.heatmap(paramdiff.compare(SAMPLE / "base", SAMPLE / "rl-sgd"))


@pytest.fixture(scope="module")
def lines() -> go.Figure:
    """A figure with a legend."""
    return plots.layers(paramdiff.compare(SAMPLE / "base", SAMPLE / "rl-sgd"))


# --- pages -----------------------------------------------------------------------------------------------------------


def test_a_page_has_everything_in_it(fig: go.Figure, tmp_path: Path) -> None:
    plots.save(fig, tmp_path / "heat.html")
    assert [path.name for path in tmp_path.iterdir()] == ["heat.html"]
    page = (tmp_path / "heat.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert 'charset="utf-8"' in page[:200]
    assert len(page) > 3_000_000, "plotly.js is in it"
    assert "Plotly.newPlot(" in page
    assert not re.search(r"<(script|link|img|iframe)\b[^>]*\b(src|href)\s*=", page)
    assert "<link" not in page.partition("<script")[0]
    assert f"<title>{fig.layout.title.text}</title>" in page
    assert f"<figcaption>{fig.layout.meta['alt']}</figcaption>" in page
    assert f'aria-label="{fig.layout.meta["alt"]}"' in page


def test_the_numbers_of_the_figure_are_on_the_page(fig: go.Figure, tmp_path: Path) -> None:
    plots.save(fig, tmp_path / "heat.html")
    page = (tmp_path / "heat.html").read_text(encoding="utf-8")
    drawn = page[page.index("Plotly.newPlot(") :]
    numbers = [value for line in fig.data[-1].z for value in line if value is not None]
    assert len(numbers) > 20
    for value in numbers:
        assert str(value) in drawn


def test_a_page_escapes_what_its_words_hold(fig: go.Figure, tmp_path: Path) -> None:
    copy = go.Figure(fig)
    copy.update_layout(meta={"alt": '"><script>alert(1)</script>'}, title={"text": "</title><script>alert(2)</script>"})
    plots.save(copy, tmp_path / "heat.html")
    page = (tmp_path / "heat.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_title_of_a_page_is_escaped_once(tmp_path: Path) -> None:
    diff = paramdiff.compare(SAMPLE / "base", SAMPLE / "rl-sgd")
    fig = plots.layers({"a < b": diff})
    plots.save(fig, tmp_path / "heat.html")
    assert "<title>" + fig.layout.title.text + "</title>" in (tmp_path / "heat.html").read_text(encoding="utf-8")


def test_saving_leaves_the_figure_as_it_was(lines: go.Figure, tmp_path: Path) -> None:
    before = lines.to_json()
    plots.save(lines, tmp_path / "a.html")
    plots.export.sized(lines, 340)
    assert lines.to_json() == before


# --- pictures --------------------------------------------------------------------------------------------------------


def size_of_png(content: bytes) -> tuple[int, int]:
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[12:16] == b"IHDR"
    assert content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def size_of_svg(content: bytes) -> tuple[float, float]:
    root = ElementTree.fromstring(content)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return float(root.attrib["width"]), float(root.attrib["height"])


def size_of_pdf(content: bytes) -> tuple[float, float]:
    """Of the page, in points."""
    assert content.startswith(b"%PDF-")
    assert content.rstrip().endswith(b"%%EOF")
    box = re.search(rb"/MediaBox\s*\[\s*0 0 ([\d.]+) ([\d.]+)\s*\]", content)
    assert box is not None
    return float(box[1]), float(box[2])


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "pixels"), [("text", 680), ("column", 340), (500, 500), ("1200", 1200)])
def test_png(fig: go.Figure, tmp_path: Path, width: Any, pixels: int) -> None:
    plots.save(fig, tmp_path / "heat.PNG", width)
    across, down = size_of_png((tmp_path / "heat.PNG").read_bytes())
    assert (across, down) == (3 * pixels, 3 * plots.export.sized(fig, pixels).layout.height)
    if pixels >= 500:
        assert down == 3 * fig.layout.height


@needs_browser
@pytest.mark.slow
def test_svg(lines: go.Figure, tmp_path: Path) -> None:
    for width, pixels in (("text", 680), ("column", 340)):
        plots.save(lines, tmp_path / "lines.svg", width)
        content = (tmp_path / "lines.svg").read_bytes()
        assert size_of_svg(content)[0] == pixels
        shown = "".join(ElementTree.fromstring(content).itertext())
        for text in ("all modules", "q_proj", "down_proj", "layer", "base → rl-sgd"):
            assert text in shown, (width, text)


@needs_browser
@pytest.mark.slow
def test_pdf(fig: go.Figure, tmp_path: Path) -> None:
    sizes = []
    for width in ("text", "column"):
        plots.save(fig, tmp_path / "heat.pdf", width)
        sizes.append(size_of_pdf((tmp_path / "heat.pdf").read_bytes()))
    for (across, _), pixels in zip(sizes, (680, 340), strict=True):
        assert across == pytest.approx(pixels * 72 / 96, rel=0.02)


def test_in_a_column_the_legend_is_below_and_names_are_short(lines: go.Figure) -> None:
    narrow = plots.export.sized(lines, 340)
    assert narrow.layout.width == 340
    assert narrow.layout.legend.orientation == "h"
    assert narrow.layout.font.size < lines.layout.template.layout.font.size
    assert max(len(trace.name) for trace in narrow.data) <= 16
    assert len(narrow.data) == len(lines.data)
    wide = plots.export.sized(lines, 680)
    assert wide.layout.legend.orientation is None


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heat", "heat.jpg", "heat.html.gz", ".html", "heat.", "html", "heat.svgz"])
def test_other_endings_are_refused(fig: go.Figure, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"written as \.html, \.png, \.svg or \.pdf"):
        plots.save(fig, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", ["wide", "", "99", 99, 10_001, "10001", -340, "-340", "340px", 340.5, None, "1e3", True])
def test_other_widths_are_refused(fig: go.Figure, tmp_path: Path, width: Any) -> None:
    with pytest.raises(OptionError, match=r"is no width.*column, text, or 100 to 10000 pixels"):
        plots.save(fig, tmp_path / "heat.svg", width)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", ["column", "text", "100", 100, 10_000, "10000"])
def test_widths_that_are_taken(width: Any) -> None:
    assert plots.checked("a/heat.SVG", width) == Path("a/heat.SVG")


def test_a_width_with_more_digits_than_python_reads() -> None:
    with pytest.raises(OptionError, match="is no width"):
        plots.checked("heat.svg", "9" * 5000)


def test_without_kaleido_a_sentence_says_so(fig: go.Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    (tmp_path / "heat.svg").write_text("old")
    with pytest.raises(OptionError, match=r"need kaleido.*paramdiff\[images\].*\.html"):
        plots.save(fig, tmp_path / "heat.svg")
    assert (tmp_path / "heat.svg").read_text() == "old"
    plots.save(fig, tmp_path / "heat.html")


@pytest.mark.slow
def test_without_a_browser_a_sentence_says_so(fig: go.Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BROWSER_PATH names a program that is none."""
    monkeypatch.setenv("BROWSER_PATH", shutil.which("false") or "false")
    with pytest.raises(OptionError, match=r"found no Chrome or Chromium.*BROWSER_PATH.*\.html"):
        plots.save(fig, tmp_path / "heat.svg")
    assert not list(tmp_path.iterdir())


# --- what was there before -------------------------------------------------------------------------------------------


def test_directories_are_made_and_old_files_replaced(fig: go.Figure, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "heat.html"
    plots.save(fig, target)
    first = target.read_bytes()
    target.write_text("old")
    plots.save(fig, str(target))
    assert target.read_bytes() == first
    assert [path.name for path in target.parent.iterdir()] == ["heat.html"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert target.stat().st_mode == plain.stat().st_mode


def test_a_directory_in_its_place_stays(fig: go.Figure, tmp_path: Path) -> None:
    (tmp_path / "heat.html").mkdir()
    (tmp_path / "heat.html" / "kept").write_text("old")
    with pytest.raises(OutputError, match=r"heat\.html: Is a directory.*Nothing there was changed"):
        plots.save(fig, tmp_path / "heat.html")
    assert [path.name for path in tmp_path.iterdir()] == ["heat.html"]
    assert (tmp_path / "heat.html" / "kept").read_text() == "old"


def test_a_file_in_the_place_of_a_directory_stays(fig: go.Figure, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError, match=r"Cannot write .*heat\.html"):
        plots.save(fig, tmp_path / "file" / "heat.html")
    assert (tmp_path / "file").read_text() == "old"


def test_a_place_that_cannot_be_written(fig: go.Figure) -> None:
    """Not even root makes files there."""
    with pytest.raises(OutputError, match=r"Cannot write /proc/heat\.html"):
        plots.save(fig, "/proc/heat.html")


def test_a_name_that_is_too_long(fig: go.Figure, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        plots.save(fig, tmp_path / ("x" * 300 + ".html"))
    assert not list(tmp_path.iterdir())


def test_a_long_name_in_another_script(fig: go.Figure, tmp_path: Path) -> None:
    name = "权" * 80 + ".html"
    assert len(os.fsencode(name)) <= 255
    plots.save(fig, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.slow
@needs_browser
def test_the_same_figure_is_the_same_svg_and_another_has_other_ids(fig: go.Figure, tmp_path: Path) -> None:
    for name in ("a", "b"):
        plots.save(fig, tmp_path / f"{name}.svg")
    other = go.Figure(fig).update_layout(title={"text": "another"})
    plots.save(other, tmp_path / "c.svg")
    a, b, c = ((tmp_path / f"{name}.svg").read_text() for name in "abc")
    assert a == b
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (a, c)]
    assert ids[0]
    assert not ids[0] & ids[1]
