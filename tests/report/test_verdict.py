"""The sentences of the summary: each number in them, found again from the files; and what they say in odd cases."""

from __future__ import annotations

import csv
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray

import paramdiff
from paramdiff.report import verdict
from paramdiff.report.verdict import Finding
from tests.helpers import model_dir
from tests.report import RUNS, SAMPLES, changes, layer, module, near, stored, three_digits

TOLERANCE = 1e-5
ALL = ["change", "magnitude", "rows", "spectrum", "subspace"]
NUMBER = r"(-?[\d,]+(?:\.\d+)?(?:e[+-]?\d+)?)"


@cache
def diff(run: str) -> paramdiff.Diff:
    return paramdiff.compare(SAMPLES / "base", SAMPLES / run, measures=ALL, ks=[4], tolerances=[TOLERANCE])


def told(found: list[Finding], section: str, word: str = "") -> Finding:
    """The one finding that points to a section."""
    (only,) = [item for item in found if item.section == section and word in item.claim + item.evidence]
    return only


def claims(found: list[Finding]) -> str:
    return " ".join(item.claim for item in found)


def numbers(pattern: str, text: str) -> tuple[str, ...]:
    """The numbers in a sentence; # in `pattern` stands for one, all else for itself."""
    match = re.search(re.escape(pattern).replace(r"\#", NUMBER), text)
    assert match, (pattern, text)
    return match.groups()


def counted(run: str) -> dict[str, tuple[int, int]]:
    """Changed and all elements of each tensor."""
    return {name: (int(where.sum()), where.size) for name, where in changes(SAMPLES / "base", SAMPLES / run).items()}


def shares(run: str, key: object) -> dict[object, float]:
    """Changed share of each group of tensors."""
    changed: dict[object, int] = {}
    size: dict[object, int] = {}
    for name, (some, n) in counted(run).items():
        group = key(name)  # type: ignore[operator]
        changed[group], size[group] = changed.get(group, 0) + some, size.get(group, 0) + n
    return {group: changed[group] / size[group] for group in size}


def deltas(run: str) -> dict[str, NDArray[np.float64]]:
    a, b = stored(SAMPLES / "base"), stored(SAMPLES / run)
    return {name: b[name].astype(np.float64) - a[name].astype(np.float64) for name in a}


@pytest.mark.parametrize("run", RUNS)
def test_how_much_changed(run: str) -> None:
    item = told(verdict.findings(diff(run)), "overall", "Training changed")
    changed, n = (sum(column) for column in zip(*counted(run).values(), strict=True))
    percent, kept = numbers("Training changed # % of the parameters; # % kept their value.", item.claim)
    assert near(percent, 100 * changed / n)
    assert near(kept, 100 - 100 * changed / n)
    some, of, tolerance, above, share = numbers("# of #; above # # (# %).", item.evidence)
    a, b = stored(SAMPLES / "base"), stored(SAMPLES / run)
    expected = sum(int((np.abs(b[name] - a[name]) > np.float32(TOLERANCE)).sum()) for name in a)
    assert (some, of, above, float(tolerance)) == (f"{changed:,}", f"{n:,}", f"{expected:,}", TOLERANCE)
    assert near(share, 100 * expected / n)
    assert "bf16" not in item.evidence  # both sides are bf16, so that it would be said twice


def test_the_count_in_bf16_is_told_where_it_differs() -> None:
    found = paramdiff.compare(SAMPLES / "rl-adamw-fp32", SAMPLES / "rl-adamw")
    item = told(verdict.findings(found), "overall", "as bf16 would show it")
    a, b = stored(SAMPLES / "rl-adamw-fp32"), stored(SAMPLES / "rl-adamw")
    changed = sum(int((a[name] != b[name]).sum()) for name in a)
    rounded = 0
    for name in a:
        bits = a[name].view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).view(np.float32)
        rounded += int((nearest != b[name]).sum())
    n = sum(values.size for values in a.values())
    assert changed != rounded
    some, of, bf16, share = numbers("# of #; after rounding to bf16 # differ (# %)", item.evidence)
    assert (some, of, bf16) == (f"{changed:,}", f"{n:,}", f"{rounded:,}")
    assert near(share, 100 * rounded / n)


