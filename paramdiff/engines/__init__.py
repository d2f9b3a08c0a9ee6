"""Engines: where the work is done. Each yields (span, result) as spans finish, in any order."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

from paramdiff.engines.threads import Results
from paramdiff.errors import DeviceError
from paramdiff.measures import Measure, Options
from paramdiff.pairing import Alignment
from paramdiff.streaming import spans

SMALL = 64 << 20  # bytes; below this starting worker processes costs more than the work
WORTH_A_GPU = 2 << 30  # bytes; below this starting CUDA costs more than the work


def run(
    alignment: Alignment, measures: Sequence[Measure], options: Options, *, device: str, threads: int | None
) -> tuple[str, Results]:
    """Pick an engine for `device` ("auto", "cpu", "cuda", "cuda:1"). Returns the device used and the results to come.

    `threads` is the number of CPU workers (default: all cores). "torch:cpu" runs the GPU's code on the CPU, for tests.
    Raises `DeviceError` for a device that is not there.
    """
    work = spans(alignment)
    total = sum(span.nbytes for span in work)
    chosen = _resolve(device, total)
    if chosen != "cpu":
        import torch

        from paramdiff.engines import torch_device

        name = chosen.removeprefix("torch:")
        return name, torch_device.run(alignment, measures, options, device=torch.device(name))
    from paramdiff.engines import processes
    from paramdiff.engines import threads as in_threads

    if total <= SMALL or threads == 1 or not _travels(measures):
        return "cpu", in_threads.run(alignment, work, measures, options, threads=threads or (1 if total <= SMALL else None))
    return "cpu", processes.run(alignment, work, measures, options, workers=threads)


def _travels(measures: Sequence[Measure]) -> bool:
    """Whether worker processes can import these measures; a class from a notebook cannot be, and gets threads instead."""
    from paramdiff.measures import portable

    named = portable(measures)
    if any(not isinstance(item, str) and type(item).__module__ == "__main__" for item in named):
        return False
    try:
        pickle.dumps(named)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def _resolve(device: str, nbytes: int) -> str:
    if device in ("cpu", "torch:cpu"):
        return device
    if device == "auto" and (nbytes < WORTH_A_GPU or not _nvidia_driver()):
        return "cpu"  # without importing torch, which takes a second
    if device != "auto" and device.split(":")[0] != "cuda":
        raise DeviceError(f"Unknown device {device[:40]!r}.", hint="Give auto, cpu, cuda or cuda:N.")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda:0" if count else "cpu"
    _, _, number = device.partition(":")
    if number and not (number.isdecimal() and len(number) < 4):
        raise DeviceError(f"Unknown device {device[:40]!r}.", hint="Give auto, cpu, cuda or cuda:N.")
    if int(number or 0) >= count:
        have = f"{count} CUDA device{'s' if count > 1 else ''}" if count else "no CUDA device that torch can use"
        raise DeviceError(f"{device} was asked for, but this machine has {have}.", hint="Use --device cpu.")
    return f"cuda:{int(number or 0)}"


def _nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
