"""Bad input and bad usage: the exit code, one sentence on stderr, no traceback. And names from hostile files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import paramdiff

from .helpers import (
    SAMPLE,
    assert_sentence,
    environment,
    header_of,
    run,
    run_json,
    squeezed,
    write_checkpoint,
    write_raw,
)

BASE, SGD = SAMPLE / "base", SAMPLE / "rl-sgd"
W = {"w": ("F32", (4,))}


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["sparsity", "--help"], ["layers", "--help"], ["inspect", "--help"]])
def test_help_shows_examples(args: list[str]) -> None:
    done = run(*args)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"Examples?:", done.stdout)
    assert f"paramdiff {args[0] if len(args) > 1 else 'sparsity'} base/" in squeezed(done.stdout)


def test_examples_show_the_backslashes_that_must_be_typed() -> None:
    assert r"--include 'layers\.0\.' --exclude norm" in squeezed(run("sparsity", "--help").stdout)


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"paramdiff {paramdiff.__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["nonsense"], "nonsense"),
        (["sparsity", BASE, SGD, "--nonsense"], "--nonsense"),
        (["sparsity", BASE], "TUNED"),
        (["sparsity", BASE, SGD, "third"], "third"),
        (["sparsity", BASE, SGD, "--tol", "small"], "--tol"),
        (["sparsity", BASE, SGD, "--compat", "nobody2020"], "nobody2020"),
        (["sparsity", BASE, SGD, "--threads", "0"], "threads"),
        (["inspect"], "REF"),
    ],
)
def test_usage_errors(args: list[object], word: str) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("tolerance", ["-0.5", "nan", "inf", "-inf"])
@pytest.mark.parametrize("command", ["sparsity", "layers"])
def test_tolerances_that_make_no_sense(command: str, tolerance: str) -> None:
    assert_sentence(run(command, BASE, SGD, f"--tol={tolerance}"), 2, "tolerance", tolerance)


def test_a_bad_tolerance_writes_nothing(tmp_path: Path) -> None:
    assert_sentence(run("sparsity", BASE, SGD, "--tol", "-1", "--out", tmp_path / "out"), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--include", "--exclude"])
@pytest.mark.parametrize("pattern", ["(", "[", "*a", "(?P<n>a)(?P<n>b)"])
def test_bad_regular_expressions(option: str, pattern: str) -> None:
    assert_sentence(run("sparsity", BASE, SGD, option, pattern), 2, option, "regular expression")


@pytest.mark.parametrize("pattern", ["(\n", "(\x1b[31m"])
def test_bad_regular_expressions_stay_on_one_line(pattern: str) -> None:
    done = run("sparsity", BASE, SGD, "--include", pattern)
    assert "\x1b" not in assert_sentence(done, 2, "--include")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cuda:-1", "CUDA", "mps", "cuda:0:1", "cudaish"])
def test_unknown_devices(device: str) -> None:
    assert_sentence(run("sparsity", BASE, SGD, "--device", device), 2, "device")


def test_cuda_where_there_is_none() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    for device in ("cuda", "cuda:0"):
        assert_sentence(run("sparsity", BASE, SGD, "--device", device), 2, device, "--device cpu")


@pytest.mark.gpu
def test_a_cuda_device_beyond_the_last() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    assert_sentence(run("sparsity", BASE, SGD, "--device", "cuda:99"), 2, "cuda:99", "--device cpu")


# --- nothing to compare ----------------------------------------------------------------------------------------------


def test_nothing_in_common(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a.safetensors", {"one": ("F32", (1,))})
    b = write_checkpoint(tmp_path / "b.safetensors", {"two": ("F32", (1,))})
    for more in ([], ["--json"], ["--quiet"], ["--out", tmp_path / "out"]):
        assert_sentence(run("sparsity", a, b, *more), 3, str(a), str(b), "'one'", "'two'")
    assert not (tmp_path / "out").exists()


def test_everything_excluded() -> None:
    assert_sentence(run("sparsity", BASE, SGD, "--exclude", "."), 3, "--include/--exclude")
    assert_sentence(run("layers", BASE, SGD, "--include", "zzz"), 3, "--include/--exclude")


def test_no_shape_in_common(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a.safetensors", {"w": ("F32", (1,))})
    b = write_checkpoint(tmp_path / "b.safetensors", {"w": ("F32", (2,))})
    assert_sentence(run("sparsity", a, b), 3, "shape_mismatch")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    empty = write_raw(tmp_path / "a.safetensors", b"{}")
    assert_sentence(run("sparsity", empty, BASE), 3, str(empty), "no tensors")
    assert_sentence(run("sparsity", BASE, empty), 3, str(empty), "no tensors")


# --- references that lead nowhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1])
def test_a_missing_path(tmp_path: Path, position: int) -> None:
    pair = [BASE, BASE]
    pair[position] = tmp_path / "nowhere"
    assert_sentence(run("sparsity", *pair), 2, str(tmp_path / "nowhere"))


def test_an_empty_directory(tmp_path: Path) -> None:
    assert_sentence(run("sparsity", tmp_path, BASE), 2, str(tmp_path), "empty")


@pytest.mark.parametrize("ref", ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B@main", "hf://Qwen/Qwen2.5-0.5B"])
def test_a_hub_out_of_reach(tmp_path: Path, ref: str) -> None:
    said = assert_sentence(run("sparsity", ref, BASE, cwd=tmp_path), 2, ref.removeprefix("hf://"), "could not be asked")
    assert ("No such path" in said) is not ref.startswith("hf://")


@pytest.mark.parametrize("ref", ["", "x" * 5000, "~nobody/model", "a\nb", "a\x1b[31mb", "\udcff"])
def test_strange_references(tmp_path: Path, ref: str) -> None:
    done = run("sparsity", ref, BASE, cwd=tmp_path)
    assert "\x1b" not in assert_sentence(done, 2)


def test_a_directory_named_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert_sentence(run("sparsity", tmp_path, BASE), 2, str(tmp_path))
    assert_sentence(run("sparsity", tmp_path / "model.safetensors", BASE), 2, str(tmp_path / "model.safetensors"))


def test_a_directory_in_place_of_a_shard(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "shard.safetensors"}}))
    (tmp_path / "shard.safetensors").mkdir()
    assert_sentence(run("sparsity", tmp_path, BASE), 2, str(tmp_path / "shard.safetensors"), "irectory")


@pytest.mark.parametrize("target", ["gone", "model.safetensors"])
def test_a_link_that_leads_nowhere(tmp_path: Path, target: str) -> None:
    (tmp_path / "model.safetensors").symlink_to(target)
    assert_sentence(run("sparsity", tmp_path, BASE), 2, "model.safetensors")
    assert_sentence(run("sparsity", tmp_path / "model.safetensors", BASE), 2, "model.safetensors")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_in_place_of_a_file(tmp_path: Path, device: str) -> None:
    (tmp_path / "model.safetensors").symlink_to(device)
    assert_sentence(run("sparsity", tmp_path, BASE, timeout=20), 2, "model.safetensors")


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert_sentence(run("sparsity", tmp_path, BASE, timeout=20), 2, "model.safetensors")


@pytest.mark.parametrize("name", ["model.gguf", "adapter_model.safetensors"])
def test_formats_that_are_not_read_yet_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert_sentence(run("sparsity", tmp_path, BASE), 2, str(tmp_path), "does not read")


# --- broken files ----------------------------------------------------------------------------------------------------


def good() -> bytes:
    return json.dumps(header_of(W)[0]).encode()


def broken(directory: Path, case: str) -> Path:
    """A file with one thing wrong, as directory/model.safetensors."""
    file = directory / "model.safetensors"
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}

    def with_entries(data: int, **entries: object) -> Path:
        return write_raw(file, json.dumps(entries).encode(), bytes(data))

    match case:
        case "empty":
            file.write_bytes(b"")
        case "seven bytes":
            file.write_bytes(b"\x08\0\0\0\0\0\0")
        case "header cut":
            return write_raw(file, good(), claimed=len(good()) + 1)
        case "data cut":
            return write_raw(file, good(), bytes(15))
        case "data left over":
            return write_raw(file, good(), bytes(17))
        case "header too large":
            return write_raw(file, b"{", claimed=100_000_001, length=200_000_000)
        case "header of 2**63":
            return write_raw(file, b"{}", claimed=1 << 63)
        case "header of 2**64 - 1":
            return write_raw(file, b"{}", claimed=(1 << 64) - 1)
        case "no JSON":
            return write_raw(file, b"{'w': 1}")
        case "no UTF-8":
            return write_raw(file, b'{"\xff": 1}')
        case "no object":
            return write_raw(file, b"[1, 2]")
        case "nested too deep":
            return write_raw(file, b'{"a":' * 100_000)
        case "a number of 5000 digits":
            return write_raw(file, b'{"w": ' + b"9" * 5000 + b"}")
        case "listed twice":
            one = json.dumps({"w": entry})[1:-1]
            return write_raw(file, f"{{{one}, {one}}}".encode(), bytes(16))
        case "overlap":
            return with_entries(24, a=entry, b={**entry, "data_offsets": [8, 24]})
        case "gap":
            return with_entries(40, a=entry, b={**entry, "data_offsets": [24, 40]})
        case "same bytes":
            return with_entries(16, a=entry, b=entry)
        case "beyond the end":
            return with_entries(16, a={**entry, "shape": [8], "data_offsets": [0, 32]})
        case "backwards":
            return with_entries(16, a={**entry, "data_offsets": [16, 0]})
        case "negative offsets":
            return with_entries(16, a={**entry, "data_offsets": [-16, 0]})
        case "size and shape differ":
            return with_entries(16, a={**entry, "shape": [5]})
        case "negative shape":
            return with_entries(16, a={**entry, "shape": [-2, -2]})
        case "fractional shape":
            return with_entries(16, a={**entry, "shape": [4.0]})
        case "shape true":
            return with_entries(4, a={**entry, "shape": [True], "data_offsets": [0, 4]})
        case "shape null":
            return with_entries(16, a={**entry, "shape": None})
        case "huge shape":
            return with_entries(16, a={**entry, "shape": [10**4000, 10**4000]})
        case "huge offsets":
            return with_entries(16, a={**entry, "data_offsets": [0, 10**4000]})
        case "no dtype":
            return with_entries(16, a={"shape": [4], "data_offsets": [0, 16]})
        case "dtype a list":
            return with_entries(16, a={**entry, "dtype": ["F32"]})
        case "dtype a dict":
            return with_entries(16, a={**entry, "dtype": {}})
        case "dtype unknown":
            return with_entries(16, a={**entry, "dtype": "\x1b[31m\nF12"})
        case "three offsets":
            return with_entries(16, a={**entry, "data_offsets": [0, 8, 16]})
        case "entry a number":
            return with_entries(16, a=3)
        case "entry null":
            return with_entries(16, a=None)
        case "entry a string":
            return with_entries(16, a="F32")
        case _:
            raise AssertionError(case)
    return file


CASES = re.findall(r'^        case "(.+)":$', Path(__file__).read_text(), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_broken_files(tmp_path: Path, case: str) -> None:
    file = broken(tmp_path, case)
    said = assert_sentence(run("sparsity", BASE, tmp_path, "--out", tmp_path / "out"), 2, str(file))
    assert "\x1b" not in said
    assert len(said) < 1000 + len(str(tmp_path))
    assert_sentence(run("inspect", tmp_path), 2, str(file))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [8, 100, 20_000, -1])
def test_a_truncated_shard(tmp_path: Path, size: int) -> None:
    for file in SGD.iterdir():
        (tmp_path / file.name).symlink_to(file)
    shard = tmp_path / "model-00003-of-00004.safetensors"
    content = shard.read_bytes()[:size]
    shard.unlink()
    shard.write_bytes(content)
    assert_sentence(run("sparsity", BASE, tmp_path), 2, str(shard))


# --- broken indices --------------------------------------------------------------------------------------------------


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    for file in SGD.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model-00003-of-00004.safetensors").unlink()
    assert_sentence(run("sparsity", BASE, tmp_path), 2, "hard 3 of 4", "model-00003-of-00004.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_sentence(run("sparsity", BASE, tmp_path), 2, "hard 3 of 4", "model-00003-of-00004.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"w": 3}}', '{"weight_map": {"w": ["a"]}}',
        '{"weight_map": {"w": "../w.safetensors"}}', '{"weight_map": {"w": "/etc/passwd"}}', '{"weight_map": {"w": ""}}',
        '{"weight_map": {"w": "."}}', '{"weight_map": {"w": ".."}}', '{"weight_map": null}',
        '{"weight_map": {"w": "a\\u0000b"}}', '{"a":' * 50_000, '{"weight_map": {"w": "\\ud800"}}',
        '{"weight_map": {"w": "a\\u001b[31m\\nb.safetensors"}}', '{"weight_map": {"w": "%s"}}' % ("x" * 300),
    ],
)  # fmt: skip
def test_broken_indices(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    said = assert_sentence(run("sparsity", BASE, tmp_path), 2, str(tmp_path))
    assert "\x1b" not in said


def test_an_index_that_names_a_tensor_nobody_holds(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", W)
    weight_map = {"w": "a.safetensors", "\x1b[31m\nghost": "a.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "\x1b" not in assert_sentence(run("sparsity", BASE, tmp_path), 2, "a.safetensors", "ghost")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for number in (1, 2):
        write_checkpoint(tmp_path / f"model-0000{number}-of-00002.safetensors", W)
    assert_sentence(run("sparsity", BASE, tmp_path), 2, "'w'", "twice", "model-00001", "model-00002")


def test_two_files_without_an_index(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_checkpoint(tmp_path / f"{name}.safetensors", W)
    assert_sentence(run("sparsity", BASE, tmp_path), 2, str(tmp_path), "one.safetensors", "two.safetensors")


# --- --debug ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [("--debug", "sparsity"), ("sparsity", "--debug")])
def test_debug_shows_the_traceback(tmp_path: Path, args: tuple[str, str]) -> None:
    done = run(*args, tmp_path / "nowhere", BASE)
    assert done.stdout == ""
    assert "Traceback (most recent call last)" in done.stderr
    assert "NotFound" in done.stderr
    assert str(tmp_path / "nowhere") in done.stderr
    assert done.returncode == 2, "the exit code is the one without --debug; 1 means that a check failed"


def test_debug_keeps_the_exit_code_of_nothing_to_compare() -> None:
    done = run("sparsity", BASE, SGD, "--exclude", ".", "--debug")
    assert "Traceback" in done.stderr
    assert done.returncode == 3


def test_debug_changes_nothing_where_nothing_fails() -> None:
    done = run("--debug", "sparsity", BASE, SGD, "--json")
    assert (done.returncode, done.stderr) == (0, "")


# --- names from hostile files ----------------------------------------------------------------------------------------

HOSTILE = {
    "markup": "[red]x[/red]",
    "markup that closes": "a[/red]b",
    "markup that links": "[link=https://example.org]x[/link]",
    "emoji code": ":smile:",
    "newline": "a\nb",
    "carriage return": "safe\rEVIL",
    "escape codes": "\x1b[31mred\x1b[0m",
    "title of the terminal": "\x1b]0;pwned\x07",
    "C1 escape code": "\x9b31mred",
    "backspaces": "abc\x08\x08\x08",
    "10 kB": "x" * 10_000,
    "unicode": "权重.αβγ.🙂",
    "right to left": "a\u202eb",
    "null": "a\0b",
    "empty": "",
    "blanks": "   ",
    "lone surrogate": "a\ud800b",
    "slashes": "../../etc/passwd",
    "html": "<script>alert(1)</script>",
    "dots": "...",
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PLACES = {
    "alone": "{}",
    "parameter": "model.layers.0.mlp.{}",
    "module": "model.layers.0.{}.weight",
    "outside": "model.{}.weight",
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_names(tmp_path: Path, case: str, place: str) -> None:
    name = PLACES[place].format(HOSTILE[case])
    layout = {name: ("F32", (2, 2)), "layers.0.mlp.up_proj.weight": ("F32", (2, 2))}
    a = write_checkpoint(tmp_path / "a.safetensors", {**layout, f"{name}.base": ("F32", (1,))})
    b = write_checkpoint(tmp_path / "b.safetensors", {**layout, f"{name}.tuned": ("F32", (1,))}, b"\0\0\x80\x3f")
    for args in (["sparsity", a, b], ["layers", a, b], ["inspect", a]):
        done = run(*args)
        if case == "lone surrogate" and done.returncode == 2:  # no text that can be shown or stored: may be refused
            assert_sentence(done, 2, str(a))
            continue
        assert "Traceback" not in done.stderr, done.stderr[-1000:]
        assert (done.returncode, done.stderr) == (0, "")
        assert not CONTROL.search(done.stdout), (args[0], CONTROL.findall(done.stdout))
        assert "\u202e" not in done.stdout
        if case.startswith("markup") and place != "alone" and args[0] != "sparsity":
            assert HOSTILE[case] in re.sub(r"\s", "", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_names_in_json_and_parquet(tmp_path: Path, case: str) -> None:
    name = HOSTILE[case]
    file = write_checkpoint(tmp_path / "a.safetensors", {name: ("F32", (2, 2)), "w": ("F32", (1,))})
    other = write_checkpoint(tmp_path / "b.safetensors", {"w": ("F32", (1,))})
    if case == "lone surrogate":
        done = run("sparsity", file, other, "--json", "--out", tmp_path / "out")
        if done.returncode == 2:
            assert_sentence(done, 2, str(file))
            return
    found = run_json("sparsity", file, other, "--out", tmp_path / "out")
    assert found["coverage"]["only_base"] == [name]
    assert not CONTROL.search(run("sparsity", file, other, "--json").stdout.rstrip("\n"))
    assert set(paramdiff.load(tmp_path / "out").coverage["name"]) == {name}
    assert name in [t["name"] for t in run_json("inspect", file)["tensors"]]


def test_hostile_names_in_errors(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a.safetensors", {"\x1b[31m\nx": ("F32", (1,))})
    b = write_checkpoint(tmp_path / "b.safetensors", {"\x9b31my": ("F32", (1,))})
    said = assert_sentence(run("sparsity", a, b), 3)
    assert not CONTROL.search(said)


def test_hostile_file_names_in_warnings(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors", W)
    write_checkpoint(tmp_path / "z\x1b[31m\n.safetensors", W)
    done = run("sparsity", tmp_path, tmp_path)
    assert done.returncode == 0
    assert not CONTROL.search(done.stderr)
    assert all(line.startswith("paramdiff: warning: ") for line in done.stderr.splitlines())


def test_shapes_beyond_int64_of_empty_tensors(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "a.safetensors", {"e": ("F32", (0, 1 << 70)), **W})
    for args in (["sparsity", file, file, "--out", tmp_path / "out"], ["layers", file, file], ["inspect", file]):
        done = run(*args)
        assert "Traceback" not in done.stderr, done.stderr[-500:]
        if done.returncode:
            assert_sentence(done, 2, str(file))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["sparsity", "layers"])
def test_a_terminal_that_cannot_show_greek(command: str, encoding: str) -> None:
    done = run(command, BASE, SGD, "--tol", "1e-5", env=environment(PYTHONIOENCODING=encoding), errors="replace")
    assert "Traceback" not in done.stderr, done.stderr[-500:]
    assert done.returncode == 0
