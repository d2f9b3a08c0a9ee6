"""Settings for all tests: no example has a time limit, and CI tries the same examples each time."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # no test asks the real Hub; those that need one start their own
settings.register_profile("paramdiff", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("paramdiff")
