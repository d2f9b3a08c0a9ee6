"""Names that differ for the same parameter: rules that bring two checkpoints under one set of names.

A rule is applied only to tensors that have no partner yet, and only where its result is the name of one on the other side;
`container_prefix`, which moves a whole model, only where at least half of what it moves finds a partner. Rules run in the
order of `RULES`, until a round finds nothing, each side against the other. Every one leaves its name in `pairing_rule`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from paramdiff import fusing, names
from paramdiff.checkpoints import Checkpoint, TensorInfo
from paramdiff.checkpoints.derived import Derived, View
from paramdiff.errors import OptionError, PairingError
from paramdiff.fusing import Config, Part, Shapes

Side = dict[str, Part]

PEFT = (  # what PEFT puts into the names of a wrapped model
    (re.compile(r"^base_model\.model\."), ""),
    (re.compile(r"\.base_layer\."), "."),
    (re.compile(r"\.modules_to_save\.\w+\."), "."),
)
LEGACY = ((re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"), (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"))
MOVES = (  # where versions of transformers keep the parts of vision-language models
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
MIXTRAL = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(\.experts\.\d+)\.w1\."), r"\1.gate_proj."),
    (re.compile(r"(\.experts\.\d+)\.w3\."), r"\1.up_proj."),
    (re.compile(r"(\.experts\.\d+)\.w2\."), r"\1.down_proj."),
)
MODEL = "model."  # what the usual names begin with
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")
FACTORS = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")
Rule = Callable[[str, Part, Shapes, Config], list[Part]]


def mapping(pairs: Sequence[str]) -> list[tuple[re.Pattern[str], str]]:
    """The rules of `--map old=new`: a regular expression and what stands in its place. Raises `OptionError`."""
    made = []
    for pair in pairs:
        old, equals, new = pair.rpartition("=")  # a lookbehind has one as well
        if not equals or not old:
            raise OptionError(f"--map {pair[:80]!r} is not of the form OLD=NEW.", hint=r"Say --map '^actor\.=model.', say.")
        try:
            pattern = re.compile(old)
            pattern.sub(new, "", count=1)
            re._parser.parse_template(new, pattern)  # type: ignore[attr-defined]  # which group is none shows only here
        except (re.error, IndexError, OverflowError, RecursionError) as error:
            raise OptionError(f"--map {pair[:80]!r} is not a regular expression and its replacement: {error}.") from error
        made.append((pattern, new))
    return made


def named(checkpoint: Checkpoint, mapped: Sequence[tuple[re.Pattern[str], str]] = ()) -> Side:
    """The tensors of a checkpoint by name, without wrappers, as `--map` says. Raises `PairingError` for two of one name."""
    side: Side = {}
    for name, info in checkpoint.tensors.items():
        short = names.strip_wrappers(name)
        rules = () if short == name else ("wrapper_stripped",)
        for pattern, new in mapped:
            if pattern.search(short):
                short, rules = pattern.sub(new, short), (*rules, "map")
                break
        if short in side:
            why = "that --map gives both" if "map" in (*rules, *side[short].rules) else "the same parameter without wrappers"
            raise PairingError(f"{checkpoint.ref} stores both {side[short].info.name!r} and {name!r}, {why}.")
        side[short] = Part(info, ((name, 0, info.nbytes),), rules)
    return side


def reconcile(base: Side, tuned: Side, configs: tuple[Config, Config]) -> tuple[Side, Side]:
    """The same two sides under names that agree as far as any rule can tell.

    Raises `PairingError` where two tensors of one side would get the same name.
    """
    sides = [base, tuned]
    for _ in range(len(RULES)):  # each round finds something, or is the last
        before = len(sides[0].keys() ^ sides[1].keys())
        for rule, function in RULES.items():
            for here in (0, 1):
                if not sides[0].keys() ^ sides[1].keys():
                    return sides[0], sides[1]
                if function is None:
                    _unprefixed(rule, sides, here)
                else:
                    config = {**configs[1 - here], **configs[here]}
                    sides[here] = _applied(rule, function, sides[here], sides[1 - here], config)
        if len(sides[0].keys() ^ sides[1].keys()) == before:
            break
    return sides[0], sides[1]


def _unprefixed(rule: str, sides: list[Side], here: int) -> None:
    """Take the container's prefix off one side. Where it is the `model.` of the usual names, it is put before the others."""
    prefix = _prefix(sides[here], sides[1 - here])
    if not prefix:
        return
    moved = [name for name in sides[here] if name.startswith(prefix) and name not in sides[1 - here]]
    if prefix == MODEL and not any(name.startswith(MODEL + MODEL) for name in moved):
        here, new = 1 - here, {name.removeprefix(prefix): name for name in moved}
    else:
        new = {name: name.removeprefix(prefix) for name in moved}
    side = sides[here]
    taken = {old: name for old, name in new.items() if old in side and name not in side}
    sides[here] = {
        taken.get(name, name): replace(part, rules=(*part.rules, rule)) if name in taken else part
        for name, part in side.items()
    }


