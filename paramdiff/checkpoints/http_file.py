"""Files behind HTTP, read in ranges: no more than is asked for, several requests in flight, resumed where one broke off.

Readers say in advance what they are about to read (`announce`); that is fetched in the background, neighbouring ranges in
one request, large ones in several. What was not announced is read in blocks of its own. A redirect (the Hub sends one to its
storage) is followed once and remembered until it expires; the token goes to the host that it is for and to no other.
"""

from __future__ import annotations

import queue
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from paramdiff.errors import BrokenFile, ChangedWhileReading, CheckpointError, NotFound

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

REQUEST = 16 << 20  # bytes of one request
AHEAD = 64 << 20  # bytes of one file that are fetched and not yet read
GAP = 1 << 20  # bytes between two ranges that are fetched together rather than apart
BLOCK = 1 << 20  # bytes fetched for what was not announced
KEPT = 8  # such blocks of one file
IN_FLIGHT = 8  # requests of one process
ATTEMPTS = 8  # without a byte of progress
TIMEOUT = 60  # seconds without an answer, or a byte
LONGEST_WAIT = 300  # seconds that a server may ask for
BUSY = (408, 425, 429, 500, 502, 503, 504)
SAID = {
    "NewConnectionError": "no connection", "NameResolutionError": "the host's name is not known",
    "ReadTimeoutError": "no answer in time", "ConnectTimeoutError": "no connection in time",
    "ProtocolError": "the connection broke", "IncompleteRead": "the connection broke", "SSLError": "TLS failed",
}  # fmt: skip
EXPIRED = (401, 403, 404, 410)  # what a storage answers when the address that a redirect gave is no longer good


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request, for bytes `start` to `end`, of which `needed` will be read."""

    start: int
    end: int
    needed: int


class HttpFile:
    """One file of `size` bytes at `url`. `name` is what messages call it, `headers` what goes to the url's own host.

    Safe to read from several threads; pickled without what was fetched.
    """

    def __init__(self, url: str, size: int, name: str, headers: dict[str, str] | None = None) -> None:
        self.url, self.size, self.name = url, size, name
        self._headers = dict(headers or {})
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._direct: str | None = None  # where a redirect led
        self._etags: dict[str, str] = {}  # by host
        self._planned: deque[Wanted] = deque()
        self._coming: dict[Wanted, Future[bytearray]] = {}
        self._left: dict[Wanted, int] = {}  # bytes that are still to be read of each that is coming
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._closed = False

    def close(self) -> None:
        """Fetch no more. What is on its way is let go."""
        with self._lock:
            self._closed = True
            for future in self._coming.values():
                future.cancel()
            self._planned.clear()
            self._coming.clear()
            self._left.clear()
            self._blocks.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "size": self.size, "name": self.name, "_headers": self._headers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def announce(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Say which (first byte, end) ranges will be read, each once and in about this order. They are fetched in the
        background, `AHEAD` bytes at a time."""
        with self._lock:
            self._planned.extend(_requests(ranges))
            self._advance()

    def _advance(self) -> None:
        """Begin to fetch what comes next. The lock is held."""
        while self._planned and sum(wanted.end - wanted.start for wanted in self._coming) < AHEAD:
            self._begin(self._planned.popleft())

    def _begin(self, wanted: Wanted) -> None:
        self._coming[wanted] = _crew().submit(self._fetch, wanted.start, wanted.end)
        self._left[wanted] = wanted.needed

    def read_into(self, position: int, buffer: memoryview) -> int:
        """Fill `buffer`, as far as the file goes. Returns how many bytes that are."""
        done, wanted = 0, max(0, min(len(buffer), self.size - position))
        while done < wanted:
            at = position + done
            part = self._announced(at, wanted - done) or self._block(at, wanted - done)
            buffer[done : done + len(part)] = part
            done += len(part)
        return done

    def _announced(self, at: int, length: int) -> memoryview | None:
        """Up to `length` bytes of an announced range from byte `at` on, if there is one. What was read is let go."""
        with self._lock:
            found = next((w for w in (*self._coming, *self._planned) if w.start <= at < w.end), None)
            if found is None:
                return None
            if found not in self._coming:
                self._planned.remove(found)
                self._begin(found)
            future = self._coming[found]
        part = memoryview(future.result())[at - found.start : at - found.start + length]
        with self._lock:
            if found in self._left:
                self._left[found] -= len(part)
                if self._left[found] <= 0:
                    del self._left[found], self._coming[found]
            self._advance()
        return part

    def _block(self, at: int, length: int) -> memoryview:
        start = at - at % BLOCK
        with self._lock:
            if start in self._blocks:
                self._blocks.move_to_end(start)
                return memoryview(self._blocks[start])[at - start : at - start + length]
        data = bytes(self._fetch(start, min(start + BLOCK, self.size)))
        with self._lock:
            self._blocks[start] = data
            while len(self._blocks) > KEPT:
                self._blocks.popitem(last=False)
        return memoryview(data)[at - start : at - start + length]

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
            failures = 0 if done > before else failures + 1
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
        return pool().request("GET", url, headers={**own, **asked}, preload_content=False)

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
    response = pool().request("GET", url, headers={**(headers or {}), "Range": "bytes=0-0"}, preload_content=False)
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


