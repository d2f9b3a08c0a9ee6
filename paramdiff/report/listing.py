"""Tables of a report: small ones as text, large ones packed, to be searched and sorted on the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from paramdiff import wording
from paramdiff.diff import Diff
from paramdiff.moments import Moments
from paramdiff.optimizers import plan
from paramdiff.pairing import REASONS
from paramdiff.plots import quantities
from paramdiff.report import packing
from paramdiff.wording import number, percent

MOST = 40  # rows of a small table
DEFINITIONS = (
    ("numeric_rank", "numeric rank"), ("rank_at_1e-3", "σ > σ₁/1000"), ("rank_at_1e-2", "σ > σ₁/100"),
    ("energy_rank_99", "99 % energy"), ("energy_rank_95", "95 %"), ("energy_rank_90", "90 %"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Table:
    """A small table, ready to be read."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def overall(diffs: dict[str, Diff]) -> Table:
    """What changed, by every notion: a row for each, a column for each run."""
    rows: dict[str, list[str]] = {}
    for place, diff in enumerate(diffs.values()):
        total = diff.by().row(0, named=True)
        n = total["numel"]
        told = {"parameters compared": f"{n:,} in {wording.many(total['tensors'], 'tensor')}"}
        notions = {"changed in value": "changed", "in stored bits": "changed_bits", "after rounding to bf16": "changed_bf16"}
        compat = diff.run["options"]["compat"]
        notions |= {f"{compat or '|Δ|'} > {name[6:-1]}": name for name in total if name.startswith("above[")}
        for label, name in notions.items():
            undefined = "– (the types differ)" if total[name] is None else "–"
            told[label] = f"{total[name]:,} ({percent(total[name] / n)})" if total[name] is not None and n else undefined
        told["sparsity, the unchanged share"] = percent(total["sparsity"])
        if total.get("l2_delta") is not None:
            told |= {"‖Δ‖ / ‖base‖": number(total["rel_l2"]), "largest |Δ|": number(total["max_abs_delta"])}
            told |= {"mean |Δ|": number(total["mean_abs_delta"]), "cosine of base and tuned": _cosine(total["cosine"])}
        told["sign flips"] = f"{total['sign_flips']:,}"
        told["tensors without a change"] = f"{diff.counted.filter(pl.col('changed') == 0).height:,}"
        told["types, base and tuned"] = f"{diff.summary()['dtype_base']}, {diff.summary()['dtype_tuned']}"
        for label, value in told.items():
            rows.setdefault(label, ["–"] * len(diffs))[place] = value
    return Table("", ["", *diffs], [[label, *values] for label, values in rows.items()])


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.8g}"


def ranks(label: str, diff: Diff) -> Table:
    """Every definition of rank, by module, as % of full; and over all matrices."""
    heads = ["module", "matrices", *(text for _, text in DEFINITIONS)]
    heads += ["stable rank", "entropy rank", "σ₁/‖Δ‖_F", "largest σ₁"]
    by_module = {row["module"]: row for row in diff.ranks_by("module").to_dicts()}
    order = [module for module in quantities.modules(diff.ranks) if module in by_module]
    rows = [("all", diff.ranks_by().row(0, named=True)), *((module, by_module[module]) for module in order[:MOST])]
    table = []
    for name, row in rows:
        shares = [row[f"{key}_percent"] for key, _ in DEFINITIONS]
        cells = ["–" if share is None else f"{share:.4g} %" for share in shares]
        medians = [number(row[f"{key}_median"]) for key in ("stable_rank", "entropy_rank", "top1_share")]
        known = row["matrices"] - row["without_spectrum"]
        table.append(
            [wording.shortened(wording.printable(name)), f"{known:,}", *cells, *medians, number(row["sigma_1_max"])]
        )
    of = f": {label}" if label else ""
    title = f"Rank by module, % of full rank (stable and entropy rank, σ₁/‖Δ‖_F: medians){of}{_cut(len(order))}"
    return Table(title, heads, table)


def _cut(modules: int) -> str:
    return f". The first {MOST} modules of {modules}; what --out writes has all." if modules > MOST else ""


