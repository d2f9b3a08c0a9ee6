"""The reader of torch files against torch itself, and against files that lie."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paramdiff
from paramdiff import checkpoints
from paramdiff.engines import processes
from paramdiff.engines import threads as in_threads
from paramdiff.errors import BrokenFile, CheckpointError, NotFound, ParamdiffError, UnsupportedFormat
from paramdiff.pairing import align
from paramdiff.streaming import spans
from tests.checkpoints import hostile as h
from tests.checkpoints.hostile import (
    FOUR,
    Member,
    Verdict,
    call,
    judge,
    legacy,
    many,
    members,
    named,
    tensor,
    value,
    weights,
)
from tests.helpers import save as save_safetensors
from tests.helpers import write_index
from tests.test_engines import MEASURED, OPTIONS, finish, models

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "sample_data"
GENERATOR = torch.Generator().manual_seed(0)
LEGACY = {"_use_new_zipfile_serialization": False}
BOTH = pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
OLD_TYPES = {
    "F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
NEW_TYPES = {
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
TYPES = {**OLD_TYPES, **NEW_TYPES}
NAMES = {dtype: name for name, dtype in TYPES.items()}
T = torch.arange(6.0).reshape(2, 3)
MODEL = {"w": T, "b": torch.ones(3).bfloat16()}


def make(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count, size = int(np.prod(shape)), torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=GENERATOR)
    return ((raw & 1).view(torch.bool) if dtype == torch.bool else raw.view(dtype)).reshape(shape)


def stored(weight: torch.Tensor) -> bytes:
    """The bytes of the elements in their order, whatever the layout in memory."""
    plain = weight.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return bytes(plain.reshape(-1).view(torch.uint8).numpy()) if weight.numel() else b""


def saved(path: Path, content: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


def read(checkpoint: checkpoints.Checkpoint, name: str, offset: int = 0, count: int | None = None) -> bytes:
    buffer = bytearray(checkpoint.tensors[name].nbytes - offset if count is None else count)
    checkpoint.read_into(name, offset, memoryview(buffer))
    return bytes(buffer)


def check(ref: Path | str, expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Names, types, shapes and bytes are those of `expected`, before and after pickling. Returns the warnings."""
    first = checkpoints.open(str(ref))
    travelled = pickle.loads(pickle.dumps(first))
    for checkpoint in (first, travelled):
        assert set(checkpoint.tensors) == set(expected)
        for name, weight in expected.items():
            info = checkpoint.tensors[name]
            assert (info.dtype, info.shape) == (NAMES[weight.dtype], tuple(weight.shape)), name
            assert read(checkpoint, name) == stored(weight), name
        checkpoint.verify()
        checkpoint.close()
    return first.warnings


def check_against_torch(path: Path, **options: Any) -> list[str]:
    return check(path, torch.load(path, map_location="cpu", **{"weights_only": True, **options}))


