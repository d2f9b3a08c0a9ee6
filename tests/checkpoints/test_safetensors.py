"""The safetensors reader against the reference implementation, and against files that lie."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdiff import checkpoints
from paramdiff.checkpoints import files
from paramdiff.errors import BrokenFile, ChangedWhileReading, ParamdiffError
from tests.helpers import entry, header_bytes, save, write_raw

GENERATOR = torch.Generator().manual_seed(0)


def random_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=GENERATOR)


# name in the header → (torch's type, shape for torch, logical shape in the header)
TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def make(dtype: torch.dtype, rows: int, cols: int) -> torch.Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    raw = random_bytes(rows * cols * size)
    return ((raw & 1).view(torch.bool) if dtype == torch.bool else raw.view(dtype)).reshape(rows, cols)


def stored(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if tensor.numel() else b""


def read(checkpoint: checkpoints.Checkpoint, name: str, offset: int = 0, count: int | None = None) -> bytes:
    buffer = bytearray(checkpoint.tensors[name].nbytes - offset if count is None else count)
    checkpoint.read_into(name, offset, memoryview(buffer))
    return bytes(buffer)


def open_error(path: Path | str) -> str:
    with pytest.raises(BrokenFile) as caught:
        checkpoints.open(str(path))
    return str(caught.value)


@pytest.mark.parametrize("name", TYPES)
def test_bytes_and_shape_of_every_type(tmp_path, name):
    tensor = make(TYPES[name], 6, 10)
    path = save(tmp_path / "x.safetensors", {"before": torch.ones(3), "w": tensor, "z": torch.zeros(2)})
    checkpoint = checkpoints.open(str(path))
    info = checkpoint.tensors["w"]
    assert info.dtype == name
    assert info.shape == ((6, 20) if name == "F4" else (6, 10))
    assert read(checkpoint, "w") == stored(tensor)
    assert read(checkpoint, "before") == stored(torch.ones(3))
    assert set(checkpoint.tensors) == {"before", "w", "z"}
    checkpoint.close()


def test_six_bit_types_have_their_packed_size(tmp_path):
    data = bytes(range(9))
    path = write_raw(
        tmp_path / "x.safetensors", {"a": entry("F6_E2M3", [4], 0, 3), "b": entry("F6_E3M2", [2, 4], 3, 9)}, data
    )
    checkpoint = checkpoints.open(str(path))
    assert read(checkpoint, "a") == data[:3]
    assert read(checkpoint, "b") == data[3:]
    checkpoint.close()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_range_of_any_tensor(data):
    """Ranges are those of the library's own tensors, wherever they start and end."""
    kinds = data.draw(st.lists(st.sampled_from(sorted(TYPES)), min_size=1, max_size=4))
    tensors = {
        f"t{i}": make(TYPES[kind], data.draw(st.integers(1, 9)), data.draw(st.integers(1, 33)))
        for i, kind in enumerate(kinds)
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoints.open(str(save(Path(folder) / "x.safetensors", tensors)))
        for name, tensor in tensors.items():
            whole = stored(tensor)
            start = data.draw(st.integers(0, len(whole)))
            count = data.draw(st.integers(0, len(whole) - start))
            assert read(checkpoint, name, start, count) == whole[start : start + count]
        checkpoint.close()


def test_a_read_longer_than_the_kernel_moves_at_once(tmp_path, monkeypatch):
    tensor = random_bytes(1000)
    checkpoint = checkpoints.open(str(save(tmp_path / "x.safetensors", {"w": tensor})))
    monkeypatch.setattr(files, "MAX_READ", 7)
    assert read(checkpoint, "w", 3, 990) == stored(tensor)[3:993]
    checkpoint.close()


def test_scalars_and_empty_tensors(tmp_path):
    tensors = {"scalar": torch.tensor(3.5), "none": torch.zeros(0), "flat": torch.zeros(4, 0, 3), "w": torch.arange(3)}
    checkpoint = checkpoints.open(str(save(tmp_path / "x.safetensors", tensors)))
    assert {n: i.shape for n, i in checkpoint.tensors.items()} == {"scalar": (), "none": (0,), "flat": (4, 0, 3), "w": (3,)}
    assert read(checkpoint, "scalar") == struct.pack("<f", 3.5)
    assert read(checkpoint, "none") == read(checkpoint, "flat") == b""
    assert read(checkpoint, "w") == stored(torch.arange(3))
    assert checkpoint.tensors["scalar"].numel == 1
    checkpoint.close()


def test_file_without_tensors(tmp_path):
    checkpoint = checkpoints.open(str(write_raw(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}})))
    assert dict(checkpoint.tensors) == {}
    checkpoint.close()


