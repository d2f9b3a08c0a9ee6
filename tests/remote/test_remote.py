"""Checkpoints behind HTTP, over a real server on loopback: the same numbers as from the disk, whatever the network does."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import paramdiff
from paramdiff import checkpoints, engines
from paramdiff.checkpoints import http_file, hub, places, ranges
from paramdiff.errors import BrokenFile, ChangedWhileReading, CheckpointError, NotFound, UnsupportedFormat
from tests.cli.helpers import SAMPLE, assert_sentence, environment, run, run_json
from tests.remote.server import COMMIT, Asked, Hub, running

PAIR = {"org/base": SAMPLE / "base", "org/rl": SAMPLE / "rl-sgd"}


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing remembered, no cache, and no long pauses between attempts."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.listed.cache_clear()
    monkeypatch.setattr(http_file.pool(None).connection_pool_kw["retries"], "backoff_factor", 0.01)
    monkeypatch.setattr(http_file, "PAUSE", 0.01)
    yield
    hub.listed.cache_clear()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub(dict(PAIR))) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


def same(one: paramdiff.Diff, two: paramdiff.Diff) -> None:
    assert one.tensors.equals(two.tensors)
    assert all(one.tables[name].equals(table) for name, table in two.tables.items())


@pytest.mark.parametrize("redirect", [True, False])
def test_two_repositories_give_what_their_files_give(served: Hub, redirect: bool) -> None:
    served.redirect = redirect
    diff = paramdiff.compare("org/base", "org/rl@v1", tolerances=[1e-5])
    same(diff, paramdiff.compare(SAMPLE / "base", SAMPLE / "rl-sgd", tolerances=[1e-5]))
    for side, repository in (("base", "org/base"), ("tuned", "org/rl")):
        assert diff.run[side]["repository"] == repository
        assert diff.run[side]["revision"] == COMMIT  # the branch and the tag became a commit
    assert diff.run["tuned"]["ref"] == "org/rl@v1"


@pytest.mark.slow
def test_worker_processes_read_for_themselves(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "SMALL", 0)
    torch.manual_seed(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tensors = {f"layers.{n}.weight": torch.randn(400, 300 + n) for n in range(12)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        served.repos[f"org/{name}"] = tmp_path / name
    same(paramdiff.compare("org/a", "org/b", threads=3), paramdiff.compare(tmp_path / "a", tmp_path / "b"))
    for name in ("a", "b"):
        assert len(served.ranges(f"{name}/resolve/{COMMIT}/model.safetensors")) < 8  # neighbours came together


def test_only_what_is_asked_for_is_fetched(served: Hub, tmp_path: Path) -> None:
    """The header, and the one tensor of three."""
    (tmp_path / "m").mkdir()
    tensors = {f"layers.{n}.weight": torch.randn(1024, 1024) for n in range(9)}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    served.repos["org/m"] = tmp_path / "m"
    diff = paramdiff.compare("org/m", tmp_path / "m", include=[r"layers\.4\."])
    assert diff.summary()["changed"] == 0
    assert sum(end - start for start, end in served.ranges("model.safetensors")) < (4 << 20) + 2 * ranges.BLOCK


@pytest.mark.parametrize("ref", ["hf://org/base", "org/base@main", "hf://org/base@v1/model.safetensors", "URL"])
def test_ways_to_write_a_reference(served: Hub, ref: str) -> None:
    ref = f"{served.url}/org/base/resolve/main/model.safetensors" if ref == "URL" else ref
    assert checkpoints.open(ref).tensors == checkpoints.open(str(SAMPLE / "base")).tensors


def test_a_folder_of_a_repository(served: Hub) -> None:
    served.repos["org/all"] = SAMPLE
    assert len(checkpoints.open("org/all/rl-sgd").tensors) == 50
    assert len(checkpoints.open("hf://org/all@v1/checkpoints/sft/checkpoint-200").tensors) == 50
    with pytest.raises(NotFound, match="checkpoint-200"):  # the newest step is offered
        checkpoints.open("org/all/checkpoints/sft")
    with pytest.raises(NotFound, match="No such path"):
        checkpoints.open("org/all/none")


def test_a_local_path_wins(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAMPLE / "rl-sgd", tmp_path / "org" / "base")
    assert checkpoints.open("org/base").facts()["files"][0]["name"] != "model.safetensors"  # sharded, the local one
    assert checkpoints.open("hf://org/base").facts()["repository"] == "org/base"
    with pytest.raises(NotFound, match=r"write hf://org/other"):  # beside local ones, a typing error is likelier
        checkpoints.open("org/other")


@pytest.mark.slow
def test_other_containers(served: Hub, tmp_path: Path) -> None:
    import torch.distributed.checkpoint

    model = {"layers.0.weight": torch.randn(70, 30), "norm.weight": torch.randn(30)}
    (tmp_path / "bin").mkdir()
    torch.save(model, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "legacy").mkdir()
    torch.save(model, tmp_path / "legacy" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save({"model": model}, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    real = SAMPLE.parent / "tests" / "real"
    served.repos |= {f"org/{name}": tmp_path / name for name in ("bin", "legacy", "dcp")}
    served.repos |= {f"org/{name}": real / "zero" / name for name in ("stage2", "stage3_groups_universal")}
    served.repos["org/fp8"] = real / "quantised" / "fp8_block"
    for name, where in served.repos.items():
        if name not in PAIR and where.exists():
            same(paramdiff.compare(name, where), paramdiff.compare(where, where))


def test_an_optimizer_state_on_the_hub(served: Hub) -> None:
    served.repos["org/run"] = SAMPLE / "checkpoints" / "rl-adamw"
    here = paramdiff.adam(SAMPLE / "checkpoints" / "rl-adamw" / "checkpoint-200")
    there = paramdiff.adam("org/run/checkpoint-200")
    assert there.parameters.equals(here.parameters)


def once(kind: Any, at: int, server: str = "cdn") -> Callable[[Asked], Any]:
    return lambda asked: kind if asked.server == server and asked.number == at else None


@pytest.mark.parametrize(
    "fault",
    [
        once("reset", 1), once("short", 2), once((503, {}), 1), once((500, {}), 0), once((502, {}), 3),
        once((429, {"Retry-After": "0"}), 1), once((429, {"RateLimit": '"resolvers";r=0;t=0'}), 1),
        once((403, {}), 4), once((503, {}), 0, "hub"), once((504, {}), 2, "hub"),
    ],
)  # fmt: skip
def test_what_a_network_does_changes_no_number(served: Hub, fault: Any) -> None:
    """A connection that breaks in mid-body, a busy server, a limit, an address that has expired."""
    expected = paramdiff.compare(SAMPLE / "base", SAMPLE / "rl-sgd")
    served.fault = fault
    same(paramdiff.compare("org/base", "org/rl"), expected)


@pytest.mark.slow
def test_every_second_answer_breaks_off(served: Hub) -> None:
    def half(asked: Asked) -> Any:
        return "reset" if asked.server == "cdn" and asked.range and asked.range[1] - asked.range[0] > 1 else None

    served.fault = half
    opened = checkpoints.open("org/base")  # half of every answer arrives, which is progress
    assert len(opened.tensors) == 50


def test_a_server_that_ignores_ranges_is_not_swallowed(served: Hub) -> None:
    served.repos["org/whole"] = SAMPLE / "checkpoints" / "sft" / "checkpoint-200"  # over one block
    served.fault = lambda asked: "whole" if asked.server == "cdn" and asked.path.endswith("safetensors") else None
    with pytest.raises(BrokenFile, match="cannot be read in ranges"):
        checkpoints.open("org/whole")


def test_another_range_than_asked_is_refused(served: Hub) -> None:
    served.fault = once("shifted", 1)
    with pytest.raises(BrokenFile, match="the server answered 'bytes"):
        checkpoints.open("org/base")


def test_a_file_that_is_replaced_meanwhile(served: Hub) -> None:
    served.repos["org/large"] = SAMPLE / "checkpoints" / "sft" / "checkpoint-200"
    opened = checkpoints.open("org/large")
    served.fault = lambda asked: "changed" if asked.server == "cdn" else None
    name = max(opened.tensors, key=lambda n: opened.position(n))
    with pytest.raises(ChangedWhileReading, match="was replaced"):
        opened.read_into(name, 0, memoryview(bytearray(opened.tensors[name].nbytes)))


def test_a_file_that_shrinks_meanwhile(served: Hub, tmp_path: Path) -> None:
    shutil.copytree(SAMPLE / "checkpoints" / "sft" / "checkpoint-200", tmp_path / "m")
    served.repos["org/m"] = tmp_path / "m"
    opened = checkpoints.open("org/m")
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(data[:-1000])
    name = max(opened.tensors, key=lambda n: opened.position(n))
    with pytest.raises(ChangedWhileReading):
        opened.read_into(name, 0, memoryview(bytearray(opened.tensors[name].nbytes)))


def test_who_may_not_read(served: Hub, tmp_path: Path) -> None:
    served.gated.add("org/base")
    with pytest.raises(CheckpointError, match="gated") as caught:
        checkpoints.open("org/base")
    assert "hf auth login" in str(caught.value)
    with pytest.raises(NotFound, match="no model org/none on the Hub"):
        checkpoints.open("org/none")
    with pytest.raises(NotFound, match="no revision 'v7'"):
        checkpoints.open("org/rl@v7")


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotFound, match="could not be asked for org/base"):
        checkpoints.open("org/base")


@pytest.mark.slow
def test_the_token_goes_to_the_hub_alone(served: Hub, tmp_path: Path) -> None:
    """Not to the storage that a redirect leads to, nor into anything that is printed or written."""
    served.gated.add("org/base")
    more = environment(HF_TOKEN=served.token, HF_ENDPOINT=served.url, HF_HOME=str(tmp_path / "home"))
    done = run("sparsity", "org/base", "org/rl", "--out", tmp_path / "out", env=more)
    assert done.returncode == 0, done.stderr
    assert all(asked.token is None for asked in served.log if asked.server == "cdn")
    ours = [asked for asked in served.log if asked.server == "hub" and "org/" in asked.path]
    assert {asked.token for asked in ours} == {f"Bearer {served.token}"}
    written = (tmp_path / "out" / "run.json").read_text()
    failed = run("sparsity", "org/base", "org/none", "--debug", env=more)
    served.fault = lambda asked: (503, {}) if asked.server == "cdn" and asked.number > 10**6 else None
    for text in (done.stdout, done.stderr, written, failed.stdout, failed.stderr):
        assert served.token not in text
        assert "Signature" not in text


def test_a_signature_in_an_address_is_not_shown(served: Hub, tmp_path: Path) -> None:
    url = f"{served.cdn}/cdn/org/base/resolve/main/model.safetensors?Signature=secret"
    facts = checkpoints.open(url).facts()
    assert "secret" not in json.dumps(facts["files"])
    with pytest.raises(NotFound) as caught:
        checkpoints.open(f"{served.cdn}/cdn/org/base/resolve/main/none.safetensors?Signature=secret")
    assert "secret" not in str(caught.value)


def test_the_local_cache_is_used(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("org/base", endpoint=served.url)
    before = len(served.log)
    opened = checkpoints.open("org/base")
    assert opened.is_local
    assert [asked.path for asked in served.log[before:]] == ["/api/models/org/base"]
    hub.listed.cache_clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # and without a Hub
    assert checkpoints.open("org/base").tensors == opened.tensors


def test_a_remote_file_travels_without_what_it_fetched(served: Hub) -> None:
    where = places.place("org/base")
    assert isinstance(where, hub.HubPath)
    found = (where / "model.safetensors").open()
    assert isinstance(found, http_file.HttpFile)
    found.announce([(0, 1000), (2000, 3000)])
    again = pickle.loads(pickle.dumps(found))
    data = np.zeros(5000, dtype=np.uint8)
    assert again.read_into(0, memoryview(data)) == 5000  # type: ignore[arg-type]
    assert data.tobytes() == (SAMPLE / "base" / "model.safetensors").read_bytes()[:5000]
    assert again.read_into(found.size - 10, memoryview(data)) == 10  # type: ignore[arg-type]
    assert again.read_into(found.size + 10, memoryview(data)) == 0  # type: ignore[arg-type]


def test_announced_ranges_are_fetched_once_and_let_go(served: Hub) -> None:
    served.repos["org/large"] = SAMPLE / "checkpoints" / "sft" / "checkpoint-200"
    where = places.place("hf://org/large/model.safetensors")
    assert isinstance(where, hub.HubPath)
    found, data = where.open(), (SAMPLE / "checkpoints" / "sft" / "checkpoint-200" / "model.safetensors").read_bytes()
    assert isinstance(found, http_file.HttpFile)
    parts = [(0, 5000), (9000, 20_000), (1_200_000, len(data))]
    found.announce(parts)
    for start, end in reversed(parts):  # in any order
        for at in range(start, end, 700):
            size = min(700, end - at)
            buffer = bytearray(size)
            found.read_into(at, memoryview(buffer))
            assert bytes(buffer) == data[at : at + size]
    assert not found._coming
    assert not found._planned
    assert sorted(served.ranges("model.safetensors")) == [(0, 20_000), (1_200_000, len(data))]


@pytest.mark.slow
def test_through_the_command(served: Hub, tmp_path: Path) -> None:
    more = environment(HF_ENDPOINT=served.url, HF_HOME=str(tmp_path / "home"))
    done = run("inspect", "org/rl", env=more)
    assert "4 file(s)" in done.stdout
    assert sum(end - start for start, end in served.ranges("safetensors")) < 4 << 20  # headers
    assert_sentence(run("sparsity", "org/none", "org/rl", env=more), 2, "no model org/none on the Hub")
    assert_sentence(run("sparsity", "org/rl@v7", "org/rl", env=more), 2, "no revision 'v7'")
    assert not any((tmp_path / "home").rglob("*.safetensors"))  # nothing was kept
    assert run_json("sparsity", SAMPLE / "base", SAMPLE / "rl-sgd")["changed"] == 105_071


def test_a_file_that_is_the_same_on_both_sides_is_read_once(served: Hub, tmp_path: Path) -> None:
    """By the Hub's hashes: one shard of two differs."""
    shards = {"one": {"a.weight": torch.randn(600, 700)}, "two": {"b.weight": torch.randn(600, 700)}}
    for name, change in (("x", 0.0), ("y", 1.0)):
        (tmp_path / name).mkdir()
        save_file(shards["one"], tmp_path / name / "model-00001-of-00002.safetensors")
        save_file({"b.weight": shards["two"]["b.weight"] + change}, tmp_path / name / "model-00002-of-00002.safetensors")
        served.repos[f"org/{name}"] = tmp_path / name
    diff = paramdiff.compare("org/x", "org/y")
    here = paramdiff.compare(tmp_path / "x", tmp_path / "y")
    same(diff, here)
    assert diff.run["same_file"] == 1
    assert here.run["same_file"] == 0
    assert diff.run["bytes_read"] == 3 * 600 * 700 * 4
    fetched = sum(end - start for start, end in served.ranges(f"org/y/resolve/{COMMIT}/model-00001-of-00002.safetensors"))
    assert fetched <= ranges.BLOCK  # its header


