"""Checkpoints: a reference in, names and readable byte ranges out. One file per container; `open` picks."""

from __future__ import annotations

from paramdiff.checkpoints.base import Checkpoint, TensorInfo
from paramdiff.checkpoints.locate import locate, read_config
from paramdiff.checkpoints.safetensors import SafetensorsCheckpoint
from paramdiff.checkpoints.torch_file import TorchCheckpoint
from paramdiff.errors import UnsupportedFormat

__all__ = ["Checkpoint", "TensorInfo", "open"]


def open(ref: str) -> Checkpoint:
    """Open a checkpoint: parse and validate its headers, read no weights.

    `ref` is a directory (`base/`, `pipeline/unet`), a `.safetensors`, `.bin`, `.pt` or `.pth` file, or an index of such
    files. Where a torch file holds weights in several places, `file.pt::model` names the one to read.
    Raises `NotFound`, `UnsupportedFormat` or `BrokenFile`.

    >>> checkpoint = open("sample_data/base")
    >>> checkpoint.tensors["model.norm.weight"].dtype
    'BF16'
    >>> checkpoint.close()
    """
    path, _, key = ref.partition("::")
    located = locate(path)
    config = read_config(located.directory)
    if located.format == "torch":
        return TorchCheckpoint(ref, located, config, key or None)
    if key:
        raise UnsupportedFormat(
            f"{path} is a safetensors checkpoint, which has no entry {key!r}.", hint=f"Give {path} alone."
        )
    return SafetensorsCheckpoint(ref, located, config)
