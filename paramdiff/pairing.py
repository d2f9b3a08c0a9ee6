"""Pairing: which tensors of k checkpoints are read side by side, by which rule, and what is left over and why.

Nothing is dropped in silence: every stored tensor of every side ends up in `Alignment.tensors` or in `Alignment.coverage`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paramdiff import names, renaming
from paramdiff.checkpoints import Checkpoint, TensorInfo
from paramdiff.dtypes import Compute, compute_type
from paramdiff.errors import NothingToCompare, OptionError
from paramdiff.renaming import Side

CODES = "codes"  # the rule of a row that compares what is stored of two quantised weights
REASONS = {
    "only_base": "only in the base",
    "only_tuned": "only in the tuned side",
    "shape_mismatch": "of shapes that differ, and no rule relates them",
    "resized": "with rows that only one side has (the common rows were compared)",
    "not_numeric": "of a type without arithmetic",
    "excluded": "left out by --include/--exclude",
}


@dataclass(frozen=True, slots=True)
class Aligned:
    """k tensors read in lock-step.

    `shape` is what is compared (the common part), `rows` × `cols` its matrix view: a matrix as it is, a stack of expert
    matrices as (experts · out, in), another tensor of three or more dimensions, such as a convolution, as (out, rest),
    anything else as one row. `duplicate_of` names the parameter that this one is tied to; roll-ups skip it. `same_file`:
    both sides are the same bytes of files with the same hash, so that one is read.
    """

    name: str
    sides: tuple[TensorInfo, ...]
    shape: tuple[int, ...]
    rule: str
    compute: Compute
    duplicate_of: str | None = None
    same_file: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_codes(self) -> bool:
        """True for what is stored of a quantised weight, compared beside its values and left out of every total."""
        return self.rule == CODES

    @property
    def is_matrix(self) -> bool:
        """True where rows and columns mean something: not for vectors, scalars and packed types."""
        return len(self.shape) >= 2 and not self.is_packed and not self._stacks_vectors

    @property
    def is_packed(self) -> bool:
        """True for several dimensions of a type that shares bytes, whose rows need not begin at one."""
        return len(self.shape) >= 2 and any(side.type.bits < 8 for side in self.sides)

    @property
    def rows(self) -> int:
        if not self.is_matrix:
            return min(self.numel, 1)
        return math.prod(self.shape[:-1]) if self.is_stack else self.shape[0]

    @property
    def cols(self) -> int:
        return self.numel // self.rows if self.rows else 0

    @property
    def _stacks_vectors(self) -> bool:
        """True for the biases of all experts in one tensor."""
        return len(self.shape) == 2 and "experts." in self.name and self.name.endswith("bias")

    @property
    def matrices(self) -> tuple[int, int, int]:
        """How many matrices it holds, one after the other, and the rows and columns of each."""
        return self.shape if self.is_stack else (1, self.rows, self.cols)  # type: ignore[return-value]

    @property
    def is_stack(self) -> bool:
        """True for the matrices of all experts in one tensor."""
        return len(self.shape) == 3 and "experts" in self.name


@dataclass(frozen=True, slots=True)
class Uncompared:
    """A tensor, or part of one, that was not compared. `reason` is a key of `REASONS`."""

    name: str
    side: str
    reason: str
    detail: str
    shape: tuple[int, ...]
    dtype: str
    numel: int


@dataclass
class Alignment:
    """The plan of a comparison: `checkpoints`, what is read from them together, and what is not."""

    checkpoints: tuple[Checkpoint, ...]
    tensors: list[Aligned] = field(default_factory=list)
    coverage: list[Uncompared] = field(default_factory=list)


def align(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    resized: bool = True,
    renames: Sequence[str] = (),
) -> Alignment:
    """Match the tensors of two checkpoints by name, one to one.

    Rules, by the name that they leave in `pairing_rule`: `same_name`; `wrapper_stripped` (FSDP, torch.compile, DDP
    prefixes); `map` (`renames`, OLD=NEW); those of `renaming.RULES`; `tied_head` (one side stores no lm_head because it is
    tied to the embedding: the embedding stands in); `resized_vocabulary` (embedding and head rows that both sides have; only
    with `resized`), `padded_vocabulary` (the same where the config says that the other rows are padding).
    `include` and `exclude` are regular expressions searched in the name that the two have in common.

    Raises `PairingError` where two tensors of one side get the same name, `NothingToCompare` where no pair is left and
    `OptionError` for a pattern that is no regular expression.
    """
    wanted = name_filter(include, exclude)
    mapped = renaming.mapping(renames)
    parts = renaming.reconcile(renaming.named(base, mapped), renaming.named(tuned, mapped), (_config(base), _config(tuned)))
    checkpoints = renaming.viewed(base, parts[0]), renaming.viewed(tuned, parts[1])
    sides = {
        side: {name: part.info for name, part in found.items()} for side, found in zip(("base", "tuned"), parts, strict=True)
    }
    partners = {name: _stand_in(name, sides, parts, (base, tuned)) for name in _in_order(sides)}
    plan = Alignment(checkpoints)
    for name, (infos, rule) in partners.items():
        if not wanted(name):
            for side, table in sides.items():
                if name in table:
                    plan.coverage.append(_left_out(name, side, table[name], "excluded", "name filter"))
        elif infos is None:
            side = "base" if name in sides["base"] else "tuned"
            info = sides[side][name]
            detail = renaming.remark(name, info, _config(base if side == "base" else tuned))
            plan.coverage.append(_left_out(name, side, info, f"only_{side}", detail))
        else:
            _pair(plan, name, infos, rule, [side for side, table in sides.items() if name in table], resized)
    compared = {tensor.name for tensor in plan.tensors}
    for number, tensor in enumerate(plan.tensors):
        tied_to = _tied_to(tensor.name, sides, (base, tuned))
        if tied_to in compared:
            plan.tensors[number] = replace(tensor, duplicate_of=tied_to)
    if not plan.tensors:
        raise NothingToCompare(_nothing_in_common(plan, base, tuned), hint=_look(base, tuned))
    return plan


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """config.json, with what it says of the language model of several at the top."""
    config = checkpoint.config or {}
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _in_order(sides: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    return list(dict.fromkeys([*sides["base"], *sides["tuned"]]))


def name_filter(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name passes: it matches one of `include` (if any) and none of `exclude`. Raises `OptionError`."""

    def compiled(patterns: Sequence[str], option: str) -> list[re.Pattern[str]]:
        made = []
        for pattern in patterns:
            try:
                made.append(re.compile(pattern))
            except (re.error, OverflowError, RecursionError) as error:
                raise OptionError(f"{option} {pattern[:80]!r} is not a regular expression: {error}.") from error
        return made

    wanted, unwanted = compiled(include, "--include"), compiled(exclude, "--exclude")

    def keep(name: str) -> bool:
        if wanted and not any(pattern.search(name) for pattern in wanted):
            return False
        return not any(pattern.search(name) for pattern in unwanted)

    return keep


