"""Checkpoints: a reference in, names and readable byte ranges out. One file per container; `open` picks."""

from __future__ import annotations

from importlib import import_module

from paramdiff.checkpoints.base import Checkpoint, TensorInfo
from paramdiff.checkpoints.locate import locate, read_config
from paramdiff.checkpoints.places import shown, split_key
from paramdiff.checkpoints.quantised import dequantised

__all__ = ["Checkpoint", "TensorInfo", "open", "open_pair"]

# What `locate` calls a format → the module whose `open(ref, located, config, key)` reads it, imported when it is met.
CONTAINERS = {
    "safetensors": "safetensors",
    "torch": "torch_file",
    "dcp": "dcp",
    "dcp_hf": "dcp_hf",
    "ranks": "rank_files",
    "zero": "zero",
    "universal": "universal",
    "adapter": "adapters",
}


def open(ref: str) -> Checkpoint:
    """Open a checkpoint: parse and validate its headers, read no weights.

    `ref` is a directory (`base/`, `pipeline/unet`, `global_step_40/actor`, `checkpoint-500`), a `.safetensors`, `.bin`,
    `.pt` or `.pth` file, or an index of such files. Where it holds weights in several places, `file.pt::model` names the
    one to read.
    Raises `NotFound`, `UnsupportedFormat` or `BrokenFile`.

    >>> checkpoint = open("sample_data/base")
    >>> checkpoint.tensors["model.norm.weight"].dtype
    'BF16'
    >>> checkpoint.close()
    """
    path, key = split_key(ref)
    located, ref = locate(path), shown(ref)
    container = import_module(f"paramdiff.checkpoints.{CONTAINERS[located.format]}")
    checkpoint: Checkpoint = container.open(ref, located, read_config(located.directory), key)
    try:
        return dequantised(checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def open_pair(base: str, tuned: str) -> tuple[Checkpoint, Checkpoint]:
    """Open two checkpoints that are to be compared. An adapter against a model is added to that model.

    Raises what `open` does, and `PairingError` where the two cannot stand side by side.
    """
    first = open(base)
    second = None
    try:
        second = open(tuned)
        if "lora" in (first.facts()["format"], second.facts()["format"]):
            from paramdiff.checkpoints import adapters

            return first, adapters.beside(first, second, lambda: open(base))
        return first, second
    except BaseException:
        first.close()
        if second is not None:
            second.close()
        raise