def remote(ref: str) -> http_file.HttpFile:
    where = places.place(ref)
    assert isinstance(where, hub.HubPath)
    found = where.open()
    assert isinstance(found, http_file.HttpFile)
    return found


def test_a_worker_sees_the_file_that_was_opened(served: Hub) -> None:
    """Another content of the same size, from the moment that the file has gone to a worker."""
    found = remote("hf://org/base/model.safetensors")
    found.read_into(0, memoryview(bytearray(100)))
    served.fault = lambda asked: "changed" if asked.server == "cdn" else None
    again = pickle.loads(pickle.dumps(found))
    with pytest.raises(ChangedWhileReading, match="was replaced"):
        again.read_into(0, memoryview(bytearray(100)))


def test_where_a_redirect_led_may_be_gone(served: Hub) -> None:
    found = remote("hf://org/base/model.safetensors")
    found._direct = "http://127.0.0.1:9/gone"
    data = bytearray(100)
    assert found.read_into(0, memoryview(data)) == 100
    assert bytes(data) == (SAMPLE / "base" / "model.safetensors").read_bytes()[:100]


def test_announcements_that_overlap(served: Hub) -> None:
    found = remote("hf://org/base/model.safetensors")
    found.announce([(0, 1000), (2000, 3000)])
    found.announce([(1000, 2000)])
    whole = bytearray(3000)
    assert found.read_into(0, memoryview(whole)) == 3000
    assert bytes(whole) == (SAMPLE / "base" / "model.safetensors").read_bytes()[:3000]
    assert not found._coming


