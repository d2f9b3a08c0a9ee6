"""The notebooks: what is committed is presentable, and running them again gives the same texts."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"
DRAWS = re.compile(r"\bplots\.(heatmap|layers|histogram|spectrum|stripes|adam)\(|\.plot\(|^fig$|^dots\(", re.MULTILINE)
MACHINE = re.compile(r"(?<![\w.:/])/(home|root|Users|tmp|private|work|mnt|opt|usr|var)/")  # where absolute paths begin

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def run() -> ModuleType:
    """notebooks/run.py, which is no package."""
    return imported("notebooks_run", ROOT / "notebooks" / "run.py")


def imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def data(cell: Any) -> Iterator[dict[str, Any]]:
    """What a cell shows: the data of each of its outputs."""
    return (output.data for output in cell.outputs if "data" in output)


def strings(value: Any) -> Iterator[str]:
    """Every string in an output but pictures."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(inner) if key != PICTURE else ()
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@each
def test_what_is_committed_was_run_in_order_without_an_error(path: Path) -> None:
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    kinds = [output.get("name", output.output_type) for cell in cells for output in cell.outputs]
    assert not {"error", "stderr"} & set(kinds)


@each
def test_every_figure_has_a_picture(path: Path) -> None:
    drawing = [cell for cell in code_cells(path) if DRAWS.search(cell.source)]
    assert drawing
    for cell in drawing:
        assert any(FIGURE in one and PICTURE in one for one in data(cell)), cell.id
    for cell in code_cells(path):
        assert all(PICTURE in one for one in data(cell) if FIGURE in one), cell.id


@each
def test_notebooks_are_small_and_name_no_path_of_a_machine(path: Path) -> None:
    assert path.stat().st_size < 1_500_000
    for cell in code_cells(path):
        for output in cell.outputs:
            assert len(json.dumps(output)) < 300_000, cell.id
            said = "\n".join(strings(output))
            assert not MACHINE.search(said), cell.id
            assert str(ROOT) not in said, cell.id
            assert sys.prefix not in said, cell.id


@each
def test_nothing_in_a_notebook_chooses_how_figures_are_shown(path: Path) -> None:
    source = "\n".join(cell.source for cell in code_cells(path))
    assert "renderer" not in source
    assert "seconds" not in source


@pytest.mark.slow
@each
def test_running_it_again_gives_the_same_texts(run: ModuleType, path: Path) -> None:
    assert run.check(path) is None


def test_a_difference_is_told(run: ModuleType) -> None:
    def notebook(text: str) -> Any:
        cell = nbformat.v4.new_code_cell("print(x)", id="one", execution_count=1)
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# x", id="zero"), cell])

    assert run.difference(notebook("1\n"), notebook("1\n")) is None
    told = run.difference(notebook("1\n"), notebook("2\n"))
    assert told == "cell 2 (one) differs.\n--- committed, stdout:\n1\n\n--- now, stdout:\n2\n"


def test_an_unchanged_figure_keeps_its_picture(run: ModuleType) -> None:
    def notebook(title: str, picture: str) -> Any:
        cell = nbformat.v4.new_code_cell("fig", id="one")
        shown = {FIGURE: {"layout": {"title": {"text": title}}}, PICTURE: picture}
        cell.outputs = [nbformat.v4.new_output("display_data", data=shown)]
        return nbformat.v4.new_notebook(cells=[cell])

    same, other = notebook("a", "new"), notebook("b", "new")
    for fresh in (same, other):
        run.keep_pictures(notebook("a", "old"), fresh)
    assert [fresh.cells[0].outputs[0].data[PICTURE] for fresh in (same, other)] == ["old", "new"]


def test_an_unknown_notebook_is_refused(run: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--check", "05_none"])
    assert "there is no notebook '05_none'" in capsys.readouterr().err


def test_the_measure_of_the_notebook_runs_in_worker_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it says: put into a file, it travels, and parts of a tensor merge."""
    from paramdiff import checkpoints
    from paramdiff.engines import processes, threads
    from paramdiff.measures import make_options, merge
    from paramdiff.pairing import align
    from paramdiff.streaming import spans

    source = next(cell.source for cell in code_cells(NOTEBOOKS[3]) if "class AwayFromZero" in cell.source)
    (tmp_path / "away_from_zero.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    measure = importlib.import_module("away_from_zero").AwayFromZero()
    with ExitStack() as stack:
        base, tuned = (checkpoints.open(str(ROOT / "sample_data" / name)) for name in ("base", "rl-sgd"))
        for side in (base, tuned):
            stack.callback(side.close)
        alignment, options = align(base, tuned), make_options((), None)
        counts = []
        for engine, block in ((processes.run, 1024), (threads.run, 1 << 18)):
            found: dict[int, Any] = {}
            work = spans(alignment, block, span_bytes=1)  # each block on its own
            for span, result in engine(alignment, work, [measure], options, block=block):
                merge(found.setdefault(span.tensor, {}), result)
            counts.append({index: dict(one["away_from_zero"].counts) for index, one in found.items()})
    assert counts[0] == counts[1]
    assert sum(one.get("grew", 0) for one in counts[0].values()) == 52105
