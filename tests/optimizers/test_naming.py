"""Numbers become names only where there is one way to do so; settings and kinds that are not as usual."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import paramdiff
from paramdiff.errors import BrokenFile, CheckpointError, NothingToCompare, UnsupportedFormat
from tests.optimizers.live import expected


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2, seed: int = 0) -> None:
    chance = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=chance)
        optimizer.step()


def kept(where: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> Path:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}, where)
    return where


def row(found: paramdiff.Moments) -> dict[str, Any]:
    return found.by().row(0, named=True)


def test_a_rule_that_fits_in_several_ways_is_no_reason_to_take_another(tmp_path: Path) -> None:
    """Dealt by dimensions, which leaves open which vectors are frozen; Trainer's rule would fit in one way, a wrong one."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))
    for name, p in model.named_parameters():
        p.requires_grad = name not in ("0.bias", "2.bias")
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) is wide]} for wide in (True, False)]
    optimizer = torch.optim.AdamW(groups)
    steps(model, optimizer)
    with pytest.raises(UnsupportedFormat, match="in several ways"):
        paramdiff.optimizer(kept(tmp_path / "a.pt", model, optimizer))


def test_a_head_alone_is_not_taken_for_the_embedding(tmp_path: Path) -> None:
    model = nn.Module()
    model.embed_tokens, model.l = nn.Embedding(20, 8), nn.Linear(8, 8, bias=False)
    model.lm_head = nn.Linear(8, 20, bias=False)
    optimizer = torch.optim.AdamW(model.lm_head.parameters())
    steps(model.lm_head, optimizer)
    with pytest.raises(UnsupportedFormat, match="in several ways"):
        paramdiff.optimizer(kept(tmp_path / "b.pt", model, optimizer))


@pytest.mark.parametrize("first", ["actor", "critic"])
def test_groups_of_the_same_shapes_may_stand_in_any_order(tmp_path: Path, first: str) -> None:
    model = nn.ModuleDict({"actor": nn.Linear(8, 8), "critic": nn.Linear(8, 8)})
    other = {"actor": "critic", "critic": "actor"}[first]
    optimizer = torch.optim.AdamW([{"params": model[name].parameters()} for name in (first, other)])
    steps(model, optimizer)
    with pytest.raises(UnsupportedFormat, match="in several ways"):
        paramdiff.optimizer(kept(tmp_path / "c.pt", model, optimizer))


@pytest.mark.parametrize("first", ["actor", "critic"])
def test_groups_of_other_shapes_are_found_in_any_order(tmp_path: Path, first: str) -> None:
    model = nn.ModuleDict({"actor": nn.Linear(8, 8), "critic": nn.Linear(8, 1)})
    other = {"actor": "critic", "critic": "actor"}[first]
    optimizer = torch.optim.AdamW([{"params": model[name].parameters()} for name in (first, other)])
    steps(model, optimizer)
    state = paramdiff.optimizer(kept(tmp_path / "c.pt", model, optimizer))
    for name, p in model.named_parameters():
        assert np.array_equal(state[name]["exp_avg"], optimizer.state[p]["exp_avg"].numpy())


def test_words_of_decoders_are_no_decoder(tmp_path: Path) -> None:
    """Without a config, a model that registers up_proj before gate_proj would get them swapped."""
    mlp = nn.Module()
    mlp.up_proj, mlp.gate_proj = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"mlp": mlp})])
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(UnsupportedFormat, match="no order"):
        paramdiff.optimizer(tmp_path)


def test_a_group_of_its_own_with_a_frozen_neighbour(tmp_path: Path) -> None:
    norm = nn.LayerNorm(4)
    norm.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": [norm.bias]}, {"params": []}])
    steps(norm, optimizer)
    with pytest.raises(UnsupportedFormat, match="in several ways"):
        paramdiff.optimizer(kept(tmp_path / "d.pt", norm, optimizer))


def test_settings_in_tensors(tmp_path: Path) -> None:
    betas = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3), betas=betas, foreach=False)  # type: ignore[arg-type]
    steps(model, optimizer, 3)
    found = paramdiff.adam(kept(tmp_path / "e.pt", model, optimizer)).parameters.row(0, named=True)
    state = optimizer.state[model.weight]
    by_hand = expected(state["exp_avg"].numpy(), state["exp_avg_sq"].numpy(), 3, lr=float(np.float32(1e-3)), beta2=0.99)
    assert found["vhat_mean"] == pytest.approx(by_hand["vhat_mean"])
    assert found["update_rms"] == pytest.approx(by_hand["update_rms"])


