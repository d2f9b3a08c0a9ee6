"""Reading the pickles of torch.save without executing them: what is named in them becomes an inert value, or an error.

A pickle is a program. Here it can build plain containers, and tensors as descriptions of where their bytes lie. What else
it names of the frameworks that write checkpoints (torch, deepspeed, …) becomes an `Opaque`, which does nothing; what is from
elsewhere (`os.system`, `builtins.eval`, …) is refused by name. No framework is imported.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar

LONGEST_LINE = 1 << 20  # of the numbers and names that old protocols write as text
LONGEST_KEY = 16  # elements of a tuple that is a key
BUDGET = 1_000_000  # elements that all calls of a pickle may take
MAX_RANK = 64  # dimensions
MAX_BYTES = 512_000_000  # of a pickle; those of models of 10¹² parameters stay far below

STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "ByteStorage": "U8",
    "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32", "LongStorage": "I64", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "UntypedStorage": None,
}  # fmt: skip
TORCH_DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8", "int16": "I16",
    "int32": "I32", "int64": "I64", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
FRAMEWORKS = (
    "torch", "__torch__", "deepspeed", "transformers", "accelerate", "megatron", "numpy", "trl", "peft", "verl", "lightning",
    "pytorch_lightning", "omegaconf", "pathlib", "argparse", "datetime", "typing", "functools", "enum", "bitsandbytes",
)  # fmt: skip
PLAIN_TENSORS = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.nn.Buffer"}
PLAIN = {"set": set, "frozenset": frozenset, "complex": complex, "dict": dict}


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage of `numel` elements of type `dtype` (None: bytes without a type), named `key` in its file."""

    dtype: str | None
    key: str
    numel: int


