"""One browser and two reports of the sample checkpoints for all tests of the page, and reports of made-up ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import paramdiff
from tests.helpers import model_dir
from tests.report import RUNS, SAMPLES
from tests.report.browser import launched
from tests.report.helpers import ALL, STATES, Build

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Closed when a worker leaves this folder: while playwright is open, no other test can run an event loop."""
    with launched() as found:
        yield found


@pytest.fixture(scope="session")
def samples() -> dict[str, paramdiff.Diff]:
    """Each run against the base."""
    return {run: paramdiff.compare(SAMPLES / "base", SAMPLES / run, measures=ALL, ks=[4], tolerances=[1e-5]) for run in RUNS}


@pytest.fixture(scope="session")
def one(samples: dict[str, paramdiff.Diff], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run."""
    path = tmp_path_factory.mktemp("one") / "report.html"
    paramdiff.write_report(path, samples["rl-sgd"])
    return path


@pytest.fixture(scope="session")
def many(samples: dict[str, paramdiff.Diff], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three runs and two optimizer states."""
    path = tmp_path_factory.mktemp("many") / "report.html"
    paramdiff.write_report(path, [*samples.values(), paramdiff.adam(*STATES)])
    return path


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Compare two made-up checkpoints and write their report."""

    def made(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], **options: Any) -> Path:
        options = {"measures": ALL, "ks": [2], **options}
        found = paramdiff.compare(model_dir(tmp_path / "base", base), model_dir(tmp_path / "tuned", tuned), **options)
        paramdiff.write_report(tmp_path / "report.html", found)
        return tmp_path / "report.html"

    return made
