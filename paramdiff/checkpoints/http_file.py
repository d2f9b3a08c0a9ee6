"""Files behind HTTP, read in ranges, resumed where a connection broke.

A redirect (the Hub sends one to its storage) is followed once and remembered until it expires; the token goes to the host
that it is for and to no other.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from paramdiff.checkpoints.ranges import IN_FLIGHT, RangeFile
from paramdiff.errors import BrokenFile, ChangedWhileReading, CheckpointError, NotFound

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

PAUSE = 0.3  # seconds, doubled with every attempt
ATTEMPTS = 8  # without a byte of progress
TIMEOUT = 60  # seconds without an answer, or a byte
LONGEST_WAIT = 300  # seconds that a server may ask for
BUSY = (408, 425, 429, 500, 502, 503, 504)
SAID = {
    "NewConnectionError": "no connection", "NameResolutionError": "the host's name is not known",
    "ReadTimeoutError": "no answer in time", "ConnectTimeoutError": "no connection in time",
    "ProtocolError": "the connection broke", "IncompleteRead": "the connection broke", "SSLError": "TLS failed",
}  # fmt: skip
EXPIRED = (400, 401, 403, 404, 410)  # what a storage answers when the address that a redirect gave is no longer good


class HttpFile(RangeFile):
    """One file of `size` bytes at `url`. `name` is what messages call it, `headers` what goes to the url's own host."""

    def __init__(self, url: str, size: int, name: str, headers: dict[str, str] | None = None) -> None:
        self.url, self._headers = url, dict(headers or {})
        super().__init__(size, name)

    def _start(self) -> None:
        super()._start()
        self._direct: str | None = None  # where a redirect led
        self._etags: dict[str, str] = {}  # by host

    def __getstate__(self) -> dict[str, Any]:
        kept = {"url": self.url, "_headers": self._headers, "_etags": dict(self._etags)}  # a worker must see the same file
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._etags = state["_etags"]

    def _fetch(self, start: int, end: int) -> bytearray:
        """Bytes `start` to `end`, in as many requests as it takes. Raises `CheckpointError`."""
        from urllib3.exceptions import HTTPError

        data, done, failures, last = bytearray(end - start), 0, 0, ""
        while done < len(data):
            if failures >= ATTEMPTS:
                raise BrokenFile(
                    f"{self.name} could not be read: {last} at byte {start + done:,}, {failures} times in a row.",
                    hint="Try again later, or use --download.",
                )
            before = done
            try:
                for part in self._parts(start + done, end):
                    data[done : done + len(part)] = part
                    done += len(part)
                    if self._closed:
                        raise BrokenFile(f"{self.name} was closed while it was being read.")
                last = "the connection ended"
            except (HTTPError, OSError) as error:
                last = said(error)
                with self._lock:
                    self._direct = None  # where a redirect led may be gone
            failures = 0 if done > before else failures + 1
            if failures:
                time.sleep(min(PAUSE * 2**failures, 30) * random.uniform(0.8, 1.2))
        return data

    def _parts(self, start: int, end: int) -> Iterator[bytes]:
        """The body of one request, never more than was asked for."""
        response = self._ask(start, end)
        try:
            left = end - start
            while left > 0:
                part = response.read1(min(left, 1 << 20))  # what is there, so that nothing is lost if the rest never comes
                if not part:
                    return
                yield part[:left]
                left -= len(part)
        finally:
            if left > 0:  # what is still to come would be taken for the next answer
                response.close()
            response.release_conn()

    def _ask(self, start: int, end: int) -> BaseHTTPResponse:
        asked = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with self._lock:
            url = self._direct or self.url
        response = self._request(url, asked)
        led_to = _led_to(response) or (url if url != self.url else None)
        if response.status in EXPIRED and led_to:  # an address that a redirect gave, and that is no longer good
            response.close()
            response = self._request(self.url, asked)
            led_to = _led_to(response)
        with self._lock:
            self._direct = led_to if response.status in (200, 206) else None
        try:
            self._check(response, start, end, urlsplit(led_to or self.url).netloc)
        except BaseException:
            response.close()
            raise
        return response

    def _request(self, url: str, asked: dict[str, str]) -> BaseHTTPResponse:
        own = self._headers if urlsplit(url)[:2] == urlsplit(self.url)[:2] else {}
        return request(url, {**own, **asked}, connect=0, read=0)  # of which `_fetch` has its own attempts

    def _check(self, response: BaseHTTPResponse, start: int, end: int, host: str) -> None:
        refuse(response.status, self.name)
        if response.status == 200 and (start, end) != (0, self.size):
            raise BrokenFile(
                f"{self.name} cannot be read in ranges: the server sends the whole of it, {self.size:,} bytes.",
                hint="Download it, or use --download.",
            )
        if response.status == 416:
            raise ChangedWhileReading(f"{self.name} has become shorter than {end:,} bytes.", hint="Run again.")
        if response.status == 206:
            said = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", said)
            if match is not None and match[3] not in ("*", str(self.size)):
                raise ChangedWhileReading(f"{self.name} had {self.size:,} bytes and has {match[3]} now.", hint="Run again.")
            if match is None or (int(match[1]), int(match[2])) != (start, end - 1):
                raise BrokenFile(f"{self.name}: the server answered {said[:80]!r} to a request for bytes {start}-{end - 1}.")
        elif response.status != 200:
            raise BrokenFile(f"{self.name} could not be read: the server answered {response.status}.")
        etag = response.headers.get("ETag")
        if etag is not None:
            with self._lock:
                known = self._etags.setdefault(host, etag)
            if known != etag:
                raise ChangedWhileReading(f"{self.name} was replaced while it was being read.", hint="Run again.")


