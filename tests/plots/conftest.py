"""Comparisons and optimizer states that several modules draw, each made once."""

from __future__ import annotations

import pytest

import paramdiff
from paramdiff import Diff, Moments
from tests.plots.helpers import BASE, SFT, SGD, STATES


@pytest.fixture(scope="session")
def sgd() -> Diff:
    return paramdiff.compare(BASE, SGD, measures=["change", "magnitude", "rows", "spectrum", "subspace"], ks=[4, 8])


@pytest.fixture(scope="session")
def sft() -> Diff:
    return paramdiff.compare(BASE, SFT, measures=["change", "magnitude", "rows", "spectrum"])


@pytest.fixture(scope="session")
def state() -> Moments:
    return paramdiff.adam(STATES / "checkpoint-200")


@pytest.fixture(scope="session")
def states() -> Moments:
    return paramdiff.adam(STATES / "checkpoint-199", STATES / "checkpoint-200")
