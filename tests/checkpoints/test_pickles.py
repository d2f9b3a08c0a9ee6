"""A pickle is read, never run: whatever it names, however it is built, and wherever it breaks off."""

from __future__ import annotations

import contextlib
import pickle
import random
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdiff.checkpoints import pickles
from paramdiff.checkpoints.pickles import Opaque, Refused, StoredTensor
from tests.checkpoints import hostile as h
from tests.checkpoints.hostile import Verdict, call, judge, legacy, many, named, stacked, tensor, value, weights, whole

ORDERED = named("collections", "OrderedDict")
OPAQUE = named("torch", "Anything")
FLOATS = named("torch", "FloatStorage")
REBUILD = named("torch._utils", "_rebuild_tensor_v2")
Judged = dict[str, list[Verdict]]


def keyed(key: bytes) -> bytes:
    """A model of one tensor that holds something beside it, by a key that is no name."""
    return whole(h.mapping({"w": tensor()}) + key + h.NONE + h.SETITEM)


def entries(count: int) -> bytes:
    """A list of `count` different numbers, in place 9,000."""
    numbers = b"".join(b"J" + struct.pack("<i", number) for number in range(count))
    return h.EMPTY_LIST + h.MARK + numbers + h.APPENDS + h.put(9_000) + h.POP


def judged(folder: Path, cases: dict[str, bytes], writers: Iterable[Callable[..., Path]] = (h.zipped, legacy)) -> Judged:
    """Each pickle as the content of a zip archive and of a legacy file: what became of either, by name."""
    paths = {}
    for number, (name, pickled) in enumerate(cases.items()):
        for write in writers:
            paths[name, write] = write(folder / f"{number}-{write.__name__}.pt", pickled)
    found: Judged = {}
    for (name, _), verdict in zip(paths, judge(paths.values()), strict=True):
        found.setdefault(name, []).append(verdict)
    return found


# --- what is plain --------------------------------------------------------------------------------------------------

SIMPLE = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
    | st.text() | st.binary()
)  # fmt: skip
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.text(), st.integers())
PLAIN = st.recursive(
    SIMPLE | st.sets(KEYS) | st.frozensets(KEYS),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
    ),
    max_leaves=8,
)  # fmt: skip


@given(plain=PLAIN, protocol=st.integers(2, 5))
@settings(max_examples=150)
def test_plain_values_come_back_as_they_were(plain, protocol):
    found = pickles.load(pickle.dumps(plain, protocol))
    assert found == plain
    assert type(found) is type(plain)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("plain", [b"", b"ab\xff", bytearray(), bytearray(b"ab")], ids=repr)
def test_bytes_of_any_protocol(plain, protocol):
    assert pickles.load(pickle.dumps(plain, protocol)) == plain


@given(st.integers(-(2**40), 2**40), st.lists(st.integers(0, 9), max_size=4))
def test_a_tensor_is_where_it_says(offset, shape):
    stride = [1] * len(shape)
    pickled = whole(tensor(tuple(shape), tuple(stride), offset))
    if offset < 0:
        with pytest.raises(ValueError, match="tensor is described"):
            pickles.load(pickled)
        return
    found = pickles.load(pickled)
    assert isinstance(found, StoredTensor)
    assert (found.offset, found.shape, found.stride, found.dtype) == (offset, tuple(shape), tuple(stride), "F32")


def test_a_value_shared_in_the_pickle_is_shared_when_read():
    inner: list[int] = []
    first, second = pickles.load(pickle.dumps([inner, inner], 2))
    assert first is second


def test_containers_that_hold_themselves_come_back_so():
    plain: list[Any] = [{}]
    plain[0]["self"] = plain
    found = pickles.load(pickle.dumps(plain, 2))
    assert found[0]["self"] is found


# --- what is named --------------------------------------------------------------------------------------------------

