"""`paramdiff adam` as a user runs it: what it prints, what it writes, what it says of bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from tests.cli.helpers import SAMPLE, assert_sentence, run, run_json

RL, SFT = (SAMPLE / "checkpoints" / name for name in ("rl-adamw", "sft"))
LAST, BEFORE = "checkpoint-200", "checkpoint-199"


def pooled(where: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """m̂, v̂ and weights of a checkpoint of the sample data, end to end, in float64; only v̂ and m̂ are in one order."""
    kept = torch.load(where / "optimizer.pt", weights_only=True)["state"]
    m, v = (torch.cat([kept[n][slot].double().flatten() for n in sorted(kept)]) for slot in ("exp_avg", "exp_avg_sq"))
    step = int(kept[0]["step"])
    weights = torch.cat([w.double().flatten() for w in load_file(where / "model.safetensors").values()])
    return m / (1 - 0.9**step), v / (1 - 0.999**step), weights


def test_one_checkpoint() -> None:
    done = run("adam", RL / LAST)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for said in (
        "334,944 parameters in 50 tensors; AdamW, step 200, moments in F32",
        "β₁ 0.9 · β₂ 0.999 · ε 1e-08 · weight decay 0 · learning rate 3e-06 (trainer_state.json, logged at step 200)",
        "named by the order of a decoder's layers, groups as Trainer makes them",
        "By module", "By layer", "q_proj", "adaptivity", "% of the weights would change in bf16",
    ):  # fmt: skip
        assert said in done.stdout, said


def test_the_numbers_against_a_few_lines_of_torch() -> None:
    mhat, vhat, weights = pooled(RL / LAST)
    u = mhat / (vhat.sqrt() + 1e-8)
    told = run_json("adam", RL / LAST)["first"]
    assert told["numel"] == vhat.numel() == weights.numel()
    assert told["sqrt_vhat_std"] == pytest.approx(vhat.sqrt().std(correction=0).item(), rel=1e-9)
    assert told["vhat_mean"] == pytest.approx(vhat.mean().item(), rel=1e-9)
    assert told["update_rms"] == pytest.approx(3e-6 * u.square().mean().sqrt().item(), rel=1e-9)
    assert told["adaptivity"] == pytest.approx(1 - torch.cosine_similarity(u, mhat, dim=0).item(), rel=1e-9)
    assert told["equivalent_sgd_lr"] == pytest.approx(3e-6 * (u @ mhat / (mhat @ mhat)).item(), rel=1e-9)
    exact = torch.quantile(3e-6 / (vhat.sqrt() + 1e-8), torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64))
    assert [told[f"eff_lr_p{p}"] for p in (1, 50, 99)] == pytest.approx(exact.tolist(), rel=0.01)


def test_json_has_everything() -> None:
    told = run_json("adam", RL / LAST)
    assert set(told) == {"first", "bytes_read", "seconds", "by_module", "by_layer", "by_parameter"}
    assert len(told["by_parameter"]) == 50
    assert {row["module"] for row in told["by_module"]["first"]} >= {"q_proj", "embed_tokens"}
    assert [row["layer"] for row in told["by_layer"]["first"]].count(None) == 1


def test_two_side_by_side() -> None:
    done = run("adam", RL / LAST, SFT / LAST)
    assert done.returncode == 0, done.stderr
    assert "second / first" in done.stdout
    assert "std of √v" in done.stdout
    assert "No gradient: " in done.stdout
    told = run_json("adam", RL / LAST, SFT / LAST)
    (_, rl, _), (_, sft, _) = pooled(RL / LAST), pooled(SFT / LAST)
    assert told["ratios"]["sqrt_vhat_std"] == pytest.approx(
        (sft.sqrt().std(correction=0) / rl.sqrt().std(correction=0)).item(), rel=1e-9
    )
    assert "is at step 200" in told["no_gradient"]
    assert {row["name"] for row in told["by_parameter"] if row["side"] == "second"} == {
        row["name"] for row in told["by_parameter"] if row["side"] == "first"
    }


@pytest.mark.parametrize("run_of", [RL, pytest.param(SFT, marks=pytest.mark.slow)])
def test_the_gradient_between_consecutive_saves(run_of: Path) -> None:
    """Both runs clip the gradient to norm 1, and at both steps it was larger: what Adam saw has the norm 1."""
    told = run_json("adam", run_of / BEFORE, run_of / LAST, "--gradient")
    assert told["second"]["grad_norm"] == pytest.approx(1, rel=1e-4)
    assert told["second"]["grad_check"] < 1e-6
    assert abs(told["second"]["momentum_grad_cosine"]) < 0.5
    done = run("adam", run_of / BEFORE, run_of / LAST)
    assert "gradient of the second's step, as Adam saw it: norm 1 · cos(momentum, gradient)" in done.stdout


def test_a_gradient_that_cannot_be() -> None:
    assert_sentence(run("adam", RL / LAST, SFT / LAST, "--gradient"), 3, "No gradient can be recovered", "is at step 200")
    assert_sentence(run("adam", RL / BEFORE, SFT / LAST, "--gradient"), 3, "does not follow from the first save")
    assert_sentence(run("adam", RL / LAST, "--gradient"), 2, "need a second checkpoint")


def test_tables_are_written(tmp_path: Path) -> None:
    done = run("adam", RL / LAST, SFT / LAST, "--out", tmp_path / "out")
    assert f"Tables written to {tmp_path / 'out'}" in done.stdout
    table = pl.read_parquet(tmp_path / "out" / "adam.parquet")
    assert table.group_by("side").len()["len"].to_list() == [50, 50]
    histograms = pl.read_parquet(tmp_path / "out" / "histograms.parquet")
    counts = histograms.group_by("side", "histogram").agg(pl.col("count").sum())
    assert set(counts["count"]) == {334_944}
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["command"] == "adam"
    assert facts["first"]["naming"].startswith("named by the order")


@pytest.mark.slow
def test_options(tmp_path: Path) -> None:
    told = run_json("adam", RL / LAST, "--lr", "0.5", "--include", "q_proj", "--exclude", "bias")
    assert told["first"]["lr"] == 0.5
    assert told["first"]["lr_source"] == "given"
    assert told["first"]["tensors"] == 4
    assert run("adam", RL / LAST, "--quiet").stdout == ""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("optimizer.pt", "config.json", "model.safetensors"):
        shutil.copy(RL / LAST / name, bare)
    at_group = run_json("adam", bare)["first"]
    assert (at_group["lr"], at_group["lr_source"]) == (3e-6, "group's lr")
    before = run_json("adam", bare, "--weights", RL / BEFORE)["first"]
    assert before["bf16_visible"] != at_group["bf16_visible"]


@pytest.mark.slow
def test_bad_input(tmp_path: Path) -> None:
    assert_sentence(run("adam", tmp_path / "none"), 2, "No such path")
    assert_sentence(run("adam", tmp_path), 2, "holds no optimizer state")
    assert_sentence(run("adam", RL), 2, "the newest is", LAST)
    assert_sentence(run("adam", SAMPLE / "base"), 2, "holds no optimizer state", "resume")
    assert_sentence(run("adam", RL / LAST, "--lr", "-1"), 2, "is no learning rate")
    assert_sentence(run("adam", RL / LAST, "--include", "["), 2, "not a regular expression")
    assert_sentence(run("adam", RL / LAST, "--include", "nothing"), 3, "No parameter")
    assert_sentence(run("adam", RL / LAST, "--weights", tmp_path / "none"), 2, "No such path")
    shutil.copy(RL / LAST / "optimizer.pt", tmp_path)
    assert_sentence(run("adam", tmp_path), 2, "numbers its 50 parameters", "config.json")
    (tmp_path / "optimizer.pt").write_bytes((RL / LAST / "optimizer.pt").read_bytes()[:-5000])
    assert_sentence(run("adam", tmp_path), 2, "optimizer.pt")


def test_hostile_names_are_printed_harmlessly(tmp_path: Path) -> None:
    name = "layers.0.\x1b[31m[bold]x.weight"
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": [name]}]
    torch.save({"state": {name: moments}, "param_groups": groups}, tmp_path / "optimizer.pt")
    done = run("adam", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "[bold]x" in done.stdout


def test_help_has_examples() -> None:
    done = run("adam", "--help")
    assert "paramdiff adam rl/checkpoint-500/ sft/checkpoint-500/" in done.stdout


@pytest.mark.slow
def test_the_readme_of_the_sample_data_says_what_the_command_finds() -> None:
    rows = {
        "standard deviation of v": "v_std", "standard deviation of √v": "sqrt_v_std",
        "standard deviation of √v̂": "sqrt_vhat_std",
        "mean of √v̂": "sqrt_vhat_mean", "median effective learning rate": "eff_lr_p50",
        "spread of log10 of it, in decades": "log10_eff_lr_std", "adaptivity, 1 − cos(u, m̂)": "adaptivity",
        "equivalent SGD learning rate": "equivalent_sgd_lr", "root mean square of the step": "update_rms",
        "share of the weights that it changes in bf16": "bf16_visible",
        "norm of the last gradient, as Adam saw it": "grad_norm", "cos(momentum, gradient)": "momentum_grad_cosine",
    }  # fmt: skip
    rl, sft = (run_json("adam", of / BEFORE, of / LAST)["second"] for of in (RL, SFT))
    ratios = run_json("adam", RL / LAST, SFT / LAST)["ratios"]
    text = (SAMPLE / "README.md").read_text(encoding="utf-8")
    for label, column in rows.items():
        ratio = f"{ratios[column]:.3g}" if column in ratios else ""
        line = f"| {label} | {rl[column]:.3g} | {sft[column]:.3g} | {ratio} |".replace("|  |", "| |")
        assert line in text, line
