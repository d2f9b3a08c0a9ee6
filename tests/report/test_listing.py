"""Tables of the report: their numbers against numpy, and what becomes of values that JSON or a cell has no room for."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import paramdiff
from paramdiff.plots import runs
from paramdiff.report import listing, packing, page
from tests.helpers import model_dir
from tests.report import RUNS, SAMPLES, changes, layer, module, near, stored, three_digits

MATRIX = torch.arange(1.0, 49).reshape(8, 6)
CHECKPOINTS = SAMPLES / "checkpoints"


@cache
def diff(run: str) -> paramdiff.Diff:
    measures = ["change", "magnitude", "rows", "spectrum", "subspace"]
    return paramdiff.compare(SAMPLES / "base", SAMPLES / run, measures=measures, ks=[4], tolerances=[1e-5])


def pair(where: Path, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], **options: Any) -> paramdiff.Diff:
    options.setdefault("measures", ["change", "magnitude", "rows", "spectrum"])
    return paramdiff.compare(model_dir(where / "base", base), model_dir(where / "tuned", tuned), **options)


def columns(packed: dict[str, Any]) -> dict[str, list[Any]]:
    return {column["title"]: column["values"] for column in packed["columns"]}


def unpacked(text: str, group: str) -> Any:
    """What a page holds for one of its figures or tables."""
    match = re.search(rf'<script type="text/plain" id="data-{group}">([^<]*)</script>', text)
    assert match
    return json.loads(gzip.decompress(base64.b64decode(match[1])))


@pytest.mark.parametrize("run", RUNS)
def test_tensors(run: str) -> None:
    found = columns(listing.tensors(diff(run)))
    a, b, where = stored(SAMPLES / "base"), stored(SAMPLES / run), changes(SAMPLES / "base", SAMPLES / run)
    assert sorted(found["name"]) == sorted(a)
    for position, name in enumerate(found["name"]):
        row = {title: values[position] for title, values in found.items()}
        before, after = a[name].astype(np.float64), b[name].astype(np.float64)
        delta, n, changed = after - before, before.size, int(where[name].sum())
        assert (row["numel"], row["changed"], row["module"], row["layer"]) == (n, changed, module(name), layer(name))
        assert row["shape"] == "×".join(str(length) for length in before.shape)
        assert row["share"] == pytest.approx(changed / n, rel=1e-5)
        assert row["share_bf16"] == pytest.approx(changed / n, rel=1e-5)  # stored as bf16
        above = int((np.abs(b[name] - a[name]) > np.float32(1e-5)).sum())
        assert row["share_above[1e-05]"] == pytest.approx(above / n, rel=1e-5)
        assert row["rel_l2"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(before), rel=1e-5)
        assert row["max_abs_delta"] == pytest.approx(np.abs(delta).max(), rel=1e-5)
        assert row["mean_abs_delta"] == pytest.approx(np.abs(delta).mean(), rel=1e-5)
        cosine = before.ravel() @ after.ravel() / np.linalg.norm(before) / np.linalg.norm(after)
        assert row["cosine"] == pytest.approx(cosine, abs=1e-6)
        if before.ndim != 2:
            assert row["sigma_1"] is None
            assert row["top1pct_rows_share"] is None
            continue
        per_row = np.sort(where[name].sum(axis=1))[::-1]
        top = per_row[: math.ceil(len(per_row) / 100)].sum() / max(1, changed)
        assert row["top1pct_rows_share"] == pytest.approx(top, rel=1e-5)
        sigma = np.linalg.svd(delta, compute_uv=False)
        assert row["sigma_1"] == pytest.approx(sigma[0], rel=1e-4)
        assert row["stable_rank"] == pytest.approx(np.sum(sigma**2) / sigma[0] ** 2, rel=1e-4)
        assert row["top1_share"] == pytest.approx(sigma[0] / np.linalg.norm(delta), rel=1e-4)
        energy = int(np.argmax(np.cumsum(sigma**2) >= 0.99 * np.sum(sigma**2))) + 1
        assert row["energy_rank_99_percent"] == pytest.approx(100 * energy / len(sigma), rel=1e-5)
        numeric = int((sigma > sigma[0] * max(delta.shape) * 2.0**-23).sum())
        assert row["numeric_rank_percent"] == pytest.approx(100 * numeric / len(sigma), rel=1e-5)


def test_overall() -> None:
    table = listing.overall({run: diff(run) for run in RUNS})
    assert table.heads == ["", *RUNS]
    rows = {row[0]: row[1:] for row in table.rows}
    a = stored(SAMPLES / "base")
    for place, run in enumerate(RUNS):
        b, where = stored(SAMPLES / run), changes(SAMPLES / "base", SAMPLES / run)
        before, after = (np.concatenate([side[name].ravel() for name in a]).astype(np.float64) for side in (a, b))
        n, changed = before.size, sum(int(part.sum()) for part in where.values())
        assert rows["parameters compared"][place] == f"{n:,} in {len(a)} tensors"
        for label in ("changed in value", "in stored bits", "after rounding to bf16"):
            count, share = re.fullmatch(r"([\d,]+) \(([\d.]+) %\)", rows[label][place]).groups()  # type: ignore[union-attr]
            assert count == f"{changed:,}"
            assert near(share, 100 * changed / n)
        above = int((np.abs(after.astype(np.float32) - before.astype(np.float32)) > np.float32(1e-5)).sum())
        assert rows["|Δ| > 1e-05"][place].startswith(f"{above:,} (")
        assert near(rows["sparsity, the unchanged share"][place].removesuffix(" %"), 100 - 100 * changed / n)
        delta = after - before
        assert three_digits(rows["‖Δ‖ / ‖base‖"][place], float(np.linalg.norm(delta) / np.linalg.norm(before)))
        assert three_digits(rows["largest |Δ|"][place], float(np.abs(delta).max()))
        assert three_digits(rows["mean |Δ|"][place], float(np.abs(delta).mean()))
        cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
        assert float(rows["cosine of base and tuned"][place]) == pytest.approx(cosine, abs=1e-8)
        assert rows["sign flips"][place] == f"{int((before * after < 0).sum()):,}"
        assert rows["tensors without a change"][place] == str(sum(not part.any() for part in where.values()))
        assert rows["types, base and tuned"][place] == "BF16, BF16"


def test_overall_of_other_types(tmp_path: Path) -> None:
    found = pair(tmp_path, {"a.weight": MATRIX + 1e-6}, {"a.weight": MATRIX.bfloat16()})
    rows = dict(listing.overall({"x": found}).rows)
    rounded = int(((MATRIX + 1e-6).bfloat16() != MATRIX.bfloat16()).sum())
    assert rows["in stored bits"] == "– (the types differ)"
    assert rows["after rounding to bf16"].startswith(f"{rounded} (")
    assert rows["types, base and tuned"] == "F32, BF16"


def test_overall_of_no_elements(tmp_path: Path) -> None:
    empty = {"a.weight": torch.zeros(0, 4)}
    rows = dict(listing.overall({"x": pair(tmp_path, empty, empty)}).rows)
    assert "0 in 1" in rows["parameters compared"]
    assert "types differ" not in " ".join(rows.values())


def test_ranks_by_module() -> None:
    table = listing.ranks("", diff("rl-sgd"))
    rows = {row[0]: dict(zip(table.heads, row, strict=True)) for row in table.rows}
    a, b = stored(SAMPLES / "base"), stored(SAMPLES / "rl-sgd")
    deltas = {name: b[name].astype(np.float64) - a[name] for name in a if a[name].ndim == 2}
    assert set(rows) == {"all", *map(module, deltas)}
    for of, row in rows.items():
        sigmas = [np.linalg.svd(d, compute_uv=False) for name, d in deltas.items() if of in ("all", module(name))]
        full = sum(map(len, sigmas))
        assert row["matrices"] == str(len(sigmas))
        wanted = {
            "numeric rank": [
                (s > s[0] * max(d.shape) * 2.0**-23).sum()
                for s, d in zip(sigmas, [d for n, d in deltas.items() if of in ("all", module(n))], strict=True)
            ],
            "σ > σ₁/1000": [(s > s[0] / 1000).sum() for s in sigmas],
            "σ > σ₁/100": [(s > s[0] / 100).sum() for s in sigmas],
            "99 % energy": [(np.cumsum(s**2) < 0.99 * np.sum(s**2)).sum() + 1 for s in sigmas],
            "95 %": [(np.cumsum(s**2) < 0.95 * np.sum(s**2)).sum() + 1 for s in sigmas],
            "90 %": [(np.cumsum(s**2) < 0.9 * np.sum(s**2)).sum() + 1 for s in sigmas],
        }
        for head, counts in wanted.items():
            assert float(row[head].removesuffix(" %")) == pytest.approx(100 * sum(counts) / full, rel=6e-4), head
        assert three_digits(row["stable rank"], float(np.median([np.sum(s**2) / s[0] ** 2 for s in sigmas])))
        assert three_digits(row["largest σ₁"], max(float(s[0]) for s in sigmas))
        assert three_digits(row["σ₁/‖Δ‖_F"], float(np.median([s[0] / np.sqrt(np.sum(s**2)) for s in sigmas])))
        entropy = [float(np.exp(-sum(p * math.log(p) for p in s / s.sum() if p > 0))) for s in sigmas]
        assert three_digits(row["entropy rank"], float(np.median(entropy)))


def test_all_modules_are_in_the_table_of_subspaces_or_it_says_so(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    base = {f"layers.0.m{i}.weight": torch.randn(4, 4, generator=random) for i in range(100)}
    tuned = {name: value + 0.1 * torch.randn(4, 4, generator=random) for name, value in base.items()}
    found = pair(tmp_path, base, tuned, measures=["change", "subspace", "spectrum"], ks=[2])
    for table in (listing.subspaces("", found), listing.ranks("", found)):
        named = {row[0] for row in table.rows} - {"all"}
        assert len(named) == 100 or re.search(rf"first {len(named)} modules of 100", table.title)


def test_moments() -> None:
    found = paramdiff.adam(CHECKPOINTS / "rl-adamw" / "checkpoint-200")
    table = listing.moments(runs.sides(found))
    rows = {row[0]: row[1] for row in table.rows}
    state = torch.load(CHECKPOINTS / "rl-adamw" / "checkpoint-200" / "optimizer.pt", weights_only=True)
    beta2 = state["param_groups"][0]["betas"][1]
    every = list(state["state"].values())
    v = torch.cat([one["exp_avg_sq"].double().flatten() for one in every])
    root = torch.cat([(one["exp_avg_sq"].double().flatten() / (1 - beta2 ** float(one["step"]))).sqrt() for one in every])
    assert rows["parameters"] == f"{len(v):,}"
    assert rows["steps"] == f"{int(max(one['step'] for one in every)):,}"
    assert three_digits(rows["standard deviation of v"], float(v.std(correction=0)))
    assert three_digits(rows["mean of √v̂"], float(root.mean()))
    assert three_digits(rows["standard deviation of √v̂"], float(root.std(correction=0)))
    assert near(rows["share with v = 0"].removesuffix(" %"), 100 * float((v == 0).double().mean()))


def test_coverage(tmp_path: Path) -> None:
    base = {
        "a.weight": MATRIX, "gone.weight": MATRIX, "turned.weight": MATRIX, "model.embed_tokens.weight": MATRIX,
    }  # fmt: skip
    tuned = {
        "a.weight": MATRIX + 1, "new.weight": MATRIX, "turned.weight": MATRIX.T.contiguous(),
        "model.embed_tokens.weight": torch.cat([MATRIX, MATRIX[:3]]),
    }  # fmt: skip
    found = columns(listing.coverage(pair(tmp_path, base, tuned)))
    listed = {
        (name, side): (reason, numel)
        for name, side, reason, numel in zip(*(found[t] for t in ("name", "side", "reason", "numel")), strict=True)
    }
    assert listed[("gone.weight", "base")] == ("only in the base", 48)
    assert listed[("new.weight", "tuned")] == ("only in the tuned side", 48)
    assert "shapes that differ" in listed[("turned.weight", "base")][0]
    assert "shapes that differ" in listed[("turned.weight", "tuned")][0]
    reason, missing = listed[("model.embed_tokens.weight", "tuned")]
    assert "rows that only one side has" in reason
    assert missing == 3 * 6
    assert len(listed) == len(found["name"]) == 5


def test_reasons_of_optimizer_states_are_in_words(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model[0].parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    found = paramdiff.adam(tmp_path / "a.pt")
    assert found.coverage.height == 2
    assert not any("_" in reason for reason in columns(listing.coverage(found))["reason"])


def test_provenance_says_what_was_compared() -> None:
    facts = dict(listing.provenance(diff("rl-sgd")))
    size = sum(file.stat().st_size for file in (SAMPLES / "rl-sgd").glob("*.safetensors"))
    assert facts["base"].startswith(str(SAMPLES / "base"))
    assert facts["tuned"].startswith(str(SAMPLES / "rl-sgd"))
    assert facts["tuned, files"].startswith("4: ")
    assert facts["tuned, files"].endswith(f"{size / 1e6:.1f} MB")
    assert "tolerances 1e-05" in facts["options"]
    assert f"torch {torch.__version__}" in facts["versions"]


def test_nearly_all_is_not_all(tmp_path: Path) -> None:
    """One element of two million kept its value: the table may not say 100 %, which JavaScript writes for 1."""
    base = torch.ones(2_000_003)
    tuned = base + 1
    tuned[0] = 1
    found = columns(listing.tensors(pair(tmp_path, {"a.weight": base}, {"a.weight": tuned}, measures=["change"])))
    assert found["changed"] == [2_000_002]
    assert found["share"] != [1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pl.Series([1.23456789, -0.0, None]), [1.23457, 0.0, None]),
        (pl.Series([math.nan, math.inf, -math.inf]), ["nan", "inf", "-inf"]),
        (pl.Series([[2, 3], [], None], dtype=pl.List(pl.Int64)), ["2×3", "", None]),
        (pl.Series([2**53 + 1, None]), [2**53 + 1, None]),
        (pl.Series(["a\x00b\u202ec", None]), ["a\\x00b\\u202ec", None]),
    ],
)
def test_columns_hold_what_json_can(values: pl.Series, expected: list[Any]) -> None:
    assert packing.column(values) == expected
    json.dumps(packing.column(values), allow_nan=False)


def test_long_names_are_cut() -> None:
    (cut,) = packing.column(pl.Series(["a" * 5000 + "z" * 5000]))
    assert len(cut) <= 160
    assert re.fullmatch("a+…z+", cut)


def test_what_is_packed_comes_back() -> None:
    data = {"a": [1, None, "<script>", "\ud800"], "é": {"</script>": -0.5}}
    text = packing.packed(data)
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", text)
    assert json.loads(gzip.decompress(base64.b64decode(text)).decode("utf-8", "surrogatepass")) == data


def test_the_same_page_twice() -> None:
    found = {run: diff(run) for run in RUNS[:2]}
    first, second = page(found), page(found)
    assert first == second
    assert first.count("plotly.js v") == 1
    assert len(re.findall(r"<script>", first)) >= 2
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", first.partition("<script>")[0])


@pytest.mark.parametrize(
    "refs", [["same", "same"], ["a (2)", "a", "a"], ["x" * 99 + "1" + "y" * 99, "x" * 99 + "2" + "y" * 99]]
)
def test_no_result_is_lost_because_its_name_is_taken(refs: list[str]) -> None:
    own = diff("rl-sgd")
    found = [paramdiff.Diff(own.tables, {**own.run, "tuned": {**own.run["tuned"], "ref": ref}}) for ref in refs]
    assert len(runs.named(found)) == len(refs)


def test_no_optimizer_state_is_lost_because_its_name_is_taken() -> None:
    found = [paramdiff.adam(*(CHECKPOINTS / run / f"checkpoint-{n}" for n in (199, 200))) for run in ("rl-adamw", "sft")]
    table = listing.moments(runs.sides(found))
    assert len(table.heads) == 1 + 4
    assert len(set(table.heads)) == 1 + 4


def test_columns_of_an_own_measure_are_listed(tmp_path: Path) -> None:
    found = pair(tmp_path, {"a.weight": MATRIX, "b": MATRIX[0]}, {"a.weight": MATRIX + 1, "b": MATRIX[0]})
    found.tables["tensors"] = found.tensors.with_columns(pl.Series("mine", [0.5, math.inf]))
    listed = {column["title"]: column for column in listing.tensors(found)["columns"]}
    assert listed["mine"]["values"] == [0.5, "inf"]
    assert listed["mine"]["kind"] == "number"


def test_figures_of_the_page_hold_the_counts() -> None:
    """The changed share of every cell of the heat map, as its text says it, against numpy."""
    text = page(diff("rl-sgd"))
    drawn = unpacked(text, "heat")
    figure = next(fig for key, fig in drawn.items() if key == "share of parameters changed")
    where = changes(SAMPLES / "base", SAMPLES / "rl-sgd")
    groups: dict[tuple[str, int | None], list[np.ndarray[Any, Any]]] = {}
    for name, part in where.items():
        groups.setdefault((module(name), layer(name)), []).append(part.ravel())
    expected = sorted((int(np.concatenate(parts).sum()), sum(map(len, parts))) for parts in groups.values())
    said = [cell for row in figure["data"][-1]["hovertext"] for cell in row if cell]
    found = sorted(tuple(int(n.replace(",", "")) for n in re.search(r"([\d,]+) of ([\d,]+) par", c).groups()) for c in said)  # type: ignore[union-attr]
    assert found == expected
