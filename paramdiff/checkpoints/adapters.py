"""PEFT LoRA adapters: the update of every parameter, worked out of its two factors while it is read.

LoRA (arXiv 2106.09685) trains W + s·B·A with s = α/r, or α/√r for rsLoRA (2312.03732); DoRA (2402.09353) trains
m · (W + s·B·A) / ‖W + s·B·A‖ with the norm of each row. Values are given in float64, so that an update which a bf16 weight
swallows is still seen: against a bf16 base, `changed` counts the exact update and `changed_bf16` what a merged bf16 model
would show. (PEFT itself rounds the update to the adapter's type before it adds it to a bf16 weight, so that its merge may
differ by one rounding.)
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paramdiff.arrays import Array, numpy_arrays
from paramdiff.checkpoints import safetensors, torch_file
from paramdiff.checkpoints.base import Checkpoint, Located, TensorInfo
from paramdiff.checkpoints.derived import Derived
from paramdiff.checkpoints.places import Place, place, read_small
from paramdiff.dtypes import patterns, values
from paramdiff.errors import BrokenFile, PairingError, UnsupportedFormat

PREFIX = "base_model.model."
FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?"
    r"(?P<end>\.weight|\.bias)?"
)
TILE = 1 << 18  # elements of the update worked out together; whole rows, so that values do not depend on what is asked for
MERGE = "Merge it with PEFT (merge_and_unload) and compare the merged model."
# Initialisations that take the first B·A out of the base: base + B·A of the saved factors is not what was trained.
RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings that change the formula, when they are set.
OTHER_FORMULAS = {
    "layer_replication": "repeats layers", "target_parameters": "targets parameters within modules (expert stacks)",
    "trainable_token_indices": "trains single tokens", "alora_invocation_tokens": "is an activated LoRA",
    "use_qalora": "is a QA-LoRA", "arrow_config": "is an Arrow router", "use_bdlora": "is block-diagonal",
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """What a parameter's update is made of: names in the adapter's file, and how they are multiplied.

    `left` @ `right` is (rows, r) @ (r, cols) as stored, or both transposed and swapped where `transposed`.
    """

    left: str
    right: str
    scale: float
    transposed: bool = False
    magnitude: str | None = None  # of DoRA


def open(ref: str, located: Located, config: dict[str, Any] | None, key: str | None) -> Adapter:
    """Open an adapter: its tensors are the updates of the parameters it targets, and whole tensors that it saved.

    Raises `UnsupportedFormat` for what is no plain LoRA, `BrokenFile`.
    """
    path = located.files[0]
    settings = _settings(place(located.directory) / "adapter_config.json")
    container = safetensors if path.endswith(".safetensors") else torch_file
    stored: Checkpoint = container.open(ref, located, config, key)
    try:
        return Adapter(ref, stored, settings, path)
    except BaseException:
        stored.close()
        raise


def _settings(path: Place) -> dict[str, Any]:
    try:
        settings = json.loads(read_small(path, 10_000_000).decode("utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFile(f"Cannot read {path}: {error}.", hint="An adapter is read with its adapter_config.json.") from error
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UnsupportedFormat(f"{path} is of an adapter of type {str(kind)[:40]}, not LoRA.", hint=MERGE)
    for option, what in OTHER_FORMULAS.items():
        if settings.get(option):
            raise UnsupportedFormat(f"{path} is of an adapter that {what} ({option}), which is not read.", hint=MERGE)
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(RESIDUAL):
        raise UnsupportedFormat(
            f"{path}: an adapter that began as {start} belongs to a base from which its first B·A was taken, not to the "
            "published one.",
            hint=MERGE,
        )
    return settings


class Adapter(Derived):
    """An opened adapter. `updates` says what each target is made of, `whole` which tensors stand for themselves."""

    def __init__(self, ref: str, stored: Checkpoint, settings: Mapping[str, Any], path: str) -> None:
        self.updates, self.whole = _parts(stored, settings, path)
        names = ("base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "use_dora")
        about = {name: settings[name] for name in names if settings.get(name) is not None}
        made: list[Any] = [Update(_info(name, stored, factors), factors) for name, factors in self.updates.items()]
        made += [
            Renamed(_named(name, stored.tensors[key]), key) for name, key in self.whole.items() if name not in self.updates
        ]
        super().__init__(stored, made, ref=ref, facts={"format": "lora", "adapter": about})

    @property
    def stored(self) -> Checkpoint:
        """The adapter's own file."""
        return self._source

    @property
    def is_dora(self) -> bool:
        return any(factors.magnitude for factors in self.updates.values())


def _named(name: str, info: TensorInfo) -> TensorInfo:
    return TensorInfo(name, info.dtype, info.shape)


def _info(name: str, stored: Checkpoint, factors: Factors) -> TensorInfo:
    left, right = stored.tensors[factors.left].shape, stored.tensors[factors.right].shape
    shape = (right[1], left[0]) if factors.transposed else (left[0], right[1]) if len(left) == 2 else left
    return TensorInfo(name, "F64", shape, stored="dora" if factors.magnitude else "lora", read_bits=0)


