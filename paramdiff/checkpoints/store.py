"""Object stores (S3, Google Cloud Storage, Azure) as directories, through obstore, which is an extra.

Credentials, region and endpoint come from the environment, as the stores' own tools read them (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME, …); so do retries from obstore.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from paramdiff.checkpoints.ranges import RangeFile
from paramdiff.checkpoints.tree import TreePath, directories_of
from paramdiff.errors import BrokenFile, ChangedWhileReading, CheckpointError, NotFound, UnsupportedFormat

SCHEMES = ("s3://", "gs://", "az://")


class StoreFile(RangeFile):
    """One object of a store. Its ETag is looked at again when all has been read."""

    def __init__(self, bucket: str, path: str, size: int, etag: str | None) -> None:
        self._bucket, self._object, self._etag = bucket, path, etag
        super().__init__(size, f"{bucket}/{path}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_bucket": self._bucket, "_object": self._object, "_etag": self._etag}

    def _fetch(self, start: int, end: int) -> bytearray:
        import obstore

        try:
            data = bytearray(obstore.get_range(_opened(self._bucket), self._object, start=start, end=end))
        except Exception as error:
            raise _said(error, self.name) from error
        if len(data) != end - start:
            raise ChangedWhileReading(
                f"{self.name} ended at byte {start + len(data):,} of {self.size:,}.", hint="Run again."
            )
        return data

    def verify(self) -> None:
        now = _head(self._bucket, self._object)
        if now is None or (now["size"], now["e_tag"]) != (self.size, self._etag):
            raise ChangedWhileReading(f"{self.name} was replaced while it was being read.", hint="Run again.")


class StorePath(TreePath):
    """An object, or what objects' names begin with, in a bucket (`s3://bucket`). What lies below `root` is listed once."""

    def __init__(self, bucket: str, path: str, root: str) -> None:
        super().__init__(path)
        self._bucket, self._root = bucket, root

    def _at(self, path: PurePosixPath) -> StorePath:
        return StorePath(self._bucket, "" if str(path) == "." else str(path), self._root)

    def _names(self) -> Iterable[str]:
        return _listed(self._bucket, self._root)

    def _directories(self) -> Collection[str]:
        return _directories(self._bucket, self._root)

    def __str__(self) -> str:
        return f"{self._bucket}/{self._within}".rstrip("/")

    def is_file(self) -> bool:
        name = str(self._path)
        if self._root and not name.startswith(f"{self._root}/"):  # beside what was listed, such as a config.json above
            return _head(self._bucket, name) is not None
        return name in self._names()

    def open(self) -> StoreFile:
        found = _head(self._bucket, str(self._path))
        if found is None:
            raise NotFound(f"{self} is not there.")
        return StoreFile(self._bucket, str(self._path), found["size"], found["e_tag"])


def path(ref: str) -> StorePath:
    """The place that `s3://bucket/path` names."""
    scheme, _, rest = ref.partition("://")
    bucket, _, within = rest.partition("/")
    if not bucket:
        raise NotFound(f"{ref} names no bucket.", hint=f"Write {scheme}://bucket/path.")
    within = within.strip("/")
    looks_like_file = PurePosixPath(within).suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".distcp")
    root = within.rpartition("/")[0] if looks_like_file else within
    return StorePath(f"{scheme}://{bucket}", within, root)


@cache
def _opened(bucket: str) -> Any:
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise UnsupportedFormat(
            f"{bucket} is in an object store, which takes an extra package to read.", hint="pip install 'paramdiff[stores]'."
        ) from error
    try:
        return from_url(bucket)
    except Exception as error:
        raise _said(error, bucket) from error


@cache
def _listed(bucket: str, root: str) -> dict[str, int]:
    """The objects below a prefix, with their sizes."""
    store = _opened(bucket)
    import obstore

    try:
        return {one["path"]: one["size"] for part in obstore.list(store, prefix=root or None) for one in part}
    except Exception as error:
        raise _said(error, f"{bucket}/{root}") from error


@cache
def _directories(bucket: str, root: str) -> frozenset[str]:
    return directories_of(_listed(bucket, root))


def _head(bucket: str, name: str) -> dict[str, Any] | None:
    """What a store says of an object; None where there is none."""
    store = _opened(bucket)
    import obstore

    try:
        return dict(obstore.head(store, name))
    except FileNotFoundError:
        return None
    except Exception as error:
        raise _said(error, f"{bucket}/{name}") from error


def _said(error: Exception, name: str) -> CheckpointError:
    """A sentence for what obstore raises, without its text, which holds addresses and may hold signatures."""
    if isinstance(error, CheckpointError):
        return error
    kind = type(error).__name__
    if kind in ("PermissionDeniedError", "UnauthenticatedError", "PermissionError"):
        return CheckpointError(f"{name} may not be read with the credentials of this environment.")
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in str(error):
        return NotFound(f"{name} is not there.")
    return BrokenFile(f"{name} could not be read ({kind}).", hint="Check credentials, region and endpoint, or try again.")
