"""Rank files of verl and SkyRL: `model_world_size_W_rank_R.pt`, in each what one process of FSDP held of every tensor.

The values are DTensors (FSDP2, FSDP1 with a device mesh), ShardedTensors (FSDP1 without) or plain tensors (one process, or
the same on all). Where a local part belongs follows from the *coordinates* of its rank in the device mesh: along a dimension
that is sharded, parts follow one another in the order of the coordinates. The sizes are those of the files, so that no
rule of rounding is needed; that they fill the global shape exactly is checked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paramdiff.checkpoints import pickles
from paramdiff.checkpoints.base import Located, TensorInfo
from paramdiff.checkpoints.files import Files
from paramdiff.checkpoints.pickles import Opaque, StoredTensor
from paramdiff.checkpoints.pieces import Assembled, Entry, Piece, assemble
from paramdiff.checkpoints.places import place
from paramdiff.checkpoints.torch_file import Storages, entry_of, read_file
from paramdiff.errors import BrokenFile, UnsupportedFormat


@dataclass(frozen=True, slots=True)
class Local:
    """The part of one tensor that one rank holds.

    `shape` is the whole tensor's. A ShardedTensor gives its `offset`; a DTensor its coordinates and, for each mesh
    dimension, the tensor's dimension that is sharded over it, or None where ranks hold the same.
    """

    rank: int
    piece: Piece
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...] | None = None
    coordinates: tuple[int, ...] = ()
    sharded: tuple[int | None, ...] = ()


def open(ref: str, located: Located, config: dict[str, Any] | None, key: str | None) -> Assembled:
    """Open the files of all ranks, which are located in the order of ranks.

    Raises `BrokenFile` where parts are missing or do not fit, `UnsupportedFormat` for ways of sharding that are not read.
    """
    if key:
        raise UnsupportedFormat(f"{ref} names an entry, which rank files have not.", hint=f"Give {ref.partition('::')[0]}.")
    where = str(place(located.files[0]).parent)
    files = Files()
    found: dict[str, list[Local]] = {}
    aside: dict[str, None] = {}
    try:
        for rank, path in enumerate(located.files):
            file = files.add(path)
            content, storages = read_file(files, file)
            if not isinstance(content, Mapping):
                raise BrokenFile(f"{path} holds no tensors by name.", hint="Is it the optimizer's file?")
            for name, value in content.items():
                parts = parts_of(name, value, rank, file, storages, path) if isinstance(name, str) else None
                if parts is None:
                    aside[repr(name)[:80]] = None
                else:
                    found.setdefault(str(name), []).extend(parts)
        entries = {name: entry(name, parts, where) for name, parts in found.items()}
    except BaseException:
        files.close()
        raise
    warnings = [*located.warnings]
    if aside:
        more = f" and {len(aside) - 4} more" if len(aside) > 4 else ""
        warnings.append(f"{where}: {', '.join([*aside][:4])}{more} ignored; not tensors by name.")
    if not entries:
        files.close()
        raise BrokenFile(f"{where} holds rank files without a tensor.")
    return Assembled(ref, "ranks", files, entries, config, warnings)


def parts_of(name: str, value: Any, rank: int, file: int, storages: Storages, path: str) -> list[Local] | None:
    """The parts that a file holds of one tensor; None for what is no tensor."""
    if isinstance(value, StoredTensor):
        piece, dtype = _piece(name, value, file, storages, path)
        return [Local(rank, piece, dtype, value.shape, offset=(0,) * len(value.shape))]
    if not (isinstance(value, Opaque) and value.holds_tensor):
        return None
    try:
        kind = value.kind.rpartition(".")[2]
        if kind == "DTensor":
            return [_of_dtensor(name, value, rank, file, storages, path)]
        if kind == "ShardedTensor":
            return _of_sharded(name, value, rank, file, storages, path)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise BrokenFile(
            f"{path} describes the part of {name!r} in an unknown way ({type(error).__name__}: {str(error)[:80]})."
        ) from error
    raise UnsupportedFormat(
        f"{path} holds {name!r} as a {kind}, which this version does not read.",
        hint="Export the model as safetensors first.",
    )


def _piece(name: str, tensor: StoredTensor, file: int, storages: Storages, path: str) -> tuple[Piece, str]:
    entry = entry_of(name, tensor, file, storages, path)
    if entry.stride is not None:
        raise UnsupportedFormat(f"The part of {name!r} in {path} is not contiguous.", hint="Save it with .contiguous().")
    return Piece(file, entry.start, (0,) * len(tensor.shape), tensor.shape), entry.info.dtype


def _of_dtensor(name: str, value: Opaque, rank: int, file: int, storages: Storages, path: str) -> Local:
    state = pickles.attributes(value)
    spec, local = pickles.attributes(state["_spec"]), state["_local_tensor"]
    if not isinstance(local, StoredTensor):
        raise UnsupportedFormat(f"{path} holds the part of {name!r} as {getattr(local, 'kind', 'no plain tensor')}.")
    meta = spec["tensor_meta"]
    shape = pickles.sizes(meta.args[0] if meta.args else pickles.attributes(meta)["shape"])
    sharded: list[int | None] = []
    for placement in spec["placements"]:
        kind = placement.kind.rpartition(".")[2]
        if kind == "Replicate":
            sharded.append(None)
        elif kind == "Shard":
            sharded.append(int(pickles.attributes(placement)["dim"]) % max(len(shape), 1))
        else:
            raise UnsupportedFormat(
                f"{path} holds {name!r} with the placement {kind}, which this version does not put together.",
                hint="Save a full state dict, or export the model as safetensors, first.",
            )
    coordinates = _coordinates(pickles.attributes(spec["mesh"]), rank, len(sharded))
    piece, dtype = _piece(name, local, file, storages, path)
    if local.shape and len(local.shape) != len(shape) and 0 not in local.shape:
        raise ValueError(f"a part of {list(local.shape)} of a tensor of {list(shape)}")
    return Local(rank, piece, dtype, shape, coordinates=coordinates, sharded=tuple(sharded))


def _coordinates(mesh: Mapping[str, Any], rank: int, dimensions: int) -> tuple[int, ...]:
    """Where a rank stands in the device mesh: as the mesh says, else by counting through the mesh's shape."""
    said = mesh.get("_coordinate_on_dim")
    if isinstance(said, (tuple, list)) and len(said) == dimensions and all(map(pickles.is_whole, said)):
        return tuple(said)
    stored = mesh.get("mesh")
    extent = [*stored.shape] if isinstance(stored, StoredTensor) else []
    if len(extent) != dimensions:
        if dimensions != 1:
            raise ValueError("a device mesh without a shape")
        return (rank,)
    if not math.prod(extent):
        raise ValueError("an empty device mesh")
    left, coordinates = rank % math.prod(extent), []
    for size in reversed(extent):
        left, at = divmod(left, size)
        coordinates.append(at)
    return tuple(reversed(coordinates))


