"""One GPU: pinned buffers in a ring, filled by reader threads, copied on one stream while another computes.

A slot owns its pinned and device buffers and two events: `copied` (the pinned side may be overwritten) and `used` (the
device side may be). Results are waited for once per tensor. The same code runs on torch's CPU device, where copies and
events are nothing; that is how it is tested where there is no GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from paramdiff.arrays import TorchArrays
from paramdiff.engines.threads import Results
from paramdiff.errors import DeviceError
from paramdiff.measures import Measure, Options, fold
from paramdiff.pairing import Aligned, Alignment
from paramdiff.streaming import Grid, Span, Window, ahead, read_window, spans

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 23  # elements: 16 MB of bf16 a side, enough to hide the launch of some hundred kernels
SLOTS = 4
READERS = 4


class Slot:
    """Room for one window of every side, on the host and on the device."""

    def __init__(self, device: torch.device, sides: int) -> None:
        import torch

        self._torch, self._device = torch, device
        self._on_gpu = device.type == "cuda"
        self._host: list[Any] = [torch.empty(0, dtype=torch.uint8) for _ in range(sides)]
        self._there: list[Any] = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(sides)]
        self._sizes = [0] * sides
        self._started = False
        if self._on_gpu:
            self._copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._used: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def take(self, side: int, nbytes: int) -> Any:
        """A pinned buffer as a numpy array, free to be written; the interface of `streaming.Buffers`."""
        if self._on_gpu:
            self._copied.synchronize()
        if self._host[side].numel() < nbytes:
            self._host[side] = self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=self._on_gpu)
        self._sizes[side] = nbytes
        return self._host[side].numpy()[:nbytes]

    def start_copy(self, copies: Any) -> None:
        """Queue the copies on stream `copies`, behind whatever still reads the device buffers."""
        if not self._on_gpu or self._started:
            return
        self._started = True
        with self._torch.cuda.stream(copies):
            copies.wait_event(self._used)
            for side, (host, size) in enumerate(zip(self._host, self._sizes, strict=True)):
                if self._there[side].numel() < size:
                    self._there[side] = self._torch.empty(host.numel(), dtype=self._torch.uint8, device=self._device)
                self._there[side][:size].copy_(host[:size], non_blocking=True)
            self._copied.record(copies)

    def arrays(self, copies: Any) -> list[Any]:
        """The bytes of every side on the device; the current stream waits until they are there."""
        if not self._on_gpu:
            return [host[:size] for host, size in zip(self._host, self._sizes, strict=True)]
        self.start_copy(copies)
        self._started = False
        current = self._torch.cuda.current_stream(self._device)
        current.wait_event(self._copied)
        for there in self._there:
            there.record_stream(current)
        return [there[:size] for there, size in zip(self._there, self._sizes, strict=True)]

    def release(self) -> None:
        """Everything that reads the device buffers has been queued."""
        if self._on_gpu:
            self._used.record(self._torch.cuda.current_stream(self._device))


def run(
    alignment: Alignment, measures: Sequence[Measure], options: Options, *, device: torch.device, block: int = BLOCK
) -> Results:
    """Compare all tensors of an alignment on `device`, one span for each tensor."""
    import torch

    x = TorchArrays(device)
    work = spans(alignment, block, span_bytes=1 << 62)
    cuda = device.type == "cuda"
    copies = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
    free = deque(Slot(device, len(alignment.checkpoints)) for _ in range(SLOTS))
    reading: deque[tuple[Window, Slot, Future[Any]]] = deque()
    upcoming = (
        (alignment.tensors[span.tensor], window)
        for span in ahead(alignment, work, block)
        for window in _windows(alignment, span, block)
    )

    with ThreadPoolExecutor(READERS, thread_name_prefix="paramdiff-read") as pool:

        def read_ahead() -> None:
            while free:
                step: tuple[Aligned, Window] | None = next(upcoming, None)
                if step is None:
                    return
                slot = free.popleft()
                reading.append((step[1], slot, pool.submit(read_window, alignment, *step, slot)))

        def blocks(span: Span) -> Iterator[tuple[Window, Sequence[Any]]]:
            for _ in range(span.first, span.last):
                read_ahead()
                window, slot, future = reading.popleft()
                future.result()
                raw = slot.arrays(copies)
                if reading and reading[0][2].done() and reading[0][2].exception() is None:
                    reading[0][1].start_copy(copies)  # the next window crosses while this one is computed
                yield window, raw
                slot.release()
                free.append(slot)

        try:
            for span in work:
                yield span, fold(x, alignment.tensors[span.tensor], blocks(span), measures, options)
        except torch.OutOfMemoryError as error:
            name = alignment.tensors[span.tensor].name
            raise DeviceError(f"{device} ran out of memory at {name!r}.", hint="Use --device cpu.") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _windows(alignment: Alignment, span: Span, block: int) -> Iterator[Window]:
    tensor = alignment.tensors[span.tensor]
    grid = Grid(tensor.rows, tensor.cols, block)
    return (grid[number] for number in range(span.first, span.last))