@pytest.mark.parametrize("missing", ["betas", "eps"])
def test_settings_that_are_missing_are_not_made_up(tmp_path: Path, missing: str) -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, 3)
    state = optimizer.state_dict()
    del state["param_groups"][0][missing]
    torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "f.pt")
    found = paramdiff.adam(tmp_path / "f.pt").parameters.row(0, named=True)
    assert found["update_rms"] is found["adaptivity"] is found["eff_lr_p50"] is found["vhat_mean"] is None
    assert found["v_mean"] > 0
    assert "nothing says what" in found["note"]


@pytest.mark.parametrize(
    ("slots", "group"),
    [
        (("exp_avg_slow",), {}),  # AdEMAMix
        (("exp_avg_diff",), {}),  # Adan
        (("s", "p0"), {"d": 1.0}),  # Prodigy
    ],
)
def test_relatives_of_adam_are_not_taken_for_it(tmp_path: Path, slots: tuple[str, ...], group: dict[str, Any]) -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer)
    for state in optimizer.state.values():
        state.update({slot: state["exp_avg"].clone() for slot in slots})
    optimizer.param_groups[0].update(group)
    with pytest.raises(NothingToCompare, match="no optimizer that is known"):
        paramdiff.adam(kept(tmp_path / "g.pt", model, optimizer))


def test_adafactor_of_transformers_with_a_first_moment(tmp_path: Path) -> None:
    from transformers.optimization import Adafactor

    model = nn.Linear(8, 8)
    optimizer = Adafactor(model.parameters(), lr=1e-3, beta1=0.9, scale_parameter=False, relative_step=False)
    steps(model, optimizer, 3)
    found = paramdiff.adam(kept(tmp_path / "h.pt", model, optimizer)).parameters
    assert set(found["optimizer"]) == {"Adafactor"}
    assert found["update_rms"].null_count() == 2


def test_the_rate_of_adagrad_decays(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, lr_decay=1.0)
    steps(model, optimizer, 9)
    found = paramdiff.adam(kept(tmp_path / "i.pt", model, optimizer)).parameters.row(0, named=True)
    effective = 0.1 / 9 / (optimizer.state[model.weight]["sum"].double().sqrt() + 1e-10)
    assert found["log10_eff_lr_mean"] == pytest.approx(effective.log10().mean().item())


