"""Quantised weights against the libraries that made them, and against encoders written from the formats' definitions."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import paramdiff
from paramdiff import checkpoints
from paramdiff.errors import BrokenFile, CheckpointError, UnsupportedFormat
from tests.cli.helpers import run, run_json

REAL = Path(__file__).parents[1] / "real" / "quantised"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def read(checkpoint: checkpoints.Checkpoint, name: str, step: int | None = None) -> torch.Tensor:
    info = checkpoint.tensors[name]
    whole = bytearray(info.nbytes)
    for start in range(0, len(whole), step or len(whole)):
        part = bytearray(min(step or len(whole), len(whole) - start))
        checkpoint.read_into(name, start, memoryview(part))
        whole[start : start + len(part)] = part
    return torch.from_numpy(np.frombuffer(whole, dtype=np.float32).reshape(info.shape).copy())


def model(path: Path, tensors: dict[str, torch.Tensor], config: Any = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path / "model.safetensors"))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def check(path: Path, expected: dict[str, torch.Tensor], stored: str) -> None:
    """Every range of every quantised tensor has the expected values, before and after pickling."""
    opened = checkpoints.open(str(path))
    for checkpoint in (opened, pickle.loads(pickle.dumps(opened))):
        for name, values in expected.items():
            info = checkpoint.tensors[name]
            assert (info.dtype, info.stored, info.shape) == ("F32", stored, tuple(values.shape))
            for step in (None, 4, 44, 1000):
                assert torch.equal(read(checkpoint, name, step), values), (name, step)
        checkpoint.close()


# --- made by the libraries themselves, by tests/real/make_quantised.py ----------------------------


@pytest.mark.parametrize("kind", ["nf4", "nf4_double", "fp4", "fp4_double"])
def test_bitsandbytes(kind: str) -> None:
    check(REAL / kind, load_file(str(REAL / f"{kind}.safetensors")), kind.removesuffix("_double"))


def test_compressed_tensors_nvfp4() -> None:
    """The library multiplies in bf16; in float32, and rounded, ours is the same."""
    checkpoint = checkpoints.open(str(REAL / "nvfp4"))
    stored = load_file(str(REAL / "nvfp4" / "model.safetensors"))
    expected = load_file(str(REAL / "nvfp4.safetensors"))
    assert set(checkpoint.tensors) == {*expected, "model.norm.weight"}
    for name, values in expected.items():
        module = name.removesuffix(".weight")
        packed = stored[f"{module}.weight_packed"]
        codes = torch.stack([packed & 15, packed >> 4], -1).reshape(values.shape).long()
        scale = stored[f"{module}.weight_scale"].float() / stored[f"{module}.weight_global_scale"]
        assert torch.equal(read(checkpoint, name), E2M1[codes] * scale.repeat_interleave(16, 1))
        assert torch.equal(read(checkpoint, name, 52).bfloat16(), values)
    checkpoint.close()


# --- from the definitions ------------------------------------------------------------------------


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Codes, scales and values, block by block in loops."""
    rows, cols = weight.shape
    scales = torch.zeros(-(-rows // block[0]), -(-cols // block[1]))
    codes, values = torch.zeros(rows, cols).to(dtype), torch.zeros(rows, cols)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[where].abs().max() / torch.finfo(dtype).max
            codes[where] = (weight[where] / scales[i, j]).to(dtype)
            values[where] = codes[where].float() * scales[i, j]
    return codes, scales, values


@pytest.mark.parametrize("shape", [(300, 257), (128, 128), (1, 1), (5, 400)])
def test_fp8_blocks(tmp_path: Path, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    codes, scales, values = fp8_blocks(torch.randn(shape), (128, 128), torch.float8_e4m3fn)
    check(model(tmp_path / "a", {"w.weight": codes, "w.weight_scale_inv": scales}), {"w.weight": values}, "fp8_block")


def test_fp8_blocks_of_another_size_and_in_stacks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}
    made = [fp8_blocks(torch.randn(40, 70), (16, 32), torch.float8_e5m2) for _ in range(3)]
    codes, scales, values = (torch.stack(part) for part in zip(*made, strict=True))
    stored = {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": scales}
    check(model(tmp_path / "a", stored, config), {"experts.gate_up_proj": values}, "fp8_block")


@pytest.mark.parametrize("shape", [(), (1,), (12, 1), (12,)])
def test_fp8_by_tensor_and_by_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    codes, scale = torch.randn(12, 20).to(torch.float8_e4m3fn), torch.rand(shape) + 0.5
    values = codes.float() * scale.reshape(-1, 1)
    check(model(tmp_path / "a", {"w.weight": codes, "w.weight_scale": scale}), {"w.weight": values}, "fp8")


def test_mxfp8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codes, exponents = torch.randn(6, 96).to(torch.float8_e4m3fn), torch.randint(110, 140, (6, 3), dtype=torch.uint8)
    values = codes.float() * (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 1)
    check(model(tmp_path / "a", {"w.weight": codes, "w.weight_scale": exponents}), {"w.weight": values}, "mxfp8")


def test_modelopt_nvfp4(tmp_path: Path) -> None:
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    scale, whole = (torch.rand(5, 3) * 100).to(torch.float8_e4m3fn), torch.tensor(0.0123)
    codes = torch.stack([packed & 15, packed >> 4], -1).reshape(5, 48).long()
    values = E2M1[codes] * (scale.float() * whole).repeat_interleave(16, 1)
    stored = {"w.weight": packed, "w.weight_scale": scale, "w.weight_scale_2": whole, "w.input_scale": torch.tensor(3.0)}
    path = model(tmp_path / "a", stored)
    check(path, {"w.weight": values}, "nvfp4_modelopt")
    assert "w.input_scale" in checkpoints.open(str(path)).tensors


def test_mxfp4_experts_as_transformers_gives_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(118, 132, (3, 10, 2), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert expected.shape == (3, 64, 10)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    check(
        model(tmp_path / "a", {f"{name}_blocks": blocks, f"{name}_scales": scales}), {name: expected.contiguous()}, "mxfp4"
    )


# --- comparing -----------------------------------------------------------------------------------


def test_values_and_codes_are_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codes, scales, values = fp8_blocks(torch.randn(300, 257), (128, 128), torch.float8_e4m3fn)
    base = model(tmp_path / "base", {"w.weight": codes, "w.weight_scale_inv": scales})
    raw = codes.view(torch.uint8).clone()
    raw[7, :9] ^= 1
    scales[2, 2] *= 2  # 44 rows and one column of values change, no code
    tuned = model(tmp_path / "tuned", {"w.weight": raw.view(torch.float8_e4m3fn), "w.weight_scale_inv": scales})
    diff = paramdiff.compare(base, tuned)
    summary = diff.summary()
    after = raw.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :257]
    assert summary["changed"] == int((after != values).sum())
    assert (summary["codes"], summary["codes_changed"]) == (300 * 257, 9)
    assert (summary["numel"], summary["tensors"], summary["coverage"]["compared"]) == (300 * 257, 1, 1)
    assert summary["stored_base"] == summary["stored_tuned"] == "fp8_block"
    assert summary["coverage"]["tied"] == []
    assert diff.run["warnings"] == []
    shown = run("sparsity", base, tuned).stdout
    assert "9 of 77,100 quantised codes changed" in shown
    assert "(base from fp8_block, tuned from fp8_block)" in shown


@pytest.mark.parametrize("kind", ["nf4", "nvfp4"])
def test_codes_of_four_bits(tmp_path: Path, kind: str) -> None:
    stored = load_file(str(REAL / kind / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj." + {"nf4": "weight", "nvfp4": "weight_packed"}[kind]
    stored[name].reshape(-1)[5] ^= 0x11  # both halves of a byte
    stored[name].reshape(-1)[9] ^= 0x10
    diff = paramdiff.compare(REAL / kind, model(tmp_path / "tuned", stored))
    assert (diff.summary()["codes"], diff.summary()["codes_changed"]) == (33 * 64 + 48 * 80, 3)


def test_against_unquantised_weights_the_error_is_said(tmp_path: Path) -> None:
    expected = {name: values.bfloat16() for name, values in load_file(str(REAL / "nvfp4.safetensors")).items()}
    told = run_json("sparsity", REAL / "nvfp4", model(tmp_path / "tuned", expected), "--quiet")
    assert told["stored_base"] == "nvfp4"
    assert "stored_tuned" not in told
    assert "codes" not in told
    said = run("sparsity", REAL / "nvfp4", tmp_path / "tuned").stderr
    assert "The change contains the error of quantisation: nvfp4 against BF16." in said
    assert paramdiff.compare(REAL / "nvfp4", tmp_path / "tuned").tensors["changed_bf16"].to_list() == [0, 0]


def test_codes_of_two_formats_are_not_compared() -> None:
    """nf4 and fp4 both have four bits, which mean other values."""
    diff = paramdiff.compare(REAL / "nf4", REAL / "fp4")
    assert "codes" not in diff.summary()
    assert diff.run["warnings"] == ["The change contains the error of quantisation: nf4 against fp4."]


def test_spectra_leave_the_codes_out() -> None:
    diff = paramdiff.compare(REAL / "nf4", REAL / "nf4_double", measures=["change", "spectrum"])
    assert diff.ranks.height == 2
    assert not [name for name in diff.ranks["name"] if "codes" in name]


def test_a_lora_upon_a_quantised_base(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    a, b = torch.randn(2, 64), torch.randn(33, 2)
    key = f"base_model.model.{name}.lora_"
    path = tmp_path / "a"
    path.mkdir()
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, str(path / "adapter_model.safetensors"))
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    diff = paramdiff.compare(REAL / "nf4", path)
    row = diff.tensors.filter(diff.tensors["name"] == f"{name}.weight").row(0, named=True)
    assert (row["stored_base"], row["stored_tuned"]) == ("nf4", "lora")
    assert row["l2_delta"] == pytest.approx(float((b.double() @ a.double()).norm()), rel=1e-12)
    assert diff.run["warnings"] == []


# --- what is not read, and what is broken --------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ({"w.qweight": torch.int32, "w.qzeros": torch.int32}, "GPTQ or AWQ"),
        ({"w.weight_packed": torch.int32}, "pack-quantized"),
        ({"w.weight_packed": torch.int32, "w.weight_shape": torch.int64}, "pack-quantized"),
        ({"w.weight": torch.int8, "w.SCB": torch.float32}, "bitsandbytes int8"),
        ({"w.W_q": torch.uint8}, "HQQ"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path: Path, names: dict[str, torch.dtype], word: str) -> None:
    path = model(tmp_path / "a", {name: torch.ones(4, 4).to(dtype) for name, dtype in names.items()})
    with pytest.raises(UnsupportedFormat, match=word) as caught:
        checkpoints.open(str(path))
    assert caught.value.hint


def state(**changes: Any) -> torch.Tensor:
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [33, 64]} | changes
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


PACKED = torch.ones(4, 32).byte()
KEY = "model.layers.0.mlp.up_proj.weight"
BROKEN: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "no absmax": lambda t: t.pop(f"{KEY}.absmax"),
    "no table": lambda t: t.pop(f"{KEY}.quant_map"),
    "absmax too short": lambda t: t.update({f"{KEY}.absmax": torch.ones(32)}),
    "absmax of another type": lambda t: t.update({f"{KEY}.absmax": torch.ones(33).byte()}),
    "no codes": lambda t: t.pop(KEY),
    "codes too short": lambda t: t.update({KEY: torch.ones(7, 1).byte()}),
    "another shape": lambda t: t.update({f"{KEY}.quant_state.bitsandbytes__nf4": state(shape=[1 << 39, 1 << 39])}),
    "a block of nothing": lambda t: t.update({f"{KEY}.quant_state.bitsandbytes__nf4": state(blocksize=0)}),
    "a negative block": lambda t: t.update({f"{KEY}.quant_state.bitsandbytes__nf4": state(blocksize=-64)}),
    "a shape in words": lambda t: t.update({f"{KEY}.quant_state.bitsandbytes__nf4": state(shape="many")}),
    "no JSON": lambda t: t.update({f"{KEY}.quant_state.bitsandbytes__nf4": torch.ones(9).byte()}),
    "a long description": lambda t: t.update({f"{KEY}.quant_state.bitsandbytes__nf4": torch.ones(1 << 17).byte()}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_bitsandbytes(tmp_path: Path, case: str) -> None:
    stored = load_file(str(REAL / "nf4" / "model.safetensors"))
    BROKEN[case](stored)
    with pytest.raises(BrokenFile):
        checkpoints.open(str(model(tmp_path / "a", stored)))


@pytest.mark.parametrize(
    "stored",
    [
        {"w.weight": torch.ones(300, 257).to(torch.float8_e4m3fn), "w.weight_scale_inv": torch.ones(2, 3)},
        {"w.weight": torch.ones(4, 64).to(torch.float8_e4m3fn), "w.weight_scale": torch.ones(4, 3).byte()},
        {"w.weight_packed": PACKED, "w.weight_global_scale": torch.ones(1)},
        {"w.weight_packed": PACKED, "w.weight_scale": torch.ones(4, 3), "w.weight_global_scale": torch.ones(1)},
        {"w.weight_packed": PACKED, "w.weight_scale": torch.ones(4, 4), "w.weight_global_scale": torch.ones(2)},
        {"w_blocks": torch.ones(2, 4, 2, 16).byte(), "w_scales": torch.ones(2, 4, 3).byte()},
    ],
)  # fmt: skip
def test_scales_that_do_not_fit(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.open(str(model(tmp_path / "a", stored)))
    assert type(caught.value) is BrokenFile


def test_eight_bit_floats_without_a_scale_are_read_as_they_are(tmp_path: Path) -> None:
    plain = {"w.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "v.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    opened = checkpoints.open(str(model(tmp_path / "a", plain)))
    assert opened.tensors["w.weight"].dtype == "F8_E4M3"
    assert opened.warnings == []
    opened = checkpoints.open(str(model(tmp_path / "b", plain | {"w.weight_scale": torch.ones(1)})))
    assert "'v.weight' and 0 more are 8-bit floats without a scale" in opened.warnings[0]