def _applied(rule: str, function: Rule, side: Side, other: Side, config: Config) -> Side:
    """One side after one rule, in its own order."""
    shapes = {name: part.info.shape for name, part in other.items() if name not in side}
    made: Side = {}
    for name, part in side.items():
        if name in other:
            new = [(name, part)]
        else:
            found = function(name, part, shapes, config)
            taken = found and all(one.info.name in shapes for one in found) and (len(found) == 1 or _fit(found, shapes))
            new = [(one.info.name, _under(one, part, rule)) for one in found] if taken else [(name, part)]
        for short, one in new:
            if short in made:
                raise PairingError(
                    f"Both {made[short].info.name!r} and {part.info.name!r} would be compared as {short!r} ({rule}).",
                    hint="Say which is which with --map, or leave one out with --exclude.",
                )
            made[short] = one
    return made


def _fit(found: Sequence[Part], shapes: Shapes) -> bool:
    return all(one.info.shape == shapes[one.info.name] for one in found)


def _under(one: Part, part: Part, rule: str) -> Part:
    """A part as the rule made it; one that is all of a stored tensor keeps the name it is stored under."""
    rules = (*part.rules, rule)
    if one.extents == part.extents:
        return Part(part.info, part.extents, rules)
    return replace(one, rules=rules)


def _prefix(side: Side, other: Side) -> str:
    """The prefix whose removal gives the most tensors a partner of the same shape, if it is at least half of them.

    Whether a prefix is the container's or the model's own (`model.`) is not to be seen in a name, only in what it leads to.
    """
    shapes = {name: part.info.shape for name, part in other.items() if name not in side}
    gains: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, part in side.items():
        if name in other:
            continue
        at = name.find(".")
        while at >= 0:
            prefix, rest = name[: at + 1], name[at + 1 :]
            sizes[prefix] += 1
            gains[prefix] += shapes.get(rest) == part.info.shape
            at = name.find(".", at + 1)
    best = max(gains, key=lambda prefix: (gains[prefix], -len(prefix)), default="")
    few = min(2, len(side), len(other))
    return best if best and gains[best] >= few and 2 * gains[best] >= sizes[best] else ""


def _renaming(substitutions: Sequence[tuple[re.Pattern[str], str]]) -> Rule:
    """A rule that rewrites names, whatever the tensors."""

    def rule(name: str, part: Part, other: Shapes, config: Config) -> list[Part]:
        new = name
        for pattern, replacement in substitutions:
            new = pattern.sub(replacement, new)
        return [] if new == name else [replace(part, info=replace(part.info, name=new))]

    return rule


def _move(name: str, part: Part, other: Shapes, config: Config) -> list[Part]:
    """Parts of vision-language models, either way; only where the shapes agree as well."""
    for one, another in MOVES:
        for old, new in ((one, another), (another, one)):
            moved = new + name.removeprefix(old)
            if name.startswith(old) and other.get(moved) == part.info.shape:
                return [replace(part, info=replace(part.info, name=moved))]
    return []


RULES: dict[str, Rule | None] = {  # None: a prefix of the whole side
    "peft_prefix": _renaming(PEFT),
    "vlm_move": _move,
    "container_prefix": None,
    "legacy_name": _renaming(LEGACY),
    "mixtral_name": _renaming(MIXTRAL),
    "experts_split": fusing.experts,
    "qkv_split": fusing.qkv,
    "gate_up_split": fusing.gate_up,
    "megatron": fusing.megatron,
}


def viewed(checkpoint: Checkpoint, side: Side) -> Checkpoint:
    """The checkpoint with parts of its tensors in place of those, where rules took some apart."""
    views = [View(part.info, part.extents) for part in side.values() if part.is_view]
    return Derived(checkpoint, views) if views else checkpoint


def remark(name: str, info: TensorInfo, config: Config) -> str:
    """What is to be said of a tensor without a partner, if anything."""
    if BUFFERS.search(name):
        return "a buffer, which is not trained"
    if FACTORS.search(name):
        return "a factor of an adapter that was not merged"
    if ".original_module." in name:
        return "the untrained copy that PEFT keeps of a module it saves"
    if re.search(r"\bexperts\.\w+$", name) and len(info.shape) == 3 and config.get("model_type") in fusing.TRANSPOSED:
        return "experts stacked as (experts, in, out), which are not compared with (out, in)"
    if re.search(r"\.(query_key_value|linear_qkv)\.", name):
        return "heads in groups, which the config's head counts would take apart"
    return ""
