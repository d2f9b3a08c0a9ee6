"""From a path to the files that hold the weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from paramdiff import checkpoints
from paramdiff.errors import BrokenFile, CheckpointError, NotFound, UnsupportedFormat
from tests.helpers import model_dir, save, write_index

ONE, TWO, THREE = torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0)
FIRST, SECOND, INDEX = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"


def opened(path: Path | str) -> tuple[dict[str, bytes], list[str]]:
    """All names with their bytes, and the warnings."""
    checkpoint = checkpoints.open(str(path))
    found = {}
    for name, info in checkpoint.tensors.items():
        buffer = bytearray(info.nbytes)
        checkpoint.read_into(name, 0, memoryview(buffer))
        found[name] = bytes(buffer)
    checkpoint.close()
    return found, checkpoint.warnings


def raw(**tensors: torch.Tensor) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def sharded(path: Path) -> Path:
    save(path / FIRST, {"a": ONE})
    save(path / SECOND, {"b": TWO})
    return path


def error(kind: type[CheckpointError], path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.open(str(path))
    assert type(caught.value) is kind
    return str(caught.value)


def test_file_directory_and_config(tmp_path):
    folder = model_dir(tmp_path / "m", {"a": ONE, "b": TWO}, {"model_type": "x"})
    assert opened(folder) == opened(folder / "model.safetensors") == (raw(a=ONE, b=TWO), [])
    checkpoint = checkpoints.open(str(folder))
    assert checkpoint.config == {"model_type": "x"}
    assert checkpoint.ref == str(folder)
    checkpoint.close()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000], ids=["empty", "open", "list", "null", "deep"])
def test_config_that_cannot_be_used_is_none(tmp_path, text):
    folder = model_dir(tmp_path / "m", {"a": ONE})
    (folder / "config.json").write_text(text)
    checkpoint = checkpoints.open(str(folder))
    assert checkpoint.config is None
    checkpoint.close()


def test_shards_written_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    expected = {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}
    assert opened(tmp_path) == (expected, [])
    assert opened(tmp_path / INDEX)[0] == expected
    checkpoint = checkpoints.open(str(tmp_path))
    assert checkpoint.config["model_type"] == "qwen2"
    assert {checkpoint.position(name)[0] for name in expected} == set(range(len(checkpoint.facts()["files"])))
    checkpoint.close()
    (tmp_path / INDEX).unlink()
    assert opened(tmp_path) == (expected, [])


def test_complete_set_without_index_and_leftovers(tmp_path):
    sharded(tmp_path)
    save(tmp_path / "model-00001-of-00003.safetensors", {"a": THREE})
    found, warnings = opened(tmp_path)
    assert found == raw(a=ONE, b=TWO)
    assert len(warnings) == 1
    assert "model-00001-of-00003.safetensors" in warnings[0]


def test_index_leaves_stale_shards_aside(tmp_path):
    sharded(tmp_path)
    save(tmp_path / "model-00003-of-00003.safetensors", {"a": THREE, "c": THREE})
    write_index(tmp_path / INDEX, {"a": FIRST, "b": SECOND})
    found, warnings = opened(tmp_path)
    assert found == raw(a=ONE, b=TWO)
    assert any("model-00003-of-00003.safetensors" in warning for warning in warnings)


def test_index_decides_between_two_copies(tmp_path):
    save(tmp_path / FIRST, {"a": ONE, "b": THREE})
    save(tmp_path / SECOND, {"b": TWO})
    write_index(tmp_path / INDEX, {"a": FIRST, "b": SECOND})
    found, warnings = opened(tmp_path)
    assert found == raw(a=ONE, b=TWO)
    assert any("'b'" in warning and FIRST in warning for warning in warnings)


def test_one_file_before_an_index(tmp_path):
    sharded(tmp_path)
    write_index(tmp_path / INDEX, {"a": FIRST, "b": SECOND})
    save(tmp_path / "model.safetensors", {"a": THREE})
    found, warnings = opened(tmp_path)
    assert found == raw(a=THREE)
    assert FIRST in warnings[0]


def test_adapter_beside_a_model_is_not_the_model(tmp_path):
    save(tmp_path / "adapter_model.safetensors", {"lora": THREE})
    save(tmp_path / "model.safetensors", {"a": ONE})
    assert opened(tmp_path)[0] == raw(a=ONE)


def test_adapter_alone(tmp_path):
    save(tmp_path / "adapter_model.safetensors", {"lora": THREE})
    message = error(UnsupportedFormat, tmp_path)
    assert str(tmp_path) in message
    assert "PEFT adapter" in message


def test_only_file_of_any_name(tmp_path):
    save(tmp_path / "weights.safetensors", {"a": ONE})
    assert opened(tmp_path) == (raw(a=ONE), [])


def test_diffusers_names(tmp_path):
    save(tmp_path / "diffusion_pytorch_model.safetensors", {"a": ONE})
    save(tmp_path / "diffusion_pytorch_model.fp16.safetensors", {"a": TWO})
    found, warnings = opened(tmp_path)
    assert found == raw(a=ONE)
    assert "fp16" in warnings[0]


@pytest.mark.parametrize("name", ["no/such/place", "/no/such/place", "nothing.safetensors", "./a/b"])
def test_missing_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error(NotFound, name)
    assert name in message


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "org/model@main"])
def test_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error(NotFound, name)
    assert f"No such path: {name}" in message
    assert f"the Hub could not be asked for {name}" in message  # tests have none


def test_beside_local_ones_a_name_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert "write hf://org/model@v2" in error(NotFound, "org/model@v2")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~no-such-user-here/model"], ids=["long", "zero byte", "no user"])
def test_path_that_cannot_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name[:20] in error(NotFound, name)


def test_empty_directory(tmp_path):
    message = error(NotFound, tmp_path)
    assert str(tmp_path) in message
    assert "empty directory" in message


def test_directory_without_weights(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert f"{tmp_path} is a directory without weights" in error(NotFound, tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("m.gguf", "GGUF"), ("adapter_model.bin", "PEFT"), ("x.npz", "numpy")],
)
def test_other_formats(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path, tmp_path / name):
        message = error(UnsupportedFormat, path)
        assert str(path) in message
        assert kind in message


def test_weights_one_level_below(tmp_path):
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "model.safetensors", {"a": ONE})
    message = error(NotFound, tmp_path)
    assert str(tmp_path) in message
    assert "unet, vae" in message
    assert str(tmp_path / "vae") in message


def test_missing_shard_without_index(tmp_path):
    save(tmp_path / "model-00001-of-00003.safetensors", {"a": ONE})
    save(tmp_path / "model-00003-of-00003.safetensors", {"c": ONE})
    message = error(BrokenFile, tmp_path)
    assert str(tmp_path) in message
    assert "Shard 2 of 3" in message
    assert "model-00002-of-00003.safetensors" in message


def test_unrelated_files_without_index(tmp_path):
    save(tmp_path / "x.safetensors", {"a": ONE})
    save(tmp_path / "y.safetensors", {"b": ONE})
    message = error(BrokenFile, tmp_path)
    assert "x.safetensors, y.safetensors" in message
    assert str(tmp_path) in message


def test_two_complete_sets(tmp_path):
    sharded(tmp_path)
    save(tmp_path / "other-00001-of-00001.safetensors", {"a": ONE})
    assert str(tmp_path) in error(BrokenFile, tmp_path)


def test_tensor_in_two_shards(tmp_path):
    save(tmp_path / FIRST, {"a": ONE, "b": ONE})
    save(tmp_path / SECOND, {"b": TWO})
    message = error(BrokenFile, tmp_path)
    assert "'b'" in message
    assert str(tmp_path / FIRST) in message
    assert str(tmp_path / SECOND) in message


def test_index_names_a_missing_shard(tmp_path):
    save(tmp_path / FIRST, {"a": ONE})
    write_index(tmp_path / INDEX, {"a": FIRST, "b": SECOND})
    for path in (tmp_path, tmp_path / INDEX):
        message = error(BrokenFile, path)
        assert "Shard 2 of 2" in message
        assert str(tmp_path / SECOND) in message
        assert INDEX in message


def test_index_names_a_tensor_that_its_shard_lacks(tmp_path):
    sharded(tmp_path)
    write_index(tmp_path / INDEX, {"a": FIRST, "b": SECOND, "c": SECOND})
    message = error(BrokenFile, tmp_path)
    assert "'c'" in message
    assert str(tmp_path / SECOND) in message


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", ".", "", "./x.safetensors"]
)
def test_index_may_not_leave_its_directory(tmp_path, name):
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path, folder, folder / "sub"):
        save(path / "x.safetensors", {"a": ONE})
    write_index(folder / INDEX, {"a": name})
    for path in (folder, folder / INDEX):
        message = error(BrokenFile, path)
        assert str(folder) in message


BAD_INDICES = {
    "empty": "",
    "no json": "{",
    "list": "[]",
    "number": "3",
    "no map": "{}",
    "map null": '{"weight_map": null}',
    "map list": '{"weight_map": ["a"]}',
    "number for a file": '{"weight_map": {"a": 3}}',
    "list for a file": '{"weight_map": {"a": ["x.safetensors"]}}',
    "mixed": '{"weight_map": {"a": 3, "b": "x.safetensors"}}',
    "deep": '{"a":' * 100_000,
    "digits": '{"weight_map": ' + "1" * 5000 + "}",
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_index_that_is_none(tmp_path, case):
    index = tmp_path / INDEX
    index.write_text(BAD_INDICES[case])
    for path in (tmp_path, index):
        assert str(index) in error(BrokenFile, path)


def test_index_that_is_not_text(tmp_path):
    (tmp_path / INDEX).write_bytes(b"\xff\xfe\x00")
    assert str(tmp_path / INDEX) in error(BrokenFile, tmp_path)


def test_index_with_a_name_too_long_for_the_system(tmp_path):
    write_index(tmp_path / INDEX, {"a": "x" * 300 + ".safetensors"})
    for path in (tmp_path, tmp_path / INDEX):
        with pytest.raises(CheckpointError) as caught:
            checkpoints.open(str(path))
        assert str(tmp_path) in str(caught.value)


def test_two_indices(tmp_path):
    sharded(tmp_path)
    for stem in ("x", "y"):
        (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}))
    message = error(BrokenFile, tmp_path)
    assert str(tmp_path) in message
    assert "x.safetensors.index.json, y.safetensors.index.json" in message
    assert opened(tmp_path / "x.safetensors.index.json")[0] == raw(a=ONE, b=TWO)


def test_link_to_nothing(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.open(str(tmp_path))
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_pipes_in_place_of_small_files_do_not_hang(tmp_path):
    save(tmp_path / "model.safetensors", {"w": torch.zeros(1)})
    os.mkfifo(tmp_path / "config.json")
    checkpoint = checkpoints.open(str(tmp_path))
    assert checkpoint.config is None
    checkpoint.close()
    os.mkfifo(tmp_path / "other.safetensors.index.json")
    with pytest.raises(BrokenFile, match="not a regular file"):
        checkpoints.open(str(tmp_path / "other.safetensors.index.json"))


def test_an_adapter_beside_a_model_is_named(tmp_path):
    save(tmp_path / "model.safetensors", {"w": torch.zeros(1)})
    save(tmp_path / "adapter_model.safetensors", {"w": torch.zeros(1)})
    checkpoint = checkpoints.open(str(tmp_path))
    assert any("adapter_model.safetensors ignored" in warning for warning in checkpoint.warnings)
    checkpoint.close()
