"""Places in a tree of files that was listed once: as much of `pathlib.Path` as finding a checkpoint takes."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from paramdiff.checkpoints.ranges import RangeFile
from paramdiff.errors import BrokenFile

MAX_SMALL = 100_000_000  # bytes of a file that is read whole
Self = TypeVar("Self", bound="TreePath")


class TreePath(ABC):
    """A file or directory at `_path` below the root of a tree. Subclasses know the tree."""

    content: str | None = None

    def __init__(self, path: str) -> None:
        self._path = PurePosixPath(path)

    @abstractmethod
    def _at(self: Self, path: PurePosixPath) -> Self: ...

    @abstractmethod
    def _names(self) -> Iterable[str]:
        """The paths of all files of the tree."""

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def open(self) -> RangeFile | Path:
        """The file, to be read in ranges; or where it lies on this disk. Raises `NotFound`."""

    def provenance(self) -> dict[str, Any]:
        """What run.json keeps of where it came from."""
        return {}

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def suffix(self) -> str:
        return self._path.suffix

    @property
    def stem(self) -> str:
        return self._path.stem

    @property
    def parent(self: Self) -> Self:
        return self._at(self._path.parent)

    @property
    def parents(self: Self) -> list[Self]:
        return [self._at(parent) for parent in self._path.parents]

    def __truediv__(self: Self, name: str) -> Self:
        return self._at(self._path / name)

    def __fspath__(self) -> str:
        return str(self)

    def match(self, pattern: str) -> bool:
        return self._path.match(pattern)

    @property
    def _within(self) -> str:
        """What the paths of files below begin with."""
        return "" if str(self._path) == "." else f"{self._path}/"

    def is_file(self) -> bool:
        return str(self._path) in self._names()

    def _directories(self) -> Collection[str]:
        return directories_of(self._names())

    def is_dir(self) -> bool:
        return not self._within or str(self._path) in self._directories()

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self: Self) -> Iterator[Self]:
        below = (name.removeprefix(self._within) for name in self._names() if name.startswith(self._within))
        return (self / name for name in sorted({name.split("/")[0] for name in below}))

    def glob(self: Self, pattern: str) -> Iterator[Self]:
        wanted = (self._path / pattern).parts
        for name in sorted(self._names()):
            parts = PurePosixPath(name).parts
            if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                yield self._at(PurePosixPath(name))

    def read_bytes(self, limit: int = MAX_SMALL) -> bytes:
        """The whole of a small file. Raises `CheckpointError`."""
        found = self.open()
        return found.read_bytes() if isinstance(found, Path) else whole(found, limit)


def directories_of(names: Iterable[str]) -> frozenset[str]:
    """The directories that files of these paths lie in."""
    return frozenset(str(parent) for name in names for parent in PurePosixPath(name).parents)


def whole(file: RangeFile, limit: int) -> bytes:
    """All bytes of a file. Raises `BrokenFile` where they are over `limit`."""
    if file.size > limit:
        raise BrokenFile(f"{file.name} is over {limit:,} bytes long.")
    return file.read_whole()
