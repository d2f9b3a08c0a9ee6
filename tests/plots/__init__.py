"""Tests of figures: what they draw, and how they become files."""

import pytest

pytest.register_assert_rewrite("tests.plots.helpers")
