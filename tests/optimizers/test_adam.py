"""`adam` against torch's own optimizers, trained here: every statistic, the gradient, what bf16 shows, names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paramdiff
from paramdiff import columns
from paramdiff.errors import NothingToCompare, OptionError, UnsupportedFormat
from paramdiff.measures.adam import edges, quantile
from tests.cli.helpers import run
from tests.optimizers.live import Net, expected, percentiles, save, step, to_bf16, train

LR = 3e-3
UNUSED = {"unused.weight", "unused.bias"}


def adamw(parameters: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, **{"weight_decay": 0.0, **more})


def rows(found: paramdiff.Moments, side: str = "first") -> dict[str, dict[str, Any]]:
    own = found.parameters.filter(pl.col("side") == side)
    return {row["name"]: row for row in own.to_dicts()}


def assert_row(row: dict[str, Any], by_hand: dict[str, float], *, but: tuple[str, ...] = ()) -> None:
    for name, value in by_hand.items():
        if name not in but:
            # 1 − cos loses what cos has: an error of float64 in 1
            assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-12 if name == "adaptivity" else 1e-300), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_statistic(tmp_path: Path, dtype: torch.dtype) -> None:
    model, optimizer, _ = train(adamw, 7, dtype=dtype)
    found = paramdiff.adam(save(tmp_path / "c", model, optimizer))
    told = rows(found)
    kept = {name: optimizer.state[p] for name, p in model.named_parameters()}
    assert {name for name, row in told.items() if not row["has_state"]} == UNUSED
    for name, state in kept.items():
        if name in UNUSED:
            continue
        m, v = state["exp_avg"].double().numpy(), state["exp_avg_sq"].double().numpy()
        assert_row(told[name], expected(m, v, 7, lr=LR))
        assert (told[name]["step_min"], told[name]["step_max"], told[name]["finite"]) == (7, 7, m.size)
        for got, exact in zip((told[name][f"eff_lr_p{p}"] for p in (1, 50, 99)), percentiles(v, 7, lr=LR), strict=True):
            assert got == pytest.approx(exact, rel=0.017)
    assert found.run["first"]["naming"] == "param_names of the groups"


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_what_bf16_shows_of_the_step(tmp_path: Path, decay: float) -> None:
    """The moments after a step, with the weights before it, predict what the step does to the rounded weights."""
    model, optimizer, _ = train(lambda p: adamw(p, weight_decay=decay), 5)
    save(tmp_path / "before", model, optimizer)
    before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    step(model, optimizer)
    after = {name: p.detach() for name, p in model.named_parameters()}
    save(tmp_path / "after", model, optimizer)
    told = rows(paramdiff.adam(tmp_path / "after", weights=tmp_path / "before"))
    shares = []
    for name, row in told.items():
        if name in UNUSED:
            continue
        true = (to_bf16(before[name]) != after[name].bfloat16()).double().mean().item()
        # torch steps in float32; a weight beside a rounding boundary may fall to the other side
        assert row["bf16_visible"] == pytest.approx(true, abs=2 / before[name].size)
        shares.append(true)
    assert 0.1 < np.mean(shares) < 0.99
    assert all(row["weight_decay"] == decay for row in told.values())


def test_the_step_is_the_one_that_torch_takes(tmp_path: Path) -> None:
    model, optimizer, _ = train(adamw, 5)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    told = rows(paramdiff.adam(save(tmp_path / "c", model, optimizer)))
    for name, p in model.named_parameters():
        if name not in UNUSED:
            moved = (p.detach().double() - before[name]).abs()
            assert told[name]["update_max"] == pytest.approx(moved.max().item(), rel=1e-3)
            assert told[name]["update_rms"] == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_between_two_saves(tmp_path: Path, dtype: torch.dtype) -> None:
    model, optimizer, _ = train(adamw, 4, dtype=dtype)
    save(tmp_path / "4", model, optimizer)
    m = {
        name: optimizer.state[p]["exp_avg"].double().numpy().copy()
        for name, p in model.named_parameters()
        if name not in UNUSED
    }
    gradient = step(model, optimizer)
    save(tmp_path / "5", model, optimizer)
    found = paramdiff.adam(tmp_path / "4", tmp_path / "5", gradient=True)
    rounding = 1e-5 if dtype is torch.float32 else 1e-12
    for name, row in rows(found, "second").items():
        if name in UNUSED:
            assert row["grad_norm"] is None
            continue
        g = gradient[name]
        assert row["grad_norm"] == pytest.approx(np.linalg.norm(g), rel=rounding)
        cosine = (g * m[name]).sum() / np.linalg.norm(g) / np.linalg.norm(m[name])
        assert row["momentum_grad_cosine"] == pytest.approx(cosine, abs=rounding)
        assert row["grad_check"] < rounding / 10
    assert all(row["grad_norm"] is None for row in rows(found, "first").values())
    total = found.summary()["second"]
    g, m0 = (np.concatenate([d[n].ravel() for n in m]) for d in (gradient, m))
    assert total["grad_norm"] == pytest.approx(np.linalg.norm(g), rel=rounding)
    assert total["momentum_grad_cosine"] == pytest.approx(g @ m0 / np.linalg.norm(g) / np.linalg.norm(m0), abs=rounding)


def test_no_gradient_where_the_two_are_not_consecutive(tmp_path: Path) -> None:
    model, optimizer, _ = train(adamw, 3)
    save(tmp_path / "3", model, optimizer)
    step(model, optimizer)
    save(tmp_path / "4", model, optimizer)
    step(model, optimizer)
    save(tmp_path / "5", model, optimizer)
    save(tmp_path / "other", *train(adamw, 4, seed=1)[:2])
    save(tmp_path / "beta", *train(lambda p: adamw(p, betas=(0.8, 0.999)), 4)[:2])
    save(tmp_path / "sgd", *train(lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9), 4)[:2])
    reasons = {"5": "is at step 3 and", "3": "is at step 3 and", "other": "does not follow", "beta": "β differs"}
    for second, said in {**reasons, "sgd": "in the other not"}.items():
        with pytest.raises(NothingToCompare, match=said):
            paramdiff.adam(tmp_path / "3", tmp_path / second, gradient=True)
        beside = paramdiff.adam(tmp_path / "3", tmp_path / second)  # without insisting, they stand side by side
        assert said in beside.run["no_gradient"]
        assert beside.parameters["grad_norm"].null_count() == beside.parameters.height
    assert paramdiff.adam(tmp_path / "3", tmp_path / "4").run["no_gradient"] is None


def test_roll_ups_pool_the_elements(tmp_path: Path) -> None:
    model, optimizer, _ = train(adamw, 6)
    found = paramdiff.adam(save(tmp_path / "c", model, optimizer))
    for key in ("kind", "layer", "module"):
        groups: dict[Any, list[str]] = {}
        for name, row in rows(found).items():
            groups.setdefault(row[key], []).append(name)
        for row in found.by(key).to_dicts():
            names = [name for name in groups[row[key]] if name not in UNUSED]
            assert row["tensors"] == len(groups[row[key]])
            if not names:
                assert row["v_mean"] is None
                continue
            state = [optimizer.state[dict(model.named_parameters())[name]] for name in names]
            m, v = (np.concatenate([s[slot].double().numpy().ravel() for s in state]) for slot in ("exp_avg", "exp_avg_sq"))
            assert_row(row, expected(m, v, 6, lr=LR), but=("u_norm", "mhat_norm", "u_dot_mhat"))
            for got, exact in zip((row[f"eff_lr_p{p}"] for p in (1, 50, 99)), percentiles(v, 6, lr=LR), strict=True):
                assert got == pytest.approx(exact, rel=0.017)


def test_rates_that_differ_count_each_with_its_own(tmp_path: Path) -> None:
    """Two groups, one of which learns a hundred times faster: the step of both together."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        named = list(parameters)
        groups = [{"params": named[:3], "lr": 1e-2}, {"params": named[3:], "lr": 1e-4}]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    model, optimizer, _ = train(make, 3)
    found = paramdiff.adam(save(tmp_path / "c", model, optimizer))
    steps, firsts = [], []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p in optimizer.state:
                s = optimizer.state[p]
                firsts.append(s["exp_avg"].double().numpy().ravel() / (1 - 0.9**3))
                root = np.sqrt(s["exp_avg_sq"].double().numpy().ravel() / (1 - 0.999**3))
                steps.append(group["lr"] * firsts[-1] / (root + 1e-8))
    s, m = np.concatenate(steps), np.concatenate(firsts)
    total = found.by().row(0, named=True)
    assert total["lr"] is None
    assert total["update_rms"] == pytest.approx(np.sqrt((s**2).mean()), rel=1e-9)
    assert total["equivalent_sgd_lr"] == pytest.approx(s @ m / (m @ m), rel=1e-9)
    assert total["adaptivity"] == pytest.approx(1 - s @ m / np.linalg.norm(s) / np.linalg.norm(m), rel=1e-9)


