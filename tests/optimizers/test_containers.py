"""Optimizer state from every container against what its framework gathers: each moment bit by bit, under its name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import paramdiff
from paramdiff.errors import BrokenFile, CheckpointError, NotFound, UnsupportedFormat
from tests.optimizers.live import Net, save, train
from tests.real.make_ranks import KINDS
from tests.real.make_zero import VOCABULARY, Model

ROOT = Path(__file__).parents[2]
REAL = ROOT / "tests" / "real"
WITH_MOMENTS = sorted({*KINDS} - {"placed", "fsdp2_tp"})
ZERO = ["stage1", "stage1_f32_grads", "stage2", "stage3", "stage3_groups", "stage2_universal", "stage3_groups_universal"]


def assert_moments(state: paramdiff.OptimizerState, expected: Mapping[str, Any]) -> None:
    """`expected` by slot/name; nothing may be missing or more."""
    assert {f"{slot}/{name}" for name in state for slot in state[name]} == set(expected)
    for label, value in expected.items():
        slot, _, name = label.partition("/")
        value = value.float().numpy() if isinstance(value, torch.Tensor) else value
        assert np.array_equal(state[name][slot], value.reshape(state[name][slot].shape)), label


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory, "make_ranks")


@pytest.fixture(scope="session")
def dcp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory, "make_dcp")


def made(factory: pytest.TempPathFactory, module: str) -> Path:
    out = factory.mktemp(module)
    done = subprocess.run(
        [sys.executable, "-m", f"tests.real.{module}", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_MOMENTS)
def test_rank_files(ranks: Path, kind: str) -> None:
    state = paramdiff.optimizer(ranks / kind / "global_step_2")
    assert_moments(state, torch.load(ranks / f"{kind}_moments.pt"))
    assert {parameter.steps for parameter in state.parameters.values()} == {(2, 2)}
    assert state.groups[0]["lr"] == 1e-3


@pytest.mark.slow
def test_rank_files_through_the_measure(ranks: Path) -> None:
    """Weights of the rank files, moments in another cut: what bf16 shows is found for all of them."""
    one, two = (paramdiff.adam(ranks / kind / "global_step_2") for kind in ("fsdp1_mesh", "fsdp1_orig"))
    assert one.parameters["bf16_visible"].null_count() == 0
    columns = ["name", "v_mean", "adaptivity", "eff_lr_p50", "bf16_visible"]
    a, b = (found.parameters.select(columns).sort("name") for found in (one, two))
    assert a["v_mean"].to_list() == pytest.approx(b["v_mean"].to_list(), rel=1e-4)  # the same training in another cut
    assert one.run["warnings"] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1_mesh", "fsdp1_orig"])
def test_broken_sets_of_rank_files(ranks: Path, tmp_path: Path, kind: str) -> None:
    def broken(name: str) -> Path:
        shutil.copytree(ranks / kind / "global_step_2" / "actor", tmp_path / name)
        return tmp_path / name

    where = broken("missing")
    (where / "optim_world_size_2_rank_1.pt").unlink()
    with pytest.raises(BrokenFile, match=r"lacks the file of rank 1 of 2: optim_world_size_2_rank_1\.pt"):
        paramdiff.optimizer(where)
    where = broken("nameless")
    for path in where.glob("model_*"):
        path.unlink()
    with pytest.raises(UnsupportedFormat, match="no model_world_size files to name it by"):
        paramdiff.optimizer(where)
    where = broken("shifted")  # the control: state of each number moved to the next
    for path in where.glob("optim_*"):
        kept = torch.load(path, weights_only=False)
        count = len(kept["param_groups"][0]["params"])
        kept["state"] = {(number + 1) % count: value for number, value in kept["state"].items()}
        torch.save(kept, path)
    with pytest.raises((UnsupportedFormat, BrokenFile)):
        paramdiff.optimizer(where)
    where = broken("other_model")
    (where / "model_world_size_2_rank_0.pt").write_bytes((where / "model_world_size_2_rank_0.pt").read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        paramdiff.optimizer(where)


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed(name: str) -> None:
    state = paramdiff.optimizer(REAL / "zero" / name)
    expected = load_file(str(REAL / "zero" / "expected" / f"{name.removesuffix('_universal')}_moments.safetensors"))
    assert_moments(state, expected)
    assert {p.steps for p in state.parameters.values()} == {(2, 2)}
    decays = {name: state[name].group["weight_decay"] for name in state}
    assert decays == {name: 0.1 if len(state.parameters[name].shape or ()) > 1 else 0.0 for name in state}
    found = paramdiff.adam(REAL / "zero" / name)
    assert found.parameters["bf16_visible"].null_count() == 0


def test_deepspeed_that_deals_gradients_out_in_turn() -> None:
    """DeepSpeed itself takes these moments from the wrong places; so the same two steps are taken here, on one process."""
    torch.manual_seed(0)
    model = Model()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            torch.manual_seed(10 * step + rank)
            (model(torch.randint(0, VOCABULARY, (2, 8))) / 2).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)  # as DeepSpeed does unless told otherwise
        optimizer.step()
    state = paramdiff.optimizer(REAL / "zero" / "stage2_f32")
    assert set(state) == set(trained)
    for name, p in trained.items():
        for slot in ("exp_avg", "exp_avg_sq"):
            expected = optimizer.state[p][slot].numpy()
            assert np.allclose(state[name][slot], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max()), (name, slot)


def test_deepspeed_that_is_incomplete(tmp_path: Path) -> None:
    shutil.copytree(REAL / "zero" / "stage2", tmp_path / "a")
    next((tmp_path / "a").glob("*/*rank_1*optim*")).unlink()
    with pytest.raises(BrokenFile, match="lacks the file of rank 1"):
        paramdiff.optimizer(tmp_path / "a")
    shutil.copytree(REAL / "zero" / "stage2_universal", tmp_path / "u")
    (tmp_path / "u" / "zero" / "norm.bias" / "exp_avg.pt").unlink()
    state = paramdiff.optimizer(tmp_path / "u")
    assert list(state["norm.bias"]) == ["exp_avg_sq"]  # and so no Adam, which is said
    row = paramdiff.adam(tmp_path / "u").parameters
    assert "Adafactor" in row.filter(row["name"] == "norm.bias")["note"].item()
    (tmp_path / "u" / "zero" / "optimizer_state.pt").unlink()
    with pytest.raises(CheckpointError):
        paramdiff.optimizer(tmp_path / "u")


@pytest.mark.slow
def test_a_distributed_checkpoint_of_accelerate(dcp: Path) -> None:
    """Against torch's own loader of the whole directory."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(str(dcp / "fsdp" / "optimizer_0"), str(dcp / "optimizer.pt"))
    kept = torch.load(dcp / "optimizer.pt", weights_only=False)["optimizer"]["state"]
    expected = {f"{slot}/{name}": v for name, found in kept.items() for slot, v in found.items() if slot != "step"}
    for where in (dcp / "fsdp", dcp / "fsdp" / "optimizer_0"):
        state = paramdiff.optimizer(where)
        assert_moments(state, expected)
        assert {p.steps for p in state.parameters.values()} == {(1, 1)}
        assert (state.groups[0]["lr"], tuple(state.groups[0]["betas"])) == (1e-3, (0.9, 0.999))
    assert paramdiff.adam(dcp / "fsdp").parameters["bf16_visible"].null_count() == 0


