"""`paramdiff report` as a user runs it: from checkpoints and from saved results, what it writes and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest

import paramdiff

from .helpers import SAMPLE, assert_sentence, run
from .test_errors import CONTROL

pytestmark = pytest.mark.slow  # a page takes seconds, with all of its figures
BASE, SGD, ADAMW, SFT = (SAMPLE / name for name in ("base", "rl-sgd", "rl-adamw", "sft"))
STATE = SAMPLE / "checkpoints" / "rl-adamw" / "checkpoint-200"
FEW = ("--measures", "change,magnitude,rows")  # without spectra, whose figures take longest


def heading(page: str) -> str:
    found = re.search(r"<h1[^>]*>(.*?)</h1>", page, re.DOTALL)
    assert found is not None
    return found[1].strip()


def sections(page: str) -> list[str]:
    """The parts of a page, by the ids of their headings."""
    return re.findall(r"<h2 id=\"([\w-]+)\"", page)


def assert_complete(path: Path) -> str:
    """One file that fetches nothing. Returns its text."""
    page = path.read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert not re.search(r"<(script|img|iframe|link)\b[^>]*\b(src|href)\s*=\s*[\"']?https?:", page)
    assert not re.search(r"<script\b[^>]*\bsrc", page)
    assert len(page) > 3_000_000, "plotly.js is in it"
    return page


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    for name, tuned in (("sgd", SGD), ("sft", SFT)):
        paramdiff.compare(BASE, tuned).save(directory / name)
    paramdiff.adam(STATE).save(directory / "adam")
    return directory


def test_two_checkpoints(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    done = run("report", BASE, SGD, "-o", target, "--tol", "1e-5")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{re.escape(str(target))}: \d+\.\d MB, complete in itself; open it in a browser\n", done.stdout)
    page = assert_complete(target)
    assert "base → rl-sgd" in heading(page)
    assert {"summary", "overall", "heat", "spectra", "tensors", "provenance"} <= set(sections(page))
    assert f"{paramdiff.compare(BASE, SGD).summary()['changed']:,}" in page
    assert "1e-05" in page
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_quiet_and_another_title(tmp_path: Path) -> None:
    done = run("report", BASE, SGD, "-o", tmp_path / "r.htm", *FEW, "--quiet", "--title", "Mine <b>bold</b>")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = assert_complete(tmp_path / "r.htm")
    assert heading(page) == "Mine &lt;b&gt;bold&lt;/b&gt;"
    assert "spectra" not in sections(page)


def test_from_saved_results(saved: Path, tmp_path: Path) -> None:
    done = run("report", saved / "sgd", "-o", tmp_path / "r.html")
    assert (done.returncode, done.stderr) == (0, "")
    one = assert_complete(tmp_path / "r.html")
    assert heading(one) == "base → rl-sgd"
    done = run("report", saved / "sgd", saved / "sft", saved / "adam", "-o", tmp_path / "r.html")
    assert (done.returncode, done.stderr) == (0, "")
    page = assert_complete(tmp_path / "r.html")
    assert "rl-sgd" in heading(page)
    assert "sft" in heading(page)
    assert {"together", "adam"} <= set(sections(page)) - set(sections(one))


def test_several_tuned_with_out(tmp_path: Path) -> None:
    done = run("report", BASE, SGD, SFT, "-o", tmp_path / "r.html", "--out", tmp_path / "out", *FEW)
    assert (done.returncode, done.stderr) == (0, "")
    page = assert_complete(tmp_path / "r.html")
    assert "together" in sections(page)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rl-sgd", "sft"}
    for name, tuned in (("rl-sgd", SGD), ("sft", SFT)):
        kept = paramdiff.load(tmp_path / "out" / name)
        assert kept.run["tuned"]["ref"] == str(tuned)
        assert kept.tensors.select("name", "changed").equals(
            paramdiff.compare(BASE, tuned).tensors.select("name", "changed")
        )
    alone = run("report", BASE, SGD, "-o", tmp_path / "r.html", "--out", tmp_path / "alone", *FEW)
    assert alone.returncode == 0
    assert pl.read_parquet(tmp_path / "alone" / "tensors.parquet").height == 50


def test_results_of_several_runs_do_not_overwrite_each_other(tmp_path: Path) -> None:
    tuned = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "a_x"]
    for place, source in zip(tuned, (SGD, SFT, ADAMW), strict=True):
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(source)
    done = run("report", BASE, *tuned, "-o", tmp_path / "r.html", "--out", tmp_path / "out", "--measures", "change")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_results_stay_below_the_directory_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for file in SGD.iterdir():
        (tmp_path / "in" / file.name).symlink_to(file)
    place = tmp_path / "place"
    args = ("-o", tmp_path / "r.html", "--out", place / "out", "--measures", "change")
    done = run("report", BASE, "..", SFT, *args, cwd=tmp_path / "in" / "sub")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in place.iterdir()] == ["out"]


def test_with_optimizer_state(saved: Path, tmp_path: Path) -> None:
    for state in (STATE, saved / "adam"):
        done = run("report", BASE, SGD, "-o", tmp_path / "r.html", *FEW, "--adam", state)
        assert (done.returncode, done.stderr) == (0, "")
        assert "adam" in sections(assert_complete(tmp_path / "r.html"))
        (tmp_path / "r.html").unlink()


def test_a_saved_result_beside_a_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    for refs in ([saved / "sgd", SFT], [BASE, saved / "sgd"]):
        done = run("report", *refs, "-o", tmp_path / "r.html")
        assert_sentence(done, 2, "is a saved result, and", "a checkpoint", "BASE and TUNED, or saved results only")
    assert not list(tmp_path.iterdir())


def test_one_checkpoint_is_refused(tmp_path: Path) -> None:
    assert_sentence(run("report", BASE, "-o", tmp_path / "r.html"), 2, "nothing to compare", "BASE and TUNED")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["r.pdf", "r", "html", "r.html.gz", "\x1b[31mr"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    said = assert_sentence(run("report", BASE, SGD, "-o", name, cwd=tmp_path), 2, "a report is a page", ".html")
    assert not CONTROL.search(said)
    assert not list(tmp_path.iterdir())


def test_failures_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("old")
    cases = [
        ([BASE, tmp_path / "nowhere"], "nowhere"),
        ([BASE, SGD, "--measures", "mass"], "Unknown measure 'mass'"),
        ([BASE, SGD, "--include", "("], "("),
        ([BASE, SGD, *FEW, "--adam", BASE], "base"),
        ([BASE, SGD, *FEW, "--adam", tmp_path / "nowhere"], "nowhere"),
        ([BASE, SGD, "--device", "abacus"], "abacus"),
    ]
    for args, word in cases:
        assert_sentence(run("report", *args, "-o", tmp_path / "r.html"), 2, word)
        assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
        assert (tmp_path / "r.html").read_text() == "old"


def test_nothing_in_common(tmp_path: Path) -> None:
    done = run("report", BASE, SGD, "--include", "no such name", "-o", tmp_path / "r.html")
    assert_sentence(done, 3)
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "r.html").mkdir()
    assert_sentence(
        run("report", saved / "sgd", "-o", tmp_path / "r.html"), 2, "Is a directory", "Nothing there was changed"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert not list((tmp_path / "r.html").iterdir())


def test_without_a_page_to_write() -> None:
    done = run("report", BASE, SGD)
    assert done.returncode == 2
    assert "--output" in done.stderr
    assert "Traceback" not in done.stderr