def test_two_side_by_side(tmp_path: Path) -> None:
    """The second's step is ten times the first's, its v a hundred times; matched by name, with what only one has named."""
    model, optimizer, _ = train(adamw, 3)
    save(tmp_path / "a", model, optimizer)
    for state in optimizer.state.values():
        state["exp_avg_sq"] *= 100
        state["exp_avg"] *= 10
    del optimizer.state[model.norm.weight]
    save(tmp_path / "b", model, optimizer)
    found = paramdiff.adam(tmp_path / "a", tmp_path / "b")
    ratios = found.ratios("name")
    assert "norm.weight" not in set(ratios["name"])
    assert ratios["sqrt_vhat_std_ratio"].to_list() == pytest.approx([10.0] * ratios.height, rel=1e-6)
    assert ratios["v_std_ratio"].to_list() == pytest.approx([100.0] * ratios.height, rel=1e-6)
    assert found.ratios()["eff_lr_p50_ratio"].item() == pytest.approx(0.1, rel=0.02)
    told = found.summary()
    assert told["second"]["coverage"]["no_state"] == ["norm.weight", *sorted(UNUSED, reverse=True)]
    assert told["ratios"]["sqrt_v_std"] == pytest.approx(10, rel=1e-6)


@pytest.mark.parametrize("shift", [1, -1])
def test_names_that_are_off_by_one_would_show(tmp_path: Path, shift: int) -> None:
    """The control: numbers taken for their neighbours' names give other numbers, or are refused."""
    model, optimizer, _ = train(adamw, 3)
    kept = optimizer.state_dict()
    right = save(tmp_path / "right", model, optimizer)
    names = kept["param_groups"][0]["param_names"]
    kept["param_groups"][0]["param_names"] = names[shift:] + names[:shift]
    wrong = save(tmp_path / "wrong", model, optimizer)
    torch.save(kept, wrong / "optimizer.pt")
    there = rows(paramdiff.adam(right))
    for name, row in rows(paramdiff.adam(wrong)).items():
        same = row["shape"] == there[name]["shape"] and row["v_mean"] == there[name]["v_mean"]
        assert not same or name in UNUSED


