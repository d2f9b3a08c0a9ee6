"""A worker process: reads batches of spans from standard input, answers each span on standard output, both as pickles; see
`processes`.

It is started as a fresh interpreter rather than forked or spawned by multiprocessing: nothing of the parent's threads is
copied, and the user's main module is not run again.
"""

from __future__ import annotations

import os
import pickle
import queue
import threading
from collections.abc import Iterator
from typing import Any

from threadpoolctl import threadpool_limits

from paramdiff.arrays import numpy_arrays
from paramdiff.errors import ParamdiffError
from paramdiff.measures import fold, restored
from paramdiff.pairing import Alignment
from paramdiff.streaming import Buffers, Span, announce, windows


def main() -> None:
    """Serve until standard input ends. Ctrl-C is the parent's to handle, which started this with SIGINT blocked."""
    source = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not end up among the answers
    x = numpy_arrays()
    try:
        alignment, named, options, blas, block = pickle.load(source)
        measures = restored(named)
        buffers = Buffers(len(alignment.checkpoints))
        with threadpool_limits(limits=blas, user_api="blas"):  # after the measures have imported what they need of it
            for span in _spans(source, alignment, block):
                blocks = windows(alignment, span, buffers, block)
                result = fold(x, alignment.tensors[span.tensor], blocks, measures, options)
                pickle.dump((span, result), answers, protocol=pickle.HIGHEST_PROTOCOL)
                answers.flush()
    except (EOFError, BrokenPipeError):  # the parent has what it wanted, or is gone
        return
    except BaseException as error:  # handed to the parent, which raises it
        answers.write(_portable(error))
        answers.flush()


def _spans(source: Any, alignment: Alignment, block: int) -> Iterator[Span]:
    """The spans of the batches as they come. Over a network the next batch is announced while this one is in work."""
    if all(checkpoint.is_local for checkpoint in alignment.checkpoints):
        while True:
            yield from pickle.load(source)
    batches: queue.SimpleQueue[list[Span] | BaseException] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                batch = pickle.load(source)
                announce(alignment, batch, block)
                batches.put(batch)
        except BaseException as error:  # handed to the thread that waits, which raises it
            batches.put(error)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        batch = batches.get()
        if isinstance(batch, BaseException):
            raise batch
        yield from batch


def _portable(error: BaseException) -> bytes:
    """The error as a pickle that can be read back, or another that says the same."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        message = f"A worker failed with {type(error).__name__}: {error}."
        data = pickle.dumps(ParamdiffError(message, hint="Use --threads 1 --debug to see where."))
    return data
