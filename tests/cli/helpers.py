"""What the tests of the command line share: the real command in a subprocess, and checkpoints made byte by byte."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "sample_data"
COMMAND = str(Path(sys.executable).parent / "paramdiff")
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}


def environment(**more: str) -> dict[str, str]:
    """The environment without what would change the command's behaviour."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PARAMDIFF") and k not in ("COLUMNS", "FORCE_COLOR")}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **more}


def run(*args: object, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """`paramdiff ARGS…`, with stdout and stderr as text."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **options}
    return subprocess.run([COMMAND, *map(str, args)], text=True, encoding="utf-8", timeout=timeout, check=False, **options)


def run_json(*args: object) -> dict[str, Any]:
    """What `paramdiff ARGS… --json` printed, after checking that it printed that and nothing else."""
    done = run(*args, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def assert_sentence(done: subprocess.CompletedProcess[str], code: int, *words: str) -> str:
    """One line on stderr, nothing on stdout, the exit code, and the words that the sentence must hold."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, (done.returncode, done.stderr)
    assert done.stdout == ""
    lines = done.stderr.split("\n")
    assert len(lines) == 2, done.stderr
    assert lines[1] == ""
    assert re.fullmatch(r"paramdiff: .+\S", lines[0]), lines[0]
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


def squeezed(text: str) -> str:
    """Runs of white space as one blank, for looking up words in tables."""
    return " ".join(text.split())


def header_of(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> tuple[dict[str, Any], int]:
    """A valid safetensors header for {name: (dtype, shape)}, and the number of data bytes behind it."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header, at


def write_raw(
    path: Path, header: bytes, data: bytes = b"", *, claimed: int | None = None, length: int | None = None
) -> Path:
    """A safetensors file of exactly these parts. `claimed` lies about the header's length, `length` sets the file's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header) if claimed is None else claimed) + header + data)
    if length is not None:
        os.truncate(path, length)
    return path


def write_checkpoint(
    path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], data: bytes | None = None, *, extra_header: str = ""
) -> Path:
    """A valid file of zeros (sparse, so any size costs nothing), or of `data`."""
    header, size = header_of(tensors)
    encoded = json.dumps(header).encode() + extra_header.encode()
    write_raw(path, encoded, data or b"")
    os.truncate(path, 8 + len(encoded) + size)
    return path


def sparse_pair(directory: Path, nbytes: int, *, tensors: int = 16) -> tuple[Path, Path]:
    """Two checkpoints of `nbytes` zeros each, in bf16; they take no room on disk."""
    columns = 4096
    rows = nbytes // tensors // columns // 2
    layout = {f"model.layers.{i}.mlp.up_proj.weight": ("BF16", (rows, columns)) for i in range(tensors)}
    return (
        write_checkpoint(directory / "base.safetensors", layout),
        write_checkpoint(directory / "tuned.safetensors", layout),
    )


# --- processes -------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def state(pid: int) -> str:
    """R, S, T, Z, … or "" for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    return state(pid) not in ("", "Z", "X")


def wait_for(condition: Any, *, seconds: float = 20, every: float = 0.001) -> Any:
    """The first true value of `condition()`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(every)
    raise AssertionError("what the test waits for did not happen")


@contextmanager
def started(*args: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`paramdiff ARGS…` running in a process group of its own, which is killed at the end."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **options}
    process = subprocess.Popen([COMMAND, *map(str, args)], text=True, encoding="utf-8", start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def finished(process: subprocess.Popen[str], *, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def stopped_workers(process: subprocess.Popen[str], count: int) -> list[int]:
    """The worker processes, as soon as all have started, stopped before they can finish."""
    workers = wait_for(lambda: len(found := children(process.pid)) == count and found)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: all(state(pid) == "T" for pid in workers))
    return list(workers)


def resume(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