KINDS: dict[str, Any] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=LR),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=LR, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=LR),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=LR),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=LR),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=LR),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=LR),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=LR),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=LR),
    "Muon": lambda p: torch.optim.Muon([(n, q) for n, q in p if q.ndim == 2], lr=LR),
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if hasattr(torch.optim, kind.split()[0]) or kind == "AMSGrad"])
def test_every_optimizer_is_recognised(tmp_path: Path, kind: str) -> None:
    model, optimizer, _ = train(KINDS[kind], 3)
    found = paramdiff.adam(save(tmp_path / "c", model, optimizer))
    stepped = found.parameters.filter(pl.col("has_state"))
    if kind == "Adagrad":  # which keeps a sum from the first, of unused parameters too
        stepped = stepped.filter(~pl.col("name").is_in(list(UNUSED)))
    assert set(stepped["optimizer"]) == {kind}
    named = dict(model.named_parameters())
    for row in stepped.to_dicts():
        state = optimizer.state[named[row["name"]]]
        if kind in ("Adam", "AdamW", "AMSGrad"):
            largest = state.get("max_exp_avg_sq")
            assert_row(row, expected(state["exp_avg"], state["exp_avg_sq"], 3, lr=LR, largest=largest))
        if kind == "SGD with momentum":
            buffer = state["momentum_buffer"].double().numpy()
            assert row["adaptivity"] == pytest.approx(0, abs=1e-12)
            assert row["equivalent_sgd_lr"] == pytest.approx(LR)
            assert row["update_max"] == pytest.approx(LR * np.abs(buffer).max())
        if kind == "RMSprop":
            v = state["square_avg"].double().numpy()
            assert row["v_std"] == pytest.approx(v.std())
            assert row["log10_eff_lr_mean"] == pytest.approx(np.log10(LR / (np.sqrt(v) + 1e-8)).mean())
        if kind not in ("Adam", "AdamW", "AMSGrad", "SGD with momentum"):
            assert row["update_rms"] is None
            assert row["note"] is not None or row["v_mean"] is None  # what is absent is said


