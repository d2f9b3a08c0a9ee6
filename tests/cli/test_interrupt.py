"""What happens when a run is cut short: signals, files that change underneath, disks that fill."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from .helpers import (
    SAMPLE,
    alive,
    assert_sentence,
    children,
    finished,
    resume,
    run,
    run_json,
    sparse_pair,
    started,
    state,
    stopped_workers,
    wait_for,
    write_checkpoint,
)

pytestmark = pytest.mark.slow

BASE = SAMPLE / "base"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def opened(pid: int, files: tuple[Path, ...]) -> bool:
    try:
        return {str(file) for file in files} <= {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(process: subprocess.Popen[str]) -> list[int]:
    return children(process.pid)


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def old_results(tmp_path: Path) -> Path:
    run_json("sparsity", BASE, SAMPLE / "rl-sgd", "--out", tmp_path / "out" / "old")
    return tmp_path / "out" / "old"


def test_ctrl_c_ends_everything(tmp_path: Path, old_results: Path) -> None:
    before = contents(old_results)
    pair = sparse_pair(tmp_path, 2 << 30)
    with started("sparsity", *pair, "--threads", "2", "--out", old_results) as process:
        workers = wait_for(lambda: len(found := children_of(process)) == 2 and found)
        assert all(alive(pid) for pid in workers)
        os.killpg(process.pid, signal.SIGINT)
        done = finished(process)
    assert_sentence(done, 130, "nterrupted")
    wait_for(lambda: not any(alive(pid) for pid in workers), seconds=1)
    assert contents(old_results) == before
    assert [path.name for path in old_results.parent.iterdir()] == ["old"]


def test_ctrl_c_in_the_middle_of_reading(tmp_path: Path) -> None:
    """The same with workers that are held up, by a dead network file system perhaps: the parent must not wait for them."""
    pair = sparse_pair(tmp_path, 2 << 30)
    with started("sparsity", *pair, "--threads", "2", "--json", "--out", tmp_path / "out" / "new") as process:
        workers = wait_for(lambda: len(found := children_of(process)) == 2 and found)
        wait_for(lambda: all(opened(pid, pair) for pid in workers))
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: all(state(pid) == "T" for pid in workers))
        os.killpg(process.pid, signal.SIGINT)
        try:
            done = finished(process, timeout=20)
        finally:
            for pid in filter(alive, workers):  # or they would hold the pipes open for good
                os.kill(pid, signal.SIGKILL)
    assert_sentence(done, 130, "nterrupted")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_with_threads(tmp_path: Path) -> None:
    pair = sparse_pair(tmp_path, 2 << 30)
    with started("sparsity", *pair, "--threads", "1", "--out", tmp_path / "out" / "new") as process:
        wait_for(lambda: opened(process.pid, pair))
        os.killpg(process.pid, signal.SIGINT)
        done = finished(process)
    assert_sentence(done, 130, "nterrupted")
    assert not (tmp_path / "out").exists()


def test_a_killed_worker_ends_the_run_with_a_sentence(tmp_path: Path, old_results: Path) -> None:
    before = contents(old_results)
    pair = sparse_pair(tmp_path, 300 << 20)
    with started("sparsity", *pair, "--threads", "2", "--out", old_results) as process:
        one, other = stopped_workers(process, 2)
        os.kill(one, signal.SIGKILL)
        resume(other)
        done = finished(process)
    assert_sentence(done, 2, "worker process", "--threads 1")
    assert not alive(other)
    assert contents(old_results) == before


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    pair = sparse_pair(tmp_path, 2 << 30)
    with started("sparsity", *pair, "--threads", "2", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        workers = wait_for(lambda: len(found := children_of(process)) == 2 and found)
        wait_for(lambda: all(opened(pid, pair) for pid in workers))
        process.kill()
        process.wait()
        wait_for(lambda: not any(alive(pid) for pid in workers), seconds=1)


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    pair = sparse_pair(tmp_path, 2 << 30)
    with started("sparsity", *pair, "--threads", "2", "--out", tmp_path / "out" / "new") as process:
        workers = wait_for(lambda: len(found := children_of(process)) == 2 and found)
        process.terminate()
        done = finished(process)
        wait_for(lambda: not any(alive(pid) for pid in workers), seconds=1)
    assert done.returncode != 0
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


# --- files that change underneath ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("side", [0, 1])
def test_a_file_that_shrinks_while_it_is_compared(tmp_path: Path, old_results: Path, workers: int, side: int) -> None:
    before = contents(old_results)
    pair = sparse_pair(tmp_path, 300 << 20)
    with started("sparsity", *pair, "--threads", workers, "--out", old_results) as process:
        if workers > 1:  # held up before they can finish, so that reading meets the end
            held = stopped_workers(process, workers)
        else:
            wait_for(lambda: opened(process.pid, pair), every=0)
            os.kill(process.pid, signal.SIGSTOP)
            held = [process.pid]
            wait_for(lambda: state(process.pid) == "T")
        os.truncate(pair[side], 1 << 20)
        resume(*held)
        done = finished(process)
    assert_sentence(done, 2, str(pair[side]))
    assert contents(old_results) == before


def test_a_file_that_is_rewritten_while_it_is_compared(tmp_path: Path) -> None:
    pair = sparse_pair(tmp_path, 300 << 20)
    with started("sparsity", *pair, "--threads", "2", "--json") as process:
        workers = stopped_workers(process, 2)
        with pair[1].open("r+b") as file:
            file.seek(200 << 20)
            file.write(b"new")
        resume(*workers)
        done = finished(process)
    assert_sentence(done, 2, str(pair[1]), "while it was being read")


def test_a_file_that_is_removed_while_it_is_compared(tmp_path: Path) -> None:
    pair = sparse_pair(tmp_path, 300 << 20)
    with started("sparsity", *pair, "--threads", "2", "--json") as process:
        workers = stopped_workers(process, 2)
        pair[0].unlink()
        resume(*workers)
        done = finished(process)
    assert_sentence(done, 2, str(pair[0]))


def test_a_file_that_is_replaced_before_the_workers_open_it(tmp_path: Path) -> None:
    """Same name, same size, other numbers: workers open files by name, so they would read the new one."""
    pair = sparse_pair(tmp_path, 300 << 20)
    (tmp_path / "other").mkdir()
    other = sparse_pair(tmp_path / "other", 300 << 20)[1]
    with started("sparsity", *pair, "--threads", "2", "--json") as process:
        workers = stopped_workers(process, 2)
        os.replace(other, pair[1])
        resume(*workers)
        done = finished(process)
    assert_sentence(done, 2, str(pair[1]))


# --- disks that fill -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 100, 500, 1000, 8000])
def test_a_full_disk_keeps_the_old_results(tmp_path: Path, old_results: Path, limit: int) -> None:
    """No file may grow beyond `limit` bytes: the kernel refuses the write, as it does on a full disk."""
    before = contents(old_results)
    assert max(map(len, before.values())) > 8000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run("sparsity", BASE, SAMPLE / "sft", "--tol", "1e-5", "--out", old_results, preexec_fn=limited)
    assert_sentence(done, 2, str(old_results), "Cannot write")
    assert contents(old_results) == before
    assert [path.name for path in old_results.parent.iterdir()] == ["old"]


def test_a_full_disk_leaves_no_new_results(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    done = run("sparsity", BASE, SAMPLE / "sft", "--out", tmp_path / "out" / "new", preexec_fn=limited)
    assert_sentence(done, 2, str(tmp_path / "out" / "new"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("more", [["--json"], []])
@pytest.mark.parametrize("command", ["sparsity", "layers"])
def test_a_full_disk_behind_stdout(command: str, more: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = run(command, BASE, SAMPLE / "sft", *more, stdout=full)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("blocked", ["run.json", "tensors.parquet"])
def test_results_that_cannot_be_replaced_stay_whole(old_results: Path, blocked: str) -> None:
    """One of the files cannot be replaced (a directory has its name): none of the others may have been."""
    (old_results / blocked).unlink()
    (old_results / blocked).mkdir()
    before = {path.name: path.read_bytes() for path in old_results.iterdir() if path.is_file()}
    done = run("sparsity", BASE, SAMPLE / "sft", "--tol", "1e-5", "--out", old_results)
    assert_sentence(done, 2, str(old_results))
    after = {path.name: path.read_bytes() for path in old_results.iterdir() if path.is_file()}
    assert after == before
    assert [path.name for path in old_results.parent.iterdir()] == ["old"]


@pytest.mark.parametrize("place", ["file", "file/below", "/dev/null", "/dev/null/below", "/proc/nowhere/out", "x" * 300])
def test_a_place_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    done = run("sparsity", BASE, SAMPLE / "sft", "--out", tmp_path / place)
    assert_sentence(done, 2, place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


# --- a reader that goes away -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["sparsity", "--json"], ["sparsity"], ["layers"]])
def test_a_pipe_that_is_closed_at_once(args: list[str]) -> None:
    """`paramdiff … | true`: even what fits into the pipe meets a closed one."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = run(args[0], BASE, SAMPLE / "sft", *args[1:], stdout=pipe)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_head_closes_a_long_output(tmp_path: Path, more: list[str]) -> None:
    """More than a pipe holds, so that the command meets the closed end while it writes."""
    file = write_checkpoint(tmp_path / "w.safetensors", {f"layers.{i}.weight": ("F32", (1,)) for i in range(5000)})
    with started("inspect", file, *more) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 10)
        process.stdout.close()
        process.stdout = None
        _, stderr = process.communicate(timeout=60)
    assert len(first) == 10
    assert (process.returncode, stderr) == (0, "")


def test_a_closed_stderr_changes_nothing(tmp_path: Path) -> None:
    done = run("sparsity", BASE, SAMPLE / "sft", "--json", stderr=None, preexec_fn=lambda: os.close(2))
    assert done.returncode == 0
    assert done.stdout.startswith("{")
