"""Files of torch.save (.bin, .pt, .pth, .ckpt): zip archives, and the format before torch 1.6. Read without torch.

The pickle inside is read by `pickles`, which executes nothing; it says where in the file every tensor lies. Offsets and
sizes are checked against the file before anything is read.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramdiff.checkpoints import pickles
from paramdiff.checkpoints.base import Located, TensorInfo, check_index, check_name, strays_of
from paramdiff.checkpoints.files import Files, OnFiles, Region
from paramdiff.checkpoints.pickles import Opaque, StoredTensor
from paramdiff.dtypes import DTYPES
from paramdiff.errors import BrokenFile, CheckpointError, UnsupportedFormat

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins the pickle stream of torch before 1.6
NESTS = ("state_dict", "model_state_dict", "model", "module", "model_weights", "weights", "params", "net", "policy")
# Words in a key under which lie no weights; an average of them (ema) is read where it is asked for by name.
NOT_WEIGHTS = re.compile(
    r"(^|_|\b)(optim\w*|(lr_)?sched\w*|scaler|rng\w*|ema|args|hyper\w*|loops|callbacks)($|_|\b)", re.IGNORECASE
)
Storages = Mapping[str, tuple[int, int]]  # (first byte, bytes) of each, by its key
LOCAL_HEADER = 30  # bytes of a member's own header in a zip archive, before its name
MOST_MODULES = 10_000  # of a TorchScript archive
DEEPEST = 3  # mappings within mappings in which weights are looked for


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: the file's number and its first byte; `stride` in elements unless it is contiguous."""

    file: int
    start: int
    info: TensorInfo
    stride: tuple[int, ...] | None


