"""Open files of a checkpoint, on a disk or behind HTTP: ranges read into buffers, changes noticed."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

from paramdiff.checkpoints.base import TensorInfo
from paramdiff.checkpoints.places import place
from paramdiff.checkpoints.ranges import RangeFile
from paramdiff.errors import BrokenFile, ChangedWhileReading

MAX_READ = 1 << 30  # one read moves at most 0x7ffff000 bytes on Linux


class Files:
    """The files of one checkpoint, by number. Safe to read from several threads; pickled without its descriptors.

    `paths` are their names for messages, and of local ones their paths.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._files: list[LocalFile | RangeFile] = []
        self._provenance: list[dict[str, Any]] = []
        self._contents: list[str | None] = []

    def add(self, path: str) -> int:
        """Open a file and return its number. Raises `CheckpointError`."""
        where = place(path)
        opened = where if isinstance(where, Path) else where.open()
        self._files.append(LocalFile(str(opened)) if isinstance(opened, Path) else opened)
        self._provenance.append({} if isinstance(where, Path) else where.provenance())
        self._contents.append(None if isinstance(where, Path) else where.content)
        self.paths.append(str(opened) if isinstance(opened, Path) else str(where))
        return len(self._files) - 1

    @property
    def are_local(self) -> bool:
        return all(isinstance(file, LocalFile) for file in self._files)

    def size(self, file: int) -> int:
        return self._files[file].size

    def content(self, file: int) -> str | None:
        """The hash of the file's bytes, where it is known without reading them."""
        return self._contents[file]

    def announce(self, ranges: Mapping[int, Iterable[tuple[int, int]]]) -> None:
        """Say which (first byte, end) of which files will be read next, so that those behind HTTP can be fetched."""
        for number, wanted in ranges.items():
            file = self._files[number]
            if isinstance(file, RangeFile):
                file.announce(wanted)

    def read(self, file: int, position: int, length: int) -> bytes:
        """Up to `length` bytes, fewer at the end of the file. Raises `BrokenFile`."""
        found = self._files[file]
        if isinstance(found, RangeFile):
            data = bytearray(max(0, min(length, found.size - position)))
            found.read_into(position, memoryview(data))
            return bytes(data)
        try:
            return os.pread(found.fd, length, position)
        except (OSError, OverflowError) as error:  # the latter: a position beyond any file
            raise BrokenFile(f"Cannot read {self.paths[file]}: {getattr(error, 'strerror', error)}.") from error

    def read_into(self, file: int, position: int, buffer: memoryview, name: str) -> None:
        """Fill `buffer` for tensor `name`. Raises `BrokenFile`, or `ChangedWhileReading` where the file ends early."""
        done, found = 0, self._files[file]
        while done < len(buffer):
            part = buffer[done : done + MAX_READ]
            try:
                got = (
                    found.read_into(position + done, part)
                    if isinstance(found, RangeFile)
                    else os.preadv(found.fd, [part], position + done)
                )
            except OSError as error:
                raise BrokenFile(f"Cannot read {name!r} from {self.paths[file]}: {error.strerror}.") from error
            if got == 0:
                raise ChangedWhileReading(
                    f"{self.paths[file]} ended inside tensor {name!r} at byte {position + done:,}, though it was "
                    f"{self.size(file):,} bytes long when it was opened.",
                    hint="Wait until nothing writes to it any more, then run again.",
                )
            done += got

    def verify(self) -> None:
        """Raise `ChangedWhileReading` if a file is no longer the one that was opened (HTTP checks each answer)."""
        for file in self._files:
            file.verify()

    def facts(self) -> dict[str, Any]:
        """Names and sizes, and where all of them came from."""
        files = [{"name": Path(p).name, "bytes": f.size} for p, f in zip(self.paths, self._files, strict=True)]
        common = self._provenance[0] if self._provenance and all(p == self._provenance[0] for p in self._provenance) else {}
        return {"files": files, **common}

    def close(self) -> None:
        for file in self._files:
            file.close()


class LocalFile:
    """An open file on a disk. Pickled as its path, and opened again."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd, self._stat = open_regular(path)

    @property
    def size(self) -> int:
        return self._stat.st_size

    def verify(self) -> None:
        try:
            now = os.stat(self.path)
        except OSError:
            now = None
        if now is None or _identity(now) != _identity(self._stat):
            raise ChangedWhileReading(
                f"{self.path} was rewritten or removed while it was being read, so the result would mix two states.",
                hint="Wait until nothing writes to it any more, then run again.",
            )

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_stat": self._stat}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.fd = open_regular(self.path)[0]


class Region(io.RawIOBase):
    """A part of a file as a file of its own, for the standard library's readers."""

    def __init__(self, files: Files, file: int, start: int, length: int) -> None:
        self._files, self._file, self._start, self._length, self._at = files, file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if at < 0:
            raise ValueError("a position before the file's beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        data = self._files.read(self._file, self._start + self._at, left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


class OnFiles:
    """What the checkpoints of all containers on files share, once `_entries` says in which file each tensor begins where."""

    format: str
    ref: str
    tensors: Mapping[str, TensorInfo]
    _files: Files
    _entries: Mapping[str, Any]

    @property
    def is_local(self) -> bool:
        return self._files.are_local

    def content(self, name: str) -> tuple[str, int] | None:
        entry = self._entries[name]
        found = self._files.content(entry.file)
        return None if found is None else (found, entry.start)

    def announce(self, parts: Iterable[tuple[str, int, int]]) -> None:
        wanted: dict[int, list[tuple[int, int]]] = {}
        for name, start, end in parts:
            for file, low, high in self._stored(name, start, end):
                wanted.setdefault(file, []).append((low, high))
        self._files.announce(wanted)

    def _stored(self, name: str, start: int, end: int) -> Iterable[tuple[int, int, int]]:
        """(file, first byte, end) of bytes `start` to `end` of a tensor."""
        entry = self._entries[name]
        return [(entry.file, entry.start + start, entry.start + end)]

    def position(self, name: str) -> tuple[int, int]:
        entry = self._entries[name]
        return entry.file, entry.start

    def verify(self) -> None:
        self._files.verify()

    def facts(self) -> dict[str, Any]:
        return {"ref": self.ref, "format": self.format, **self._files.facts(), "tensors": len(self.tensors)}

    def close(self) -> None:
        self._files.close()


def open_regular(path: str) -> tuple[int, os.stat_result]:
    """Open a regular file for sequential reading. Raises `BrokenFile` for anything else; a pipe cannot hang it."""
    try:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.EMFILE or not _more_files():
                raise
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # the latter: a name that no file can have
        raise BrokenFile(f"Cannot read {path}: {getattr(error, 'strerror', error)}.") from error
    stat = os.fstat(fd)
    if not S_ISREG(stat.st_mode):
        os.close(fd)
        raise BrokenFile(f"{path} is not a regular file.")
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd, stat


def _more_files() -> bool:
    """Raise this process's limit of open files as far as it may be: a checkpoint can have a file for each tensor."""
    try:
        import resource  # not on Windows
    except ImportError:
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # macOS takes no more than its own maximum
        return False
    return True


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
