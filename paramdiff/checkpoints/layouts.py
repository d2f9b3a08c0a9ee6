"""Directories that trainers leave behind, recognised by the names in them: which container, and in which sub-directory."""

from __future__ import annotations

import re
from os import fspath

from paramdiff.checkpoints.base import Located
from paramdiff.checkpoints.places import Place, read_small
from paramdiff.errors import BrokenFile, CheckpointError, UnsupportedFormat

RANK_FILE = re.compile(r"model_world_size_(?P<size>\d+)_rank_(?P<rank>\d+)\.pt")
ZERO_FILE = re.compile(r".*_optim_states\.pt")
DCP_HF_FILE = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
UNREAD = {  # files or directories whose several parts make up one model → what they are, and the way out
    r"mp_rank_\d\d(_\d+)*": ("the parts of Megatron's old format", "Convert it to torch_dist or to Hugging Face first."),
    r"pytorch_model_fsdp_\d+_rank\d+\.bin": (
        "the parts that FSDP saves as LOCAL_STATE_DICT", "Save with SHARDED_STATE_DICT or FULL_STATE_DICT.",
    ),
}  # fmt: skip
STEP = re.compile(r"(?P<kind>checkpoint|global_step|step|iter|epoch|ckpt)[-_]?(?P<number>\d+)(?!\d).*")
# Where the weights lie below the directory of one step (verl, SkyRL, NeMo-RL, prime-rl, accelerate, Megatron), in turn.
INSIDE = ("actor", "policy", "trainer", "weights", "model", "pytorch_model_fsdp_0", "dist_ckpt", "weight", "huggingface")
DEEPEST = 4  # directories within directories that are looked into
MAX_TAG_BYTES = 200  # of DeepSpeed's file `latest`, which names a directory


def recognise(path: Place, names: list[str]) -> Located | None:
    """The checkpoint of many ranks that lies in this directory itself, or None.

    Raises `BrokenFile` for incomplete ones, `UnsupportedFormat` for kinds that are known but not read.
    """
    everything = [entry.name for entry in path.iterdir()]
    for pattern, (kind, way_out) in UNREAD.items():
        parts = [name for name in everything if re.fullmatch(pattern, name)]
        if len(parts) > 1:
            raise UnsupportedFormat(
                f"{path} holds {kind} ({len(parts)} of them), which this version does not read.", hint=way_out
            )
    if ".metadata" in names:
        return Located([fspath(path / ".metadata")], _config_near(path), "dcp")
    if any(name.endswith(".distcp") for name in names):
        raise BrokenFile(
            f"{path} holds .distcp files but no .metadata, which is written last: the save was cut short.",
            hint="Copy the directory again, or take an earlier checkpoint.",
        )
    ranks = [match for name in names if (match := RANK_FILE.fullmatch(name))]
    if ranks:
        return Located([fspath(path / name) for name in all_ranks(path, ranks)], _config_near(path), "ranks")
    shards = [name for name in names if DCP_HF_FILE.fullmatch(name)]
    if shards:
        return Located([fspath(path / name) for name in shards], _config_near(path), "dcp_hf")
    if any(ZERO_FILE.fullmatch(name) for name in names):
        return Located([fspath(path / name) for name in names if name.endswith("_states.pt")], _config_near(path), "zero")
    if "zero" in (entry.name for entry in path.iterdir() if entry.is_dir()) and any(path.glob("zero/*/fp32.pt")):
        files = sorted(map(fspath, path.glob("zero/*/fp32.pt")))
        return Located(files, _config_near(path), "universal")
    return None


def all_ranks(path: Place, ranks: list[re.Match[str]]) -> list[str]:
    """The names of rank files in the order of ranks. Raises `BrokenFile` where one is missing."""
    sizes = sorted({int(match["size"]) for match in ranks})
    if len(sizes) > 1:
        raise BrokenFile(
            f"{path} holds rank files of different world sizes ({', '.join(map(str, sizes))}), so of different saves.",
            hint="Move those of one save into a directory of their own.",
        )
    by_rank = {int(match["rank"]): match.string for match in ranks}
    if len(by_rank) != len(ranks) or max(by_rank) >= sizes[0]:
        raise BrokenFile(f"{path} holds rank files whose numbers do not fit a world size of {sizes[0]}.")
    kind = ranks[0].string.partition("_")[0]
    missing = next((rank for rank in range(sizes[0]) if rank not in by_rank), None)
    if missing is not None:
        raise BrokenFile(
            f"{path} lacks the file of rank {missing} of {sizes[0]}: {kind}_world_size_{sizes[0]}_rank_{missing}.pt.",
            hint="Copy it from the machine that wrote it.",
        )
    return [by_rank[rank] for rank in range(sizes[0])]


def _config_near(path: Place) -> str:
    """The directory whose config.json describes these weights: their own, `huggingface` within, or those above."""
    for directory in (path, path / "huggingface", path.parent, path.parent / "huggingface"):
        if (directory / "config.json").is_file():
            return fspath(directory)
    return fspath(path)


def inside(path: Place, depth: int = 0) -> tuple[Place, list[str]] | None:
    """The directory below that holds the weights of this step, and the names of others beside it, or None."""
    if depth >= DEEPEST:
        return None
    below = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    tagged = tags(path, below)
    for name in [*tagged, *(one for one in INSIDE if one in below)]:
        found = path / name
        if not holds_weights(found, depth + 1):
            continue
        others = [other for other in below if other != name and holds_weights(path / other, depth + 1)]
        return found, others
    return None


def tags(path: Place, below: list[str]) -> list[str]:
    """DeepSpeed's directory within: the one that `latest` names, else the only one that there is."""
    try:
        tag = read_small(path / "latest", MAX_TAG_BYTES).decode("utf-8").strip()
        if tag in below:
            return [tag]
    except (OSError, ValueError, CheckpointError):
        pass
    found = [name for name in below if any(ZERO_FILE.fullmatch(entry.name) for entry in (path / name).iterdir())]
    return found if len(found) == 1 else []


def holds_weights(path: Place, depth: int = 0) -> bool:
    """True for a directory that could be read, itself or through one of those within."""
    from paramdiff.checkpoints.locate import FAMILIES

    names = [entry.name for entry in path.iterdir() if not entry.is_dir()]
    if any(family.weights(names) for family in FAMILIES) or "adapter_config.json" in names:
        return True
    try:
        return recognise(path, names) is not None or inside(path, depth) is not None
    except (BrokenFile, UnsupportedFormat):
        return True  # that is where the error should come from


def newest(path: Place) -> str | None:
    """The sub-directory of the latest step (`checkpoint-500`, `global_step_40`, …), or None."""
    steps = [match for entry in path.iterdir() if entry.is_dir() and (match := STEP.fullmatch(entry.name))]
    return max(steps, key=lambda match: int(match["number"])).string if steps else None
