"""`paramdiff plot` as a user runs it: every figure from saved results, and what it says of bad input."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import paramdiff

from .helpers import SAMPLE, assert_sentence, environment, run, squeezed
from .test_errors import CONTROL

pytestmark = pytest.mark.slow  # each command takes a second; the quick suite has the functions themselves
BASE, SGD, SFT = (SAMPLE / name for name in ("base", "rl-sgd", "sft"))
KINDS = ("heatmap", "layers", "histogram", "spectrum", "stripes", "adam")
needs_browser = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")),
    reason="no chromium, chromium-browser or google-chrome on the PATH",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results as `--out` writes them: sgd, sft, adam."""
    directory = tmp_path_factory.mktemp("saved")
    for name, tuned in (("sgd", SGD), ("sft", SFT)):
        measures = ["change", "magnitude", "rows", "spectrum"]
        paramdiff.compare(BASE, tuned, measures=measures, tolerances=[1e-5]).save(directory / name)
    paramdiff.adam(SAMPLE / "checkpoints" / "rl-adamw" / "checkpoint-200").save(directory / "adam")
    return directory


def title(page: Path) -> str:
    found = re.search(r"<title>(.*?)</title>", page.read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure(saved: Path, tmp_path: Path, kind: str) -> None:
    result = saved / ("adam" if kind == "adam" else "sgd")
    done = run("plot", result, kind, "-o", tmp_path / "fig.html")
    assert (done.returncode, done.stderr) == (0, "")
    fig = paramdiff.load(result).plot(kind)
    assert done.stdout == f"{tmp_path / 'fig.html'}: {fig.layout.meta['alt']}\n"
    assert title(tmp_path / "fig.html") == fig.layout.title.text
    assert [path.name for path in tmp_path.iterdir()] == ["fig.html"]


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("heatmap", ["--column", "rel_l2"], "‖Δ‖ / ‖base‖, by layer and module"),
        ("heatmap", ["--column", "above[1e-05]"], "Share of parameters with |Δ| > 1e-05"),
        ("layers", ["--column", "stable_rank"], "Stable rank"),
        ("histogram", ["--column", "ulp", "--by", "module"], "Distance in ulps"),
        ("spectrum", ["--by", "layer"], "Spectrum of the update"),
        ("spectrum", ["--module", "q_proj"], "rl-sgd, q_proj"),
        ("stripes", ["--module", "v_proj"], "of v_proj"),
    ],
)
def test_options(saved: Path, tmp_path: Path, kind: str, options: list[str], said: str) -> None:
    done = run("plot", saved / "sgd", kind, *options, "--output", tmp_path / "fig.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert said in title(tmp_path / "fig.html").replace("&gt;", ">")


@pytest.mark.parametrize("kind", ["heatmap", "layers", "histogram", "spectrum"])
def test_several_directories(saved: Path, tmp_path: Path, kind: str) -> None:
    done = run("plot", saved / "sgd", saved / "sft", kind, "-o", tmp_path / "fig.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 runs" in title(tmp_path / "fig.html")
    for label in ("rl-sgd", "sft"):
        assert label in done.stdout


def test_stripes_take_one_directory(saved: Path, tmp_path: Path) -> None:
    assert_sentence(run("plot", saved / "sgd", saved / "sft", "stripes", "-o", tmp_path / "fig.html"), 2)


def test_quiet_and_another_title(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "fig.html"
    done = run("plot", saved / "sgd", "heatmap", "-o", target, "--quiet", "--title", "My <b>title</b>")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = target.read_text(encoding="utf-8")
    assert "My \\u0026lt;b\\u0026gt;title" in page or "My &lt;b&gt;title" in page
    assert "My <b>title" not in page


@needs_browser
def test_pictures(saved: Path, tmp_path: Path) -> None:
    done = run("plot", saved / "sgd", "layers", "-o", tmp_path / "fig.png", "--width", "column")
    assert (done.returncode, done.stderr) == (0, "")
    content = (tmp_path / "fig.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">I", content[16:20]) == (3 * 340,)
    assert run("plot", saved / "sgd", "layers", "-o", tmp_path / "fig.svg", "--width", "500").returncode == 0
    assert b'width="500"' in (tmp_path / "fig.svg").read_bytes()[:500]
    assert {path.name for path in tmp_path.iterdir()} == {"fig.png", "fig.svg"}


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no such figure": (["sgd", "pie"], ["'pie' is no figure", *KINDS]),
    "no figure": (["sgd"], ["is no figure", "heatmap"]),
    "no directory": (["heatmap"], ["There is no result to draw"]),
    "layers by module": (["sgd", "layers", "--module", "q_proj"], ["layers takes no --module", "--column"]),
    "heatmap by kind": (["sgd", "heatmap", "--by", "kind"], ["heatmap takes no --by", "--column", "--module"]),
    "stripes of a column": (["sgd", "stripes", "--column", "ulp"], ["stripes takes no --column", "--module"]),
    "adam of a module": (["adam", "adam", "--module", "q_proj"], ["adam takes no --module", "--by"]),
    "unknown column": (["sgd", "heatmap", "--column", "mass"], ["no column 'mass'", "rel_l2", "stable_rank"]),
    "unknown histogram": (["sgd", "histogram", "--column", "mass"], ["no histogram 'mass'", "log2_abs_delta"]),
    "unknown grouping": (["sgd", "spectrum", "--by", "expert"], ["not grouped by 'expert'", "layer"]),
    "unknown module": (["sgd", "stripes", "--module", "z_proj"], ["no matrix of 'z_proj'", "q_proj"]),
    "no experts": (["sgd", "heatmap", "--module", "q_proj"], ["no single experts of 'q_proj'"]),
    "weights as optimizer state": (["sgd", "adam"], ["no optimizer state to draw"]),
    "optimizer state as weights": (["adam", "stripes"], ["Optimizer state has no comparison"]),
    "a mix": (["sgd", "adam", "heatmap"], ["no column 'sparsity'"]),
    "a missing directory": (["nowhere", "heatmap"], ["nowhere", "no result of paramdiff"]),
    "a checkpoint": ([str(BASE), "heatmap"], ["no result of paramdiff"]),
    "escape codes": (["sgd", "\x1b[31mred"], ["is no figure"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    args, words = REFUSED[case]
    done = run("plot", *args, "-o", tmp_path / "fig.html", cwd=saved)
    said = assert_sentence(done, 2, *words)
    assert not CONTROL.search(said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fig.jpg", [], ["fig.jpg", ".html, .png, .svg or .pdf"]),
        ("fig", [], ["fig: a figure is written as"]),
        ("fig.svg", ["--width", "wide"], ["'wide' is no width", "column, text"]),
        ("fig.svg", ["--width", "7"], ["'7' is no width"]),
    ],
)
def test_files_and_widths_that_are_refused(
    saved: Path, tmp_path: Path, name: str, options: list[str], words: list[str]
) -> None:
    (tmp_path / name).write_text("old")
    assert_sentence(run("plot", saved / "sgd", "heatmap", "-o", tmp_path / name, *options), 2, *words)
    assert (tmp_path / name).read_text() == "old"


def test_a_place_that_cannot_be_written(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "fig.html").mkdir()
    said = assert_sentence(run("plot", saved / "sgd", "heatmap", "-o", tmp_path / "fig.html"), 2, "Is a directory")
    assert "Nothing there was changed" in said
    assert [path.name for path in tmp_path.iterdir()] == ["fig.html"]


def test_a_result_that_lacks_a_table(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "sgd", tmp_path / "half")
    (tmp_path / "half" / "tensors.parquet").unlink()
    assert_sentence(run("plot", tmp_path / "half", "heatmap", "-o", tmp_path / "fig.html"), 2, "no result of paramdiff")
    assert not (tmp_path / "fig.html").exists()


def test_without_a_file_to_write(saved: Path) -> None:
    done = run("plot", saved / "sgd", "heatmap")
    assert done.returncode == 2
    assert "--output" in done.stderr
    assert "Traceback" not in done.stderr


def test_names_with_escape_codes_do_not_reach_the_terminal(tmp_path: Path) -> None:
    name = "model.layers.0.\x1b[31mred\x07.weight"
    for file, value in (("a", 0.0), ("b", 1.0)):
        save_file({name: torch.full((4, 4), value)}, tmp_path / f"{file}.safetensors")
    paramdiff.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").save(tmp_path / "out")
    done = run("plot", tmp_path / "out", "heatmap", "-o", tmp_path / "fig.html")
    assert done.returncode == 0
    assert not CONTROL.search(done.stdout.rstrip("\n"))


@pytest.mark.parametrize("command", ["plot", "report"])
def test_help_has_examples(command: str) -> None:
    done = run(command, "--help", env=environment(COLUMNS="160"))
    assert (done.returncode, done.stderr) == (0, "")
    text = squeezed(done.stdout)
    assert text.count(f"paramdiff {command} ") >= 4
    assert "-o" in text


def test_the_examples_of_the_help_run(tmp_path: Path) -> None:
    """Those that need no browser, with the sample data under the names that they use."""
    for name, tuned in (("out", SGD), ("sgd", SGD), ("adamw", SAMPLE / "rl-adamw"), ("sft", SFT)):
        paramdiff.compare(BASE, tuned).save(tmp_path / name)
    text = run("plot", "--help", env=environment(COLUMNS="160")).stdout
    examples = [line.split()[1:] for line in text.splitlines() if re.match(r"\s*paramdiff plot ", line)]
    assert len(examples) >= 4
    for args in examples:
        args = [re.sub(r"\.(pdf|svg|png)$", ".html", arg) for arg in args]
        done = run(*args, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), args