def subspaces(label: str, diff: Diff) -> Table:
    """Angles and overlaps by module and k."""
    heads = ["module", "k", "matrices", "angle, left", "angle, right", "NSS"]
    heads += ["on principal weights", "on low-magnitude", "chance"]
    order = quantities.modules(diff.subspaces)
    rows = [row for row in diff.subspaces_by("module").to_dicts() if row["k"] is not None and row["module"] in order[:MOST]]
    table = []
    for row in sorted(rows, key=lambda row: (order.index(row["module"]), row["k"])):
        angles = [_degrees(row[f"angle_{side}_max_median"]) for side in "uv"]
        overlaps = [percent(row[name]) for name in ("principal_overlap", "low_overlap", "chance")]
        name = wording.shortened(wording.printable(row["module"]))
        known = row["matrices"] - row["left_out"]
        table.append([name, str(row["k"]), f"{known:,}", *angles, number(row["nss_mean"]), *overlaps])
    title = "Leading directions by module (largest principal angle: median over matrices)" + (f": {label}" if label else "")
    title += _cut(len(order))
    return Table(title, heads, table)


def _degrees(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}°"


def moments(found: dict[str, tuple[Moments, str]]) -> Table:
    """What the optimizer's state says as a whole: a column for each checkpoint."""
    wanted: list[tuple[str, str, Any]] = [
        ("numel", "parameters", "{:,}".format), ("optimizer", "optimizer", str), ("step_max", "steps", "{:,}".format),
        ("lr", "learning rate in force", number), ("v_std", "standard deviation of v", number),
        ("sqrt_vhat_mean", "mean of √v̂", number), ("sqrt_vhat_std", "standard deviation of √v̂", number),
        ("v_zero", "share with v = 0", percent), ("eff_lr_p50", "median effective learning rate", number),
        ("log10_eff_lr_std", "spread of its log10, in decades", number),
        ("adaptivity", "adaptivity, 1 − cos(u, m̂)", number),
        ("equivalent_sgd_lr", "equivalent SGD learning rate", number),
        ("update_rms", "root mean square of the step", number),
        ("bf16_visible", "share of weights the step changes in bf16", percent),
        ("grad_norm", "norm of the gradient", number),
        ("momentum_grad_cosine", "cos(momentum, gradient)", number),
    ]  # fmt: skip
    totals = [result.by(side=side).row(0, named=True) for result, side in found.values()]
    rows = []
    for name, label, shown in wanted:
        values = [total[name] for total in totals]
        if any(value is not None for value in values):
            rows.append([label, *("–" if value is None else shown(value) for value in values)])
    return Table("", ["", *found], rows)


def tensors(diff: Diff) -> dict[str, Any]:
    """One row per compared tensor, packed: names, sizes, counts, norms, ranks."""
    frame = diff.tensors
    listed = [
        ("name", "tensor", "text"), ("layer", "layer", "whole"), ("module", "module", "text"), ("kind", "kind", "text"),
        ("shape", "shape", "text"), ("numel", "parameters", "count"), ("changed", "changed", "count"),
        ("share", "changed, %", "share"), ("share_bf16", "in bf16, %", "share"),
    ]  # fmt: skip
    shares = {"share": "changed", "share_bf16": "changed_bf16"}
    for name in [name for name in frame.columns if name.startswith("above[")]:
        shares[f"share_{name}"] = name
        listed.append((f"share_{name}", f"> {name[6:-1]}, %", "share"))
    filled = pl.when(pl.col("numel") > 0).then(pl.col("numel"))
    frame = frame.with_columns((pl.col(count) / filled).alias(share) for share, count in shares.items())
    listed += [
        ("rel_l2", "‖Δ‖/‖base‖", "number"), ("max_abs_delta", "largest |Δ|", "number"),
        ("mean_abs_delta", "mean |Δ|", "number"), ("cosine", "cosine", "fine"),
        ("top1pct_rows_share", "in top 1 % rows", "share"),
        ("top1pct_cols_share", "in top 1 % columns", "share"),
    ]  # fmt: skip
    if "ranks" in diff.tables:
        wanted = ("numeric_rank_percent", "energy_rank_99_percent", "stable_rank", "top1_share", "sigma_1")
        alone = pl.len().over("name") == 1  # the experts of one stored stack have a rank each, and a tensor has one row
        frame = frame.join(diff.ranks.filter(alone).select("name", *wanted), on="name", how="left", maintain_order="left")
        listed += [(wanted[0], "numeric rank, %", "percent"), (wanted[1], "99 % energy, %", "percent")]
        listed += [(wanted[2], "stable rank", "number"), (wanted[3], "σ₁/‖Δ‖_F", "share"), (wanted[4], "σ₁", "number")]
    listed += [("nonfinite", "NaN or infinite", "count"), ("pairing_rule", "paired by", "text")]
    listed += [
        ("duplicate_of", "tied to", "text"),
        ("dtype_base", "base type", "text"),
        ("dtype_tuned", "tuned type", "text"),
    ]
    known = set(QUIET) | {name for name, *_ in listed} | set(shares.values())
    frame = frame.with_columns((pl.col("nonfinite_base") + pl.col("nonfinite_tuned")).alias("nonfinite"))
    own = [name for name in quantities.drawable(diff, "tensors") if name not in known and not name.startswith("sparsity")]
    listed += [(name, name, "number") for name in own]
    return _packed(frame, [entry for entry in listed if entry[0] in frame.columns])


