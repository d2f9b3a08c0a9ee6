"""DeepSpeed ZeRO checkpoints: float32 masters, cut into flat vectors of which each rank saved one per group of parameters.

ZeRO-1 and 2 lay the parameters of a group end to end and cut the whole into equal parts, one for each rank; every rank's
file says which piece of which parameter lies where in its part. ZeRO-3 cuts every parameter into equal parts, the last one
padded, and lays those of one rank end to end. (deepspeed/utils/zero_to_fp32.py puts both together in memory.) The bf16 or
fp16 copy of the model that ZeRO-1 and 2 save as well is read only for what has no master: buffers and frozen parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramdiff.checkpoints import pickles
from paramdiff.checkpoints.base import Located, TensorInfo
from paramdiff.checkpoints.files import Files
from paramdiff.checkpoints.pickles import Opaque, StoredTensor
from paramdiff.checkpoints.pieces import Assembled, Entry, Piece, assemble
from paramdiff.checkpoints.torch_file import Storages, entry_of, read_file
from paramdiff.errors import BrokenFile, UnsupportedFormat

OPTIMIZER = re.compile(r".*?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt")
MODEL = re.compile(r"(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)_model_states\.pt")
CONVERT = "Convert it with DeepSpeed's zero_to_fp32.py, which lies beside it, and compare the result."


@dataclass(frozen=True)
class Opened:
    """The content of one file, and its number among the open files."""

    path: str
    file: int
    content: Mapping[str, Any]
    storages: Storages

    def vector(self, value: Any, name: str) -> tuple[int, int, str]:
        """(first byte, elements, dtype) of a contiguous tensor, flat."""
        if not isinstance(value, StoredTensor):
            raise BrokenFile(f"{self.path} has no tensor where {name} should be.", hint="Copy it again.")
        entry = entry_of(name, value, self.file, self.storages, self.path)
        if entry.stride is not None:
            raise UnsupportedFormat(f"{self.path} holds {name} in an order that is not contiguous.")
        return entry.start, entry.info.numel, entry.info.dtype


def open(ref: str, located: Located, config: dict[str, Any] | None, key: str | None) -> Assembled:
    """Open the directory of one tag, all of whose state files are located.

    Raises `BrokenFile` where a rank's file or a part is missing, `UnsupportedFormat` for tensor or pipeline parallelism,
    partitioned experts and the like.
    """
    if key:
        raise UnsupportedFormat(f"{ref} names an entry, which a DeepSpeed directory has not.")
    where = str(Path(located.files[0]).parent)
    files = Files()
    try:
        ranks = _in_order(located.files, OPTIMIZER, where)
        models = _in_order(located.files, MODEL, where)
        if not models:
            raise BrokenFile(f"{where} lacks the model_states files, which hold the shapes.", hint="Copy it again.")
        states = [_opened(path, files) for path in ranks]
        facts = [_opened(path, files) for path in models]
        try:
            stage, entries = _entries(states, facts, where)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise BrokenFile(
                f"{where} is laid out in a way that is not known ({type(error).__name__}: {str(error)[:100]}).", hint=CONVERT
            ) from error
    except BaseException:
        files.close()
        raise
    return Assembled(ref, f"zero{stage}", files, entries, config, located.warnings)


def _in_order(paths: Sequence[str], pattern: re.Pattern[str], where: str) -> list[str]:
    """The files of one kind in the order of ranks, none missing."""
    found: dict[int, str] = {}
    for path in paths:
        match = pattern.fullmatch(Path(path).name)
        if match is None:
            if "expert" in Path(path).name:
                raise UnsupportedFormat(f"{where} holds experts of DeepSpeed-MoE in files of their own, which are not read.")
            continue
        if int(match["part"]):
            raise UnsupportedFormat(
                f"{where} was saved with tensor or pipeline parallelism, which this version does not put together.",
                hint=CONVERT,
            )
        rank = int(match["rank"] or 0)
        if rank in found:
            raise BrokenFile(f"{where} holds two files of rank {rank}: {Path(path).name} and {Path(found[rank]).name}.")
        found[rank] = path
    missing = next((rank for rank in range(len(found)) if rank not in found), None)
    if missing is not None:
        raise BrokenFile(f"{where} lacks the file of rank {missing}.", hint="Copy it from the machine that wrote it.")
    return [found[rank] for rank in sorted(found)]


def _opened(path: str, files: Files) -> Opened:
    file = files.add(path)
    content, storages = read_file(files, file)
    if not isinstance(content, Mapping):
        raise BrokenFile(f"{path} holds no mapping, as DeepSpeed's files do.")
    return Opened(path, file, content, storages)


def _entries(states: list[Opened], facts: list[Opened], where: str) -> tuple[int, dict[str, Entry]]:
    first = facts[0].content
    for word in ("ds_autoep_layers", "autoep_layers"):
        if first.get(word):
            raise UnsupportedFormat(f"{where} holds experts partitioned by AutoEP, which are not read.", hint=CONVERT)
    if first.get("mp_world_size", 1) != 1:
        raise UnsupportedFormat(f"{where} was saved with {first['mp_world_size']}-fold model parallelism.", hint=CONVERT)
    world = first.get("dp_world_size", len(states))
    if world != len(states):
        raise BrokenFile(
            f"{where} holds the optimizer files of {len(states)} ranks, but {world} saved it.", hint="Copy all."
        )
    optimizers = [state.content["optimizer_state_dict"] for state in states]
    stage = _stage(optimizers[0])
    groups = [_shapes(group) for group in first["param_shapes"]]
    entries: dict[str, Entry] = {}
    if stage == 3:
        if len(facts) != len(states):
            raise BrokenFile(f"{where} holds {len(facts)} model files for {len(states)} ranks.", hint="Copy all of them.")
        made = _of_equal_parts(states, optimizers, groups, where)
    else:
        made = _of_one_vector(states, optimizers, groups, where)
    for name, entry in [*made, *_frozen(facts, stage, where), *_buffers(facts[0])]:
        if name in entries:
            raise BrokenFile(f"{where} holds {name!r} twice.")
        entries[name] = entry
    for alias, source in (first.get("shared_params") or {}).items():
        entry = entries[source]
        entries[alias] = Entry(TensorInfo(alias, entry.info.dtype, entry.info.shape), entry.strips)
    return stage, entries


def _stage(optimizer: Mapping[str, Any]) -> int:
    stage = optimizer.get("zero_stage")
    stage = stage.args[0] if isinstance(stage, Opaque) else stage
    if stage not in (1, 2, 3):
        raise ValueError(f"a ZeRO stage of {str(stage)[:40]}")
    return int(stage)


def _shapes(group: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a group, in the order in which they lie."""
    shapes = {}
    for name, shape in group.items():
        if not (isinstance(name, str) and isinstance(shape, (tuple, list)) and all(map(pickles.is_whole, shape))):
            raise ValueError("a parameter's shape is none")
        if len(shape) > pickles.MAX_RANK:
            raise ValueError("a parameter has too many dimensions")
        shapes[name] = tuple(shape)
    return shapes