def test_header_order_need_not_be_data_order(tmp_path):
    header = {"late": entry("U8", [2], 3, 5), "early": entry("U8", [3], 0, 3), "nil": entry("U8", [0], 3, 3)}
    checkpoint = checkpoints.open(str(write_raw(tmp_path / "x.safetensors", header, b"abcde")))
    assert read(checkpoint, "late") == b"de"
    assert read(checkpoint, "early") == b"abc"
    assert checkpoint.position("early") < checkpoint.position("late")
    checkpoint.close()


def test_end_of_a_tensor_beyond_two_gigabytes(tmp_path):
    size = (1 << 31) + 4096
    path = write_raw(
        tmp_path / "x.safetensors", {"big": entry("U8", [size], 0, size), "end": entry("U8", [4], size, size + 4)}
    )
    start = path.stat().st_size
    os.truncate(path, start + size + 4)  # sparse: it takes no room on the disk
    with path.open("r+b") as file:
        file.seek(start + size - 6)
        file.write(b"abcdefWXYZ")
    checkpoint = checkpoints.open(str(path))
    assert read(checkpoint, "big", size - 8, 8) == b"\0\0abcdef"
    assert read(checkpoint, "end") == b"WXYZ"
    assert read(checkpoint, "big", 1 << 31, 16) == bytes(16)
    checkpoint.close()


def test_threads_share_one_checkpoint(tmp_path):
    tensors = {"a": random_bytes(300_000), "b": random_bytes(300_000)}
    checkpoint = checkpoints.open(str(save(tmp_path / "x.safetensors", tensors)))
    wrong = []

    def work(name: str) -> None:
        whole = stored(tensors[name])
        for offset in range(0, 300_000, 1009):
            count = min(1009, 300_000 - offset)
            if read(checkpoint, name, offset, count) != whole[offset : offset + count]:
                wrong.append((name, offset))

    workers = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    checkpoint.close()


# --- files that are not what they claim -----------------------------------------------------------------------------


def test_directory_in_place_of_a_shard(tmp_path):
    (tmp_path / "d.safetensors").mkdir()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "d.safetensors"}}))
    assert "d.safetensors" in open_error(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_short_for_a_length(tmp_path, count):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x01" * count)
    message = open_error(path)
    assert str(path) in message
    assert "too short" in message


def test_cut_at_every_byte(tmp_path):
    """A download that stopped, wherever it stopped."""
    whole = save(tmp_path / "whole.safetensors", {"w": torch.ones(5), "v": torch.ones(2)}).read_bytes()
    path = tmp_path / "x.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert str(path) in open_error(path)


def test_cut_in_the_header_and_in_the_data(tmp_path):
    whole = save(tmp_path / "whole.safetensors", {"w": torch.ones(5)}).read_bytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole[:20])
    assert "truncated: its header" in open_error(path)
    path.write_bytes(whole[:-1])
    message = open_error(path)
    assert str(path) in message
    assert "'w'" in message
    assert "20" in message
    assert "19" in message


def test_header_longer_than_allowed_or_than_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    for length, word in (
        (100_000_001, "limit"),
        (2**63, "limit"),
        (2**64 - 1, "limit"),
        (50, "truncated"),
        (10**8, "truncated"),
    ):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        message = open_error(path)
        assert str(path) in message
        assert word in message


def test_header_over_the_limit_in_a_file_that_has_it(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 100_000_200)
    assert "limit" in open_error(path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"not json", b'{"w":}', b"\xff\xfe{}", b'{"w": 1} x', b"{'w': 1}", b"[" * 100_000, b'{"a":' * 100_000],
    ids=["empty", "open", "words", "no value", "not utf-8", "more after it", "python", "deep list", "deep object"],
)
def test_header_that_is_no_json(tmp_path, text):
    path = write_raw(tmp_path / "x.safetensors", text)
    assert str(path) in open_error(path)


@pytest.mark.parametrize("value", [[], [{}], 1, "x", None, True])
def test_header_that_is_no_object(tmp_path, value):
    path = write_raw(tmp_path / "x.safetensors", value)
    message = open_error(path)
    assert str(path) in message
    assert "JSON object" in message