@cache
def published() -> list[dict[str, str]]:
    text = (Path(paramdiff.__file__).parent / "published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def ranges(notion: str) -> dict[str, tuple[float, float, int]]:
    """Lowest and highest published sparsity in %, and how many there are, of supervised runs and of all others."""
    own = [
        row for row in published() if row["notion"] == notion and (notion != "above" or float(row["tolerance"]) == TOLERANCE)
    ]
    found = {}
    for word, is_sft in (("reinforcement learning", False), ("supervised", True)):
        values = [float(row["sparsity_percent"]) for row in own if (row["algorithm"] == "SFT") is is_sft]
        if values:
            found[word] = (min(values), max(values), len(values))
    return found


def placed(claim: str, evidence: str, notion: str, percent: float) -> None:
    """Hold a sentence about published numbers to the table."""
    known = ranges(notion)
    inside = [word for word, (low, high, _) in known.items() if low <= percent <= high]
    assert [word for word in ("reinforcement learning", "supervised") if word in claim] == inside
    assert ("outside" in claim) is not bool(inside)
    for low, high, count in known.values():
        assert any(
            near(a, low) and near(b, high) and int(c) == count
            for a, b, c in re.findall(rf"{NUMBER} % to {NUMBER} % \((\d+) pairs\)", evidence)
        )


@pytest.mark.parametrize("run", RUNS)
def test_beside_papers_by_tolerance(run: str) -> None:
    item = told(verdict.findings(diff(run)), "overall", "papers")
    a, b = stored(SAMPLES / "base"), stored(SAMPLES / run)
    still = sum(int((np.abs(b[name] - a[name]) <= np.float32(TOLERANCE)).sum()) for name in a)
    percent = 100 * still / sum(values.size for values in a.values())
    said, tolerance = numbers("# % |Δ| ≤ # here", item.evidence)
    assert near(said, percent)
    assert float(tolerance) == TOLERANCE
    placed(item.claim, item.evidence, "above", percent)


@pytest.mark.parametrize("still", [0, 5, 6, 100, 188, 189, 300, 454, 455, 600, 917, 918, 999])
def test_beside_papers_in_bf16(still: int, tmp_path: Path) -> None:
    a = torch.ones(1000)
    b = torch.full((1000,), 2.0)
    b[:still] = 1
    found = paramdiff.compare(model_dir(tmp_path / "a", {"a.weight": a}), model_dir(tmp_path / "b", {"a.weight": b}))
    item = told(verdict.findings(found), "overall", "papers")
    assert near(numbers("# % unchanged in bf16 here", item.evidence)[0], still / 10)
    placed(item.claim, item.evidence, "changed_bf16", still / 10)


@pytest.mark.parametrize("run", RUNS)
def test_where(run: str) -> None:
    item = told(verdict.findings(diff(run)), "heat")
    by_module, by_layer = shares(run, module), shares(run, layer)
    del by_layer[None]
    most, high, least, low = re.search(  # type: ignore[union-attr]
        rf"Most changed is (\w+) \({NUMBER} %\), least (\w+)(?: and \d+ others?)? \({NUMBER} %\)", item.claim
    ).groups()
    assert by_module[most] == max(by_module.values())
    assert by_module[least] == min(by_module.values())
    assert near(high, 100 * by_module[most])
    assert near(low, 100 * by_module[least])
    a, first, b, last = numbers("# % in layer # to # % in layer #", item.evidence)
    assert by_layer[int(first)] == min(by_layer.values())
    assert by_layer[int(last)] == max(by_layer.values())
    assert near(a, 100 * by_layer[int(first)])
    assert near(b, 100 * by_layer[int(last)])
    assert ("uneven" in item.evidence) is (max(by_layer.values()) >= 1.5 * min(by_layer.values()))
    same = sum(some == 0 for some, _ in counted(run).values())
    assert f"{same} of {len(counted(run))} tensors did not change at all" in item.evidence


@pytest.mark.parametrize("run", RUNS)
def test_how_far(run: str) -> None:
    item = told(verdict.findings(diff(run)), "histograms")
    a, b = stored(SAMPLES / "base"), stored(SAMPLES / run)
    before = np.concatenate([values.ravel() for values in a.values()]).astype(np.float64)
    after = np.concatenate([b[name].ravel() for name in a]).astype(np.float64)
    delta = after - before
    relative = float(np.linalg.norm(delta) / np.linalg.norm(before))
    assert three_digits(numbers("‖Δ‖ is # times ‖base‖", item.claim)[0], relative)
    word = next(word for word in ("tiny", "small", "moderate", "large") if f"is {word}:" in item.claim)
    assert word == ("tiny", "small", "moderate", "large")[sum(relative >= edge for edge in (1e-3, 1e-2, 0.1))]
    d, norm, largest, mean, flips = numbers("‖Δ‖ #, ‖base‖ #, largest |Δ| #, mean |Δ| #; # sign flips", item.evidence)
    assert three_digits(d, float(np.linalg.norm(delta)))
    assert three_digits(norm, float(np.linalg.norm(before)))
    assert three_digits(largest, float(np.abs(delta).max()))
    assert three_digits(mean, float(np.abs(delta).mean()))
    assert int(flips.replace(",", "")) == int((before * after < 0).sum())
    one, changed = 0, 0
    for name in a:
        bits = [(side[name].view(np.uint32) >> 16).astype(np.int64) for side in (a, b)]
        place = [np.where(part & 0x8000, -(part & 0x7FFF), part) for part in bits]  # on the line of all bf16 numbers
        distance = np.abs(place[0] - place[1])
        one, changed = one + int((distance == 1).sum()), changed + int((distance > 0).sum())
    assert near(numbers("# % of the changes that have a distance in ulps are by one", item.evidence)[0], 100 * one / changed)


@pytest.mark.parametrize("run", RUNS)
def test_rank(run: str) -> None:
    item = told(verdict.findings(diff(run)), "spectra")
    matrices = [values for values in deltas(run).values() if values.ndim == 2]
    full, energy, numeric, top, stable = 0, 0, 0, [], []
    for matrix in matrices:
        full += min(matrix.shape)
        sigma = np.linalg.svd(matrix, compute_uv=False)
        if sigma[0] == 0:
            continue
        held = np.cumsum(sigma**2) / np.sum(sigma**2)
        energy += int(np.argmax(held >= 0.99)) + 1
        numeric += int((sigma > sigma[0] * max(matrix.shape) * 2.0**-23).sum())
        top.append(sigma[0] / np.linalg.norm(matrix))
        stable.append(float(np.sum(sigma**2) / sigma[0] ** 2))
    share = 100 * energy / full
    assert abs(float(numbers("99 % of its energy takes # %", item.claim)[0]) - share) <= 0.0501
    word = next(word for word in ("high", "middling", "low") if f"of {word} rank" in item.claim)
    assert word == ("low", "middling", "high")[sum(share > edge for edge in (10, 50))]
    count, said, one, low = numbers(
        "# of 29 matrices changed; numeric rank # % of full (rounding alone makes updates numerically full-rank); "
        "one direction holds # % of a matrix's Frobenius norm (median); stable rank #",
        item.evidence,
    )
    assert int(count) == len(matrices) == len(top) == 29
    assert abs(float(said) - 100 * numeric / full) <= 0.051  # four digits, of which trailing zeros are left out
    assert near(one, 100 * float(np.median(top)))
    assert three_digits(low, float(np.median(stable)))


@pytest.mark.parametrize("run", RUNS)
def test_stripes(run: str) -> None:
    item = told(verdict.findings(diff(run)), "stripes")
    touched, lengths = [0, 0], [0, 0]
    gathered: tuple[list[float], list[float]] = ([], [])
    for where in changes(SAMPLES / "base", SAMPLES / run).values():
        if where.ndim == 2 and where.any():
            for axis in (0, 1):
                counts = np.sort(where.sum(axis=1 - axis))[::-1]
                touched[axis] += int((counts > 0).sum())
                lengths[axis] += len(counts)
                gathered[axis].append(counts[: math.ceil(len(counts) / 100)].sum() / counts.sum())
    for axis, word in enumerate(("rows", "columns")):
        pattern = f"# % of the {word} of changed matrices have a change; the 1 % of {word} with most hold # % of a matrix's"
        reached, held = numbers(pattern, item.evidence)
        assert near(reached, 100 * touched[axis] / lengths[axis])
        assert near(held, 100 * float(np.median(gathered[axis])))
    assert item.claim == "Changes are spread over rows and columns."


def test_stripes_that_are_there(tmp_path: Path) -> None:
    base = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    tuned = base.clone()
    tuned[7] += 1
    tuned[::50, 3] += 1
    sides = [model_dir(tmp_path / side, {"a.weight": values}) for side, values in (("a", base), ("b", tuned))]
    item = told(verdict.findings(paramdiff.compare(*sides, measures=["change", "rows"])), "stripes")
    assert item.claim.startswith("Changes gather in stripes")
    (share,) = numbers("the 1 % of rows with most hold # % of a matrix's changes", item.evidence)
    assert near(share, 100 * (200 + 2) / (200 + 6))  # row 7 and the next two rows: one more change in each
    assert three_digits(numbers("hold # times", item.claim)[0], (202 / 206) / (3 / 300))


@pytest.mark.parametrize("run", RUNS)
def test_directions(run: str) -> None:
    item = told(verdict.findings(diff(run)), "directions")
    a, b = stored(SAMPLES / "base"), stored(SAMPLES / run)
    angles: tuple[list[float], list[float]] = ([], [])
    for name in a:
        if a[name].ndim == 2:
            parts = [np.linalg.svd(side[name].astype(np.float64), full_matrices=False) for side in (a, b)]
            for found, (x, y) in zip(angles, (([p.U[:, :4] for p in parts]), ([p.Vh[:4].T for p in parts])), strict=True):
                sine = np.linalg.norm(y - x @ (x.T @ y), ord=2)  # of the largest principal angle
                found.append(math.degrees(math.asin(min(1.0, sine))))
    k, left, right = numbers("The # leading directions turned by #° (left) and #° (right)", item.claim)
    assert k == "4"
    assert three_digits(left, float(np.median(angles[0])))
    assert three_digits(right, float(np.median(angles[1])))
    each = diff(run).subspaces.filter(pl.col("changed_bf16") > 0)
    weight = each["changed_bf16"].sum()
    principal, low = (
        float((each[name] * each["changed_bf16"]).sum()) / weight for name in ("principal_overlap", "low_overlap")
    )
    said = numbers("# % of the bf16 changes lie on principal weights and # % on low-magnitude", item.evidence)
    assert near(said[0], 100 * principal)
    assert near(said[1], 100 * low)


def pair(where: Path, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], **options: object) -> list[Finding]:
    sides = model_dir(where / "base", base), model_dir(where / "tuned", tuned)
    options.setdefault("measures", ["change", "magnitude", "rows", "spectrum"])
    return verdict.findings(paramdiff.compare(*sides, **options))  # type: ignore[arg-type]


