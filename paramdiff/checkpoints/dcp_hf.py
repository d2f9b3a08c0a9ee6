"""Sharded safetensors of torch.distributed.checkpoint: parts of tensors under one name in many files, with no index.

Every file says in its metadata, under DCP_SHARDING_INFO, at which offsets its parts begin. Read as ordinary safetensors,
such a file gives half a tensor without an error, which is why `safetensors` refuses it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from paramdiff.checkpoints.base import Located, TensorInfo
from paramdiff.checkpoints.files import Files
from paramdiff.checkpoints.pieces import Assembled, Piece, assemble
from paramdiff.checkpoints.places import place
from paramdiff.checkpoints.safetensors import SHARDING_INFO, read_header, refuse_key
from paramdiff.errors import BrokenFile

NUMBER = re.compile(r"shard-(\d+)-model-(\d+)-of-(\d+)\.safetensors")


def open(ref: str, located: Located, config: dict[str, Any] | None, key: str | None) -> Assembled:
    """Open all files of one sharded save together.

    A tensor is as large as its parts reach: the files do not say more, so that a missing last shard shows only in the shape.
    Raises `BrokenFile` where a shard is missing or parts do not fit together.
    """
    refuse_key(ref, key)
    where = located.directory if len(located.files) > 1 else located.files[0]
    _check_complete([place(path).name for path in located.files], str(place(located.files[0]).parent))
    files = Files()
    pieces: dict[str, list[Piece]] = {}
    types: dict[str, str] = {}
    try:
        for path in located.files:
            file = files.add(path)
            first, infos, metadata = read_header(files, file)
            offsets = _offsets(metadata, path)
            for info, start in infos:
                offset = offsets.get(info.name, (0,) * len(info.shape))
                if len(offset) != len(info.shape) or types.setdefault(info.name, info.dtype) != info.dtype:
                    raise BrokenFile(
                        f"The part of {info.name!r} in {path} ({info.dtype} {list(info.shape)} at {list(offset)}) does not "
                        "fit to those in other files."
                    )
                pieces.setdefault(info.name, []).append(Piece(file, first + start, offset, info.shape))
        entries = {}
        for name, parts in pieces.items():
            if len({len(part.shape) for part in parts}) > 1:
                raise BrokenFile(f"The parts of {name!r} in {where} have different numbers of dimensions.")
            ends = zip(*(map(sum, zip(p.offset, p.shape, strict=True)) for p in parts), strict=True)
            entries[name] = assemble(TensorInfo(name, types[name], tuple(max(end) for end in ends)), parts, where)
    except BaseException:
        files.close()
        raise
    return Assembled(ref, "dcp_hf", files, entries, config, located.warnings)


def _check_complete(names: list[str], where: str) -> None:
    """Raise `BrokenFile` where a number is left out. How many shards there were, no file says."""
    shards = {int(match[1]) for name in names if (match := NUMBER.fullmatch(name))}
    missing = next((number for number in range(1, max(shards, default=0)) if number not in shards), None)
    if missing is not None:
        raise BrokenFile(f"{where} lacks shard {missing} of at least {max(shards)}.", hint="Copy the directory again.")


def _offsets(metadata: dict[str, Any], path: str) -> dict[str, tuple[int, ...]]:
    try:
        listed = json.loads(metadata.get(SHARDING_INFO, "{}"))
        offsets = {name: tuple(of["saved_offsets"]) for name, of in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFile(f"{path} has a {SHARDING_INFO} that cannot be read.", hint="Copy it again.") from error
    for name, offset in offsets.items():
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in offset):
            raise BrokenFile(f"{path} gives {name!r} an offset that is none: {str(offset)[:80]}.")
    return offsets