def _led_to(response: BaseHTTPResponse) -> str | None:
    """Where redirects led a request, if there were any; without, urllib3 gives the path alone."""
    return response.url if response.url and urlsplit(response.url).netloc else None


def size_of(url: str, name: str, headers: dict[str, str] | None = None) -> int | None:
    """The size of a file behind a url, or None where there is none. Raises `CheckpointError` for other answers."""
    from urllib3.exceptions import HTTPError

    try:
        response = request(url, {**(headers or {}), "Range": "bytes=0-0"}, connect=1, read=1)
    except (HTTPError, ValueError) as error:
        raise NotFound(f"{name} could not be asked for ({said(error)}).", hint="Check the address and connection.") from None
    response.close()
    if response.status == 404:
        return None
    refuse(response.status, name)
    match = re.fullmatch(r"bytes 0-0/(\d+)", response.headers.get("Content-Range", ""))
    if response.status == 206 and match:
        return int(match[1])
    if response.status == 416:
        return 0
    raise BrokenFile(f"{name} cannot be read in ranges: the server answered {response.status}.", hint="Download it first.")


def refuse(status: int, name: str) -> None:
    """Raise the sentence for a status that no retry will change."""
    if status in (401, 403):
        raise CheckpointError(
            f"{name} may not be read with this token, or without one (the server answered {status}).",
            hint="Accept its terms on the Hub, then run `hf auth login` or set HF_TOKEN.",
        )
    if status in (404, 410):
        raise NotFound(f"{name} is not there (the server answered {status}).")
    if status in BUSY:
        raise BrokenFile(
            f"{name} could not be read: the server answered {status}, again and again.", hint="Try again later."
        )


def request(url: str, headers: dict[str, str], **retries: int) -> BaseHTTPResponse:
    """Ask for a url, through the proxy that the environment names for it. `retries` are those of urllib3's `Retry`."""
    parts = urlsplit(url)
    proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    connections = pool(proxy)
    patient = connections.connection_pool_kw["retries"].new(**retries)
    return connections.request("GET", url, headers=headers, preload_content=False, retries=patient)


@cache
def pool(proxy: str | None) -> PoolManager:
    """Connections of this process, and how requests are repeated: as the server asks, else after growing pauses."""
    import urllib3

    class Patient(urllib3.Retry):
        """Also hears the Hub's `RateLimit` header, which says in how many seconds there is room again."""

        def get_retry_after(self, response: Any) -> float | None:
            found = super().get_retry_after(response)
            if found is None and response.status == 429:
                match = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
                found = float(match[1]) if match else None
            return found

    patient = Patient(
        total=12, connect=5, read=5, redirect=5, status=8, backoff_factor=PAUSE, backoff_max=30, backoff_jitter=0.2,
        status_forcelist=BUSY, raise_on_status=False, respect_retry_after_header=True, retry_after_max=LONGEST_WAIT,
    )  # fmt: skip
    settings: dict[str, Any] = {"num_pools": 8, "maxsize": IN_FLIGHT + 4, "retries": patient}
    settings["timeout"] = urllib3.Timeout(connect=20, read=TIMEOUT)
    return urllib3.ProxyManager(proxy, **settings) if proxy else urllib3.PoolManager(**settings)


def said(error: BaseException) -> str:
    """What went wrong, in a few words and without addresses, which may hold signatures."""
    reason = getattr(error, "reason", None) or error
    return SAID.get(type(reason).__name__, type(reason).__name__)