def _flat(name: str, dtype: str, shape: tuple[int, ...], pieces: list[Piece], where: str) -> tuple[str, Entry]:
    info = TensorInfo(name, dtype, shape)
    return name, assemble(info, pieces, where, shape=(info.numel,))


def _of_one_vector(
    states: list[Opened], optimizers: list[Any], groups: list[dict[str, tuple[int, ...]]], where: str
) -> Iterator[tuple[str, Entry]]:
    """ZeRO-1 and 2: each rank holds an equal part of one vector per group."""
    if len(optimizers[0]["single_partition_of_fp32_groups"]) != len(groups):
        raise ValueError("numbers of groups that differ")
    for number, shapes in enumerate(groups):
        parts = [
            state.vector(optimizer["single_partition_of_fp32_groups"][number], f"group {number}")
            for state, optimizer in zip(states, optimizers, strict=True)
        ]
        told = [_mapping(optimizer, number) for optimizer in optimizers]
        mapped = all(mapping is not None for mapping in told)
        if not mapped and any(any(row) for row in optimizers[0].get("param_alignment_paddings") or ()):
            raise UnsupportedFormat(f"{where} has gaps between parameters, and does not say where they lie.", hint=CONVERT)
        at = 0
        for name, shape in shapes.items():
            numel, dtype, pieces, done = math.prod(shape), parts[0][2], [], 0
            for rank, (start, length) in _where(name, at, numel, told if mapped else None, [n for _, n, _ in parts]):
                first, held, kind = parts[rank]
                if start + length > held or kind != dtype:
                    raise BrokenFile(f"{states[rank].path}: {name!r} should end at element {start + length:,} of {held:,}.")
                pieces.append(Piece(states[rank].file, first + start * _size(dtype), (done,), (length,)))
                done += length
            yield _flat(name, dtype, shape, pieces, where)
            at += numel


