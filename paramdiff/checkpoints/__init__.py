"""Checkpoints: a reference in, names and readable byte ranges out. One file per container; `open` picks."""

from __future__ import annotations

from paramdiff.checkpoints.base import Checkpoint, TensorInfo
from paramdiff.checkpoints.locate import locate, read_config
from paramdiff.checkpoints.safetensors import SafetensorsCheckpoint

__all__ = ["Checkpoint", "TensorInfo", "open"]


def open(ref: str) -> Checkpoint:
    """Open a checkpoint: parse and validate its headers, read no weights.

    `ref` is a directory (`base/`, `pipeline/unet`), a `.safetensors` file or a `.safetensors.index.json`.
    Raises `NotFound`, `UnsupportedFormat` or `BrokenFile`.

    >>> checkpoint = open("sample_data/base")
    >>> checkpoint.tensors["model.norm.weight"].dtype
    'BF16'
    >>> checkpoint.close()
    """
    located = locate(ref)
    return SafetensorsCheckpoint(ref, located, read_config(located.directory))
