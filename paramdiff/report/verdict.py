"""The summary in words: what was found, each claim with the numbers that carry it and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from paramdiff import published, tables
from paramdiff.diff import Diff
from paramdiff.moments import Moments
from paramdiff.wording import many, number, percent, printable, shortened

SUPERVISED = ("SFT",)
NEAR = 5e-5  # half of the last digit that papers print
STRIPED = 3.0  # times an even spread, from which on changes are said to gather
TOLERANCE = 1e-5  # the one that papers print most numbers for


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim, its evidence, and the section of the report that shows it."""

    claim: str
    evidence: str
    section: str


def findings(diff: Diff) -> list[Finding]:
    """What one comparison says, most important first."""
    total = diff.by().row(0, named=True)
    if not total["numel"]:
        return [Finding("There is nothing to say: no elements were compared.", "", "coverage")]
    if not total["changed"]:
        return [_nothing(diff, total), *_trust(diff, total)]
    found = [
        _how_much(total, diff.run["options"]["compat"]),
        *_beside_papers(diff, total),
        _where(diff),
        *_how_far(diff, total),
    ]
    found += [*_rank(diff), *_stripes(diff), *_directions(diff), *_trust(diff, total)]
    return found


def _nothing(diff: Diff, total: dict[str, Any]) -> Finding:
    """No value changed; which is not to say that the checkpoints are the same."""
    same = f"All {total['numel']:,} parameters in {many(total['tensors'], 'tensor')} have the same values"
    if total["changed_bits"]:
        same += f", of which {total['changed_bits']:,} are stored with other bits (±0, or another NaN)"
    whole = not diff.coverage.height and not total["changed_bits"]
    claim = "The two checkpoints do not differ." if whole else "Nothing that was compared changed in value."
    return Finding(claim, f"{same}.", "overall")


def _how_much(total: dict[str, Any], compat: str | None) -> Finding:
    changed, n = total["changed"], total["numel"]
    claim = f"Training changed {percent(changed / n)} of the parameters; {percent(total['sparsity'])} kept their value."
    bf16 = total["changed_bf16"]
    if bf16 is not None and bf16 < changed / 2:  # most of it is finer than bf16, as of float32 weights beside their export
        claim = f"Training changed {percent(changed / n)} of the parameters, {percent(bf16 / n)} as bf16 would show it."
    evidence = f"{changed:,} of {n:,}"
    above = "above" if compat is None else f"as the script of {compat} counts: above"
    if bf16 is not None and bf16 != changed:
        evidence += f"; after rounding to bf16 {bf16:,} differ ({percent(bf16 / n)})"
    for name in [name for name in total if name.startswith("above[")]:
        evidence += f"; {above} {name[6:-1]} {total[name]:,} ({percent(total[name] / n)})"
    return Finding(claim, evidence + ".", "overall")


def _beside_papers(diff: Diff, total: dict[str, Any]) -> list[Finding]:
    """Where the number lies among published ones of the same notion, by the same tolerance."""
    above = total.get(f"sparsity[{TOLERANCE!r}]")
    notion, share = ("above", above) if above is not None else ("changed_bf16", total["sparsity_bf16"])
    if share is None or diff.run["options"]["compat"]:
        return []
    said = f"|Δ| ≤ {TOLERANCE:g}" if notion == "above" else "unchanged in bf16"
    known = [e for e in published.entries() if e.notion == notion and (notion != "above" or e.tolerance == TOLERANCE)]
    classes = {
        "reinforcement learning and preference tuning": [e for e in known if e.algorithm not in SUPERVISED],
        "supervised fine-tuning": [e for e in known if e.algorithm in SUPERVISED],
    }
    parts, inside = [], []
    for name, entries in classes.items():
        if entries:
            low, high = min(e.sparsity for e in entries), max(e.sparsity for e in entries)
            parts.append(f"{name} {percent(low)} to {percent(high)} ({len(entries)} pairs)")
            if low - NEAR <= share <= high + NEAR:
                inside.append(name)
    same = [e for e in known if e.is_on_hub and (e.base, e.tuned) == _repositories(diff)]
    claim = f"Papers report {percent(same[0].sparsity)} for this very pair." if same else ""
    claim = claim or (f"That is within what papers report for {' and '.join(inside)}." if inside else "")
    claim = claim or "That is outside what papers report for other models."
    sources = sorted({e.source.split(" Table")[0] for e in known})
    evidence = (
        f"{percent(share)} {said} here; published: {'; '.join(parts)}. {', '.join(sources)}. Models, data and rates differ."
    )
    return [Finding(claim, evidence, "overall")]


def _repositories(diff: Diff) -> tuple[Any, Any]:
    """The Hub's names of both sides, where they come from there."""
    return diff.run["base"].get("repository"), diff.run["tuned"].get("repository")


