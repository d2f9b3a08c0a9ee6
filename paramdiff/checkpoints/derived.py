"""Tensors worked out of stored ones while they are read: parts of fused tensors, dequantised weights, merged adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from paramdiff.checkpoints.base import Checkpoint, TensorInfo


class Made(Protocol):
    """A tensor made from `sources`, names of a checkpoint, any range at a time."""

    @property
    def info(self) -> TensorInfo: ...

    @property
    def sources(self) -> tuple[str, ...]: ...

    def read_into(self, source: Checkpoint, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `offset` on, reading no more of `source` than that takes."""
        ...


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of elements that are stored as they are: `extents` of (source, first byte, bytes), one after the other."""

    info: TensorInfo
    extents: tuple[tuple[str, int, int], ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _, _ in self.extents))

    def stored(self, start: int, end: int) -> Iterable[tuple[str, int, int]]:
        """(source, first byte, end) of bytes `start` to `end`."""
        at = 0
        for name, first, length in self.extents:
            low, high = max(at, start), min(at + length, end)
            if low < high:
                yield name, first + low - at, first + high - at
            at += length

    def read_into(self, source: Checkpoint, offset: int, buffer: memoryview) -> None:
        at, end = 0, offset + len(buffer)
        for name, start, length in self.extents:
            low, high = max(at, offset), min(at + length, end)
            if low < high:
                source.read_into(name, start + low - at, buffer[low - offset : high - offset])
            at += length


class Derived:
    """A checkpoint in which `made` stand in for the tensors they are made from, and all others are as in `source`.

    Those named in `keep` stay beside what was made of them. `also` are further checkpoints that `made` read from, verified
    and closed with it. See `Checkpoint` for the interface.
    """

    def __init__(
        self,
        source: Checkpoint,
        made: Iterable[Made],
        *,
        ref: str | None = None,
        warnings: Sequence[str] = (),
        also: Sequence[Checkpoint] = (),
        keep: Collection[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.ref, self.config = ref or source.ref, source.config
        self.warnings = [*source.warnings, *(w for other in also for w in other.warnings), *warnings]
        self._source, self._also, self._facts = source, tuple(also), dict(facts or {})
        self._made = {one.info.name: one for one in made}
        self._codes = {one.info.codes.name: one for one in self._made.values() if one.info.codes}
        used = {name for one in self._made.values() for name in one.sources} - set(keep)
        # Each where its first source stood, so that the order of the file is kept.
        stood: dict[str, list[TensorInfo]] = {}
        for one in self._made.values():
            stood.setdefault(one.sources[0], []).append(one.info)
        self.tensors: Mapping[str, TensorInfo] = {
            info.name: info
            for name, stored in source.tensors.items()
            for info in [*([] if name in used else [stored]), *stood.get(name, [])]
        }

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name in self._made:
            with np.errstate(all="ignore"):  # NaN and infinite weights or scales are for the measures to tell
                self._made[name].read_into(self._source, offset, buffer)
        elif name in self._codes:
            self._source.read_into(self._codes[name].sources[0], offset, buffer)
        else:
            self._source.read_into(name, offset, buffer)

    @property
    def is_local(self) -> bool:
        return all(checkpoint.is_local for checkpoint in (self._source, *self._also))

    def content(self, name: str) -> tuple[str, int] | None:
        return None if name in self._made or name in self._codes else self._source.content(name)

    def announce(self, parts: Iterable[tuple[str, int, int]]) -> None:
        stored: list[tuple[str, int, int]] = []
        for name, start, end in parts:
            made = self._made.get(name)
            if name in self._codes and made is None:
                stored.append((self._codes[name].sources[0], start, end))
            elif made is None:
                stored.append((name, start, end))
            elif isinstance(made, View):
                stored += made.stored(start, end)
            elif made is not None and made.info.codes is not None and made.info.codes.numel == made.info.numel:
                bits, wide = made.info.codes.type.bits, made.info.type.bits  # a code for each element, in their order
                stored.append((made.sources[0], start * bits // wide, -(-end * bits // wide)))
        self._source.announce(stored)

    def sources(self, name: str) -> tuple[str, ...]:
        """The stored tensors that one is made from: itself, or others."""
        return self._made[name].sources if name in self._made else (name,)

    def position(self, name: str) -> tuple[int, int]:
        made = self._made.get(name) or self._codes.get(name)
        return self._source.position(made.sources[0] if made else name)

    def verify(self) -> None:
        for checkpoint in (self._source, *self._also):
            checkpoint.verify()

    def facts(self) -> dict[str, Any]:
        return {**self._source.facts(), "ref": self.ref, "tensors": len(self.tensors), **self._facts}

    def close(self) -> None:
        for checkpoint in (self._source, *self._also):
            checkpoint.close()