def _parts(stored: Checkpoint, settings: Mapping[str, Any], path: str) -> tuple[dict[str, Factors], dict[str, str]]:
    """The factors of every target, by the parameter's name, and the name under which each whole tensor is stored."""
    found: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in stored.tensors:
        name = key.removeprefix(PREFIX)
        match = FACTOR.fullmatch(name)
        if match is not None:
            found.setdefault(match["module"], {})[match["part"] + (".bias" if match["end"] == ".bias" else "")] = key
        elif re.search(r"\.(lora_|token_adapter|ranknum)", name):
            raise UnsupportedFormat(f"{path} holds {key!r}, which is no part of a plain LoRA.", hint=MERGE)
        else:
            whole[re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", name)] = key
    updates: dict[str, Factors] = {}
    for module, parts in found.items():
        embedding = "lora_embedding_A" in parts
        try:
            a, b = (
                (parts["lora_embedding_A"], parts["lora_embedding_B"]) if embedding else (parts["lora_A"], parts["lora_B"])
            )
        except KeyError as error:
            raise BrokenFile(f"{path} lacks {error} of {module!r}.", hint="Copy the adapter again.") from error
        shape_a, shape_b = stored.tensors[a].shape, stored.tensors[b].shape
        if len(shape_a) != 2 or len(shape_b) != 2:
            raise UnsupportedFormat(f"{path} holds a LoRA of {module!r} that is no matrix ({list(shape_a)}).", hint=MERGE)
        rank = _by_pattern(settings.get("rank_pattern"), module, settings.get("r"), path)
        if not shape_a[0] == shape_b[1] == rank:
            raise BrokenFile(
                f"{path}: the factors of {module!r} are {list(shape_a)} and {list(shape_b)}, for a rank of {rank}."
            )
        alpha = _by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha"), path)
        scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
        transposed = embedding or bool(settings.get("fan_in_fan_out"))
        if transposed and "lora_magnitude_vector" in parts:
            raise UnsupportedFormat(f"{path} holds a DoRA of {module!r}, whose weight is stored transposed.", hint=MERGE)
        updates[f"{module}.weight"] = Factors(b, a, scale, transposed, parts.get("lora_magnitude_vector"))
        if "lora_B.bias" in parts:
            updates[f"{module}.bias"] = Factors(parts["lora_B.bias"], parts["lora_B.bias"], scale)
    return updates, whole


def _by_pattern(table: Any, module: str, default: Any, path: str) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's path decides (peft/utils/other.py)."""
    value = default
    for pattern, special in table.items() if isinstance(table, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                value = special
                break
        except re.error as error:
            raise BrokenFile(f"adapter_config.json beside {path} has a pattern that is none: {pattern[:80]!r}.") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise BrokenFile(f"adapter_config.json beside {path} gives {module!r} a rank or alpha of {str(value)[:40]}.")
    return value


@dataclass(frozen=True)
class Renamed:
    """A stored tensor under the name that the base has for it."""

    info: TensorInfo
    key: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.key,)

    def read_into(self, source: Checkpoint, offset: int, buffer: memoryview) -> None:
        source.read_into(self.key, offset, buffer)


@dataclass(frozen=True)
class Update:
    """The update of one parameter, read from the adapter's file."""

    info: TensorInfo
    factors: Factors

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.factors.left, self.factors.right)))

    def read_into(self, source: Checkpoint, offset: int, buffer: memoryview) -> None:
        _in_tiles(self.info.shape, offset, buffer, lambda first, last: update(source, self.factors, first, last))


@dataclass(frozen=True)
class Merged:
    """A parameter of the base with its update: `name` is the base's tensor, read as float64.

    Where the adapter saved a tensor of its own in the base's place, `key` is that one.
    """

    info: TensorInfo
    name: str
    factors: Factors | None
    adapter: Adapter
    key: str = ""

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name,)

    def read_into(self, source: Checkpoint, offset: int, buffer: memoryview) -> None:
        if self.factors is None:
            self.adapter.stored.read_into(self.key, offset, buffer)
        else:
            _in_tiles(self.info.shape, offset, buffer, lambda first, last: self._rows(source, first, last))

    def _rows(self, source: Checkpoint, first: int, last: int) -> Array:
        assert self.factors is not None
        width = math.prod(self.info.shape[1:])
        before, name = (self.adapter.stored, self.key) if self.key else (source, self.name)
        whole = read_float64(before, name, first * width, last * width).reshape(last - first, width)
        whole = whole + update(self.adapter.stored, self.factors, first, last)
        if self.factors.magnitude is not None:
            magnitude = read_float64(self.adapter.stored, self.factors.magnitude, first, last)
            norms = np.sqrt((whole * whole).sum(axis=1))
            whole = whole * (magnitude / norms)[:, None]
        return whole