def _stand_in(
    name: str,
    sides: Mapping[str, Mapping[str, TensorInfo]],
    parts: tuple[Side, Side],
    checkpoints: tuple[Checkpoint, Checkpoint],
) -> tuple[tuple[TensorInfo, TensorInfo] | None, str]:
    """The two tensors that a name stands for, and the rules that found them."""
    here, there = sides["base"].get(name), sides["tuned"].get(name)
    if here and there:
        rules = "+".join(dict.fromkeys((*parts[0][name].rules, *parts[1][name].rules)))
        viewed = parts[0][name].is_view or parts[1][name].is_view
        return (here, there), rules if here.name != there.name or viewed else "same_name"
    if not names.is_head(name):
        return None, ""
    lacking = 1 if here else 0
    table = list(sides.values())[lacking]
    embedding = _embedding_of(table)
    if embedding is None or _ties(checkpoints[lacking]) is False:
        return None, ""
    found = here or there
    assert found is not None
    return ((found, table[embedding]) if here else (table[embedding], found)), "tied_head"


def _embedding_of(table: Mapping[str, TensorInfo]) -> str | None:
    found = [name for name in table if names.is_input_embedding(name)]
    return found[0] if len(found) == 1 else None


def _ties(checkpoint: Checkpoint) -> bool | None:
    """Whether config.json says that input embedding and head are one parameter; None where it does not say."""
    config = checkpoint.config or {}
    text = config.get("text_config")
    for source in (config, text if isinstance(text, dict) else {}):
        if isinstance(source.get("tie_word_embeddings"), bool):
            return bool(source["tie_word_embeddings"])
    return None


def _tied_to(
    name: str, sides: Mapping[str, Mapping[str, TensorInfo]], checkpoints: tuple[Checkpoint, Checkpoint]
) -> str | None:
    """The embedding that a head repeats on both sides, so that it is not counted twice.

    A side repeats it where its config ties the two, or where it stores no head at all. Without a config, a stored head
    beside a tied one is taken for a copy: trainers that save tied heads are common, ones that untie are not.
    """
    if not names.is_head(name):
        return None
    for table, checkpoint in zip(sides.values(), checkpoints, strict=True):
        ties = _ties(checkpoint)
        stored_everywhere = all(name in t for t in sides.values())
        if (ties is False and name in table) or (ties is None and stored_everywhere):
            return None
    return _embedding_of(sides["base"]) or _embedding_of(sides["tuned"])


