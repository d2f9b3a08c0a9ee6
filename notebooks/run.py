"""Run the notebooks, each in a clean kernel, and write their outputs back; or check that the committed outputs still hold.

    python notebooks/run.py                     # all of them
    python notebooks/run.py 01_first_look       # one
    python notebooks/run.py --check             # write nothing; exit with 1 at the first difference in text

Pictures are drawn by kaleido with Chromium. Where there is none, and with --check, figures stay without.
"""

# ruff: noqa: T201 - a script, which prints
from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CELL_SECONDS = 300
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, SHARPNESS = 680, 1.5  # of a picture: CSS pixels, and pixels to each of them
ANSI = re.compile(r"\x1b\[[0-9;]*m")  # colours of a traceback
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 1 where a cell failed or (with --check) a text differs."""
    parser = argparse.ArgumentParser(description="Run the notebooks and write their outputs back.")
    parser.add_argument("--check", action="store_true", help="write nothing; compare texts with the committed ones")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of notebooks, with or without .ipynb; all by default")
    options = parser.parse_args(arguments)
    found = {path.stem: path for path in notebooks()}
    names = [Path(name).name.removesuffix(".ipynb") for name in options.names] or list(found)
    unknown = [name for name in names if name not in found]
    if unknown:
        parser.error(f"there is no notebook {unknown[0]!r}; there are {', '.join(found)}")
    if not options.check and not has_browser():
        print("no Chromium here: figures that changed get no picture", file=sys.stderr)
    failed = False
    for name in names:
        wrong = check(found[name]) if options.check else write(found[name])
        print(f"{name}: {wrong or ('as committed' if options.check else 'written')}")
        failed = failed or wrong is not None
    return int(failed)


def notebooks() -> list[Path]:
    """All notebooks, in order."""
    return sorted(HERE.glob("*.ipynb"))


def write(path: Path) -> str | None:
    """Run one notebook and write its outputs back. Returns what went wrong, and then writes nothing."""
    committed = read(path)
    fresh, wrong = executed(committed, pictures=has_browser())
    if wrong is not None:
        return wrong
    keep_pictures(committed, fresh)
    aside = path.with_suffix(".tmp")
    aside.write_text(nbformat.writes(fresh) + "\n", encoding="utf-8")
    aside.replace(path)
    return None


def check(path: Path) -> str | None:
    """Run one notebook in memory. Returns the first error, or the first difference from the committed texts."""
    committed = read(path)
    fresh, wrong = executed(committed, pictures=False)
    return wrong if wrong is not None else difference(committed, fresh)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def has_browser() -> bool:
    """Whether kaleido will find something to draw with."""
    return "BROWSER_PATH" in os.environ or any(shutil.which(name) for name in BROWSERS)


def executed(notebook: NotebookNode, *, pictures: bool) -> tuple[NotebookNode, str | None]:
    """A tidy copy of a notebook with the outputs of a clean kernel in the project's root, and what went wrong."""
    fresh = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory() as scratch:
        client = NotebookClient(
            fresh,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(ROOT)}},
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=[
                "--IPKernelApp.log_level=ERROR",
                "--HistoryManager.enabled=False",
                "--IPKernelApp.exec_lines=import plotly.io",
                f"--IPKernelApp.exec_lines=plotly.io.renderers['png'].width = {WIDTH}",
                f"--IPKernelApp.exec_lines=plotly.io.renderers['png'].scale = {SHARPNESS}",
                "--IPKernelApp.exec_lines=del plotly",
            ],
        )
        try:
            client.execute(env=environment(scratch, pictures=pictures))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            return fresh, ANSI.sub("", f"{type(error).__name__}: {error}")
    tidy(fresh)
    return fresh, None


def environment(scratch: str, *, pictures: bool) -> dict[str, str]:
    """What the kernel sees: nothing of the user's IPython, of a terminal, or of a Hub and its cache."""
    return {
        **os.environ,
        "PLOTLY_RENDERER": "plotly_mimetype" + ("+png" if pictures else ""),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": f"{scratch}/hub",
        "IPYTHONDIR": f"{scratch}/ipython",
        "POLARS_TABLE_WIDTH": "100",
        "PYTHONWARNINGS": "ignore:IProgress not found",  # of tqdm, which huggingface_hub brings, without ipywidgets
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # a warning of the debugger that ipykernel brings
    }


def tidy(notebook: NotebookNode) -> None:
    """Leave nothing in a notebook that differs from run to run or from machine to machine."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = NotebookNode()


def keep_pictures(committed: NotebookNode, fresh: NotebookNode) -> None:
    """Where a figure is the one that was committed, keep its picture: another browser would draw other bytes."""
    before = {cell.id: cell.get("outputs", ()) for cell in committed.cells}
    for cell in fresh.cells:
        for old, new in zip(before.get(cell.id, ()), cell.get("outputs", ()), strict=False):
            old_data, data = old.get("data", {}), new.get("data", {})
            if FIGURE in data and PICTURE in old_data and old_data.get(FIGURE) == data[FIGURE]:
                data[PICTURE] = old_data[PICTURE]


def difference(committed: NotebookNode, fresh: NotebookNode) -> str | None:
    """The first text in which the outputs of two runs of one notebook differ, or None."""
    for number, (old, new) in enumerate(zip(committed.cells, fresh.cells, strict=True), start=1):
        if old.cell_type != "code":
            continue
        before, now = texts(old), texts(new)
        for index in range(max(len(before), len(now))):
            was, found = (list_[index] if index < len(list_) else ("nothing", "") for list_ in (before, now))
            if was != found:
                return f"cell {number} ({old.id}) differs.\n{_told('committed', was)}\n{_told('now', found)}"
    return None


def texts(cell: NotebookNode) -> list[tuple[str, str]]:
    """What a cell says in text: (kind, text) of each output. A figure says its title and its text alternative."""
    found: list[tuple[str, str]] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found.append((str(output.name), _joined(output.text)))
        elif output.output_type == "error":
            found.append(("error", f"{output.ename}: {output.evalue}"))
        else:
            data = output.data
            found += [(kind, _joined(data[kind])) for kind in ("text/plain", "text/html") if kind in data]
            if FIGURE in data:
                layout = data[FIGURE]["layout"]
                found.append(("figure", f"{layout['title']['text']}\n{layout.get('meta', {}).get('alt', '')}"))
    return found


def _joined(text: Any) -> str:
    """The text of an output, which a file may hold line by line."""
    return text if isinstance(text, str) else "".join(text)


def _told(when: str, said: tuple[str, str]) -> str:
    kind, text = said
    return f"--- {when}, {kind}:\n{text if len(text) <= 2000 else text[:2000] + '…'}"


if __name__ == "__main__":
    sys.exit(main())
