"""Quantised weights made, and dequantised, by bitsandbytes and compressed-tensors themselves.

In an environment with torch, safetensors, bitsandbytes and compressed-tensors: `python tests/real/make_quantised.py DIR`.
Below DIR, for each kind: `model.safetensors` as such a model is stored, and beside it `<kind>.safetensors`, what the library
makes of it. (The CPU kernel of bitsandbytes 0.50.2 dequantises a matrix wrongly whose width is no multiple of the block
size; it is given as one long row, which the stored bytes do not depend on.)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"model.layers.0.self_attn.q_proj": (48, 80), "model.layers.0.mlp.up_proj": (33, 64)}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in SHAPES.items()}


def save(directory: Path, stored: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    norm = {"model.norm.weight": torch.ones(48).bfloat16()}
    save_file({name: tensor.contiguous() for name, tensor in (stored | norm).items()}, str(directory / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, f"{directory}.safetensors")


def bitsandbytes(out: Path) -> None:
    from bitsandbytes import functional

    for kind in ("nf4", "fp4"):
        for double in (False, True):
            stored, expected = {}, {}
            for name, weight in weights().items():
                options = {"quant_type": kind, "compress_statistics": double, "blocksize": 64}
                packed, state = functional.quantize_4bit(weight.float(), **options)
                row, of_row = functional.quantize_4bit(weight.float().flatten(), **options)
                assert torch.equal(packed, row)
                stored[f"{name}.weight"] = packed
                stored |= {f"{name}.weight.{part}": value for part, value in state.as_dict(packed=True).items()}
                expected[f"{name}.weight"] = functional.dequantize_4bit(row, of_row).reshape(weight.shape)
            save(out / f"{kind}{'_double' if double else ''}", stored, expected)


def compressed_tensors(out: Path) -> None:
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    scheme = preset_name_to_scheme("NVFP4A16", targets=["Linear"])
    stored, expected = {}, {}
    for name, weight in weights().items():
        rows, cols = weight.shape
        whole = (448 * 6 / weight.abs().max().float()).reshape(1)
        largest = weight.float().reshape(rows, cols // 16, 16).abs().amax(-1)
        scale = (whole * largest / 6).clamp(max=448).to(torch.float8_e4m3fn).to(torch.bfloat16)
        parts = NVFP4PackedCompressor.compress(
            {"weight": weight, "weight_scale": scale, "weight_global_scale": whole}, scheme
        )
        stored |= {f"{name}.{part}": value for part, value in parts.items()}
        expected[f"{name}.weight"] = NVFP4PackedCompressor.decompress(parts, scheme)["weight"]
    save(out / "nvfp4", stored, expected)


if __name__ == "__main__":
    bitsandbytes(Path(sys.argv[1]))
    compressed_tensors(Path(sys.argv[1]))
