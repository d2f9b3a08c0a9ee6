"""The safetensors container: 8 bytes of length, a JSON header, then the data. Ours, because it reads ranges.

Files are taken to be hostile: the header is bounded and every entry validated (known type, offsets inside the file, no
overlap, no hole, size = shape × type) before anything of the size it claims is allocated.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paramdiff.checkpoints.base import Located, TensorInfo, check_index, check_name, strays_of
from paramdiff.checkpoints.files import Files, OnFiles
from paramdiff.dtypes import DTYPES
from paramdiff.errors import BrokenFile, UnsupportedFormat

MAX_HEADER_BYTES = 100_000_000  # the bound of the reference implementation
SHARDING_INFO = "DCP_SHARDING_INFO"  # of a file that holds parts of tensors, see `dcp_hf`
MAX_RANK = 64  # dimensions: numpy's and torch's bound, and one on the work of multiplying them


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: the file's index and the absolute byte range in it."""

    file: int
    start: int
    info: TensorInfo


def open(ref: str, located: Located, config: dict[str, Any] | None, key: str | None) -> SafetensorsCheckpoint:
    """The entry of `checkpoints.CONTAINERS`. Raises `UnsupportedFormat` for a `key`, `BrokenFile`."""
    refuse_key(ref, key)
    return SafetensorsCheckpoint(ref, located, config)


def refuse_key(ref: str, key: str | None) -> None:
    """Raise `UnsupportedFormat` where a place within was asked for: these files have none."""
    if key:
        path = ref.partition("::")[0]
        raise UnsupportedFormat(
            f"{path} is a safetensors checkpoint, which has no entry {key!r}.", hint=f"Give {path} alone."
        )


class SafetensorsCheckpoint(OnFiles):
    """One or several safetensors files that together are one model; see `Checkpoint` for the interface."""

    format = "safetensors"

    def __init__(self, ref: str, located: Located, config: dict[str, Any] | None) -> None:
        self.ref, self.warnings = ref, list(located.warnings)
        self.config: Mapping[str, Any] | None = config
        self._files = Files()
        self._entries: dict[str, Entry] = {}
        try:
            for path in located.files:
                self._add_file(path, located.shard_of)
            check_index(located.shard_of, self._entries)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info for name, entry in self._entries.items()}

    def _add_file(self, path: str, shard_of: dict[str, str] | None) -> None:
        file = self._files.add(path)
        data_start, infos, metadata = read_header(self._files, file)
        if SHARDING_INFO in metadata:
            raise UnsupportedFormat(
                f"{path} holds parts of tensors, one of the files of a sharded torch.distributed save.",
                hint="Give the directory with all of them, named shard-00001-model-00001-of-… as they were saved.",
            )
        strays = strays_of(shard_of, path, (info.name for info, _ in infos), self.warnings)
        for info, start in infos:
            if info.name in strays:
                continue
            if info.name in self._entries:
                other = self._files.paths[self._entries[info.name].file]
                raise BrokenFile(
                    f"Tensor {info.name!r} is stored twice, in {other} and in {path}.",
                    hint="Name the one file to read, or remove the leftover.",
                )
            self._entries[info.name] = Entry(file, data_start + start, info)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        entry = self._entries[name]
        self._files.read_into(entry.file, entry.start + offset, buffer, name)


def read_header(files: Files, file: int) -> tuple[int, list[tuple[TensorInfo, int]], dict[str, Any]]:
    """Parse and validate a header. Returns the first data byte, each tensor with its start relative to that, the metadata.

    Raises `BrokenFile` with the path, what was expected and what was found.
    """
    path, size = files.paths[file], files.size(file)
    if size < 8:
        raise BrokenFile(f"{path} is {size} bytes long, too short for a safetensors file.", hint="Download it again.")
    (length,) = struct.unpack("<Q", files.read(file, 0, 8))
    if length > MAX_HEADER_BYTES:
        raise BrokenFile(
            f"{path} claims a header of {length:,} bytes, over the limit of {MAX_HEADER_BYTES:,}; "
            "it is no safetensors file, or a damaged one."
        )
    if 8 + length > size:
        raise BrokenFile(
            f"{path} is truncated: its header should end at byte {8 + length:,}, but the file has {size:,}.",
            hint="Download it again.",
        )
    try:
        header = json.loads(files.read(file, 8, length).decode("utf-8"), object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"The header of {path} is not valid: {_first_line(error)}.") from error
    if not isinstance(header, dict):
        raise BrokenFile(f"The header of {path} is not a JSON object.")
    metadata = header.pop("__metadata__", None)
    data_bytes = size - 8 - length
    spans = [_entry(name, value, data_bytes, path) for name, value in header.items()]
    _check_layout(spans, data_bytes, path)
    return 8 + length, [(info, start) for info, start, _ in spans], metadata if isinstance(metadata, dict) else {}


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is listed twice")
    return found


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".")[:200] if str(error) else type(error).__name__


def _entry(name: str, value: Any, data_bytes: int, path: str) -> tuple[TensorInfo, int, int]:
    check_name(name, path)
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise BrokenFile(f"Tensor {name!r} in {path} lacks a dtype, a shape or two data_offsets.") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BrokenFile(f"Tensor {name!r} in {path} has the unknown dtype {str(dtype)[:40]!r}.")
    if not (isinstance(shape, list) and all(_whole(n) for n in shape) and _whole(start) and _whole(end)):
        raise BrokenFile(f"Tensor {name!r} in {path} has a shape or offsets that are not whole numbers from 0 up.")
    if len(shape) > MAX_RANK or not all(n < 1 << 63 for n in (*shape, start, end)):
        raise BrokenFile(f"Tensor {name!r} in {path} has over {MAX_RANK} dimensions, or a shape or offsets beyond 2^63.")
    info = TensorInfo(name, dtype, tuple(shape))
    if not start <= end <= data_bytes:
        raise BrokenFile(
            f"{path} is truncated or damaged: tensor {name!r} should end at data byte {end:,} of {data_bytes:,}.",
            hint="Download it again.",
        )
    if info.numel * info.type.bits != (end - start) * 8:
        raise BrokenFile(
            f"Tensor {name!r} in {path} has {end - start:,} bytes, where {dtype} of shape {str(shape)[:80]} "
            f"needs {info.nbytes:,}."
        )
    return info, start, end


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _check_layout(spans: list[tuple[TensorInfo, int, int]], data_bytes: int, path: str) -> None:
    last_end, last_name = 0, "the header"
    for info, start, end in sorted(spans, key=lambda span: (span[1], span[2])):
        if start != last_end:
            what = "overlaps" if start < last_end else "leaves a gap after"
            raise BrokenFile(f"Tensor {info.name!r} in {path} {what} {last_name}: it starts at {start:,}, not {last_end:,}.")
        last_end, last_name = end, repr(info.name)
    if last_end != data_bytes:
        raise BrokenFile(f"{path} has {data_bytes - last_end:,} bytes after its last tensor.", hint="Download it again.")
