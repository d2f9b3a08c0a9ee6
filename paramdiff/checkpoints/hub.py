"""Repositories of the Hugging Face Hub as directories: listed once, at one commit, their files read in ranges.

`huggingface_hub` finds the endpoint (HF_ENDPOINT), the token (HF_TOKEN, `hf auth login`) and the local cache, whose files
are used where they are those of the commit.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from paramdiff.checkpoints.http_file import HttpFile, request, said
from paramdiff.checkpoints.tree import TreePath, directories_of
from paramdiff.errors import BrokenFile, CheckpointError, NotFound

SCHEME = "hf://"
ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Listed:
    """One file of a repository. `content` is the hash of its bytes where the Hub knows one."""

    size: int
    content: str | None


@dataclass(frozen=True, eq=False)
class Repository:
    """A repository at one commit."""

    id: str
    commit: str
    files: Mapping[str, Listed]
    endpoint: str | None = None
    warning: str | None = None


def looks_like(ref: str) -> bool:
    """True for what may be `org/name`, `org/name@revision` or a folder in it."""
    repo, _, _ = split(ref)
    return not ref.startswith(("/", ".", "~")) and ID.fullmatch(repo) is not None


def split(ref: str) -> tuple[str, str | None, str]:
    """(repository, revision, path within) of a reference.

    >>> split("hf://org/name@refs%2Fpr%2F1/sub/model.safetensors")
    ('org/name', 'refs/pr/1', 'sub/model.safetensors')
    """
    parts = ref.removeprefix(SCHEME).split("/")
    name, at, revision = parts[1].partition("@") if len(parts) > 1 else ("", "", "")
    return "/".join([parts[0], name]), revision.replace("%2F", "/") if at else None, "/".join(p for p in parts[2:] if p)


class HubPath(TreePath):
    """A file or directory of a repository. `guessed` is what the user typed, where that could have been a local path."""

    def __init__(self, repo: str, revision: str | None, path: str, guessed: str | None = None) -> None:
        super().__init__(path)
        self._repo, self._revision, self._guessed = repo, revision, guessed

    @property
    def repository(self) -> Repository:
        try:
            return listed(self._repo, self._revision, os.environ.get("HF_ENDPOINT"))
        except NotFound as error:
            if self._guessed is None:
                raise
            why = error.message[0].lower() + error.message[1:]
            raise NotFound(f"No such path: {self._guessed}, and {why}", hint=error.hint) from error

    def _at(self, path: PurePosixPath) -> HubPath:
        return HubPath(self._repo, self._revision, "" if str(path) == "." else str(path), self._guessed)

    def _names(self) -> Iterable[str]:
        return self.repository.files

    def _directories(self) -> Collection[str]:
        return _directories(self.repository)

    @property
    def name(self) -> str:
        return self._path.name or self._repo.rpartition("/")[2]

    def __str__(self) -> str:
        revision = f"@{self._revision.replace('/', '%2F')}" if self._revision else ""
        return f"{SCHEME}{self._repo}{revision}/{self._within}".rstrip("/")

    def open(self) -> HttpFile | Path:
        """The file in the local cache, if it is there, else behind HTTP."""
        repository, name = self.repository, str(self._path)
        if name not in repository.files:
            raise NotFound(f"{self} is not there.")
        cached = _cached(repository, name)
        if cached is not None:
            return cached
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self._repo, name, revision=repository.commit, endpoint=repository.endpoint)
        return HttpFile(url, repository.files[name].size, str(self), _headers())

    def download(self) -> None:
        """Put it into the local cache."""
        from huggingface_hub import snapshot_download

        repository = self.repository
        wanted = [str(self._path), f"{self._path}/*"] if self._within else None
        snapshot_download(repository.id, revision=repository.commit, endpoint=repository.endpoint, allow_patterns=wanted)

    @property
    def content(self) -> str | None:  # type: ignore[override]
        """The hash of the file's bytes, where the Hub knows it."""
        listed = self.repository.files.get(str(self._path))
        return listed.content if listed else None

    def provenance(self) -> dict[str, Any]:
        return {"repository": self._repo, "revision": self.repository.commit}


