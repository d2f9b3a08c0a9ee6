"""Optimizer states of libraries that the tests do not install: tests/real/optimizers.

In an environment with torch, bitsandbytes (0.50.2) and stable-baselines3 (2.9):

    python tests/real/make_optimizers.py DIR

Below DIR: `adam8bit/` (weights, optimizer.pt as bitsandbytes saves it now, and optimizer_flat.pt as it did up to 0.46),
`ppo.zip` and `sac.zip` of Stable-Baselines3; `expected/NAME.safetensors`, moments by name, as the library has them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


def eight_bit(out: Path) -> None:
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_blockwise

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(65, 71), nn.Linear(71, 61, bias=False), nn.LayerNorm(61))  # 4,615, 4,331: over 4,096
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 65)).square().mean().backward()
        optimizer.step()
    where = out / "adam8bit"
    where.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), where / "pytorch_model.bin")
    kept = optimizer.state_dict()
    torch.save(kept, where / "optimizer.pt")
    for state in kept["state"].values():
        state.update(state.pop("__bnb_optimizer_quant_state__", {}))
    torch.save(kept, where / "optimizer_flat.pt")
    expected: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        for number, slot in ((1, "exp_avg"), (2, "exp_avg_sq")):
            found = state[f"state{number}"]
            if found.dtype == torch.uint8:
                found = dequantize_blockwise(
                    found, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
                )
            expected[f"{slot}/{name}"] = found.clone()
    save_file(expected, out / "expected" / "adam8bit.safetensors")


def stable_baselines(out: Path) -> None:
    from stable_baselines3 import PPO, SAC

    small: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}
    ppo = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=2, **small).learn(64)
    sac = SAC("MlpPolicy", "Pendulum-v1", learning_starts=8, buffer_size=100, batch_size=8, **small).learn(16)
    for name, model in (("ppo", ppo), ("sac", sac)):
        model.save(out / f"{name}.zip")
    parts = {"ppo": (ppo.policy, ppo.policy.optimizer), "sac": (sac.critic, sac.critic.optimizer)}
    for name, (module, optimizer) in parts.items():
        prefix = "critic." if name == "sac" else ""
        expected = {
            f"{slot}/{prefix}{n}": optimizer.state[p][slot].clone()
            for n, p in module.named_parameters()
            if p in optimizer.state
            for slot in ("exp_avg", "exp_avg_sq")
        }
        save_file(expected, out / "expected" / f"{name}.safetensors")


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    (directory / "expected").mkdir(parents=True, exist_ok=True)
    eight_bit(directory)
    stable_baselines(directory)
