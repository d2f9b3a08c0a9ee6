"""Files that are read in ranges over a network: fetched ahead as announced, neighbours together, several requests in flight.

What kind of network it is, `_fetch` of a subclass knows. Readers say in advance what they are about to read (`announce`);
that is fetched in the background, neighbouring ranges in one request, large ones in several. What was not announced is read
in blocks of its own.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from typing import Any

REQUEST = 16 << 20  # bytes of one request
AHEAD = 64 << 20  # bytes of one file that are fetched and not yet read
GAP = 1 << 20  # bytes between two ranges that are fetched together rather than apart
BLOCK = 1 << 20  # bytes fetched for what was not announced
KEPT = 8  # such blocks of one file
IN_FLIGHT = 8  # requests of one process


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request, for the bytes from the first of `parts` to the last, of which those of `parts` will be read."""

    parts: tuple[tuple[int, int], ...]

    @property
    def start(self) -> int:
        return self.parts[0][0]

    @property
    def end(self) -> int:
        return self.parts[-1][1]

    @property
    def needed(self) -> int:
        return sum(end - start for start, end in self.parts)


class RangeFile:
    """One file of `size` bytes; `name` is what messages call it. Safe to read from several threads."""

    def __init__(self, size: int, name: str) -> None:
        self.size, self.name = size, name
        self._start()

    def _fetch(self, start: int, end: int) -> bytearray:
        """Bytes `start` to `end`. Raises `CheckpointError`. Long ones look at `_closed` on the way."""
        raise AssertionError("a subclass knows how")

    def verify(self) -> None:
        """Raise `ChangedWhileReading` if the file is no longer the one that was opened, where reading did not show it."""

    def _start(self) -> None:
        self._lock = threading.Lock()
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
        return {"size": self.size, "name": self.name}  # nothing of what was fetched

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

    def read_whole(self) -> bytes:
        """All of a small file, in one request."""
        return bytes(self._fetch(0, self.size)) if self.size else b""

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
            announced = ((w, e) for w in (*self._coming, *self._planned) for s, e in w.parts if s <= at < e)
            found, end = next(announced, (None, 0))
            if found is None:
                return None
            if found not in self._coming:
                self._planned.remove(found)
                self._begin(found)
            future = self._coming[found]
        part = memoryview(future.result())[at - found.start : min(at + length, end) - found.start]
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


def _requests(ranges: Iterable[tuple[int, int]]) -> Iterator[Wanted]:
    """Ranges as they are asked for: neighbours together, none over `REQUEST` bytes.

    >>> [*_requests([(0, 10), (20, 30), (5_000_000, 5_000_010)])]
    [Wanted(parts=((0, 10), (20, 30))), Wanted(parts=((5000000, 5000010),))]
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
            within = tuple((max(start, low), min(end, high)) for start, end in parts if start < high and end > low)
            if within:
                yield Wanted(within)


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
