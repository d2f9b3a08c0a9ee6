"""Published scripts, reproduced: the same number for the same pair, so that papers can be compared with one another.

`mukherjee2025` is the script behind arXiv 2505.11711 and 2602.07729 (SagnikMukherjee/sparsity_in_rl, check_sparsity.py):
both models loaded in bf16, subtracted in bf16, an element unchanged where `torch.isclose(delta, 0, atol=τ)` on the bf16
delta. The comparison runs in bf16, so its real threshold is τ rounded to bf16 (1e-5 becomes 1.00136e-05), and a NaN
delta is a change.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paramdiff.measures.accumulator import Accumulator
from paramdiff.measures.block import PairBlock
from paramdiff.measures.change import above_columns, above_name, round_to_bf16
from paramdiff.measures.options import Options
from paramdiff.pairing import Aligned

NAME = "mukherjee2025"


def update(acc: Accumulator, block: PairBlock, options: Options) -> None:
    """Count, for every tolerance, the elements that the script calls changed."""
    x, nan = block.x, block.finite is not None
    moved_beyond = x.count(~block.finite) if block.finite is not None else 0
    for tolerance in options.tolerances:
        # Elements that did not move and are not finite: inf - inf and NaN - NaN are NaN, which is close to nothing.
        acc.add_count(above_name(tolerance), block.nonfinite[2] - moved_beyond)
    if block.nothing_moved:
        return
    a, b = (round_to_bf16(x, v, may_hold_nan=nan) for v in (block.raw_a, block.raw_b))
    delta = abs(round_to_bf16(x, b - a, may_hold_nan=nan))
    for tolerance in options.tolerances:
        acc.add_count(above_name(tolerance), x.count(~(delta <= bf16(tolerance))))


def columns(acc: Accumulator, tensor: Aligned, options: Options) -> dict[str, Any]:
    """`above[τ]` and `sparsity[τ]` in the script's sense, in place of those of `change`."""
    return above_columns(acc, tensor, options)


def tables(acc: Accumulator, tensor: Aligned) -> dict[str, list[dict[str, Any]]]:
    """None beyond the columns."""
    return {}


def bf16(value: float) -> float:
    """A float rounded to bf16, ties to even.

    >>> bf16(1e-5)
    1.0013580322265625e-05
    """
    bits = int(np.float32(value).view(np.int32))
    return float(np.int32((bits + ((bits >> 16) & 1) + 0x7FFF) & -0x10000).view(np.float32))
