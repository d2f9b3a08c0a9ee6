"""Optimizer states: a reference in, names of parameters and their moments out. One file per source; `find` picks."""

from __future__ import annotations

from importlib import import_module
from os import PathLike, fspath

from paramdiff.checkpoints.base import understood
from paramdiff.checkpoints.places import shown, split_key
from paramdiff.optimizers.find import find
from paramdiff.optimizers.state import OptimizerState, Parameter, ParameterState

__all__ = ["OptimizerState", "Parameter", "ParameterState", "optimizer"]

# What `find` calls a source → the module whose `open(ref, path, key)` reads it, imported when it is met.
SOURCES = {
    "torch": "torch_state",
    "dcp": "dcp_state",
    "ranks": "rank_state",
    "zero": "zero_state",
    "universal": "zero_state",
}


def optimizer(ref: str | PathLike[str]) -> OptimizerState:
    """Open the optimizer state of a checkpoint: names of parameters → moments that are read when they are asked for.

    `ref` is a trainer's directory (`checkpoint-500`, `global_step_40`), the directory or file of the state within, or a file
    with everything in it (Lightning's .ckpt, a Stable-Baselines3 zip). Where a file holds several states,
    `file.ckpt::optimizer_states/1` names one.
    Raises `NotFound`, `UnsupportedFormat` (also where parameters cannot be named with certainty) or `BrokenFile`.

    >>> state = optimizer("sample_data/checkpoints/rl-adamw/checkpoint-200")
    >>> state["model.norm.weight"].step
    200
    >>> state["model.norm.weight"]["exp_avg_sq"].shape
    (96,)
    >>> state.close()
    """
    path, key = split_key(fspath(ref))
    kind, found = find(path)
    source = import_module(f"paramdiff.optimizers.{SOURCES[kind]}")
    with understood(found):
        opened: OptimizerState = source.open(shown(fspath(ref)), found, key)
    return opened
