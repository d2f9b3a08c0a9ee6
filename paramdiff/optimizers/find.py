"""From what the user typed to the file or directory that holds the optimizer's state."""

from __future__ import annotations

import re
from os import fspath

from paramdiff.checkpoints import layouts
from paramdiff.checkpoints.places import Place, place
from paramdiff.errors import BrokenFile, NotFound

FILES = ("optimizer.pt", "optimizer.bin", "optimizer.pth")  # Trainer, accelerate (FULL_STATE_DICT)
RANK_FILE = re.compile(r"optim_world_size_(?P<size>\d+)_rank_(?P<rank>\d+)\.pt")
# Where the state lies below the directory of one step, in turn.
INSIDE = ("optimizer_0", "optimizer", "optim", "actor", "policy", "trainer", "pytorch_model", "model", "dist_ckpt")
TORCH = (".pt", ".pth", ".ckpt", ".zip")
DEEPEST = 4


def find(ref: str) -> tuple[str, str]:
    """(kind of source, path) of the optimizer state that a reference means.

    Raises `NotFound` where there is none.
    """
    path = place(ref)
    try:
        if path.is_dir():
            found = _directory(path)
            if found is not None:
                return found
            raise _nothing_in(ref, path)
        if not path.exists():
            raise NotFound(f"No such path: {ref}.", hint="Give a checkpoint with optimizer state, or its file.")
    except OSError as error:
        raise NotFound(f"Cannot look at {ref}: {error.strerror}.") from error
    if path.name == ".metadata" or path.suffix == ".distcp":
        return "dcp", fspath(path.parent)
    if RANK_FILE.fullmatch(path.name):
        return "ranks", fspath(path.parent)
    if layouts.ZERO_FILE.fullmatch(path.name):
        return "zero", fspath(path.parent)
    return "torch", fspath(path)


def _directory(path: Place, depth: int = 0) -> tuple[str, str] | None:
    names = sorted(entry.name for entry in path.iterdir())
    for name in FILES:
        if (path / name).is_file():
            return "torch", fspath(path / name)
    if any(RANK_FILE.fullmatch(name) for name in names):
        return "ranks", fspath(path)
    if any(layouts.ZERO_FILE.fullmatch(name) for name in names):
        return "zero", fspath(path)
    if ".metadata" in names:
        return "dcp", fspath(path)
    if any(path.glob("zero/*/exp_avg.pt")):
        return "universal", fspath(path)
    if depth < DEEPEST:
        below = [name for name in names if (path / name).is_dir()]
        for name in [*layouts.tags(path, below), *(one for one in INSIDE if one in below)]:
            found = _directory(path / name, depth + 1)
            if found is not None:
                return found
    files = [name for name in names if name.endswith(TORCH) and not _is_other(name) and (path / name).is_file()]
    states = [name for name in files if "optim" in name] or files
    if len(states) > 1:
        raise BrokenFile(f"{path} holds {len(states)} files that may hold a state.", hint=f"Name one: {path / states[0]}.")
    return ("torch", fspath(path / states[0])) if states else None


def _is_other(name: str) -> bool:
    """True for files beside a state that hold none."""
    return bool(
        re.match(r"(scheduler|scaler|rng_state|random_states|training_args|model_world_size|extra_state|consolidated)", name)
    )


def _nothing_in(ref: str, path: Place) -> NotFound:
    newest = layouts.newest(path)
    if newest is not None:
        return NotFound(
            f"{ref} is the directory of a run, which holds the checkpoints of several steps.",
            hint=f"Give one of them; the newest is {path / newest}.",
        )
    return NotFound(
        f"{ref} holds no optimizer state.",
        hint="Trainer writes optimizer.pt unless save_only_model is set; give a checkpoint that was saved to resume from.",
    )