def _in_tiles(shape: tuple[int, ...], offset: int, buffer: memoryview, rows: Any) -> None:
    """Fill `buffer` from byte `offset` on with float64 rows, worked out in tiles at fixed places."""
    if not len(buffer):
        return
    width = math.prod(shape[1:])
    height = max(1, TILE // max(width, 1))
    first, end = offset // 8, (offset + len(buffer) + 7) // 8
    out, at = np.frombuffer(buffer, dtype=np.uint8), 0
    for tile in range(first // width // height, -(-end // (width * height))):
        top, bottom = tile * height, min((tile + 1) * height, shape[0])
        raw = np.ascontiguousarray(rows(top, bottom), dtype=np.float64).reshape(-1).view(np.uint8)
        part = raw[max(0, offset - top * width * 8) :][: len(out) - at]
        out[at : at + len(part)] = part
        at += len(part)


def update(stored: Checkpoint, factors: Factors, first: int, last: int) -> Array:
    """Rows `first` to `last` of s·B·A, float64; of a bias, as one column."""
    if factors.left == factors.right:
        return factors.scale * read_float64(stored, factors.left, first, last)[:, None]
    left, right = _matrices(stored, factors)
    return factors.scale * (left[first:last] @ right)


_kept = threading.local()  # the two factors of one parameter for each thread: blocks of it are read one after the other


def _matrices(stored: Checkpoint, factors: Factors) -> tuple[Array, Array]:
    if getattr(_kept, "of", None) != (id(stored), factors):
        b, a = (
            read_float64(stored, name, 0, stored.tensors[name].numel).reshape(stored.tensors[name].shape)
            for name in (factors.left, factors.right)
        )
        _kept.matrices = (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if factors.transposed else (b, a)
        _kept.of, _kept.owner = (id(stored), factors), stored  # which keeps the id from being given to another
    found: tuple[Array, Array] = _kept.matrices
    return found


def read_float64(checkpoint: Checkpoint, name: str, first: int, last: int) -> Array:
    """Elements `first` to `last` of a tensor, as float64."""
    info = checkpoint.tensors[name]
    raw = np.empty((last - first) * info.type.bits // 8, dtype=np.uint8)
    checkpoint.read_into(name, first * info.type.bits // 8, memoryview(raw))  # type: ignore[arg-type]
    x = numpy_arrays()
    return values(x, info.type, patterns(x, info.type, raw), "f64")


def beside(base: Checkpoint, tuned: Checkpoint, again: Callable[[], Checkpoint]) -> Checkpoint:
    """What an adapter (or a model) is compared as, beside a base: an adapter with an adapter as it is, with a model merged.

    `again` opens the base once more, to be read and closed with the merged model. Raises `PairingError`.
    """
    if isinstance(base, Adapter) and isinstance(tuned, Adapter):
        for side in (base, tuned):
            if side.is_dora:
                raise PairingError(
                    f"{side.ref} is a DoRA, whose update depends on the base, so that it cannot be compared without one.",
                    hint="Compare each with the base.",
                )
        return tuned
    if isinstance(base, Adapter):
        raise PairingError(
            f"{base.ref} is an adapter, and {tuned.ref} a model.",
            hint="Give the model that the adapter was trained on first.",
        )
    assert isinstance(tuned, Adapter)
    model = again()
    try:
        return merged(model, tuned)
    except BaseException:
        model.close()
        raise


def merged(base: Checkpoint, adapter: Adapter) -> Derived:
    """The base with an adapter added to it, tensor by tensor; float64 where the adapter has an update.

    Raises `PairingError` where the adapter does not fit the base.
    """
    made = []
    for name, factors in adapter.updates.items():
        info = adapter.tensors[name]
        target = _target(base, adapter, name, info.shape)
        info = replace(info, read_bits=base.tensors[target].bits_read)
        made.append(Merged(info, target, factors, adapter, adapter.whole.get(name, "")))
    for name, key in adapter.whole.items():
        if name in adapter.updates:
            continue
        stored = _named(name, adapter.stored.tensors[key])
        resized = name if name in base.tensors and base.tensors[name].shape != stored.shape else None
        made.append(Merged(stored, resized or _target(base, adapter, name, stored.shape), None, adapter, key))
    targets = {one.info.name for one in made}
    shared = {one.name for one in made if one.name != one.info.name} - targets  # an embedding that a tied head came from
    facts = {**adapter.facts(), "base": base.ref, "tensors": len({*base.tensors, *targets})}
    return Derived(base, made, ref=adapter.ref, also=(adapter,), keep=shared, facts=facts)


def _target(base: Checkpoint, adapter: Adapter, name: str, shape: tuple[int, ...]) -> str:
    """The base's tensor that an update belongs to; a tied head's is the embedding."""
    found = name
    if name not in base.tensors and name.endswith("lm_head.weight"):
        found = next((other for other in base.tensors if other.endswith("embed_tokens.weight")), name)
    if found not in base.tensors:
        raise PairingError(
            f"The adapter {adapter.ref} has an update of {name!r}, which {base.ref} lacks.",
            hint="Give the base that the adapter was trained on.",
        )
    if base.tensors[found].shape != shape or base.tensors[found].type.kind != "float":
        raise PairingError(
            f"The adapter {adapter.ref} has an update of {name!r} of {list(shape)}, where {base.ref} has "
            f"{base.tensors[found].dtype} of {list(base.tensors[found].shape)}."
        )
    return found
