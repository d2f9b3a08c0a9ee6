"""What every container looks like from above: names, and bytes of one tensor read into a buffer the caller owns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from paramdiff.dtypes import DTYPES, DType


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor. `shape` is the logical shape (packed 4-bit types count elements, not bytes).

    >>> TensorInfo("lm_head.weight", "BF16", (8, 4)).nbytes
    64
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return (self.numel * self.type.bits + 7) // 8

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
    shard_of: dict[str, str] | None = None  # tensor → file, from an index
    warnings: list[str] = field(default_factory=list)
