"""`paramdiff inspect`: what is in a checkpoint, from its headers alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paramdiff_cli import options, sink

if TYPE_CHECKING:
    from rich.table import Table

    from paramdiff.checkpoints import Checkpoint


def inspect(
    ref: Annotated[
        str, typer.Argument(help="A checkpoint: a directory or file, of any kind that trainers write.", metavar="REF")
    ],
    include: options.Include = None,
    json: options.Json = False,
) -> None:
    """What is in a checkpoint: tensors, shapes, types and sizes. Reads headers only, whatever the size.

    Examples:

        paramdiff inspect base/

        paramdiff inspect base/ --include lm_head --json
    """
    from paramdiff import checkpoints
    from paramdiff.pairing import name_filter

    checkpoint = checkpoints.open(ref)
    keep = name_filter(include or [], [])
    shown = [info for name, info in checkpoint.tensors.items() if keep(name)]
    sink.warn(checkpoint.warnings)
    if json:
        sink.print_json(_facts(checkpoint, shown))
    else:
        from paramdiff_cli import render

        console = sink.console()
        facts = _facts(checkpoint, shown)
        types = ", ".join(f"{count:,} in {dtype}" for dtype, count in facts["dtypes"].items())
        console.print(render.plain(f"{ref}: {facts['format']}, {len(facts['files'])} file(s)"), soft_wrap=True)
        console.print(f"{len(shown)} tensors, {facts['numel']:,} elements ({types}), {facts['bytes']:,} bytes of data")
        console.print(_table(shown))
    checkpoint.close()


def _facts(checkpoint: Checkpoint, shown: list[Any]) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for info in shown:
        dtypes[info.dtype] += info.numel
    return {
        **checkpoint.facts(),
        "tensors": [
            {"name": i.name, "dtype": i.dtype, "shape": list(i.shape), "numel": i.numel, "bytes": _bytes(i)}
            | ({"stored": i.stored} if i.stored else {})
            for i in shown
        ],
        "numel": sum(info.numel for info in shown),
        "bytes": sum(_bytes(info) for info in shown),
        "dtypes": dict(dtypes.most_common()),
        "warnings": checkpoint.warnings,
    }


def _bytes(info: Any) -> int:
    """What is stored of a tensor, without scales and the like."""
    return int(info.numel * info.bits_read + 7) // 8


def _table(shown: list[Any]) -> Table:
    from paramdiff_cli import render

    table = render.make_table(["tensor", "type", "shape", "elements", "bytes"], right_from=2)
    for info in shown:
        shape = " × ".join(map(str, info.shape)) or "scalar"
        table.add_row(
            render.plain(info.name),
            f"{info.dtype} ({info.stored})" if info.stored else info.dtype,
            shape,
            f"{info.numel:,}",
            f"{_bytes(info):,}",
        )
    return table