def test_name_listed_twice(tmp_path):
    one = json.dumps(entry("U8", [2], 0, 2))
    path = write_raw(tmp_path / "x.safetensors", f'{{"w": {one}, "w": {one}}}'.encode(), b"ab")
    message = open_error(path)
    assert str(path) in message
    assert "'w' is listed twice" in message


BAD_ENTRIES = {
    "past the end": (entry("U8", [9], 0, 9), "truncated"),
    "far past the end": (entry("U8", [2**62], 0, 2**62), "truncated"),
    "starts late": (entry("U8", [3], 1, 4), "gap"),
    "trailing": (entry("U8", [3], 0, 3), "1 bytes after"),
    "negative start": (entry("U8", [5], -1, 4), "whole numbers"),
    "negative size": (entry("U8", [-4], 0, 4), "whole numbers"),
    "two negative sizes": (entry("U8", [-2, -2], 0, 4), "whole numbers"),
    "end before start": (entry("U8", [0], 4, 0), ""),
    "bool offset": (entry("U8", [4], False, 4), "whole numbers"),
    "bool size": (entry("U8", [4, True], 0, 4), "whole numbers"),
    "float offset": (entry("U8", [4], 0, 4.0), "whole numbers"),
    "float size": (entry("U8", [4.0], 0, 4), "whole numbers"),
    "not a number": (entry("U8", [float("nan")], 0, 4), "whole numbers"),
    "infinite": (entry("U8", [4], 0, float("inf")), "whole numbers"),
    "text offset": (entry("U8", [4], "0", "4"), "whole numbers"),
    "shape a number": (entry("U8", 4, 0, 4), "whole numbers"),
    "shape null": (entry("U8", None, 0, 4), "whole numbers"),
    "shape text": (entry("U8", "4", 0, 4), "whole numbers"),
    "too few bytes": (entry("F32", [2], 0, 4), "needs 8"),
    "too many bytes": (entry("U8", [3], 0, 4), "needs 3"),
    "shape of 2^64": (entry("U8", [2**32, 2**32], 0, 4), "needs"),
    "shape wraps to 4": (entry("U8", [2**62 + 1, 4], 0, 4), "needs"),
    "half a byte": (entry("F4", [7], 0, 4), "F4"),
    "digits without end": (entry("U8", [10**4000, 10**4000], 0, 4), ""),
    "unknown type": (entry("F7", [4], 0, 4), "F7"),
    "lower case": (entry("u8", [4], 0, 4), "u8"),
    "type null": (entry(None, [4], 0, 4), "dtype"),
    "type a number": (entry(8, [4], 0, 4), "dtype"),
    "type a list": (entry(["U8"], [4], 0, 4), "dtype"),
    "type an object": (entry({}, [4], 0, 4), "dtype"),
    "no type": ({"shape": [4], "data_offsets": [0, 4]}, "lacks"),
    "no shape": ({"dtype": "U8", "data_offsets": [0, 4]}, "lacks"),
    "no offsets": ({"dtype": "U8", "shape": [4]}, "lacks"),
    "one offset": ({"dtype": "U8", "shape": [4], "data_offsets": [0]}, "lacks"),
    "three offsets": ({"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}, "lacks"),
    "offsets a number": ({"dtype": "U8", "shape": [4], "data_offsets": 4}, "lacks"),
    "a list": ([], "lacks"),
    "text": ("U8", "lacks"),
    "null": (None, "lacks"),
    "a number": (3, "lacks"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entry(tmp_path, case):
    value, word = BAD_ENTRIES[case]
    path = write_raw(tmp_path / "x.safetensors", {"some.weight": value}, b"abcd")
    message = open_error(path)
    assert str(path) in message
    assert "'some.weight'" in message or case == "trailing"
    assert word in message


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [((0, 4), (2, 6), "overlaps"), ((0, 4), (0, 4), "overlaps"), ((0, 2), (4, 6), "gap"), ((0, 6), (2, 4), "overlaps")],
)
def test_two_tensors_that_overlap_or_leave_a_gap(tmp_path, first, second, word):
    header = {"first": entry("U8", [first[1] - first[0]], *first), "second": entry("U8", [second[1] - second[0]], *second)}
    path = write_raw(tmp_path / "x.safetensors", header, b"abcdef")
    message = open_error(path)
    assert str(path) in message
    assert word in message
    assert "'second'" in message
    assert "'first'" in message


def test_bytes_after_the_last_tensor(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tmp_path / "y.safetensors", {"w": torch.ones(2)}).read_bytes() + b"more")
    message = open_error(path)
    assert str(path) in message
    assert "4 bytes after" in message


def test_no_file_stays_open_after_an_error(tmp_path):
    path = write_raw(tmp_path / "x.safetensors", {"w": entry("U8", [9], 0, 9)}, b"abcd")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        open_error(path)
    assert len(os.listdir("/proc/self/fd")) == before


# --- files that change ----------------------------------------------------------------------------------------------


def changing(tmp_path: Path) -> tuple[Path, checkpoints.Checkpoint]:
    path = save(tmp_path / "x.safetensors", {"v": torch.ones(4), "w": torch.ones(100)})
    checkpoint = checkpoints.open(str(path))
    checkpoint.verify()
    return path, checkpoint


def verify_error(path: Path, checkpoint: checkpoints.Checkpoint) -> None:
    with pytest.raises(ChangedWhileReading) as caught:
        checkpoint.verify()
    assert str(path) in str(caught.value)
    checkpoint.close()


def test_rewritten_in_place(tmp_path):
    path, checkpoint = changing(tmp_path)
    then = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns + 1))  # the least that a rewrite can change
    verify_error(path, checkpoint)