ELSEWHERE = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "popen"), ("builtins", "eval"), ("builtins", "exec"),
    ("__builtin__", "eval"), ("builtins", "__import__"), ("builtins", "open"), ("builtins", "compile"), ("builtins", "type"),
    ("builtins", "setattr"), ("subprocess", "Popen"), ("subprocess", "check_output"), ("importlib", "import_module"),
    ("importlib._bootstrap", "_load"), ("runpy", "run_path"), ("operator", "attrgetter"), ("operator", "methodcaller"),
    ("copyreg", "_reconstructor"), ("copyreg", "__newobj__"), ("pickle", "loads"), ("_pickle", "loads"), ("pty", "spawn"),
    ("webbrowser", "open"), ("shutil", "rmtree"), ("socket", "create_connection"), ("ctypes", "CDLL"), ("timeit", "timeit"),
    ("pdb", "run"), ("types", "FunctionType"), ("types", "CodeType"), ("sys", "modules"), ("builtins", "getattr.__self__"),
    ("collections", "OrderedDict.fromkeys"), ("builtins", "dict.__class__"), ("_codecs", "decode"), ("", "eval"),
    ("paramdiff.checkpoints.pickles", "load"), ("paramdiff", "compare"), ("torchx", "load"), ("xtorch.hub", "load"),
]  # fmt: skip
FRAMEWORKS = [
    ("torch.hub", "load"), ("torch", "load"), ("torch.serialization", "load"),
    ("torch", "os.system"), ("torch", "_utils.sys.modules"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("torch._utils", "_import_dotted_name"),
    ("torch.utils.cpp_extension", "load_inline"), ("torch.jit", "load"), ("torch.storage", "_load_from_bytes"),
    ("numpy", "load"), ("numpy.testing._private.utils", "runstring"), ("numpy.core.multiarray", "_reconstruct"),
    ("functools", "partial"), ("functools", "reduce"), ("pathlib", "Path.write_text"), ("pathlib", "os.system"),
    ("typing", "sys.modules"), ("enum", "sys.modules"), ("transformers", "AutoModel.from_pretrained"),
]  # fmt: skip
POTENT = [
    ("os", "system"), ("builtins", "eval"), ("subprocess", "Popen"), ("importlib", "import_module"),
    ("functools", "partial"), ("builtins", "getattr"), ("torch.hub", "load"), ("torch", "os.system"),
]  # fmt: skip


def odd(attribute: str, function: bytes) -> bytes:
    """An OrderedDict on which a method of that name was put by BUILD."""
    return h.built(call(ORDERED), h.mapping({attribute: function}))


def ways(module: str, name: str, argument: str) -> dict[str, bytes]:
    """Every way in which a pickle can ask for something of a module to be called, and some that only look like it."""
    function, text = named(module, name), value(argument)
    typed = named("torch._tensor", "_rebuild_from_type_v2")
    return {
        "REDUCE": call(function, text),
        "REDUCE of STACK_GLOBAL": call(stacked(module, name), text),
        "INST": h.inst(module, name, text),
        "OBJ": h.MARK + function + text + h.OBJ,
        "NEWOBJ": function + many(text) + h.NEWOBJ,
        "NEWOBJ_EX": function + many() + h.mapping({"command": text}) + h.NEWOBJ_EX,
        "BUILD": h.built(function, h.mapping({"command": text})),
        "BUILD of slots": h.built(function, h.slots({"command": text})),
        "BUILD by __setstate__": h.built(odd("__setstate__", function), text),
        "APPEND": odd("append", function) + text + h.APPEND,
        "APPENDS": odd("extend", function) + h.MARK + text + h.APPENDS,
        "ADDITEMS": odd("add", function) + h.MARK + text + h.ADDITEMS,
        "NEWOBJ of an instance": odd("__new__", function) + many(text) + h.NEWOBJ,
        "values of a mapping": odd("values", function),
        "rebuilt from a type": call(typed, function, function, many(text), h.NONE),
        "rebuilt, with a state": call(typed, function, function, many(text), h.mapping({"command": text})),
        "getattr": call(call(named("builtins", "getattr"), function, value("__call__")), text),
        "called twice": call(call(function, text), text),
        "a storage's type": tensor(stored=many(value("storage"), function, text, text, value(4)) + h.BINPERSID),
        "a persistent id": function + h.BINPERSID,
        "extended by set": call(named("builtins", "set"), many(function)),
    }


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Verdict]]:
    """What became of files that want to write a marker, and where that would be."""
    folder = tmp_path_factory.mktemp("commands")
    marker = folder / "marker"
    paths = {}
    for module, name in [*ELSEWHERE, *FRAMEWORKS]:
        argument = f"open({str(marker)!r}, 'w')" if name in ("eval", "exec") else f"touch {marker}"
        for way, pushed in ways(module, name, argument).items():
            if (module, name) in POTENT or way in ("REDUCE", "INST", "NEWOBJ"):
                write = legacy if len(paths) % 3 == 0 else h.zipped
                paths[f"{module}.{name} by {way}"] = write(folder / f"{len(paths)}.pt", weights(x=pushed))
    return marker, dict(zip(paths, judge(paths.values()), strict=True))


