"""Run all contestants side by side on the checkpoints of make_pair.py and print one table.

    python benchmarks/run.py DIR [--kinds same,sgd,rl,sft] [--repeat 3] [--skip weightscope,mergelens] [--json FILE]

A first round, not timed, fills the page cache and measures memory. Then every round runs each contestant once on each kind;
the best time of a contestant counts. Ends with status 1 if two contestants disagree on a count. No time is a pass or a fail.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers

Counts = dict[str, dict[str, int]]  # count → contestant → value


@dataclass
class Cell:
    """One contestant on one kind, over all rounds."""

    seconds: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)  # the contestant's own measure of its pass over the files
    cpu_seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    anonymous_mb: float = 0.0
    bytes_read: int | None = None

    def add(self, run: peers.Run) -> None:
        self.seconds.append(run.seconds)
        self.cpu_seconds.append(run.cpu_seconds)
        if run.said.seconds is not None:
            self.passes.append(run.said.seconds)

    def watched(self, run: peers.Run) -> None:
        self.peak_mb, self.anonymous_mb, self.bytes_read = run.peak_mb, run.anonymous_mb, run.said.bytes_read


def present(skip: list[str]) -> list[str]:
    """The contestants that can run; says why the others cannot."""
    names = []
    for name, contestant in peers.CONTESTANTS.items():
        reason = "skipped as asked" if name in skip else contestant.missing()
        if reason is None:
            names.append(name)
        else:
            print(f"without {name}: {reason}")
    return names


def note(counts: Counts, name: str, said: peers.Said) -> None:
    for count, value in said.counts.items():
        counts.setdefault(count, {})[name] = value


def measure(
    directory: Path, kinds: list[str], names: list[str], repeat: int
) -> tuple[dict[str, dict[str, Cell]], dict[str, Counts]]:
    """Cells by kind and contestant, and what each counted. A contestant that fails on a kind is left out there, loudly."""
    cells: dict[str, dict[str, Cell]] = {kind: {name: Cell() for name in names} for kind in kinds}
    counts: dict[str, Counts] = {kind: {} for kind in kinds}
    base = directory / "base"
    for kind in kinds:
        for name in names:
            progress(f"warming up: {kind}, {name}")
            try:
                for tol in reversed(peers.CONTESTANTS[name].tolerances):
                    run = peers.run(name, base, directory / kind, tol=tol, watched=True)
                    note(counts[kind], name, run.said)
                cells[kind][name].watched(run)
            except peers.Failed as failure:
                progress("")
                print(f"!!! {name} fails on {kind}: {failure}")
                del cells[kind][name]
    for number in range(repeat):
        for kind in kinds:
            for name in cells[kind]:
                progress(f"round {number + 1} of {repeat}: {kind}, {name}")
                run = peers.run(name, base, directory / kind)
                note(counts[kind], name, run.said)
                cells[kind][name].add(run)
    progress("")
    return cells, counts


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def rows(cells: dict[str, dict[str, Cell]]) -> list[dict[str, Any]]:
    """The table: one row per kind and contestant, every time the best of all rounds."""
    table = []
    for kind, by_name in cells.items():
        best = {name: min(cell.seconds) for name, cell in by_name.items()}
        floor = min(by_name["floor"].passes) if "floor" in by_name else None
        for name, cell in by_name.items():
            own = min(cell.passes) if cell.passes else None
            table.append(
                {
                    "kind": kind,
                    "contestant": name,
                    "seconds": best[name],
                    "pass_seconds": own,
                    "cpu_seconds": min(cell.cpu_seconds),
                    "slowest_seconds": max(cell.seconds),
                    "peak_mb": cell.peak_mb,
                    "anonymous_mb": cell.anonymous_mb,
                    "bytes_read": cell.bytes_read,
                    "to_floor": best[name] / floor if floor else None,
                    "pass_to_floor": own / floor if own and floor else None,
                    "to_paramdiff": best[name] / best["paramdiff"] if "paramdiff" in best else None,
                }
            )
    return table


def render(table: list[dict[str, Any]]) -> str:
    heads = {
        "kind": "kind",
        "contestant": "contestant",
        "seconds": "s",
        "slowest_seconds": "slowest, s",
        "pass_seconds": "pass, s",
        "peak_mb": "peak MB",
        "anonymous_mb": "without mapped files",
        "to_floor": "× floor",
        "pass_to_floor": "pass × floor",
        "to_paramdiff": "× paramdiff",
    }

    def text(key: str, value: Any) -> str:
        if value is None:
            return "–"
        if isinstance(value, str):
            return value
        return f"{value:,.0f}" if key.endswith("_mb") else f"{value:.2f}" if key.endswith("seconds") else f"{value:.1f}"

    lines = [list(heads.values())] + [[text(key, row[key]) for key in heads] for row in table]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    lines.insert(1, ["-" * (w if i < 2 else w - 1) + ("" if i < 2 else ":") for i, w in enumerate(widths)])
    aligned = (
        [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))] for line in lines
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in aligned)


def fastest_other(table: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By kind: the fastest contestant other than the floor and paramdiff, and how many times paramdiff's time it takes."""
    found: dict[str, dict[str, Any]] = {}
    for row in table:
        if row["contestant"] not in ("floor", "paramdiff") and row["to_paramdiff"] is not None:
            kept = found.get(row["kind"])
            if kept is None or row["to_paramdiff"] < kept["ratio"]:
                found[row["kind"]] = {"contestant": row["contestant"], "ratio": row["to_paramdiff"]}
    return found


