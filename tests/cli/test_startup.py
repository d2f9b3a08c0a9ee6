"""What the command imports: nothing heavy for `--help`, no torch where the CPU does the work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import COMMAND, ROOT, SAMPLE, environment, sparse_pair

HEAVY = {"torch", "numpy", "polars", "plotly", "transformers", "pandas", "safetensors"}


def imported(*command: object) -> set[str]:
    """The top-level modules that `python COMMAND…` and its worker processes import."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *map(str, command)],
        capture_output=True, text=True, timeout=120, check=False, env=environment(PYTHONPROFILEIMPORTTIME="1"), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    names = re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)
    assert len(names) > 20
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["sparsity", "--help"], ["layers", "--help"], ["inspect", "--help"]]
)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    assert imported(COMMAND, *args) & HEAVY == set()


@pytest.mark.parametrize("command", ["sparsity", "layers"])
def test_comparing_on_the_cpu_imports_no_torch(command: str) -> None:
    found = imported(COMMAND, command, SAMPLE / "base", SAMPLE / "rl-sgd", "--tol", "1e-5", "--device", "cpu")
    assert found & {"torch", "plotly", "transformers"} == set()
    assert "polars" in found


def test_worker_processes_import_neither_torch_nor_polars(tmp_path: Path) -> None:
    done = subprocess.run(
        [COMMAND, "sparsity", *map(str, sparse_pair(tmp_path, 80 << 20)), "--threads", "2", "--quiet"],
        capture_output=True, text=True, timeout=120, check=False, env=environment(PYTHONPROFILEIMPORTTIME="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"\| +paramdiff\.engines\.worker$", done.stderr, re.MULTILINE)) == 2
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    assert len(re.findall(r"\| +polars$", done.stderr, re.MULTILINE)) == 1


def test_inspect_imports_neither_torch_nor_polars() -> None:
    assert imported(COMMAND, "inspect", SAMPLE / "base") & {"torch", "polars", "plotly"} == set()


def test_the_package_itself_imports_nothing_heavy() -> None:
    assert imported("-c", "import paramdiff; dir(paramdiff); paramdiff.__version__; import re, json") & HEAVY == set()


def test_the_compute_path_imports_neither_polars_nor_plotly() -> None:
    modules = (
        "collect",
        "checkpoints",
        "pairing",
        "streaming",
        "measures",
        "engines",
        "engines.threads",
        "engines.processes",
    )
    code = "; ".join(f"import paramdiff.{name}" for name in modules)
    assert imported("-c", code) & {"polars", "plotly", "torch"} == set()


def test_the_library_knows_nothing_of_the_command_line() -> None:
    found = imported("-c", "import paramdiff; paramdiff.compare, paramdiff.load, paramdiff.ParamdiffError")
    assert found & {"typer", "click", "rich", "paramdiff_cli"} == set()
