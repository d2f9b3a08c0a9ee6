"""A fuzzer for the readers: damaged copies of real checkpoints must be refused by a sentence, or read; nothing else.

`python -m tests.fuzz --seconds 600` prints what it tried and keeps every input that raised anything but a `CheckpointError`,
took over ten seconds or two gigabytes, or wanted to run, import or write something. tests/test_fuzz.py runs a short round.
"""

from __future__ import annotations

import argparse
import encodings.cp437  # which zipfile and pickle would import when they meet the first name or text that needs it
import encodings.raw_unicode_escape  # noqa: F401
import io
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paramdiff import checkpoints
from paramdiff.errors import CheckpointError, ParamdiffError
from paramdiff.optimizers.measuring import adam

EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF]
LONGEST = 10  # seconds for one input
MOST_BYTES = 2 << 30  # of memory beyond what is in use at the start
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec", "compile", "socket.connect",
             "os.remove", "os.rename", "os.mkdir", "shutil.rmtree", "ctypes.dlopen", "pickle.find_class")  # fmt: skip


class Watch:
    """Notes what the interpreter is asked to do beside reading, once `on`."""

    def __init__(self) -> None:
        self.on, self.seen = False, []  # type: bool, list[str]
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if event in FORBIDDEN or writes:
            self.seen.append(f"{event} {args!r}"[:200])


def mutate(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """A few random edits: bytes, numbers, cuts, repeats, parts of another file."""
    work = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
        at, kind = chance.randrange(len(work) + 1), chance.randrange(7)
        length = min(chance.choice([1, 2, 4, 8, 64]), len(work) - at)
        if kind == 0 and length:
            work[at] = chance.randrange(256)
        elif kind == 1:
            size = chance.choice([1, 2, 4, 8])
            work[at : at + size] = (chance.choice(EXTREMES) % (1 << 8 * size)).to_bytes(
                size, chance.choice(["little", "big"])
            )
        elif kind == 2:
            del work[at : at + length]
        elif kind == 3:
            work[at:at] = work[at : at + length] * chance.choice([1, 2, 50])
        elif kind == 4 and other:
            start = chance.randrange(len(other))
            work[at : at + length] = other[start : start + length]
        elif kind == 5:
            del work[at:]
        elif length:
            work[at] ^= 1 << chance.randrange(8)
    return bytes(work)


def damage(path: Path, others: list[Path], chance: random.Random) -> None:
    """Write a damaged copy over a file. In archives, mostly a member is damaged and the archive itself left whole."""
    data, other = path.read_bytes(), chance.choice(others).read_bytes()[: 1 << 16]
    if data[:2] == b"PK" and chance.random() < 0.8:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = next((n for n in members if n.endswith("data.pkl")), next(iter(members)))
        members[name] = mutate(members[name], other, chance)
        rewritten = io.BytesIO()
        with zipfile.ZipFile(rewritten, "w", zipfile.ZIP_STORED) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        path.write_bytes(rewritten.getvalue())
    else:
        head = data[: 1 << 14]  # where headers are
        path.write_bytes(mutate(head, other, chance) + data[len(head) :])


def attempt(directory: Path) -> str:
    """Open a checkpoint and read the ends of every tensor. Returns what came of it."""
    try:
        checkpoint = checkpoints.open(str(directory))
    except CheckpointError as error:
        return type(error).__name__
    try:
        for name, info in checkpoint.tensors.items():
            if info.nbytes > 1 << 40:
                return "absurd size let through"
            step = info.type.bits // 8 or 1
            for start in (0, info.nbytes - min(info.nbytes, 64 * step)):
                checkpoint.read_into(name, start, memoryview(bytearray(min(64 * step, info.nbytes - start))))
        checkpoint.verify()
    except ParamdiffError as error:
        return f"reading: {type(error).__name__}"
    finally:
        checkpoint.close()
    return "read"


def attempt_state(directory: Path) -> str:
    """Measure the optimizer state of a checkpoint, from opening it to the tables. Returns what came of it."""
    try:
        found = adam(directory, threads=1)
        found.summary()
    except ParamdiffError as error:
        return type(error).__name__
    return "read"


def run(
    corpus: list[Path], seconds: float, seed: int, keep: Path | None = None, attempt: Callable[[Path], str] = attempt
) -> tuple[Counter[str], list[str]]:
    """Damage copies of the directories of `corpus` for some time. Returns the outcomes, and what must not have happened."""
    chance, outcomes, bad = random.Random(seed), Counter(), []  # type: random.Random, Counter[str], list[str]
    watch = Watch()
    for directory in corpus:  # so that everything is imported
        assert attempt(directory) == "read", directory
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, limits[1]))
    until = time.monotonic() + seconds
    try:
        with tempfile.TemporaryDirectory() as scratch:
            while time.monotonic() < until:
                source = chance.choice(corpus)
                target = Path(scratch) / "case"
                shutil.copytree(source, target)
                files = sorted(file for file in target.rglob("*") if file.is_file())
                for file in chance.sample(files, min(len(files), chance.choice([1, 1, 1, 2]))):
                    damage(file, files, chance)
                watch.seen.clear()
                signal.alarm(LONGEST)
                watch.on = True
                try:
                    outcome = attempt(target)
                    wrong = "; ".join(watch.seen) or ("" if "absurd" not in outcome else outcome)
                except BaseException:
                    outcome, wrong = "escaped", traceback.format_exc()
                finally:
                    watch.on = False
                    signal.alarm(0)
                outcomes[f"{source.name}: {outcome}"] += 1
                if wrong:
                    bad.append(f"{source.name}: {wrong}")
                    if keep:
                        shutil.copytree(target, keep / f"{len(bad):03d}-{source.name}")
                shutil.rmtree(target)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return outcomes, bad


def alarmed(_signal: int, _frame: Any) -> None:
    raise TimeoutError(f"over {LONGEST} s")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("corpus", nargs="+", type=Path, help="directories of whole checkpoints")
    options.add_argument("--seconds", type=float, default=600)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--keep", type=Path, help="where inputs that did what they must not are kept")
    options.add_argument("--state", action="store_true", help="measure optimizer states instead of opening weights")
    given = options.parse_args()
    signal.signal(signal.SIGALRM, alarmed)
    if given.state:  # a model made from a damaged config is transformers' concern
        sys.modules["transformers"] = None  # type: ignore[assignment]
    outcomes, bad = run(given.corpus, given.seconds, given.seed, given.keep, attempt_state if given.state else attempt)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8,}  {outcome}")
    print(f"{sum(outcomes.values()):,} inputs, {len(bad)} of them did what they must not")
    for sentence in bad[:20]:
        print("----\n" + sentence[:2000])
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