def test_the_gradient_of_momentum(tmp_path: Path) -> None:
    make = KINDS["SGD with momentum"]
    model, optimizer, _ = train(make, 3)
    save(tmp_path / "3", model, optimizer, global_step=3)
    save(tmp_path / "uncounted", model, optimizer)
    gradient = step(model, optimizer)
    save(tmp_path / "4", model, optimizer, global_step=4)
    for before, said in (("uncounted", "do not say how many steps"), ("4", "is at step 4 and")):
        with pytest.raises(NothingToCompare, match=said):
            paramdiff.adam(tmp_path / before, tmp_path / "4", gradient=True)
    found = rows(paramdiff.adam(tmp_path / "3", tmp_path / "4", weights=tmp_path / "3"), "second")
    for name, g in gradient.items():
        assert found[name]["grad_norm"] == pytest.approx(np.linalg.norm(g), rel=1e-5)


def test_plain_sgd_keeps_nothing(tmp_path: Path) -> None:
    model, optimizer, _ = train(lambda p: torch.optim.SGD(p, lr=LR), 2)
    with pytest.raises(NothingToCompare, match="plain SGD keeps none"):
        paramdiff.adam(save(tmp_path / "c", model, optimizer))


LINEAR = {"global_step": 4, "log_history": [{"step": 2, "learning_rate": 2e-3}, {"step": 4, "learning_rate": 1e-3}]}


def test_the_rate_in_force(tmp_path: Path) -> None:
    """A linear schedule leaves 0.0 in the group; the log has what was applied."""
    model, optimizer, _ = train(adamw, 4)
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = 5e-3, 0.0
    plain = save(tmp_path / "plain", model, optimizer)
    logged = save(tmp_path / "logged", model, optimizer, **LINEAR)
    early = save(tmp_path / "early", model, optimizer, **{**LINEAR, "log_history": LINEAR["log_history"][:1]})
    for where, lr, source in (
        (plain, 5e-3, "initial_lr, as the group's lr is 0"),
        (logged, 1e-3, "trainer_state.json, logged at step 4"),
        (early, 2e-3, "logged at step 2, the last before step 4"),
    ):
        row = rows(paramdiff.adam(where))["norm.weight"]
        assert row["lr"] == lr
        assert source in row["lr_source"]
    given = rows(paramdiff.adam(plain, lr=0.25))["norm.weight"]
    assert (given["lr"], given["lr_source"]) == (0.25, "given")
    for group in optimizer.param_groups:
        group["lr"] = 4e-3
    row = rows(paramdiff.adam(save(tmp_path / "on", model, optimizer)))["norm.weight"]
    assert (row["lr"], row["lr_source"]) == (4e-3, "group's lr, which is that of the step to come")


def test_a_state_that_was_reset_is_named(tmp_path: Path) -> None:
    model, optimizer, _ = train(adamw, 4)
    found = paramdiff.adam(save(tmp_path / "c", model, optimizer, global_step=100, log_history=[]))
    assert any("its state was reset" in warning for warning in found.run["warnings"])
    found = paramdiff.adam(save(tmp_path / "d", model, optimizer, global_step=4, log_history=[]))
    assert found.run["warnings"] == []


def test_elements_that_are_no_moments_are_counted_and_left_out(tmp_path: Path) -> None:
    model, optimizer, _ = train(adamw, 4)
    state = optimizer.state[model.lm_head.weight]
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m[0, 0], m[1, 1], v[2, 2], v[3, 3], v[4, 4] = math.nan, math.inf, -1.0, math.nan, 0.0
    m[4, 4] = 0.0
    row = rows(paramdiff.adam(save(tmp_path / "c", model, optimizer)))["lm_head.weight"]
    keep = np.ones(m.shape, dtype=bool)
    keep[[0, 1, 2, 3], [0, 1, 2, 3]] = False
    assert (row["nonfinite"], row["finite"]) == (4, m.numel() - 4)
    assert_row(row, expected(m.numpy()[keep], v.numpy()[keep], 4, lr=LR))
    assert row["v_zero"] == 1 / (m.numel() - 4)


