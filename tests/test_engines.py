"""No engine, block size, number of workers, shard layout or order of files may change a result."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from paramdiff import checkpoints, engines
from paramdiff.engines import processes, threads, torch_device
from paramdiff.errors import BrokenFile, ChangedWhileReading, ParamdiffError
from paramdiff.measures import DEFAULT, Accumulator, make_options, merge, select
from paramdiff.pairing import Alignment, align
from paramdiff.streaming import spans

OPTIONS = make_options([1e-5, 1e-3], None)
MEASURED = select(DEFAULT, OPTIONS)


def models(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"embed": (300, 64), "wide": (3, 9000), "tall": (5000, 3), "vector": (777,), "scalar": (), "conv": (8, 4, 3, 3)}
    base = {name: (torch.randn(shape, generator=rng) * 0.02).bfloat16() for name, shape in shapes.items()}
    shares = dict(zip(shapes, (0.001, 0.9, 0.2, 0.5, 1.0, 0.0), strict=True))
    tuned = {}
    for name, tensor in base.items():
        mask = torch.rand(tensor.shape, generator=rng) < shares[name]
        tuned[name] = torch.where(mask, tensor + torch.randn(tensor.shape, generator=rng).bfloat16() * 1e-3, tensor)
    tuned["wide"].view(-1)[::1000] = float("nan")
    return base, tuned


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], parts: list[list[str]]) -> Path:
    directory.mkdir(parents=True)
    weight_map = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def dealt(names: list[str], parts: int, rng: random.Random) -> list[list[str]]:
    rng.shuffle(names)
    return [names[i::parts] for i in range(parts)]


@pytest.fixture
def pair(tmp_path: Path) -> Alignment:
    base, tuned = models()
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return align(checkpoints.open(str(tmp_path / "base.safetensors")), checkpoints.open(str(tmp_path / "tuned.safetensors")))


def finish(alignment: Alignment, results: Any) -> dict[str, dict[str, Any]]:
    found: dict[int, dict[str, Accumulator]] = {}
    for span, result in results:
        merge(found.setdefault(span.tensor, {}), result)
    table = {}
    for index, tensor in enumerate(alignment.tensors):
        row: dict[str, Any] = {}
        for measure in MEASURED:
            row |= measure.columns(found[index][measure.NAME], tensor, OPTIONS)
            for name, rows in measure.tables(found[index][measure.NAME], tensor).items():
                row.setdefault(f"table {name}", []).extend(
                    repr([(k, np.asarray(v).tolist()) for k, v in r.items()]) for r in rows
                )
        table[tensor.name] = row
    return table


def in_threads(alignment: Alignment, count: int = 1, block: int = 1024, span_bytes: int = 8192) -> dict[str, dict[str, Any]]:
    work = spans(alignment, block, span_bytes)
    return finish(alignment, threads.run(alignment, work, MEASURED, OPTIONS, threads=count, block=block))


def counts_only(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {k: v for k, v in row.items() if not isinstance(v, float) or "sparsity" in k} for name, row in table.items()
    }


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("span_bytes", [1, 8192, 1 << 30])
def test_threads_and_spans_change_nothing_at_all(pair: Alignment, count: int, span_bytes: int) -> None:
    assert in_threads(pair, count, span_bytes=span_bytes) == in_threads(pair)


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_change_nothing_at_all(pair: Alignment, workers: int) -> None:
    work = spans(pair, 1024, 8192)
    found = finish(pair, processes.run(pair, work, MEASURED, OPTIONS, workers=workers, block=1024))
    assert found == in_threads(pair)


@pytest.mark.parametrize("block", [4, 64, 1 << 12, 1 << 20])
def test_block_size_changes_no_count(pair: Alignment, block: int) -> None:
    one, other = in_threads(pair, block=block, span_bytes=1 << 16), in_threads(pair)
    assert counts_only(one) == counts_only(other)
    for name, row in other.items():
        for column, value in row.items():
            if isinstance(value, float):
                assert one[name][column] == pytest.approx(value, rel=1e-12, abs=1e-15), (name, column)


@pytest.mark.parametrize("block", [1 << 8, 1 << 23])
def test_the_gpu_engine_on_torch_cpu_counts_the_same(pair: Alignment, block: int) -> None:
    found = finish(pair, torch_device.run(pair, MEASURED, OPTIONS, device=torch.device("cpu"), block=block))
    _same(found, in_threads(pair))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("block", [1 << 8, 1 << 23])
def test_a_gpu_counts_the_same(pair: Alignment, block: int) -> None:
    found = finish(pair, torch_device.run(pair, MEASURED, OPTIONS, device=torch.device("cuda:0"), block=block))
    _same(found, in_threads(pair))


def _same(found: dict[str, dict[str, Any]], wanted: dict[str, dict[str, Any]]) -> None:
    assert counts_only(found) == counts_only(wanted)
    for name, row in wanted.items():
        for column, value in row.items():
            if isinstance(value, float):
                assert found[name][column] == pytest.approx(value, rel=1e-12, abs=1e-15), (name, column)


@given(seed=st.integers(0, 2**16), parts=st.tuples(st.integers(1, 6), st.integers(1, 6)))
@settings(max_examples=15, deadline=None)
def test_shards_and_their_order_change_nothing_at_all(
    tmp_path_factory: pytest.TempPathFactory, seed: int, parts: tuple[int, int]
) -> None:
    tmp, rng = tmp_path_factory.mktemp("shards"), random.Random(seed)
    sides = models()
    whole, dealt_out = [], []
    for name, tensors, count in zip(("base", "tuned"), sides, parts, strict=True):
        whole.append(checkpoints.open(str(write_shards(tmp / "whole" / name, tensors, [list(tensors)]))))
        directory = write_shards(tmp / "dealt" / name, tensors, dealt(list(tensors), count, rng))
        dealt_out.append(checkpoints.open(str(directory)))
    assert in_threads(align(*dealt_out), 2) == in_threads(align(*whole))
    for checkpoint in [*whole, *dealt_out]:
        checkpoint.close()


@pytest.mark.parametrize("engine", ["threads", "processes", "torch"])
def test_an_error_in_a_worker_is_raised_here(pair: Alignment, tmp_path: Path, engine: str) -> None:
    with open(tmp_path / "tuned.safetensors", "r+b") as file:
        file.truncate(4000)
    work = spans(pair, 1024, 8192)
    results = {
        "threads": lambda: threads.run(pair, work, MEASURED, OPTIONS, threads=2, block=1024),
        "processes": lambda: processes.run(pair, work, MEASURED, OPTIONS, workers=2, block=1024),
        "torch": lambda: torch_device.run(pair, MEASURED, OPTIONS, device=torch.device("cpu"), block=1024),
    }[engine]()
    with pytest.raises(ChangedWhileReading, match=r"tuned\.safetensors ended inside tensor"):
        list(results)


def test_a_worker_that_cannot_open_a_file_says_so(pair: Alignment, tmp_path: Path) -> None:
    (tmp_path / "tuned.safetensors").unlink()
    with pytest.raises(BrokenFile, match=r"Cannot read .*tuned\.safetensors"):
        list(processes.run(pair, spans(pair), MEASURED, OPTIONS, workers=1))


class OddError(Exception):
    """It cannot be unpickled: its constructor wants two arguments and passes on one."""

    def __init__(self, a: str, b: str) -> None:
        super().__init__(a + b)


class Failing:
    """A measure whose error cannot travel between processes."""

    NAME = "failing"

    def update(self, acc: Accumulator, block: Any, options: Any) -> None:
        raise OddError("so ", "it is")

    def columns(self, acc: Accumulator, tensor: Any, options: Any) -> dict[str, Any]:
        return {}

    def tables(self, acc: Accumulator, tensor: Any) -> dict[str, list[dict[str, Any]]]:
        return {}


def test_an_error_that_cannot_travel_is_told_all_the_same(pair: Alignment) -> None:
    with pytest.raises(ParamdiffError, match="A worker failed with OddError: so it is"):
        list(processes.run(pair, spans(pair), [Failing()], OPTIONS, workers=1))


class Counter:
    """A measure of one's own, as a notebook would define it."""

    NAME = "mine"

    def update(self, acc: Accumulator, block: Any, options: Any) -> None:
        acc.add_count("seen", block.numel)

    def columns(self, acc: Accumulator, tensor: Any, options: Any) -> dict[str, Any]:
        return {"seen": acc.counts["seen"]}

    def tables(self, acc: Accumulator, tensor: Any) -> dict[str, list[dict[str, Any]]]:
        return {}


def test_a_measure_that_cannot_travel_runs_in_threads(pair: Alignment, monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(Counter):
        pass

    monkeypatch.setattr(engines, "SMALL", 0)
    mine = Local()
    _, results = engines.run(pair, [mine], OPTIONS, device="cpu", threads=2)
    found: dict[int, int] = {}
    for span, result in results:
        found[span.tensor] = found.get(span.tensor, 0) + result["mine"].counts["seen"]
    assert found == {index: tensor.numel for index, tensor in enumerate(pair.tensors)}
