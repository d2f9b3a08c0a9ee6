"""DeepSpeed ZeRO checkpoints: float32 masters, cut into flat vectors of which each rank saved one per group of parameters.

ZeRO-1 and 2 lay the parameters of a group end to end, in the order of `param_shapes`, and cut the whole into parts, one for
each rank. ZeRO-3 cuts every parameter into equal parts, the last one padded, and lays those of one rank end to end, in
vectors that follow one another. (deepspeed/utils/zero_to_fp32.py puts both together in memory.) The bf16 or fp16 copy of the
model that ZeRO-1 and 2 save as well is read only for what has no master: buffers, and parameters that were not trained.

The files of ZeRO-1 and 2 say a second time where parameters lie, in `param_slice_mappings`. That is wrong where DeepSpeed
(0.19.8) was told to deal gradients out in turn (`round_robin_gradients`): it is counted in the order before they were dealt
out. So the order of `param_shapes` decides, and elsewhere the two must agree.
"""

from __future__ import annotations

import dataclasses
import math
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from paramdiff.checkpoints import pickles
from paramdiff.checkpoints.base import Located, TensorInfo, check_name, understood
from paramdiff.checkpoints.files import Files
from paramdiff.checkpoints.pickles import Opaque, StoredTensor
from paramdiff.checkpoints.pieces import Assembled, Entry, Piece, assemble
from paramdiff.checkpoints.places import place
from paramdiff.checkpoints.torch_file import Storages, entry_of, read_file
from paramdiff.errors import BrokenFile, UnsupportedFormat

OPTIMIZER = re.compile(r".*?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt")
MODEL = re.compile(r"(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)_model_states\.pt")
CONVERT = "Convert it with DeepSpeed's zero_to_fp32.py, which lies beside it, and compare the result."
Shapes = dict[str, tuple[int, ...]]
Named = Iterator[tuple[str, Entry]]


@dataclass(frozen=True)
class Opened:
    """The content of one file, and its number among the open files."""

    path: str
    file: int
    content: Mapping[str, Any]
    storages: Storages

    def vector(self, value: Any, name: str) -> Vector:
        """Where a contiguous tensor lies, flat. Raises `BrokenFile` or `UnsupportedFormat`."""
        if not isinstance(value, StoredTensor):
            raise BrokenFile(f"{self.path} has no tensor where {name} should be.", hint="Copy it again.")
        entry = entry_of(name, value, self.file, self.storages, self.path)
        if entry.stride is not None:
            raise UnsupportedFormat(f"{self.path} holds {name} in an order that is not contiguous.")
        return Vector(self.file, entry.start, entry.info.numel, entry.info.dtype)


@dataclass(frozen=True, slots=True)
class Vector:
    """`length` elements in file number `file`, from byte `start` on."""

    file: int
    start: int
    length: int
    dtype: str


class Row:
    """Vectors of one type, one after the other: what a rank holds, or what all ranks hold of a group."""

    def __init__(self, vectors: Sequence[Vector], where: str) -> None:
        kinds = sorted({vector.dtype for vector in vectors})
        if len(kinds) != 1:
            raise BrokenFile(f"{where} holds {'groups of ' + ' and '.join(kinds) if kinds else 'no groups'} as masters.")
        self.dtype = kinds[0]
        self._size = TensorInfo("", self.dtype, (1,)).nbytes
        self._vectors = vectors
        self._begins = list(accumulate((vector.length for vector in vectors), initial=0))

    @property
    def length(self) -> int:
        return self._begins[-1]

    def pieces(self, at: int, count: int, offset: int = 0) -> Iterator[tuple[int, int, Piece]]:
        """(vector, its first element, the piece) for elements `at` to `at + count`, which go to `offset` of the tensor."""
        number = max(bisect_right(self._begins, at) - 1, 0)
        while number < len(self._vectors) and self._begins[number] < at + count:
            vector, begin = self._vectors[number], self._begins[number]
            low, high = max(at, begin), min(at + count, begin + vector.length)
            if low < high:
                start = vector.start + (low - begin) * self._size
                yield number, low - begin, Piece(vector.file, start, (offset + low - at,), (high - low,))
            number += 1


def open(ref: str, located: Located, config: dict[str, Any] | None, key: str | None) -> Assembled:
    """Open the directory of one tag, all of whose state files are located.

    Raises `BrokenFile` where a rank's file or a part is missing, `UnsupportedFormat` for tensor or pipeline parallelism,
    partitioned experts and the like.
    """
    if key:
        raise UnsupportedFormat(
            f"{ref} names an entry, which a DeepSpeed directory has not.", hint=f"Give {ref.partition('::')[0]}."
        )
    files = Files()
    try:
        with understood(str(place(located.files[0]).parent), CONVERT):
            tag = open_tag(located.files, files)
            entries, said = _entries(tag)
    except BaseException:
        files.close()
        raise
    return Assembled(ref, f"zero{tag.stage}", files, entries, config, [*located.warnings, *said])


