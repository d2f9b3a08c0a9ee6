"""`compare` and `Diff`: summary, roll-ups, saving and loading, and the public surface."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

import paramdiff
from paramdiff import columns

DATA = Path(__file__).parent.parent / "sample_data"


@pytest.fixture(scope="module")
def diff() -> paramdiff.Diff:
    return paramdiff.compare(DATA / "base", DATA / "rl-adamw", tolerances=[1e-5, 1e-8])


def test_the_public_names_are_these() -> None:
    assert sorted(paramdiff.__all__) == paramdiff.__all__
    assert set(paramdiff.__all__) >= {"compare", "load", "Diff", "ParamdiffError"}
    assert all(getattr(paramdiff, name).__module__.startswith("paramdiff.") for name in paramdiff.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = paramdiff.nonsense  # type: ignore[attr-defined]


@pytest.mark.parametrize("run", ["rl-adamw", "rl-sgd", "sft", "rl-adamw-fp32"])
def test_counts_of_sample_data_are_those_found_without_paramdiff(run: str) -> None:
    measured = json.loads((DATA / "runs.json").read_text())["measured"][run]
    summary = paramdiff.compare(DATA / "base", DATA / run, tolerances=[1e-5, 1e-8]).summary()
    assert summary["numel"] == measured["numel"]
    assert summary["changed"] == measured["changed"]
    assert summary["changed_bf16"] == measured.get("changed_after_bf16_rounding", measured["changed"])
    assert {f"{entry['tol']:.0e}": entry["above"] for entry in summary["tolerances"]} == measured["above"]


def test_roll_ups_pool_elements_and_never_average_ratios(diff: paramdiff.Diff) -> None:
    base, tuned = (load_file(DATA / name / "model.safetensors") for name in ("base", "rl-adamw"))
    for row in diff.by("layer", "module").to_dicts():
        names = [name for name in base if _belongs(name, row["layer"], row["module"])]
        a = np.concatenate([base[name].double().numpy().ravel() for name in names])
        b = np.concatenate([tuned[name].double().numpy().ravel() for name in names])
        assert row["tensors"] == len(names)
        assert row["numel"] == a.size
        assert row["changed"] == int((a != b).sum())
        assert row["sparsity"] == pytest.approx(float((a == b).mean()), abs=1e-15)
        assert row["above[1e-05]"] == int((np.abs(b - a) > 1e-5).sum())
        assert row["rel_l2"] == pytest.approx(float(np.linalg.norm(b - a) / np.linalg.norm(a)), rel=1e-12)
        assert row["mean_abs_delta"] == pytest.approx(float(np.abs(b - a).mean()), rel=1e-12)
        assert row["cosine"] == pytest.approx(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), rel=1e-12)
        assert row["max_abs_delta"] == float(np.abs(b - a).max())


def _belongs(name: str, layer: int | None, module: str) -> bool:
    in_layer = f"layers.{layer}." in name if layer is not None else "layers." not in name
    return in_layer and name.split(".")[-2] == module


def test_summary_is_the_roll_up_of_everything(diff: paramdiff.Diff) -> None:
    summary, tensors = diff.summary(), diff.tensors
    assert summary["changed"] == tensors["changed"].sum()
    assert summary["numel"] == tensors["numel"].sum()
    assert summary["l2_delta"] == pytest.approx(math.sqrt((tensors["l2_delta"] ** 2).sum()), rel=1e-14)
    assert summary["coverage"]["compared"] == tensors.height == 50
    assert summary["bytes_read"] == 2 * 2 * summary["numel"]


def test_tables_have_the_documented_columns_and_types(diff: paramdiff.Diff) -> None:
    others = {"adam", columns.ADAM_HISTOGRAMS, "ranks", "spectra", "subspaces", "angles", "weight_spectra"}
    assert set(diff.tables) == set(columns.TABLES) - others
    for table, frame in diff.tables.items():
        found = {name.split("[")[0] + ("[τ]" if "[" in name else ""): str(kind) for name, kind in frame.schema.items()}
        assert found == {name: kind for name, (kind, _) in columns.TABLES[table].items()}, table


def test_the_columns_page_is_generated_from_the_code() -> None:
    page = DATA.parent / "docs" / "columns.md"
    assert page.read_text(encoding="utf-8") == columns.markdown(), "run `make docs`"


def test_save_and_load_give_the_same_diff(diff: paramdiff.Diff, tmp_path: Path) -> None:
    diff.save(tmp_path / "new" / "out")
    again = paramdiff.load(tmp_path / "new" / "out")
    assert again.run == diff.run
    assert all(again.tables[name].equals(table) for name, table in diff.tables.items())
    assert again.summary() == diff.summary()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["out"]


def test_a_failing_save_leaves_the_old_result(diff: paramdiff.Diff, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(paramdiff.OutputError, match="Cannot write results to"):
        diff.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_load_refuses_what_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(paramdiff.OutputError, match="holds no result"):
        paramdiff.load(tmp_path)


def test_an_unknown_key_to_group_by_is_named(diff: paramdiff.Diff) -> None:
    with pytest.raises(paramdiff.OptionError, match="no column 'layre'"):
        diff.by("layre")


def test_it_shows_itself(diff: paramdiff.Diff) -> None:
    assert "205,429 of 334,944" in repr(diff)
    assert "<table" in diff._repr_html_()
    assert "205,429" in diff._repr_html_()


def test_a_tied_head_that_one_side_stores_is_compared_but_counted_once(tmp_path: Path) -> None:
    embedding = torch.randn(10, 4)
    for name, tensors in {
        "base": {"model.embed_tokens.weight": embedding},
        "tuned": {"model.embed_tokens.weight": embedding + 1, "lm_head.weight": embedding + 1},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"tie_word_embeddings": true}')
    found = paramdiff.compare(tmp_path / "base", tmp_path / "tuned")
    assert found.summary()["numel"] == found.summary()["changed"] == 40
    assert found.summary()["coverage"]["tied"] == ["lm_head.weight"]
    head = found.tensors.filter(pl.col("name") == "lm_head.weight").row(0, named=True)
    assert (head["pairing_rule"], head["changed"], head["duplicate_of"]) == ("tied_head", 40, "model.embed_tokens.weight")


def test_a_resized_vocabulary_compares_the_common_rows_and_reports_the_rest(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(10, 4)}, tmp_path / "a.safetensors")
    save_file({"model.embed_tokens.weight": torch.ones(12, 4)}, tmp_path / "b.safetensors")
    found = paramdiff.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found.summary()["changed"] == 40
    row = found.coverage.row(0, named=True)
    assert (row["side"], row["reason"], row["detail"], row["numel"]) == ("tuned", "resized", "rows 10 to 11", 8)
    with pytest.raises(paramdiff.NothingToCompare):  # the script leaves such tensors out
        paramdiff.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors", compat="mukherjee2025")


def test_progress_ends_at_the_total() -> None:
    seen: list[tuple[int, int]] = []
    diff = paramdiff.compare(DATA / "base", DATA / "sft", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (diff.run["bytes_read"], diff.run["bytes_read"])
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_sums_beyond_float64_are_infinite_not_errors(tmp_path: Path) -> None:
    huge = torch.full((2,), 3e38)
    save_file({"v": -huge, "w": huge}, tmp_path / "a.safetensors")
    save_file({"v": huge, "w": -huge}, tmp_path / "b.safetensors")
    total = paramdiff.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").by().row(0, named=True)
    assert total["changed"] == 4
    assert total["l2_delta"] == math.inf  # Δ overflows float32
    assert math.isnan(total["mean_delta"])


def test_an_integer_buffer_does_not_hide_what_bf16_shows(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3), "steps": torch.tensor([1])}, tmp_path / "a.safetensors")
    save_file({"w": torch.ones(3) + 1e-5, "steps": torch.tensor([2])}, tmp_path / "b.safetensors")
    summary = paramdiff.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").summary()
    assert (summary["changed"], summary["changed_bf16"], summary["compared_in"]) == (4, 1, "float32+int64")


def test_a_head_that_cannot_be_compared_is_listed_for_the_side_that_stores_it(tmp_path: Path) -> None:
    save_file(
        {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(4, 3)}, tmp_path / "a.safetensors"
    )
    save_file({"model.embed_tokens.weight": torch.ones(4, 2)}, tmp_path / "b.safetensors")
    found = paramdiff.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found.coverage.select("name", "side", "reason").rows() == [("lm_head.weight", "base", "shape_mismatch")]


def test_lists_cannot_group_and_columns_of_ones_own_can(diff: paramdiff.Diff) -> None:
    with pytest.raises(paramdiff.OptionError, match="'shape' holds lists"):
        diff.by("shape")
    mine = paramdiff.Diff({**diff.tables, "tensors": diff.tensors.with_columns(mine=pl.col("numel") > 1000)}, diff.run)
    assert sorted(mine.by("mine")["mine"].to_list()) == [False, True]


def test_no_workers_is_refused() -> None:
    with pytest.raises(paramdiff.OptionError, match="-1 is no number of workers"):
        paramdiff.compare(DATA / "base", DATA / "sft", threads=-1)
