"""Which tensors are compared, by which rule, and that nothing is dropped in silence."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdiff import checkpoints
from paramdiff.errors import NothingToCompare, OptionError, PairingError
from paramdiff.names import strip_wrappers
from paramdiff.pairing import REASONS, Alignment, align
from tests.helpers import model_dir

HEAD, EMBED, OTHER = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def aligned(path: Path, base, tuned, configs=(None, None), **options) -> Alignment:
    """Two checkpoints made, opened and aligned; a list of names stands for small tensors of these names."""
    opened = []
    for side, tensors, config in zip(("base", "tuned"), (base, tuned), configs, strict=True):
        if not isinstance(tensors, dict):
            tensors = {name: torch.ones(4, 2) for name in tensors}
        opened.append(checkpoints.open(str(model_dir(path / side, tensors, config))))
    try:
        plan = align(*opened, **options)
    finally:
        for checkpoint in opened:
            checkpoint.close()
    check_complete(plan)
    return plan


def check_complete(plan: Alignment) -> None:
    for number, side in enumerate(("base", "tuned")):
        seen = {t.sides[number].name for t in plan.tensors}
        left = {entry.name for entry in plan.coverage if entry.side == side}
        assert all(n in seen or strip_wrappers(n) in left for n in plan.checkpoints[number].tensors)
    assert {entry.reason for entry in plan.coverage} <= set(REASONS)
    compared = {t.name for t in plan.tensors}
    assert all(t.duplicate_of is None or t.duplicate_of in compared for t in plan.tensors)


def rules(plan: Alignment) -> dict[str, tuple[str, str | None]]:
    return {t.name: (t.rule, t.duplicate_of) for t in plan.tensors}


def left(plan: Alignment) -> set[tuple[str, str, str]]:
    return {(entry.name, entry.side, entry.reason) for entry in plan.coverage}


def test_same_names_and_names_of_one_side(tmp_path):
    plan = aligned(tmp_path, ["a", "b", "c"], ["b", "c", "d"])
    assert rules(plan) == {"b": ("same_name", None), "c": ("same_name", None)}
    assert left(plan) == {("a", "base", "only_base"), ("d", "tuned", "only_tuned")}


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.", "module._orig_mod."]
)
def test_wrappers_of_either_side(tmp_path, wrapper):
    for number, sides in enumerate(((["a.w"], [f"{wrapper}a.w"]), ([f"{wrapper}a.w"], ["a.w"]))):
        assert rules(aligned(tmp_path / str(number), *sides)) == {"a.w": ("wrapper_stripped", None)}
    assert rules(aligned(tmp_path / "both", [f"{wrapper}a.w"], [f"{wrapper}a.w"])) == {"a.w": ("same_name", None)}


def test_two_names_for_one_parameter(tmp_path):
    with pytest.raises(PairingError) as caught:
        aligned(tmp_path, ["a", "module.a"], ["a"])
    assert not isinstance(caught.value, NothingToCompare)
    assert all(word in str(caught.value) for word in (str(tmp_path / "base"), "'a'", "'module.a'"))


def test_include_and_exclude(tmp_path):
    names = ["x.q.weight", "x.k.weight", "y.q.weight"]
    plan = aligned(tmp_path / "1", names, [*names, "x.q.bias"], include=[r"^x\."], exclude=["k", "bias"])
    assert set(rules(plan)) == {"x.q.weight"}
    assert ("x.q.bias", "tuned", "excluded") in left(plan)
    assert ("y.q.weight", "base", "excluded") in left(plan)
    assert ("y.q.weight", "tuned", "excluded") in left(plan)
    with pytest.raises(NothingToCompare, match="--include/--exclude"):
        aligned(tmp_path / "2", names, names, include=["nothing"])


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<n>", "a{99999999999999}", "(" * 5000])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_pattern_that_is_none(tmp_path, pattern, option):
    with pytest.raises(OptionError, match=f"--{option}"):
        aligned(tmp_path, ["a"], ["a"], **{option: [pattern]})


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
NESTED = {"text_config": {"tie_word_embeddings": True}}


@pytest.mark.parametrize("stored_by", ["base", "tuned"])
@pytest.mark.parametrize("lacking", [TIED, UNTIED, NESTED, None, {"model_type": "gpt2"}], ids=str)
@pytest.mark.parametrize("storing", [TIED, UNTIED, None], ids=str)
def test_head_that_one_side_stores(tmp_path, stored_by, lacking, storing):
    """A config without the key says nothing: older transformers leave out `true`, which is its default."""
    sides, configs = [[EMBED, OTHER, HEAD], [EMBED, OTHER]], [storing, lacking]
    if stored_by == "tuned":
        sides, configs = sides[::-1], configs[::-1]
    plan = aligned(tmp_path, *sides, configs=configs)
    if lacking == UNTIED:
        assert left(plan) == {(HEAD, stored_by, f"only_{stored_by}")}
    else:
        assert rules(plan)[HEAD] == ("tied_head", None if storing == UNTIED else EMBED)
        assert left(plan) == set()


@pytest.mark.parametrize("a", [TIED, UNTIED, NESTED, None], ids=str)
@pytest.mark.parametrize("b", [TIED, UNTIED, NESTED, None], ids=str)
def test_head_that_both_sides_store(tmp_path, a, b):
    plan = aligned(tmp_path, [EMBED, HEAD], [EMBED, HEAD], configs=(a, b))
    both = all(config in (TIED, NESTED) for config in (a, b))
    assert rules(plan)[HEAD] == ("same_name", EMBED if both else None)


def test_head_is_counted_where_its_embedding_is_not(tmp_path):
    plan = aligned(tmp_path, [EMBED, HEAD], [EMBED, HEAD], configs=(TIED, TIED), exclude=["embed"])
    assert rules(plan) == {HEAD: ("same_name", None)}


def test_head_is_counted_where_its_embedding_has_no_partner(tmp_path):
    plan = aligned(tmp_path, [EMBED, HEAD], ["embed_tokens.weight", HEAD], configs=(TIED, TIED))
    assert rules(plan) == {HEAD: ("same_name", None)}


@pytest.mark.parametrize(("a", "b"), [(4, 6), (6, 4)])
def test_resized_vocabulary(tmp_path, a, b):
    sides = [{EMBED: torch.ones(n, 2), OTHER: torch.ones(2)} for n in (a, b)]
    plan = aligned(tmp_path / "1", *sides)
    assert rules(plan)[EMBED] == ("resized_vocabulary", None)
    assert next(t.shape for t in plan.tensors if t.name == EMBED) == (4, 2)
    (rest,) = plan.coverage
    assert (rest.name, rest.side, rest.reason) == (EMBED, "base" if a > b else "tuned", "resized")
    assert (rest.detail, rest.numel) == ("rows 4 to 5", 4)
    plan = aligned(tmp_path / "2", *sides, resized=False)
    assert left(plan) == {(EMBED, "base", "shape_mismatch"), (EMBED, "tuned", "shape_mismatch")}


def test_shapes_that_differ(tmp_path):
    plan = aligned(tmp_path, {"a": torch.ones(2, 3), "b": torch.ones(2)}, {"a": torch.ones(3, 2), "b": torch.ones(2)})
    assert left(plan) == {("a", "base", "shape_mismatch"), ("a", "tuned", "shape_mismatch")}
    assert {entry.detail for entry in plan.coverage} == {"[2, 3] against [3, 2]"}


def test_complex_numbers(tmp_path):
    sides = {"c": torch.ones(2, dtype=torch.complex64), "b": torch.ones(2)}
    assert left(aligned(tmp_path, sides, sides)) == {("c", "base", "not_numeric"), ("c", "tuned", "not_numeric")}


def test_nothing_in_common(tmp_path):
    for number, (base, tuned) in enumerate(((["a"], ["b"]), ({}, ["b"]), (["a"], {}))):
        with pytest.raises(NothingToCompare) as caught:
            aligned(tmp_path / str(number), base, tuned)
        assert str(tmp_path / str(number)) in str(caught.value)


NAMES = st.sampled_from(
    [HEAD, EMBED, OTHER, "embed_tokens.weight", "embed_out.weight", "module.a", "a", "_orig_mod.b", "b", "wte.weight", "x.w"]
)
TENSORS = st.dictionaries(NAMES, st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=7)
CONFIGS = st.sampled_from([None, {}, TIED, UNTIED, NESTED])


@given(
    TENSORS,
    TENSORS,
    st.tuples(CONFIGS, CONFIGS),
    st.sampled_from([(), ("weight",), ("a",)]),
    st.sampled_from([(), ("embed",)]),
)
@settings(max_examples=150, deadline=None)
def test_every_tensor_is_compared_or_covered(base, tuned, configs, include, exclude):
    sides = [
        {n: torch.zeros(rows, 2, dtype=torch.complex64 if odd else torch.float32) for n, (rows, odd) in side.items()}
        for side in (base, tuned)
    ]
    with tempfile.TemporaryDirectory() as folder:
        try:
            aligned(Path(folder), *sides, configs=configs, include=include, exclude=exclude)
        except PairingError as error:
            assert folder in str(error)  # noqa: PT017