def _requests(ranges: Iterable[tuple[int, int]]) -> Iterator[Wanted]:
    """Ranges as they are asked for: neighbours together, none over `REQUEST` bytes.

    >>> [*_requests([(0, 10), (20, 30), (5_000_000, 5_000_010)])]
    [Wanted(start=0, end=30, needed=20), Wanted(start=5000000, end=5000010, needed=10)]
    """
    joined: list[list[tuple[int, int]]] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if joined and start - joined[-1][-1][1] <= GAP:
            joined[-1].append((start, end))
        else:
            joined.append([(start, end)])
    for parts in joined:
        first, last = parts[0][0], parts[-1][1]
        count = -(-(last - first) // REQUEST)
        for number in range(count):
            low, high = first + (last - first) * number // count, first + (last - first) * (number + 1) // count
            needed = sum(max(0, min(end, high) - max(start, low)) for start, end in parts)
            if needed:
                yield Wanted(low, high, needed)


@cache
def pool() -> PoolManager:
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
        total=12, connect=5, read=5, redirect=5, status=8, backoff_factor=0.3, backoff_max=30, backoff_jitter=0.2,
        status_forcelist=BUSY, raise_on_status=False, respect_retry_after_header=True, retry_after_max=LONGEST_WAIT,
    )  # fmt: skip
    timeout = urllib3.Timeout(connect=20, read=TIMEOUT)
    return urllib3.PoolManager(num_pools=8, maxsize=IN_FLIGHT + 4, retries=patient, timeout=timeout)


class Crew:
    """Threads that fetch. Unlike those of `ThreadPoolExecutor` they do not keep a process from ending: after Ctrl-C nobody
    waits for what is still to come."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future[bytearray], Callable[..., bytearray], tuple[int, ...]]]
        self._work = queue.SimpleQueue()
        for number in range(IN_FLIGHT):
            threading.Thread(target=self._run, name=f"paramdiff-fetch-{number}", daemon=True).start()

    def submit(self, function: Callable[..., bytearray], *arguments: int) -> Future[bytearray]:
        future: Future[bytearray] = Future()
        self._work.put((future, function, arguments))
        return future

    def _run(self) -> None:
        while True:
            future, function, arguments = self._work.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:  # handed to the thread that waits, which raises it
                    future.set_exception(error)


@cache
def _crew() -> Crew:
    return Crew()


def said(error: BaseException) -> str:
    """What went wrong, in a few words and without addresses, which may hold signatures."""
    reason = getattr(error, "reason", None) or error
    return SAID.get(type(reason).__name__, type(reason).__name__)