@dataclass(slots=True)
class StoredTensor:
    """A tensor as a view of a storage: `offset` and `stride` in elements of `dtype`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None


@dataclass
class Opaque:
    """An object of some framework, with what it was made from; it has no behaviour."""

    kind: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)
    holds_tensor: bool = False

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, item: Any) -> None:
        self.items.append(item)

    def __hash__(self) -> int:
        return id(self)


class Refused(ValueError):
    """The pickle names something that no checkpoint needs; the message says what."""


class Unsupported(ValueError):
    """The pickle holds tensors of a kind that is not read; the message says which."""


def load(data: bytes) -> Any:
    """The object in a pickle, made of plain values, `StoredTensor` and `Opaque`.

    Raises `Refused` for a global that is neither known nor of a known framework, `Unsupported` for kinds of tensors that
    are not read, `ValueError` for a broken pickle.
    """
    return Reader(io.BytesIO(data), len(data)).load()


class Bounded:
    """A stream that ends at byte `end`. More than that is never asked of memory, whatever a pickle claims to hold."""

    def __init__(self, stream: Any, end: int) -> None:
        self._stream, self._end = stream, end

    def read(self, size: int) -> bytes:
        if size < 0 or size > self._end - self._stream.tell():
            raise EOFError("it ends early")
        return bytes(self._stream.read(size))

    def readline(self) -> bytes:
        return bytes(self._stream.readline(LONGEST_LINE))


class Reader(pickle._Unpickler):
    """Python's own unpickler in Python: the one in C lets a pickle of ten bytes allocate gigabytes for its memo.

    What makes objects is written anew here, so that nothing but values can be made, nothing but an `Opaque` is written to,
    and no short pickle unfolds into much: keys are simple, and calls take `BUDGET` elements in all.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    read: Any
    append: Any
    stack: Any
    pop_mark: Any

    def __init__(self, stream: Any, end: int) -> None:
        super().__init__(Bounded(stream, end))
        self.storages: list[Storage] = []  # all that were named so far
        self._left = max(BUDGET, end)  # of a long pickle, as many as it has bytes

    def load(self) -> Any:
        try:
            return super().load()
        except (Refused, Unsupported):
            raise
        except ValueError as error:
            raise ValueError(str(error) or "broken pickle") from error
        except Exception as error:  # a broken pickle fails in any way there is
            raise ValueError(f"broken pickle ({type(error).__name__}: {str(error)[:100]})") from error

    def find_class(self, module: str, name: str) -> Any:
        return _named(str(module), str(name))

    def persistent_load(self, pid: Any) -> Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise ValueError("a storage is described in an unknown way")
        _, storage, key, _location, numel = pid[:5]
        if isinstance(storage, _OpaqueType) and storage.kind.endswith("Storage"):
            raise Unsupported(f"it holds a {storage.kind}")
        if not (isinstance(storage, _StorageType) and isinstance(key, str) and is_whole(numel)):
            raise ValueError("a storage is described in an unknown way")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("a storage is a view of another one, as torch before 0.4 wrote them")
        self.storages.append(Storage(storage.dtype, key, numel))
        return self.storages[-1]

    def _call(self, made_by: Any, args: Any) -> None:
        if not isinstance(args, (tuple, list)):
            raise ValueError("a call without arguments")
        if not isinstance(made_by, _OpaqueType):  # which only keeps them
            for arg in args:
                self._left -= len(arg) if isinstance(arg, Sized) else 1
                if self._left < 0:
                    raise ValueError("it unfolds into too much")
        if made_by in (set, frozenset):
            for arg in args:
                _simple(*arg)
        elif made_by in (dict, OrderedDict):
            for arg in args:
                _simple(*(arg if isinstance(arg, dict) else [pair[0] for pair in arg]))
        elif not isinstance(made_by, (_OpaqueType, _Call)) and made_by is not complex:
            raise ValueError(f"it calls a {type(made_by).__name__}")
        self.append(made_by(*args))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self._call(self.stack.pop(), args)

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keywords, of which no checkpoint's values have any
        self.load_reduce()

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def _instantiate(self, made_by: Any, args: Any) -> None:  # of old protocols
        self._call(made_by, args)

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Opaque):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], OrderedDict):  # whose attributes (`_metadata`) say nothing of the weights
            raise ValueError(f"it gives a state to a {type(self.stack[-1]).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, (dict, Opaque)):
            raise ValueError(f"it sets items of a {type(target).__name__}")
        _simple(*items[::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(self.stack[-1], items)

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        made: dict[Any, Any] = {}
        self._set_items(made, self.pop_mark())
        self.append(made)

    dispatch[pickle.DICT[0]] = load_dict

    def load_additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise ValueError(f"it adds items to a {type(self.stack[-1]).__name__}")
        _simple(*items)
        self.stack[-1].update(items)

    dispatch[pickle.ADDITEMS[0]] = load_additems

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        _simple(*items)
        self.append(frozenset(items))

    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def load_bytearray8(self) -> None:
        """As in the standard library, but for allocating what the pickle claims before it has been read."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _simple(*keys: Any, deep: int = 2) -> None:
    """Raise `ValueError` for keys that could take long to hash: a tuple that holds itself forty times over does."""
    for key in keys:
        if isinstance(key, tuple) and deep and len(key) <= LONGEST_KEY:
            _simple(*key, deep=deep - 1)
        elif not (key is None or isinstance(key, (str, bytes, int, float, complex, Opaque, _DtypeName))):
            raise ValueError(f"a {type(key).__name__} is used as a key")


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str | None


@dataclass(frozen=True, slots=True)
class _DtypeName:
    dtype: str


@dataclass(slots=True)
class _Call:
    """A callable in a pickle. An object of its own, so that a pickle that writes to it changes nothing that outlives it."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _REBUILDERS[self.name](*args)


@dataclass(slots=True)
class _OpaqueType:
    kind: str

    def __call__(self, *args: Any, **kwargs: Any) -> Opaque:
        return Opaque(self.kind, args)


def _named(module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
        return OrderedDict
    if module in ("builtins", "__builtin__") and name in PLAIN:
        return PLAIN[name]
    if (module, name) in (("_codecs", "encode"), ("builtins", "bytearray"), ("builtins", "bytes"),
                          ("__builtin__", "bytearray"), ("__builtin__", "bytes"),
                          ("builtins", "getattr"), ("__builtin__", "getattr")):  # fmt: skip
        return _Call(name)
    if f"{module}.{name}" in _REBUILDERS:
        return _Call(f"{module}.{name}")
    if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
        return _StorageType(STORAGES[name])
    if module == "collections" and name in ("Counter", "defaultdict", "deque"):
        return _OpaqueType(f"collections.{name}")
    if module == "torch" and name in TORCH_DTYPES:
        return _DtypeName(TORCH_DTYPES[name])
    if module.split(".")[0] in FRAMEWORKS:
        return _OpaqueType(f"{module}.{name}")
    raise Refused(f"it names {module}.{name}, which no checkpoint needs and which is not executed")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
    if not (
        isinstance(storage, Storage) and all(isinstance(n, (tuple, list)) for n in (shape, stride)) and is_whole(offset)
    ):
        raise ValueError("a tensor is described in an unknown way")
    if len(shape) != len(stride) or len(shape) >= MAX_RANK or not all(is_whole(n) for n in (*shape, *stride)):
        raise ValueError("a tensor's shape or stride is none")
    for flags in rest:  # requires_grad, hooks, and what else it is
        if isinstance(flags, dict) and (flags.get("conj") or flags.get("neg")):
            raise Unsupported("it holds a tensor stored as its conjugate or negative")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride), storage.dtype)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
) -> StoredTensor:
    found = _tensor(storage, offset, shape, stride, *rest)
    if isinstance(dtype, _OpaqueType):
        raise Unsupported(f"it holds a tensor of type {dtype.kind}")
    if not isinstance(dtype, _DtypeName):
        raise ValueError("a tensor has an unknown element type")
    found.dtype = dtype.dtype
    return found


def is_whole(number: Any) -> bool:
    """True for an integer from 0 up that a file may mean."""
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 63


def attributes(value: Any, kind: str = "") -> Mapping[str, Any]:
    """The attributes of an `Opaque`, of a class whose name ends in `kind`; with slots, they are the second of two states.

    Raises `ValueError` for anything else.
    """
    if not (isinstance(value, Opaque) and value.kind.endswith(kind)):
        raise ValueError(f"a {kind or 'described object'} is missing")
    state = value.state[1] if isinstance(value.state, tuple) and len(value.state) == 2 else value.state
    if not isinstance(state, Mapping):
        raise ValueError(f"a {value.kind[-60:]} has no attributes")
    return state


def sizes(numbers: Any) -> tuple[int, ...]:
    """A shape or an offset, as a tuple. Raises `ValueError` for what is none."""
    if not (isinstance(numbers, (tuple, list)) and len(numbers) < MAX_RANK and all(map(is_whole, numbers))):
        raise ValueError("a shape or an offset is none")
    return tuple(numbers)


def _same(value: Any, *_: Any) -> Any:
    return value


def _typed(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes, which say nothing of its values, or of a subclass, whose state may: that one is opaque."""
    made = function(*args) if isinstance(function, (_Call, _OpaqueType)) and isinstance(args, tuple) else None
    name = getattr(kind, "kind", "a tensor subclass")
    if isinstance(made, StoredTensor) and name in PLAIN_TENSORS:
        return made
    return Opaque(name, (made,), state, holds_tensor=True)


def _nested(kind: Any, name: Any) -> _OpaqueType:
    """A class within a class of a framework, which old protocols write as getattr(outer, "Inner")."""
    if not (isinstance(kind, _OpaqueType) and isinstance(name, str)):
        raise Refused("it asks for an attribute of something that is no class")
    return _OpaqueType(f"{kind.kind}.{name[:100]}")


def _encode(text: Any, _encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str):
        raise ValueError("bytes are described in an unknown way")
    return text.encode("latin1")


def _bytes(value: Any = b"", encoding: Any = "latin1") -> bytes:
    if isinstance(value, str):
        return _encode(value, encoding)
    if not isinstance(value, (bytes, bytearray, list, tuple)):  # a number would make as many zeros
        raise ValueError("bytes are described in an unknown way")
    return bytes(value)


_REBUILDERS: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "getattr": _nested,
    "encode": _encode,
    "bytes": _bytes,
    "bytearray": lambda *args: bytearray(_bytes(*args)),
}
