"""What spectra and subspaces share: which tensors are matrices of weights, and how their rows begin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paramdiff import names
from paramdiff.machine import memory
from paramdiff.measures.accumulator import Accumulator
from paramdiff.pairing import Aligned


def refused(acc: Accumulator, tensor: Aligned, scratch: int) -> bool:
    """Whether a tensor is left out, whatever its values; one too large for this machine is noted in `acc`."""
    if why_not(tensor) is not None:
        return True
    if scratch > memory():
        acc.results["note"] = f"needs {scratch / 1e9:.1f} GB of memory"
        return True
    return False


def why_not(tensor: Aligned) -> str | None:
    """Why a tensor has no matrices of weights, or None."""
    if tensor.is_codes:
        return "codes of a quantised weight"
    if tensor.is_packed:
        return "its elements are packed"
    if not tensor.is_matrix:
        return "not a matrix"
    if tensor.duplicate_of:
        return f"tied to {tensor.duplicate_of}; see there"
    if tensor.compute == "i64":
        return "whole numbers, not weights"
    return None if tensor.numel else "no elements"


def identities(tensor: Aligned) -> Iterator[dict[str, Any]]:
    """What a row says of each matrix of a tensor before it is measured: place, expert, shape. Nothing for vectors, codes."""
    if tensor.is_codes or not (tensor.is_matrix or tensor.is_packed):
        return
    place = names.place(tensor.name)
    count, rows, cols = tensor.matrices if tensor.is_matrix else (1, None, None)
    for number in range(max(count, 1)):
        expert = number if tensor.is_stack else place.expert
        row = {"layer": place.layer, "module": place.module, "kind": place.kind, "expert": expert}
        yield row | {"rows": rows, "cols": cols, "duplicate_of": tensor.duplicate_of}
