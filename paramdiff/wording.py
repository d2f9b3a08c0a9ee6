"""How numbers are written for people, on the terminal, in figures and in reports."""

from __future__ import annotations

import math


def percent(share: float | None) -> str:
    """A share as a percentage with at least three significant digits of its smaller side.

    >>> percent(0.99981234), percent(0.5), percent(1.0), percent(None)
    ('99.9812 %', '50.00 %', '100 %', '–')
    """
    if share is None or not math.isfinite(share):
        return "–"
    if share in (0.0, 1.0):
        return f"{share * 100:.0f} %"
    small = min(abs(share), abs(1 - share)) * 100
    if 1 - 1e-12 < share < 1 + 1e-12:
        return "100 %"
    if abs(share) < 1e-11:
        return f"{share * 100:.3g} %"
    digits = min(10, max(2, 2 - math.floor(math.log10(small))))
    return f"{share * 100:.{digits}f} %"


def number(value: float | None) -> str:
    """Three significant digits.

    >>> number(0.00123456), number(None)
    ('0.00123', '–')
    """
    return "–" if value is None else f"{value:.3g}"


def many(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun.

    >>> many(1, "tensor"), many(2000, "tensor"), many(2, "matrix", "matrices")
    ('1 tensor', '2,000 tensors', '2 matrices')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def shortened(text: str, longest: int = 60) -> str:
    """Text that is too long to be shown, with its middle left out.

    >>> shortened("model.layers.0.self_attn.q_proj.weight", 20)
    'model.lay…roj.weight'
    """
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[-(longest - 1 - head) :]}"


def printable(text: str) -> str:
    r"""Text from a file or a user, with control codes and other unprintable characters escaped.

    >>> print(printable("\x1b[31mred"))
    \x1b[31mred
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def labels(refs: list[str], longest: int = 40) -> list[str]:
    """Short names for references, all different: their last part, with those before it where that does not tell.

    >>> labels(["runs/a/checkpoint-200", "runs/b/checkpoint-200", "org/model@main"])
    ['a/checkpoint-200', 'b/checkpoint-200', 'model@main']
    >>> labels(["same", "same"])
    ['same (1)', 'same (2)']
    """
    parts = [[part for part in ref.split("/") if part not in ("", ".")] or [ref] for ref in refs]
    taken = [1] * len(refs)
    while True:
        named = ["/".join(part[-n:]) for part, n in zip(parts, taken, strict=True)]
        again = [i for i, name in enumerate(named) if named.count(name) > 1 and taken[i] < len(parts[i])]
        if not again:
            break
        for i in again:
            taken[i] += 1
    return unique([shortened(printable(name), longest) for name in named])


def unique(names: list[str]) -> list[str]:
    """Names with a number after those that are there more than once.

    >>> unique(["a", "b", "a", "a (1)"])
    ['a (2)', 'b', 'a (3)', 'a (1)']
    """
    taken = {name for name in names if names.count(name) == 1}
    found = []
    for name in names:
        own, number = name, 0
        while names.count(name) > 1 and (number == 0 or own in taken):
            number += 1
            own = f"{name} ({number})"
        taken.add(own)
        found.append(own)
    return found
