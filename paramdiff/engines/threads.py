"""Worker threads on this machine's CPU: one per core, each reading its own windows into its own buffers.

Reading and computing alternate within a thread. With the files in the page cache that is as fast as it gets; from a cold
disk the kernel reads ahead (the files are opened as sequential) while the threads compute.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from threadpoolctl import threadpool_limits

from paramdiff.arrays import numpy_arrays
from paramdiff.machine import cores
from paramdiff.measures import Accumulator, Measure, Options, fold
from paramdiff.pairing import Alignment
from paramdiff.streaming import BLOCK, Buffers, Span, ahead, windows

Result = tuple[Span, dict[str, Accumulator]]
Results = Generator[Result, None, None]


def run(
    alignment: Alignment,
    work: Sequence[Span],
    measures: Sequence[Measure],
    options: Options,
    *,
    threads: int | None = None,
    blas: int = 1,
    block: int = BLOCK,
) -> Results:
    """Do all spans of `work`, each thread with `blas` threads of BLAS's.

    The first error of any thread stops the others and is raised here.
    """
    pending = ahead(alignment, work, block)
    turn = threading.Lock()
    done: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    crew = [
        threading.Thread(
            target=_work,
            args=(alignment, measures, options, block, pending, turn, done, stop),
            name=f"paramdiff-{number}",
        )
        for number in range(min(threads or cores(), len(work)))
    ]
    # BLAS would start its own threads for a long dot product; beside ours they fight over the cores, and its split of the
    # sum would make results depend on their number.
    with threadpool_limits(limits=blas, user_api="blas"):
        for thread in crew:
            thread.start()
        try:
            for _ in work:
                result = next_of(done)
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            stop.set()
            for thread in crew:
                thread.join()


def next_of(done: queue.SimpleQueue[Any]) -> Any:
    """The next item, awaited in steps: a wait without end may outlast Ctrl-C where a library has its own SIGINT handler."""
    while True:
        try:
            return done.get(timeout=0.5)
        except queue.Empty:
            continue


def _work(
    alignment: Alignment,
    measures: Sequence[Measure],
    options: Options,
    block: int,
    pending: Iterator[Span],
    turn: threading.Lock,
    done: queue.SimpleQueue[Any],
    stop: threading.Event,
) -> None:
    x, buffers = numpy_arrays(), Buffers(len(alignment.checkpoints))
    while not stop.is_set():
        try:
            with turn:
                span = next(pending)
        except StopIteration:
            return
        except BaseException as error:  # handed to the thread that waits, which raises it
            done.put(error)
            return
        try:
            tensor = alignment.tensors[span.tensor]
            blocks = _until(stop, windows(alignment, span, buffers, block))
            done.put((span, fold(x, tensor, blocks, measures, options)))
        except BaseException as error:  # handed to the thread that waits, which raises it
            done.put(error)
            return


def _until(stop: threading.Event, steps: Iterator[Any]) -> Iterator[Any]:
    for step in steps:
        if stop.is_set():
            return
        yield step
