"""`Moments`: tables of what an optimizer's state says, of one checkpoint or two side by side; saved and loaded again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from paramdiff import tables
from paramdiff.measures.accumulator import exact_sum
from paramdiff.measures.adam import QUANTILES, adaptivity, cosine, quantile
from paramdiff.output import save_tables

SPREADS = ("v", "sqrt_v", "vhat", "sqrt_vhat", "log10_eff_lr")  # have a mean and a standard deviation
SHARES = ("v_zero", "update_saturated", "update_small", "bf16_visible")
SETTINGS = ("optimizer", "dtype_m", "dtype_v", "lr", "lr_source", "beta1", "beta2", "eps", "weight_decay")
RATIOS = (
    "v_mean", "v_std", "sqrt_v_mean", "sqrt_v_std", "vhat_mean", "vhat_std", "sqrt_vhat_mean", "sqrt_vhat_std", "eff_lr_p1",
    "eff_lr_p50", "eff_lr_p99", "log10_eff_lr_std", "update_rms", "update_max", "adaptivity", "equivalent_sgd_lr",
    "bf16_visible",
)  # fmt: skip
Ref = str | PathLike[str]


@dataclass
class Moments:
    """The result of `adam`.

    `parameters` has one row per parameter and checkpoint (`side`: first, second), `tables` holds that one and all others by
    name (`adam`, `histograms`, `coverage`), `run` what run.json says. The meaning of every column is in `paramdiff.columns`.
    """

    tables: dict[str, pl.DataFrame]
    run: dict[str, Any]

    @property
    def parameters(self) -> pl.DataFrame:
        return self.tables["adam"]

    @property
    def coverage(self) -> pl.DataFrame:
        return self.tables["coverage"]

    @property
    def sides(self) -> list[str]:
        return ["first"] if self.run["second"] is None else ["first", "second"]

    def by(self, *keys: str, side: str = "first") -> pl.DataFrame:
        """Roll up the parameters of one checkpoint by one or more columns (`"module"`, `"layer"`, `"kind"`, `"name"`);
        without any, over all. Elements are pooled: sums of sums, percentiles of added-up histograms.

        >>> from paramdiff import adam
        >>> adam("sample_data/checkpoints/sft/checkpoint-200").by("kind")["tensors"].to_list()
        [1, 28, 12, 9]
        """
        return self._rolled_up(self.parameters.filter(pl.col("side") == side), keys)

    def ratios(self, *keys: str) -> pl.DataFrame:
        """Both checkpoints by one or more columns, parameters that both have: `…_first`, `…_second` and `…_ratio`, the
        second divided by the first.

        >>> from paramdiff import adam
        >>> rl, sft = (f"sample_data/checkpoints/{run}/checkpoint-200" for run in ("rl-adamw", "sft"))
        >>> 1 < adam(rl, sft).ratios()["sqrt_v_std_ratio"].item() < 100
        True
        """
        stepped = self.parameters.filter(pl.col("has_state"))
        both = stepped.group_by("name").agg(pl.col("side").n_unique()).filter(pl.col("side") == 2)
        common = stepped.join(both, on="name", how="semi", maintain_order="left")
        first, second = (self._rolled_up(common.filter(pl.col("side") == side), keys) for side in ("first", "second"))
        others = {tuple(row[key] for key in keys): row for row in second.to_dicts()}
        rows = []
        for row in first.to_dicts():
            other = others.get(tuple(row[key] for key in keys))
            if other is None:
                continue
            found = {key: row[key] for key in keys} | {"tensors": row["tensors"], "numel": row["numel"]}
            for column in RATIOS:
                found |= {f"{column}_first": row[column], f"{column}_second": other[column]}
                found[f"{column}_ratio"] = _divided(other[column], row[column])
            rows.append(found)
        types = {key: self.parameters.schema[key] for key in keys}
        floats = {f"{column}_{part}": pl.Float64 for column in RATIOS for part in ("first", "second", "ratio")}
        return pl.DataFrame(rows, schema_overrides={**types, **floats} if rows else None, infer_schema_length=None)

    def summary(self) -> dict[str, Any]:
        """The whole result as one dictionary, the object that `paramdiff adam --json` prints (without its tables)."""
        result: dict[str, Any] = {}
        for side in self.sides:
            result[side] = {
                "ref": self.run[side]["ref"],
                "naming": self.run[side]["naming"],
                **self.by(side=side).row(0, named=True),
                "coverage": self._coverage(side),
            }
        if len(self.sides) == 2:
            found = self.ratios()
            result["ratios"] = {c: found[f"{c}_ratio"].item() for c in RATIOS} if found.height else None
            result["no_gradient"] = self.run["no_gradient"]
        return result | {"bytes_read": self.run["bytes_read"], "seconds": self.run["seconds"]}

    def plot(self, kind: str = "adam", *args: Any, **options: Any) -> Any:
        """A plotly figure: "adam", "heatmap" or "layers", with what that function of
        `paramdiff.plots` takes.

        Raises `OptionError` for another kind.
        """
        from paramdiff import plots

        return plots.of(kind)(self, *args, **options)

    def save(self, directory: Ref) -> None:
        """Write every table as Parquet, and run.json. Raises `OutputError`; what was there before then stays."""
        save_tables(Path(fspath(directory)), self.tables, self.run)

    def _coverage(self, side: str) -> dict[str, Any]:
        own = self.coverage.filter(pl.col("side") == side)
        return {reason: group["name"].to_list() for (reason,), group in own.group_by("reason", maintain_order=True)}

    def _rolled_up(self, rows: pl.DataFrame, keys: tuple[str, ...]) -> pl.DataFrame:
        histograms = self.tables["histograms"].filter(pl.col("histogram") == "log10_eff_lr") if rows.height else None

        def pool(group: pl.DataFrame) -> dict[str, Any]:
            return pooled(group, histograms)

        return tables.grouped(rows, keys, pool)

    def __repr__(self) -> str:
        refs = " against ".join(self.run[side]["ref"] for side in self.sides)
        total = self.by().row(0, named=True)
        return f"<Moments of {refs}: {total['optimizer']}, {total['numel']:,} parameters in {total['tensors']} tensors>"

    def _repr_html_(self) -> str:
        from html import escape

        keep = ["kind", "tensors", "numel", "sqrt_vhat_mean", "eff_lr_p50", "adaptivity", "equivalent_sgd_lr"]
        return f"<p>{escape(repr(self))}</p>" + self.by("kind").select(keep)._repr_html_()


def pooled(group: pl.DataFrame, histograms: pl.DataFrame | None) -> dict[str, Any]:
    """One row for a group of parameters of one checkpoint, as if their elements were one long vector.

    A number covers the parameters for which it is known: elements without a second moment are in no mean of v. Settings that
    differ are joined by +, or null where they are numbers.
    """
    stepped = group.filter(pl.col("has_state"))
    row: dict[str, Any] = {
        "tensors": group.height,
        "numel": int(group["numel"].sum()),
        "without_state": group.height - stepped.height,
        "step_min": stepped["step_min"].min(),
        "step_max": stepped["step_max"].max(),
    }
    for name in SETTINGS:
        values = stepped[name].drop_nulls().unique(maintain_order=True).to_list()
        row[name] = values[0] if len(values) == 1 else "+".join(values) if values and isinstance(values[0], str) else None
    row["finite"], row["nonfinite"] = (int(stepped[name].sum() or 0) for name in ("finite", "nonfinite"))
    for name in SPREADS:
        row |= _spread(stepped, name)
    for name in SHARES:
        known = stepped.filter(pl.col(name).is_not_null())
        n = int(known["finite"].sum())
        row[name] = exact_sum((known[name] * known["finite"]).round().to_list()) / n if n else None
    row |= _percentiles(stepped, histograms)
    row |= _step(stepped)
    return row | _gradient(stepped)


def _spread(rows: pl.DataFrame, name: str) -> dict[str, float | None]:
    """Mean and standard deviation over all elements: of the parameters' own, around the mean of all."""
    known = rows.filter(pl.col(f"{name}_mean").is_not_null())
    n, mean, std = known["finite"], known[f"{name}_mean"], known[f"{name}_std"]
    total = int(n.sum())
    if not total:
        return {f"{name}_mean": None, f"{name}_std": None}
    middle = exact_sum((mean * n).to_list()) / total
    return {
        f"{name}_mean": middle,
        f"{name}_std": math.sqrt(exact_sum(((std**2 + (mean - middle) ** 2) * n).to_list()) / total),
    }


