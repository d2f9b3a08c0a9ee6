"""`Diff`: tables of what changed, with where they came from; saved and loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import polars as pl

from paramdiff import tables
from paramdiff.errors import OptionError
from paramdiff.output import save_tables
from paramdiff.pairing import CODES

Ref = str | PathLike[str]


@dataclass
class Diff:
    """The result of a comparison.

    `tensors` has one row per compared tensor, `coverage` one per tensor that was not compared, `tables` holds those two
    and all others by name (`histograms`, `rows`, …), `run` what run.json says: references, options, versions, cost.
    The meaning of every column is in `paramdiff.columns`.
    """

    tables: dict[str, pl.DataFrame]
    run: dict[str, Any]

    @property
    def tensors(self) -> pl.DataFrame:
        return self.tables["tensors"]

    @property
    def coverage(self) -> pl.DataFrame:
        return self.tables["coverage"]

    @property
    def ranks(self) -> pl.DataFrame:
        """One row per matrix: every definition of rank. Raises `OptionError` where "spectrum" was not measured."""
        if "ranks" not in self.tables:
            raise OptionError("This comparison has no spectra.", hint='Compare with measures=["change", "spectrum"].')
        return self.tables["ranks"]

    def ranks_by(self, *keys: str) -> pl.DataFrame:
        """Roll up ranks by one or more columns; without any, over all matrices.

        Percentages are of the summed full ranks, medians over the matrices that changed (see `tables.pooled_ranks`).

        >>> from paramdiff import compare
        >>> diff = compare("sample_data/base", "sample_data/rl-sgd", measures=["change", "spectrum"])
        >>> diff.ranks_by("kind")["matrices"].to_list()
        [1, 12, 16]
        """
        return tables.roll_up_ranks(self.ranks, keys)

    @property
    def subspaces(self) -> pl.DataFrame:
        """One row per matrix and k: angles, drift and overlaps. Raises `OptionError` where "subspace" was not measured."""
        if "subspaces" not in self.tables:
            raise OptionError("This comparison has no subspaces.", hint='Compare with measures=["change", "subspace"].')
        return self.tables["subspaces"]

    def subspaces_by(self, *keys: str) -> pl.DataFrame:
        """Roll up subspaces by k and one or more columns (see `tables.pooled_subspaces`).

        >>> from paramdiff import compare
        >>> diff = compare("sample_data/base", "sample_data/rl-sgd", measures=["change", "subspace"], ks=[8])
        >>> diff.subspaces_by("kind")["kind"].to_list()
        ['embedding', 'mlp', 'attention']
        """
        return tables.roll_up_subspaces(self.subspaces, keys)

    def by(self, *keys: str) -> pl.DataFrame:
        """Roll up by one or more columns (`"layer"`, `"module"`, `"kind"`, `"expert"`), pooling elements.

        >>> from paramdiff import compare
        >>> diff = compare("sample_data/base", "sample_data/rl-sgd")
        >>> diff.by("kind").columns[:3]
        ['kind', 'tensors', 'numel']
        """
        return tables.roll_up(self.tensors, keys)

    def summary(self) -> dict[str, Any]:
        """The whole comparison as one dictionary, the object that `paramdiff sparsity --json` prints.

        Counts cover every compared tensor but tied duplicates. A notion that is undefined for some tensor is None.
        """
        total = self.by().row(0, named=True)
        tolerances = [float(t) for t in self.run["options"]["tolerances"]]
        result: dict[str, Any] = {
            "base": self.run["base"]["ref"],
            "tuned": self.run["tuned"]["ref"],
            "tensors": total["tensors"],
            "numel": total["numel"],
            "dtype_base": self._dtypes("dtype_base"),
            "dtype_tuned": self._dtypes("dtype_tuned"),
            "compared_in": self._dtypes("compared_in"),
        }
        for name in ("changed", "sparsity", "changed_bits", "sparsity_bits", "changed_bf16", "sparsity_bf16"):
            result[name] = total[name]
        result["tolerances"] = [
            {"tol": t, "above": total[f"above[{t!r}]"], "sparsity": total[f"sparsity[{t!r}]"]} for t in tolerances
        ]
        for name in ("l2_delta", "rel_l2", "max_abs_delta"):
            result[name] = total.get(name)
        for name in ("sign_flips", "nonfinite_base", "nonfinite_tuned"):
            result[name] = total[name]
        if self.run["options"]["compat"]:
            result["compat"] = self.run["options"]["compat"]
        stored = {side: self._weights[f"stored_{side}"].drop_nulls().unique().sort() for side in ("base", "tuned")}
        result |= {f"stored_{side}": "+".join(kinds) for side, kinds in stored.items() if len(kinds)} | self._codes()
        result["coverage"] = self._coverage()
        return result | {"bytes_read": self.run["bytes_read"], "seconds": self.run["seconds"]}

    def plot(self, kind: str = "heatmap", *args: Any, **options: Any) -> Any:
        """A plotly figure: "heatmap", "layers", "histogram", "spectrum" or "stripes", with what that function of
        `paramdiff.plots` takes.

        Raises `OptionError` for another kind.
        """
        from paramdiff import plots

        return plots.of(kind)(self, *args, **options)

    def save(self, directory: Ref) -> None:
        """Write every table as Parquet, and run.json. Raises `OutputError`; what was there before then stays."""
        save_tables(Path(fspath(directory)), self.tables, self.run)

    def _dtypes(self, column: str) -> str:
        counts = self._weights.group_by(column).agg(pl.col("numel").sum()).sort(["numel", column], descending=[True, False])
        return "+".join(counts[column])

    @property
    def _weights(self) -> pl.DataFrame:
        """The rows of weights, without those that compare the codes of quantised ones."""
        return self.tensors.filter(pl.col("pairing_rule") != CODES)

    @property
    def counted(self) -> pl.DataFrame:
        """The rows that totals are of: without tied duplicates, and without those of codes."""
        return self._weights.filter(pl.col("duplicate_of").is_null())

    def _codes(self) -> dict[str, Any]:
        """How many codes of quantised weights changed; nothing where no two sides were stored in one format."""
        rows = self.tensors.filter(pl.col("pairing_rule") == CODES)
        if not rows.height:
            return {}
        return {"codes": int(rows["numel"].sum()), "codes_changed": int(rows["changed_bits"].sum())}

    def _coverage(self) -> dict[str, Any]:
        def names(reason: str) -> list[str]:
            return self.coverage.filter(pl.col("reason") == reason)["name"].unique(maintain_order=True).to_list()

        lists = {r: names(r) for r in ("only_base", "only_tuned", "shape_mismatch", "not_numeric", "resized")}
        tied = self._weights.filter(pl.col("duplicate_of").is_not_null())["name"].to_list()
        return {"compared": self._weights.height, **lists, "tied": tied, "excluded": len(names("excluded"))}

    def __repr__(self) -> str:
        total = self.by().row(0, named=True)
        return (
            f"<Diff {self.run['base']['ref']} → {self.run['tuned']['ref']}: {total['changed']:,} of {total['numel']:,} "
            f"parameters changed in {total['tensors']} tensors>"
        )

    def _repr_html_(self) -> str:
        from html import escape

        keep = [c for c in ("kind", "tensors", "numel", "changed", "sparsity", "rel_l2") if c in self.by("kind").columns]
        return f"<p>{escape(repr(self))}</p>" + self.by("kind").select(keep)._repr_html_()