def test_filters_coverage_and_saving(tmp_path: Path) -> None:
    model, optimizer, _ = train(adamw, 2)
    where = save(tmp_path / "c", model, optimizer)
    found = paramdiff.adam(where, include=["layers"], exclude=["bias"])
    assert set(found.parameters["name"]) == {"layers.0.weight", "layers.1.weight"}
    assert set(found.coverage["reason"]) == {"excluded"}
    with pytest.raises(NothingToCompare, match="left after"):
        paramdiff.adam(where, include=["nothing"])
    whole = paramdiff.adam(where)
    whole.save(tmp_path / "out")
    again = paramdiff.load(tmp_path / "out")
    assert isinstance(again, paramdiff.Moments)
    assert all(again.tables[name].equals(table) for name, table in whole.tables.items())
    assert again.summary() == whole.summary()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["command"] == "adam"
    assert "AdamW" in repr(whole)
    assert "<table" in whole._repr_html_()


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    where = save(tmp_path / "c", *train(adamw, 1)[:2])
    for options in (
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": -1.0},
        {"threads": 0},
        {"gradient": True},
        {"other_weights": where},
    ):
        with pytest.raises(OptionError):
            paramdiff.adam(where, **options)


def test_weights_elsewhere_or_nowhere(tmp_path: Path) -> None:
    model, optimizer, _ = train(adamw, 2)
    where = save(tmp_path / "c", model, optimizer)
    (where / "model.safetensors").rename(tmp_path / "w.safetensors")
    found = paramdiff.adam(where)
    assert found.parameters["bf16_visible"].null_count() == found.parameters.height
    assert any("weights" in warning for warning in found.run["warnings"])
    found = paramdiff.adam(where, weights=tmp_path / "w.safetensors")
    assert found.parameters["bf16_visible"].null_count() == len(UNUSED)


@pytest.mark.parametrize("engine", ["threads", "torch:cpu"])
def test_neither_workers_nor_device_change_a_number(tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(700, 900))
    model = torch.nn.Module()
    model.register_parameter("weight", weight)
    optimizer = torch.optim.AdamW([("weight", weight)], lr=LR)
    for _ in range(2):
        weight.grad = torch.randn_like(weight) * torch.randn(700, 1).exp()
        optimizer.step()
    where = save(tmp_path / "c", model, optimizer)
    alone = paramdiff.adam(where, threads=1)
    state = optimizer.state[weight]
    assert_row(rows(alone)["weight"], expected(state["exp_avg"], state["exp_avg_sq"], 2, lr=LR))
    if engine == "threads":
        from paramdiff import engines

        for small in (1 << 30, 0):  # threads, then processes
            monkeypatch.setattr(engines, "SMALL", small)
            other = paramdiff.adam(where, threads=3)
            assert other.parameters.equals(alone.parameters)
            assert other.tables["histograms"].equals(alone.tables["histograms"])
    else:
        other = paramdiff.adam(where, device=engine)
        assert other.tables["histograms"].equals(alone.tables["histograms"])
        a, b = rows(alone)["weight"], rows(other)["weight"]
        for name in a:
            same = a[name] == (pytest.approx(b[name], rel=1e-12) if isinstance(a[name], float) else b[name])
            assert same, name


@given(st.lists(st.floats(2.0**-100, 2.0**60, width=32), min_size=1, max_size=60), st.floats(0.01, 0.99))
@settings(max_examples=200, deadline=None)
def test_percentiles_from_a_histogram_are_within_a_bin(values: list[float], q: float) -> None:
    keys = np.array(values, dtype=np.float32).view(np.uint32) >> 17
    index, counts = np.unique(keys, return_counts=True)
    found = quantile(edges(index), edges(index + 1), counts, q)
    exact = float(np.quantile(values, q, method="inverted_cdf"))
    assert found == pytest.approx(exact, rel=1 / 64)


def test_lazy_moments_in_python(tmp_path: Path) -> None:
    model, optimizer, _ = train(adamw, 3)
    state = paramdiff.optimizer(save(tmp_path / "c", model, optimizer))
    assert list(state) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        kept = optimizer.state.get(p, {})
        assert list(state[name]) == [slot for slot in ("exp_avg", "exp_avg_sq") if slot in kept]
        for slot in state[name]:
            assert np.array_equal(state[name][slot], kept[slot].numpy())
        assert state[name].step == (3 if kept else None)
        assert state[name].group["lr"] == LR
    with pytest.raises(KeyError):
        state["norm.weight"]["exp_inf"]
    state.close()