def test_a_part_of_a_piece_is_announced_alone(tmp_path: Path) -> None:
    import warnings

    import torch.distributed.checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = {"w": torch.randn(500, 40), "v": torch.randn(7)}
        torch.distributed.checkpoint.save(tensors, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    opened: Any = checkpoints.open(str(tmp_path / "c"))
    ((_, low, high),) = opened._stored("w", 1000, 3000)
    assert high - low == 2000
    ((_, first, _),) = opened._stored("w", 0, 8)
    assert low - first == 1000


def test_more_than_a_file_at_a_time_is_not_held(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve shards a side, in threads: what is announced stays near what is being read."""
    from paramdiff import streaming

    monkeypatch.setattr(streaming, "BATCH", 1 << 20)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(12):
            save_file(
                {f"layers.{number}.weight": torch.randn(512, 512)},
                tmp_path / name / f"model-{number + 1:05d}-of-00012.safetensors",
            )
        served.repos[f"org/{name}"] = tmp_path / name
    announced: list[int] = []
    announce = streaming.announce
    monkeypatch.setattr(streaming, "announce", lambda *args: (announced.append(len(args[1])), announce(*args))[1])
    same(paramdiff.compare("org/a", "org/b", threads=1), paramdiff.compare(tmp_path / "a", tmp_path / "b"))
    assert max(announced) <= 2  # spans at once
    assert sum(announced) == 24  # of both comparisons


def test_a_neighbour_that_is_busy_is_not_called_missing(served: Hub, tmp_path: Path) -> None:
    shutil.copytree(SAMPLE / "rl-sgd", tmp_path / "m")
    served.repos["org/m"] = tmp_path / "m"
    served.redirect = False
    served.fault = lambda asked: (503, {}) if "00003" in asked.path else None
    index = next((tmp_path / "m").glob("*.index.json")).name
    with pytest.raises(BrokenFile, match="503"):
        checkpoints.open(f"{served.url}/org/m/resolve/main/{index}")


def test_a_small_file_may_come_whole(served: Hub, tmp_path: Path) -> None:
    shutil.copytree(SAMPLE / "base", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"long": "x" * (2 << 20)}))
    served.repos["org/m"] = tmp_path / "m"
    served.fault = lambda asked: "whole" if asked.path.endswith("json") else None
    assert (checkpoints.open("org/m").config or {})["model_type"] == config["model_type"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/m.safetensors?Signature=secret", "https://", "http://h:99999/m.bin",
                                 "http://[foo/x.bin", "http://[::1]:9/m.safetensors::model"])  # fmt: skip
def test_addresses_that_lead_nowhere(url: str) -> None:
    with pytest.raises((NotFound, UnsupportedFormat)) as caught:
        checkpoints.open(url)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None or "secret" not in str(caught.value.__cause__)


def test_a_signature_stands_in_no_output(served: Hub, tmp_path: Path) -> None:
    url = f"{served.cdn.replace('http://', 'http://user:password@')}/cdn/org/base/resolve/main/model.safetensors?Signature=secret"
    done = run("sparsity", url, SAMPLE / "rl-sgd", "--out", tmp_path / "out", env=environment(HF_HOME=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, done.stderr, (tmp_path / "out" / "run.json").read_text()):
        assert "secret" not in text
        assert "password" not in text


def test_a_mistyped_local_path_is_not_asked_of_the_hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "exp1").mkdir(parents=True)
    with pytest.raises(NotFound, match="write hf://runs"):
        checkpoints.open("runs/expp1/checkpoint-500")
    places.download("runs/expp1")
    assert served.log == []


def test_offline_mode_is_kept(served: Hub, tmp_path: Path) -> None:
    more = environment(HF_ENDPOINT=served.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    assert_sentence(run("inspect", "org/base", env=more), 2, "HF_HUB_OFFLINE is set")
    assert served.log == []


def test_a_proxy_of_the_environment_is_used(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that only the proxy knows; the server on loopback stands in for one, as its handler sees the whole address."""
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", served.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    served.redirect = False
    assert len(checkpoints.open("org/base").tensors) == 50


def test_the_cache_in_place_of_the_hub_is_said(served: Hub) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("org/base", endpoint=served.url)
    served.fault = lambda asked: (503, {}) if asked.path.startswith("/api/models") else None
    opened = checkpoints.open("org/base")
    assert any("it answered 503" in warning and COMMIT in warning for warning in opened.warnings)


def test_opening_a_torch_file_takes_little_of_it(served: Hub, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    tensors = {f"layers.{n}.weight": torch.randn(1500, 1000) for n in range(6)}
    torch.save(tensors, tmp_path / "m" / "pytorch_model.bin")
    served.repos["org/m"] = tmp_path / "m"
    opened = checkpoints.open("org/m")
    assert set(opened.tensors) == set(tensors)
    assert sum(end - start for start, end in served.ranges("pytorch_model.bin")) < 3 * ranges.BLOCK  # of 36 MB
    same(paramdiff.compare("org/m", "org/m@v1"), paramdiff.compare(tmp_path / "m", tmp_path / "m"))


def test_codes_of_quantised_weights_come_in_large_requests(served: Hub, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    weight = torch.randn(2048, 4096).to(torch.float8_e4m3fn)
    save_file({"layers.0.mlp.up_proj.weight": weight, "layers.0.mlp.up_proj.weight_scale_inv": torch.rand(16, 32)},
              tmp_path / "m" / "model.safetensors")  # fmt: skip
    told = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (tmp_path / "m" / "config.json").write_text(json.dumps({"quantization_config": told}))
    served.repos["org/m"] = tmp_path / "m"
    diff = paramdiff.compare("org/m", tmp_path / "m", threads=1)
    assert diff.tensors["stored_base"].to_list()[0] == "fp8_block"
    same(diff, paramdiff.compare(tmp_path / "m", tmp_path / "m"))
    asked = served.ranges("model.safetensors")
    assert len(asked) < 6
    assert sum(end - start for start, end in asked) < 3 * weight.numel()  # values and codes are compared
