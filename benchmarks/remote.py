"""Streaming from a Hub on loopback against downloading first, and against the same pair on the disk; one run.

    python benchmarks/remote.py DIR [--kind rl] [--repeat 2] [--json FILE]

DIR is what make_pair.py wrote; a copy of the pair goes to a cache below it for a while. Two servers: one limited to 200 MB/s
with 50 ms before each answer, one without limits (which shares this machine's cores with what it serves). Every contestant
is a process of its own, start-up included; the best of the rounds counts. No time is a pass or a fail.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from run import machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.remote.server import Hub, running

LIMITED = {"latency": 0.05, "rate": 200e6}
COMMAND = str(Path(sys.executable).parent / "paramdiff")


def timed(arguments: list[str], environment: dict[str, str]) -> tuple[float, float, dict[str, Any]]:
    """(seconds, largest process in MB, what it said) of `paramdiff ARGUMENTS --json`."""
    code = "import resource, subprocess, sys; print(subprocess.run(sys.argv[1:], check=True, stdout=-1, text=True).stdout); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, COMMAND, *arguments, "--json"],
        check=True, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    said, _, peak = done.stdout.strip().rpartition("\n")
    return time.perf_counter() - began, int(peak) * 1024 / 1e6, json.loads(said)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("dir", type=Path)
    options.add_argument("--kind", default="rl")
    options.add_argument("--repeat", type=int, default=2)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    base, tuned, cache = given.dir / "base", given.dir / given.kind, given.dir / "hub-cache"
    refs = ["sparsity", "org/base", "org/tuned", "--tol", "1e-5"]
    results: dict[str, dict[str, Any]] = {}

    def note(name: str, found: tuple[float, float, dict[str, Any]]) -> None:
        seconds, peak, said = found
        one = {
            "seconds": round(seconds, 2),
            "pass": round(said["seconds"], 2),
            "peak_mb": round(peak),
            "changed": said["changed"],
        }
        one["mb_per_s"] = round(said["bytes_read"] / said["seconds"] / 1e6)
        if name not in results or one["seconds"] < results[name]["seconds"]:
            results[name] = one

    for limit, word in ((LIMITED, "200 MB/s, 50 ms"), ({}, "no limit")):
        with running(Hub({"org/base": base, "org/tuned": tuned}, **limit)) as hub:  # type: ignore[arg-type]
            more = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache)}
            timed(["plan", "org/base", "org/tuned"], more)  # the server hashes its files once
            for _ in range(given.repeat):
                note(f"streamed, {word}", timed(refs, more))
                note(f"downloaded first, {word}", timed([*refs, "--download"], more))
                shutil.rmtree(cache, ignore_errors=True)
    for _ in range(given.repeat):
        note("from the disk", timed(["sparsity", str(base), str(tuned), "--tol", "1e-5"], {}))
    assert len({one["changed"] for one in results.values()}) == 1, results
    print(machine())
    for name, one in results.items():
        ratio = one["seconds"] / results["from the disk"]["seconds"]
        print(f"{name:34} {one['seconds']:7.2f} s  pass {one['pass']:6.2f} s at {one['mb_per_s']:5} MB/s  "
              f"{one['peak_mb']:5} MB  {ratio:5.1f} × the disk")  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