def test_nothing_that_a_pickle_names_is_executed_or_imported(commands):
    marker, verdicts = commands
    assert len(verdicts) > 300
    assert not marker.exists()
    assert {name: (v.modules, v.events) for name, v in verdicts.items() if v.modules or v.events} == {}


def test_whatever_a_pickle_asks_for_it_is_refused_or_read(commands):
    wrong = {name: (v.outcome, v.message) for name, v in commands[1].items() if not (v.refused or v.outcome == "read")}
    assert wrong == {}


def test_what_is_of_no_framework_is_refused_by_name(commands):
    for module, name in ELSEWHERE:
        found = [verdict for case, verdict in commands[1].items() if case.startswith(f"{module}.{name} by ")]
        assert len(found) >= 3
        for verdict in found:
            assert (verdict.outcome, f"{module}.{name}" in verdict.message) == ("UnsupportedFormat", True)


def test_the_same_commands_do_harm_where_pickles_are_trusted(tmp_path):
    """Else the tests above would prove nothing."""
    marker = tmp_path / "marker"
    paths = [h.zipped(tmp_path / "system.pt", whole(call(named("os", "system"), value(f"touch {marker}"))))]
    paths.append(h.zipped(tmp_path / "import.pt", whole(named("webbrowser", "open"))))
    system, imported = judge(paths, trusting=True)
    assert marker.exists()
    assert any("os.system" in event for event in system.events)
    assert "webbrowser" in imported.modules


@pytest.mark.parametrize(("module", "name"), FRAMEWORKS)
def test_what_is_of_a_framework_is_inert(module, name):
    for pushed in (named(module, name), stacked(module, name)):
        found = pickles.load(whole(call(pushed, value("touch x")), 4))
        assert isinstance(found, Opaque)
        assert (found.kind, found.args) == (f"{module}.{name}", ("touch x",))


@pytest.mark.parametrize("name", [None, 3, b"system", ("os", "system"), ["system"], {}], ids=repr)
def test_a_name_that_is_no_text(name):
    for parts in (value("os") + value(name), value(name) + value("system"), value(name) + value(name)):
        with pytest.raises(ValueError, match="broken pickle"):
            pickles.load(whole(parts + h.STACK_GLOBAL, 4))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "system\0", "sys\ntem", "ſystem", "system ", "__class__.__mro__", "x" * 100_000]
)
def test_an_odd_name_is_refused_or_inert(name):
    for module in ("os", "torch", name):
        pickled = whole(stacked(module, name), 4)
        if module == "torch":
            assert isinstance(pickles.load(whole(call(stacked(module, name)), 4)), Opaque)
        else:
            with pytest.raises(Refused):
                pickles.load(pickled)


@pytest.mark.parametrize(
    "code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x82\x00", b"\x84\xff\xff\xff\xff"]
)
def test_codes_of_the_extension_registry_are_refused(code):
    with pytest.raises(ValueError, match=r"broken pickle|unregistered"):
        pickles.load(whole(code))


