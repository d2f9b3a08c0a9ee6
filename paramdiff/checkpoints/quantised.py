"""Quantised weights: which tensors together are one weight, in which format. `dequantising` does the arithmetic.

Formats are recognised by names, types and shapes; config.json only tells the size of blocks. What is recognised appears
under the model's own name, as float32 values worked out while they are read, with the format in `TensorInfo.stored` and what
is stored in `TensorInfo.codes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping

from paramdiff.checkpoints.base import Checkpoint, TensorInfo
from paramdiff.checkpoints.dequantising import Blocks, Expert, Lookup
from paramdiff.checkpoints.derived import Derived, Made
from paramdiff.errors import BrokenFile, UnsupportedFormat

FP8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
BLOCK = (128, 128)  # of DeepSeek-V3 and what follows it, where config.json does not say
MOST_STATE = 1 << 16  # bytes of bitsandbytes' description of a weight
EXPORT = "Dequantise the model (with the library that made it) and compare the result."
NOT_READ = {  # the end of a name that no other format has → the format
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".weight_shape": "pack-quantized (compressed-tensors)",
    ".SCB": "bitsandbytes int8", ".W_q": "HQQ",
}  # fmt: skip


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its quantised weights as values, or itself where none is quantised.

    Raises `UnsupportedFormat` for formats that are known but not read, `BrokenFile` where scales do not fit their weights.
    """
    for end, kind in NOT_READ.items():
        found = next((name for name in checkpoint.tensors if name.endswith(end)), None)
        if found is not None:
            raise UnsupportedFormat(f"{checkpoint.ref} is quantised as {kind} ({found!r}), which is not read.", hint=EXPORT)
    made = list(_recognised(checkpoint))
    if not made:
        return checkpoint
    warnings = []
    taken = {name for one in made for name in one.sources}
    bare = [name for name, info in checkpoint.tensors.items() if info.dtype in FP8 and name not in taken]
    if bare:
        warnings.append(
            f"{checkpoint.ref}: {bare[0]!r} and {len(bare) - 1} more are 8-bit floats without a scale, read as such."
        )
    return Derived(checkpoint, made, warnings=warnings)


def _recognised(checkpoint: Checkpoint) -> Iterator[Made]:
    recognisers: dict[str, Callable[[Checkpoint, str, str], Made | None]] = {
        "_scale_inv": _fp8_block, ".weight_scale": _scaled, ".weight_packed": _nvfp4, "_blocks": _mxfp4,
        ".quant_state.bitsandbytes__nf4": _bitsandbytes, ".quant_state.bitsandbytes__fp4": _bitsandbytes,
    }  # fmt: skip
    for name in checkpoint.tensors:
        for end, recognise in recognisers.items():
            if name.endswith(end):
                made = recognise(checkpoint, name, name.removesuffix(end))
                if made is not None:
                    yield made


def _fp8_block(checkpoint: Checkpoint, scale: str, name: str) -> Made | None:
    """`X` in 8-bit floats with `X_scale_inv`, a factor (in spite of its name) for every block of rows and columns."""
    weight = checkpoint.tensors.get(name)
    if weight is None or weight.dtype not in FP8:
        return None
    config = (checkpoint.config or {}).get("quantization_config")
    said = config.get("weight_block_size") if isinstance(config, Mapping) else None
    block = said if isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said) else BLOCK
    return _blocks(checkpoint, name, weight, weight.dtype, scale, (block[0], block[1]), "fp8_block")


def _scaled(checkpoint: Checkpoint, scale: str, module: str) -> Made | None:
    """`X.weight` with `X.weight_scale`: one factor in all, one per row, per block, or per 32 or 16 elements of a row."""
    name = f"{module}.weight"
    weight, factors = checkpoint.tensors.get(name), checkpoint.tensors[scale]
    if weight is None or len(weight.shape) != 2:
        return None
    rows, cols = weight.shape
    if weight.dtype == "U8" and f"{module}.weight_scale_2" in checkpoint.tensors:  # ModelOpt
        info = TensorInfo(name, "F4", (rows, 2 * cols))
        factor = f"{module}.weight_scale_2"
        return _blocks(checkpoint, name, info, "F4", scale, (1, 16), "nvfp4_modelopt", multiply=factor)
    if weight.dtype not in FP8:
        return None
    if factors.numel == 1:
        return _blocks(checkpoint, name, weight, weight.dtype, scale, (rows, cols), "fp8")
    if factors.shape in ((rows,), (rows, 1)):
        return _blocks(checkpoint, name, weight, weight.dtype, scale, (1, cols), "fp8")
    if factors.dtype in ("U8", "F8_E8M0"):
        return _blocks(checkpoint, name, weight, weight.dtype, scale, (1, 32), "mxfp8")
    return _fp8_block(checkpoint, scale, name)


def _nvfp4(checkpoint: Checkpoint, packed: str, module: str) -> Made | None:
    """`X.weight_packed`: 4-bit floats of compressed-tensors, with a scale for 16 elements and one in all, which divides."""
    stored = checkpoint.tensors[packed]
    if stored.dtype != "U8" or len(stored.shape) != 2:
        raise UnsupportedFormat(
            f"{checkpoint.ref} is quantised as pack-quantized ({packed!r}), which is not read.", hint=EXPORT
        )
    info = TensorInfo(f"{module}.weight", "F4", (stored.shape[0], 2 * stored.shape[1]))
    scale, whole = f"{module}.weight_scale", f"{module}.weight_global_scale"
    if whole in checkpoint.tensors:
        return _blocks(checkpoint, packed, info, "F4", scale, (1, 16), "nvfp4", divide=whole)
    return _blocks(checkpoint, packed, info, "F4", scale, (1, 32), "mxfp4")