def _pair(
    plan: Alignment,
    name: str,
    infos: tuple[TensorInfo, TensorInfo],
    rule: str,
    stored: Sequence[str],
    resized: bool,
) -> None:
    a, b = infos
    compute = compute_type(a.type, b.type)
    if compute is None:
        for side, info in _of(stored, a, b):
            plan.coverage.append(_left_out(name, side, info, "not_numeric", f"{a.dtype} against {b.dtype}"))
        return
    shape = a.shape
    if a.shape != b.shape:
        if not (resized and _is_resized_vocabulary(name, a, b)):
            for side, info in _of(stored, a, b):
                plan.coverage.append(
                    _left_out(name, side, info, "shape_mismatch", f"{list(a.shape)} against {list(b.shape)}")
                )
            return
        shape = (min(a.shape[0], b.shape[0]), *a.shape[1:])
        number, longer = (0, a) if a.shape[0] > b.shape[0] else (1, b)
        padded = _config(plan.checkpoints[number]).get("vocab_size") == shape[0]
        resizing = "padded_vocabulary" if padded else "resized_vocabulary"
        rule = resizing if rule == "same_name" else f"{rule}+{resizing}"
        plan.coverage.append(
            Uncompared(
                name,
                ("base", "tuned")[number],
                "resized",
                f"{'padding ' if padded else ''}rows {shape[0]} to {longer.shape[0] - 1}",
                longer.shape,
                longer.dtype,
                longer.numel - math.prod(shape),
            )
        )
    contents = [checkpoint.content(info.name) for checkpoint, info in zip(plan.checkpoints, infos, strict=True)]
    same_file = contents[0] is not None and contents[0] == contents[1] and (a.dtype, a.shape) == (b.dtype, b.shape)
    plan.tensors.append(Aligned(name, infos, shape, rule, compute, same_file=same_file))
    if a.codes and b.codes and a.stored == b.stored and a.codes.shape == b.codes.shape and a.shape == shape:
        codes = compute_type(a.codes.type, b.codes.type)
        assert codes is not None
        plan.tensors.append(Aligned(a.codes.name, (a.codes, b.codes), a.codes.shape, CODES, codes, duplicate_of=name))


def _of(stored: Sequence[str], base: TensorInfo, tuned: TensorInfo) -> list[tuple[str, TensorInfo]]:
    """The sides that store a name themselves: an embedding that stood in for a head is accounted for elsewhere."""
    return [(side, info) for side, info in (("base", base), ("tuned", tuned)) if side in stored]


def _is_resized_vocabulary(name: str, a: TensorInfo, b: TensorInfo) -> bool:
    vocabulary = names.is_head(name) or names.is_input_embedding(name) or name.endswith("lm_head.bias")
    same_rest = len(a.shape) == len(b.shape) >= 1 and a.shape[1:] == b.shape[1:]
    packed = min(a.type.bits, b.type.bits) < 8  # whose rows need not begin at a byte
    return vocabulary and same_rest and not packed and min(a.shape[0], b.shape[0]) > 0


def _left_out(name: str, side: str, info: TensorInfo, reason: str, detail: str) -> Uncompared:
    return Uncompared(name, side, reason, detail, info.shape, info.dtype, info.numel)


def _nothing_in_common(plan: Alignment, base: Checkpoint, tuned: Checkpoint) -> str:
    reasons = {entry.reason for entry in plan.coverage}
    if not base.tensors or not tuned.tensors:
        return f"{base.ref if not base.tensors else tuned.ref} holds no tensors, so there is nothing to compare."
    if "excluded" in reasons:
        return f"No tensor of {base.ref} and {tuned.ref} is left after --include/--exclude."
    if reasons <= {"only_base", "only_tuned"}:
        return f"{base.ref} and {tuned.ref} have no tensor name in common."
    return f"No tensor of {base.ref} can be compared with {tuned.ref} ({', '.join(sorted(reasons))})."


def _look(base: Checkpoint, tuned: Checkpoint) -> str | None:
    if not base.tensors or not tuned.tensors:
        return None
    return f"The first names are {next(iter(base.tensors))!r} and {next(iter(tuned.tensors))!r}; see `paramdiff inspect`."
