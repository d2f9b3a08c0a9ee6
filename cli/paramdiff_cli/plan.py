"""`paramdiff plan`: what a comparison would cost, from the headers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from paramdiff_cli import options, sink

RATES = (50e6, 200e6, 1e9)  # bytes per second for which the time is given


def plan(
    base: options.Base,
    tuned: options.Tuned,
    rate: Annotated[float | None, typer.Option("--rate", min=0.001, help="Megabytes per second to reckon with.")] = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    renames: options.Map = None,
    json: options.Json = False,
) -> None:
    """What would a comparison cost? Bytes, requests, memory and time to expect, from the headers alone.

    Examples:

        paramdiff plan allenai/Llama-3.1-Tulu-3-8B-SFT allenai/Llama-3.1-Tulu-3-8B-DPO

        paramdiff plan base/ tuned/ --include 'layers.0.' --rate 100
    """
    from paramdiff.planning import cost

    found = cost(base, tuned, include=include or [], exclude=exclude or [], renames=renames or [])
    rates = [rate * 1e6] if rate else list(RATES)
    times = [{"bytes_per_second": r, "seconds": found["bytes"] / r} for r in rates]
    sink.warn(found["warnings"])
    if json:
        sink.print_json(found | {"times": times})
        return
    from paramdiff_cli import render

    console = sink.console()
    for side in ("base", "tuned"):
        one: dict[str, Any] = found[side]
        where = f"{one['requests']:,} requests" if one["requests"] else "local"
        console.print(render.plain(f"{side.ljust(5)}  {one['ref']}: {one['bytes'] / 1e6:,.1f} MB, {where}"), soft_wrap=True)
    console.print(f"{found['numel']:,} parameters in {found['tensors']} tensors; {found['bytes'] / 1e6:,.1f} MB to read")
    if found["same_file"]:
        console.print(f"{found['same_file']} tensors lie in files of the same hash on both sides: read once")
    console.print(f"memory: at most about {found['memory'] / 1e6:,.0f} MB besides the libraries")
    said = " · ".join(f"{_time(one['seconds'])} at {one['bytes_per_second'] / 1e6:g} MB/s" for one in times)
    console.print(f"time: {said}")


def _time(seconds: float) -> str:
    """Seconds as people say them.

    >>> _time(0.2), _time(75), _time(4000)
    ('under a second', '1 min 15 s', '1 h 6 min')
    """
    if seconds < 1:
        return "under a second"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