def _where(diff: Diff) -> Finding:
    tensors = diff.counted
    modules = _densities(diff.by("module"), "module")
    layers = _densities(diff.by("layer").filter(pl.col("layer").is_not_null()), "layer")
    untouched = tensors.filter(pl.col("changed") == 0).height
    (low, least), (high, most) = modules[0], modules[-1]
    least, most = (shortened(printable(name)) for name in (least, most))
    alike = sum(density == low for density, _ in modules)
    others = f" and {many(alike - 1, 'other')}" if alike > 1 else ""
    claim = f"Most changed is {most} ({percent(high)}), least {least}{others} ({percent(low)})."
    if len(modules) == 1:
        claim = f"All of it is in one module, {most}."
    elif low == high:
        claim = f"All modules changed alike ({percent(high)})."
    parts = []
    if len(layers) > 1:
        (a, first), (b, last) = layers[0], layers[-1]
        even = "fairly even" if a and b / a < 1.5 else "uneven"
        parts.append(f"Along the layers it is {even}: {percent(a)} in layer {first} to {percent(b)} in layer {last}")
    parts.append(f"{untouched:,} of {many(tensors.height, 'tensor')} did not change at all")
    return Finding(claim, "; ".join(parts) + ".", "heat")


def _densities(rolled: pl.DataFrame, key: str) -> list[tuple[float, Any]]:
    """Changed share and name of each group that has elements, least first."""
    rows = rolled.filter(pl.col("numel") > 0).select(pl.col("changed") / pl.col("numel"), key).rows()
    return sorted(rows, key=lambda row: row[0])


def _how_far(diff: Diff, total: dict[str, Any]) -> list[Finding]:
    if total.get("l2_delta") is None:
        return []
    if not total["finite"]:
        return [Finding("No element is finite on both sides: there is no size to give.", "", "tensors")]
    rel = total["rel_l2"]
    claim = "The base is all zeros." if rel is None else f"The step is {_size(rel)}: ‖Δ‖ is {number(rel)} times ‖base‖."
    evidence = (
        f"‖Δ‖ {number(total['l2_delta'])}, ‖base‖ {number(total['l2_base'])}, largest |Δ| {number(total['max_abs_delta'])}"
    )
    evidence += f", mean |Δ| {number(total['mean_abs_delta'])}; {total['sign_flips']:,} sign flips"
    ulps = _ulps(diff)
    if ulps is not None:
        evidence += f"; {percent(ulps)} of the changes that have a distance in ulps are by one"
    return [Finding(claim, evidence + ".", "histograms")]


def _size(rel: float) -> str:
    return "tiny" if rel < 1e-3 else "small" if rel < 1e-2 else "moderate" if rel < 0.1 else "large"


def _ulps(diff: Diff) -> float | None:
    """The share of changes by exactly one ulp; None where no tensor has such distances."""
    if "histograms" not in diff.tables:
        return None
    bins = diff.tables["histograms"].filter(pl.col("histogram") == "ulp").join(diff.counted, on="name", how="semi")
    changed, one = (int(bins.filter(part)["count"].sum()) for part in (pl.col("lower") > 0, pl.col("lower") == 1))
    return one / changed if changed else None


def _rank(diff: Diff) -> list[Finding]:
    if "ranks" not in diff.tables:
        return []
    known = diff.ranks.filter(pl.col("method").is_not_null() & pl.col("duplicate_of").is_null())
    moved = known.filter(pl.col("frobenius") > 0)
    if not moved.height:
        return []
    total = tables.roll_up_ranks(moved, []).row(0, named=True)  # a matrix that did not change makes no update low-rank
    numeric, energy = total["numeric_rank_percent"], total["energy_rank_99_percent"]
    if energy is None or numeric is None:
        claim = f"Spectra are partial ({total['methods']})."
    elif energy > 50:
        claim = f"The update is of high rank: 99 % of its energy takes {energy:.3g} % of the directions."
    elif energy > 10:
        claim = f"The update is of middling rank: 99 % of its energy takes {energy:.3g} % of the directions."
    else:
        claim = f"The update is of low rank: 99 % of its energy takes {energy:.3g} % of the directions."
    evidence = f"{moved.height:,} of {many(known.height, 'matrix', 'matrices')} changed"
    if numeric is not None:
        evidence += f"; numeric rank {numeric:.4g} % of full (rounding alone makes updates numerically full-rank)"
    if total["top1_share_median"] is not None:
        evidence += f"; one direction holds {percent(total['top1_share_median'])} of a matrix's Frobenius norm (median)"
    if total["stable_rank_median"] is not None:
        evidence += f"; stable rank {number(total['stable_rank_median'])}"
    return [Finding(claim, evidence + ".", "spectra")]


