"""Engines: where the work is done. Each yields (span, result) as spans finish, in any order."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

from paramdiff.engines import processes
from paramdiff.engines import threads as in_threads
from paramdiff.engines.threads import Results
from paramdiff.errors import DeviceError
from paramdiff.machine import cores, memory
from paramdiff.measures import Measure, Options, on_cpu, scratch, whole_tensors
from paramdiff.pairing import Alignment
from paramdiff.streaming import effort, spans, whole_spans

SMALL = 64 << 20  # bytes; below this starting worker processes costs more than the work
LIGHT = 10_000_000_000  # floating-point operations; the same for spectra
HEAVY = 20 * LIGHT  # of one tensor: several seconds on a core
WORTH_A_GPU = 2 << 30  # bytes; below this starting CUDA costs more than the work


def run(
    alignment: Alignment, measures: Sequence[Measure], options: Options, *, device: str, threads: int | None
) -> tuple[str, Results]:
    """Pick an engine for `device` ("auto", "cpu", "cuda", "cuda:1"). Returns the device used and the results to come.

    `threads` is the number of CPU workers (default: all cores). "torch:cpu" runs the GPU's code on the CPU, for tests.
    Raises `DeviceError` for a device that is not there.
    """
    whole = whole_tensors(measures)
    work = whole_spans(alignment) if whole else spans(alignment)
    total = sum(max(span.nbytes, span.numel) for span in work)  # an adapter's updates are worked out, not read
    if device == "auto" and whole and on_cpu(measures, options):
        device = "cpu"  # where it would be done anyway, one matrix after the other
    chosen = _resolve(device, total)
    if chosen != "cpu":
        import torch

        from paramdiff.engines import torch_device

        name = chosen.removeprefix("torch:")
        return name, torch_device.run(alignment, measures, options, device=torch.device(name))
    small = total <= SMALL and not (whole and sum(effort(tensor) for tensor in alignment.tensors) > LIGHT)
    threads = threads or (1 if small else cores())
    workers = min(threads, _room(alignment, measures, options))
    # Where there are fewer tensors than cores and they take long, BLAS may use the rest of them. Its sums then depend on how
    # many there are, in the last bits of singular values; nowhere else does the number of threads change anything.
    heavy = whole and max((effort(tensor) for tensor in alignment.tensors), default=0) > HEAVY
    blas = max(1, threads // min(workers, len(work) or 1)) if heavy else 1
    # A single worker of light work runs here; heavy linear algebra in this process would not hear of Ctrl-C.
    if small or (workers == 1 and not whole) or not _travels(measures):
        return "cpu", in_threads.run(alignment, work, measures, options, threads=workers, blas=blas)
    return "cpu", processes.run(alignment, work, measures, options, workers=workers, blas=blas)


def _room(alignment: Alignment, measures: Sequence[Measure], options: Options) -> int:
    """How many workers find room for what they gather, at least one."""
    needs = [need for tensor in alignment.tensors if (need := scratch(measures, tensor, options))]
    most = max((need for need in needs if need <= memory()), default=0)  # what needs more is left out, with a note
    return max(1, memory() // most) if most else 1 << 16


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