def _of_sharded(name: str, value: Opaque, rank: int, file: int, storages: Storages, path: str) -> list[Local]:
    shards, metadata = value.state[0], pickles.attributes(value.state[1])
    shape = pickles.sizes(metadata["size"])
    found = []
    for shard in shards:
        held = pickles.attributes(shard)
        place = pickles.attributes(held["metadata"])
        offset, size, local = pickles.sizes(place["shard_offsets"]), pickles.sizes(place["shard_sizes"]), held["tensor"]
        if not isinstance(local, StoredTensor) or local.shape != size:
            raise ValueError(f"a shard that should be {list(size)}")
        piece, dtype = _piece(name, local, file, storages, path)
        found.append(Local(rank, piece, dtype, shape, offset=offset))
    return found


def entry(name: str, parts: Sequence[Local], where: str) -> Entry:
    first = parts[0]
    odd = next((p for p in parts if (p.dtype, p.shape, p.sharded) != (first.dtype, first.shape, first.sharded)), None)
    if odd is not None:
        raise BrokenFile(
            f"{where}: rank {odd.rank} holds {name!r} as {odd.dtype} of {list(odd.shape)}, rank {first.rank} as "
            f"{first.dtype} of {list(first.shape)}, or cut in another way."
        )
    if first.offset is not None:
        pieces = [Piece(p.piece.file, p.piece.start, p.offset or (), p.piece.shape) for p in parts]
    else:
        pieces = _placed(name, parts, where)
    return assemble(TensorInfo(name, first.dtype, first.shape), pieces, where)


def _placed(name: str, parts: Sequence[Local], where: str) -> list[Piece]:
    """The parts of a DTensor as boxes of it. Ranks that differ only where they hold the same give the same box."""
    shape, sharded = parts[0].shape, parts[0].sharded
    offsets: list[dict[tuple[int, ...], int]] = []
    for dimension, full in enumerate(shape):
        over = [axis for axis, cut in enumerate(sharded) if cut == dimension]
        sizes: dict[tuple[int, ...], int] = {}
        for part in parts:
            size = _size(part, dimension)
            at = tuple(part.coordinates[axis] for axis in over)
            if sizes.setdefault(at, size) != size:
                raise BrokenFile(f"{where}: ranks disagree on how {name!r} is cut along dimension {dimension}.")
        if sum(sizes.values()) != full:
            raise BrokenFile(
                f"{where}: the parts of {name!r} fill {sum(sizes.values()):,} of {full:,} along dimension {dimension}.",
                hint="Copy the files of all ranks again.",
            )
        order = sorted(sizes)
        begins = itertools.accumulate((sizes[at] for at in order), initial=0)
        offsets.append(dict(zip(order, begins, strict=False)))
    boxes = []
    for part in parts:
        where_to = tuple(
            offsets[dimension][tuple(c for c, cut in zip(part.coordinates, sharded, strict=True) if cut == dimension)]
            for dimension in range(len(shape))
        )
        extent = tuple(_size(part, dimension) for dimension in range(len(shape)))
        boxes.append(Piece(part.piece.file, part.piece.start, where_to, extent))
    return boxes


def _size(part: Local, dimension: int) -> int:
    """The extent of a part; an empty one may have lost its other dimensions, which are then those of the tensor."""
    if len(part.piece.shape) == len(part.shape):
        return part.piece.shape[dimension]
    return 0 if dimension in part.sharded else part.shape[dimension]
