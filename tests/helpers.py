"""Writers of checkpoints: by hand, where every byte may be wrong, and by the real library, where all of them are right."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def header_bytes(header: Any) -> bytes:
    """The length and the JSON of a header, as a file starts with them. `bytes` are taken for the JSON as they stand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file written by hand: `header` is any JSON value, or the bytes that stand in its place."""
    path.write_bytes(header_bytes(header) + data)
    return path


def entry(dtype: Any, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    """One value of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A file written by the reference implementation."""
    from safetensors.torch import save_file

    save_file({name: tensor.clone() for name, tensor in tensors.items()}, str(path))
    return path


def model_dir(path: Path, tensors: Mapping[str, torch.Tensor], config: Any = None) -> Path:
    """A directory with `model.safetensors`, and with `config.json` where a config is given."""
    path.mkdir(parents=True, exist_ok=True)
    save(path / "model.safetensors", tensors)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def write_index(path: Path, weight_map: Any) -> Path:
    """An index as transformers writes it beside its shards."""
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path