def test_replaced_by_another_of_the_same_size_and_time(tmp_path):
    path, checkpoint = changing(tmp_path)
    then = path.stat()
    other = save(tmp_path / "y.safetensors", {"v": torch.zeros(4), "w": torch.zeros(100)})
    os.utime(other, ns=(then.st_atime_ns, then.st_mtime_ns))
    other.replace(path)
    verify_error(path, checkpoint)


def test_removed(tmp_path):
    path, checkpoint = changing(tmp_path)
    path.unlink()
    verify_error(path, checkpoint)


def test_cut_after_opening(tmp_path):
    path, checkpoint = changing(tmp_path)
    os.truncate(path, path.stat().st_size - 10)
    assert read(checkpoint, "w", 0, 390) == stored(torch.ones(100))[:390]
    with pytest.raises(ChangedWhileReading) as caught:
        read(checkpoint, "w")
    assert str(path) in str(caught.value)
    assert "'w'" in str(caught.value)
    verify_error(path, checkpoint)


# --- anything at all ------------------------------------------------------------------------------------------------


def opens_or_refuses(content: bytes) -> None:
    """Either a readable checkpoint, or a ParamdiffError that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        try:
            checkpoint = checkpoints.open(str(path))
        except ParamdiffError as error:
            assert str(path) in str(error)  # noqa: PT017
            return
        total = sum(len(read(checkpoint, name)) for name in checkpoint.tensors)
        assert total + 8 + struct.unpack("<Q", content[:8])[0] == len(content)
        checkpoint.close()


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_random_bytes(content):
    opens_or_refuses(content)


@given(st.binary(max_size=100), st.binary(max_size=20))
@settings(max_examples=150, deadline=None)
def test_random_header(text, data):
    opens_or_refuses(header_bytes(text) + data)


GOOD = header_bytes(
    {"__metadata__": {"format": "pt"}, "a.weight": entry("BF16", [2, 3], 0, 12), "b": entry("F4", [8], 12, 16)}
) + bytes(range(16))


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_mutated_bytes(changes):
    content = bytearray(GOOD)
    for position, byte in changes:
        content[position] = byte
    opens_or_refuses(bytes(content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["U8", "F4", "BF16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
FIELD = st.fixed_dictionaries(
    {},
    optional={
        "dtype": JSON | st.sampled_from(["U8", "F32", "F4", "F6_E2M3"]),
        "shape": JSON | st.lists(st.integers(-1, 9), max_size=3),
        "data_offsets": JSON | st.lists(st.integers(-1, 30), min_size=2, max_size=2),
    },
)


@given(st.dictionaries(st.text(max_size=5), FIELD | JSON, max_size=3), st.binary(max_size=30))
@settings(max_examples=300, deadline=None)
def test_random_entries(header, data):
    opens_or_refuses(header_bytes(header) + data)


def test_hundreds_of_dimensions_are_refused_before_they_are_multiplied(tmp_path):
    header = '{"w":{"dtype":"U8","shape":' + str([2**62] * 100_000) + ',"data_offsets":[0,0]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(BrokenFile, match=r"'w' in .*model\.safetensors has over 64 dimensions"):
        checkpoints.open(str(path))
