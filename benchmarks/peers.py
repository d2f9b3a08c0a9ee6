"""The contestants: how each is started on two checkpoint directories, and what it says.

Every contestant runs as a process of its own, start-up included. `CONTESTANTS` names them; `run` runs one.
The two that are no published tools are in this file: `floor` reads both checkpoints and does nothing with them, `naive` is
the script that people write. `python benchmarks/peers.py floor BASE TUNED` runs one by hand.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / ".venv-peers" / "bin"
TOL = 1e-5
CHUNK = 1 << 20  # bytes of one read of the floor
READERS = 2


class Failed(Exception):
    """A contestant ended with an error; the message is the end of what it printed."""


@dataclass
class Said:
    """What a contestant reports: counts under shared names, and the seconds of its own pass where it says them."""

    counts: dict[str, int]
    seconds: float | None = None
    bytes_read: int | None = None


@dataclass
class Run:
    """One run of one contestant.

    `peak_mb` covers the process and its children together: the largest sum of their proportional set sizes (`watched`
    runs only), or the largest single process if that is more. `anonymous_mb` leaves out pages of mapped files.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float
    anonymous_mb: float
    said: Said


@dataclass(frozen=True)
class Contestant:
    """`command(base, tuned, scratch, tol)` starts it, `read(stdout, scratch, tol)` understands it, `missing()`: why not."""

    command: Callable[[Path, Path, Path, float], list[str]]
    read: Callable[[str, Path, float], Said]
    missing: Callable[[], str | None]
    tolerances: tuple[float, ...] = (0.0,)  # one run for each: the first is timed, all are checked


# --- floor ---------------------------------------------------------------------------------------------------------


def floor(base: Path, tuned: Path) -> dict[str, Any]:
    """Read all shards of both sides into reused buffers, half of every file in each thread."""
    files = [file for side in (base, tuned) for file in sorted(side.glob("*.safetensors"))]
    done = [0] * READERS

    def read(reader: int) -> None:
        buffer = bytearray(CHUNK)
        for file in files:
            fd = os.open(file, os.O_RDONLY)
            size = os.fstat(fd).st_size
            at, end = size * reader // READERS, size * (reader + 1) // READERS
            while at < end:
                at += os.preadv(fd, [memoryview(buffer)[: min(CHUNK, end - at)]], at)
            done[reader] += end - size * reader // READERS
            os.close(fd)

    began = time.perf_counter()
    threads = [threading.Thread(target=read, args=(reader,)) for reader in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.perf_counter() - began, "bytes_read": sum(done)}


# --- naive ---------------------------------------------------------------------------------------------------------