def _stripes(diff: Diff) -> list[Finding]:
    if "rows_touched" not in diff.tensors.columns:
        return []
    own = diff.counted.filter(pl.col("rows").is_not_null() & (pl.col("changed") > 0))
    if not own.height:
        return []
    told, most = [], 0.0
    for axis, word in (("rows", "rows"), ("cols", "columns")):
        touched = own.select(pl.col(f"{axis}_touched").sum() / pl.col(axis).sum()).item()
        top = (pl.col(axis) / 100).ceil() / pl.col(axis)  # what an even spread would give: one row in eight is more than 1 %
        share, even = own.select(pl.col(f"top1pct_{axis}_share").median(), top.median()).row(0)
        most = max(most, own.select((pl.col(f"top1pct_{axis}_share") / top).median()).item())
        told.append(
            f"{percent(touched)} of the {word} of changed matrices have a change; the 1 % of {word} with most hold "
            f"{percent(share)} of a matrix's changes, by an even spread {percent(even)} (medians)"
        )
    gather = f"Changes gather in stripes: some rows or columns hold {number(most)} times what an even spread would give."
    claim = gather if most >= STRIPED else "Changes are spread over rows and columns."
    return [Finding(claim, f"{'. '.join(told)}.", "stripes")]


def _directions(diff: Diff) -> list[Finding]:
    if "subspaces" not in diff.tables:
        return []
    rows = [row for row in diff.subspaces_by().to_dicts() if row["k"] is not None and row["angle_u_max_median"] is not None]
    if not rows:
        return []
    first = rows[0]
    u, v = first["angle_u_max_median"], first["angle_v_max_median"]
    claim = f"The {first['k']} leading directions turned by {number(u)}° (left) and {number(v)}° (right)."
    evidence = "Largest principal angle, median over matrices"
    if first["principal_overlap"] is not None:
        evidence += f"; {percent(first['principal_overlap'])} of the bf16 changes lie on principal weights and "
        evidence += f"{percent(first['low_overlap'])} on low-magnitude ones, by chance {percent(first['chance'])}"
    return [Finding(claim, evidence + ".", "directions")]


def _trust(diff: Diff, total: dict[str, Any]) -> list[Finding]:
    """What to know before believing the rest."""
    found = []
    nonfinite = total["nonfinite_base"] + total["nonfinite_tuned"]
    if nonfinite:
        said = (
            f"{total['nonfinite_base']:,} in the base, {total['nonfinite_tuned']:,} in the tuned side; norms leave them out."
        )
        be = "is" if nonfinite == 1 else "are"
        found.append(Finding(f"{many(nonfinite, 'element')} {be} NaN or infinite.", said, "tensors"))
    left = diff.coverage["name"].n_unique()  # a tensor that both sides have is there once for each
    if left:
        reasons = diff.coverage.group_by("reason", maintain_order=True).agg(pl.col("name").n_unique()).rows()
        said = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in reasons)
        was = "was" if left == 1 else "were"
        found.append(Finding(f"{many(left, 'tensor')} {was} not compared, or not wholly.", f"{said}.", "coverage"))
    if diff.run["warnings"]:
        found.append(Finding("There were warnings.", " ".join(diff.run["warnings"]), "provenance"))
    return found


def of_moments(result: Moments) -> list[Finding]:
    """What the optimizer's state says of each checkpoint."""
    found = []
    for side in result.sides:
        total = result.by(side=side).row(0, named=True)
        evidence = [shortened(printable(str(result.run[side]["ref"])), 200)]
        a = total["adaptivity"]
        if a is None:
            continue
        if total["sqrt_vhat_mean"] is None:
            claim = f"{total['optimizer']} keeps no second moment: its step is its momentum, as large everywhere as that."
        else:
            how = "far from" if a > 0.3 else "not quite" if a > 0.05 else "nearly"
            claim = f"{total['optimizer']}'s step was {how} a mere rescaling of the momentum: adaptivity {number(a)}."
            evidence[0] += f": cos(step, momentum) {number(1 - a)}"
        if total["log10_eff_lr_std"] is not None:
            spread = number(total["log10_eff_lr_std"])
            evidence.append(f"effective learning rates spread over {spread} decades (standard deviation)")
        if total["equivalent_sgd_lr"] is not None:
            evidence.append(f"nearest SGD learning rate {number(total['equivalent_sgd_lr'])}")
        if total["bf16_visible"] is not None:
            evidence.append(f"{percent(total['bf16_visible'])} of the weights would show the step in bf16")
        if total["momentum_grad_cosine"] is not None:
            evidence.append(f"cos(momentum, gradient) {number(total['momentum_grad_cosine'])}")
        found.append(Finding(claim, "; ".join(evidence) + ".", "adam"))
    return found
