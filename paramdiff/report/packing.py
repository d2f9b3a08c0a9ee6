"""Data for the page: compact JSON, compressed, as text that HTML cannot break."""

from __future__ import annotations

import base64
import gzip
import json
import math
from typing import Any

import polars as pl

from paramdiff.plots.canvas import Canvas
from paramdiff.wording import printable, shortened

DIGITS = 6  # significant digits of a number in a table; counts are whole
LONGEST = 160  # characters of a name; a table is no place for more


def packed(data: Any) -> str:
    """JSON → gzip → base64. The page unpacks it when it is first needed. No byte of it depends on the time.

    >>> packed({"a": 1})[:8]
    'H4sIAAAA'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), 6, mtime=0)).decode()


def figure(canvas: Canvas) -> dict[str, Any]:
    """A figure as plain data; its style is on the page once."""
    return {"data": _plain(canvas.data), "layout": _plain(canvas.layout)}


def column(values: pl.Series) -> list[Any]:
    """A column as JSON can hold it: text cut to `LONGEST`, floats to `DIGITS`, what is not finite as text."""
    if values.dtype == pl.List:
        return ["×".join(str(n) for n in value) if value is not None else None for value in values.to_list()]
    if values.dtype == pl.String:
        return [None if value is None else shortened(printable(value), LONGEST) for value in values.to_list()]
    if values.dtype.is_float():
        return [_number(value) for value in values.to_list()]
    return values.to_list()


def _number(value: float | None) -> float | str | None:
    if value is None:
        return None
    if not math.isfinite(value):
        return str(value)
    short = float(f"{value:.{DIGITS}g}")
    return round(value, 12) if 0.99 < value < 1 or short == 1 != value else short  # a share that is not quite all


def _plain(value: Any) -> Any:
    """Figures hold tuples and numpy arrays by turns; NaN, which JSON lacks, is a gap there."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
