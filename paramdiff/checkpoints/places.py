"""Where a reference points: a local path, a repository of the Hub, a file behind a URL. One way to look at each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from paramdiff.checkpoints import hub, store
from paramdiff.checkpoints.http_file import HttpFile, size_of
from paramdiff.checkpoints.hub import HubPath
from paramdiff.checkpoints.store import StorePath
from paramdiff.checkpoints.tree import MAX_SMALL, TreePath
from paramdiff.errors import BrokenFile, CheckpointError, NotFound

WEB = ("http://", "https://")


class WebPath(TreePath):
    """A file behind a URL, and its neighbours; there is no way to list them."""

    def __init__(self, url: str, *, guessed: bool = False) -> None:
        self._guessed = guessed  # a neighbour of what was given, which may or may not be there
        self._parts = urlsplit(url)
        self._size: int | None = None
        self._asked = False
        super().__init__(self._parts.path)

    def _at(self, path: PurePosixPath) -> WebPath:
        return WebPath(self._parts._replace(path=str(path)).geturl(), guessed=True)

    def _names(self) -> Iterable[str]:
        return ()

    def __str__(self) -> str:
        """The address without its query and user, which may hold a signature or a password."""
        host = self._parts.netloc.rpartition("@")[2]
        return self._parts._replace(netloc=host, query="", fragment="").geturl()

    def __fspath__(self) -> str:
        return self._parts.geturl()

    def is_dir(self) -> bool:
        return False

    def is_file(self) -> bool:
        return self.exists()

    def exists(self) -> bool:
        if not self._asked:
            self._asked = True
            try:
                self._size = size_of(self._parts.geturl(), str(self))
            except CheckpointError as error:  # storages often forbid what is not there
                if not self._guessed or isinstance(error, BrokenFile):
                    raise
        return self._size is not None

    def open(self) -> HttpFile:
        if not self.exists() or self._size is None:
            raise NotFound(f"{self} is not there.")
        return HttpFile(self._parts.geturl(), self._size, str(self))


Place = Path | HubPath | StorePath | WebPath


def place(ref: str) -> Place:
    """Where a reference points. A local path wins over a Hub id of the same spelling; `hf://` means the Hub.

    Raises `NotFound` for what cannot be a path.
    """
    if ref.startswith(hub.SCHEME):
        return hub.path(ref)
    if ref.startswith(WEB):
        try:
            return WebPath(ref)
        except ValueError as error:
            raise NotFound(f"{ref.partition('?')[0]} is no address.") from error
    if ref.startswith(store.SCHEMES):
        return store.path(ref)
    try:
        path = Path(ref).expanduser()
        if not path.exists() and hub.looks_like(ref) and not Path(path.parts[0]).exists():
            return hub.path(ref, guessed=True)
        return path
    except RuntimeError as error:
        raise NotFound(f"No such path: {ref} (there is no such user).") from error
    except OSError as error:  # a parent that may not be searched, a name that is too long
        raise NotFound(f"Cannot look at {ref}: {error.strerror}.") from error


def split_key(ref: str) -> tuple[str, str | None]:
    """What a reference points to, and the entry within that `::` names.

    >>> split_key("run.pt::model"), split_key("http://[::1]/run.pt::ema")
    (('run.pt', 'model'), ('http://[::1]/run.pt', 'ema'))
    """
    before, slash, last = ref.rpartition("/") if ref.startswith(WEB) else ("", "", ref)
    last, _, key = last.partition("::")
    return before + slash + last, key or None


def shown(ref: str) -> str:
    """A reference as it may be printed and written: of an address, without what may be secret."""
    return str(place(split_key(ref)[0])) if ref.startswith(WEB) else ref


def download(ref: str) -> None:
    """Put what a reference to the Hub names into the local cache, from which it is read then; of others nothing."""
    where = place(split_key(ref)[0])
    if isinstance(where, HubPath):
        where.download()


def matching(where: Place, pattern: str) -> list[Place]:
    """The files below a place whose path fits a pattern, in order."""
    found: list[Place] = [*where.glob(pattern)]
    return sorted(found, key=str)


def read_small(where: Place, limit: int = MAX_SMALL) -> bytes:
    """The whole of a small file, wherever it is. Raises `OSError`, `ValueError` for one over `limit` bytes, or
    `CheckpointError`; a pipe or a device is refused."""
    if not isinstance(where, Path):
        return where.read_bytes(limit)
    if where.exists() and not where.is_file():
        raise ValueError("it is not a regular file")
    if where.stat().st_size > limit:
        raise ValueError(f"it is over {limit:,} bytes long")
    return where.read_bytes()
