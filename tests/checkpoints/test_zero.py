"""DeepSpeed's own checkpoints (tests/real/make_zero.py) against what DeepSpeed gathers, and broken sets of files."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import paramdiff
from paramdiff import checkpoints
from paramdiff.errors import BrokenFile, CheckpointError, UnsupportedFormat
from tests.checkpoints.test_dcp import assert_same, raw, read
from tests.cli.helpers import assert_sentence, run, run_json

REAL = Path(__file__).parents[1] / "real" / "zero"
RUNS = ["stage1", "stage1_f32_grads", "stage2", "stage2_f32", "stage3", "stage3_groups"]
TAG = "global_step2"


def expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(str(REAL / "expected" / f"{name.removesuffix('_universal')}.safetensors"))


@pytest.mark.parametrize("name", [*RUNS, "stage2_universal", "stage3_groups_universal"])
def test_every_tensor_is_what_deepspeed_gathers(name: str) -> None:
    checkpoint = checkpoints.open(str(REAL / name))
    assert checkpoint.warnings == []
    assert checkpoint.facts()["format"] == ("universal" if "universal" in name else f"zero{name[5]}")
    assert_same(checkpoint, expected(name))


@pytest.mark.parametrize("name", ["stage2", "stage3"])
def test_the_tag_itself(name: str) -> None:
    assert_same(checkpoints.open(str(REAL / name / TAG)), expected(name))


def test_masters_against_their_own_bf16_copy() -> None:
    """ZeRO-2 saves both: the masters differ from the model in value, and not after rounding."""
    module = REAL / "stage2" / TAG / "mp_rank_00_model_states.pt"
    diff = paramdiff.compare(f"{module}::module", REAL / "stage2")
    trained = diff.tensors.filter(diff.tensors["dtype_tuned"] == "F32")
    assert trained.height > 9
    assert trained["changed"].sum() > 0
    assert trained["changed_bf16"].sum() == 0


def test_a_trainer_directory(tmp_path: Path) -> None:
    """checkpoint-N with DeepSpeed's directory in it, the config beside, and no export."""
    shutil.copytree(REAL / "stage3", tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-2" / "config.json").write_text('{"tie_word_embeddings": true}')
    checkpoint = checkpoints.open(str(tmp_path / "run" / "checkpoint-2"))
    assert checkpoint.config == {"tie_word_embeddings": True}
    assert_same(checkpoint, expected("stage3"))
    told = run_json("sparsity", REAL / "stage2", tmp_path / "run" / "checkpoint-2")
    assert told["coverage"]["compared"] == 16
    assert_sentence(run("sparsity", REAL / "stage2", tmp_path / "run"), 2, "several steps", "checkpoint-2")
    save_file({"w": torch.ones(2)}, str(tmp_path / "run" / "checkpoint-2" / "model.safetensors"))
    checkpoint = checkpoints.open(str(tmp_path / "run" / "checkpoint-2"))
    assert list(checkpoint.tensors) == ["w"]
    assert f"{TAG}/ ignored" in checkpoint.warnings[0]
    checkpoint.close()


# --- broken copies -------------------------------------------------------------------------------


def copied(name: str, path: Path) -> Path:
    return Path(shutil.copytree(REAL / name / TAG, path))


@pytest.mark.parametrize("name", ["stage2", "stage3"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    for number, pattern in enumerate(["*rank_0_*optim*", "*rank_1_*optim*", "*model_states*"]):
        path = copied(name, tmp_path / str(number))
        for file in path.glob(pattern):
            file.unlink()
        with pytest.raises(BrokenFile):
            checkpoints.open(str(path))


@pytest.mark.parametrize("name", ["stage2", "stage3_groups"])
def test_cut_files(tmp_path: Path, name: str) -> None:
    path = copied(name, tmp_path / "a")
    for file in path.iterdir():
        whole = file.read_bytes()
        for keep in range(0, len(whole), len(whole) // 10):
            file.write_bytes(whole[:keep])
            with pytest.raises(CheckpointError):
                checkpoints.open(str(path))
        file.write_bytes(whole)
    checkpoints.open(str(path)).close()


# --- by hand: what the runs above cannot show ----------------------------------------------------


def zero2(path: Path, ranks: int = 1, **changes: Any) -> dict[str, torch.Tensor]:
    """Files of ZeRO-2 with one group of two parameters, and the two. `changes` go into the model's state."""
    path.mkdir(parents=True)
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(5, 7), "b.weight": torch.randn(11)}
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    padded = torch.cat([flat, torch.zeros(-len(flat) % (2 * ranks))])
    for rank, part in enumerate(padded.chunk(ranks)):
        kept = part if rank < ranks - 1 else part[: len(part) - (len(padded) - len(flat))]
        state = {"zero_stage": 2, "partition_count": [ranks], "single_partition_of_fp32_groups": [kept.clone()]}
        torch.save({"optimizer_state_dict": state}, path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    facts = {
        "module": {name: weight.bfloat16() for name, weight in weights.items()}, "buffer_names": [], "shared_params": {},
        "param_shapes": [OrderedDict((name, weight.shape) for name, weight in weights.items())],
        "dp_world_size": ranks, "mp_world_size": 1,
    }  # fmt: skip
    torch.save(facts | changes, path / "mp_rank_00_model_states.pt")
    return weights


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
def test_ranks_are_put_in_the_order_of_their_numbers(tmp_path: Path, ranks: int) -> None:
    """Twelve: as text, 10 and 11 would come before 2."""
    weights = zero2(tmp_path / "a", ranks)
    assert_same(checkpoints.open(str(tmp_path / "a")), weights)


def test_what_is_not_put_together_is_named(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[CheckpointError], str]] = [
        ({"mp_world_size": 2}, UnsupportedFormat, "model parallelism"),
        ({"ds_autoep_layers": [1]}, UnsupportedFormat, "AutoEP"),
        ({"param_shapes": [{"a.weight": (6, 7), "b.weight": (11,)}]}, BrokenFile, ""),
        ({"param_shapes": [{"a.weight": (5, 7)}]}, BrokenFile, ""),
        ({"param_shapes": [{"a.weight": (-5, 7), "b.weight": (11,)}]}, BrokenFile, ""),
        ({"param_shapes": [{"a.weight": (1 << 40, 1 << 40), "b.weight": (11,)}]}, BrokenFile, ""),
        ({"param_shapes": None}, BrokenFile, ""),
    ]
    for number, (changes, kind, words) in enumerate(cases):
        zero2(tmp_path / str(number), 2, **changes)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.open(str(tmp_path / str(number)))
        assert type(caught.value) is kind, (changes, caught.value)
        assert words in str(caught.value), changes
    zero2(tmp_path / "shared", 2, shared_params={"c.weight": "nothing"})
    assert "'c.weight' left out" in checkpoints.open(str(tmp_path / "shared")).warnings[0]
    zero2(tmp_path / "parts")
    shutil.copy(tmp_path / "parts" / "mp_rank_00_model_states.pt", tmp_path / "parts" / "mp_rank_01_model_states.pt")
    with pytest.raises(UnsupportedFormat, match="parallel"):
        checkpoints.open(str(tmp_path / "parts"))
    with pytest.raises(UnsupportedFormat, match="names an entry"):
        checkpoints.open(f"{REAL / 'stage2'}::module")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def test_gaps_between_parameters(tmp_path: Path) -> None:
    """Newer versions begin parameters at even places, and say how much they left out."""
    weights = zero2(tmp_path / "a")
    flat = torch.cat([weights["a.weight"].flatten(), torch.full((5,), 9.0), weights["b.weight"], torch.zeros(1)])

    def changed(content: Any) -> None:
        content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = flat
        content["optimizer_state_dict"]["param_alignment_paddings"] = [[5, 0]]

    edit(tmp_path / "a" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", changed)
    assert_same(checkpoints.open(str(tmp_path / "a")), weights)


def test_files_of_more_ranks_than_there_are(tmp_path: Path) -> None:
    zero2(tmp_path / "a", 2)
    for rank in range(2):
        path = tmp_path / "a" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        edit(path, lambda content: content["optimizer_state_dict"].update(partition_count=[3]))
    with pytest.raises(BrokenFile, match="is one of 3, but there are 2"):
        checkpoints.open(str(tmp_path / "a"))


def test_a_group_that_is_too_short_or_too_long(tmp_path: Path) -> None:
    for number, change in enumerate(
        [
            lambda v: v[:-3],
            lambda v: torch.cat([v, torch.zeros(40)]),
            lambda v: v.double(),
            lambda v: v.reshape(1, -1).T.expand(-1, 2),
        ]
    ):
        path = tmp_path / str(number)
        zero2(path, 2)

        def changed(content: Any, change: Callable[[Any], Any] = change) -> None:
            groups = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
            groups[0] = change(groups[0])

        edit(path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", changed)
        with pytest.raises(CheckpointError):
            checkpoints.open(str(path))


# --- universal -----------------------------------------------------------------------------------


def test_universal_directories_that_are_not_whole(tmp_path: Path) -> None:
    path = Path(shutil.copytree(REAL / "stage3_groups_universal", tmp_path / "a"))
    (path / "zero" / "norm.weight" / "fp32.pt").unlink()
    with pytest.raises(BrokenFile, match=r"zero/norm\.weight/fp32\.pt"):
        checkpoints.open(str(path))
    torch.save(torch.ones(3), path / "zero" / "norm.weight" / "fp32.pt")
    with pytest.raises(BrokenFile, match=r"norm\.weight"):
        checkpoints.open(str(path))
    torch.save({"step": 3}, path / "zero" / "norm.weight" / "fp32.pt")
    with pytest.raises(BrokenFile, match="neither a tensor"):
        checkpoints.open(str(path))


def test_universal_without_the_models_state(tmp_path: Path) -> None:
    for name in ("a.weight", "b.weight"):
        (tmp_path / "zero" / name).mkdir(parents=True)
        torch.save({"param": torch.arange(6.0).reshape(2, 3)}, tmp_path / "zero" / name / "fp32.pt")
    checkpoint = checkpoints.open(str(tmp_path))
    assert read(checkpoint, "b.weight") == raw(torch.arange(6.0))
    assert checkpoint.tensors["a.weight"].shape == (2, 3)
    checkpoint.close()


@pytest.mark.slow
def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    """A process is allowed 1,024 open files by default; the limit is raised as far as it may be."""
    import resource

    for number in range(1100):
        directory = tmp_path / "zero" / f"layers.{number}.weight"
        directory.mkdir(parents=True)
        torch.save(torch.full((2,), float(number)), directory / "fp32.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2500:
        pytest.skip("this machine allows no more open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        assert paramdiff.compare(tmp_path, tmp_path, measures=["change"]).summary()["changed"] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
