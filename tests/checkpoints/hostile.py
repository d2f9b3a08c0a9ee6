"""Pickles and torch files assembled by hand, opcode by opcode, and a place to open them where they can do no harm.

`judge` opens each file in a process of its own, forked from one that has imported nothing but the reader, under a limit of
memory and of time, and tells what became of it. Neither torch nor pytest is imported here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOM = 200 << 20  # bytes of memory that a file may take beyond what the reader itself has
CPU_SECONDS = 2
WALL_SECONDS = 20  # the machine may be busy; what waits for something is still found

# --- opcodes --------------------------------------------------------------------------------------------------------

MARK, TUPLE, REDUCE, BUILD, STOP, POP, OBJ, NONE = b"(", b"t", b"R", b"b", b".", b"0", b"o", b"N"
EMPTY_TUPLE, EMPTY_DICT, EMPTY_LIST, TUPLE1, TUPLE2, NEWOBJ, NEWOBJ_EX = b")", b"}", b"]", b"\x85", b"\x86", b"\x81", b"\x92"
SETITEM, SETITEMS, APPEND, APPENDS, ADDITEMS, STACK_GLOBAL, BINPERSID = b"s", b"u", b"a", b"e", b"\x90", b"\x93", b"Q"
MAGIC = 0x1950A86A20F9469CFC6C


def proto(number: int) -> bytes:
    return b"\x80" + bytes([number])


def value(plain: Any) -> bytes:
    """The opcodes that push a plain value; they use memo places below 1,000."""
    return pickle.dumps(plain, 2)[2:-1]


def put(place: int) -> bytes:
    return b"r" + struct.pack("<I", place)


def get(place: int) -> bytes:
    return b"j" + struct.pack("<I", place)


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stacked(module: str, name: str) -> bytes:
    return value(module) + value(name) + STACK_GLOBAL


def inst(module: str, name: str, *args: bytes) -> bytes:
    return MARK + b"".join(args) + f"i{module}\n{name}\n".encode()


def many(*items: bytes) -> bytes:
    """A tuple of what the items push."""
    return MARK + b"".join(items) + TUPLE


def call(function: bytes, *args: bytes) -> bytes:
    return function + many(*args) + REDUCE


def mapping(entries: dict[str, bytes]) -> bytes:
    return EMPTY_DICT + MARK + b"".join(value(name) + pushed for name, pushed in entries.items()) + SETITEMS


def built(thing: bytes, state: bytes) -> bytes:
    return thing + state + BUILD


def slots(entries: dict[str, bytes]) -> bytes:
    """A state that BUILD sets as attributes one by one, rather than through `__dict__`."""
    return many(NONE, mapping(entries))


def storage(key: Any = "0", numel: Any = 4, kind: bytes = named("torch", "FloatStorage")) -> bytes:
    return many(value("storage"), kind, value(key), value("cpu"), value(numel)) + BINPERSID


def tensor(
    shape: Any = (4,),
    stride: Any = (1,),
    offset: Any = 0,
    *,
    stored: bytes | None = None,
    rebuild: str = "_rebuild_tensor_v2",
) -> bytes:
    hooks = call(named("collections", "OrderedDict"))
    pushed = [stored or storage(), value(offset), value(shape), value(stride), value(False), hooks]
    return call(named("torch._utils", rebuild), *pushed)


def whole(pushed: bytes, protocol: int = 2) -> bytes:
    return proto(protocol) + pushed + STOP


def weights(**more: bytes) -> bytes:
    """A model of one good tensor `w`, with further entries."""
    return whole(mapping({"w": tensor(), **more}))


def doubled(times: int, leaf: bytes = value("leaf"), place: int = 5_000) -> bytes:
    """A tuple of a tuple of … of a leaf, each holding the next one twice: 2^times leaves in a few bytes."""
    out = leaf
    for number in range(times):
        out += put(place + number) + POP + get(place + number) + get(place + number) + TUPLE2
    return out


# --- files ----------------------------------------------------------------------------------------------------------

FOUR = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)


def zipped(
    path: Path,
    pickled: bytes,
    storages: dict[str, bytes] | None = None,
    *,
    byteorder: bytes | None = b"little",
    compress: Iterable[str] = (),
    extra: dict[str, bytes] | None = None,
) -> Path:
    """A zip archive as torch.save writes it; `compress` names members to deflate."""
    members = {"data.pkl": pickled, **({} if byteorder is None else {"byteorder": byteorder})}
    members |= {f"data/{key}": data for key, data in ({"0": FOUR} if storages is None else storages).items()}
    members |= {"version": b"3\n", **(extra or {})}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            kind = zipfile.ZIP_DEFLATED if name in compress else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data, kind)
    return path


def legacy(path: Path, pickled: bytes, keys: bytes | None = None, data: bytes | None = None) -> Path:
    """A file as torch before 1.6 wrote it; by default with one storage of four floats."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    begin = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, system))
    keys = pickle.dumps(["0"], 2) if keys is None else keys
    path.write_bytes(begin + pickled + keys + (struct.pack("<q", 4) + FOUR if data is None else data))
    return path