def _blocks(
    checkpoint: Checkpoint,
    codes: str,
    info: TensorInfo,
    dtype: str,
    scale: str,
    block: tuple[int, int],
    stored: str,
    multiply: str | None = None,
    divide: str | None = None,
) -> Blocks:
    """A weight in blocks, its scales checked against its shape."""
    factors = checkpoint.tensors.get(scale)
    if factors is None:
        raise BrokenFile(f"{checkpoint.ref} lacks {scale!r}, the scales of {info.name!r}.", hint="Download it again.")
    *stack, rows, cols = info.shape if len(info.shape) >= 2 else (1, *info.shape)
    needed = (*stack, -(-rows // block[0]), -(-cols // block[1]))
    if factors.numel != math.prod(needed) or factors.type.kind == "complex":
        raise BrokenFile(
            f"The scales of {info.name!r} in {checkpoint.ref} are {list(factors.shape)}, where {list(needed)} are needed "
            f"for blocks of {block[0]} × {block[1]}."
        )
    for one in (multiply, divide):
        if one is not None and checkpoint.tensors[one].numel != 1:
            raise BrokenFile(f"{one!r} in {checkpoint.ref} should be one number.")
    read_as = "F8_E8M0" if factors.dtype == "U8" else factors.dtype
    tags = TensorInfo(f"{info.name}::codes", dtype, info.shape)
    made = TensorInfo(info.name, "F32", info.shape, stored=stored, codes=tags)
    return Blocks(made, codes, scale, read_as, (rows, cols), (needed[-2], needed[-1]), block, multiply, divide)


def _mxfp4(checkpoint: Checkpoint, blocks: str, name: str) -> Made | None:
    """`X_blocks` and `X_scales` of gpt-oss: 4-bit floats of shape (experts, out, in/32, 16 bytes), a power of two for 32."""
    stored, scales = checkpoint.tensors[blocks], checkpoint.tensors.get(f"{name}_scales")
    if stored.dtype != "U8" or len(stored.shape) != 4 or stored.shape[3] != 16 or scales is None:
        return None
    if scales.shape != stored.shape[:3] or scales.type.bits != 8:
        raise BrokenFile(
            f"The scales of {name!r} in {checkpoint.ref} are {list(scales.shape)}, not {list(stored.shape[:3])}."
        )
    experts, rows, groups, _ = stored.shape
    tags = TensorInfo(f"{name}::codes", "F4", (experts, rows, 32 * groups))
    info = TensorInfo(name, "F32", (experts, 32 * groups, rows), stored="mxfp4", codes=tags)
    return Expert(info, blocks, f"{name}_scales")


def _bitsandbytes(checkpoint: Checkpoint, state: str, name: str) -> Made | None:
    """`X` in 4 bits with a table of 16 values, `X.absmax` for each block, itself quantised or not; the rest is JSON."""
    kind = state.rpartition("__")[2]
    described = checkpoint.tensors[state]
    if described.dtype != "U8" or described.numel > MOST_STATE:
        raise BrokenFile(f"{state!r} in {checkpoint.ref} is no description of a quantised weight.")
    raw = bytearray(described.numel)
    checkpoint.read_into(state, 0, memoryview(raw))
    try:
        said = json.loads(raw.decode("utf-8"))
        shape = tuple(said["shape"])
        block, nested = said["blocksize"], said.get("nested_blocksize", 0)
        offset = float(said.get("nested_offset", 0.0))
        if not all(type(n) is int and 0 <= n < 1 << 40 for n in (*shape, block, nested)) or not block:
            raise ValueError("sizes that are none")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFile(
            f"{state!r} in {checkpoint.ref} cannot be read: {str(error)[:80]}.", hint="Download it again."
        ) from error
    numel = math.prod(shape)
    needed = {name: -(-numel // 2), f"{name}.absmax": -(-numel // block), f"{name}.quant_map": 16}
    if nested:
        needed |= {f"{name}.nested_absmax": -(-needed[f"{name}.absmax"] // nested), f"{name}.nested_quant_map": 256}
    for part, count in needed.items():
        held = checkpoint.tensors.get(part)
        if held is None or held.numel != count:
            raise BrokenFile(
                f"{checkpoint.ref}: {part!r} should have {count:,} elements for a weight of {list(shape)[:8]}, and "
                f"{'is missing' if held is None else f'has {held.numel:,}'}.",
                hint="Download it again.",
            )
    if checkpoint.tensors[name].dtype != "U8" or (checkpoint.tensors[f"{name}.absmax"].dtype == "U8") != bool(nested):
        raise BrokenFile(f"{checkpoint.ref}: {name!r} is not stored as its description says.")
    tags = TensorInfo(f"{name}::codes", "F4", shape)
    info = TensorInfo(name, "F32", shape, stored=kind, codes=tags)
    return Lookup(info, name, state, block, nested, offset)