MATRIX = torch.arange(1.0, 49).reshape(8, 6)


def test_the_same_values(tmp_path: Path) -> None:
    found = pair(tmp_path, {"a.weight": MATRIX, "b": MATRIX[0]}, {"a.weight": MATRIX, "b": MATRIX[0]})
    assert [item.claim for item in found] == ["The two checkpoints do not differ."]
    assert found[0].evidence == "All 54 parameters in 2 tensors have the same values."


def test_more_tensors_on_one_side_are_a_difference(tmp_path: Path) -> None:
    found = pair(tmp_path, {"a.weight": MATRIX}, {"a.weight": MATRIX, "b.weight": MATRIX})
    assert "do not differ" not in claims(found)
    assert "not compared" in claims(found)


def test_changed_bits_are_told_where_no_value_changed(tmp_path: Path) -> None:
    found = pair(tmp_path, {"a.weight": torch.zeros(3, 3)}, {"a.weight": -torch.zeros(3, 3)})
    assert re.search(r"\bbits\b", " ".join(item.claim + item.evidence for item in found))


def test_one_module_and_one_layer(tmp_path: Path) -> None:
    item = told(pair(tmp_path, {"layers.0.q.weight": MATRIX}, {"layers.0.q.weight": MATRIX + 1}), "heat")
    assert item.claim == "All of it is in one module, q."
    assert "Along the layers" not in item.evidence