def error(kind: type[CheckpointError], ref: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.open(str(ref))
    assert type(caught.value) is kind, caught.value
    assert str(ref).partition("::")[0] in str(caught.value)
    return str(caught.value)


# --- what torch writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_bytes_and_shape_of_every_type(tmp_path, name):
    whole = make(TYPES[name], 6, 10)
    content = {"before": torch.ones(3), "w": whole, "t": whole.t(), "s": whole[1::2, ::3], "z": torch.zeros(2)}
    path = saved(tmp_path / "x.pt", content)
    assert check_against_torch(path) == []
    checkpoint = checkpoints.open(str(path))
    assert checkpoint.tensors["w"].dtype == name
    assert list(checkpoint.tensors) == list(content)
    checkpoint.close()


@pytest.mark.parametrize("name", OLD_TYPES)
def test_bytes_and_shape_of_every_type_in_the_legacy_format(tmp_path, name):
    whole = make(TYPES[name], 6, 10)
    content = {"before": torch.ones(3), "w": whole, "t": whole.t(), "s": whole[1::2, ::3], "z": torch.zeros(2)}
    assert check_against_torch(saved(tmp_path / "x.bin", content, **LEGACY)) == []


@pytest.mark.parametrize("name", NEW_TYPES)
def test_newer_types_in_the_legacy_format_are_read_or_refused(tmp_path, name):
    """torch writes such files and cannot read them."""
    content = {"w": make(TYPES[name], 6, 10), "v": torch.ones(3)}
    path = saved(tmp_path / "x.pt", content, **LEGACY)
    with pytest.raises(AttributeError):
        torch.load(path, weights_only=True)
    try:
        checkpoint = checkpoints.open(str(path))
    except CheckpointError as refused:
        assert str(path) in str(refused)  # noqa: PT017
        return
    checkpoint.close()
    check(path, content)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_type_that_is_not_known_is_no_damage(tmp_path, dtype):
    message = error(UnsupportedFormat, saved(tmp_path / "x.pt", {"w": torch.zeros(4, dtype=dtype)}))
    assert "damaged" not in message


def test_packed_fp4_is_read_as_from_safetensors_or_refused(tmp_path):
    packed = make(torch.uint8, 4, 8)
    path = saved(tmp_path / "x.pt", {"w": packed.view(torch.float4_e2m1fn_x2)})
    try:
        checkpoint = checkpoints.open(str(path))
    except CheckpointError as refused:
        assert type(refused) is UnsupportedFormat  # noqa: PT017
        return
    assert (checkpoint.tensors["w"].dtype, checkpoint.tensors["w"].shape) == ("F4", (4, 16))
    assert read(checkpoint, "w") == stored(packed)
    checkpoint.close()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantized_and_sparse_tensors_are_no_damage_and_not_silently_left_out(tmp_path):
    quantized = torch.quantize_per_tensor(T, 0.1, 0, torch.qint8)
    assert "damaged" not in error(UnsupportedFormat, saved(tmp_path / "q.pt", {"w": quantized, "v": T}))
    checkpoint = checkpoints.open(str(saved(tmp_path / "s.pt", {"w": T.to_sparse(), "v": T})))
    assert list(checkpoint.tensors) == ["v"]
    assert any("'w'" in warning for warning in checkpoint.warnings)
    checkpoint.close()


@BOTH
def test_scalars_and_empty_tensors(tmp_path, options):
    content = {"scalar": torch.tensor(3.5), "none": torch.zeros(0), "flat": torch.zeros(4, 0, 3), "w": torch.arange(3)}
    content |= {"empty slice": torch.arange(5)[5:], "of a scalar": torch.tensor([1.0, 2.0])[1], "last": torch.ones(1)}
    assert check_against_torch(saved(tmp_path / "x.pt", content, **options)) == []


@BOTH
def test_views_of_every_kind(tmp_path, options):
    base = torch.arange(120, dtype=torch.int16).reshape(4, 5, 6)
    content = {
        "whole": base, "transposed": base.transpose(0, 2), "permuted": base.permute(1, 2, 0), "row": base[2],
        "column": base[:, 3, 4], "steps": base[::2, 1::3, ::4], "offset": base.view(-1)[7:], "one": base[1, 2, 3],
        "expanded": base[0, 0].expand(3, 6), "expanded scalar": torch.tensor(7).expand(2, 3),
        "expanded between": base[:, :1, :].expand(4, 3, 6), "diagonal": base[0].diagonal(),
        "window": base[0, 0].unfold(0, 3, 1),
        "channels last": torch.arange(48.0).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
        "odd strides of ones": torch.as_strided(base, (1, 6, 1), (99, 1, 77)),
        "overlapping": torch.as_strided(base, (3, 4), (2, 1)),
        "flipped": base.flip(0),
    }  # fmt: skip
    assert check_against_torch(saved(tmp_path / "x.pt", content, **options)) == []


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A tensor, and up to four steps from it that share its storage."""
    shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=4))
    out = make(TYPES[draw(st.sampled_from(sorted(OLD_TYPES)))], *shape)
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["permute", "slice", "select", "expand", "unsqueeze", "narrow"]))
        axis = draw(st.integers(0, max(0, out.dim() - 1)))
        if kind == "unsqueeze":
            out = out.unsqueeze(axis)
        elif out.dim() == 0:
            continue
        elif kind == "permute":
            out = out.permute(draw(st.permutations(range(out.dim()))))
        elif kind == "slice":
            out = out[(slice(None),) * axis + (slice(draw(st.integers(0, 3)), None, draw(st.integers(1, 3))),)]
        elif kind == "select":
            out = out.select(axis, 0) if out.shape[axis] else out
        elif kind == "narrow":
            out = out.narrow(axis, 0, draw(st.integers(0, out.shape[axis])))
        elif out.shape[axis] == 1:
            out = out.expand(*out.shape[:axis], draw(st.integers(1, 4)), *out.shape[axis + 1 :])
    return out


@given(views(), st.booleans(), st.data())
@settings(max_examples=120)
def test_any_range_of_any_view(view, old, data):
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder) / "x.pt", {"first": torch.ones(3), "view": view}, **(LEGACY if old else {}))
        loaded, checkpoint = torch.load(path, weights_only=True)["view"], checkpoints.open(str(path))
        whole = stored(loaded)
        assert whole == stored(view)
        assert checkpoint.tensors["view"].shape == tuple(view.shape)
        for _ in range(3):
            start = data.draw(st.integers(0, len(whole)))
            count = data.draw(st.integers(0, len(whole) - start))
            assert read(checkpoint, "view", start, count) == whole[start : start + count]
        assert read(checkpoint, "view") == whole
        checkpoint.close()


@BOTH
def test_tensors_that_share_a_storage(tmp_path, options):
    embed = make(torch.bfloat16, 100, 8)
    content = {"embed": embed, "lm_head": embed, "half": embed[50:], "again": embed.clone(), "flat": embed.view(-1)}
    path = saved(tmp_path / "x.pt", content, **options)
    assert check_against_torch(path) == []
    checkpoint = checkpoints.open(str(path))
    place = {name: checkpoint.position(name)[1] for name in content}
    assert place["embed"] == place["lm_head"] == place["flat"] == place["half"] - 50 * 8 * 2
    assert place["again"] != place["embed"]
    checkpoint.close()


@BOTH
def test_parameters_and_the_state_of_a_module(tmp_path, options):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Conv1d(1, 2, 3))
    assert isinstance(module.state_dict(), OrderedDict)
    check_against_torch(saved(tmp_path / "state.pt", module.state_dict(), **options))
    check_against_torch(saved(tmp_path / "parameters.pt", dict(module.named_parameters()), **options))
    check_against_torch(saved(tmp_path / "kept.pt", module.state_dict(keep_vars=True), **options))
    marked = torch.nn.Parameter(T)
    marked.tensor_model_parallel = True  # as Megatron marks its own
    check_against_torch(saved(tmp_path / "marked.pt", {"w": marked, "v": T}, **options))


def test_plain_tensors_with_attributes_of_their_own(tmp_path):
    """As Megatron, vLLM or torch's own Buffer set them; torch reads them as tensors."""
    marked = T.clone()
    marked.partition_dim = 0
    check_against_torch(saved(tmp_path / "marked.pt", {"w": marked, "v": T}))
    check_against_torch(saved(tmp_path / "buffer.pt", {"w": torch.nn.Buffer(T), "v": T}))


@pytest.mark.parametrize("name", ["conjugate", "negative"])
def test_a_view_whose_values_are_not_those_stored(tmp_path, name):
    """Lazily conjugated or negated: read as torch reads it, or refused; but not as its opposite."""
    conjugate = torch.tensor([1 + 2j, 3 - 4j]).conj()
    view = conjugate if name == "conjugate" else conjugate.imag
    assert view.is_conj() or view.is_neg()
    path = saved(tmp_path / "x.pt", {"w": view})
    assert stored(torch.load(path, weights_only=True)["w"]) == stored(view)
    try:
        checkpoint = checkpoints.open(str(path))
    except CheckpointError as refused:
        assert type(refused) is UnsupportedFormat  # noqa: PT017
        return
    assert read(checkpoint, "w") == stored(view)
    checkpoint.close()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@BOTH
def test_every_protocol_of_pickle(tmp_path, protocol, options):
    path = saved(tmp_path / "x.pt", {"w": T, "t": T.t(), "é": torch.ones(2)}, pickle_protocol=protocol, **options)
    check_against_torch(path, weights_only=protocol == 2)  # it warns of others


def test_a_file_of_any_of_the_usual_suffixes(tmp_path):
    for suffix in ("bin", "pt", "pth", "ckpt"):
        assert check(saved(tmp_path / f"x.{suffix}", MODEL), MODEL) == []


def test_threads_share_one_checkpoint(tmp_path):
    content = {"plain": make(torch.uint8, 300, 1000), "turned": make(torch.uint8, 1000, 300).t()}
    checkpoint = checkpoints.open(str(saved(tmp_path / "x.pt", content)))
    wrong = []

    def work(name: str) -> None:
        whole = stored(content[name])
        for offset in range(0, 300_000, 4099):
            count = min(4099, 300_000 - offset)
            if read(checkpoint, name, offset, count) != whole[offset : offset + count]:
                wrong.append((name, offset))

    workers = [threading.Thread(target=work, args=(name,)) for name in [*content, *content]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    checkpoint.close()


def test_the_end_of_a_tensor_beyond_two_gigabytes(tmp_path):
    size = (1 << 31) + 4096
    pickled = h.whole(
        h.mapping({
            "big": tensor((size,), stored=h.storage("0", size, named("torch", "ByteStorage"))),
            "turned": tensor((2, size // 2), (1, 2), stored=h.storage("0", size, named("torch", "ByteStorage"))),
            "end": tensor(stored=h.storage("1", 4, named("torch", "ByteStorage"))),
        })
    )  # fmt: skip
    path = legacy(tmp_path / "x.pt", pickled, pickle.dumps(["0", "1"], 2), struct.pack("<q", size))
    start = path.stat().st_size
    os.truncate(path, start + size)  # sparse: it takes no room on the disk
    with path.open("r+b") as file:
        file.seek(start + size - 6)
        file.write(b"abcdef" + struct.pack("<q", 4) + b"WXYZ")
    checkpoint = checkpoints.open(str(path))
    assert read(checkpoint, "big", size - 8, 8) == b"\0\0abcdef"
    assert read(checkpoint, "end") == b"WXYZ"
    assert read(checkpoint, "turned", size - 3, 3) == b"bdf"
    assert read(checkpoint, "turned", size // 2 - 3, 3) == b"ace"
    checkpoint.close()


# --- models as they lie on disks ------------------------------------------------------------------------------------


def write_shards(folder: Path, state: Mapping[str, torch.Tensor], parts: int, **options: Any) -> dict[str, str]:
    names, weight_map = list(state), {}
    for number in range(parts):
        file = f"pytorch_model-{number + 1:05d}-of-{parts:05d}.bin"
        saved(folder / file, OrderedDict((name, state[name]) for name in names[number::parts]), **options)
        weight_map |= dict.fromkeys(names[number::parts], file)
    return weight_map


@pytest.mark.slow
@BOTH
def test_a_model_of_transformers_in_one_file_and_in_shards(tmp_path, options):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    state = model.state_dict()
    config.save_pretrained(tmp_path / "one")
    saved(tmp_path / "one" / "pytorch_model.bin", state, **options)
    weight_map = write_shards(tmp_path / "many", state, 3, **options)
    write_index(tmp_path / "many" / "pytorch_model.bin.index.json", weight_map)
    for ref in ("one", "one/pytorch_model.bin", "many", "many/pytorch_model.bin.index.json"):
        assert check(tmp_path / ref, state) == []
    checkpoint = checkpoints.open(str(tmp_path / "one"))
    assert checkpoint.config["model_type"] == "qwen2"
    assert checkpoint.facts()["format"] == "torch"
    checkpoint.close()
    model.save_pretrained(tmp_path / "safe")
    assert paramdiff.compare(tmp_path / "many", tmp_path / "safe").summary()["changed"] == 0


@pytest.mark.slow
def test_training_arguments_beside_a_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[])
    path = saved(tmp_path / "x.pt", {"model": MODEL, "args": arguments, "config": transformers.Qwen2Config()})
    assert check(path, MODEL) == []
    saved(tmp_path / "m" / "training_args.bin", arguments)
    assert "training_args.bin" in error(BrokenFile, tmp_path / "m" / "training_args.bin")


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(SAMPLES / "base" / "model.safetensors")


@pytest.fixture(scope="module")
def torch_base(base: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model as torch files in all their layouts, with its config beside it."""
    folder = tmp_path_factory.mktemp("base")
    for name, options in (("zip", {}), ("legacy", LEGACY), ("shards", {})):
        if name == "shards":
            write_index(folder / name / "pytorch_model.bin.index.json", write_shards(folder / name, base, 3))
        else:
            saved(folder / name / "pytorch_model.bin", base, **options)
        (folder / name / "config.json").write_bytes((SAMPLES / "base" / "config.json").read_bytes())
    turned = {name: weight.t().contiguous().t() if weight.dim() == 2 else weight for name, weight in base.items()}
    saved(folder / "nested.pt", {"model": turned, "epoch": 3})
    return folder


LAYOUTS = pytest.mark.parametrize("layout", ["zip", "legacy", "shards", "nested.pt"])


@LAYOUTS
def test_no_change_against_the_same_weights_as_safetensors(base, torch_base, layout):
    assert check(torch_base / layout, base) == []
    for sides in ((torch_base / layout, SAMPLES / "base"), (SAMPLES / "base", torch_base / layout)):
        summary = paramdiff.compare(*sides, threads=1).summary()
        assert (summary["changed"], summary["changed_bits"], summary["tensors"]) == (0, 0, len(base))


@LAYOUTS
def test_the_same_numbers_as_from_safetensors(torch_base, layout):
    expected = paramdiff.compare(SAMPLES / "base", SAMPLES / "rl-sgd", tolerances=[1e-5], threads=1)
    found = paramdiff.compare(torch_base / layout, SAMPLES / "rl-sgd", tolerances=[1e-5], threads=1)
    assert found.summary()["changed"] == 105071
    assert set(found.tables) == set(expected.tables)
    for name, table in expected.tables.items():
        assert found.tables[name].sort(table.columns).equals(table.sort(table.columns)), name


@BOTH
def test_worker_processes_find_what_threads_find(tmp_path, options):
    before, after = models()
    turned = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in after.items()}
    refs = saved(tmp_path / "base.pt", before, **options), saved(tmp_path / "tuned.pt", {"state_dict": turned}, **options)
    pair = align(*(checkpoints.open(str(ref)) for ref in refs))
    work = spans(pair, 1024, 8192)
    one = finish(pair, in_threads.run(pair, work, MEASURED, OPTIONS, threads=1, block=1024))
    assert one == finish(pair, in_threads.run(pair, work, MEASURED, OPTIONS, threads=3, block=1024))
    assert one == finish(pair, processes.run(pair, work, MEASURED, OPTIONS, workers=2, block=1024))
    plain = [save_safetensors(tmp_path / f"{side}.safetensors", t) for side, t in (("base", before), ("tuned", after))]
    same = align(*(checkpoints.open(str(ref)) for ref in plain))
    assert one == finish(same, in_threads.run(same, spans(same, 1024, 8192), MEASURED, OPTIONS, threads=1, block=1024))
    for checkpoint in (*pair.checkpoints, *same.checkpoints):
        checkpoint.close()


# --- what lies beside the weights in a file -------------------------------------------------------------------------


def trained() -> dict[str, Any]:
    """A model, an optimizer and schedulers after one step."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    stepped = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {"optimizer": optimizer.state_dict(), "multi-step": stepped.state_dict(), "cosine": cosine.state_dict()}


TRAINED = trained()
BESIDE: dict[str, Any] = {
    "optimizer": TRAINED["optimizer"],
    "cosine": TRAINED["cosine"],
    "multi-step": TRAINED["multi-step"],  # it holds a Counter
    "namespace": argparse.Namespace(lr=1e-3, out=pathlib.Path("out"), sizes=[1, 2]),
    "path": pathlib.Path("a/b"),
    "windows path": pathlib.PureWindowsPath("a"),
    "datetime": datetime.datetime(2025, 1, 2, tzinfo=datetime.UTC),
    "dates": [datetime.date(2025, 1, 2), datetime.timedelta(1), datetime.time(1)],
    "numpy scalars": [np.float32(1), np.float64(2), np.int64(3), np.bool_(True)],
    "numpy array": np.arange(6).reshape(2, 3),
    "empty numpy array": np.zeros(0),
    "numpy texts and objects": [np.array(["a", "b"]), np.array([1, None], dtype=object)],
    "numpy random state": np.random.RandomState(0).get_state(),
    "numpy generator": np.random.default_rng(0),
    "python random state": random.Random(0).getstate(),
    "torch random state": [torch.get_rng_state()],
    "generator": torch.Generator(),
    "torch values": [torch.float32, torch.bfloat16, torch.Size([2, 3]), torch.device("cpu"), torch.strided],
    "torch enum": torch.serialization.LoadEndianness.LITTLE,
    "bytes": [b"abc\xff", b""],
    "bytearray": bytearray(b"abc"),
    "plain values": [None, True, 1, 2**70, 1.5, float("nan"), "é", (1, 2), {1, 2}, frozenset([1]), 1 + 2j, {"a": {"b": []}}],
    "module": torch.nn.Linear(2, 2),
    "optimizer object": torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1),
}


@pytest.mark.parametrize("case", BESIDE)
@BOTH
def test_what_lies_beside_the_weights_does_not_keep_them_from_being_read(tmp_path, case, options):
    if case == "module" and options:
        pytest.skip("the legacy format writes the source of a module's class beside it")
    path = saved(tmp_path / "x.pt", {"model": MODEL, "beside": BESIDE[case], "step": 3}, **options)
    assert check(path, MODEL) == []


@pytest.mark.parametrize("nest", ["state_dict", "model", "module", "model_state_dict"])
@BOTH
def test_weights_in_a_nest(tmp_path, nest, options):
    content = {
        "epoch": 3, nest: OrderedDict(MODEL), "optimizer": TRAINED["optimizer"],
        "optimizer_state_dict": TRAINED["optimizer"],
        "scheduler": TRAINED["cosine"], "lr_scheduler": TRAINED["cosine"], "args": {"lr": 0.1}, "best": 0.5, "note": "x",
    }  # fmt: skip
    path = saved(tmp_path / "x.pt", content, **options)
    assert check(path, MODEL) == check(f"{path}::{nest}", MODEL) == []


def test_weights_at_the_top_with_other_values_beside_them(tmp_path):
    path = saved(tmp_path / "x.pt", {**MODEL, "_extra": None, "version": 3, "notes": {"a": 1}})
    (warning,) = check(path, MODEL)
    assert all(word in warning for word in (str(path), "'_extra'", "'version'", "not tensors"))


def test_weights_several_levels_down(tmp_path):
    path = saved(tmp_path / "x.pt", {"state": {"policy": {"state_dict": MODEL}}, "step": torch.tensor(3)})
    (warning,) = check(path, MODEL)
    assert "'state/policy/state_dict'" in warning
    assert check(f"{path}::state/policy/state_dict", MODEL) == [warning]


def test_two_nests_of_which_one_is_the_usual_one(tmp_path):
    path = saved(tmp_path / "x.pt", {"teacher": {"w": torch.ones(1)}, "state_dict": MODEL})
    (warning,) = check(path, MODEL)
    assert all(word in warning for word in (str(path), "'state_dict'", "'teacher'"))
    (warning,) = check(f"{path}::teacher", {"w": torch.ones(1)})
    assert all(word in warning for word in ("'teacher'", "'state_dict'"))


def test_nests_of_which_none_is_the_usual_one(tmp_path):
    path = saved(tmp_path / "x.pt", {"actor": MODEL, "critic": {"v": T}, "step": 1})
    message = error(BrokenFile, path)
    assert all(word in message for word in ("'actor'", "'critic'", f"{path}::actor", "2 places"))
    assert check(f"{path}::actor", MODEL)
    assert check(f"{path}::critic", {"v": T})


def test_two_usual_nests_at_different_places(tmp_path):
    path = saved(tmp_path / "x.pt", {"a": {"model": MODEL}, "b": {"model": {"w": T}}})
    message = error(BrokenFile, path)
    assert all(word in message for word in ("'a/model'", "'b/model'", f"{path}::"))
    assert check(f"{path}::b/model", {"w": T})


@pytest.mark.parametrize("key", ["weight", "Model", "model/w", "/model", "model/", "0", "é", "::", "model::w"])
def test_a_key_that_is_not_there(tmp_path, key):
    path = saved(tmp_path / "x.pt", {"model": MODEL, "step": 3})
    message = error(BrokenFile, f"{path}::{key}")
    assert all(word in message for word in (repr(key), "'model'"))


def test_a_key_of_a_file_that_holds_no_weights(tmp_path):
    message = error(BrokenFile, f"{saved(tmp_path / 'x.pt', {'step': 3})}::model")
    assert "none at all" in message


def test_a_key_given_on_purpose_reads_what_is_not_looked_at_by_itself(tmp_path):
    """The averaged weights (EMA) of a run are weights for whoever asks for them."""
    averaged = {"w": T + 1}
    path = saved(tmp_path / "x.pt", {"model": MODEL, "model_ema": averaged})
    check(path, MODEL)
    check(f"{path}::model_ema", averaged)


@pytest.mark.parametrize("name", ["semantic_encoder", "schema_model", "remap", "programs", "targs_net"])
def test_a_name_that_only_contains_a_word_for_something_else(tmp_path, name):
    """ "ema", "rng", "args" and so on are words, not letters in a row."""
    check(saved(tmp_path / "x.pt", {name: MODEL, "step": 3}), MODEL)


def test_tensors_below_the_weights_are_not_left_out_in_silence(tmp_path):
    path = saved(tmp_path / "x.pt", {"model": {**MODEL, "extra_state": {"scale": T}}})
    assert any("extra_state" in warning for warning in check(path, MODEL))


@BOTH
def test_a_single_tensor(tmp_path, options):
    for content in (T, torch.nn.Parameter(T), T.t(), torch.tensor(1.0)):
        assert check(saved(tmp_path / "x.pt", content, **options), {"tensor": content}) == []


@pytest.mark.parametrize(
    "content",
    [[T, T], (T,), 3, None, {}, "text", [], {"step": 3}, {"a": {"b": 1}}, {0: T, 1: T}, {("a", 1): T}, set(), [1, {"w": T}]],
    ids=["tensors", "a tuple", "a number", "nothing", "an empty one", "text", "an empty list", "numbers by name",
         "numbers two levels down", "tensors by number", "tensors by tuple", "a set", "a model in a list"],
)  # fmt: skip
@BOTH
def test_a_file_without_tensors_by_name(tmp_path, content, options):
    assert "no tensors by name" in error(BrokenFile, saved(tmp_path / "x.pt", content, **options))


def test_names_that_are_no_text_are_told(tmp_path):
    (warning,) = check(saved(tmp_path / "x.pt", {"w": T, 0: T, ("a", 1): T}), {"w": T})
    assert "0" in warning


def test_a_whole_module_is_no_damage(tmp_path):
    """Pickled modules cannot be read without their code, but a user should not download them again."""
    path = saved(tmp_path / "x.pt", torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.open(str(path))
    assert "damaged" not in str(caught.value)
    assert "Download" not in str(caught.value)


# --- directories ----------------------------------------------------------------------------------------------------

ONE, TWO, THREE = torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0)
FIRST, SECOND, INDEX = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"


def companions(folder: Path) -> None:
    """What trainers put beside a model."""
    saved(folder / "training_args.bin", argparse.Namespace(lr=1))
    for name in ("optimizer.pt", "optimizer.bin", "optimizer_0.bin", "rank0_optim.pt"):
        saved(folder / name, TRAINED["optimizer"])
    for name in ("scheduler.pt", "scheduler.bin", "scaler.pt"):
        saved(folder / name, TRAINED["cosine"])
    for name in ("rng_state.pth", "rng_state_0.pth", "random_states_0.pt"):
        saved(folder / name, {"cpu": torch.get_rng_state(), "python": random.Random(0).getstate()})


def sharded(folder: Path) -> Path:
    saved(folder / FIRST, {"a": ONE})
    saved(folder / SECOND, {"b": TWO})
    return folder


def test_safetensors_before_torch_files(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", {"a": ONE})
    saved(tmp_path / "pytorch_model.bin", {"a": TWO})
    companions(tmp_path)
    assert check(tmp_path, {"a": ONE}) == []
    assert check(tmp_path / "pytorch_model.bin", {"a": TWO}) == []


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "diffusion_pytorch_model.bin", "consolidated.00.pth", "x.ckpt"]
)
def test_what_trainers_put_beside_a_model_is_not_the_model(tmp_path, name):
    companions(tmp_path)
    saved(tmp_path / name, MODEL)
    assert check(tmp_path, MODEL) == []


def test_a_directory_of_companions_alone(tmp_path):
    companions(tmp_path)
    assert "directory without weights" in error(NotFound, tmp_path)


def test_the_module_of_a_deepspeed_directory(tmp_path):
    saved(tmp_path / "mp_rank_00_model_states.pt", {"module": MODEL, "optimizer": None, "ds_version": "0.19.8"})
    assert check(tmp_path, MODEL) == []


def test_several_files_without_an_index(tmp_path):
    for name in ("actor.pt", "critic.pt", "reward.pt"):
        saved(tmp_path / name, MODEL)
    message = error(BrokenFile, tmp_path)
    assert "actor.pt, critic.pt, reward.pt" in message
    assert check(tmp_path / "critic.pt", MODEL) == []


def test_shards_with_and_without_an_index(tmp_path):
    sharded(tmp_path)
    companions(tmp_path)
    assert check(tmp_path, {"a": ONE, "b": TWO}) == []
    write_index(tmp_path / INDEX, {"a": FIRST, "b": SECOND})
    assert check(tmp_path, {"a": ONE, "b": TWO}) == []
    assert check(tmp_path / INDEX, {"a": ONE, "b": TWO}) == []


def test_a_missing_shard(tmp_path):
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()
    assert SECOND in error(BrokenFile, tmp_path)
    write_index(tmp_path / INDEX, {"a": FIRST, "b": SECOND})
    for ref in (tmp_path, tmp_path / INDEX):
        with pytest.raises(BrokenFile, match=r"Shard 2 of 2 is missing: .*pytorch_model-00002-of-00002\.bin"):
            checkpoints.open(str(ref))


def test_stale_tensors_are_left_to_the_index(tmp_path):
    saved(tmp_path / FIRST, {"a": ONE, "b": THREE, "old": THREE})
    saved(tmp_path / SECOND, {"b": TWO})
    saved(tmp_path / "pytorch_model-00003-of-00003.bin", {"a": THREE})
    write_index(tmp_path / INDEX, {"a": FIRST, "b": SECOND})
    warnings = check(tmp_path, {"a": ONE, "b": TWO})
    assert any(FIRST in warning and "'b' and 1 more ignored" in warning for warning in warnings)
    assert any("pytorch_model-00003-of-00003.bin ignored" in warning for warning in warnings)


def test_an_index_that_names_a_tensor_that_is_not_there(tmp_path):
    write_index(sharded(tmp_path) / INDEX, {"a": FIRST, "b": SECOND, "c": SECOND})
    message = error(BrokenFile, tmp_path)
    assert "'c'" in message
    assert str(tmp_path / SECOND) in message


def test_a_tensor_in_two_shards(tmp_path):
    saved(tmp_path / FIRST, {"a": ONE, "b": ONE})
    saved(tmp_path / SECOND, {"b": TWO})
    message = error(BrokenFile, tmp_path)
    assert all(word in message for word in ("'b'", str(tmp_path / FIRST), str(tmp_path / SECOND)))


def test_an_adapter_is_refused(tmp_path):
    path = saved(tmp_path / "adapter_model.bin", {"base_model.model.q.lora_A.weight": T})
    for ref in (tmp_path, path):
        assert "PEFT adapter" in error(UnsupportedFormat, ref)
    saved(tmp_path / "pytorch_model.bin", MODEL)
    assert any("adapter_model.bin ignored" in warning for warning in check(tmp_path, MODEL))


def test_a_key_of_a_directory(tmp_path):
    saved(tmp_path / "pytorch_model.bin", {"actor": MODEL, "critic": {"v": T}})
    assert "::" in error(BrokenFile, tmp_path)
    assert len(check(f"{tmp_path}::actor", MODEL)) == 1
    save_safetensors(tmp_path / "model.safetensors", {"a": ONE})
    assert "no entry 'actor'" in error(UnsupportedFormat, f"{tmp_path}::actor")


# --- files that change ----------------------------------------------------------------------------------------------

CHANGING = """
import os, sys
from paramdiff import checkpoints
path, other, how, name = sys.argv[1:]
checkpoint = checkpoints.open(path)
checkpoint.verify()
buffer = bytearray(checkpoint.tensors[name].nbytes)
if how == "cut":
    os.truncate(path, 50_000)
elif how == "cut to nothing":
    os.truncate(path, 0)
elif how == "replaced by a shorter one":
    os.replace(other, path)
else:
    os.unlink(path)
for step in (lambda: checkpoint.read_into(name, 0, memoryview(buffer)), checkpoint.verify):
    try:
        step()
        print("done")
    except Exception as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize("name", ["plain", "turned"])
@pytest.mark.parametrize("how", ["cut", "cut to nothing", "replaced by a shorter one", "removed"])
def test_a_file_that_changes_after_it_was_opened(tmp_path, how, name):
    """Read in another process, since a mapped file that became shorter ends the one that reads it."""
    whole = make(torch.float32, 500, 1000)
    path = saved(tmp_path / "x.pt", {"plain": whole, "turned": whole.t()})
    other = saved(tmp_path / "other.pt", {"plain": ONE})
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHANGING, str(path), str(other), how, name],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    reading, verifying = done.stdout.split()
    assert reading == "ChangedWhileReading" if "cut" in how else reading in ("done", "ChangedWhileReading", "BrokenFile")
    assert verifying == "ChangedWhileReading"


# --- archives that are not what they claim --------------------------------------------------------------------------


def zeros(count: int) -> bytes:
    """`count` million zeros, deflated, without taking the time to deflate them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = packer.compress(bytes(1_000_000)) + packer.flush(zlib.Z_FULL_FLUSH)
    return part * count + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def lying(which: int, **lies: Any) -> list[Member]:
    """A good archive of which one member lies."""
    out = members(weights())
    for name, lie in lies.items():
        setattr(out[which], name, lie)
    return out


PICKLE, ORDER, STORAGE = 0, 1, 2
SECOND_STORAGE = Member("archive/data/0", bytes(16))
SECOND_PICKLE = Member("archive/data.pkl", h.whole(h.mapping({"w": tensor((2,))})))
EIGHT = weights(x=tensor((8,), stored=h.storage(numel=8)))
LIARS = {
    "beyond the file": lying(STORAGE, offset=10**6), "at its end": lying(STORAGE, offset=10**3),
    "far beyond the file": lying(STORAGE, offset=2**63 + 5), "as far as can be": lying(STORAGE, offset=2**64 - 1),
    "almost as far": lying(STORAGE, offset=2**63 - 40), "pickle far beyond": lying(PICKLE, offset=2**64 - 1),
    "byte order far beyond": lying(ORDER, offset=2**63 - 1), "no local header": lying(STORAGE, signature=b"PK\1\2"),
    "pickle without local header": lying(PICKLE, signature=b"PK\1\2"), "in the middle": lying(STORAGE, offset=7),
    "too large": lying(STORAGE, size=10**6, packed=10**6), "far too large": lying(STORAGE, size=2**63, packed=2**63),
    "as large as can be": lying(STORAGE, size=2**64 - 1, packed=2**64 - 1), "too small": lying(STORAGE, size=8, packed=8),
    "pickle too large": lying(PICKLE, size=10**6, packed=10**6),
    "pickle far too large": lying(PICKLE, size=2**62, packed=2**62),
    "pickle too small": lying(PICKLE, size=8, packed=8),
    "of another size than it has bytes": members(EIGHT, size=32, packed=16),
    "compressed": lying(STORAGE, method=8), "compressed in a way that is unknown": lying(STORAGE, method=99),
    "under a password": lying(STORAGE, flags=1), "pickle under a password": lying(PICKLE, flags=1),
    "byte order under a password": lying(ORDER, flags=1), "pickle patched": lying(PICKLE, flags=0x20),
    **{f"pickle compressed by {method}": lying(PICKLE, method=method) for method in (8, 9, 12, 14, 93, 95, 99, 0xFFFF)},
    **{f"byte order compressed by {method}": lying(ORDER, method=method) for method in (8, 12, 14, 99)},
    "pickle with another checksum": lying(PICKLE, crc=5), "big-endian": lying(ORDER, data=b"big"),
    "of an unknown byte order": lying(ORDER, data=b"middle"),
    "byte order too long": lying(ORDER, data=b"little" * 1_000_000),
    "storage missing": members(weights())[:2], "storage too short": members(weights(), FOUR[:15]),
    "storage empty": members(weights(), b""), "storage elsewhere": lying(STORAGE, name="other/data/0"),
    "storage of another name": lying(STORAGE, name="archive/data/00"), "no pickle": members(weights())[1:],
    "pickle of another name": lying(PICKLE, name="archive/data.pkl2"),
    "two pickles": [*members(weights()), Member("b/data.pkl", b"N.")],
    "byte order a million zeros a thousand times": [
        *members(weights())[::2], Member("archive/byteorder", zeros(1_000), 8, size=10**9),
    ],
    "pickle a million zeros 300 times": [
        Member("archive/data.pkl", zeros(300), 8, size=3 * 10**8), *members(weights())[1:],
    ],
    "nothing": [], "something else": [Member("word/document.xml", b"<xml/>"), Member("[Content_Types].xml", b"<x/>")],
    "TorchScript": [*members(weights()), Member("archive/constants.pkl", b"N.")],
}  # fmt: skip
SHAPES = {
    "negative shape": tensor((-4,)), "negative stride": tensor((2,), (-1,), 3), "negative offset": tensor((2,), (1,), -1),
    "huge shape": tensor((2**62,)), "shape over 63 bits": tensor((2**63,)), "huge stride": tensor((2,), (2**62,)),
    "stride over 64 bits": tensor((2,), (2**70,)), "huge offset": tensor((1,), (1,), 2**62),
    "offset over 63 bits": tensor((1,), (1,), 2**63),
    "shape that wraps to 4": tensor((2**62 + 1, 4), (4, 1)), "shape that wraps to 0": tensor((2**32, 2**32), (2**32, 1)),
    "stride that wraps to 0": tensor((2, 2), (2**62, 1)), "sum that wraps": tensor((3,), (2**62,), 2**62),
    "one too many": tensor((5,)),
    "one too far": tensor((4,), (1,), 1), "one step too far": tensor((2, 2), (3, 1)),
    "last one only": tensor((1, 2), (9, 4)),
    "more strides than sizes": tensor((4,), (1, 1)), "fewer strides than sizes": tensor((2, 2), (1,)),
    "text": tensor("4", "1"),
    "nothing": tensor(None, None), "numbers": tensor(4, 1), "floats": tensor((4.0,), (1.0,)),
    "bools": tensor((True,), (True,)),
    "a nested shape": tensor(((4,),), ((1,),)), "float offset": tensor((4,), (1,), 0.0),
    "text for an offset": tensor((4,), (1,), "0"),
    "no storage": tensor(stored=value("0")), "a tensor for a storage": tensor(stored=tensor()),
    "another key": tensor(stored=h.storage("1")),
    "a path for a key": tensor(stored=h.storage("../data/0")), "an empty key": tensor(stored=h.storage("")),
    "a key of a million letters": tensor(stored=h.storage("k" * 1_000_000)),
    "wider than stored": tensor(stored=h.storage(kind=named("torch", "DoubleStorage"))),
    "a type that is none": tensor(rebuild="_rebuild_tensor_v3"),
    "no arguments": call(named("torch._utils", "_rebuild_tensor_v2")),
    "a storage alone": call(named("torch._utils", "_rebuild_tensor_v2"), h.storage()),
}  # fmt: skip
HARMLESS = {
    "70 dimensions": tensor((1,) * 70, (0,) * 70), "100 expanded dimensions": tensor((2,) * 100, (0,) * 100),
    "64 dimensions": tensor((1,) * 63 + (4,), (0,) * 63 + (1,)),
    "64 expanded dimensions": tensor((1,) * 63 + (4,), (0,) * 64),
    "100,000 dimensions": tensor((1,) * 100_000, (0,) * 100_000),
    "20,000 expanded dimensions": tensor((2,) * 20_000, (0,) * 20_000),
    "100,000 empty dimensions": tensor((0,) * 100_000, (0,) * 100_000), "a huge expansion": tensor((2**40,), (0,)),
    "20,000 huge dimensions": tensor((2**62,) * 20_000, (0,) * 20_000),
    "20,000 huge ones and none": tensor((2**62,) * 20_000 + (0,), (0,) * 20_001),
    "an expansion over 64 bits": tensor((2**40, 2**40), (0, 0)), "an expansion to 2^63 bytes": tensor((2**61, 1), (0, 0)),
    "a type of no size": tensor(stored=h.storage(kind=named("torch", "UntypedStorage"))),
}  # fmt: skip
READABLE = {  # as torch reads them
    "a huge stride of one": (tensor((1, 2), (2**62, 0)), FOUR[:4] * 2),
    "a huge shape of none": (tensor((0, 2**62), (0, 0)), b""),
    "one element with a stride": (tensor((1,), (2**62,), 3), FOUR[12:]),
    "lists": (tensor([2, 2], [1, 2]), FOUR[:4] + FOUR[8:12] + FOUR[4:8] + FOUR[12:]),
    "a storage that says it is shorter": (tensor(stored=h.storage(numel=2)), FOUR),
    "another order": (tensor((2,), (3,)), FOUR[:4] + FOUR[12:]),
    "an expansion": (tensor((3,), (0,), 1), FOUR[4:8] * 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Verdict]:
    folder, paths = tmp_path_factory.mktemp("archives"), {}
    for name, content in LIARS.items():
        paths["liar", name] = h.raw_zip(folder / f"{len(paths)}.pt", content)
    for group, cases in (("shape", SHAPES), ("harmless", HARMLESS), ("readable", {k: v[0] for k, v in READABLE.items()})):
        for name, pushed in cases.items():
            paths[group, name] = h.zipped(folder / f"{len(paths)}.pt", weights(x=pushed))
            paths[f"legacy {group}", name] = legacy(folder / f"{len(paths)}.pt", weights(x=pushed))
    return dict(zip(paths, judge(paths.values()), strict=True))


def assert_refused(verdict: Verdict) -> None:
    assert verdict.harmless, (verdict.outcome, verdict.message, verdict.grown, verdict.events)
    assert verdict.refused, verdict.outcome


@pytest.mark.parametrize("case", LIARS)
def test_an_archive_that_lies_is_refused(archives, case):
    assert_refused(archives["liar", case])


@pytest.mark.parametrize("case", SHAPES)
def test_a_tensor_that_cannot_be_is_refused(archives, case):
    assert_refused(archives["shape", case])
    assert_refused(archives["legacy shape", case])


@pytest.mark.parametrize("case", HARMLESS)
def test_a_tensor_that_hardly_can_be_is_refused_or_read(archives, case):
    for verdict in (archives["harmless", case], archives["legacy harmless", case]):
        assert verdict.harmless, (verdict.outcome, verdict.message, verdict.grown)


@pytest.mark.parametrize("case", READABLE)
def test_an_odd_tensor_is_read_as_torch_reads_it(tmp_path, archives, case):
    pushed, expected = READABLE[case]
    assert stored(torch.load(h.zipped(tmp_path / "x.pt", weights(x=pushed)), weights_only=True)["x"]) == expected
    for verdict in (archives["readable", case], archives["legacy readable", case]):
        assert (verdict.outcome, verdict.tensors.get("x")) == ("read", hashlib.sha256(expected).hexdigest()), verdict.message


TWICE = {"storage": [*members(weights()), SECOND_STORAGE], "pickle": [*members(weights()), SECOND_PICKLE]}


@pytest.mark.parametrize("case", TWICE)
def test_a_member_that_is_there_twice(tmp_path, case):
    """torch reads the first; whoever reads the other one compares what nobody runs."""
    path = h.raw_zip(tmp_path / "x.pt", TWICE[case])
    expected = torch.load(path, weights_only=True)
    assert stored(expected["w"]) == FOUR
    try:
        checkpoint = checkpoints.open(str(path))
    except CheckpointError as refused:
        assert str(path) in str(refused)  # noqa: PT017
        return
    assert read(checkpoint, "w") == FOUR
    checkpoint.close()


@pytest.mark.parametrize("lie", [{"local_name": "archive/data/00"}, {"crc": 5}, {"local_name": "x" * 1_000}])
def test_a_lie_that_torch_believes_too_changes_nothing(tmp_path, lie):
    path = h.raw_zip(tmp_path / "x.pt", lying(STORAGE, **lie))
    assert check_against_torch(path) == []


def test_a_big_endian_file_is_named_so(tmp_path):
    assert "big-endian" in error(UnsupportedFormat, h.zipped(tmp_path / "x.pt", weights(), byteorder=b"big"))
    assert check(h.zipped(tmp_path / "x.pt", weights(), byteorder=None), {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}) == []
    path = legacy(tmp_path / "y.pt", weights())
    good = path.read_bytes()
    path.write_bytes(good.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    assert path.read_bytes() != good
    assert "big-endian" in error(UnsupportedFormat, path)


def test_a_compressed_archive_is_named_so(tmp_path):
    path = h.zipped(tmp_path / "x.pt", weights(), compress=["data/0"])
    assert "compressed" in error(UnsupportedFormat, path)


def test_an_archive_of_anything_else(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    assert "data.pkl" in error(BrokenFile, path)
    np.savez(tmp_path / "y.npz", a=np.ones(2))
    (tmp_path / "y.npz").rename(tmp_path / "y.bin")
    assert "data.pkl" in error(BrokenFile, tmp_path / "y.bin")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive(tmp_path):
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    module = torch.nn.Sequential(torch.nn.Linear(3, 4).bfloat16(), inner, inner[0])
    torch.jit.script(module).save(str(tmp_path / "x.pt"))
    assert check(tmp_path / "x.pt", module.state_dict()) == []


def test_modules_of_a_script_that_hold_one_another(tmp_path):
    module = call(named("__torch__", "M"))
    itself = h.built(module + h.put(7), h.mapping({"w": tensor(), "m": h.get(7)}))
    h.raw_zip(tmp_path / "x.pt", [*members(h.whole(itself)), Member("archive/constants.pkl", b"N.")])
    assert "without end" in error(BrokenFile, tmp_path / "x.pt")


NO_TORCH_FILES = {
    "nothing": b"", "one byte": b"P", "two bytes": b"PK", "an end of an archive": b"PK\5\6" + bytes(18), "text": b"hello",
    "a plain pickle": pickle.dumps({"w": 1}, 2), "a plain pickle of protocol 5": pickle.dumps({"w": 1}, 5),
    "a magic number alone": pickle.dumps(h.MAGIC, 2), "another magic number": pickle.dumps(h.MAGIC + 1, 2) * 4,
    "zeros": bytes(1_000), "a tar": b"sys_info" + bytes(1_000), "safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}  # fmt: skip


@pytest.mark.parametrize("case", NO_TORCH_FILES)
def test_what_is_no_torch_file(tmp_path, case):
    path = tmp_path / "x.bin"
    path.write_bytes(NO_TORCH_FILES[case])
    error(BrokenFile, path)


def keys_of(*keys: Any) -> bytes:
    return pickle.dumps(list(keys), 2)


def floats(*numels: int) -> bytes:
    return b"".join(struct.pack("<q", numel) + FOUR for numel in numels)


DOUBLE = h.storage("0", 4, named("torch", "DoubleStorage"))
UNTYPED = h.storage("1", 4, named("torch", "UntypedStorage"))
OLD_LIARS = {
    "keys that are no list": (weights(), pickle.dumps(5, 2), None), "no keys": (weights(), keys_of(), None),
    "keys of nothing": (weights(), pickle.dumps(None, 2), None), "another key": (weights(), keys_of("zz"), None),
    "a key that is a mapping": (weights(), keys_of({}), None), "a key that is a list": (weights(), keys_of(["0"]), None),
    "a key that is a number": (weights(), keys_of(0), None), "a key without data": (weights(), keys_of("0"), b""),
    "half a size": (weights(), keys_of("0"), b"\4\0\0"), "a size below 0": (weights(), keys_of("0"), floats(-4)),
    "a huge size": (weights(), keys_of("0"), floats(2**62)),
    "a size that wraps": (weights(), keys_of("0"), floats(-(2**63))),
    "one too few": (weights(), keys_of("0"), floats(3)), "one too many": (weights(), keys_of("0"), floats(5)),
    "a key twice": (weights(), keys_of("0", "0"), floats(4)), "a key too many": (weights(), keys_of("0", "1"), floats(4, 4)),
    "text for keys": (weights(), pickle.dumps("01", 2), None),
    "an opaque list of keys": (weights(), h.whole(call(named("torch", "X"))), None),
    "keys that are refused": (weights(), h.whole(named("os", "system")), None),
    "content that is refused": (weights(x=named("os", "system")), None, None),
    "a storage of two types": (weights(x=tensor(stored=DOUBLE)), keys_of("0"), floats(4)),
    "a storage of no type": (weights(x=tensor(stored=UNTYPED)), keys_of("0", "1"), floats(4, 16)),
    "a storage with a list for a key": (weights(x=tensor(stored=h.storage(["0"]))), keys_of(["0"]), floats(4)),
    "keys in a tangle": (weights(), h.whole(h.doubled(40) + h.TUPLE1), None),
}  # fmt: skip


@pytest.fixture(scope="module")
def old_archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    folder = tmp_path_factory.mktemp("old")
    paths = [legacy(folder / f"{number}.pt", *case) for number, case in enumerate(OLD_LIARS.values())]
    return dict(zip(OLD_LIARS, judge(paths), strict=True))


@pytest.mark.parametrize("case", OLD_LIARS)
def test_a_legacy_file_that_lies_is_refused_or_read(old_archives, case):
    verdict = old_archives[case]
    assert verdict.harmless, (verdict.outcome, verdict.message, verdict.grown)


def test_a_legacy_file_that_lies_about_its_sizes_is_refused(old_archives):
    for case in ("half a size", "a size below 0", "a huge size", "one too few", "one too many", "no keys"):
        assert_refused(old_archives[case])


def test_a_name_that_no_table_can_hold_is_refused_before_it_gets_there(tmp_path):
    """Half a surrogate pair: Python's texts may hold one, UTF-8 may not, and tables and terminals want UTF-8."""
    name = b"X" + struct.pack("<I", 3) + "\ud800".encode(errors="surrogatepass")
    pickled = h.whole(h.EMPTY_DICT + name + tensor() + h.SETITEM)
    sides = [h.zipped(tmp_path / f"{side}.pt", pickled) for side in "ab"]
    with contextlib.suppress(ParamdiffError):
        assert paramdiff.compare(*sides).summary()["changed"] == 0


# --- tensors that are parts of one ----------------------------------------------------------------------------------


def distributed(kind: str) -> bytes:
    """A DTensor as torch 2.6 and later pickle it: a wrapper, and the local part in its state."""
    module = "torch.distributed.tensor"
    state = h.mapping({"_local_tensor": tensor((2, 2), (2, 1)), "_spec": call(named(module, "DTensorSpec"))})
    wrapper = many(named(module, kind), named("torch", "float32"), value((4, 2)), value((2, 1)), value(0))
    function = named("torch._utils", "_rebuild_wrapper_subclass")
    typed = named("torch._tensor", "_rebuild_from_type_v2")
    return call(typed, function, named(module, kind), wrapper, many(h.NONE, state))


def test_a_distributed_tensor_is_refused_by_its_name(tmp_path):
    """Alone, and beside tensors that are whole: nothing of a model is to be left out because it is sharded."""
    for pickled in (h.whole(h.mapping({"w": distributed("DTensor")})), weights(x=distributed("DTensor"))):
        assert "DTensor" in error(UnsupportedFormat, h.zipped(tmp_path / "x.pt", pickled))
    nested = h.whole(h.mapping({"model": h.mapping({"w": distributed("DTensor"), "v": tensor()})}))
    assert "DTensor" in error(UnsupportedFormat, h.zipped(tmp_path / "x.pt", nested))


ONE_RANK = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.save({"w": distribute_tensor(torch.arange(8.0).reshape(4, 2), mesh, [Shard(0)]), "v": torch.ones(2)}, sys.argv[2])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_distributed_tensor_of_torch_is_refused_by_its_name(tmp_path):
    path = tmp_path / "model_world_size_1_rank_0.pt"
    subprocess.run([sys.executable, "-c", ONE_RANK, str(tmp_path / "store"), str(path)], check=True, timeout=60)
    assert "DTensor" in error(UnsupportedFormat, path)


# --- anything at all ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("small")
    content = {"model": OrderedDict(w=T, t=T.t()), "step": 3}
    return {kind: saved(folder / f"{kind}.pt", content, **o).read_bytes() for kind, o in (("zip", {}), ("legacy", LEGACY))}


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_cut_at_every_byte(tmp_path, small, kind):
    """A download that stopped, wherever it stopped."""
    path = tmp_path / "x.pt"
    whole = (h.zipped if kind == "zip" else legacy)(path, weights(t=tensor((2, 2), (1, 2)))).read_bytes()
    cuts = [whole[:length] for length in range(len(whole))]
    for cut in cuts + [small[kind][:length] for length in range(0, len(small[kind]), 13)]:
        path.write_bytes(cut)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.open(str(path))
        assert str(path) in str(caught.value)
        assert type(caught.value) is BrokenFile or kind == "legacy"  # half a name may be one that is refused


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_mutated_bytes_are_refused_or_read(tmp_path, small, kind):
    rng = random.Random(22)
    paths = []
    for number in range(150):
        content = bytearray(small[kind])
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.choice([rng.randrange(256), 0, 255])
        paths.append(tmp_path / f"{number}.pt")
        paths[-1].write_bytes(content)
    verdicts = judge(paths)
    assert {p.name: (v.outcome, v.message) for p, v in zip(paths, verdicts, strict=True) if not v.harmless} == {}
    assert 0 < sum(verdict.outcome == "read" for verdict in verdicts) < len(paths)


@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\3\4", b"PK\5\6", b"\x80\x02"]))
@settings(max_examples=150)
def test_random_bytes_are_refused(content, begin):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        path.write_bytes(begin + content.replace(b"\x96", b""))
        with pytest.raises(CheckpointError) as caught:
            checkpoints.open(str(path))
        assert str(path) in str(caught.value)


def test_no_file_stays_open_after_an_error(tmp_path):
    bad = [
        h.zipped(tmp_path / "a.pt", weights(), {}), legacy(tmp_path / "b.pt", weights(), data=b""),
        h.zipped(tmp_path / "c.pt", weights(x=named("os", "system"))), h.raw_zip(tmp_path / "d.pt", lying(PICKLE, crc=5)),
        h.zipped(tmp_path / "e.pt", b"N."), h.zipped(tmp_path / "f.pt", weights(), byteorder=b"big"),
    ]  # fmt: skip
    before = len(os.listdir("/proc/self/fd"))
    for path in bad * 3:
        with pytest.raises(CheckpointError):
            checkpoints.open(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_file_stays_open_after_reading(tmp_path):
    path = saved(tmp_path / "x.pt", {"plain": T, "turned": T.t()})
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        check(path, {"plain": T, "turned": T.t()})
    assert len(os.listdir("/proc/self/fd")) == before
