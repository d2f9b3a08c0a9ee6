"""PyTorch Distributed Checkpoints (DCP): `.metadata` says which tensors there are, in which parts and where.

`.metadata` is a pickle, and every part a file of torch.save of its own, at some offset; both are read by `pickles`, which
executes nothing. The layout is that of torch.distributed.checkpoint.metadata and .filesystem. Trainers put the model under
keys of their own (`model.…`, `app.model.…`, `dcp.model.…`, or none): the *path* that the planner recorded for each tensor
tells the parameter's name from what it was put under.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import fspath
from pathlib import Path
from typing import Any

from paramdiff.checkpoints import pickles
from paramdiff.checkpoints.base import Located, TensorInfo, check_name
from paramdiff.checkpoints.files import Files
from paramdiff.checkpoints.pickles import Opaque, StoredTensor
from paramdiff.checkpoints.pieces import Assembled, Entry, Piece, assemble
from paramdiff.checkpoints.places import place, read_small
from paramdiff.checkpoints.torch_file import NESTS, NOT_WEIGHTS, Storages, entry_of, read_archive
from paramdiff.dtypes import DTYPES
from paramdiff.errors import BrokenFile, UnsupportedFormat

OPTIMIZER_STATE = {  # what optimizers keep for each parameter, by torch's names and those of its relatives
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum",
    "exp_inf", "state1", "state2", "exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "variance", "mu_product",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """What `.metadata` says of one tensor: type, shape, (offset, shape) of its parts; its `path` in what was saved."""

    key: str
    path: tuple[str, ...]
    info: TensorInfo
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """Where the file of one part lies."""

    name: str
    offset: int
    length: int


def open(ref: str, located: Located, config: dict[str, Any] | None, key: str | None) -> Assembled:
    """Open the checkpoint whose `.metadata` is the one file located.

    Optimizer state is left aside. Where tensors lie under several keys, those under `model`, `state_dict` and the like are
    taken, or the ones under `key` (`dir::ema`, `dir::app/model`).

    Raises `BrokenFile`, or `UnsupportedFormat` for compressed parts and types that are not read.
    """
    where = str(place(located.files[0]).parent)
    metadata = read_metadata(located.files[0])
    chosen, said = _weights(metadata.tensors, where, key)
    files = Files()
    try:
        parts = Parts(metadata, files, where)
        entries = {name: parts.entry(name, one) for name, one in chosen.items()}
    except BaseException:
        files.close()
        raise
    return Assembled(ref, "dcp", files, entries, config, [*located.warnings, *said])


@dataclass(frozen=True)
class Metadata:
    """What `.metadata` says: tensors, other values by the path of each in what was saved, and where their parts lie."""

    tensors: list[Stored]
    values: dict[str, tuple[Any, ...]]
    records: Mapping[tuple[str, tuple[int, ...] | None], Record]


def read_metadata(path: str) -> Metadata:
    """Read a file `.metadata`. Raises `BrokenFile` or `UnsupportedFormat`."""
    try:
        data = read_small(place(path), pickles.MAX_BYTES)
        metadata = pickles.attributes(pickles.load(data), "Metadata")
        planned = metadata.get("planner_data")
        paths = planned if isinstance(planned, Mapping) else {}
        everything = metadata["state_dict_metadata"].items()
        stored = [_stored(key, value, paths.get(key)) for key, value in everything if _is_tensor(value)]
        values = {str(key): _path(key, paths.get(key)) for key, value in everything if not _is_tensor(value)}
        return Metadata(stored, values, _records(metadata["storage_data"]))
    except OSError as error:
        raise BrokenFile(f"Cannot read {path}: {error.strerror}.") from error
    except (pickles.Refused, pickles.Unsupported) as error:
        raise UnsupportedFormat(f"{path} is not read: {error}.", hint="Export the model as safetensors first.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BrokenFile(
            f"{path} is damaged or no metadata of torch.distributed.checkpoint: {str(error)[:200] or type(error).__name__}.",
            hint="Copy the checkpoint again.",
        ) from error


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Opaque) and value.kind.endswith("TensorStorageMetadata")


def _stored(key: Any, value: Any, path: Any) -> Stored:
    if not isinstance(key, str):
        raise ValueError("a key is no text")
    found = pickles.attributes(value, "TensorStorageMetadata")
    properties = found["properties"].state
    properties = properties if isinstance(properties, tuple) else (properties["dtype"],)
    dtype = getattr(properties[0], "dtype", None)
    if dtype not in DTYPES:
        raise pickles.Unsupported(f"it holds {key[:80]!r} in an element type that this version does not know")
    chunks = tuple(
        (pickles.sizes(part["offsets"]), pickles.sizes(part["sizes"]))
        for part in (pickles.attributes(chunk, "ChunkStorageMetadata") for chunk in found["chunks"])
    )
    parts = tuple(map(str, _path(key, path)))
    return Stored(key, parts, TensorInfo(parts[-1], dtype, pickles.sizes(found["size"])), chunks)


def _path(key: Any, path: Any) -> tuple[Any, ...]:
    """The path of a key, as the planner recorded it; without, the key itself."""
    return path if isinstance(path, tuple) and path else (key,)


def _records(storage: Any) -> dict[tuple[str, tuple[int, ...] | None], Record]:
    records = {}
    for index, stored in storage.items():
        which, where = pickles.attributes(index, "MetadataIndex"), pickles.attributes(stored, "_StorageInfo")
        offset = which.get("offset")
        name, start, length = where["relative_path"], where["offset"], where["length"]
        if where.get("transform_descriptors"):
            raise pickles.Unsupported("its parts are compressed or encrypted")
        if not (isinstance(name, str) and Path(name).name == name and pickles.is_whole(start) and pickles.is_whole(length)):
            raise ValueError("a part's place is no file name and range")
        records[str(which["fqn"]), None if offset is None else pickles.sizes(offset)] = Record(name, start, length)
    return records


def is_weight(path: tuple[str, ...]) -> bool:
    """False for the state of an optimizer, a scheduler, an average of the weights and the like, by the path of a tensor.

    >>> is_weight(("app", "model", "norm.weight")), is_weight(("optimizer", "state.norm.weight.exp_avg"))
    (True, False)
    """
    words = [*path[:-1], path[-1].split(".")[0]] if len(path) > 1 else path[-1].split(".")[:2]
    return not any(NOT_WEIGHTS.search(word) for word in words) and path[-1].rpartition(".")[2] not in OPTIMIZER_STATE


def _weights(stored: list[Stored], where: str, key: str | None) -> tuple[dict[str, Stored], list[str]]:
    """The model's tensors by name, and what to say of others."""
    groups: dict[str, list[Stored]] = {}
    for one in stored:
        if is_weight(one.path) or (key is not None and one.path[-1].rpartition(".")[2] not in OPTIMIZER_STATE):
            groups.setdefault("/".join(one.path[:-1]), []).append(one)
    listed = ", ".join(repr(name) if name else "the top level" for name in [*groups][:4])
    if key is not None:
        found = [name for name in groups if name == key or name.endswith(f"/{key}")]
        if len(found) != 1:
            raise BrokenFile(f"{where} has no tensors under {key!r}.", hint=f"There are: {listed or 'none at all'}.")
        chosen = {found[0]}
    else:
        if not groups:
            raise BrokenFile(f"{where} holds no weights: {len(stored):,} tensors of optimizer state or the like.")
        named = [name for nest in NESTS for name in groups if name.split("/")[-1] == nest]
        chosen = {named[0]} if named else set(groups)
    said = []
    aside = [repr(name) if name else "the top level" for name in groups if name not in chosen]
    if aside:
        said.append(f"{where}: the tensors under {next(iter(chosen))!r} are read, not {', '.join(aside[:4])}.")
    weights: dict[str, Stored] = {}
    for group, members in groups.items():
        for one in members if group in chosen else ():
            name = one.path[-1] if len(chosen) == 1 else ".".join(one.path)
            if name in weights:
                raise BrokenFile(f"{where} holds {name!r} twice.")
            weights[name] = one
    return weights, said