def test_modules_that_changed_alike_are_not_ranked(tmp_path: Path) -> None:
    names = ("a.weight", "b.weight")
    item = told(pair(tmp_path, dict.fromkeys(names, MATRIX), dict.fromkeys(names, MATRIX + 1)), "heat")
    assert not re.search(r"[Mm]ost changed is", item.claim)


def test_no_elements(tmp_path: Path) -> None:
    found = pair(tmp_path, {"a.weight": torch.zeros(0, 4)}, {"a.weight": torch.zeros(0, 4)})
    assert "no elements were compared" in found[0].claim
    assert "100 %" not in claims(found)


def test_a_base_of_zeros(tmp_path: Path) -> None:
    item = told(pair(tmp_path, {"a.weight": torch.zeros(8, 6)}, {"a.weight": MATRIX}), "histograms")
    assert "all zeros" in item.claim
    assert three_digits(numbers("‖Δ‖ #, ‖base‖ #", item.evidence)[0], float(np.linalg.norm(MATRIX.numpy())))


@pytest.mark.parametrize("side", [0, 1])
def test_nothing_finite_is_not_zero(side: int, tmp_path: Path) -> None:
    both = [{"a.weight": MATRIX}, {"a.weight": MATRIX}]
    both[side] = {"a.weight": torch.full_like(MATRIX, math.nan)}
    found = pair(tmp_path, *both)
    assert "zeros" not in claims(found)
    assert "48 elements are NaN or infinite" in claims(found)


