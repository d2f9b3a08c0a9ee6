"""Of what rank is the change? Several ways to find out, side by side on the checkpoints of make_pair.py.

    python benchmarks/ranks.py DIR [--kinds sgd,rl,sft] [--repeat 2] [--skip modeldelta] [--json FILE]

`svdvals` and `matrix_rank` load each matrix of both sides with safetensors, subtract in float32 and call that function of
torch.linalg. Every contestant runs as a process of its own, start-up included; the best of the rounds counts. With several
rounds the first samples memory, which disturbs it. Numeric ranks that paramdiff calls certain are compared with those of the
two, which compute in float32. No time is a pass or a fail.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peers
from run import machine, progress

ROUTINES = ("svdvals", "matrix_rank")


def with_torch(routine: str, base: Path, tuned: Path) -> dict[str, Any]:
    """One call of torch.linalg per matrix; the numeric ranks of all, by name, as the routine gives them."""
    import torch
    from safetensors import safe_open

    def opened(directory: Path) -> dict[str, Any]:
        handles: list[Any] = [safe_open(str(file), framework="pt") for file in sorted(directory.glob("*.safetensors"))]
        return {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    began = time.perf_counter()
    before, after = opened(base), opened(tuned)
    ranks = {}
    for name, handle in before.items():
        a = handle.get_tensor(name)
        if a.ndim == 2:
            delta = after[name].get_tensor(name).float() - a.float()
            if routine == "matrix_rank":
                ranks[name] = int(torch.linalg.matrix_rank(delta))
            else:
                sigma = torch.linalg.svdvals(delta)
                ranks[name] = int((sigma > sigma[0] * max(delta.shape) * 2.0**-23).sum())
    return {"seconds": time.perf_counter() - began, "ranks": ranks}


def command(contestant: str, base: Path, tuned: Path, scratch: Path) -> list[str]:
    if contestant in ROUTINES:
        return [sys.executable, __file__, "--routine", contestant, str(base), str(tuned)]
    if contestant == "modeldelta":
        return [str(peers.PEERS / "modeldelta"), str(base), str(tuned), "-q", "-o", str(scratch / "delta.json")]
    asked = ["--method", "sketch"] if contestant.endswith("sketch") else []
    return [str(peers.paramdiff_command()), "rank", str(base), str(tuned), "--json", *asked]


def ranks_of(contestant: str, stdout: str) -> dict[str, int]:
    """Numeric ranks by name, where a contestant gives them and is sure of them."""
    if contestant in ROUTINES:
        return dict(json.loads(stdout)["ranks"])
    if contestant == "paramdiff":
        return {m["name"]: m["numeric_rank"] for m in json.loads(stdout)["ranks_by_matrix"] if m["rank_uncertain"] is False}
    return {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="what make_pair.py wrote")
    parser.add_argument("--kinds", default="sgd,rl,sft")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--skip", default="")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    options = parser.parse_args()
    names = [n for n in ("paramdiff", "paramdiff sketch", *ROUTINES, "modeldelta") if n not in options.skip.split(",")]
    if "modeldelta" in names and not (peers.PEERS / "modeldelta").exists():
        print("without modeldelta: run benchmarks/setup_peers.sh")
        names.remove("modeldelta")
    table: list[dict[str, Any]] = []
    differing = 0
    for kind in options.kinds.split(","):
        ranks: dict[str, dict[str, int]] = {}
        best: dict[str, peers.Run] = {}
        for number in range(options.repeat):
            for name in names:
                progress(f"round {number + 1} of {options.repeat}: {kind}, {name}")
                with tempfile.TemporaryDirectory() as scratch:
                    asked = command(name, options.directory / "base", options.directory / kind, Path(scratch))
                    stdout, timing = peers.timed(asked, watched=number == 0 and options.repeat > 1)
                ranks[name] = ranks_of(name, stdout)
                if name not in best or timing.seconds < best[name].seconds:
                    peak = max(timing.peak_mb, best[name].peak_mb if name in best else 0.0)
                    best[name] = timing
                    best[name].peak_mb = peak
        ours, theirs = ranks["paramdiff"], ranks.get("matrix_rank") or ranks.get("svdvals", {})
        differing += sum(ours[name] != rank for name, rank in theirs.items() if name in ours)
        for name, timing in best.items():
            ratio = timing.seconds / best["paramdiff"].seconds
            table.append(
                {"kind": kind, "contestant": name, "seconds": timing.seconds, "peak_mb": timing.peak_mb, "ratio": ratio}
            )
    progress("")
    print(f"{machine()}; page cache warm; best of {options.repeat}\n")
    print(f"| kind | {'contestant':16} |      s | peak MB | × paramdiff |")
    print(f"| ---- | {'-' * 16} | -----: | ------: | ----------: |")
    for row in table:
        print("| {kind:4} | {contestant:16} | {seconds:6.2f} | {peak_mb:7,.0f} | {ratio:11.1f} |".format(**row))
    print(f"numeric ranks on which paramdiff and torch.linalg differ: {differing}")
    if options.json:
        result = {"machine": machine(), "repeat": options.repeat, "table": table, "differing": differing}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--routine"]:
        print(json.dumps(with_torch(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
        raise SystemExit(0)
    raise SystemExit(main())
