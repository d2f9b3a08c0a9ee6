"""Open files of a checkpoint: ranges read into buffers, changes noticed. What all containers on a disk share."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

from paramdiff.checkpoints.base import TensorInfo
from paramdiff.errors import BrokenFile, ChangedWhileReading

MAX_READ = 1 << 30  # one read moves at most 0x7ffff000 bytes on Linux


class Files:
    """The files of one checkpoint, by number. Safe to read from several threads; pickled without its descriptors."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.stats: list[os.stat_result] = []
        self._fds: list[int] = []

    def add(self, path: str) -> int:
        """Open a file and return its number. Raises `BrokenFile`."""
        fd, stat = open_regular(path)
        self.paths.append(path)
        self._fds.append(fd)
        self.stats.append(stat)
        return len(self._fds) - 1

    def size(self, file: int) -> int:
        return self.stats[file].st_size

    def read(self, file: int, position: int, length: int) -> bytes:
        """Up to `length` bytes, fewer at the end of the file. Raises `BrokenFile`."""
        try:
            return os.pread(self._fds[file], length, position)
        except (OSError, OverflowError) as error:  # the latter: a position beyond any file
            raise BrokenFile(f"Cannot read {self.paths[file]}: {getattr(error, 'strerror', error)}.") from error

    def read_into(self, file: int, position: int, buffer: memoryview, name: str) -> None:
        """Fill `buffer` for tensor `name`. Raises `BrokenFile`, or `ChangedWhileReading` where the file ends early."""
        done = 0
        while done < len(buffer):
            part = buffer[done : done + MAX_READ]
            try:
                got = os.preadv(self._fds[file], [part], position + done)
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
        """Raise `ChangedWhileReading` if a file is no longer the one that was opened."""
        for path, then in zip(self.paths, self.stats, strict=True):
            try:
                now = os.stat(path)
            except OSError:
                now = None
            if now is None or _identity(now) != _identity(then):
                raise ChangedWhileReading(
                    f"{path} was rewritten or removed while it was being read, so the result would mix two states.",
                    hint="Wait until nothing writes to it any more, then run again.",
                )

    def facts(self) -> list[dict[str, Any]]:
        return [{"name": Path(p).name, "bytes": s.st_size} for p, s in zip(self.paths, self.stats, strict=True)]

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fds": []}  # what crosses to a worker process: everything but the open files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for path in self.paths:
            self._fds.append(open_regular(path)[0])


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

    def position(self, name: str) -> tuple[int, int]:
        entry = self._entries[name]
        return entry.file, entry.start

    def verify(self) -> None:
        self._files.verify()

    def facts(self) -> dict[str, Any]:
        return {"ref": self.ref, "format": self.format, "files": self._files.facts(), "tensors": len(self.tensors)}

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