PERSISTENT = {
    "text": value("storage"), "number": value(3), "nothing": h.NONE, "empty": value(()),
    "short": value(("storage", 1, "0", "c")),
    "a mapping": value({}), "a set": call(named("builtins", "set")), "opaque": call(OPAQUE), "a type": FLOATS,
    "another word": many(value("module"), FLOATS, value("0"), value("cpu"), value(4)),
    "text for a type": value(("storage", "FloatStorage", "0", "cpu", 4)),
    "an opaque type": many(value("storage"), OPAQUE, value("0"), value("cpu"), value(4)),
    "text for a size": many(value("storage"), FLOATS, value("0"), value("cpu"), value("4")),
    "a float for a size": many(value("storage"), FLOATS, value("0"), value("cpu"), value(4.0)),
    "a view": many(value("storage"), FLOATS, value("0"), value("cpu"), value(4), value(("1", 0, 4))),
    "a tensor": tensor(), "a list": value(["storage", 1]),
}  # fmt: skip


@pytest.mark.parametrize("case", PERSISTENT)
def test_a_persistent_id_of_another_kind(case):
    with pytest.raises(ValueError, match=r"storage is|broken pickle"):
        pickles.load(whole(tensor(stored=PERSISTENT[case] + h.BINPERSID)))


def test_a_persistent_id_in_the_text_protocol():
    with pytest.raises(ValueError, match="described in an unknown way"):
        pickles.load(whole(b"P('storage', 'FloatStorage', '0', 'cpu', 4)\n"))


# --- what breaks off, or is a bomb ----------------------------------------------------------------------------------

GOOD = weights(
    x=tensor((2, 2), (1, 2)), n=value([1, 2.5, None, {"a": (1, 2, 3)}, 2**70, "é"]),
    s=call(named("builtins", "set"), value([1])), o=h.built(call(OPAQUE, value(1)), value({"k": 1})),
)  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cut_anywhere_it_is_broken(protocol):
    for pickled in (GOOD, pickle.dumps(pickles.load(GOOD)["n"], protocol)):
        for length in range(len(pickled)):
            with pytest.raises(ValueError, match=r"."):
                pickles.load(pickled[:length])


@pytest.mark.parametrize(
    "pickled", [b"", b"\x80", b"\x80\xff.", b".", b"\x00", b"not a pickle", b"N", b"0.", b"(.", b"h\x05."]
)
def test_what_is_no_pickle(pickled):
    with pytest.raises(ValueError, match=r"."):
        pickles.load(pickled)


def claims(opcode: bytes, layout: str, *sizes: int) -> dict[str, bytes]:
    return {f"{opcode!r} of {size:,}": whole(opcode + struct.pack(layout, size) + b"abc", 5) for size in sizes}


