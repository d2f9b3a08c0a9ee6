"""Odd checkpoints: every figure is drawn, or one sentence says why it cannot be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

from paramdiff import Diff, Moments, plots
from paramdiff.errors import OptionError
from paramdiff.plots import quantities
from tests.plots.helpers import UP, Tensors, assert_described, compared, normal


def up(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {UP.format(layer): tensor for layer, tensor in enumerate(tensors)}


W = [normal(seed, 6, 8) for seed in range(6)]
F64, BF16 = torch.float64, torch.bfloat16
NAN, INF = math.nan, math.inf


def with_elements(tensor: torch.Tensor, *elements: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[: len(elements)] = torch.tensor(elements).to(tensor.dtype)
    return changed


def integers(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    made = [torch.randint(0, 2, (6, 8), generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(2)]
    return made[0], made[1]


SHAPES = [(4, 0), (0, 0), (0,), (0, 4, 5)]
VECTORS = {f"model.layers.{layer}.input_layernorm.weight": normal(layer, 8) for layer in range(2)}
SCALARS = {f"model.layers.{layer}.scale": torch.tensor(1.0 + layer) for layer in range(2)}
QUICK: dict[str, tuple[Tensors, Tensors]] = {
    "identical": (up(*W[:3]), up(*W[:3])),
    "vectors": (VECTORS, {name: 2 * v for name, v in VECTORS.items()}),
    "no layers": ({"lm_head.weight": W[0]}, {"lm_head.weight": W[1]}),
    "some not finite": (up(*W[:3]), up(with_elements(W[0], NAN, INF, -INF), W[4], W[5])),
    "one of another type": (up(*W[:3]), up(W[3].float(), W[4], W[5])),
    "integers": tuple(up(side) for side in integers(torch.int8)),  # type: ignore[dict-item]
    "no elements": (up(torch.zeros(0, 4, dtype=BF16)),) * 2,
    "no elements beside others": (up(torch.zeros(4, 0, dtype=BF16), W[0]), up(torch.zeros(4, 0, dtype=BF16), W[1])),
}
SLOW: dict[str, tuple[Tensors, Tensors]] = {
    "scalars": (SCALARS, {name: 2 * v for name, v in SCALARS.items()}),
    "single layer": (up(W[0]), up(W[1])),
    "one element": (up(torch.zeros(1, 1)), up(torch.ones(1, 1))),
    "all NaN": (up(*W[:2]), up(*(torch.full((6, 8), NAN, dtype=BF16),) * 2)),
    "another type": (up(*W[:2]), up(*(w.float() + 1 for w in W[:2]))),
    **{f"empty {s}": (up(torch.zeros(s, dtype=BF16)),) * 2 for s in SHAPES},
    **{f"empty {s} beside others": (up(torch.zeros(s), W[0].float()), up(torch.zeros(s), W[1].float())) for s in SHAPES},
    "NaN on both sides": (up(torch.full((6, 8), NAN)),) * 2,
    "infinite on both sides": (up(torch.full((6, 8), INF)), up(torch.full((6, 8), -INF))),
    "from zero": (up(*(0 * w for w in W[:3])), up(*W[:3])),
    "to zero": (up(*W[:3]), up(*(0 * w for w in W[:3]))),
    "the sign of zero": (up(torch.zeros(3, 3)), up(-torch.zeros(3, 3))),
    "layers far apart": ({UP.format(n): W[n % 2] for n in (0, 999_999_999)}, {UP.format(n): W[2] for n in (0, 999_999_999)}),
    "a convolution": ({"layers.0.conv.weight": W[0].view(6, 4, 2)}, {"layers.0.conv.weight": W[1].view(6, 4, 2)}),
    "a thin matrix": (up(torch.zeros(1, 7)), up(torch.ones(1, 7))),
    "tied": ({"model.embed_tokens.weight": W[0], "lm_head.weight": W[0]},
             {"model.embed_tokens.weight": W[1], "lm_head.weight": W[1]}),
    "only vectors changed": ({**up(*W[:2]), **VECTORS}, {**up(*W[:2]), **{n: 2 * v for n, v in VECTORS.items()}}),
    "an empty stack": ({"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(0, 4, 5), **up(W[0])},
                       {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(0, 4, 5), **up(W[1])}),
    "a stack": ({"model.layers.0.mlp.experts.gate_up_proj": normal(1, 3, 4, 5)},
                {"model.layers.0.mlp.experts.gate_up_proj": normal(2, 3, 4, 5)}),
    "from one end of float32 to the other": (up(torch.full((4, 4), -3.4e38)), up(torch.full((4, 4), 3.4e38))),
    "the least of float32": (up(torch.zeros(4, 4)), up(torch.full((4, 4), 1e-45))),
    **{str(t): tuple(up(s) for s in integers(t)) for t in (torch.bool, torch.uint8, torch.int32, torch.int64)},  # type: ignore[dict-item]
    **{str(t): (up(W[0].to(t)), up(W[1].to(t))) for t in (torch.float16, torch.float8_e4m3fn)},
    **{
        f"{value:g} in float64": (up(torch.zeros(4, 4, dtype=F64), torch.ones(4, 4, dtype=F64)),
                                  up(torch.full((4, 4), value, dtype=F64), torch.ones(4, 4, dtype=F64) * 1.5))
        for value in (5e-324, 1e-310, 1e-200, 1e150, 1e154, 1e200, 9e307, 1.7e308)
    },
}  # fmt: skip
ODD = {**QUICK, **SLOW}
FEW = ["sparsity_bits", "max_abs_delta", "mean_delta", "energy_rank_99_percent"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Diff]:
    @cache
    def found(case: str) -> Diff:
        measures = ["change", "magnitude", "rows", "spectrum", "subspace"]
        return compared(tmp_path_factory.mktemp("odd"), *ODD[case], measures=measures, ks=[1, 2], tolerances=[0.0, 1e-5])

    return found


def attempts(diff: Diff, kind: str, columns: list[str]) -> Iterator[tuple[str, Callable[[], go.Figure]]]:
    if kind in ("heatmap", "layers"):
        yield "two runs", lambda: plots.of(kind)({"a": diff, "b": diff})
        for column in columns:
            yield column, lambda column=column: plots.of(kind)(diff, column)
    elif kind == "histogram":
        for which in ("ulp", "log2_abs_delta", "log2_rel_delta"):
            for by in ("kind", "module", None):
                yield f"{which} by {by}", lambda which=which, by=by: plots.histogram(diff, which, by=by)
    elif kind == "spectrum":
        for by in ("module", "layer", "kind"):
            yield f"by {by}", lambda by=by: plots.spectrum(diff, by)
    else:
        for module in (None, *diff.tensors["module"].unique().to_list()):
            yield f"of {module}", lambda module=module: plots.stripes(diff, module)


def assert_draws_or_says_why(diff: Diff, kind: str, columns: list[str]) -> None:
    drawn = 0
    for what, draw in attempts(diff, kind, columns):
        refused = None
        try:
            assert_described(draw())
            drawn += 1
        except OptionError as error:
            refused = error
        except Exception as error:
            error.add_note(f"{kind}: {what}")
            raise
        if refused is not None:
            assert "\n" not in str(refused), what
            assert re.match(r"[A-Z].*\.$", refused.message), what
    if kind in ("heatmap", "layers") and diff.tensors["numel"].sum():
        assert drawn >= 2, "how much changed can always be drawn"


KINDS = ("heatmap", "layers", "histogram", "spectrum", "stripes")


def cases(names: Any) -> list[Any]:
    return [pytest.param(case, kind) for case in names for kind in KINDS]


@pytest.mark.parametrize(("case", "kind"), cases(QUICK))
def test_odd_checkpoints(odd: Callable[[str], Diff], case: str, kind: str) -> None:
    assert_draws_or_says_why(odd(case), kind, FEW)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind"), cases(ODD))
def test_more_odd_checkpoints(odd: Callable[[str], Diff], case: str, kind: str) -> None:
    """With every column that there is."""
    diff = odd(case)
    every = [name for table in ("tensors", "ranks", "subspaces") for name in quantities.drawable(diff, table)]
    assert_draws_or_says_why(diff, kind, list(dict.fromkeys(every)))


@pytest.mark.slow
def test_every_column_of_every_table(sgd: Diff, states: Moments) -> None:
    columns = [(sgd, name) for table in ("tensors", "ranks", "subspaces") for name in quantities.drawable(sgd, table)]
    columns += [(states, name) for name in quantities.drawable(states, "adam")]  # type: ignore[arg-type]
    assert len(columns) > 80
    for result, column in columns:
        for draw in (plots.heatmap, plots.layers):
            assert_described(draw(result, column))
