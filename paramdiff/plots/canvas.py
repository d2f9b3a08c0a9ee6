"""A figure while it is drawn: plain data in plotly's terms.

`plotly.graph_objects` checks every value as it is set, which takes longer than all else here, and a report has hundreds of
figures. So they are put together as dictionaries, and checked once, when somebody wants a plotly figure.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    import plotly.graph_objects as go

P = ParamSpec("P")


class Canvas:
    """`data` and `layout` of a figure, with the few of plotly's ways to add to them that are used here."""

    def __init__(self, layout: dict[str, Any]) -> None:
        self.data: list[dict[str, Any]] = []
        self.layout = layout

    def add_scatter(self, **trace: Any) -> None:
        self.data.append({"type": "scatter", **trace})

    def add_heatmap(self, **trace: Any) -> None:
        self.data.append({"type": "heatmap", **trace})

    def add_annotation(self, **annotation: Any) -> None:
        self.layout.setdefault("annotations", []).append(annotation)

    def add_line(self, at: float, *, panel: str, **line: Any) -> None:
        """A horizontal line across a panel: "" for the first one, "2" for the second."""
        ends = {"x0": 0, "x1": 1, "xref": f"x{panel} domain", "y0": at, "y1": at, "yref": f"y{panel}"}
        self.layout.setdefault("shapes", []).append({"type": "line", **ends, "line": line})

    def update(self, **layout: Any) -> None:
        """Merge into the layout, dictionaries key by key."""
        _merge(self.layout, layout)

    def figure(self) -> go.Figure:
        """The plotly figure, in the one style."""
        import plotly.graph_objects as go

        from paramdiff.plots.style import TEMPLATE

        return go.Figure({"data": self.data, "layout": {**self.layout, "template": {"layout": TEMPLATE}}})


def _merge(into: dict[str, Any], what: dict[str, Any]) -> None:
    for key, value in what.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


def as_figure(draw: Callable[P, Canvas]) -> Callable[P, go.Figure]:
    """The same function, for those who want a plotly figure."""

    @wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> go.Figure:
        return draw(*args, **options).figure()

    drawn.__annotations__["return"] = "go.Figure"
    return drawn