class Parts:
    """The parts of a checkpoint, found in its files as they are asked for."""

    def __init__(self, metadata: Metadata, files: Files, where: str) -> None:
        self._records, self._files, self._where = metadata.records, files, where
        self._numbers: dict[str, int] = {}
        self._seen: dict[bytes, Any] = {}

    def entry(self, name: str, stored: Stored) -> Entry:
        """Where a tensor lies, under `name`. Raises `BrokenFile` or `UnsupportedFormat`."""
        check_name(name, self._where)
        pieces = []
        for offset, shape in stored.chunks:
            content, storages, file, path = self._read(stored.key, offset)
            if isinstance(content, Mapping) and len(content) == 1:  # Megatron wraps each
                content = next(iter(content.values()))
            if not isinstance(content, StoredTensor):
                raise UnsupportedFormat(f"{path} should hold a part of {stored.key!r}, but holds no plain tensor.")
            part = entry_of(name, content, file, storages, path)
            if part.stride is not None or part.info.dtype != stored.info.dtype or part.info.shape != shape:
                raise BrokenFile(
                    f"The part of {stored.key!r} in {path} is {part.info.dtype} {list(part.info.shape)}"
                    f"{', not contiguous' if part.stride else ''}, where .metadata says {stored.info.dtype} {list(shape)}."
                )
            pieces.append(Piece(file, part.start, offset, shape))
        return assemble(TensorInfo(name, stored.info.dtype, stored.info.shape), pieces, self._where)

    def value(self, key: str) -> Any:
        """What was saved under a key that is no tensor: a number, a tuple, a list of names. Raises as `entry` does."""
        return self._read(key, None)[0]

    def _read(self, key: str, offset: tuple[int, ...] | None) -> tuple[Any, Storages, int, str]:
        record = self._records.get((key, offset)) or self._records.get((key, None))
        if record is None:
            at = "" if offset is None else f", the one at {list(offset)}"
            raise BrokenFile(f"{self._where} lacks a part of {key!r}{at}.", hint="Copy it again.")
        if record.name not in self._numbers:
            self._numbers[record.name] = self._files.add(fspath(place(self._where) / record.name))
        file = self._numbers[record.name]
        content, storages = read_archive(self._files, file, record.offset, record.length, self._seen)
        return content, storages, file, f"{self._files.paths[file]} at byte {record.offset:,}"