def _mapping(optimizer: Mapping[str, Any], number: int) -> Mapping[str, tuple[int, int]] | None:
    """Where the pieces of a rank's part begin and how long they are, by name; None where the file does not say."""
    mappings = optimizer.get("param_slice_mappings")
    if not mappings:
        return None
    found = {}
    for name, address in mappings[number].items():
        start, length = address.state["start"], address.state["numel"]
        if not (pickles.is_whole(start) and pickles.is_whole(length)):
            raise ValueError("a fragment's address is none")
        found[name] = start, length
    return found


def _where(
    name: str, at: int, numel: int, told: Sequence[Mapping[str, tuple[int, int]] | None] | None, lengths: list[int]
) -> Iterator[tuple[int, tuple[int, int]]]:
    """(rank, (first element in its part, elements)) of each piece of a parameter, in the parameter's order."""
    if told is not None:
        for rank, mapping in enumerate(told):
            if mapping and name in mapping:
                yield rank, mapping[name]
        return
    begin = 0
    for rank, length in enumerate(lengths):
        low, high = max(at, begin), min(at + numel, begin + length)
        if low < high:
            yield rank, (low - begin, high - low)
        begin += length


def _of_equal_parts(
    states: list[Opened], optimizers: list[Any], groups: list[dict[str, tuple[int, ...]]], where: str
) -> Iterator[tuple[str, Entry]]:
    """ZeRO-3: each rank holds an equal part of every parameter, in vectors that follow one another."""
    vectors = [
        [state.vector(group, "a group") for group in optimizer["fp32_flat_groups"]]
        for state, optimizer in zip(states, optimizers, strict=True)
    ]
    world, at = len(states), 0
    for shapes in groups:
        for name, shape in shapes.items():
            numel = math.prod(shape)
            length = -(-numel // world)
            dtype = vectors[0][0][2]
            pieces: list[Piece] = []
            for rank, state in enumerate(states):
                wanted = min(length, numel - rank * length)
                pieces += _pieces(state, vectors[rank], at, wanted, rank * length, name)
            yield _flat(name, dtype, shape, pieces, where)
            at += length
    for state, groups_of_rank in zip(states, vectors, strict=True):
        held = sum(length for _, length, _ in groups_of_rank)
        if held != at:
            raise BrokenFile(f"{state.path} holds {held:,} elements, where its parameters take {at:,}.", hint=CONVERT)


def _pieces(
    state: Opened, vectors: list[tuple[int, int, str]], at: int, wanted: int, offset: int, name: str
) -> Iterator[Piece]:
    """`wanted` elements from element `at` of a rank's vectors on, which may reach from one into the next."""
    begin = 0
    for start, length, dtype in vectors:
        if dtype != vectors[0][2]:
            raise BrokenFile(f"{state.path} holds groups of different types.")
        low, high = max(at, begin), min(at + wanted, begin + length)
        if low < high:
            yield Piece(state.file, start + (low - begin) * _size(dtype), (offset + low - at,), (high - low,))
        begin += length
    if wanted > 0 and at + wanted > begin:
        raise BrokenFile(f"{state.path} ends before {name!r}: it holds {begin:,} elements.", hint="Copy it again.")


def _frozen(facts: list[Opened], stage: int, where: str) -> Iterator[tuple[str, Entry]]:
    """Parameters that were not trained: whole in ZeRO-1 and 2, in parts of all ranks in ZeRO-3; as the model stores them."""
    for name, shape in _shapes(facts[0].content.get("frozen_param_shapes") or {}).items():
        pieces, done, dtype = [], 0, ""
        for opened in facts if stage == 3 else facts[:1]:
            start, length, kind = opened.vector(opened.content["frozen_param_fragments"][name], repr(name))
            length = min(length, math.prod(shape) - done)
            if dtype not in ("", kind):
                raise BrokenFile(f"{where}: ranks hold {name!r} in different types.")
            dtype = kind
            pieces.append(Piece(opened.file, start, (done,), (length,)))
            done += length
        yield _flat(name, dtype, shape, pieces, where)


def _buffers(opened: Opened) -> Iterator[tuple[str, Entry]]:
    for name in opened.content.get("buffer_names") or ():
        value = opened.content["module"].get(name)
        if value is not None:  # those that are not persistent are not stored
            start, _, dtype = opened.vector(value, repr(name))
            yield _flat(name, dtype, value.shape, [Piece(opened.file, start, (0,), (math.prod(value.shape),))], opened.path)


def _size(dtype: str) -> int:
    return TensorInfo("", dtype, (1,)).nbytes