def _percentiles(rows: pl.DataFrame, histograms: pl.DataFrame | None) -> dict[str, float | None]:
    nothing = dict.fromkeys((f"eff_lr_{name}" for name in QUANTILES), None)
    if histograms is None or not rows.height:
        return nothing
    own = histograms.join(rows.select("name", "side"), on=["name", "side"], how="semi")
    bins = own.group_by("lower", "upper").agg(pl.col("count").sum()).sort("lower")
    if not bins.height:
        return nothing
    lower, upper, counts = 10.0 ** bins["lower"].to_numpy(), 10.0 ** bins["upper"].to_numpy(), bins["count"].to_numpy()
    return {f"eff_lr_{name}": quantile(lower, upper, np.asarray(counts), q) for name, q in QUANTILES.items()}


def _step(rows: pl.DataFrame) -> dict[str, Any]:
    """The step of several parameters together. Where their rates differ, each counts with its own; where one has none, `u`
    alone gives the adaptivity."""
    known = rows.filter(pl.col("u_norm").is_not_null())
    rated = known.filter(pl.col("lr") > 0)
    n, row = int(rated["finite"].sum()), dict[str, Any]()
    rates = known["lr"] if rated.height == known.height else pl.Series([1.0] * known.height)
    u, m = (math.sqrt(exact_sum((known[c] ** 2 * w).to_list())) for c, w in (("u_norm", rates**2), ("mhat_norm", rates**0)))
    dot = exact_sum((known["u_dot_mhat"] * rates).to_list())
    row["update_rms"] = math.sqrt(exact_sum((rated["update_rms"] ** 2 * rated["finite"]).to_list()) / n) if n else None
    row["update_max"] = rated["update_max"].max()
    row["adaptivity"] = adaptivity(u, m, dot) if known.height else None
    row["equivalent_sgd_lr"] = dot / m**2 if known.height and rated.height == known.height and m else None
    return row


def _gradient(rows: pl.DataFrame) -> dict[str, float | None]:
    known = rows.filter(pl.col("grad_norm").is_not_null())
    if not known.height:
        return dict.fromkeys(("grad_norm", "momentum_norm", "momentum_dot_grad", "momentum_grad_cosine", "grad_check"), None)
    g, m = (math.sqrt(exact_sum((known[name] ** 2).to_list())) for name in ("grad_norm", "momentum_norm"))
    dot = exact_sum(known["momentum_dot_grad"].to_list())
    found: dict[str, float | None] = {"grad_norm": g, "momentum_norm": m, "momentum_dot_grad": dot}
    checked: Any = known["grad_check"].max()
    return found | {"momentum_grad_cosine": cosine(dot, m, g), "grad_check": checked}


def _divided(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