# columns of a tensor that the page leaves to tensors.parquet
QUIET = (
    "changed_bits", "sign_flips", "nonfinite_base", "nonfinite_tuned", "finite", "l2_base", "l2_tuned", "l2_delta",
    "mean_delta", "dot", "rows", "cols", "rows_touched", "cols_touched",
)  # fmt: skip


def coverage(result: Diff | Moments) -> dict[str, Any]:
    """What was not compared, and why, packed."""
    said = pl.col("reason").replace(REASONS if isinstance(result, Diff) else plan.REASONS)
    frame = result.coverage.with_columns(said)
    listed = [
        ("name", "tensor", "text"), ("side", "side", "text"), ("reason", "reason", "text"), ("detail", "detail", "text"),
        ("shape", "shape", "text"), ("dtype", "type", "text"), ("numel", "elements not compared", "count"),
    ]  # fmt: skip
    return _packed(frame, listed)


def _packed(frame: pl.DataFrame, listed: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Columns with labels and how they are shown; those without a value are left out."""
    columns = []
    for name, label, kind in listed:
        values = frame[name]
        if values.null_count() < frame.height or not frame.height:
            columns.append({"label": label, "title": name, "kind": kind, "values": packing.column(values)})
    return {"columns": columns}


def provenance(result: Diff | Moments) -> list[tuple[str, str]]:
    """Where the numbers come from: references, revisions, files, options, versions, cost."""
    run = result.run
    facts = []
    for side in ("base", "tuned") if isinstance(result, Diff) else result.sides:
        facts += _source(side, run[side])
    options = {name: value for name, value in run["options"].items() if value not in (None, [], "")}
    facts.append(("options", "; ".join(f"{name} {_said(value)}" for name, value in options.items())))
    facts.append(("versions", ", ".join(f"{name} {value}" for name, value in run["versions"].items())))
    facts.append(("started", str(run["started"])))
    facts.append(("cost", f"{run['bytes_read'] / 1e6:,.1f} MB read in {run['seconds']:.2f} s"))
    if run.get("same_file"):
        facts.append(
            ("read once", f"{run['same_file']:,} tensors lie in files that are the same on both sides, by their hash")
        )
    facts += [("warning", str(warning)) for warning in run["warnings"]]
    return [(name, wording.printable(wording.shortened(text, 2000))) for name, text in facts]


def _source(side: str, facts: dict[str, Any]) -> list[tuple[str, str]]:
    files = facts.get("files") or []
    size = sum(file.get("bytes") or 0 for file in files)
    told = [(side, f"{facts['ref']} ({facts.get('format', 'optimizer state')})")]
    if files:
        names = ", ".join(str(file["name"]) for file in files[:3]) + (
            f" and {len(files) - 3} more" if len(files) > 3 else ""
        )
        told.append((f"{side}, files", f"{len(files)}: {names}; {size / 1e6:,.1f} MB"))
    rest = {
        name: value
        for name, value in facts.items()
        if name not in ("ref", "format", "files") and value not in (None, [], {}, "")
    }
    if rest:
        told.append((f"{side}, more", "; ".join(f"{name} {_said(value)}" for name, value in rest.items())))
    return told


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(part)}" for name, part in value.items())
    return str(value)
