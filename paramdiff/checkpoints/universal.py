"""DeepSpeed's universal checkpoints: a directory `zero/<parameter>/` for each parameter, its float32 master in fp32.pt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paramdiff.checkpoints import pickles
from paramdiff.checkpoints.base import Located, TensorInfo, check_name
from paramdiff.checkpoints.files import Files
from paramdiff.checkpoints.pickles import StoredTensor
from paramdiff.checkpoints.pieces import Assembled, Entry, Piece, assemble
from paramdiff.checkpoints.torch_file import entry_of, read_file
from paramdiff.errors import BrokenFile, UnsupportedFormat


def open(ref: str, located: Located, config: dict[str, Any] | None, key: str | None) -> Assembled:
    """Open the files `zero/<parameter>/fp32.pt`, which are located: a tensor each, or a mapping with one under "param".

    The model's state files beside them, if any, give the shapes of parameters that were stored flat.
    Raises `BrokenFile` or `UnsupportedFormat`.
    """
    if key:
        raise UnsupportedFormat(f"{ref} names an entry, which a universal checkpoint has not.")
    files = Files()
    try:
        shapes = _shapes(Path(located.files[0]).parents[2])
        entries: dict[str, Entry] = {}
        for path in located.files:
            name = Path(path).parent.name
            check_name(name, path)
            file = files.add(path)
            content, storages = read_file(files, file)
            tensor = content.get("param") if isinstance(content, Mapping) else content
            if not isinstance(tensor, StoredTensor):
                raise BrokenFile(f"{path} holds neither a tensor nor a mapping with one under 'param'.")
            part = entry_of(name, tensor, file, storages, path)
            if part.stride is not None:
                raise UnsupportedFormat(f"{path} holds a tensor that is not contiguous.")
            shape = shapes.get(name, tensor.shape)
            if math.prod(shape) != part.info.numel:
                raise BrokenFile(f"{path} holds {part.info.numel:,} elements, where {name!r} has the shape {list(shape)}.")
            info = TensorInfo(name, part.info.dtype, shape)
            entries[name] = assemble(info, [Piece(file, part.start, (0,), (info.numel,))], path, shape=(info.numel,))
    except BaseException:
        files.close()
        raise
    return Assembled(ref, "universal", files, entries, config, located.warnings)


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """What the first of the model's state files says of shapes; nothing where there is none, as they are a help only."""
    found = sorted(directory.glob("*_model_states.pt"))
    if not found:
        return {}
    files = Files()
    try:
        content, _ = read_file(files, files.add(str(found[0])))
    finally:
        files.close()
    groups = content.get("param_shapes") if isinstance(content, Mapping) else None
    shapes = {}
    for group in groups if isinstance(groups, (list, tuple)) else ():
        for name, shape in group.items() if isinstance(group, Mapping) else ():
            if isinstance(shape, tuple) and len(shape) < pickles.MAX_RANK and all(map(pickles.is_whole, shape)):
                shapes[str(name)] = shape
    return shapes