class TorchTensors(OnFiles):
    """Tensors of files of torch.save, each in one place, contiguous or not; see `Checkpoint` for the interface."""

    format = "torch"

    def __init__(
        self,
        ref: str,
        files: Files,
        entries: Mapping[str, Entry],
        config: Mapping[str, Any] | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        self.ref, self.config, self.warnings = ref, config, list(warnings)
        self._files, self._entries = files, entries
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info for name, entry in entries.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        entry = self._entries[name]
        if entry.stride is None:
            self._files.read_into(entry.file, entry.start + offset, buffer, name)
            return
        if not self._files.are_local:
            raise UnsupportedFormat(
                f"Tensor {name!r} of {self.ref} is stored in an order that is not contiguous, which is not read over HTTP.",
                hint="Use --download.",
            )
        self.verify()  # a file cut short under a memory map would end the process
        size = entry.info.type.bits // 8
        whole = np.memmap(self._files.paths[entry.file], mode="r")[entry.start :]
        strides = tuple(size * step for step in entry.stride)
        view = np.lib.stride_tricks.as_strided(whole, (*entry.info.shape, size), (*strides, 1), writeable=False)
        buffer[:] = view.flat[offset : offset + len(buffer)].tobytes()  # copies this range alone


def open(ref: str, located: Located, config: dict[str, Any] | None, key: str | None) -> TorchTensors:
    """Open one or several files that together are one model. `key` names the entry that holds the weights, where there are
    several.

    Raises `UnsupportedFormat` or `BrokenFile`.
    """
    files, entries, warnings = Files(), dict[str, Entry](), list(located.warnings)
    try:
        for path in located.files:
            warnings += _add_file(path, key, located.shard_of, files, entries)
        check_index(located.shard_of, entries)
    except BaseException:
        files.close()
        raise
    return TorchTensors(ref, files, entries, config, warnings)


def _add_file(
    path: str, key: str | None, shard_of: dict[str, str] | None, files: Files, entries: dict[str, Entry]
) -> list[str]:
    """Add the weights of one file to `entries`. Returns sentences about what else was there."""
    file = files.add(path)
    content, storages = read_file(files, file)
    weights, said = find_weights(content, path, key)
    strays = strays_of(shard_of, path, weights, said)
    for name, tensor in weights.items():
        if name in strays:
            continue
        if name in entries:
            other = files.paths[entries[name].file]
            raise BrokenFile(
                f"Tensor {name!r} is stored twice, in {other} and in {path}.", hint="Name the one file to read."
            )
        entries[name] = entry_of(name, tensor, file, storages, path)
    return said


def read_file(files: Files, file: int) -> tuple[Any, Storages]:
    """What a file holds, with tensors as `StoredTensor`, and (first byte, bytes) of every storage by its key.

    Raises `BrokenFile` or `UnsupportedFormat`.
    """
    begin = files.read(file, 0, 4)
    if begin[:1] == b"\x80":  # a pickle, of protocol 2 or later
        with _refusals(files.paths[file]):
            return _read_legacy(files, file)
    if begin[:2] != b"PK":
        raise BrokenFile(f"{files.paths[file]} is no file of torch.save: it begins with {begin!r}.")
    return read_archive(files, file, 0, files.size(file))


def read_archive(
    files: Files, file: int, offset: int, length: int, seen: dict[bytes, Any] | None = None
) -> tuple[Any, Storages]:
    """The same for an archive of torch.save that is a part of a file. `seen` keeps what pickles held, where many are alike.

    Raises `BrokenFile` or `UnsupportedFormat`.
    """
    path = files.paths[file] + (f" at byte {offset:,}" if offset else "")
    if offset + length > files.size(file):
        raise BrokenFile(
            f"{path} is truncated: {length:,} bytes should be there, but the file has {files.size(file):,}.",
            hint="Copy it again.",
        )
    with _refusals(path):
        return _read_zip(path, files, file, offset, length, {} if seen is None else seen)


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Turn whatever goes wrong in reading `path` into a sentence."""
    try:
        yield
    except (pickles.Refused, pickles.Unsupported) as error:
        raise UnsupportedFormat(f"{path} is not read: {error}.", hint="Export the weights as safetensors.") from error
    except (ValueError, zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, OverflowError, OSError) as error:
        raise BrokenFile(f"{path} is damaged or no torch file: {str(error)[:200] or type(error).__name__}.") from error


def _read_zip(path: str, files: Files, file: int, offset: int, length: int, seen: dict[bytes, Any]) -> tuple[Any, Storages]:
    with zipfile.ZipFile(Region(files, file, offset, length)) as archive:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            if info.filename in members:
                raise ValueError(f"it holds {info.filename[:80]} twice")
            members[info.filename] = info
            stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            if "/code/" not in info.filename and (info.flag_bits & 1 or not stored):
                raise UnsupportedFormat(f"{path} is compressed or encrypted.", hint="Save it again with torch.save.")
        pickled = [name for name in members if name.split("/", 1)[-1] == "data.pkl"]
        if len(pickled) != 1:
            raise BrokenFile(f"{path} is a zip archive, but not one of torch.save: it holds no data.pkl.")
        root = pickled[0].removesuffix("data.pkl")
        if members[pickled[0]].file_size > pickles.MAX_BYTES:
            raise BrokenFile(f"{path} has a pickle of {members[pickled[0]].file_size:,} bytes, over the limit.")
        order = members.get(f"{root}byteorder")
        if order is not None and archive.read(order)[:10].strip() != b"little":
            raise UnsupportedFormat(
                f"{path} was written on a big-endian machine.", hint="Save it again on a little-endian one."
            )
        data = archive.read(members[pickled[0]])
    if data not in seen:
        seen[data] = pickles.load(data)
        if f"{root}constants.pkl" in members:
            seen[data] = _of_script(seen[data])
    storages = {}
    begins = [offset + info.header_offset for name, info in members.items() if name.startswith(f"{root}data/")]
    files.announce({file: [(begin, begin + LOCAL_HEADER) for begin in begins]})  # far apart: each a request, but all at once
    for name, info in members.items():
        if name.startswith(f"{root}data/"):
            start = member_start(files, file, info, offset, offset + length)
            storages[name.removeprefix(f"{root}data/")] = start, info.file_size
    return seen[data], storages


def _of_script(module: Any) -> dict[str, StoredTensor]:
    """The parameters and buffers of a TorchScript module by their names; the code beside them is not looked at."""
    if not isinstance(module, Opaque):
        raise ValueError("it looks like TorchScript, but holds no module")
    found: dict[str, StoredTensor] = {}
    pending = deque([("", module)])
    for _ in range(MOST_MODULES):
        if not pending:
            return found
        prefix, module = pending.popleft()
        for name, value in module.state.items() if isinstance(module.state, Mapping) else ():
            if isinstance(value, StoredTensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, Opaque) and value.kind.startswith("__torch__."):
                pending.append((f"{prefix}{name}.", value))
    raise ValueError("its modules hold one another without end")


def member_start(files: Files, file: int, info: zipfile.ZipInfo, offset: int, end: int) -> int:
    """Where the data of an archive's member begin: after its local header, whose lengths may differ from the directory's.

    The archive is bytes `offset` to `end` of the file. Raises `ValueError`.
    """
    header = files.read(file, offset + info.header_offset, LOCAL_HEADER)
    if len(header) < LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise ValueError(f"its member {info.filename[:80]} is not where the directory says")
    name, extra = struct.unpack("<HH", header[26:30])
    start = int(offset + info.header_offset + 30 + name + extra)
    if start + info.file_size > end:
        raise ValueError(f"its member {info.filename[:80]} ends beyond the file")
    return start


def _read_legacy(files: Files, file: int) -> tuple[Any, Storages]:
    """Four pickles (magic number, version, facts about the system, the content), a list of storages, then their data."""
    path, size = files.paths[file], files.size(file)
    with io.BufferedReader(Region(files, file, 0, size)) as stream:
        if pickles.Reader(stream, size).load() != LEGACY_MAGIC:
            raise ValueError("it is a pickle, but not one of torch.save")
        pickles.Reader(stream, size).load()
        system = pickles.Reader(stream, size).load()
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise UnsupportedFormat(f"{path} was written on a big-endian machine.")
        reader = pickles.Reader(stream, size)
        content = reader.load()
        keys = pickles.Reader(stream, size).load()
        sizes = {s.key: DTYPES[s.dtype].bits // 8 if s.dtype else 1 for s in reader.storages}
        if not (isinstance(keys, list) and all(isinstance(key, str) and key in sizes for key in keys)):
            raise ValueError("its list of storages is none")
        storages = {}
        for key in keys:
            (numel,) = struct.unpack("<q", stream.read(8))
            start, length = stream.tell(), numel * sizes[key]
            if not 0 <= length <= size - start:
                raise ValueError(f"its storage {key} ends beyond the file")
            storages[key] = start, length
            stream.seek(length, os.SEEK_CUR)
    return content, storages


def find_weights(content: Any, path: str, key: str | None) -> tuple[dict[str, StoredTensor], list[str]]:
    """The mapping of names to tensors in what a file holds, and sentences about what else was there.

    Raises `BrokenFile` where there is none, or several and `key` does not say which, `UnsupportedFormat` for parts of
    distributed tensors.
    """
    if isinstance(content, StoredTensor):
        content = {"tensor": content}
    found = dict(_mappings(content, everything=key is not None))
    if key is not None:
        if key not in found:
            raise BrokenFile(f"{path} has no weights under {key!r}.", hint=f"There are: {_listed(found) or 'none at all'}.")
        chosen = key
    elif not found:
        raise BrokenFile(f"{path} holds no tensors by name.")
    else:
        chosen = _choose(found, path)
    said = []
    others = [name for name in found if name != chosen and not name.startswith(f"{chosen}/")]
    if chosen and others:
        said.append(f"{path}: the weights under {chosen!r} are read, not {_listed(others)}.")
    weights, aside = {}, []
    for name, value in found[chosen].items():
        if isinstance(value, StoredTensor) and isinstance(name, str):
            weights[name] = value
        elif isinstance(value, Opaque) and value.holds_tensor:
            raise UnsupportedFormat(
                f"{path} holds {_shown(name)} as a {value.kind.rpartition('.')[2]}, a part of a tensor or a special kind of "
                "one, which this version does not read.",
                hint="Merge the shards, or export the model as safetensors, first.",
            )
        elif not isinstance(value, Mapping) or (chosen and any(_is_tensor(inner) for inner in value.values())):
            aside.append(_shown(name))
    if aside:
        more = f" and {len(aside) - 4} more" if len(aside) > 4 else ""
        said.append(f"{path}: {', '.join(aside[:4])}{more} ignored; not tensors by name.")
    return weights, said


def _shown(name: Any) -> str:
    return repr(name)[:80] if isinstance(name, (str, int)) else f"a {type(name).__name__}"


def _listed(names: Any) -> str:
    names = [repr(name) if name else "the top level" for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _mappings(content: Any, *, everything: bool) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every mapping that holds tensors by name, by its path (`model`, `state/model`); without `everything` not optimizers
    and the like."""
    pending, seen = deque([("", content, 0)]), set()
    while pending:
        where, content, depth = pending.popleft()
        if not isinstance(content, Mapping) or depth > DEEPEST or id(content) in seen:
            continue
        seen.add(id(content))
        if any(isinstance(name, str) and _is_tensor(value) for name, value in content.items()):
            yield where, content
        for name, value in content.items():
            if isinstance(name, str) and (everything or not NOT_WEIGHTS.search(name)):
                pending.append((f"{where}/{name}" if where else name, value, depth + 1))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, StoredTensor) or (isinstance(value, Opaque) and value.holds_tensor)


