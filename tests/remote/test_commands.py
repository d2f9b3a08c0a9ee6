"""Commands for the Hub: `plan`, `published`, `--download`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paramdiff import published
from paramdiff.errors import OptionError
from tests.cli.helpers import SAMPLE, assert_sentence, environment, finished, run, run_json, started
from tests.remote.server import COMMIT, Asked, Hub, running

NAMES = "peiyi9979/mistral-7b-sft", "peiyi9979/math-shepherd-mistral-7b-rl"

pytestmark = pytest.mark.slow


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub(dict(zip(NAMES, (SAMPLE / "base", SAMPLE / "rl-sgd"), strict=True)))) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield found


def test_the_table() -> None:
    assert len(published.entries()) == 31
    assert {entry.notion for entry in published.entries()} == {"above", "changed_bf16"}
    assert all(0 < entry.sparsity < 1 for entry in published.entries())
    told = run("published").stdout
    assert "llama-3.1-tulu-3-8b-dpo" in told
    assert "76.04 %" in told
    for name, said in (("tulu", "2 published pairs"), ("none such", "no published pairs")):
        with pytest.raises(OptionError, match=said):
            published.of(name)
        assert_sentence(run("published", name), 2, said)
    assert_sentence(run("published", "klear-reasoner-8b-sft"), 2, "--base and --tuned")


def test_a_pair_measured_beside_its_paper(served: Hub) -> None:
    told = run_json("published", "math-shepherd")
    assert [row["published"] for row in told["published"]] == pytest.approx([0.5245, 0.8077])
    script = run_json("sparsity", SAMPLE / "base", SAMPLE / "rl-sgd", "--tol", "1e-8", "--tol", "1e-5",
                      "--compat", "mukherjee2025")  # fmt: skip
    assert [row["measured"] for row in told["published"]] == [one["sparsity"] for one in script["tolerances"]]
    done = run("published", "math-shepherd")
    assert "52.45 %" in done.stdout
    assert "as the paper's script counts" in done.stdout
    other = run_json("published", "polaris-7b", "--base", SAMPLE / "base", "--tuned", SAMPLE / "rl-sgd")
    assert [row["measured"] for row in other["published"]] == [other["sparsity_bf16"]]


def test_a_plan(served: Hub) -> None:
    there = run_json("plan", *NAMES, "--rate", "10")
    here = run_json("plan", SAMPLE / "base", SAMPLE / "rl-sgd")
    assert there["bytes"] == here["bytes"] == run_json("sparsity", SAMPLE / "base", SAMPLE / "rl-sgd")["bytes_read"]
    assert there["base"]["requests"] == 1
    assert here["base"]["requests"] == 0
    assert there["times"] == [{"bytes_per_second": 10e6, "seconds": there["bytes"] / 10e6}]
    assert "requests" in run("plan", *NAMES).stdout
    same = run_json("plan", NAMES[0], f"{NAMES[0]}@v1")
    assert same["same_file"] == 50
    assert same["bytes"] == here["base"]["bytes"]


def test_download_fills_the_cache_and_reads_from_it(served: Hub, tmp_path: Path) -> None:
    told = run_json("sparsity", *NAMES, "--download", "--out", tmp_path / "out")
    assert told["changed"] == 105_071
    assert told["base"] == NAMES[0]
    assert len([*(tmp_path / "hf").rglob("snapshots/*/*.safetensors")]) == 5
    assert COMMIT in (tmp_path / "out" / "run.json").read_text()
    before = len(served.log)
    assert run_json("sparsity", *NAMES)["changed"] == 105_071
    assert {asked.path for asked in served.log[before:] if "resolve" in asked.path} == set()
    done = run("sparsity", SAMPLE / "base", SAMPLE / "rl-sgd", "--download", env=environment())
    assert done.returncode == 0


@pytest.mark.parametrize("large", [False, True])
def test_ctrl_c_does_not_wait_for_the_network(served: Hub, tmp_path: Path, large: bool) -> None:
    """The server answers the headers and then nothing, in this process and where workers read."""
    if large:
        for name in NAMES:
            (tmp_path / name).mkdir(parents=True)
            save_file({"w.weight": torch.zeros(6000, 6000)}, tmp_path / name / "model.safetensors")
            served.repos[name] = tmp_path / name
    hanging = threading.Event()

    def hang(asked: Asked) -> None:
        wanted = asked.range or (0, 0)
        if asked.server == "cdn" and (asked.number > 30 or wanted[1] - wanted[0] > 2 << 20):
            hanging.set()
            time.sleep(20)

    served.fault = hang
    if not large:
        served.fault = lambda asked: (hanging.set(), time.sleep(20)) if asked.server == "cdn" else None
    with started("sparsity", *NAMES, "--out", tmp_path / "out") as process:
        assert hanging.wait(20)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        done = finished(process, timeout=15)
    assert done.returncode == 130
    assert time.monotonic() - begun < 10
    assert "Interrupted" in done.stderr
    assert not (tmp_path / "out").exists()
