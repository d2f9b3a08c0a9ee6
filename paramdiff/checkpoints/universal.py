"""DeepSpeed's universal checkpoints: a directory `zero/<parameter>/` for each parameter, its float32 master in fp32.pt.

The model's state files lie beside `zero/` as ZeRO wrote them. They give the shapes of parameters that were stored flat (of
ZeRO-3), and what has no master: buffers, parameters that were not trained, second names of shared ones. The conversion of
ZeRO-1 and 2 puts these into `zero/` too, as float32 copies of what the model held in bf16 or fp16; of a second name, that is
less than its master, so they are read as in ZeRO's own checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import fspath
from typing import Any

from paramdiff.checkpoints import zero
from paramdiff.checkpoints.base import Located, TensorInfo, check_name
from paramdiff.checkpoints.files import Files
from paramdiff.checkpoints.pickles import StoredTensor
from paramdiff.checkpoints.pieces import Assembled, Entry, Piece, assemble
from paramdiff.checkpoints.places import Place, matching, place
from paramdiff.checkpoints.torch_file import entry_of, read_file
from paramdiff.errors import BrokenFile, UnsupportedFormat


@dataclass(frozen=True)
class Beside:
    """What the model's state files say: the shapes of trained parameters, what has no master, names without values."""

    first: zero.Opened
    shapes: Mapping[str, tuple[int, ...]]
    others: Mapping[str, Entry]
    aside: Sequence[str]
    groups: Sequence[zero.Shapes]  # the same shapes, by the groups of the optimizer
    whole: bool = True  # False where the files are those of ranks among which tensors were cut, and so are the shapes

    @property
    def shared(self) -> Mapping[str, str]:
        return self.first.content.get("shared_params") or {}


def open(ref: str, located: Located, config: dict[str, Any] | None, key: str | None) -> Assembled:
    """Open the files `zero/<parameter>/fp32.pt`, which are located: a tensor each, or a mapping with one under "param".

    Raises `BrokenFile` where a parameter's file is missing or has another number of elements than its shape,
    `UnsupportedFormat` for what the reader of torch files does not know.
    """
    if key:
        raise UnsupportedFormat(
            f"{ref} names an entry, which a universal checkpoint has not.", hint=f"Give {ref.partition('::')[0]}."
        )
    where = place(located.files[0]).parents[2]
    files = Files()
    try:
        beside = beside_of(where, files)
        entries: dict[str, Entry] = {}
        for path in located.files:
            name = place(path).parent.name
            if beside is None or (name not in beside.others and name not in beside.shared):
                entries[name] = entry(name, path, files, beside)
        _check_complete(where, located.files, entries, beside)
        warnings = [*located.warnings]
        if beside is not None:
            entries.update(beside.others)
            warnings += zero.left_out(str(where), [*beside.aside, *zero.add_shared(entries, beside.first)])
        elif all(len(entry.info.shape) == 1 for entry in entries.values()):
            warnings.append(
                f"{where} has no model_states files, without which all tensors are read flat, as they are stored."
            )
    except BaseException:
        files.close()
        raise
    return Assembled(ref, "universal", files, entries, config, warnings)


def entry(name: str, path: str, files: Files, beside: Beside | None) -> Entry:
    """One parameter's master, or moment, from its file. Raises `BrokenFile` or `UnsupportedFormat`."""
    check_name(name, path)
    file = files.add(path)
    content, storages = read_file(files, file)
    tensor = content.get("param") if isinstance(content, Mapping) else content
    if not isinstance(tensor, StoredTensor):
        raise BrokenFile(f"{path} holds neither a tensor nor a mapping with one under 'param'.")
    part = entry_of(name, tensor, file, storages, path)
    if part.stride is not None:
        raise UnsupportedFormat(f"{path} holds a tensor that is not contiguous.")
    shape = tensor.shape
    if beside is not None and len(shape) == 1 and name in beside.shapes and (beside.whole or len(beside.shapes[name]) != 1):
        shape = beside.shapes[name]
    if math.prod(shape) != part.info.numel:
        raise BrokenFile(
            f"{path} holds {part.info.numel:,} elements, where {name!r} has the shape {list(shape)}.",
            hint="Convert it again.",
        )
    info = TensorInfo(name, part.info.dtype, shape)
    return assemble(info, [Piece(file, part.start, (0,), (info.numel,))], path, shape=(info.numel,))


def _check_complete(where: Place, found: Sequence[str], entries: Mapping[str, Entry], beside: Beside | None) -> None:
    """Raise `BrokenFile` for a parameter without fp32.pt."""
    there = {place(path).parent.name for path in found}
    named = [entry.name for entry in (where / "zero").iterdir() if entry.is_dir()]
    missing = sorted({*named, *(beside.shapes if beside else ())} - there - set(beside.shared if beside else ()))
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise BrokenFile(f"{where} lacks zero/{missing[0]}/fp32.pt{more}.", hint="Copy it again, or convert it again.")


def beside_of(where: Place, files: Files) -> Beside | None:
    """What the model's state files say; None where there are none."""
    paths = [fspath(path) for path in matching(where, "*_model_states.pt") if zero.MODEL.fullmatch(path.name)]
    if not paths:
        return None
    whole = all(zero.MODEL.fullmatch(place(path).name)["part"].strip("0") == "" for path in paths)  # type: ignore[index]
    paths = zero.in_order(paths, zero.MODEL, str(where)) if whole else paths[:1]
    try:
        states = [zero.open_state(path, files) for path in paths]
        first = states[0].content
        groups = [zero.shapes_of(group) for group in first["param_shapes"]]
        shapes = {name: shape for group in groups for name, shape in group.items()}
        if not isinstance(first.get("shared_params") or {}, Mapping):
            raise ValueError("shared parameters that are no mapping")
        if not whole or first.get("ds_autoep_layers") or first.get("autoep_layers"):
            return Beside(states[0], shapes, {}, [], groups, whole)  # of a model in parts: `zero/` holds all there is
        others = dict(zero.frozen(states, 3 if "zero_pp" in place(paths[0]).name else 2, str(where)))
        rest, aside = zero.without_master(states[0], {*shapes, *others})
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise BrokenFile(
            f"{where} has model_states files laid out in a way that is not known ({type(error).__name__}: "
            f"{str(error)[:100]}).",
            hint="Move them away, and shapes are taken as they are stored.",
        ) from error
    return Beside(states[0], shapes, {**others, **rest}, aside, groups)