@dataclass(frozen=True)
class Tag:
    """The files of one save: what each rank holds, in order, and of the model's; names and shapes of each group."""

    where: str
    states: list[Opened]
    facts: list[Opened]
    stage: int
    groups: list[Shapes]

    @property
    def optimizers(self) -> list[Mapping[str, Any]]:
        return [state.content["optimizer_state_dict"] for state in self.states]

    def laid_out(self, parts: Sequence[Sequence[Any]]) -> Named:
        """Parameters in vectors cut as masters are: `parts` holds those of each rank, one for each group."""
        return _of_equal_parts(self, parts) if self.stage == 3 else _of_one_vector(self, parts)


def open_tag(paths: Sequence[str], files: Files) -> Tag:
    """Open all state files of a tag's directory. Raises as `open` does."""
    where = str(place(paths[0]).parent)
    for path in paths:
        _check_kind(place(path).name, where)
    ranks, models = in_order(paths, OPTIMIZER, where), in_order(paths, MODEL, where)
    if not models:
        raise BrokenFile(f"{where} lacks the model_states files, which hold the shapes.", hint="Copy it again.")
    states = [open_state(path, files) for path in ranks]
    facts = [open_state(path, files) for path in models]
    first = facts[0].content
    for word in ("ds_autoep_layers", "autoep_layers"):
        if first.get(word):
            raise UnsupportedFormat(f"{where} holds experts partitioned by AutoEP, which are not read.", hint=CONVERT)
    if first.get("mp_world_size", 1) != 1:
        raise UnsupportedFormat(f"{where} was saved with {first['mp_world_size']}-fold model parallelism.", hint=CONVERT)
    for state in states:
        _check_world(state.path, state.content["optimizer_state_dict"], first, len(states))
    stage = _stage(states[0].content["optimizer_state_dict"])
    if stage == 3 and len(facts) != len(states):
        raise BrokenFile(f"{where} holds {len(facts)} model files for {len(states)} ranks.", hint="Copy all of them.")
    return Tag(where, states, facts, stage, [shapes_of(group) for group in first["param_shapes"]])


def _check_kind(name: str, where: str) -> None:
    """Raise `UnsupportedFormat` for files of the tag that hold a part of the model in another way."""
    if OPTIMIZER.fullmatch(name) or MODEL.fullmatch(name):
        return
    kind = next(
        (kind for word, kind in (("exp", "experts of DeepSpeed-MoE"), ("layer", "layers of a pipeline")) if word in name),
        None,
    )
    raise UnsupportedFormat(
        f"{where} holds {kind or 'states'} in files of their own ({name}), which this version does not read.",
        hint="Export the model as safetensors first.",
    )


def in_order(paths: Sequence[str], pattern: re.Pattern[str], where: str) -> list[str]:
    """The files of one kind in the order of ranks, none missing."""
    found: dict[int, str] = {}
    for path in paths:
        match = pattern.fullmatch(place(path).name)
        if match is None:
            continue
        if int(match["part"]):
            raise UnsupportedFormat(
                f"{where} was saved with tensor or pipeline parallelism, which this version does not put together.",
                hint=CONVERT,
            )
        rank = int(match["rank"] or 0)
        if rank in found:
            raise BrokenFile(f"{where} holds two files of rank {rank}: {place(path).name} and {place(found[rank]).name}.")
        found[rank] = path
    missing = next((rank for rank in range(len(found)) if rank not in found), None)
    if missing is not None:
        raise BrokenFile(f"{where} lacks the file of rank {missing}.", hint="Copy it from the machine that wrote it.")
    return [found[rank] for rank in sorted(found)]


def open_state(path: str, files: Files) -> Opened:
    """Open one of DeepSpeed's state files. Raises `BrokenFile` or `UnsupportedFormat`."""
    file = files.add(path)
    content, storages = read_file(files, file)
    if not isinstance(content, Mapping):
        raise BrokenFile(f"{path} holds no mapping, as DeepSpeed's files do.")
    return Opened(path, file, content, storages)


