"""Worker processes on this machine's CPU, one per core: the engine for anything that takes more than a moment.

Threads would do if numpy held the GIL less: a block is some hundred numpy calls of about 20 µs, and two threads that hand
the GIL to and fro at each of them run no faster than one (measured: 12.9 against 7.8 ns per element and core).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import IO, Any

from paramdiff.engines.threads import Result, Results, next_of
from paramdiff.errors import ParamdiffError
from paramdiff.machine import cores
from paramdiff.measures import Measure, Options, portable
from paramdiff.pairing import Alignment
from paramdiff.streaming import BLOCK, Span, batches

QUEUED = 2  # batches a worker holds: one in work, one so that it never waits for the parent, or for a network


def run(
    alignment: Alignment,
    work: Sequence[Span],
    measures: Sequence[Measure],
    options: Options,
    *,
    workers: int | None = None,
    blas: int = 1,
    block: int = BLOCK,
) -> Results:
    """Do all spans of `work`, each worker with `blas` threads of BLAS's.

    The first error of any worker stops the others and is raised here.

    Raises `pickle.PicklingError`, `AttributeError` or `TypeError` where a measure of the user's own cannot travel.
    """
    setup = pickle.dumps((alignment, portable(measures), options, blas, block), protocol=pickle.HIGHEST_PROTOCOL)
    pending = deque(batches(alignment, work))
    done: queue.SimpleQueue[tuple[subprocess.Popen[bytes], Result | BaseException]] = queue.SimpleQueue()
    crew = [_start(blas) for _ in range(min(workers or cores(), len(pending)))]
    left: dict[subprocess.Popen[bytes], deque[int]] = {worker: deque() for worker in crew}  # spans of each batch it holds
    listeners = [threading.Thread(target=_listen, args=(worker, done), daemon=True) for worker in crew]
    try:
        for worker, listener in zip(crew, listeners, strict=True):
            listener.start()
            _send(worker, setup)
            for _ in range(QUEUED):
                _hand_over(worker, pending, left[worker])
        for _ in work:
            worker, result = next_of(done)
            if isinstance(result, BaseException):
                raise result
            left[worker][0] -= 1
            if not left[worker][0]:
                left[worker].popleft()
                _hand_over(worker, pending, left[worker])
            yield result
    finally:
        for worker in crew:
            worker.kill()
        for worker, listener in zip(crew, listeners, strict=True):
            worker.wait()
            if listener.ident:
                listener.join()
            for pipe in (worker.stdin, worker.stdout):
                with contextlib.suppress(BrokenPipeError):
                    _pipe(pipe).close()


def _start(blas: int) -> subprocess.Popen[bytes]:
    # The worker imports what the parent can, in the same order: -P adds no directory of its own.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    # BLAS starts its threads when it is imported; limiting them afterwards leaves hundreds asleep on a large machine.
    environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(blas))
    command = [sys.executable, "-P", "-c", "from paramdiff.engines.worker import main; main()"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is for the parent alone
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _hand_over(worker: subprocess.Popen[bytes], pending: deque[list[Span]], left: deque[int]) -> None:
    """Give a worker the next batch, if there is one."""
    if pending:
        batch = pending.popleft()
        left.append(len(batch))
        _send(worker, pickle.dumps(batch))


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _send(worker: subprocess.Popen[bytes], message: bytes) -> None:
    # A worker that stopped has left its reason in the other pipe, where it is read next.
    with contextlib.suppress(BrokenPipeError):
        _pipe(worker.stdin).write(message)
        _pipe(worker.stdin).flush()


def _listen(worker: subprocess.Popen[bytes], done: queue.SimpleQueue[Any]) -> None:
    """Hand over a worker's results as they come, until its pipe ends."""
    try:
        while True:
            done.put((worker, pickle.load(_pipe(worker.stdout))))
    except Exception:  # the pipe ended, or what came through it was cut short
        code = worker.wait()
        because = " (out of memory?)" if code == -signal.SIGKILL else ""
        error = ParamdiffError(f"A worker process ended early, with code {code}{because}.", hint="Try --threads 1.")
        done.put((worker, error))