@dataclass
class Member:
    """One member of an archive that may lie about itself; None stands for the truth."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    size: int | None = None
    packed: int | None = None
    offset: int | None = None
    crc: int | None = None
    local_name: str | None = None
    signature: bytes = b"PK\x03\x04"


def raw_zip(path: Path, members: Sequence[Member]) -> Path:
    """An archive written by hand. Numbers from 2^32 - 1 on go into zip64 fields."""
    body, directory = b"", b""
    for one in members:
        offset = len(body) if one.offset is None else one.offset
        size = len(one.data) if one.size is None else one.size
        packed = len(one.data) if one.packed is None else one.packed
        crc = zlib.crc32(one.data) if one.crc is None else one.crc
        local, name = (one.name if one.local_name is None else one.local_name).encode(), one.name.encode()
        short = [min(number, 0xFFFFFFFF) for number in (packed, size)]
        body += one.signature + struct.pack("<HHHHHIIIHH", 20, one.flags, one.method, 0, 33, crc, *short, len(local), 0)
        body += local + one.data
        wide = b"".join(struct.pack("<Q", number) for number in (size, packed, offset) if number >= 0xFFFFFFFF)
        more = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
        directory += b"PK\x01\x02" + struct.pack("<HHHHHHIII", 20, 20, one.flags, one.method, 0, 33, crc, *short)
        directory += struct.pack("<HHHHHII", len(name), len(more), 0, 0, 0, 0, min(offset, 0xFFFFFFFF)) + name + more
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    path.write_bytes(body + directory + b"PK\x05\x06" + end)
    return path


def members(pickled: bytes, data: bytes = FOUR, **lies: Any) -> list[Member]:
    """The members of a small torch file; `lies` are about the storage."""
    return [
        Member("archive/data.pkl", pickled), Member("archive/byteorder", b"little"),
        Member("archive/data/0", data, **lies), Member("archive/version", b"3\n"),
    ]  # fmt: skip


# --- opening them ---------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What became of a file: `outcome` is "read", the name of an exception, or how its process ended."""

    outcome: str
    message: str = ""
    tensors: dict[str, str] = field(default_factory=dict)  # SHA-256 of the bytes; of both ends where there are many
    modules: list[str] = field(default_factory=list)  # imported meanwhile
    events: list[str] = field(default_factory=list)  # audited, and none that reading a file causes
    grown: int = 0  # bytes of memory at the most, beyond what was there before

    @property
    def refused(self) -> bool:
        return self.outcome in ("BrokenFile", "UnsupportedFormat", "ChangedWhileReading")

    @property
    def harmless(self) -> bool:
        """Refused or read, with nothing else done."""
        return (self.refused or self.outcome == "read") and not self.modules and not self.events and self.grown <= ROOM


