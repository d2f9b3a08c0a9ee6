"""What every container looks like from above: names, and bytes of one tensor read into a buffer the caller owns."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from paramdiff.dtypes import DTYPES, DType
from paramdiff.errors import BrokenFile


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor. `shape` is the logical shape (packed 4-bit types count elements, not bytes).

    Where the values are worked out of others (dequantised weights, merged adapters), `stored` says of what, `dtype` is the
    type in which they are given, and `codes`, if any, is the tensor of what is stored, readable by its own name.

    >>> TensorInfo("lm_head.weight", "BF16", (8, 4)).nbytes
    64
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: str | None = None
    codes: TensorInfo | None = None
    read_bits: int | None = None  # what is read for an element, where that is not its type's size

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return (self.numel * self.type.bits + 7) // 8

    @property
    def bits_read(self) -> int:
        """Bits that are read from files for an element, scales and the like aside."""
        if self.read_bits is not None:
            return self.read_bits
        return self.codes.type.bits if self.codes is not None else self.type.bits

    @property
    def type(self) -> DType:
        return DTYPES[self.dtype]


class Checkpoint(Protocol):
    """An opened checkpoint: headers are parsed and validated, no weight has been read.

    `ref` is what the user typed, `config` the parsed config.json beside the weights (or None), `warnings` sentences about
    files that were left out. Reading is safe from several threads at once.
    """

    ref: str
    warnings: list[str]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def config(self) -> Mapping[str, Any] | None: ...

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the stored bytes of tensor `name` from byte `offset` on.

        Raises `BrokenFile` where the file ends early, `ChangedWhileReading` where it was rewritten meanwhile.
        """
        ...

    @property
    def is_local(self) -> bool:
        """False where some of it is read over a network."""
        ...

    def content(self, name: str) -> tuple[str, int] | None:
        """(hash of the file that holds a tensor, where in it), the same for the same bytes; None where it is not known."""
        ...

    def announce(self, parts: Iterable[tuple[str, int, int]]) -> None:
        """Say which bytes, (tensor, first byte, end), will be read next, so that they can be fetched. Changes no result."""
        ...

    def position(self, name: str) -> tuple[int, int]:
        """(file, byte) at which a tensor starts, so that readers can follow the order on disk."""
        ...

    def verify(self) -> None:
        """Raise `ChangedWhileReading` if a file is no longer the one that was opened."""
        ...

    def facts(self) -> dict[str, Any]:
        """What run.json keeps of this checkpoint: ref, format, files with their sizes."""
        ...

    def close(self) -> None: ...


@dataclass
class Located:
    """Where the weights of a reference lie: the files to read, in order, and what was seen and left aside."""

    files: list[str]
    directory: str
    format: str = "safetensors"
    shard_of: dict[str, str] | None = None  # tensor → file, from an index
    warnings: list[str] = field(default_factory=list)


@contextmanager
def understood(where: str, hint: str | None = None) -> Iterator[None]:
    """Turn what is not laid out as expected within into a sentence about `where`."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise BrokenFile(
            f"{where} is laid out in a way that is not known ({type(error).__name__}: {str(error)[:100]}).", hint=hint
        ) from error


def check_name(name: str, path: str) -> None:
    """Raise `BrokenFile` for a name that no output could hold."""
    if not name.isprintable() and any("\ud800" <= c <= "\udfff" for c in name):
        raise BrokenFile(f"A tensor's name in {path} is no valid Unicode: {name!r}.")


def strays_of(shard_of: Mapping[str, str] | None, path: str, names: Iterable[str], warnings: list[str]) -> set[str]:
    """The tensors of a shard that the index takes from elsewhere or not at all; said in `warnings`."""
    strays = [name for name in names if shard_of is not None and shard_of.get(name) != path]
    if strays:
        more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
        warnings.append(f"{path}: {strays[0]!r}{more} ignored; the index does not take it from this shard.")
    return set(strays)


def check_index(shard_of: Mapping[str, str] | None, found: Container[str]) -> None:
    """Raise `BrokenFile` where a tensor of the index was not found."""
    missing = sorted(name for name in shard_of or () if name not in found)
    if missing and shard_of is not None:
        raise BrokenFile(
            f"{shard_of[missing[0]]} lacks tensor {missing[0]!r}, which the index says it holds"
            f"{f' (and {len(missing) - 1} more are missing)' if len(missing) > 1 else ''}.",
            hint="Download the checkpoint again.",
        )
