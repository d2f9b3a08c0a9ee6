"""What the measures must give, in a few lines of float64 numpy over whole tensors, sharing no code with paramdiff.

Values come from torch's own conversions. Only the rule that Δ of floats is taken in float32 is the definition's.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch

FLOATS = {torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu}


@np.errstate(all="ignore")  # NaN and infinity are part of the game
def reference(a: torch.Tensor, b: torch.Tensor, tolerances: list[float]) -> dict[str, object]:
    integers = not (a.is_floating_point() or b.is_floating_point())
    if integers:
        va = a.to(torch.float64) if a.dtype == torch.uint64 else a.to(torch.int64)
        vb = b.to(torch.float64) if b.dtype == torch.uint64 else b.to(torch.int64)
    elif {a.dtype, b.dtype} <= FLOATS:
        va, vb = a.to(torch.float32), b.to(torch.float32)
    else:
        va, vb = a.to(torch.float64), b.to(torch.float64)
    x, y = va.numpy().ravel(), vb.numpy().ravel()
    with np.errstate(all="ignore"):
        delta = (y - x).astype(np.float64)
    both_nan = np.isnan(x.astype(np.float64)) & np.isnan(y.astype(np.float64))
    changed = (x != y) & ~both_nan
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    finite = np.isfinite(x64) & np.isfinite(y64)
    xf, yf, df = x64[finite], y64[finite], delta[finite]
    out: dict[str, object] = {
        "changed": int(changed.sum()),
        "sign_flips": int((((x64 < 0) & (y64 > 0)) | ((x64 > 0) & (y64 < 0))).sum()),
        "nonfinite_base": int((~np.isfinite(x64)).sum()),
        "nonfinite_tuned": int((~np.isfinite(y64)).sum()),
        "finite": int(finite.sum()),
        "max_abs_delta": float(np.abs(df).max(initial=0.0)),
        "l2_base": math.sqrt(math.fsum(xf**2)),
        "l2_tuned": math.sqrt(math.fsum(yf**2)),
        "l2_delta": math.sqrt(math.fsum(df**2)),
        "mean_abs_delta": math.fsum(np.abs(df)) / finite.sum() if finite.any() else None,
        "mean_delta": math.fsum(df) / finite.sum() if finite.any() else None,
        "dot": math.fsum(xf * yf),
    }
    for tolerance in tolerances:
        with np.errstate(all="ignore"):
            out[f"above[{tolerance!r}]"] = int((np.abs(delta) > tolerance).sum())
    if a.dtype == b.dtype:
        size = a.element_size()
        stored = [np.frombuffer(t.contiguous().view(torch.uint8).numpy().tobytes(), dtype=f"u{size}") for t in (a, b)]
        out["changed_bits"] = int((stored[0] != stored[1]).sum())
    if integers:
        out["changed_bf16"] = out["changed"]
    else:
        ra, rb = (t.to(torch.float32).to(torch.bfloat16).to(torch.float32).numpy().ravel() for t in (a, b))
        out["changed_bf16"] = int(((ra != rb) & ~(np.isnan(ra) & np.isnan(rb))).sum())
    if a.ndim >= 2:
        mask = changed.reshape(a.shape[0], -1)
        out["rows_touched"], out["cols_touched"] = int(mask.any(1).sum()), int(mask.any(0).sum())
        if changed.any():
            top = np.sort(mask.sum(1))[::-1][: math.ceil(a.shape[0] / 100)]
            out["top1pct_rows_share"] = float(top.sum() / mask.sum())
    return out


@np.errstate(all="ignore")
def exponents(a: torch.Tensor, b: torch.Tensor) -> tuple[Counter[int], Counter[float]]:
    """⌊log₂|Δ|⌋ and ⌊log₂(|Δ|/|a|)⌋ of every finite element with Δ ≠ 0, by frexp in float64; inf where it left zero."""
    x, y = (t.to(torch.float32).numpy().ravel() for t in (a, b))
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    delta = np.abs((y - x).astype(np.float64))
    moved = delta > 0
    deltas = Counter((np.frexp(delta[moved])[1] - 1).tolist())
    base = np.abs(x.astype(np.float64))[moved]
    ratios: Counter[float] = Counter()
    for d, a0 in zip(delta[moved].tolist(), base.tolist(), strict=True):
        ratios[math.inf if a0 == 0 else math.frexp(d / a0)[1] - 1] += 1
    return deltas, ratios


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    """Steps between representable values of one type, counted on the integer line with ±0 as one point."""
    size = a.element_size()
    sign = 1 << (8 * size - 1)
    lines = []
    for t in (a, b):
        codes = np.frombuffer(t.contiguous().view(torch.uint8).numpy().tobytes(), dtype=f"u{size}").tolist()
        lines.append([-(c - sign) if c >= sign else c for c in codes])
    finite = (torch.isfinite(a.float()) & torch.isfinite(b.float())).ravel().tolist()
    return [abs(p - q) for p, q, ok in zip(*lines, finite, strict=True) if ok]
