"""What a comparison would cost, from the headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

from paramdiff import checkpoints
from paramdiff.checkpoints.ranges import REQUEST
from paramdiff.machine import cores
from paramdiff.pairing import align
from paramdiff.streaming import BATCH, BLOCK, spans

SCRATCH = 24 * BLOCK * 8  # bytes of temporaries of one worker: two dozen float64 arrays of a block


def cost(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renames: Sequence[str] = (),
) -> dict[str, Any]:
    """Bytes of each side, requests (0 for local ones; a little more where neighbours are not), a bound on memory besides the
    libraries. No weight is read. Raises as `compare` does.

    >>> found = cost("sample_data/base", "sample_data/rl-sgd")
    >>> found["bytes"], found["base"]["requests"]
    (1339776, 0)
    """
    sides = checkpoints.open_pair(fspath(base), fspath(tuned))
    try:
        alignment = align(*sides, include=include, exclude=exclude, renames=renames)
        found: dict[str, Any] = {"tensors": len(alignment.tensors), "numel": sum(t.numel for t in alignment.tensors)}
        memory = cores() * SCRATCH
        for number, (name, checkpoint) in enumerate(zip(("base", "tuned"), alignment.checkpoints, strict=True)):
            read = [t for t in alignment.tensors if not (number and t.same_file)]
            nbytes = sum(t.numel * t.sides[number].bits_read // 8 for t in read)
            remote = not checkpoint.is_local
            memory += min(cores() * 2 * BATCH, nbytes) if remote else 0
            requests = -(-nbytes // REQUEST) if remote else 0
            found[name] = {"ref": sides[number].ref, "bytes": nbytes, "requests": requests}
        found["bytes"] = sum(span.nbytes for span in spans(alignment))
        found["same_file"] = sum(tensor.same_file for tensor in alignment.tensors)
        found["memory"] = memory
        found["warnings"] = [*sides[0].warnings, *sides[1].warnings]
        return found
    finally:
        for side in sides:
            side.close()
