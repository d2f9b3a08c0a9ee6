"""A Hub on loopback: the requests that `huggingface_hub` and paramdiff make of the real one, and faults on demand.

Repositories are directories. `/api/models/ORG/NAME[/revision/REV]` lists files, `/ORG/NAME/resolve/REV/FILE` redirects to
`/cdn/…` of a second server (another host for the client), which answers ranges. Everything that was asked is in `log`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
Fault = Callable[["Asked"], Any]


@dataclass(frozen=True)
class Asked:
    """One request: which server (hub or cdn), path, range, token if one came with it; `number` counts those of a server."""

    server: str
    method: str
    path: str
    range: tuple[int, int] | None
    token: str | None
    number: int


@dataclass
class Hub:
    """`repos`: name → directory. `fault` is asked before each answer: None for none, or (status, headers), "reset" (half of
    the body, then the connection breaks), "short" (a body that ends early), "whole" (200 instead of 206), "shifted" (another
    range than asked), "changed" (another ETag). `gated` are repositories that want a token."""

    repos: dict[str, Path]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": COMMIT})
    gated: set[str] = field(default_factory=set)
    token: str = "hf_secret_of_the_tests"
    fault: Fault = lambda _: None
    latency: float = 0.0
    rate: float = 0.0  # bytes per second of all answers together; 0: no limit
    redirect: bool = True
    log: list[Asked] = field(default_factory=list)
    url: str = ""
    cdn: str = ""
    lock: Any = field(default_factory=threading.Lock)
    free_at: float = 0.0

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """The ranges of a file that were asked of whoever answers."""
        server = "cdn" if self.redirect else "hub"
        return [a.range for a in self.log if a.server == server and a.path.endswith(name) and a.range and a.method == "GET"]

    def pay(self, nbytes: int) -> None:
        """Wait as long as the limit of the rate asks."""
        if self.rate:
            with self.lock:
                self.free_at = max(self.free_at, time.monotonic()) + nbytes / self.rate
                wait = self.free_at - time.monotonic()
            if wait > 0:
                time.sleep(wait)


@cache
def digest_of(file: Path, _changed: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def handler(hub: Hub, server: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            token = self.headers.get("Authorization")
            with hub.lock:
                number = sum(1 for a in hub.log if a.server == server)
                asked = Asked(
                    server, self.command, path, (int(match[1]), int(match[2]) + 1) if match else None, token, number
                )
                hub.log.append(asked)
            if hub.latency:
                time.sleep(hub.latency)
            fault = hub.fault(asked)
            if isinstance(fault, tuple):
                self.answer(fault[0], b"", fault[1])
            elif path.startswith("/api/models/"):
                self.list(path)
            elif found := re.fullmatch(r"(?:/cdn)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.file(*found.groups(), asked, fault)
            else:
                self.answer(404, b"")

        do_HEAD = do_GET  # noqa: N815

        def etag(self, path: Path) -> str:
            return f'"{hashlib.sha1(str(path).encode()).hexdigest()}"'

        def allowed(self, repo: str) -> bool:
            return repo not in hub.gated or self.headers.get("Authorization") == f"Bearer {hub.token}"

        def list(self, path: str) -> None:
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/(.+))?", path)
            repo, revision = (match[1], match[2] or "main") if match else ("", "")
            if repo not in hub.repos:
                self.answer(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
                return
            if not self.allowed(repo):
                self.answer(403, b'{"error":"gated"}', {"X-Error-Code": "GatedRepo"})
                return
            if revision not in hub.revisions and revision not in hub.revisions.values():
                self.answer(404, b'{"error":"Revision not found"}', {"X-Error-Code": "RevisionNotFound"})
                return
            root, siblings = hub.repos[repo], []
            for file in sorted(f for f in root.rglob("*") if f.is_file()):
                digest, size = digest_of(file, file.stat().st_mtime_ns), file.stat().st_size
                entry: dict[str, Any] = {"rfilename": str(file.relative_to(root)), "size": size, "blobId": digest[:40]}
                if file.suffix in (".safetensors", ".bin", ".distcp", ".pt"):
                    entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
                siblings.append(entry)
            if "/tree/" in path:
                tree = [{"type": "file", "path": s["rfilename"], "oid": s["blobId"], **s} for s in siblings]
                for entry in tree:
                    entry["lfs"] = {**entry["lfs"], "oid": entry["lfs"]["sha256"]} if "lfs" in entry else None
                self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
                return
            commit = hub.revisions.get(revision, revision)
            about = {"id": repo, "_id": "1", "sha": commit, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

        def file(self, repo: str, revision: str, name: str, asked: Asked, fault: Any) -> None:
            path = hub.repos.get(repo, Path("/nowhere")) / name
            if not path.is_file():
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            if server == "hub" and not self.allowed(repo):
                self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
                return
            if server == "hub" and hub.redirect:
                where = f"{hub.cdn}/cdn/{repo}/resolve/{revision}/{name}?Signature=secret"
                self.answer(302, b"", {"Location": where, "X-Repo-Commit": COMMIT, "X-Linked-ETag": self.etag(path)})
                return
            size = path.stat().st_size
            start, end = asked.range or (0, size)
            if start >= size and asked.range:
                self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            end = min(end, size)
            headers = {
                "ETag": '"other"' if fault == "changed" else '"one"',
                "Accept-Ranges": "bytes",
                "X-Repo-Commit": COMMIT,
            }
            if asked.range and fault != "whole":
                shift = 1 if fault == "shifted" else 0
                headers["Content-Range"] = f"bytes {start + shift}-{end - 1 + shift}/{size}"
            with path.open("rb") as stream:
                stream.seek(0 if fault == "whole" else start)
                body = stream.read(size if fault == "whole" else end - start)
            self.answer(206 if asked.range and fault != "whole" else 200, body, headers, fault)

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: Any = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault in ("reset", "short"):
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return
            for at in range(0, len(body), 1 << 18):
                part = body[at : at + (1 << 18)]
                hub.pay(len(part))
                try:
                    self.wfile.write(part)
                except OSError:  # the client has what it wanted
                    self.close_connection = True
                    return

    return Handler


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """The two servers of a hub. The client sees them as different hosts: 127.0.0.1 and localhost."""
    servers = []
    for name in ("hub", "cdn"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub, name))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    hub.url = f"http://127.0.0.1:{servers[0].server_port}"
    hub.cdn = f"http://localhost:{servers[1].server_port}"
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


if __name__ == "__main__":  # python -m tests.remote.server ORG/NAME=DIR… serves until it is stopped
    import sys

    told = dict(arg.split("=", 1) for arg in sys.argv[1:])
    options = {key: float(told.pop(key)) for key in ("latency", "rate") if key in told}
    with running(Hub({name: Path(where) for name, where in told.items()}, **options)) as served:  # type: ignore[arg-type]
        print(served.url, flush=True)
        threading.Event().wait()