def _choose(found: Mapping[str, Mapping[Any, Any]], path: str) -> str:
    if len(found) == 1:
        return next(iter(found))
    for nest in NESTS:
        matching = [name for name in found if name.split("/")[-1] == nest]
        if len(matching) == 1:
            return matching[0]
    raise BrokenFile(
        f"{path} holds tensors in {len(found)} places ({_listed(found)}), and which of them are the weights is unclear.",
        hint=f"Name one: {path}::{next(name for name in found if name)}.",
    )


def entry_of(name: str, tensor: StoredTensor, file: int, storages: Storages, path: str) -> Entry:
    """Where a tensor of file number `file` lies, checked against its storage. Raises `BrokenFile` or `UnsupportedFormat`."""
    check_name(name, path)
    if tensor.dtype is None or tensor.dtype not in DTYPES:
        raise UnsupportedFormat(f"Tensor {name!r} in {path} has an element type that this version does not know.")
    info = TensorInfo(name, tensor.dtype, tensor.shape)
    size = info.type.bits // 8
    if tensor.storage.key not in storages:
        raise _broken(name, path, f"its storage {tensor.storage.key[:40]!r} is missing")
    start, length = storages[tensor.storage.key]
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    if info.numel and (last + 1) * size > length:
        raise _broken(name, path, f"it needs {(last + 1) * size:,} bytes of a storage that has {length:,}")
    if info.nbytes >= 1 << 62:
        raise _broken(name, path, "it claims more elements than any file has")
    contiguous = not info.numel or _is_contiguous(tensor.shape, tensor.stride)
    stride = tuple(step if n > 1 else 0 for n, step in zip(tensor.shape, tensor.stride, strict=True))
    return Entry(file, start + tensor.offset * size if info.numel else start, info, None if contiguous else stride)


def _broken(name: str, path: str, why: str) -> CheckpointError:
    return BrokenFile(f"Tensor {name!r} in {path} is broken: {why}.", hint="Download it again.")


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return all(
        n == 1 or step == math.prod(shape[axis + 1 :]) for axis, (n, step) in enumerate(zip(shape, stride, strict=True))
    )
