"""Object stores through obstore, against moto's S3 server: the same numbers as from the disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import paramdiff
from paramdiff import checkpoints
from paramdiff.checkpoints import store
from paramdiff.errors import ChangedWhileReading, CheckpointError, NotFound, UnsupportedFormat
from tests.cli.helpers import SAMPLE, assert_sentence, environment, run, run_json

pytestmark = pytest.mark.slow
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret_of_the_tests", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A server with the base and rl-sgd in a bucket, and what one puts more into it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret_of_the_tests", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    client.create_bucket(Bucket="runs-of-mine")
    client.address = f"http://{host}:{port}"
    for where, prefix in ((SAMPLE / "base", "base"), (SAMPLE / "rl-sgd", "rl/checkpoint-200")):
        for file in where.iterdir():
            client.put_object(Bucket="runs-of-mine", Key=f"{prefix}/{file.name}", Body=file.read_bytes())
    yield client
    server.stop()


@pytest.fixture(autouse=True)
def _environment(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {**KEYS, "AWS_ENDPOINT_URL": s3.address, "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(key, value)
    store._opened.cache_clear()
    store._listed.cache_clear()


def test_a_pair_in_a_bucket() -> None:
    diff = paramdiff.compare("s3://runs-of-mine/base", "s3://runs-of-mine/rl/checkpoint-200/")
    here = paramdiff.compare(SAMPLE / "base", SAMPLE / "rl-sgd")
    assert diff.tensors.equals(here.tensors)
    assert not checkpoints.open("s3://runs-of-mine/base/model.safetensors").is_local
    assert (
        checkpoints.open("s3://runs-of-mine/base/model.safetensors").config == checkpoints.open(str(SAMPLE / "base")).config
    )


def test_through_the_command(tmp_path: Path, s3: Any) -> None:
    more = environment(**KEYS, AWS_ENDPOINT_URL=s3.address, AWS_ALLOW_HTTP="true")
    done = run("sparsity", "s3://runs-of-mine/base", SAMPLE / "rl-sgd", "--out", tmp_path / "out", env=more)
    assert done.returncode == 0, done.stderr
    assert "105,071" in done.stdout
    assert "secret_of_the_tests" not in done.stdout + done.stderr + (tmp_path / "out" / "run.json").read_text()
    assert run_json("plan", SAMPLE / "base", SAMPLE / "rl-sgd")["base"]["requests"] == 0
    said = assert_sentence(run("sparsity", "s3://runs-of-mine/none", SAMPLE / "base", env=more), 2, "No such path")
    assert "secret" not in said
    assert_sentence(run("sparsity", "s3://no-such-bucket/x", SAMPLE / "base", env=more), 2, "is not there")
    assert_sentence(run("sparsity", "s3://runs-of-mine/rl", SAMPLE / "base", env=more), 2, "the newest is", "checkpoint-200")
    assert_sentence(run("sparsity", "s3://", SAMPLE / "base", env=more), 2, "names no bucket")


def test_an_object_that_is_replaced_meanwhile(s3: Any) -> None:
    data = (SAMPLE / "base" / "model.safetensors").read_bytes()
    s3.put_object(Bucket="runs-of-mine", Key="moving/model.safetensors", Body=data)
    opened = checkpoints.open("s3://runs-of-mine/moving")
    opened.verify()
    s3.put_object(Bucket="runs-of-mine", Key="moving/model.safetensors", Body=data[:-1] + b"x")
    with pytest.raises(ChangedWhileReading, match="was replaced"):
        opened.verify()
    s3.delete_object(Bucket="runs-of-mine", Key="moving/model.safetensors")
    with pytest.raises(ChangedWhileReading):
        opened.verify()
    name = max(opened.tensors, key=lambda n: opened.position(n))
    store._opened.cache_clear()
    with pytest.raises((CheckpointError, NotFound)):
        checkpoints.open("s3://runs-of-mine/moving").read_into(name, 0, memoryview(bytearray(8)))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(UnsupportedFormat, match="takes an extra package") as caught:
        checkpoints.open("s3://runs-of-mine/base")
    assert "paramdiff[stores]" in str(caught.value)
