"""Where output goes: data to stdout, progress and warnings to stderr, nothing at all when quiet."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from paramdiff import wording

if TYPE_CHECKING:
    from rich.console import Console

    from paramdiff import Diff, Moments


WIDTH = 160  # where the output is no terminal


def console(stderr: bool = False) -> Console:
    """A rich console, as wide as the terminal. A closed pipe is an exception, not an exit."""
    from rich.console import Console

    class Quitting(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    stream = sys.stderr if stderr else sys.stdout
    return Quitting(stderr=stderr, highlight=False, width=None if stream.isatty() else WIDTH)


def print_json(data: Any) -> None:
    """One JSON object on stdout. Numbers that JSON lacks (infinity, NaN) become null."""
    print(json.dumps(_plain(data), allow_nan=False))


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not abs(data) < float("inf") else data


def warn(sentences: list[str]) -> None:
    for sentence in sentences:
        print(f"paramdiff: warning: {wording.printable(sentence)}", file=sys.stderr)


def ranks(diff: Diff) -> dict[str, Any]:
    """What `--json` says of ranks: pooled over everything, by module, by layer, and every matrix."""
    return {
        "ranks": diff.ranks_by().row(0, named=True),
        "ranks_by_module": diff.ranks_by("module").to_dicts(),
        "ranks_by_layer": diff.ranks_by("layer").to_dicts(),
        "ranks_by_matrix": diff.ranks.to_dicts(),
    }


def subspaces(diff: Diff) -> dict[str, Any]:
    """What `--json` says of subspaces: by k, and by module and layer as well, and every matrix."""
    return {
        "subspaces": diff.subspaces_by().to_dicts(),
        "subspaces_by_module": diff.subspaces_by("module").to_dicts(),
        "subspaces_by_layer": diff.subspaces_by("layer").to_dicts(),
        "subspaces_by_matrix": diff.subspaces.to_dicts(),
    }


def moments(found: Moments) -> dict[str, Any]:
    """What `--json` says of optimizer state: by module, by layer and by parameter; of two checkpoints, with ratios."""
    told: dict[str, Any] = {}
    for key, name in (("module", "by_module"), ("layer", "by_layer")):
        told[name] = {side: found.by(key, side=side).to_dicts() for side in found.sides}
        if len(found.sides) == 2:
            told[name]["ratios"] = found.ratios(key).to_dicts()
    return told | {"by_parameter": found.parameters.to_dicts()}


@contextmanager
def progress_bar(quiet: bool, doing: str = "comparing") -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes, rate and time left on stderr; None where nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def compared(base: str, tuned: str, *, quiet: bool, out: str | None, download: bool = False, **options: Any) -> Diff:
    """Compare as the options say, with progress and warnings, and save where asked to."""
    import paramdiff

    if download:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        from paramdiff.checkpoints import places

        if quiet or not sys.stderr.isatty():
            disable_progress_bars()
        for ref in (base, tuned):
            places.download(ref)
    with progress_bar(quiet) as progress:
        diff = paramdiff.compare(base, tuned, progress=progress, **options)
    if not quiet:
        warn(diff.run["warnings"])
    if out is not None:
        diff.save(out)
    return diff
