"""How long does it take to read Adam's state? `paramdiff adam` against the same in torch, tensor by tensor; one run.

    python benchmarks/adam.py DIR [--params 3e8] [--repeat 3] [--json FILE]

The first run writes a state of Trainer's (float32 moments of a decoder, bf16 weights) below DIR/adam. Every contestant is a
process of its own, start-up included; the best of the rounds counts. No time is a pass or a fail.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from run import machine

HIDDEN, INNER = 1024, 4096
NAIVE = """
import sys, torch
from safetensors.torch import load_file
kept = torch.load(sys.argv[1] + "/optimizer.pt", weights_only=True)
weights = load_file(sys.argv[1] + "/model.safetensors")
group = kept["param_groups"][0]
for number, name in zip(group["params"], group["param_names"]):
    state = kept["state"][number]
    m, v = state["exp_avg"], state["exp_avg_sq"]
    mhat, vhat = m / (1 - 0.9 ** 200), v / (1 - 0.999 ** 200)
    below = vhat.sqrt() + 1e-8
    u, rate, w = mhat / below, 1e-6 / below, weights[name].float()
    found = [v.mean(), v.std(), v.sqrt().mean(), v.sqrt().std(), vhat.mean(), vhat.std(), vhat.sqrt().std(), (v == 0).sum()]
    found += [rate.log10().std(), u.square().mean().sqrt(), u.abs().max(), (u.abs() > 0.9).sum(), (u.abs() < 0.1).sum()]
    found += [1 - torch.cosine_similarity(u.flatten(), mhat.flatten(), dim=0), (u * mhat).sum() / (mhat * mhat).sum()]
    found += [(w.bfloat16() != (w - 1e-6 * u).bfloat16()).sum()]
    if sys.argv[2] == "quantiles":  # torch.quantile takes at most 2^24 elements
        found += [torch.quantile(rate.flatten()[: 1 << 24], torch.tensor([0.01, 0.5, 0.99]))]
"""


def write(where: Path, params: float) -> int:
    """A state of about so many parameters. Returns how many they are."""
    import torch
    from safetensors.torch import save_file

    per_layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 4 + 3 * HIDDEN * INNER
    shapes = {"model.embed_tokens.weight": (32_000, HIDDEN)}
    for layer in range(max(1, round((params - 32_000 * HIDDEN) / per_layer))):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (HIDDEN if n in "qo" else HIDDEN // 4, HIDDEN) for n in "qkvo"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (INNER, HIDDEN) for n in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = HIDDEN, INNER
    if (where / "complete").exists():
        return sum(rows * cols for rows, cols in shapes.values())
    where.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    state, weights = {}, {}
    for number, (name, shape) in enumerate(shapes.items()):
        v = (torch.randn(shape) * 1e-4).square_() * torch.rand(shape)
        state[number] = {"step": torch.tensor(200.0), "exp_avg": torch.randn(shape) * 1e-4, "exp_avg_sq": v}
        weights[name] = (torch.randn(shape) * 0.02).bfloat16()
    settings = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled_weight_decay": True}
    group = {**settings, "amsgrad": False, "params": [*range(len(shapes))], "param_names": [*shapes]}
    torch.save({"state": state, "param_groups": [group]}, where / "optimizer.pt")
    save_file(weights, where / "model.safetensors")
    (where / "complete").touch()
    return sum(rows * cols for rows, cols in shapes.values())


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds, largest process in MB) of a command."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    return time.perf_counter() - began, int(done.stdout) * 1024 / 1e6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("dir", type=Path)
    options.add_argument("--params", type=float, default=3e8)
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    where = given.dir / "adam"
    params = write(where, given.params)
    contestants = {
        "paramdiff": [str(Path(sys.executable).parent / "paramdiff"), "adam", str(where), "--json", "--quiet"],
        "naive": [sys.executable, "-c", NAIVE, str(where), "-"],
        "naive, with quantiles": [sys.executable, "-c", NAIVE, str(where), "quantiles"],
    }
    best: dict[str, dict[str, Any]] = {}
    for _ in range(given.repeat):
        for name, command in contestants.items():
            seconds, megabytes = timed(command)
            if name not in best or seconds < best[name]["seconds"]:
                best[name] = {"seconds": round(seconds, 2), "peak_mb": round(megabytes)}
    print(f"{params:,} parameters; {machine()}")
    for name, found in best.items():
        ratio = found["seconds"] / best["paramdiff"]["seconds"]
        print(f"{name:24} {found['seconds']:7.2f} s  {found['peak_mb']:6,} MB  {ratio:5.1f} × paramdiff")
    if given.json:
        given.json.write_text(json.dumps({"params": params, "machine": machine(), "results": best}, indent=2) + "\n")


if __name__ == "__main__":
    main()