def naive(base: Path, tuned: Path) -> dict[str, Any]:
    """`safe_open`, one tensor at a time, in torch."""
    from safetensors import safe_open

    def opened(directory: Path) -> dict[str, Any]:
        handles: list[Any] = [safe_open(str(file), framework="pt") for file in sorted(directory.glob("*.safetensors"))]
        return {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    numel = changed = above = 0
    sides = opened(base), opened(tuned)
    for name, handle in sides[0].items():
        a, b = handle.get_tensor(name), sides[1][name].get_tensor(name)
        numel += a.numel()
        changed += int((a != b).sum())
        above += int(((b.float() - a.float()).abs() > TOL).sum())
    return {"numel": numel, "changed": changed, "above": above}


# --- how each is started and understood ----------------------------------------------------------------------------


def above(tol: float) -> str:
    """The name of a count: elements with |Δ| > tol."""
    return f"above {tol:g}" if tol else "changed"


def _ours(name: str) -> Callable[[Path, Path, Path, float], list[str]]:
    return lambda base, tuned, _scratch, _tol: [sys.executable, str(HERE / "peers.py"), name, str(base), str(tuned)]


def _floor_said(stdout: str, _scratch: Path, _tol: float) -> Said:
    said = json.loads(stdout)
    return Said({}, said["seconds"], said["bytes_read"])


def _naive_said(stdout: str, _scratch: Path, _tol: float) -> Said:
    said = json.loads(stdout)
    return Said({"numel": said["numel"], above(0): said["changed"], above(TOL): said["above"]})


def _naive_missing() -> str | None:
    absent = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    return f"this Python has no {absent[0]}" if absent else None


def paramdiff_command() -> Path:
    return Path(sys.executable).with_name("paramdiff")


def _paramdiff(base: Path, tuned: Path, _scratch: Path, _tol: float) -> list[str]:
    return [str(paramdiff_command()), "sparsity", str(base), str(tuned), "--tol", repr(TOL), "--json", "--quiet"]


def _paramdiff_said(stdout: str, _scratch: Path, _tol: float) -> Said:
    said = json.loads(stdout)
    counts = {"numel": said["numel"], above(0): said["changed"]}
    counts |= {above(entry["tol"]): entry["above"] for entry in said["tolerances"]}
    return Said(counts, said["seconds"], said["bytes_read"])


def _paramdiff_missing() -> str | None:
    return None if paramdiff_command().exists() else "not installed beside this Python (pip install -e .)"


def _weightscope(base: Path, tuned: Path, scratch: Path, tol: float) -> list[str]:
    report = str(scratch / "report.md")
    return [str(PEERS / "weightscope"), "diff", str(base), str(tuned), "--threshold", repr(tol), "-o", report]


def _weightscope_said(_stdout: str, scratch: Path, tol: float) -> Said:
    report = (scratch / "report.md").read_text()

    def number(label: str) -> int:
        found = re.search(rf"{label}: \*\*([\d,]+)\*\*", report)
        if found is None:
            raise Failed(f"weightscope's report has no {label!r}")
        return int(found[1].replace(",", ""))

    return Said({"numel": number("Total params compared"), above(tol): number("Changed params")})


def _mergelens(base: Path, tuned: Path, scratch: Path, _tol: float) -> list[str]:
    # Its two cheapest signals, the nearest to what the others compute; the defaults take several times as long.
    signals = ["-m", "cosine_similarity", "-m", "l2_distance", "--no-strategy"]
    return [str(PEERS / "mergelens"), "compare", str(base), str(tuned), *signals, "--json", str(scratch / "result.json")]


def _mergelens_said(_stdout: str, scratch: Path, _tol: float) -> Said:
    result = json.loads((scratch / "result.json").read_text())
    return Said({"numel": sum(tensor["parameter_count"] for tensor in result["tensor_metrics"])})


def _peer_missing(name: str) -> Callable[[], str | None]:
    return lambda: None if (PEERS / name).exists() else "not installed (bash benchmarks/setup_peers.sh)"


CONTESTANTS = {
    "floor": Contestant(_ours("floor"), _floor_said, lambda: None),
    "paramdiff": Contestant(_paramdiff, _paramdiff_said, _paramdiff_missing),
    "naive": Contestant(_ours("naive"), _naive_said, _naive_missing),
    "weightscope": Contestant(_weightscope, _weightscope_said, _peer_missing("weightscope"), (0.0, TOL)),
    "mergelens": Contestant(_mergelens, _mergelens_said, _peer_missing("mergelens")),
}


# --- running one ---------------------------------------------------------------------------------------------------


def run(name: str, base: Path, tuned: Path, *, tol: float = 0.0, watched: bool = False) -> Run:
    """Run one contestant to its end. `watched` samples the memory of the whole process tree, which disturbs the time.

    Raises `Failed` where it ends with an error.
    """
    contestant = CONTESTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        stdout, measured = timed(contestant.command(base, tuned, scratch, tol), watched=watched)
        measured.said = contestant.read(stdout, scratch, tol)
    return measured


def timed(command: list[str], *, watched: bool = False) -> tuple[str, Run]:
    """Standard output and cost of a command, children included."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment)
        memory = Memory(process.pid)
        if watched:
            memory.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        memory.stop()
        out.seek(0)
        err.seek(0)
        text = out.read()
        if process.returncode:
            raise Failed(f"{Path(command[0]).name} ended with {process.returncode}: {(err.read() or text).strip()[-500:]}")
    peak = max(memory.peak, usage.ru_maxrss * 1024)
    cpu = usage.ru_utime + usage.ru_stime
    return text, Run(seconds, cpu, peak / 1e6, memory.anonymous / 1e6, Said({}))


@dataclass
class Memory:
    """Samples the proportional set size of a process and all its descendants, added up, until stopped."""

    pid: int
    every: float = 0.02
    peak: int = 0
    anonymous: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self.every):
            samples = [_rollup(pid) for pid in _tree(self.pid)]
            self.peak = max(self.peak, sum(pss for pss, _ in samples))
            self.anonymous = max(self.anonymous, sum(anonymous for _, anonymous in samples))


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:  # grows while it is walked
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _rollup(pid: int) -> tuple[int, int]:
    """(proportional set size, its anonymous part) in bytes; zeros for a process that has gone."""
    sizes = {"Pss": 0, "Pss_Anon": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in sizes:
                sizes[key] = int(value.split()[0]) * 1024
    return sizes["Pss"], sizes["Pss_Anon"]


if __name__ == "__main__":
    print(json.dumps({"floor": floor, "naive": naive}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))))
