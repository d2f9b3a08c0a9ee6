"""Distributed checkpoints: what torch.distributed writes is read back bit by bit, and broken ones are refused."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import paramdiff
from paramdiff import checkpoints
from paramdiff.checkpoints import layouts
from paramdiff.checkpoints.dcp import is_weight
from paramdiff.errors import BrokenFile, CheckpointError, NotFound, UnsupportedFormat

ROOT = Path(__file__).parents[2]


def write(path: Path, state: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        dcp.save(state, checkpoint_id=str(path), no_dist=True)
    return path


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(11, 6).bfloat16(),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(6, 6),
        "model.norm.weight": torch.randn(6).half(),
    }


def optimizer(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    state = {n: {"step": torch.tensor(3.0), "exp_avg": w.float(), "exp_avg_sq": w.float()} for n, w in weights.items()}
    return {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [*weights]}]}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def read(checkpoint: checkpoints.Checkpoint, name: str, step: int | None = None) -> bytes:
    """All bytes of a tensor, `step` at a time."""
    whole = bytearray(checkpoint.tensors[name].nbytes)
    for start in range(0, len(whole), step or max(len(whole), 1)):
        part = bytearray(min(step or len(whole), len(whole) - start))
        checkpoint.read_into(name, start, memoryview(part))
        whole[start : start + len(part)] = part
    return bytes(whole)


def assert_same(checkpoint: checkpoints.Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        for step in (None, 1000, 97, 10):
            assert read(checkpoint, name, step) == raw(tensor), name
    checkpoint.close()


# --- real saves of several ranks -----------------------------------------------------------------


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dcp")
    made = subprocess.run(
        [sys.executable, "-m", "tests.real.make_dcp", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "four", "hf_two", "hf_four"])
def test_tensors_cut_along_one_and_two_axes(real: Path, name: str) -> None:
    assert_same(checkpoints.open(str(real / name)), torch.load(real / "full.pt"))


@pytest.mark.slow
def test_any_cut_compares_equal_to_any_other(real: Path, tmp_path: Path) -> None:
    save_file(torch.load(real / "full.pt"), str(tmp_path / "model.safetensors"))
    for name in ("two", "four", "hf_two", "hf_four"):
        for threads in (1, 2):
            diff = paramdiff.compare(tmp_path, real / name, threads=threads)
            assert diff.summary()["changed"] == 0
            assert diff.coverage.height == 0


@pytest.mark.slow
def test_a_part_stands_for_its_directory_and_a_copy_of_one_is_refused(real: Path, tmp_path: Path) -> None:
    expected = torch.load(real / "full.pt")
    assert_same(checkpoints.open(str(real / "hf_two" / "shard-00002-model-00001-of-00001.safetensors")), expected)
    assert_same(checkpoints.open(str(real / "two" / "__1_0.distcp")), expected)
    shutil.copy(real / "hf_two" / "shard-00001-model-00001-of-00001.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedFormat, match="holds parts of tensors"):
        checkpoints.open(str(tmp_path))


@pytest.mark.slow
def test_a_consolidated_save_is_read_as_safetensors(real: Path) -> None:
    checkpoint = checkpoints.open(str(real / "hf_whole"))
    expected = {n: t for n, t in torch.load(real / "full.pt").items() if t.dtype != torch.float16}
    assert checkpoint.facts()["format"] == "safetensors"
    assert_same(checkpoint, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "fsdp/pytorch_model_fsdp_0"])
def test_accelerate_fsdp(real: Path, name: str) -> None:
    checkpoint = checkpoints.open(str(real / name))
    expected = torch.load(real / "fsdp.pt")
    assert checkpoint.config is not None
    assert checkpoint.config["tie_word_embeddings"] is True
    assert set(expected) - set(checkpoint.tensors) <= {"lm_head.weight"}
    assert_same(checkpoint, {name: tensor for name, tensor in expected.items() if name in checkpoint.tensors})


@pytest.mark.slow
def test_a_missing_shard_or_file_is_named(real: Path, tmp_path: Path) -> None:
    shutil.copytree(real / "hf_four", tmp_path / "hf")
    (tmp_path / "hf" / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(BrokenFile, match="lacks shard 2"):
        checkpoints.open(str(tmp_path / "hf"))
    shutil.copytree(real / "hf_four", tmp_path / "last")
    (tmp_path / "last" / "shard-00004-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(BrokenFile, match="incomplete or broken"):  # cut along two axes, a corner is missing
        checkpoints.open(str(tmp_path / "last"))
    shutil.copytree(real / "four", tmp_path / "four")
    (tmp_path / "four" / "__2_0.distcp").unlink()
    with pytest.raises(BrokenFile, match="__2_0"):
        checkpoints.open(str(tmp_path / "four"))


# --- where trainers put the model ----------------------------------------------------------------

LAYOUTS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "generic": lambda m: {"model": m, "optim": optimizer(m)},
    "accelerate": lambda m: {"model": m},
    "prime-rl": lambda m: {"app": {"model": m, "optimizers": optimizer(m), "progress": {"step": 4}}},
    "areal": lambda m: {"dcp": {"model": m, "optim": optimizer(m)}},
    "nemo-rl": lambda m: {"model": m, "optim": {"optim": optimizer(m), "sched": {"last_epoch": 4}}},
    "torchtitan": lambda m: {
        **m,
        "optimizer": {f"state.{n}.{s}": w.float() for n, w in m.items() for s in ("exp_avg", "exp_avg_sq")},
        "train_state": {"step": 4},
    },
    "flat optimizer": lambda m: {**m, **{f"optimizer.state.{n}.exp_avg": w.float() for n, w in m.items()}},
    "average": lambda m: {"model": m, "ema": {n: w * 2 for n, w in m.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_is_found_under_its_own_names(tmp_path: Path, layout: str) -> None:
    write(tmp_path / "ckpt", LAYOUTS[layout](model()))
    checkpoint = checkpoints.open(str(tmp_path / "ckpt"))
    assert checkpoint.warnings == []
    assert_same(checkpoint, model())


def test_optimizers_without_weights_say_so(tmp_path: Path) -> None:
    write(tmp_path / "optimizer_0", {"optimizer": optimizer(model())})
    with pytest.raises(BrokenFile, match="holds no weights"):
        checkpoints.open(str(tmp_path / "optimizer_0"))


def test_another_place_is_read_where_it_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "ckpt", LAYOUTS["average"](model()))
    checkpoint = checkpoints.open(f"{path}::ema")
    assert_same(checkpoint, {name: weight * 2 for name, weight in model().items()})
    with pytest.raises(BrokenFile, match="no tensors under 'nothing'"):
        checkpoints.open(f"{path}::nothing")


def test_two_models_are_read_together_under_their_paths(tmp_path: Path) -> None:
    path = write(tmp_path / "ckpt", {"student": model(0), "teacher": model(1)})
    checkpoint = checkpoints.open(str(path))
    assert set(checkpoint.tensors) == {f"{who}.{name}" for who in ("student", "teacher") for name in model()}
    assert read(checkpoint, "teacher.model.norm.weight") == raw(model(1)["model.norm.weight"])
    checkpoint.close()


def test_one_named_place_beside_another_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "ckpt", {"model": model(0), "teacher": model(1)})
    checkpoint = checkpoints.open(str(path))
    assert checkpoint.warnings == [f"{path}: the tensors under 'model' are read, not 'teacher'."]
    assert_same(checkpoint, model(0))


def test_of_two_usual_names_the_more_usual_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "ckpt", {"module": model(1), "model": model(0)})
    checkpoint = checkpoints.open(str(path))
    assert checkpoint.warnings == [f"{path}: the tensors under 'model' are read, not 'module'."]
    assert_same(checkpoint, model(0))


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    state = {"scale": torch.tensor(2.5), "none": torch.zeros(0, 4), "one": torch.ones(1)}
    assert_same(checkpoints.open(str(write(tmp_path / "ckpt", {"model": state}))), state)


def test_changes_are_counted_across_containers(tmp_path: Path) -> None:
    base, tuned = model(), model()
    tuned["model.layers.0.self_attn.q_proj.weight"][2, 3] += 1
    write(tmp_path / "step_1", {"app": {"model": base}})
    (tmp_path / "hf").mkdir()
    save_file(tuned, str(tmp_path / "hf" / "model.safetensors"))
    diff = paramdiff.compare(tmp_path / "step_1", tmp_path / "hf")
    assert diff.summary()["changed"] == 1
    assert diff.tensors.height == 3


def test_the_words_that_mean_no_weights() -> None:
    assert is_weight(("model.layers.0.optimizer_gate.weight",)) is True
    assert is_weight(("app", "optimizers", "state", "w", "exp_avg")) is False
    assert is_weight(("optimizer.state.exp_avg.decoder.layers.weight",)) is False
    assert is_weight(("model", "lr_scheduler.weight")) is False


# --- directories of runs -------------------------------------------------------------------------


def test_the_step_of_a_run_is_asked_for_and_the_newest_offered(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path / f"global_step_{step}" / "actor", {"model": model()})
    with pytest.raises(NotFound, match="several steps") as caught:
        checkpoints.open(str(tmp_path))
    assert caught.value.hint == f"Give one of them; the newest is {tmp_path / 'global_step_100'}."
    checkpoints.open(str(tmp_path / "global_step_9")).close()


def test_what_lies_beside_is_said(tmp_path: Path) -> None:
    for who in ("actor", "critic"):
        write(tmp_path / who, {"model": model()})
    checkpoint = checkpoints.open(str(tmp_path))
    assert checkpoint.warnings == [f"{tmp_path}: actor/ is read, not critic/."]
    assert_same(checkpoint, model())


def test_nemo_and_prime_directories(tmp_path: Path) -> None:
    write(tmp_path / "nemo" / "policy" / "weights", {"model": model()})
    write(tmp_path / "nemo" / "policy" / "optimizer", {"optim": optimizer(model())})
    write(tmp_path / "prime" / "trainer", {"app": {"model": model()}})
    for name in ("nemo", "prime"):
        assert_same(checkpoints.open(str(tmp_path / name)), model())


def test_the_export_beside_distributed_weights_is_preferred_and_the_others_named(tmp_path: Path) -> None:
    write(tmp_path / "pytorch_model_fsdp_0", {"model": model()})
    save_file(model(1), str(tmp_path / "model.safetensors"))
    checkpoint = checkpoints.open(str(tmp_path))
    assert "pytorch_model_fsdp_0/ ignored" in checkpoint.warnings[0]
    assert_same(checkpoint, model(1))


def test_links_that_go_round_end(tmp_path: Path) -> None:
    (tmp_path / "actor").symlink_to(tmp_path)
    with pytest.raises(CheckpointError):
        checkpoints.open(str(tmp_path))
    assert layouts.inside(tmp_path) is None


# --- broken and hostile --------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return write(tmp_path / "ckpt", {"model": model()})


class Attack:
    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


def test_metadata_is_not_executed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (saved / ".metadata").write_bytes(pickle.dumps({"a": Attack()}))
    with pytest.raises(UnsupportedFormat, match="exec"):
        checkpoints.open(str(saved))
    assert not (tmp_path / "executed").exists()


def test_a_part_is_not_executed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Attack(), tmp_path / "bad.pt")
    bad = (tmp_path / "bad.pt").read_bytes()
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(bad)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    (saved / "__0_0.distcp").write_bytes(bad)
    with pytest.raises(UnsupportedFormat, match="exec"):
        checkpoints.open(str(saved))
    assert not (tmp_path / "executed").exists()


def test_no_metadata_is_an_unfinished_save(saved: Path) -> None:
    (saved / ".metadata").unlink()
    with pytest.raises(BrokenFile, match="cut short"):
        checkpoints.open(str(saved))


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_cut_files(saved: Path, keep: int) -> None:
    for name in (".metadata", "__0_0.distcp"):
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole[:keep])
        with pytest.raises(BrokenFile):
            checkpoints.open(str(saved))
        (saved / name).write_bytes(whole)
    checkpoints.open(str(saved)).close()


def first(metadata: Any) -> Any:
    return next(iter(metadata.state_dict_metadata.values()))


def place(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a path out of the directory": (lambda m: setattr(place(m), "relative_path", "../other"), "no file name"),
    "an absolute path": (lambda m: setattr(place(m), "relative_path", "/etc/passwd"), "no file name"),
    "a negative offset": (lambda m: setattr(place(m), "offset", -5), "no file name and range"),
    "an offset beyond": (lambda m: setattr(place(m), "offset", 1 << 40), "truncated"),
    "a length beyond": (lambda m: setattr(place(m), "length", 1 << 60), "truncated"),
    "an offset within another part": (lambda m: setattr(place(m), "offset", 8), "damaged"),
    "a larger tensor": (lambda m: setattr(first(m), "size", torch.Size([1 << 40, 6])), "elements"),
    "another shape": (lambda m: setattr(first(m), "size", torch.Size([6, 11])), "does not fit"),
    "a part more": (lambda m: first(m).chunks.append(first(m).chunks[0]), "none"),
    "no parts": (lambda m: first(m).chunks.clear(), "hold 0 of"),
    "no place": (lambda m: m.storage_data.clear(), "lacks a part"),
    "another type": (lambda m: setattr(first(m).properties, "dtype", torch.float64), "where .metadata says"),
    "no list of tensors": (lambda m: setattr(m, "state_dict_metadata", None), "damaged"),
    "a size that is none": (lambda m: setattr(first(m), "size", "many"), "damaged"),
    "negative sizes": (lambda m: setattr(first(m), "size", (-1, 6)), "damaged"),
    "a smaller part": (lambda m: setattr(first(m).chunks[0], "sizes", torch.Size([5, 6])), "where .metadata says"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_metadata(saved: Path, case: str) -> None:
    change, sentence = WRONG[case]
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    change(metadata)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    if case == "a part more":  # the same box twice is a copy, as ranks that hold the same write it
        assert_same(checkpoints.open(str(saved)), model())
        return
    with pytest.raises(BrokenFile, match=sentence):
        checkpoints.open(str(saved))


def test_compressed_parts_are_named(saved: Path) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    place(metadata).transform_descriptors = ["zstd"]
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsupportedFormat, match="compressed"):
        checkpoints.open(str(saved))


def test_offsets_of_sharded_safetensors_are_checked(tmp_path: Path) -> None:
    def shard(number: int, info: Any) -> None:
        name = f"shard-{number:05d}-model-00001-of-00001.safetensors"
        meta = {"DCP_SHARDING_INFO": info if isinstance(info, str) else json.dumps(info)}
        save_file({"w": torch.ones(2, 2)}, str(tmp_path / name), metadata=meta)

    shard(1, {"w": {"saved_offsets": [0, 0]}})
    for wrong in (
        "{",
        "[]",
        {"w": {}},
        *({"w": {"saved_offsets": at}} for at in ([2], [-2, 0], [1, 0], [5, 0], [1 << 63, 0])),
    ):
        shard(2, wrong)
        with pytest.raises(BrokenFile):
            checkpoints.open(str(tmp_path))
    shard(2, {"w": {"saved_offsets": [2, 0]}})
    assert_same(checkpoints.open(str(tmp_path)), {"w": torch.ones(4, 2)})


# --- Megatron ------------------------------------------------------------------------------------


def test_megatron_torch_dist_is_the_same_container() -> None:
    """Written by tests/real/make_megatron.py; the layers lie stacked under one key."""
    checkpoint = checkpoints.open(str(ROOT / "tests/real/megatron/iter_0000002"))

    def counted(first: int, *shape: int) -> torch.Tensor:
        return torch.arange(first, first + shape[0] * shape[1], dtype=torch.float32).reshape(shape)

    assert_same(
        checkpoint,
        {
            "embedding.word_embeddings.weight": counted(0, 12, 4),
            "decoder.layers.mlp.linear_fc1.weight": torch.stack([counted(1000 + 100 * n, 8, 4) for n in range(3)]),
            "decoder.layers.self_attention.linear_proj.weight": torch.stack(
                [counted(2000 + 100 * n, 4, 4) for n in range(3)]
            ),
        },
    )


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"], "Megatron's old format"),
        (["mp_rank_00_000/model_optim_rng.pt", "mp_rank_00_001/model_optim_rng.pt"], "Megatron's old format"),
        (["pytorch_model_fsdp_0_rank0.bin", "pytorch_model_fsdp_0_rank1.bin"], "LOCAL_STATE_DICT"),
    ],
)
def test_parts_that_are_not_read_are_named_with_the_way_out(tmp_path: Path, names: list[str], word: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"model": model()}, tmp_path / name)
    with pytest.raises(UnsupportedFormat, match=word) as caught:
        checkpoints.open(str(tmp_path))
    assert caught.value.hint