def _entries(tag: Tag) -> tuple[dict[str, Entry], list[str]]:
    masters = "fp32_flat_groups" if tag.stage == 3 else "single_partition_of_fp32_groups"
    entries: dict[str, Entry] = {}
    for name, entry in [
        *tag.laid_out([optimizer[masters] for optimizer in tag.optimizers]),
        *frozen(tag.facts, tag.stage, tag.where),
    ]:
        if name in entries:
            raise BrokenFile(f"{tag.where} holds {name!r} twice.")
        entries[name] = entry
    others, aside = without_master(tag.facts[0], entries)
    entries.update(others)
    return entries, left_out(tag.where, aside + add_shared(entries, tag.facts[0]))


def _check_world(path: str, optimizer: Mapping[str, Any], first: Mapping[str, Any], files: int) -> None:
    """Raise where a rank's file says that the parameters were cut into another number of parts than there are files."""
    counts = optimizer.get("partition_count", first.get("dp_world_size", files))
    for count in {*counts} if isinstance(counts, (list, tuple)) else {counts}:
        if count != files:
            raise BrokenFile(
                f"{path} is one of {count}, but there are {files} of them.",
                hint="Copy the files of all ranks; with MiCS, or experts in parallel, convert it with DeepSpeed first.",
            )
    for group in optimizer.get("ds_zero_partition_groups") or ():
        if group.get("partition_count", files) != files:
            raise UnsupportedFormat(f"{path} holds groups cut into different numbers of parts, which are not read.")


def _stage(optimizer: Mapping[str, Any]) -> int:
    if "zero_stage" not in optimizer and "single_partition_of_fp32_groups" in optimizer:
        return 1  # with bf16 and gradients in float32, of an optimizer that is made for this stage and does not write it
    stage = optimizer.get("zero_stage")
    stage = stage.args[0] if isinstance(stage, Opaque) else stage
    if stage not in (1, 2, 3):
        raise ValueError(f"a ZeRO stage of {str(stage)[:40]}")
    return int(stage)


def shapes_of(group: Any) -> Shapes:
    """Names and shapes of a group, in the order in which they lie."""
    shapes = {}
    for name, shape in group.items():
        if not (isinstance(name, str) and isinstance(shape, (tuple, list)) and all(map(pickles.is_whole, shape))):
            raise ValueError("a parameter's shape is none")
        if len(shape) >= pickles.MAX_RANK:
            raise ValueError("a parameter has too many dimensions")
        shapes[name] = tuple(shape)
    return shapes


def _flat(name: str, dtype: str, shape: tuple[int, ...], pieces: Sequence[Piece], where: str) -> tuple[str, Entry]:
    check_name(name, where)
    info = TensorInfo(name, dtype, shape)
    return name, assemble(info, pieces, where, shape=(info.numel,))


