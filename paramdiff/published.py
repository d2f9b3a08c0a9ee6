"""Numbers from papers, for checkpoints that are on the Hub: what they compared, by which notion, and what they found.

The table is published.csv beside this file. Owners that a paper does not print were filled in; `source` says so.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from paramdiff.errors import OptionError

HUB_ID = "/"  # entries without an owner name no repository


@dataclass(frozen=True, slots=True)
class Published:
    """One number of a paper: `sparsity` (a share) of `tuned` against `base`, by `notion`: `above` a tolerance, or
    `changed_bf16`."""

    base: str
    tuned: str
    algorithm: str
    notion: str
    tolerance: float | None
    sparsity: float
    source: str

    @property
    def name(self) -> str:
        """What `paramdiff published` calls the pair.

        >>> entries()[0].name
        'llama-3.1-tulu-3-8b-dpo'
        """
        return self.tuned.rpartition("/")[2].lower()

    @property
    def is_on_hub(self) -> bool:
        return HUB_ID in self.base and HUB_ID in self.tuned


@cache
def entries() -> tuple[Published, ...]:
    """The whole table."""
    text = (files("paramdiff") / "published.csv").read_text(encoding="utf-8")
    return tuple(
        Published(
            row["base"], row["tuned"], row["algorithm"], row["notion"],
            float(row["tolerance"]) if row["tolerance"] else None, float(row["sparsity_percent"]) / 100, row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    )  # fmt: skip


def of(name: str) -> list[Published]:
    """The numbers of one pair, by its name or an unmistakable part of it.

    Raises `OptionError` where no pair or several have it.

    >>> [entry.tolerance for entry in of("tulu-3-8b-dpo")]
    [1e-08, 1e-05]
    """
    names = list(dict.fromkeys(entry.name for entry in entries()))
    wanted = name.rpartition("/")[2].lower()
    found = [one for one in names if one == wanted] or [one for one in names if wanted in one]
    if len(found) != 1:
        known = ", ".join(found or names)
        raise OptionError(f"{name[:80]!r} is the name of {len(found) or 'no'} published pairs; known: {known}.")
    return [entry for entry in entries() if entry.name == found[0]]