def path(ref: str, *, guessed: bool = False) -> HubPath:
    """The place that `hf://org/name@revision/path` names, or the same without `hf://`, which may be `guessed` to be one.

    Raises `NotFound` for what is no such reference.
    """
    repo, revision, within = split(ref)
    if not ID.fullmatch(repo) or (revision is not None and (not revision or "@" in revision)):
        raise NotFound(f"{ref} is no reference to the Hub.", hint="Write org/name, org/name@revision or org/name/folder.")
    return HubPath(repo, revision, within, ref if guessed else None)


@cache
def _directories(repository: Repository) -> frozenset[str]:
    return directories_of(repository.files)


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return dict(build_hf_headers(library_name="paramdiff"))


def _cached(repository: Repository, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository.id, name, revision=repository.commit)
    return Path(found) if isinstance(found, str) else None


@cache
def listed(repo: str, revision: str | None, endpoint: str | None) -> Repository:
    """A repository's files and their sizes, in one request; the revision becomes a commit, once for the process.

    Raises `NotFound` for one that is not there or a Hub out of reach, `CheckpointError` for one that may not be read.
    """
    with warnings.catch_warnings():  # in a notebook without ipywidgets, its progress bars complain
        warnings.filterwarnings("ignore", message="IProgress not found")
        import huggingface_hub.utils  # noqa: F401
    from huggingface_hub import constants
    from urllib3.exceptions import HTTPError

    where = repo + (f"@{revision}" if revision else "")
    base = (endpoint or constants.ENDPOINT).rstrip("/")
    url = f"{base}/api/models/{repo}" + (f"/revision/{quote(revision, safe='')}" if revision else "")
    if constants.HF_HUB_OFFLINE:
        return _unreachable(repo, revision, "HF_HUB_OFFLINE is set", None)
    try:
        # Few attempts: where there is no network, most likely a local path was mistyped.
        answer = request(f"{url}?blobs=true", _headers(), connect=1, read=1)
        data = answer.data
    except HTTPError as error:
        return _unreachable(repo, revision, said(error), error)
    code = answer.headers.get("X-Error-Code", "")
    if code == "GatedRepo" or (answer.status == 403 and not code):
        raise CheckpointError(
            f"{where} is gated, and this token has no access to it.",
            hint=f"Accept its terms at the Hub's page of {repo}, then run `hf auth login` or set HF_TOKEN.",
        )
    if code == "RevisionNotFound":
        raise NotFound(f"{repo} has no revision {revision!r} on the Hub.")
    if answer.status in (401, 404) or code == "RepoNotFound":
        raise NotFound(
            f"There is no model {where} on the Hub, or none that may be seen.",
            hint="Check the spelling; for a private one run `hf auth login` or set HF_TOKEN.",
        )
    if answer.status != 200:
        return _unreachable(repo, revision, f"it answered {answer.status}", None)
    try:
        about = json.loads(data.decode("utf-8"))
        files = {str(one["rfilename"]): _listed(one) for one in about["siblings"]}
        return Repository(repo, str(about["sha"]), files, base)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFile(f"{base} gave no list of files for {where}; is HF_ENDPOINT a Hub?") from error


def _listed(one: Mapping[str, Any]) -> Listed:
    lfs = one.get("lfs") or {}
    return Listed(int(one.get("size") or lfs.get("size") or 0), lfs.get("sha256") or one.get("blobId"))


def _unreachable(repo: str, revision: str | None, why: str, error: BaseException | None) -> Repository:
    """What the local cache holds, for when the Hub cannot be asked. Raises `NotFound` where that is nothing."""
    found = _offline(repo, revision)
    if found is None:
        raise NotFound(
            f"The Hub could not be asked for {repo}{f'@{revision}' if revision else ''} ({why}).",
            hint="Check the spelling, or the connection and HF_ENDPOINT.",
        ) from error
    said_so = (
        f"The Hub could not be asked for {repo} ({why}); what the local cache holds of it is read, of commit {found.commit}."
    )
    return replace(found, warning=said_so)


def _offline(repo: str, revision: str | None) -> Repository | None:
    """What the local cache holds of a repository, for when the Hub cannot be reached."""
    from huggingface_hub import snapshot_download

    try:
        where = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:  # not in the cache
        return None
    files = {str(f.relative_to(where)): Listed(f.stat().st_size, None) for f in where.rglob("*") if f.is_file()}
    return Repository(repo, where.name, files)