def _of_one_vector(tag: Tag, parts: Sequence[Sequence[Any]]) -> Named:
    """ZeRO-1 and 2: the parts of all ranks, one after the other, are one vector per group."""
    states, optimizers, where = tag.states, tag.optimizers, tag.where
    if any(len(one) != len(tag.groups) for one in parts):
        raise ValueError("numbers of groups that differ")
    for number, shapes in enumerate(tag.groups):
        row = Row([s.vector(one[number], f"group {number}") for s, one in zip(states, parts, strict=True)], where)
        placed: list[dict[str, tuple[int, int]]] = [{} for _ in states]  # of each rank: (first element, elements) by name
        at = 0
        for (name, shape), gap in zip(shapes.items(), _gaps(optimizers[0], number, len(shapes)), strict=True):
            numel = math.prod(shape)
            pieces = []
            for rank, first, piece in row.pieces(at, numel):
                placed[rank][name] = first, piece.shape[0]
                pieces.append(piece)
            yield _flat(name, row.dtype, shape, pieces, where)
            at += numel + gap
        align = 2 * len(states)  # to which the whole was padded before it was cut; the padding at the end may be gone
        if -(-at // align) != -(-row.length // align):
            raise BrokenFile(f"{where} holds {row.length:,} elements in group {number}, whose parameters take {at:,}.")
        for state, optimizer, mine in zip(states, optimizers, placed, strict=True):
            _check_mapping(state, optimizer, number, mine)


def _gaps(optimizer: Mapping[str, Any], number: int, count: int) -> list[int]:
    """How many elements of padding follow each parameter of a group; files that do not say have none."""
    gaps = optimizer.get("param_alignment_paddings")
    if gaps is None:
        return [0] * count
    if len(gaps[number]) != count or not all(map(pickles.is_whole, gaps[number])):
        raise ValueError("the paddings of a group do not fit its parameters")
    return [*gaps[number]]


def _check_mapping(state: Opened, optimizer: Mapping[str, Any], number: int, placed: Mapping[str, tuple[int, int]]) -> None:
    """Raise `BrokenFile` where a rank's file says of parameters that they lie elsewhere than their order has it."""
    told = optimizer.get("param_slice_mappings")
    settings = (state.content.get("ds_config") or {}).get("zero_optimization")
    if not told or (isinstance(settings, Mapping) and settings.get("round_robin_gradients")):
        return
    found = {name: (address.state["start"], address.state["numel"]) for name, address in told[number].items()}
    if found != placed:
        name = next(name for name in [*found, *placed] if found.get(name) != placed.get(name))
        said, meant = (f"{place[1]:,} elements from {place[0]:,} on" if place else "nothing"
                       for place in (found.get(name), placed.get(name)))  # fmt: skip
        raise BrokenFile(
            f"{state.path} contradicts the order of parameters: of {name!r}, it says to hold {said}, not {meant}.",
            hint="Copy the files of all ranks again, all of one save.",
        )


def _of_equal_parts(tag: Tag, parts: Sequence[Sequence[Any]]) -> Named:
    """ZeRO-3: each rank holds an equal part of every parameter, in vectors that follow one another."""
    states = tag.states
    rows = [
        Row([state.vector(group, "a group") for group in own], state.path) for state, own in zip(states, parts, strict=True)
    ]
    taken = sum(-(-math.prod(shape) // len(rows)) for shapes in tag.groups for shape in shapes.values())
    for state, row in zip(states, rows, strict=True):
        if (row.length, row.dtype) != (taken, rows[0].dtype):
            raise BrokenFile(
                f"{state.path} holds {row.length:,} elements of {row.dtype}, where its parameters take {taken:,} of "
                f"{rows[0].dtype}.",
                hint="Copy it again.",
            )
    at = 0
    for shapes in tag.groups:
        for name, shape in shapes.items():
            numel = math.prod(shape)
            length = -(-numel // len(rows))
            pieces = [
                piece
                for rank, row in enumerate(rows)
                for _, _, piece in row.pieces(at, min(length, numel - rank * length), rank * length)
            ]
            yield _flat(name, rows[0].dtype, shape, pieces, states[0].path)
            at += length


def frozen(facts: Sequence[Opened], stage: int, where: str) -> Named:
    """Parameters that were not trained: whole in ZeRO-2, in parts of all ranks in ZeRO-3; as the model stores them."""
    for name, shape in shapes_of(facts[0].content.get("frozen_param_shapes") or {}).items():
        ranks = facts if stage == 3 else facts[:1]
        row = Row([one.vector(one.content["frozen_param_fragments"][name], repr(name)) for one in ranks], where)
        yield _flat(name, row.dtype, shape, [piece for _, _, piece in row.pieces(0, math.prod(shape))], where)


def without_master(opened: Opened, known: Collection[str]) -> tuple[dict[str, Entry], list[str]]:
    """What the model's state holds besides those `known`, as stored: buffers, and parameters that no optimizer had.

    Second names of shared parameters are left to `add_shared`. Also the names of those that are not there, as ZeRO-3 keeps
    an empty tensor in the place of a parameter that lies elsewhere.
    """
    second, buffers = opened.content.get("shared_params") or {}, {*(opened.content.get("buffer_names") or ())}
    found: dict[str, Entry] = {}
    aside = []
    for name, value in (opened.content.get("module") or {}).items():
        if name in known or name in second:
            continue
        if isinstance(value, StoredTensor) and isinstance(name, str) and (name in buffers or 0 not in value.shape):
            row = Row([opened.vector(value, repr(name))], opened.path)
            pieces = [piece for _, _, piece in row.pieces(0, row.length)]
            found.update([_flat(name, row.dtype, value.shape, pieces, opened.path)])
        else:
            aside.append(repr(name)[:80])
    return found, aside


def add_shared(entries: dict[str, Entry], opened: Opened) -> list[str]:
    """Add the second names of shared parameters, with the master of the first. Returns those of which there is none."""
    aside = []
    for name, source in (opened.content.get("shared_params") or {}).items():
        if source in entries:
            check_name(name, opened.path)
            entries[name] = Entry(dataclasses.replace(entries[source].info, name=name), entries[source].strips)
        elif name not in entries:
            aside.append(repr(name)[:80])
    return aside


def left_out(where: str, aside: Sequence[str]) -> list[str]:
    """A sentence about what was left out, if anything was."""
    more = f" and {len(aside) - 4} more" if len(aside) > 4 else ""
    return [f"{where}: {', '.join(aside[:4])}{more} left out; the checkpoint names it without values."] if aside else []