def test_nonfinite_elements(tmp_path: Path) -> None:
    base, tuned = MATRIX.clone(), MATRIX + 1
    base[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    tuned[1, :2] = math.nan
    found = pair(tmp_path, {"a.weight": base}, {"a.weight": tuned})
    item = told(found, "tensors")
    assert item.claim == "5 elements are NaN or infinite."
    assert item.evidence.startswith("3 in the base, 2 in the tuned side")
    finite = np.isfinite(base.numpy()) & np.isfinite(tuned.numpy())
    assert three_digits(numbers("‖Δ‖ #,", told(found, "histograms").evidence)[0], math.sqrt(finite.sum()))


def test_one_nonfinite_element_is_told_in_the_singular(tmp_path: Path) -> None:
    tuned = MATRIX.clone()
    tuned[0, 0] = math.nan
    found = pair(tmp_path, {"a.weight": MATRIX}, {"a.weight": tuned})
    assert told(found, "tensors").claim == "1 element is NaN or infinite."


@pytest.mark.parametrize(("scale", "dtype"), [(1e300, torch.float64), (1e30, torch.float32)])
def test_large_values_have_a_norm_or_none_is_told(scale: float, dtype: torch.dtype, tmp_path: Path) -> None:
    base = MATRIX.to(dtype) * scale / 48
    text = claims(pair(tmp_path, {"a.weight": base}, {"a.weight": -base}))
    assert "– times" not in text
    if dtype == torch.float32:
        assert three_digits(numbers("‖Δ‖ is # times ‖base‖", text)[0], 2)


def test_what_was_not_compared(tmp_path: Path) -> None:
    base = {"a.weight": MATRIX, "gone.weight": MATRIX, "gone.bias": MATRIX, "turned.weight": MATRIX}
    tuned = {"a.weight": MATRIX + 1, "new.weight": MATRIX, "turned.weight": MATRIX.T.contiguous()}
    item = told(pair(tmp_path, base, tuned), "coverage")
    assert re.search(r"\b2 only (in the )?base\b", item.evidence)
    assert re.search(r"\b1 only (in the )?tuned\b", item.evidence)
    assert re.match(r"4 tensors were not compared", item.claim)  # two gone, one new, one turned


def test_one_tensor_is_told_in_the_singular(tmp_path: Path) -> None:
    found = pair(tmp_path, {"a.weight": MATRIX, "b": MATRIX[0]}, {"a.weight": MATRIX})
    assert told(found, "coverage").claim.startswith("1 tensor was not compared")
    assert "1 tensors" not in claims(found)


def test_warnings_are_told(tmp_path: Path) -> None:
    sides = model_dir(tmp_path / "a", {"a.weight": MATRIX}), model_dir(tmp_path / "b", {"a.weight": MATRIX + 1})
    found = paramdiff.compare(*sides)
    found.run["warnings"] = ["The disk smells of smoke."]
    assert told(verdict.findings(found), "provenance").evidence == "The disk smells of smoke."


def test_a_share_of_nearly_all_is_written_shortly(tmp_path: Path) -> None:
    """All of a rank-one update is in one direction; rounding must not make 100.0000000000 % of it."""
    base = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    item = told(pair(tmp_path, {"a.weight": base}, {"a.weight": base + 1}), "spectra")
    assert "100 % of a matrix's Frobenius norm" in item.evidence
    assert item.evidence.startswith("1 of 1 ")


def test_all_changed_small_matrices_have_no_stripes(tmp_path: Path) -> None:
    """Where every element changed, no row has more than its part, and one of eight rows is no 1 %."""
    found = pair(tmp_path, {"a.weight": MATRIX}, {"a.weight": MATRIX + 1})
    assert "gather in stripes" not in claims(found)


def test_sections_that_findings_point_to_are_known() -> None:
    pointed = {item.section for run in RUNS for item in verdict.findings(diff(run))}
    assert pointed == {"overall", "heat", "histograms", "spectra", "stripes", "directions"}


CHECKPOINT = SAMPLES / "checkpoints" / "rl-adamw" / "checkpoint-200"


def test_of_moments() -> None:
    """Against a few lines of torch: û = m̂/(√v̂ + ε) of every element."""
    state = torch.load(CHECKPOINT / "optimizer.pt", weights_only=True)
    group = state["param_groups"][0]
    (beta1, beta2), eps = group["betas"], group["eps"]
    mhat, step = [], []
    for one in state["state"].values():
        t = float(one["step"])
        m = one["exp_avg"].double().flatten() / (1 - beta1**t)
        v = one["exp_avg_sq"].double().flatten() / (1 - beta2**t)
        mhat.append(m)
        step.append(m / (v.sqrt() + eps))
    m, u = torch.cat(mhat), torch.cat(step)
    cosine = float(m @ u / (m.norm() * u.norm()))
    (item,) = verdict.of_moments(paramdiff.adam(CHECKPOINT))
    assert three_digits(numbers("adaptivity #", item.claim)[0], 1 - cosine)
    assert three_digits(numbers("cos(step, momentum) #", item.evidence)[0], cosine)
    assert "far from" in item.claim
    assert 1 - cosine > 0.3


def test_a_state_of_sgd_is_not_called_adam(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "sgd.pt")
    found = verdict.of_moments(paramdiff.adam(tmp_path / "sgd.pt"))
    assert "Adam" not in claims(found)
