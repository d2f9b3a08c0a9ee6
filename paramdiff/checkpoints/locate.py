"""From what the user typed to the files that hold the weights, saying what was left aside."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from os import fspath
from pathlib import Path
from typing import Any

from paramdiff.checkpoints import hub, layouts
from paramdiff.checkpoints.base import Located
from paramdiff.checkpoints.places import Place, WebPath, place, read_small
from paramdiff.errors import BrokenFile, CheckpointError, NotFound, UnsupportedFormat


@dataclass(frozen=True)
class Family:
    """Files of one format: how they, their indices and their shards are named, and what beside them holds no weights."""

    format: str
    suffixes: tuple[str, ...]
    index: tuple[str, ...]
    stems: tuple[str, ...]  # transformers, diffusers: preferred where several files lie together
    others: re.Pattern[str]

    def weights(self, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(self.suffixes) and not self.others.fullmatch(name)]

    def indices(self, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(self.index)]


SAFETENSORS = Family(
    "safetensors", (".safetensors",), (".safetensors.index.json",), ("model", "diffusion_pytorch_model"),
    re.compile(r"adapter_model\.safetensors"),
)  # fmt: skip
TORCH = Family(
    "torch", (".bin", ".pt", ".pth", ".ckpt"), (".bin.index.json", ".pt.index.json", ".pth.index.json"),
    ("pytorch_model", "diffusion_pytorch_model", "model", "pytorch_model_fsdp", "consolidated.00"),
    re.compile(r"adapter_model\.bin|training_args\.bin|(optimizer|scheduler|scaler|rng_state|random_states|trainer_state).*"
               r"|.*(optim_states|_rank_\d+|optim)\.(pt|pth|bin)"),
)  # fmt: skip
FAMILIES = (SAFETENSORS, TORCH)  # where a directory holds both, the first is read: exports repeat themselves
MAX_JSON_BYTES = 100_000_000  # of an index or a config
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<total>\d{5,})\.\w+")
OTHER_FORMATS = {  # pattern → what it is; the sentence that a user of it gets
    "adapter_model.safetensors": "a PEFT adapter without its adapter_config.json",
    "adapter_model.bin": "a PEFT adapter without its adapter_config.json",
    "*.gguf": "a GGUF file",
    "*.npz": "a numpy archive",
    "*.msgpack": "a Flax checkpoint",
    "*.h5": "a TensorFlow checkpoint",
}


def locate(ref: str) -> Located:
    """Find the weight files of a path: a file, an index, or a directory in one of the usual layouts.

    A directory is read as transformers reads it: safetensors before torch files; `model.safetensors`, else the index, else
    one complete set of shards, else the only file there is. Leftovers are named in `warnings`.
    Raises `NotFound`, `UnsupportedFormat` or `BrokenFile`.
    """
    try:
        path = place(ref)
        ref = str(path) if isinstance(path, WebPath) else ref
        if path.is_dir():
            located = _directory(ref, path)
            if isinstance(path, hub.HubPath) and path.repository.warning:
                located.warnings.append(path.repository.warning)
            return located
        if not path.exists():
            raise _no_such_path(ref)
    except OSError as error:  # a parent that may not be searched, a name that is too long
        raise NotFound(f"Cannot look at {ref}: {error.strerror}.") from error
    if (
        path.name == ".metadata" or path.suffix == ".distcp" or layouts.DCP_HF_FILE.fullmatch(path.name)
    ):  # parts of the directory, which is what was meant
        return _directory(ref, path.parent)
    if path.name.startswith("adapter_model.") and (path.parent / "adapter_config.json").exists():
        return Located([fspath(path)], fspath(path.parent), "adapter")
    for family in FAMILIES:
        if path.name.endswith(family.index):
            return _from_index(path, family)
        if path.suffix in family.suffixes and not _kind_of(path):
            return Located([fspath(path)], fspath(path.parent), family.format)
    raise UnsupportedFormat(
        f"{ref} is {_kind_of(path) or 'neither a safetensors nor a torch file'}, which this version does not read.",
        hint="Give a .safetensors, .bin, .pt or .pth file, an index of such files or the directory that holds them.",
    )


def read_config(directory: str) -> dict[str, Any] | None:
    """config.json beside the weights, or None: it is a help in pairing, never a condition."""
    try:
        config = _read_json(place(directory) / "config.json")
    except (OSError, ValueError, RecursionError, NotFound):
        return None
    return config if isinstance(config, dict) else None


def _read_json(path: Place) -> Any:
    """A JSON file of bounded size."""
    return json.loads(read_small(path, MAX_JSON_BYTES).decode("utf-8"))


def _no_such_path(ref: str) -> CheckpointError:
    if hub.looks_like(ref):  # beside others that are there
        return NotFound(f"No such path: {ref}.", hint=f"If it is a model on the Hub, write {hub.SCHEME}{ref}.")
    return NotFound(f"No such path: {ref}.", hint="Give a checkpoint's directory or one of its files.")


def _directory(ref: str, path: Place) -> Located:
    names = sorted(entry.name for entry in path.iterdir() if not entry.is_dir())
    distributed = layouts.recognise(path, names)
    if distributed is not None:
        return distributed
    adapter = next((name for name in names if name in ("adapter_model.safetensors", "adapter_model.bin")), None)
    family = next((one for one in FAMILIES if one.weights(names) or one.indices(names)), None)
    if family is not None:
        located = _pick(ref, path, family, names)
        if adapter:
            located.warnings.append(f"{path}: {adapter} ignored; the model beside it is read without it.")
        within = layouts.inside(path)
        if within is not None:
            located.warnings.append(f"{path}: {within[0].name}/ ignored; it may hold the same weights with more digits.")
        return located
    if adapter and "adapter_config.json" in names:
        return Located([fspath(path / adapter)], str(path), "adapter")
    within = layouts.inside(path)
    if within is None:
        raise _nothing_in(ref, path, names)
    chosen, others = within
    located = _directory(fspath(chosen), chosen)
    if others:
        aside = ", ".join(f"{name}/" for name in others[:4])
        located.warnings.append(f"{path}: {chosen.name}/ is read, not {aside}.")
    return located


def _pick(ref: str, path: Place, family: Family, names: list[str]) -> Located:
    weights, indices = family.weights(names), family.indices(names)
    for stem in family.stems:
        for suffix in family.suffixes:
            if f"{stem}{suffix}" in weights:
                return _chosen(path, [f"{stem}{suffix}"], weights, family)
        for suffix in family.index:
            if stem + suffix in indices:
                return _from_index(path / (stem + suffix), family, weights)
    if len(indices) == 1:
        return _from_index(path / indices[0], family, weights)
    if indices:
        raise BrokenFile(f"{ref} holds several indices ({', '.join(indices)}).", hint="Name the one to read.")
    return _without_index(ref, path, weights, family)


def _without_index(ref: str, path: Place, weights: list[str], family: Family) -> Located:
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in weights:
        if match := SHARD.fullmatch(name):
            sets.setdefault((match["stem"], int(match["total"])), {})[int(match["number"])] = name
    complete = [s for (_, total), s in sets.items() if sorted(s) == list(range(1, total + 1))]
    if len(complete) == 1:
        return _chosen(path, [complete[0][number] for number in sorted(complete[0])], weights, family)
    if len(complete) > 1 or (not sets and len(weights) > 1):
        raise BrokenFile(
            f"{ref} holds {len(weights)} {family.format} files without an index, and which of them are the model is unclear "
            f"({', '.join(weights[:3])}{', …' if len(weights) > 3 else ''}).",
            hint="Name one file, or remove what does not belong.",
        )
    if sets:
        (stem, total), shards = max(sets.items(), key=lambda item: len(item[1]))
        number = next(n for n in range(1, total + 1) if n not in shards)
        raise BrokenFile(
            f"Shard {number} of {total} is missing in {ref}: {stem}-{number:05d}-of-{total:05d}"
            f"{Path(next(iter(shards.values()))).suffix}.",
            hint="Download it again.",
        )
    return _chosen(path, weights, weights, family)


def _from_index(index: Place, family: Family, weights: list[str] | None = None) -> Located:
    try:
        content = _read_json(index)
        weight_map = content["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not all(isinstance(name, str) and Path(name).name == name and len(name.encode()) < 256 for name in shards):
            raise ValueError("a shard's name is not a plain file name")
    except OSError as error:
        raise BrokenFile(f"Cannot read {index}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFile(f"{index} is not a valid index: {error or type(error).__name__}.") from error
    for number, name in enumerate(shards, 1):
        if not (index.parent / name).exists():
            raise BrokenFile(
                f"Shard {number} of {len(shards)} is missing: {index.parent / name}, which {index.name} names.",
                hint="Download it again.",
            )
    located = _chosen(index.parent, shards, weights or [], family)
    located.shard_of = {tensor: fspath(index.parent / shard) for tensor, shard in weight_map.items()}
    return located


def _chosen(directory: Place, files: list[str], weights: list[str], family: Family) -> Located:
    aside = [name for name in weights if name not in files]
    warnings = []
    if aside:
        listed = ", ".join(aside[:3]) + (f" and {len(aside) - 3} more" if len(aside) > 3 else "")
        used = files[0] if len(files) == 1 else f"the {len(files)} shards of the model"
        warnings.append(f"{directory}: {listed} ignored; {used} read.")
    return Located([fspath(directory / name) for name in files], fspath(directory), family.format, warnings=warnings)


def _nothing_in(ref: str, path: Place, names: list[str]) -> CheckpointError:
    newest = layouts.newest(path)
    if newest is not None:
        return NotFound(
            f"{ref} is the directory of a run, which holds the checkpoints of several steps.",
            hint=f"Give one of them; the newest is {path / newest}.",
        )
    for pattern, kind in OTHER_FORMATS.items():
        if any(Path(name).match(pattern) for name in names):
            return UnsupportedFormat(
                f"{ref} holds {kind}, which this version does not read.", hint="Export the model as safetensors first."
            )
    below = sorted(sub.name for sub in path.iterdir() if sub.is_dir() and layouts.holds_weights(sub))
    if below:
        return NotFound(
            f"{ref} holds no weights itself, but {', '.join(below[:8])}{' …' if len(below) > 8 else ''} below it do.",
            hint=f"Give one of them: {path / below[-1]}.",
        )
    return NotFound(f"{ref} is {'an empty directory' if not names else 'a directory without weights'}.")


def _kind_of(path: Place) -> str | None:
    return next((kind for pattern, kind in OTHER_FORMATS.items() if path.match(pattern)), None)