def judge(paths: Iterable[Path | str], trusting: bool = False) -> list[Verdict]:
    """Open every file and read its tensors, each in its own process; `trusting`: with Python's own unpickler instead."""
    asked = [str(path) for path in paths]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.checkpoints.hostile", *(["trusting"] if trusting else [])],
        input=json.dumps(asked), stdout=subprocess.PIPE, env=environment, cwd=root, text=True, check=True,
    )  # fmt: skip
    verdicts = [Verdict(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(verdicts) == len(asked)
    return verdicts


def _main() -> None:
    read = _trust if sys.argv[1:] == ["trusting"] else _read
    with tempfile.TemporaryDirectory() as folder:  # what is imported on the way is imported now
        for good in (zipped, legacy):
            _read(str(good(Path(folder) / "good.pt", weights(x=tensor((2, 2), (1, 2))))))
    for path in json.load(sys.stdin):
        print(json.dumps(_apart(path, read)), flush=True)


def _apart(path: str, read: Callable[[str], dict[str, str]]) -> dict[str, Any]:
    source, answer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(answer, json.dumps(_open(path, read)).encode())
        finally:
            os._exit(1)
    os.close(answer)
    text, until = b"", time.monotonic() + WALL_SECONDS
    while select.select([source], [], [], max(0.0, until - time.monotonic()))[0]:
        if not (part := os.read(source, 1 << 20)):
            break
        text += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(source)
    _, status = os.waitpid(child, 0)
    if text:
        return dict(json.loads(text))
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"outcome": "hang" if number in (signal.SIGXCPU, signal.SIGKILL) else f"ended by signal {number}"}


def _open(path: str, read: Callable[[str], dict[str, str]]) -> dict[str, Any]:
    from paramdiff.errors import ParamdiffError

    verdict, events = Verdict(""), []
    before, base = set(sys.modules), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (virtual + ROOM, unlimited[1]))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(lambda event, args: _watch(event, args, events))
    try:
        verdict.tensors = read(path)
        verdict.outcome = "read"
    except ParamdiffError as error:
        verdict.outcome, verdict.message = type(error).__name__, str(error)
        if any(isinstance(cause, MemoryError) for cause in _causes(error)):
            verdict.outcome = "MemoryError"  # on another machine it would have taken what there is
        if path not in verdict.message or len(verdict.message) > len(path) + 500:
            verdict.outcome += " without the file's name, or too long"
    except BaseException as error:
        verdict.outcome, verdict.message = type(error).__name__, str(error)[:300]
    verdict.events = events[:20]
    verdict.modules = sorted(set(sys.modules) - before)
    verdict.grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    return vars(verdict)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _read(path: str) -> dict[str, str]:
    from paramdiff import checkpoints

    found = {}
    checkpoint = checkpoints.open(path)
    for name, info in checkpoint.tensors.items():
        size, digest = info.nbytes, hashlib.sha256()
        for offset, count in [(0, size)] if size <= 1_000_000 else [(0, 100), (size - 100, 100)]:
            buffer = bytearray(count)
            checkpoint.read_into(name, offset, memoryview(buffer))
            digest.update(buffer)
        found[name.encode(errors="replace").decode()] = digest.hexdigest()
    checkpoint.verify()
    checkpoint.close()
    return found


class Trusting(pickle.Unpickler):
    """What is not to be used on a file from elsewhere."""

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _trust(path: str) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        Trusting(io.BytesIO(archive.read("archive/data.pkl"))).load()
    return {}


QUIET = ("open", "builtins.id", "object.", "os.listdir", "os.scandir", "sys.", "mmap.", "cpython.", "resource.setrlimit")


def _watch(event: str, args: tuple[Any, ...], events: list[str]) -> None:
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or not event.startswith(QUIET):
        events.append(event if event in ("exec", "compile") else f"{event} {args!r}"[:200])


if __name__ == "__main__":
    _main()
