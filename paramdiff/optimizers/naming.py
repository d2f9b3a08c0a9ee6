"""From the numbers of an optimizer's parameters to their names.

`torch.optim` numbers parameters in the order in which they were handed over: group by group, and within a group in the order
of `model.named_parameters()`. Two things are to be found: that order, and how the parameters were dealt to the groups. Each
way of doing so is a candidate; one that gives a parameter a shape that its state has not is out. What is left must agree.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from paramdiff.errors import UnsupportedFormat

Shape = tuple[int, ...]
BY_NAME = "Save the optimizer's state by name: torch.distributed.checkpoint.state_dict.get_optimizer_state_dict."
MOST_BLOCKS = 5  # groups that are tried in every turn
MOST_TURNS = 120


@dataclass(frozen=True)
class Order:
    """Parameters in the order of the model, `source` says whence. `norms` are those of nn.LayerNorm by their module, where
    that is known."""

    source: str
    shapes: Mapping[str, Shape]
    norms: frozenset[str] | None = None


# What Trainer excludes from weight decay by name, beside all of nn.LayerNorm (transformers 4.46 to 5.24,
# Trainer.get_decay_parameter_names; before, only biases and layer norms).
TRAINER = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
LAYER_NORM = re.compile(r"(^|\.)(ln_?\w{0,2}|\w*layer_?norm\w*|norm\w*)\.(weight|bias)$", re.IGNORECASE)  # by its name
OPENRLHF = ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight")  # openrlhf deepspeed_utils
Undecayed = Callable[[str, Order], bool]


def _by_trainer(name: str, order: Order) -> bool:
    norm = name in order.norms if order.norms is not None else bool(re.search(r"(^|\.)ln_\w+\.(weight|bias)$", name))
    return norm or bool(TRAINER.search(name.lower()))


def _by_old_trainer(name: str, order: Order) -> bool:
    return "bias" in name or name in (order.norms or ()) or bool(LAYER_NORM.search(name))


RULES: dict[str, Undecayed] = {  # which parameters are in the second group, the one without weight decay
    "Trainer": _by_trainer,
    "Trainer before 4.46": _by_old_trainer,
    "OpenRLHF": lambda name, _: any(part in name for part in OPENRLHF),
    "by dimensions": lambda name, order: len(order.shapes[name]) < 2,
    "biases": lambda name, _: name.endswith("bias"),
}


def assign(
    groups: Sequence[Sequence[int]], shapes: Mapping[int, Shape], orders: Iterable[Order], where: str
) -> tuple[dict[int, str], str]:
    """The name of each number, and a phrase that says how they were found.

    `groups` are the numbers of each of `param_groups`, `shapes` those of the parameters that have state. Orders are tried in
    turn; the first in which anything fits decides.
    Raises `UnsupportedFormat` where nothing fits, or more than one way of naming does.
    """
    tried = []
    for order in orders:
        tried.append(order.source)
        fits: dict[tuple[tuple[int, str], ...], str] = {}
        for rule, dealt in _dealt(groups, order):
            for named in _fits(groups, dealt, shapes, order):
                fits.setdefault(tuple(named.items()), rule)
        if len(fits) > 1:
            rules = " and ".join(dict.fromkeys(fits.values()))
            raise UnsupportedFormat(
                f"{where} numbers its parameters, and groups {rules} fit {order.source} in several ways.",
                hint=BY_NAME,
            )
        for pairs, rule in fits.items():
            return dict(pairs), f"named by the order of {order.source}, groups {rule}"
    count = sum(map(len, groups))
    seen = f" (tried: {', '.join(tried)})" if tried else ""
    raise UnsupportedFormat(
        f"{where} numbers its {count:,} parameters, and no order of the model's parameters that is known fits their "
        f"shapes{seen}.",
        hint="Put the checkpoint's weights and config.json beside it, install transformers, or save the state by name.",
    )


def _dealt(groups: Sequence[Sequence[int]], order: Order) -> Iterable[tuple[str, list[list[str]]]]:
    """Ways in which the parameters of an order may have been dealt to the groups: one list of names for each group; or one
    list for all of them, where they were taken one after the other."""
    names = [*order.shapes]
    if len(groups) == 2:
        for rule, undecayed in RULES.items():
            second = {name for name in names if undecayed(name, order)}
            yield f"as {rule} makes them", [[n for n in names if n not in second], [n for n in names if n in second]]
    yield ("of one" if len(groups) == 1 else "one after the other"), [names]


def _fits(
    groups: Sequence[Sequence[int]], dealt: Sequence[Sequence[str]], shapes: Mapping[int, Shape], order: Order
) -> Iterator[dict[int, str]]:
    """Names of all numbers; nothing where they do not fit, and two ways where there is more than one.

    Where there are fewer numbers than names, the others are frozen. Groups that were taken one after the other may have been
    so in any turn, if the blocks of numbers still fit.
    """
    turns = [[*groups]]
    if len(dealt) == 1:
        filled = [group for group in groups if group]
        turns = [[[*itertools.chain(*turn)]] for turn in itertools.islice(itertools.permutations(filled), MOST_TURNS)]
        if len(filled) > MOST_BLOCKS and len({tuple(shapes.get(n) for n in group) for group in filled}) < len(filled):
            return  # too many to try, and some could stand in for one another
    found = 0
    for turn in turns:
        for named in _ends(turn, dealt, shapes, order):
            yield named
            found += 1
            if found == 2:
                return


def _ends(
    groups: Sequence[Sequence[int]], dealt: Sequence[Sequence[str]], shapes: Mapping[int, Shape], order: Order
) -> list[dict[int, str]]:
    """The first and the last way to give numbers names of their shapes in this order: none, one, or two that differ."""
    ways: list[dict[int, str]] = [{}, {}]
    for numbers, names in zip(groups, dealt, strict=True):
        if len(numbers) > len(names) or (0 < len(numbers) < len(names) and not all(n in shapes for n in numbers)):
            return []
        first = _leftmost(numbers, names, shapes, order)
        last = _leftmost(numbers[::-1], names[::-1], shapes, order)
        if first is None or last is None:
            return []
        ways[0].update(zip(numbers, first, strict=True))
        ways[1].update(zip(numbers, last[::-1], strict=True))
    return ways[:1] if ways[0] == ways[1] else ways


def _leftmost(numbers: Sequence[int], names: Sequence[str], shapes: Mapping[int, Shape], order: Order) -> list[str] | None:
    """Each number with the first name after the one before that has its shape."""
    found: list[str] = []
    rest = iter(names)
    for number in numbers:
        name = next((n for n in rest if number not in shapes or shapes[number] == order.shapes[n]), None)
        if name is None:
            return None
        found.append(name)
    return found