BOMBS = {
    # lengths that are not there
    **claims(b"\x8e", "<Q", 10**9, 2**40, 2**62, 2**64 - 1),
    **claims(b"\x8d", "<Q", 10**9, 2**40, 2**62, 2**64 - 1),
    **claims(b"\x96", "<Q", 5 * 10**8, 10**10, 2**40, 2**62, 2**64 - 1),
    **claims(b"\x95", "<Q", 10**9, 2**40, 2**62, 2**64 - 1),
    **claims(b"\x8b", "<i", 2**31 - 1, -1),
    **claims(b"B", "<I", 2**32 - 1),
    **claims(b"T", "<i", 2**31 - 1, -1),
    **claims(b"X", "<I", 2**32 - 1),
    "a frame within a frame": whole((b"\x95" + struct.pack("<Q", 2**40)) * 2, 4),
    "out-of-band buffer": whole(b"\x97\x98", 5),
    "bytes by their number": weights(x=call(named("builtins", "bytes"), value(10**10))),
    "a bytearray by its length": weights(x=call(named("builtins", "bytearray"), value(10**10))),
    # places in the memo
    "memo place 2^31": weights(x=value(1) + h.put(2**31) + h.POP + h.get(2**31)),
    "memo place 2^32 - 1": weights(x=value(1) + h.put(2**32 - 1)),
    "memo place in text": weights(x=value(1) + b"p" + b"9" * 4_000 + b"\n"),
    "memo place in too long a text": weights(x=value(1) + b"p" + b"9" * 100_000 + b"\n"),
    "memo place below 0": weights(x=value(1) + b"p-1\n"),
    "number of many digits": weights(x=b"I" + b"9" * 1_000_000 + b"\n"),
    "long number of many digits": weights(x=b"L" + b"9" * 1_000_000 + b"L\n"),
    # depth
    "lists in lists": weights(x=h.EMPTY_LIST * 100_000 + h.APPEND * 99_999),
    "tuples in tuples": weights(x=h.EMPTY_TUPLE + h.TUPLE1 * 100_000),
    "mappings in mappings": weights(x=(h.EMPTY_DICT + value("a")) * 100_000 + h.NONE + h.SETITEM * 100_000),
    "mappings all the way down": whole((h.EMPTY_DICT + value("model")) * 100_000 + h.NONE + h.SETITEM * 100_000),
    "opaque in opaque": weights(x=OPAQUE + b"2" * 99_999 + h.EMPTY_TUPLE + (h.REDUCE + h.TUPLE1) * 99_999 + h.REDUCE),
    "states in states": weights(x=(call(OPAQUE)) * 20_000 + h.NONE + h.BUILD * 20_000),
    "marks": whole(h.MARK * 200_000),
    "a key as deep": keyed(h.EMPTY_TUPLE + h.TUPLE1 * 100_000),
    "an opaque key as deep": keyed(call(OPAQUE, h.EMPTY_TUPLE + h.TUPLE1 * 100_000)),
    "deep text to encode": weights(x=call(named("_codecs", "encode"), h.EMPTY_TUPLE + h.TUPLE1 * 100_000)),
    # what holds itself
    "a list in itself": weights(x=h.EMPTY_LIST + h.put(9_000) + h.get(9_000) + h.APPEND),
    "a mapping in itself": weights(x=h.EMPTY_DICT + h.put(9_000) + value("x") + h.get(9_000) + h.SETITEM),
    "a model in itself": whole(
        h.EMPTY_DICT + h.put(9_000) + h.MARK + value("w") + tensor() + value("model") + h.get(9_000) + h.SETITEMS
    ),
    "an opaque in itself": weights(x=call(OPAQUE) + h.put(9_000) + h.get(9_000) + h.BUILD),
}  # fmt: skip
TANGLES = {
    "a model in itself by 400 names": whole(  # 400 * 400 * 400 paths
        h.EMPTY_DICT + h.put(9_000) + h.MARK + b"".join(value(f"n{i}") + h.get(9_000) for i in range(400)) + h.SETITEMS
    ),
    # two of each, forty times over: 2^40 in a few bytes
    "doubled": weights(x=h.doubled(40)),
    "doubled as a key": weights(x=h.EMPTY_DICT + h.doubled(40) + h.NONE + h.SETITEM),
    "doubled in a set": weights(x=call(named("builtins", "set"), h.doubled(40) + h.TUPLE1)),
    "doubled as a storage's key": weights(
        x=tensor(stored=many(value("storage"), FLOATS, h.doubled(40), value("cpu"), value(4)) + h.BINPERSID)
    ),
    "doubled text to encode": weights(x=call(named("_codecs", "encode"), h.doubled(40))),
    "doubled in an opaque key": keyed(call(OPAQUE, h.doubled(40))),
    "doubled as a shape": weights(x=call(REBUILD, h.storage(), value(0), h.doubled(40), h.doubled(40))),
    "doubled as a state": weights(x=h.built(call(OPAQUE), h.doubled(40))),
    "doubled as a callable's name": weights(x=call(h.built(REBUILD, h.slots({"name": h.doubled(40)})), value("x"))),
    "doubled as the model": whole(h.doubled(40)),
    # one list, made into another value again and again
    "many sets of one list": whole(
        entries(100_000) + named("builtins", "set") + h.put(9_001) + h.POP + h.MARK
        + (h.get(9_001) + h.get(9_000) + h.TUPLE1 + h.REDUCE) * 3_000 + h.TUPLE
    ),
    "many sets of one list, forgotten": weights(
        x=entries(100_000) + named("builtins", "set") + h.put(9_001) + h.POP
        + (h.get(9_001) + h.get(9_000) + h.TUPLE1 + h.REDUCE + h.POP) * 10_000 + h.NONE
    ),
    "many encodings of one text": whole(
        value("a" * 1_000_000) + h.put(9_000) + h.POP + named("_codecs", "encode") + h.put(9_001) + h.POP + h.MARK
        + (h.get(9_001) + h.get(9_000) + h.TUPLE1 + h.REDUCE) * 2_000 + h.TUPLE
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return judged(tmp_path_factory.mktemp("bombs"), BOMBS)


@pytest.fixture(scope="module")
def tangles(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return judged(tmp_path_factory.mktemp("tangles"), TANGLES, [h.zipped])


def assert_harmless(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        assert verdict.harmless, (verdict.outcome, verdict.message, verdict.grown, verdict.events)


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_does_not_go_off(bombs, case):
    assert_harmless(bombs[case])


@pytest.mark.parametrize("case", TANGLES)
def test_a_small_pickle_costs_little_whatever_it_would_unfold_to(tangles, case):
    assert_harmless(tangles[case])


READABLE = (
    "memo place 2^31", "lists in lists", "tuples in tuples", "mappings in mappings", "a list in itself",
    "a mapping in itself", "doubled", "doubled as a state",
)  # fmt: skip


@pytest.mark.parametrize("case", READABLE)
def test_odd_values_beside_the_weights_do_not_keep_them_from_being_read(bombs, tangles, case):
    for verdict in {**bombs, **tangles}[case]:
        assert (verdict.outcome, list(verdict.tensors)) == ("read", ["w"])


# --- BUILD, which writes to what is there ---------------------------------------------------------------------------

FOUR_OF = tensor((2,), (1,))
REWRITTEN = {
    "offset below 0": h.built(FOUR_OF, h.slots({"offset": value(-(10**12))})),
    "offset a little below 0": h.built(FOUR_OF, h.slots({"offset": value(-4)})),
    "stride below 0": h.built(FOUR_OF, h.slots({"stride": value((-(10**12),))})),
    "stride below 0, within the file": h.built(tensor((2,), (1,), 3), h.slots({"stride": value((-2,))})),
    "two strides": h.built(FOUR_OF, h.slots({"stride": value((1, 1))})),
    "text for a shape": h.built(FOUR_OF, h.slots({"shape": value(("a",))})),
    "shape below 0": h.built(FOUR_OF, h.slots({"shape": value((-1,))})),
    "nothing for a shape": h.built(FOUR_OF, h.slots({"shape": h.NONE})),
    "list for a type": h.built(FOUR_OF, h.slots({"dtype": value([])})),
    "another type": h.built(FOUR_OF, h.slots({"dtype": value("F4")})),
    "number for a storage": h.built(FOUR_OF, h.slots({"storage": value(5)})),
    "storage with a list for a key": tensor(stored=h.built(h.storage(), value(("F32", [], 4)))),
    "storage with a mapping for a key": tensor(stored=h.built(h.storage(), value(("F32", {}, 4)))),
    "storage with a list for a type": tensor(stored=h.built(h.storage(), value(([], "0", 4)))),
    "storage with a number for a type": tensor(stored=h.built(h.storage(), value((4, "0", 4)))),
    "storage type with a list for a type": tensor(stored=h.storage(kind=h.built(FLOATS, value(([],))))),
    "storage type of 4 bits": tensor(stored=h.storage(kind=h.built(FLOATS, value(("F4",))))),
    "storage type of 4 bits, transposed": tensor((2, 2), (1, 2), stored=h.storage(kind=h.built(FLOATS, value(("F4",))))),
    "opaque type with a number for a name": call(h.built(OPAQUE, h.slots({"kind": value(5)})), tensor()),
    "rebuilder with another name": call(h.built(REBUILD, h.slots({"name": value("x")}))),
}  # fmt: skip
SPOILT = {
    name: whole(h.built(call(ORDERED) + h.MARK + value("w") + tensor() + h.SETITEMS, h.mapping({name: spoil})))
    for name, spoil in {
        "values": value(5), "items": value(5), "keys": value(5), "__iter__": value(5), "__len__": value(5),
        "get": value(5), "__class__": value(5), "__dict__": value(5), "__setstate__": value(5), "values ": call(OPAQUE),
    }.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    cases = {name: weights(x=pushed) for name, pushed in REWRITTEN.items()} | {
        f"a mapping's {n}": p for n, p in SPOILT.items()
    }
    return judged(tmp_path_factory.mktemp("rewritten"), cases)


@pytest.mark.parametrize("case", [*REWRITTEN, *(f"a mapping's {name}" for name in SPOILT)])
def test_what_build_writes_is_checked_as_what_was_there(rewritten, case):
    assert_harmless(rewritten[case])


def test_a_tensor_rewritten_by_build_does_not_reach_outside_its_storage(rewritten):
    for case in ("offset a little below 0", "stride below 0, within the file", "shape below 0", "two strides"):
        assert [verdict.refused for verdict in rewritten[case]] == [True, True], case


SHARED = {
    "OrderedDict": ORDERED, "dict": named("builtins", "dict"), "set": named("builtins", "set"),
    "frozenset": named("builtins", "frozenset"), "complex": named("builtins", "complex"),
    "encode": named("_codecs", "encode"), "tensor": REBUILD, "tensor v1": named("torch._utils", "_rebuild_tensor"),
    "tensor v3": named("torch._utils", "_rebuild_tensor_v3"), "parameter": named("torch._utils", "_rebuild_parameter"),
    "typed": named("torch._tensor", "_rebuild_from_type_v2"), "Size": named("torch", "Size"), "storage type": FLOATS,
    "dtype": named("torch", "float32"), "opaque type": OPAQUE, "getattr": named("builtins", "getattr"),
    "an OrderedDict": call(ORDERED), "a storage": h.storage(),
}  # fmt: skip
STATES = {
    "entries": value(dict.fromkeys(("__call__", "__init__", "__new__", "name", "dtype", "kind", "update", "x"), 5)),
    "slots": h.slots({name: value(5) for name in ("name", "dtype", "kind", "key", "numel")}),
    "one slot": h.slots({"__class__": ORDERED}),
    "code": h.slots({"__code__": value(5), "__defaults__": value((5,)), "__globals__": value({})}),
    "globals": h.slots({"__globals__": value({"isinstance": 5})}),
    "fields": value(("F64",)), "name": value(("encode",)), "opaque": call(OPAQUE),
}  # fmt: skip


@pytest.mark.parametrize("thing", SHARED)
def test_what_a_pickle_writes_to_outlives_nothing(thing):
    """Loading a good pickle gives the same before and after, whatever the one between did to what both of them name."""
    place = [h.storage(), value(0), value((2,)), value((1,))]
    good = weights(
        a=call(named("torch._utils", "_rebuild_tensor"), *place),
        b=call(named("torch._utils", "_rebuild_tensor_v3"), *place, h.NONE, h.NONE, named("torch", "float32")),
        c=call(named("torch._utils", "_rebuild_parameter"), tensor(), value(False), h.NONE),
        d=call(named("torch", "Size"), value([2, 3])), e=call(named("_codecs", "encode"), value("\xff")),
        f=call(named("builtins", "set"), value([1])), g=call(ORDERED, value([["a", 1]])),
        h=call(named("builtins", "complex"), value(1.0)), i=call(named("builtins", "frozenset"), value([1])),
        j=call(named("builtins", "dict")),
        k=call(named("torch._tensor", "_rebuild_from_type_v2"), REBUILD, OPAQUE, many(*place), h.NONE),
    )  # fmt: skip
    before = pickles.load(good)
    meddling = [h.built(SHARED[thing], state) for state in STATES.values()]
    meddling += [
        SHARED[thing] + value("a") + value(5) + h.SETITEM, SHARED[thing] + value(5) + h.APPEND,
        SHARED[thing] + h.MARK + value(5) + h.ADDITEMS, SHARED[thing] + h.MARK + value("a") + value(5) + h.SETITEMS,
    ]  # fmt: skip
    for pushed in meddling:
        with contextlib.suppress(ValueError):
            pickles.load(whole(pushed, 4))
        assert pickles.load(good) == before
    assert vars(OrderedDict(a=1)) == {}


# --- anything at all ------------------------------------------------------------------------------------------------


def test_mutated_pickles_are_refused_or_read(tmp_path):
    """Bytes changed, left out, put in or doubled, in the pickle itself: checksums agree with it all the same."""
    rng = random.Random(20)
    paths = []
    for number in range(300):
        content = bytearray(GOOD)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(2, len(content))
            kind = rng.randrange(5)
            if kind < 2:
                content[place] = rng.randrange(256)
            elif kind == 2:
                del content[place : place + rng.randint(1, 8)]
            elif kind == 3:
                content[place:place] = rng.randbytes(rng.randint(1, 4))
            else:
                content[place:place] = content[place : place + rng.randint(1, 60)]
        paths.append((legacy if number % 2 else h.zipped)(tmp_path / f"{number}.pt", bytes(content)))
    verdicts = judge(paths)
    assert {p.name: (v.outcome, v.message, v.events) for p, v in zip(paths, verdicts, strict=True) if not v.harmless} == {}
    assert 0 < sum(verdict.outcome == "read" for verdict in verdicts) < len(paths)


OPCODES = [
    h.MARK, h.TUPLE, h.REDUCE, h.BUILD, h.POP, h.OBJ, h.NONE, h.EMPTY_TUPLE, h.EMPTY_DICT, h.EMPTY_LIST, h.TUPLE1,
    h.TUPLE2, h.NEWOBJ, h.NEWOBJ_EX, h.SETITEM, h.SETITEMS, h.APPEND, h.APPENDS, h.ADDITEMS, h.STACK_GLOBAL, h.BINPERSID,
    b"\x94", b"\x8f", b"\x91", b"2", b"1", b"\x87", b"h\x00", b"q\x00", b"K\x01", value("w"), value("data"), value(4),
    value(("a", 1)), h.slots({}), h.slots({"kind": value(1), "name": value("x"), "shape": value((2,)), "offset": value(-1)}),
    tensor(), h.storage(), ORDERED, OPAQUE, FLOATS, call(ORDERED), call(OPAQUE), *list(SHARED.values())[1:14],
    many(value("storage"), FLOATS, value("0")),
]  # fmt: skip


def test_opcodes_in_any_order_are_refused_or_read(tmp_path):
    rng = random.Random(21)
    paths = []
    for number in range(200):
        pushed = b"".join(rng.choice(OPCODES) for _ in range(rng.randint(1, 12)))
        pickled = whole(pushed, 4) if number % 3 else weights(x=pushed)
        paths.append((legacy if number % 2 else h.zipped)(tmp_path / f"{number}.pt", pickled))
    verdicts = judge(paths)
    assert {p.name: (v.outcome, v.message, v.events) for p, v in zip(paths, verdicts, strict=True) if not v.harmless} == {}


@given(st.binary(max_size=60).filter(lambda content: b"\x96" not in content))
@settings(max_examples=200)
def test_random_bytes(content):
    try:
        pickles.load(content)
    except ValueError as error:
        assert str(error)  # noqa: PT017


def test_getattr_names_a_class_within_a_class_and_nothing_else():
    """As the pickles of ShardedTensor do. Of anything but a framework's class it is refused."""
    ask = named("builtins", "getattr")
    inner = pickles.load(h.whole(call(call(ask, named("torch.x", "Outer"), value("Inner")), value(1))))
    assert (inner.kind, inner.args) == ("torch.x.Outer.Inner", (1,))
    for thing in (value("text"), value(3), call(ORDERED), named("torch._utils", "_rebuild_tensor_v2"), ORDERED, tensor()):
        with pytest.raises(pickles.Refused):
            pickles.load(h.whole(call(ask, thing, value("__class__"))))