def disagreements(counts: dict[str, Counts]) -> list[str]:
    found = []
    for kind, by_count in counts.items():
        for count, values in by_count.items():
            if len(set(values.values())) > 1:
                found.append(f"{kind}, {count}: " + ", ".join(f"{name} {value:,}" for name, value in values.items()))
    return found


def help_seconds(repeat: int) -> float | None:
    if peers.CONTESTANTS["paramdiff"].missing() is not None:
        return None
    command = [str(peers.paramdiff_command()), "--help"]
    return min(peers.timed(command)[1].seconds for _ in range(repeat + 1))


def machine() -> str:
    threads = len(os.sched_getaffinity(0))
    model = next((line.partition(":")[2].strip() for line in cpuinfo() if line.startswith("model name")), platform.machine())
    return f"{threads} cores, {model}, Python {platform.python_version()}"


def cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="what make_pair.py wrote")
    parser.add_argument("--kinds", default="same,sgd,rl,sft")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--skip", default="", help=f"contestants to leave out, of {','.join(peers.CONTESTANTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    options = parser.parse_args()
    kinds, skip = options.kinds.split(","), options.skip.split(",") if options.skip else []
    for kind in ["base", *kinds]:
        if not list((options.directory / kind).glob("*.safetensors")):
            parser.error(f"no safetensors in {options.directory / kind}; make them with benchmarks/make_pair.py")
    if unknown := [name for name in skip if name not in peers.CONTESTANTS]:
        parser.error(f"no contestant {unknown[0]!r}")
    if options.repeat < 1:
        parser.error("--repeat must be 1 or more")
    names = present(skip)
    cells, counts = measure(options.directory, kinds, names, options.repeat)
    table, wrong, started = rows(cells), disagreements(counts), help_seconds(options.repeat)
    others = fastest_other(table)
    print(f"{machine()}; page cache warm; best of {options.repeat}\n")
    print(render(table) + "\n")
    for kind, other in others.items():
        print(f"{kind}: the fastest other, {other['contestant']}, takes {other['ratio']:.1f} times as long as paramdiff")
    if started is not None:
        print(f"paramdiff --help: {started:.2f} s")
    for kind, by_count in counts.items():
        said = "; ".join(f"{count} {next(iter(v.values())):,} ({', '.join(v)})" for count, v in by_count.items())
        print(f"counts, {kind}: {said}")
    for line in wrong:
        print(f"!!! THE COUNTS DISAGREE: {line}")
    if not wrong:
        print("All counts that two or more report are equal.")
    if options.json:
        result = {
            "machine": machine(),
            "repeat": options.repeat,
            "table": table,
            "fastest_other": others,
            "help_seconds": started,
            "counts": counts,
            "disagreements": wrong,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