def save_distributed(content: dict[str, Any], where: Path) -> None:
    import torch.distributed.checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is only this process
        torch.distributed.checkpoint.save(content, checkpoint_id=str(where), no_dist=True)


def nested(state: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    return {"app": {"model": model, "optim": state}}


def titan(state: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    flat = {f"state.{n}.{slot}": v for n, kept in state["state"].items() for slot, v in kept.items()}
    for group in state["param_groups"]:
        for name in group["params"]:
            flat |= {f"param_groups.{name}.{k}": v for k, v in group.items() if k != "params"}
    return {**model, "optimizer": flat}


def top(state: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Everything flat at the top, as `flatten_optimizer_state_dict` gives it."""
    found = titan(state, {})["optimizer"]
    return {**model, **{f"optimizer.{key}": value for key, value in found.items()}}


@pytest.mark.parametrize("layout", [nested, titan, top])
def test_distributed_checkpoints_of_every_layout(tmp_path: Path, layout: Callable[..., dict[str, Any]]) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    model, optimizer, _ = train(two_groups, 3)
    state = get_optimizer_state_dict(model, optimizer)
    save_distributed(layout(state, get_model_state_dict(model)), tmp_path / "c")
    found = paramdiff.optimizer(tmp_path / "c")
    expected = {
        f"{slot}/{name}": optimizer.state[p][slot]
        for name, p in model.named_parameters()
        if p in optimizer.state
        for slot in ("exp_avg", "exp_avg_sq")
    }
    assert_moments(found, expected)
    rates = {name: found[name].group["lr"] for name in found if list(found[name])}
    assert rates == {name: 1e-2 if name.startswith(("embed", "layers")) else 1e-3 for name in rates}
    assert {found[name].step for name in rates} == {3}
    measured = paramdiff.adam(tmp_path / "c").parameters
    assert measured.filter(measured["has_state"])["bf16_visible"].null_count() == 0


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    named = dict(parameters)
    fast = [p for name, p in named.items() if name.startswith(("embed", "layers"))]
    slow = [p for name, p in named.items() if not name.startswith(("embed", "layers", "unused"))]
    return torch.optim.AdamW([{"params": fast, "lr": 1e-2}, {"params": slow, "lr": 1e-3}])


def megatron(state: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    kept = {
        f"optimizer.state.{slot}.{n}": v for n, held in state["state"].items() for slot, v in held.items() if slot != "step"
    }
    masters = {f"optimizer.state.fp32_param.{n}": v for n, v in model.items()}
    return {**model, **kept, **masters}


def test_megatron(tmp_path: Path) -> None:
    """Its keys and common.pt by hand, in a checkpoint that torch wrote; and its own writer's."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    model, optimizer, _ = train(lambda p: torch.optim.AdamW([q for n, q in p if "unused" not in n], lr=1e-3), 3)
    names = [name for name, p in model.named_parameters() if "unused" in name]
    whole = {n: v for n, v in get_model_state_dict(model).items() if n not in names}
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    save_distributed(megatron(get_optimizer_state_dict(model, optimizer), whole), tmp_path / "c")
    groups = [
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "step": 3, "wd_mult": w, "weight_decay": w} for w in (0.0, 0.1)
    ]
    torch.save({"optimizer": {"optimizer": {"param_groups": groups}}, "iteration": 3}, tmp_path / "c" / "common.pt")
    state = paramdiff.optimizer(tmp_path / "c")
    assert_moments(state, states_of(model, optimizer))
    assert {p.steps for p in state.parameters.values()} == {(3, 3)}
    assert "weight_decay" not in state.groups[0]  # on which the groups differ
    found = paramdiff.adam(tmp_path / "c").parameters
    assert found["bf16_visible"].null_count() == 0
    whole_state = paramdiff.optimizer(REAL / "megatron" / "iter_0000002")
    assert whole_state["embedding.word_embeddings.weight"]["exp_avg"].shape == (12, 4)


def test_megatron_buckets_are_refused(tmp_path: Path) -> None:
    key = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.exp_avg"
    save_distributed({"w": torch.ones(3), key: torch.ones(3)}, tmp_path / "c")
    with pytest.raises(UnsupportedFormat, match="fully-reshardable"):
        paramdiff.optimizer(tmp_path / "c")


def test_several_optimizers_in_a_distributed_checkpoint(tmp_path: Path) -> None:
    moments = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    state = {"state": {"w": moments}, "param_groups": [{"lr": 0.1, "params": ["w"]}]}
    save_distributed({"actor": state, "critic": state}, tmp_path / "c")
    with pytest.raises(BrokenFile, match="2 optimizers"):
        paramdiff.optimizer(tmp_path / "c")
    assert list(paramdiff.optimizer(f"{tmp_path / 'c'}::critic")) == ["w"]
    with pytest.raises(BrokenFile, match="no optimizer state under 'other'"):
        paramdiff.optimizer(f"{tmp_path / 'c'}::other")


@pytest.mark.parametrize("file", ["optimizer.pt", "optimizer_flat.pt"])
def test_bitsandbytes(file: str, tmp_path: Path) -> None:
    state = paramdiff.optimizer(REAL / "optimizers" / "adam8bit" / file)
    assert_moments(state, load_file(str(REAL / "optimizers" / "expected" / "adam8bit.safetensors")))
    found = paramdiff.adam(REAL / "optimizers" / "adam8bit" / file)
    assert set(found.parameters["dtype_v"]) == {"bnb_8bit", "F32"}  # small ones are kept as they are
    assert found.run["bytes_read"] < 2 * 9200 + 10 * 4 * 9200
    with pytest.raises(paramdiff.NothingToCompare, match="8 bits, too coarse"):
        paramdiff.adam(REAL / "optimizers" / "adam8bit", REAL / "optimizers" / "adam8bit", gradient=True)


@pytest.mark.parametrize(("name", "key"), [("ppo", ""), ("sac", "::critic.optimizer")])
def test_stable_baselines(name: str, key: str) -> None:
    state = paramdiff.optimizer(f"{REAL / 'optimizers' / name}.zip{key}")
    assert_moments(state, load_file(str(REAL / "optimizers" / "expected" / f"{name}.safetensors")))
    assert paramdiff.adam(f"{REAL / 'optimizers' / name}.zip{key}").parameters["bf16_visible"].null_count() == 0


def test_stable_baselines_with_several_optimizers() -> None:
    with pytest.raises(BrokenFile, match="3 optimizers"):
        paramdiff.optimizer(REAL / "optimizers" / "sac.zip")
    with pytest.raises(UnsupportedFormat, match="no order of the model's parameters"):
        paramdiff.optimizer(f"{REAL / 'optimizers' / 'sac.zip'}::ent_coef_optimizer")  # a number that no state dict names


def states_of(model: Net, optimizer: Any) -> dict[str, Any]:
    return {
        f"{slot}/{name}": optimizer.state[p][slot]
        for name, p in model.named_parameters()
        if p in optimizer.state
        for slot in ("exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize("nest", ["optimizer", "optimizer_state_dict", "state/optim", "optimizer_states"])
def test_everything_in_one_file(tmp_path: Path, nest: str) -> None:
    """Lightning's .ckpt and what plain scripts write: weights and state in one file, numbers in the order of the weights."""
    model, optimizer, _ = train(lambda p: torch.optim.AdamW([q for _, q in p], lr=1e-3), 3)
    content: Any = optimizer.state_dict()
    if nest == "optimizer_states":
        content = [content]
    for key in reversed(nest.split("/")):
        content = {key: content}
    torch.save({"epoch": 3, "state_dict": model.state_dict(), **content}, tmp_path / "last.ckpt")
    for ref in (tmp_path / "last.ckpt", tmp_path):
        state = paramdiff.optimizer(ref)
        assert_moments(state, states_of(model, optimizer))
        assert state.naming == "named by the order of the weights' file, groups of one"
        assert paramdiff.adam(ref).by("kind").height > 2


def test_two_optimizers_in_one_file(tmp_path: Path) -> None:
    model, optimizer, _ = train(lambda p: torch.optim.AdamW([q for _, q in p], lr=1e-3), 3)
    kept = optimizer.state_dict()
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [kept, kept]}, tmp_path / "last.ckpt")
    with pytest.raises(BrokenFile, match=r"2 optimizers \('optimizer_states/0', 'optimizer_states/1'\)"):
        paramdiff.optimizer(tmp_path / "last.ckpt")
    assert_moments(paramdiff.optimizer(f"{tmp_path / 'last.ckpt'}::optimizer_states/1"), states_of(model, optimizer))


def test_the_full_state_of_fsdp_is_by_name(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer, _ = train(two_groups, 3)
    torch.save(get_optimizer_state_dict(model, optimizer), tmp_path / "optimizer.bin")
    torch.save(model.state_dict(), tmp_path / "pytorch_model_fsdp.bin")
    state = paramdiff.optimizer(tmp_path)
    assert_moments(state, states_of(model, optimizer))
    assert state.naming == "names in the file"
    assert state["norm.weight"].group["lr"] == 1e-3


def test_groups_by_dimensions_as_plain_scripts_make_them(tmp_path: Path) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        named = [p for _, p in parameters]
        groups = [
            {"params": [p for p in named if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in named if p.ndim < 2]},
        ]
        return torch.optim.AdamW(groups, lr=1e-3)

    model, optimizer, _ = train(make, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    state = paramdiff.optimizer(tmp_path / "ckpt.pt")
    assert_moments(state, states_of(model, optimizer))


def test_moments_in_an_order_that_is_not_contiguous(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([("conv.weight", weight)], lr=1e-3)
    weight.grad = torch.randn(6, 4, 3, 3)
    optimizer.step()
    assert not optimizer.state[weight]["exp_avg"].is_contiguous()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = paramdiff.optimizer(tmp_path)
    assert np.array_equal(state["conv.weight"]["exp_avg"], optimizer.state[weight]["exp_avg"].numpy())


def test_rates_and_counts_that_are_tensors(tmp_path: Path) -> None:
    """A capturable optimizer keeps its learning rate in a tensor; Apex counts steps in the group."""
    model, optimizer, _ = train(lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.25)), 2)
    where = save(tmp_path / "c", model, optimizer)
    assert paramdiff.optimizer(where).groups[0]["lr"] == 0.25
    kept = optimizer.state_dict()
    for state in kept["state"].values():
        del state["step"]
    kept["param_groups"][0]["step"] = 2
    torch.save(kept, where / "optimizer.pt")
    assert paramdiff.optimizer(where)["norm.weight"].step == 2
    del kept["param_groups"][0]["step"]
    torch.save(kept, where / "optimizer.pt")
    found = paramdiff.adam(where).parameters  # without a count, nothing that needs bias correction is known
    assert found["step_max"].null_count() == found.height
    assert found["update_rms"].null_count() == found.height
    assert found["v_mean"].null_count() == 2


def test_places_without_a_state(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="No such path"):
        paramdiff.optimizer(tmp_path / "none")
    with pytest.raises(NotFound, match="holds no optimizer state"):
        paramdiff.optimizer(tmp_path)
    with pytest.raises(NotFound, match="holds no optimizer state"):
        paramdiff.optimizer(ROOT / "sample_data" / "base")
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-30").mkdir(parents=True)
    with pytest.raises(NotFound, match=r"the newest is .*checkpoint-30"):
        paramdiff.optimizer(tmp_path / "run")
    with pytest.raises(CheckpointError):
        paramdiff.optimizer(ROOT / "sample_data" / "base" / "model.safetensors")


class Exploit:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize(
    "content",
    [
        {"state": {}, "param_groups": []},
        {"state": {}, "param_groups": [{"params": [0, 0]}]},
        {"state": {}, "param_groups": [{"params": [[0]]}]},
        {"state": {0: 3}, "param_groups": [{"params": [0]}]},
        {"state": [1], "param_groups": [{"params": [0]}]},
        {"state": {5: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]},
        {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": {"params": [0]}},
        {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [3]},
        {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": 0}]},
        {"state": {"w": {"exp_avg": torch.ones(2), "step": Exploit()}}, "param_groups": [{"params": ["w"]}]},
        {"state": {"w": {"state1": torch.ones(9).byte(), "state2": torch.ones(9)}}, "param_groups": [{"params": ["w"]}]},
        [1, 2],
        torch.ones(3),
    ],
)  # fmt: skip
def test_files_that_make_no_sense(tmp_path: Path, content: Any, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError) as caught:
        paramdiff.optimizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "executed" not in capfd.readouterr().out


def test_moments_whose_shapes_differ(tmp_path: Path) -> None:
    moments = {"step": 1, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(3)}
    torch.save({"state": {"w": moments}, "param_groups": [{"params": ["w"]}]}, tmp_path / "optimizer.pt")
    with pytest.raises(BrokenFile, match="differ in shape"):
        paramdiff.adam(tmp_path)