def test_a_net_without_a_known_order_is_refused(tmp_path: Path) -> None:
    """safetensors are sorted, and the net is no decoder: numbers alone have no names."""
    model, optimizer, _ = train(adamw, 2)
    where = save(tmp_path / "c", model, optimizer, names=False)
    with pytest.raises(UnsupportedFormat, match="no order of the model's parameters"):
        paramdiff.adam(where)
    (where / "model.safetensors").unlink()
    torch.save(model.state_dict(), where / "pytorch_model.bin")  # which is in the order of the model
    told = rows(paramdiff.adam(where))
    for name, p in model.named_parameters():
        if name not in UNUSED:
            assert told[name]["v_mean"] == pytest.approx(optimizer.state[p]["exp_avg_sq"].double().mean().item())
    assert isinstance(model, Net)


def test_tables_have_the_documented_columns_and_types(tmp_path: Path) -> None:
    found = paramdiff.adam(save(tmp_path / "c", *train(adamw, 2)[:2]))
    assert set(found.tables) == {"adam", "histograms", "coverage"}
    for table, frame in found.tables.items():
        key = columns.ADAM_HISTOGRAMS if table == "histograms" else table
        documented = {name: kind for name, (kind, _) in columns.TABLES[key].items()}
        assert {name: str(kind) for name, kind in frame.schema.items()} == documented, table


def test_a_moment_of_zero_without_epsilon_makes_no_step(tmp_path: Path) -> None:
    model, optimizer, _ = train(adamw, 3)
    optimizer.param_groups[0]["eps"] = 0.0
    state = optimizer.state[model.lm_head.weight]
    state["exp_avg"][0] = 0.0
    state["exp_avg_sq"][0] = 0.0
    found = paramdiff.adam(save(tmp_path / "c", model, optimizer))
    row = rows(found)["lm_head.weight"]
    m, v = (state[slot][1:].double().numpy() for slot in ("exp_avg", "exp_avg_sq"))
    by_hand = expected(m, v, 3, lr=LR, eps=0.0)
    assert row["u_norm"] == pytest.approx(by_hand["u_norm"])
    assert row["adaptivity"] == pytest.approx(by_hand["adaptivity"])
    assert row["v_zero"] == pytest.approx(1 / 19)
    bins = found.tables["histograms"].filter((pl.col("name") == "lm_head.weight") & (pl.col("histogram") == "log10_eff_lr"))
    assert bins.filter(pl.col("lower") == math.inf)["count"].to_list() == [8]  # no bound on the rate without ε
    assert row["eff_lr_p99"] == math.inf


def test_the_gradient_of_a_coarse_first_moment(tmp_path: Path) -> None:
    """m in bf16, v in float32: the check allows for the coarser of both."""
    model, optimizer, _ = train(adamw, 3)

    def coarse(where: Path) -> None:
        save(where, model, optimizer)
        kept = optimizer.state_dict()
        kept["state"] = {n: {**s, "exp_avg": s["exp_avg"].bfloat16()} for n, s in kept["state"].items()}
        torch.save(kept, where / "optimizer.pt")

    coarse(tmp_path / "3")
    gradient = step(model, optimizer)
    coarse(tmp_path / "4")
    found = rows(paramdiff.adam(tmp_path / "3", tmp_path / "4", gradient=True), "second")
    for name, g in gradient.items():
        assert found[name]["grad_norm"] == pytest.approx(np.linalg.norm(g), rel=0.2)


def test_rates_that_differ_are_named(tmp_path: Path) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        named = list(parameters)
        return torch.optim.AdamW([{"params": named[:3], "lr": 1e-2}, {"params": named[3:], "lr": 1e-4}])

    done = run("adam", save(tmp_path / "c", *train(make, 2)[:2]))
    assert "learning rates 0.0001 to 0.01" in done.stdout


def test_parameters_that_only_one_has_are_named(tmp_path: Path) -> None:
    model, optimizer, _ = train(adamw, 2)
    save(tmp_path / "a", model, optimizer)
    save(tmp_path / "b", *train(lambda p: adamw([(n, q) for n, q in p if n != "norm.bias"]), 2)[:2])
    for first, second, reason in (("a", "b", "only_first"), ("b", "a", "only_second")):
        found = paramdiff.adam(tmp_path / first, tmp_path / second)
        lone = found.coverage.filter(pl.col("reason") == reason)
        assert lone["name"].to_list() == ["norm.bias"]
        assert lone["numel"].to_list() == [8]
        assert f"{'norm.bias'!r} is a parameter of only one of them" in found.run["no_gradient"]
        told = run("adam", tmp_path / first, tmp_path / second).stdout
        assert f"1 tensor, only in the {reason.removeprefix('only_')} checkpoint: norm.bias" in told
