"""From what the user typed to the files that hold the weights, saying what was left aside."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from paramdiff.checkpoints.base import Located
from paramdiff.errors import BrokenFile, CheckpointError, NotFound, UnsupportedFormat

INDEX_SUFFIX = ".safetensors.index.json"
MODEL_STEMS = ("model", "diffusion_pytorch_model")  # transformers, diffusers: preferred where several files lie together
MAX_JSON_BYTES = 100_000_000  # of an index or a config
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<total>\d{5,})\.safetensors")
OTHER_FORMATS = {  # pattern → what it is; the sentence that a user of it gets
    "adapter_model.safetensors": "a PEFT adapter without its base",
    "adapter_model.bin": "a PEFT adapter without its base",
    "*.distcp": "a torch.distributed checkpoint (DCP)",
    "*.index.json": "a sharded torch checkpoint (.bin)",
    "*.bin": "a torch checkpoint (.bin)",
    "*.pt": "a torch checkpoint (.pt)",
    "*.pth": "a torch checkpoint (.pth)",
    "*.ckpt": "a torch checkpoint (.ckpt)",
    "*.gguf": "a GGUF file",
    "*.npz": "a numpy archive",
    "*.msgpack": "a Flax checkpoint",
    "*.h5": "a TensorFlow checkpoint",
}


def locate(ref: str) -> Located:
    """Find the safetensors files of a path: a file, an index, or a directory in one of the usual layouts.

    A directory is read as transformers reads it: `model.safetensors`, else the index, else one complete set of shards,
    else the only file there is. Leftovers are named in `warnings`. Raises `NotFound`, `UnsupportedFormat` or `BrokenFile`.
    """
    try:
        path = Path(ref).expanduser()
        if path.is_dir():
            return _directory(ref, path)
        if not path.exists():
            raise _no_such_path(ref)
    except RuntimeError as error:
        raise NotFound(f"No such path: {ref} (there is no such user).") from error
    except OSError as error:  # a parent that may not be searched, a name that is too long
        raise NotFound(f"Cannot look at {ref}: {error.strerror}.") from error
    if path.name.endswith(INDEX_SUFFIX):
        return _from_index(path)
    if path.suffix == ".safetensors":
        return Located([str(path)], str(path.parent))
    raise UnsupportedFormat(
        f"{ref} is {_kind_of(path) or 'not a safetensors file'}, which this version does not read.",
        hint="Give a .safetensors file, a .safetensors.index.json or the directory that holds them.",
    )


def read_config(directory: str) -> dict[str, Any] | None:
    """config.json beside the weights, or None: it is a help in pairing, never a condition."""
    try:
        config = _read_json(Path(directory) / "config.json")
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _read_json(path: Path) -> Any:
    """A JSON file of bounded size; not a pipe, which would hang, nor a device."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"it is over {MAX_JSON_BYTES:,} bytes long")
    return json.loads(path.read_text(encoding="utf-8"))


def _no_such_path(ref: str) -> CheckpointError:
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", ref) and not ref.startswith("."):
        return NotFound(
            f"No such path: {ref}.",
            hint=f"If it is a Hub id: this version reads local files only, so run `{_download(ref)}` first.",
        )
    return NotFound(f"No such path: {ref}.", hint="Give a checkpoint's directory or one of its files.")


def _download(ref: str) -> str:
    repository, _, revision = ref.partition("@")
    return f"hf download {repository}" + (f" --revision {revision}" if revision else "")


def _directory(ref: str, path: Path) -> Located:
    names = sorted(entry.name for entry in path.iterdir() if not entry.is_dir())
    weights = [name for name in names if name.endswith(".safetensors") and name != "adapter_model.safetensors"]
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if not weights and not indices:
        raise _nothing_in(ref, path, names)
    located = _pick(ref, path, weights, indices)
    if "adapter_model.safetensors" in names:
        located.warnings.append(f"{path}: adapter_model.safetensors ignored; the model beside it is read without it.")
    return located


def _pick(ref: str, path: Path, weights: list[str], indices: list[str]) -> Located:
    for stem in MODEL_STEMS:
        if f"{stem}.safetensors" in weights:
            return _chosen(path, [f"{stem}.safetensors"], weights)
        if stem + INDEX_SUFFIX in indices:
            return _from_index(path / (stem + INDEX_SUFFIX), weights)
    if len(indices) == 1:
        return _from_index(path / indices[0], weights)
    if indices:
        raise BrokenFile(f"{ref} holds several indices ({', '.join(indices)}).", hint="Name the one to read.")
    return _without_index(ref, path, weights)


def _without_index(ref: str, path: Path, weights: list[str]) -> Located:
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in weights:
        if match := SHARD.fullmatch(name):
            sets.setdefault((match["stem"], int(match["total"])), {})[int(match["number"])] = name
    complete = [s for (_, total), s in sets.items() if sorted(s) == list(range(1, total + 1))]
    if len(complete) == 1:
        return _chosen(path, [complete[0][number] for number in sorted(complete[0])], weights)
    if len(complete) > 1 or (not sets and len(weights) > 1):
        raise BrokenFile(
            f"{ref} holds {len(weights)} safetensors files without an index, and which of them are the model is unclear "
            f"({', '.join(weights[:3])}{', …' if len(weights) > 3 else ''}).",
            hint="Name one file, or remove what does not belong.",
        )
    if sets:
        (stem, total), shards = max(sets.items(), key=lambda item: len(item[1]))
        number = next(n for n in range(1, total + 1) if n not in shards)
        raise BrokenFile(
            f"Shard {number} of {total} is missing in {ref}: {stem}-{number:05d}-of-{total:05d}.safetensors.",
            hint="Download it again.",
        )
    return _chosen(path, weights, weights)


def _from_index(index: Path, weights: list[str] | None = None) -> Located:
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
    located = _chosen(index.parent, shards, weights or [])
    located.shard_of = {tensor: str(index.parent / shard) for tensor, shard in weight_map.items()}
    return located


def _chosen(directory: Path, files: list[str], weights: list[str]) -> Located:
    aside = [name for name in weights if name not in files]
    warnings = []
    if aside:
        listed = ", ".join(aside[:3]) + (f" and {len(aside) - 3} more" if len(aside) > 3 else "")
        used = files[0] if len(files) == 1 else f"the {len(files)} shards of the model"
        warnings.append(f"{directory}: {listed} ignored; {used} read.")
    return Located([str(directory / name) for name in files], str(directory), warnings=warnings)


def _nothing_in(ref: str, path: Path, names: list[str]) -> CheckpointError:
    for pattern, kind in OTHER_FORMATS.items():
        if any(Path(name).match(pattern) for name in names):
            return UnsupportedFormat(
                f"{ref} holds {kind}, which this version does not read.", hint="Export the model as safetensors first."
            )
    below = sorted(sub.name for sub in path.iterdir() if sub.is_dir() and any(sub.glob("*.safetensors")))
    if below:
        return NotFound(
            f"{ref} holds no weights itself, but {', '.join(below[:8])}{' …' if len(below) > 8 else ''} below it do.",
            hint=f"Give one of them: {path / below[-1]}.",
        )
    return NotFound(f"{ref} is {'an empty directory' if not names else 'a directory without safetensors files'}.")


def _kind_of(path: Path) -> str | None:
    return next((kind for pattern, kind in OTHER_FORMATS.items() if path.match(pattern)), None)
