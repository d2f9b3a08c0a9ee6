"""Optimizers of torch that train here, and what they did, in a few lines of float64 numpy. Shared by the tests beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn


class Net(nn.Module):
    """Two layers with the names of a decoder, one of which never gets a gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(19, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.norm = nn.LayerNorm(8)
        self.unused = nn.Linear(8, 3)
        self.lm_head = nn.Linear(8, 19, bias=False)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1).float(), tokens.flatten())


Make = Callable[[Any], torch.optim.Optimizer]


def train(make: Make, steps: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Net, Any, list[Any]]:
    """The model, its optimizer, and the gradients of every step by name."""
    torch.manual_seed(seed)
    model = Net(dtype)
    optimizer = make(model.named_parameters())
    gradients = []
    for _ in range(steps):
        gradients.append(step(model, optimizer))
    return model, optimizer, gradients


def step(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray[Any, Any]]:
    optimizer.zero_grad()
    model(torch.randint(0, 19, (2, 6))).backward()
    found = {name: p.grad.double().numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return found


def save(where: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, names: bool = True, **state: Any) -> Path:
    """A directory as Trainer leaves it: model.safetensors, optimizer.pt, trainer_state.json where `state` is given."""
    where.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, where / "model.safetensors")
    kept = optimizer.state_dict()
    if not names:
        for group in kept["param_groups"]:
            group.pop("param_names", None)
    torch.save(kept, where / "optimizer.pt")
    if state:
        (where / "trainer_state.json").write_text(json.dumps(state))
    return where


def expected(
    m: Any, v: Any, t: int, *, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, largest: Any = None
) -> dict[str, float]:
    """metrics.md §5 for one tensor, by its letter."""
    m, v = np.asarray(m, dtype=np.float64).ravel(), np.asarray(v, dtype=np.float64).ravel()
    mhat, vhat = m / (1 - beta1**t), v / (1 - beta2**t)
    below = np.asarray(largest, dtype=np.float64).ravel() / (1 - beta2**t) if largest is not None else vhat
    u = mhat / (np.sqrt(below) + eps)
    effective = lr / (np.sqrt(below) + eps)
    found = {
        "v_mean": v.mean(), "v_std": v.std(), "sqrt_v_mean": np.sqrt(v).mean(), "sqrt_v_std": np.sqrt(v).std(),
        "vhat_mean": vhat.mean(), "vhat_std": vhat.std(), "sqrt_vhat_mean": np.sqrt(vhat).mean(),
        "sqrt_vhat_std": np.sqrt(vhat).std(), "v_zero": float((v == 0).mean()),
        "log10_eff_lr_mean": np.log10(effective).mean(), "log10_eff_lr_std": np.log10(effective).std(),
        "u_norm": np.linalg.norm(u), "mhat_norm": np.linalg.norm(mhat), "u_dot_mhat": u @ mhat,
        "update_rms": lr * math.sqrt((u**2).mean()), "update_max": lr * np.abs(u).max(),
        "update_saturated": (np.abs(u) > 0.9).mean(), "update_small": (np.abs(u) < 0.1).mean(),
        "adaptivity": 1 - u @ mhat / np.linalg.norm(u) / np.linalg.norm(mhat),
        "equivalent_sgd_lr": lr * (u @ mhat) / (mhat @ mhat),
    }  # fmt: skip
    return {name: float(value) for name, value in found.items()}


def percentiles(v: Any, t: int, *, lr: float, beta2: float = 0.999, eps: float = 1e-8) -> list[float]:
    """The three of the effective learning rate, without a histogram."""
    effective = lr / (np.sqrt(np.asarray(v, dtype=np.float64).ravel() / (1 - beta2**t)) + eps)
    return [float(value) for value in np.quantile(effective, [0.01, 0.5, 0.99], method="inverted_cdf")]


def to_bf16(values: Any) -> Any:
    """Rounded by torch."""
    return torch.as_tensor(np.asarray(values, dtype=np.float64)).float().bfloat16()