def test_a_mixed_optimizer_gives_gradients_for_adam_alone(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    adam = {"step": torch.tensor(3.0), "exp_avg": torch.ones(8) * 1e-3, "exp_avg_sq": torch.ones(8) * 1e-6}
    groups = [
        {"params": ["weight"], "lr": 0.1, "momentum": 0.95, "use_muon": True},
        {"params": ["bias"], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "use_muon": False},
    ]
    for name, count in (("a", 3), ("b", 4)):
        (tmp_path / name).mkdir()
        g = torch.full((8,), 2e-3)
        later = count == 4
        state = {
            "weight": {"momentum_buffer": torch.ones(8, 8) * count},
            "bias": {
                "step": torch.tensor(float(count)),
                "exp_avg": adam["exp_avg"] * 0.9 + 0.1 * g if later else adam["exp_avg"],
                "exp_avg_sq": adam["exp_avg_sq"] * 0.999 + 0.001 * g**2 if later else adam["exp_avg_sq"],
            },
        }
        torch.save({"state": state, "param_groups": groups}, tmp_path / name / "optimizer.pt")
        torch.save(model.state_dict(), tmp_path / name / "model.pt")
    found = paramdiff.adam(tmp_path / "a", tmp_path / "b", gradient=True)
    told = {r["name"]: r for r in found.parameters.to_dicts() if r["side"] == "second"}
    assert told["weight"]["grad_norm"] is None
    assert told["bias"]["grad_norm"] == pytest.approx(2e-3 * 8**0.5, rel=1e-4)


def test_a_logged_rate_of_zero_was_not_in_force(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps(model, optimizer, 3)
    history = [{"step": 2, "learning_rate": 3e-4}, {"step": 3, "learning_rate": 0.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": history}))
    found = paramdiff.adam(kept(tmp_path / "j.pt", model, optimizer)).parameters
    assert set(found["lr"]) == {3e-4}
    assert "logged at step 2, the last before step 3" in found["lr_source"][0]


def test_adaptivity_needs_no_rate(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    steps(model, optimizer, 3)
    found = paramdiff.adam(kept(tmp_path / "k.pt", model, optimizer))
    assert row(found)["adaptivity"] is not None
    assert row(found)["equivalent_sgd_lr"] is None


def test_blocks_of_2048_as_bitsandbytes_had_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    table = torch.linspace(0, 1, 256)
    state: dict[str, Any] = {"step": 3}
    for number in (1, 2):
        state[f"state{number}"] = torch.randint(0, 256, (8192,), dtype=torch.uint8)
        state[f"qmap{number}"], state[f"absmax{number}"] = table, torch.rand(4)
    other = {"step": 3, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    momentum = {"momentum_buffer": torch.ones(3)}
    groups = [{"params": ["w", "e", "mu"], "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}]
    torch.save({"state": {"w": state, "e": other, "mu": momentum}, "param_groups": groups}, tmp_path / "optimizer.pt")
    found = paramdiff.optimizer(tmp_path)
    scale = state["absmax2"].repeat_interleave(2048)
    assert np.array_equal(found["w"]["exp_avg_sq"], (table[state["state2"].long()] * scale).numpy())
    assert np.array_equal(found["e"]["exp_avg"], np.ones(3))  # of parameters that are kept otherwise
    assert np.array_equal(found["mu"]["momentum_buffer"], np.ones(3))


def test_moments_that_are_no_floats(tmp_path: Path) -> None:
    groups = [{"params": ["w", "x"], "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}]
    good = {"step": 3, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    for dtype in (torch.complex64, torch.int32):
        odd = {"step": 3, "exp_avg": torch.ones(3, dtype=dtype), "exp_avg_sq": torch.ones(3, dtype=dtype)}
        torch.save({"state": {"w": odd, "x": good}, "param_groups": groups}, tmp_path / "optimizer.pt")
        found = paramdiff.adam(tmp_path)
        assert found.coverage["reason"].to_list() == ["not_measured"]
        assert found.parameters["v_mean"].to_list()[1] == 1.0


def test_a_beta_that_is_none(tmp_path: Path) -> None:
    good = {"step": 1e9, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    groups = [{"params": ["w"], "lr": 1e-3, "betas": (-3.0, 0.9), "eps": 1e-8}]
    torch.save({"state": {"w": good}, "param_groups": groups}, tmp_path / "optimizer.pt")
    assert "β₁ and β₂" in paramdiff.adam(tmp_path).parameters["note"][0]


def test_the_second_model_of_accelerate(tmp_path: Path) -> None:
    """optimizer_1.bin belongs to pytorch_model_1.bin."""
    for suffix, width in (("", 4), ("_1", 6)):
        model = nn.Linear(width, 3)
        optimizer = torch.optim.AdamW(model.parameters())
        steps(model, optimizer)
        torch.save(optimizer.state_dict(), tmp_path / f"optimizer{suffix}.bin")
        torch.save(model.state_dict(), tmp_path / f"pytorch_model{suffix}.bin")
    assert paramdiff.optimizer(tmp_path / "optimizer.bin").parameters["weight"].shape == (3, 4)
    assert paramdiff.optimizer(tmp_path / "optimizer_1.bin").parameters["weight"].shape == (3, 6)
    (tmp_path / "pytorch_model_1.bin").unlink()
    with pytest.raises(CheckpointError, match="no order"):
        paramdiff.optimizer(tmp_path / "optimizer_1.bin")


def test_weights_in_a_file_beside_a_nested_state(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer)
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "optim.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for ref in (tmp_path / "optim.pt", tmp_path):
        assert list(paramdiff.optimizer(ref)) == ["weight", "bias"]
    (tmp_path / "optim.pt").rename(tmp_path / "state.pt")
    with pytest.raises(BrokenFile, match="2 files that may hold a state"):
        paramdiff.optimizer(tmp_path)
