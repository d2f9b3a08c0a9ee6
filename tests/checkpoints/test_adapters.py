"""LoRA adapters against PEFT's own merge and against float64 numpy."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import paramdiff
from paramdiff import checkpoints
from paramdiff.errors import BrokenFile, CheckpointError, PairingError, UnsupportedFormat
from tests.cli.helpers import assert_sentence, run, run_json

MLP = ["gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", *MLP],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
        "alpha_pattern": {"down_proj": 32, "0.mlp.gate_proj": 1},
    },
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "saved whole": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding": {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "head": {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head"]},
    "biases": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"], "bias": "lora_only"},
    "bias of B": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "lora_bias": True},
    "eva": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}  # fmt: skip


def base_model(tie: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=37, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=tie,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(dtype)


def adapter(model: Any, path: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with random factors, and return what PEFT's own merge makes of it."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(len(str(settings)))
        wrapped = get_peft_model(model, LoraConfig(**{"init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings))
        for name, weight in wrapped.named_parameters():
            if weight.requires_grad:
                with torch.no_grad():
                    weight.add_(torch.randn_like(weight) * 0.1)
            del name
        wrapped.save_pretrained(str(path))
        whole = wrapped.merge_and_unload()
    return {name: weight.detach().clone() for name, weight in whole.state_dict().items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base/`, and for each kind the adapter and `merged.safetensors` as PEFT merges it in float32."""
    out = tmp_path_factory.mktemp("adapters")
    base_model().save_pretrained(out / "base")
    for kind, settings in KINDS.items():
        whole = adapter(base_model(), out / kind, **settings)
        save_file({name: weight.contiguous() for name, weight in whole.items()}, str(out / kind / "merged.st"))
    return out


def float64(checkpoint: checkpoints.Checkpoint, name: str, step: int | None = None) -> Any:
    info = checkpoint.tensors[name]
    whole = bytearray(info.nbytes)
    for start in range(0, len(whole), step or len(whole)):
        part = bytearray(min(step or len(whole), len(whole) - start))
        checkpoint.read_into(name, start, memoryview(part))
        whole[start : start + len(part)] = part
    kind = {"F64": np.float64, "F32": np.float32}[info.dtype]
    return np.frombuffer(whole, dtype=kind).astype(np.float64).reshape(info.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_values_are_those_of_peft(made: Path, kind: str) -> None:
    _, tuned = checkpoints.open_pair(str(made / "base"), str(made / kind))
    whole = load_file(str(made / kind / "merged.st"))
    assert set(tuned.tensors) == set(whole)
    for name, weight in whole.items():
        expected = weight.double().numpy()
        np.testing.assert_allclose(float64(tuned, name), expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=name)
    tuned.close()


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_targeted_changes(made: Path, kind: str) -> None:
    diff = paramdiff.compare(made / "base", made / kind, tolerances=[1e-9])
    whole, base = load_file(str(made / kind / "merged.st")), load_file(str(made / "base" / "model.safetensors"))
    for row in diff.tensors.iter_rows(named=True):
        differs = not torch.equal(whole[row["name"]], base[row["name"]])
        assert (row["changed"] > 0) == differs, row["name"]
    assert diff.coverage.height == 0


def test_the_values_by_hand_and_any_cut(made: Path) -> None:
    stored = load_file(str(made / "patterns" / "adapter_model.safetensors"))
    base = load_file(str(made / "base" / "model.safetensors"))
    _, tuned = checkpoints.open_pair(str(made / "base"), str(made / "patterns"))
    travelled = pickle.loads(pickle.dumps(tuned))
    scales = {"self_attn.q_proj": 8 / 2, "self_attn.k_proj": 8 / 4, "mlp.down_proj": 32 / 4, "mlp.up_proj": 8 / 4}
    for module, scale in scales.items():
        name = f"model.layers.0.{module}"
        a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"].double().numpy() for x in "AB")
        expected = base[f"{name}.weight"].double().numpy() + scale * (b @ a)
        whole = float64(tuned, f"{name}.weight")
        np.testing.assert_allclose(whole, expected, rtol=1e-14, atol=1e-16)
        for step in (8, 40, 96, 1000):
            assert (float64(tuned, f"{name}.weight", step) == whole).all()
            assert (float64(travelled, f"{name}.weight", step) == whole).all()
    tuned.close()


def test_ranges_do_not_change_a_bit_of_a_matrix_of_many_tiles(tmp_path: Path) -> None:
    torch.manual_seed(1)
    (tmp_path / "a").mkdir()
    key = "base_model.model.w.lora_"
    save_file(
        {f"{key}A.weight": torch.randn(7, 3001), f"{key}B.weight": torch.randn(500, 7)},
        str(tmp_path / "a" / "adapter_model.safetensors"),
    )
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 7, "lora_alpha": 7}))
    checkpoint = checkpoints.open(str(tmp_path / "a"))
    whole = float64(checkpoint, "w.weight")
    for step in (8 * 3001 * 87, 8 * 12345, 1_000_003):
        assert (float64(checkpoint, "w.weight", step) == whole).all()
    checkpoint.close()


def test_the_exact_and_the_merged_change_are_told_apart(tmp_path: Path) -> None:
    """A small update changes every element of the exact sum, and few of the bf16 model that a merge would give."""
    base = base_model(dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    adapter(base, tmp_path / "adapter", r=2, lora_alpha=0.02, target_modules=["q_proj", "up_proj"])
    diff = paramdiff.compare(tmp_path / "base", tmp_path / "adapter")
    before = load_file(str(tmp_path / "base" / "model.safetensors"))
    stored = load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    for row in diff.tensors.iter_rows(named=True):
        module = row["name"].removesuffix(".weight")
        if f"base_model.model.{module}.lora_A.weight" not in stored:
            assert row["changed"] == row["changed_bf16"] == 0
            continue
        a, b = (stored[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        exact = before[row["name"]].double() + 0.01 * (b @ a)
        assert row["changed"] == int((exact != before[row["name"]].double()).sum()) == row["numel"]
        assert row["changed_bf16"] == int((exact.float().bfloat16() != before[row["name"]]).sum())
        assert 0 < row["changed_bf16"] < row["numel"]
        assert (row["dtype_tuned"], row["compared_in"]) == ("F64", "float64")


def test_the_update_has_the_rank_of_the_adapter(made: Path) -> None:
    diff = paramdiff.compare(made / "base", made / "patterns", measures=["spectrum"])
    ranks = dict(diff.ranks.select("name", "numeric_rank").iter_rows())
    assert ranks["model.layers.0.self_attn.q_proj.weight"] == 2
    assert ranks["model.layers.1.mlp.up_proj.weight"] == 5
    assert ranks["model.layers.0.mlp.up_proj.weight"] == 4
    assert ranks["model.layers.0.self_attn.o_proj.weight"] == 0


def test_two_adapters_are_compared_by_their_updates(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "plain", tmp_path / "later")
    stored = load_file(str(tmp_path / "later" / "adapter_model.safetensors"))
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    stored[key][5, 0] += 1
    save_file(stored, str(tmp_path / "later" / "adapter_model.safetensors"))
    diff = paramdiff.compare(made / "plain", tmp_path / "later")
    changed = dict(diff.tensors.select("name", "changed").iter_rows())
    assert changed.pop("model.layers.1.self_attn.q_proj.weight") == 12
    assert set(changed.values()) == {0}
    assert diff.tensors.height == 4


def test_a_tied_head_that_is_targeted(tmp_path: Path) -> None:
    base_model(tie=True).save_pretrained(tmp_path / "base")
    adapter(base_model(tie=True), tmp_path / "a", r=2, lora_alpha=4, target_modules=["q_proj"])
    keys = {"A": torch.randn(2, 12), "B": torch.randn(37, 2)}
    stored = load_file(str(tmp_path / "a" / "adapter_model.safetensors"))
    stored |= {f"base_model.model.lm_head.lora_{x}.weight": value for x, value in keys.items()}
    save_file(stored, str(tmp_path / "a" / "adapter_model.safetensors"))
    _, tuned = checkpoints.open_pair(str(tmp_path / "base"), str(tmp_path / "a"))
    embedding = load_file(str(tmp_path / "base" / "model.safetensors"))["model.embed_tokens.weight"].double().numpy()
    expected = embedding + 2 * (keys["B"].double().numpy() @ keys["A"].double().numpy())
    np.testing.assert_allclose(float64(tuned, "lm_head.weight"), expected, rtol=1e-12)
    assert (float64(tuned, "model.embed_tokens.weight") == embedding).all()
    tuned.close()


def test_torch_files_and_names_with_the_adapters_name(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "plain", tmp_path / "a")
    stored = load_file(str(tmp_path / "a" / "adapter_model.safetensors"))
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save(
        {name.replace(".weight", ".default.weight"): w for name, w in stored.items()}, tmp_path / "a/adapter_model.bin"
    )
    diff = paramdiff.compare(made / "plain", tmp_path / "a")
    assert diff.summary()["changed"] == 0
    assert diff.tensors.height == 4
    assert checkpoints.open(str(tmp_path / "a" / "adapter_model.bin")).facts()["adapter"]["r"] == 3


def edited(made: Path, path: Path, **changes: Any) -> Path:
    shutil.copytree(made / "plain", path)
    settings = json.loads((path / "adapter_config.json").read_text()) | changes
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"peft_type": "VERA"}, UnsupportedFormat, "VERA"),
        ({"peft_type": "IA3"}, UnsupportedFormat, "IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedFormat, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, UnsupportedFormat, "olora"),
        ({"init_lora_weights": "loftq"}, UnsupportedFormat, "loftq"),
        ({"layer_replication": [[0, 1]]}, UnsupportedFormat, "layer_replication"),
        ({"target_parameters": ["experts.down_proj"]}, UnsupportedFormat, "target_parameters"),
        ({"r": 4}, BrokenFile, "for a rank of 4"),
        ({"r": 0}, BrokenFile, "rank or alpha"),
        ({"lora_alpha": None}, BrokenFile, "rank or alpha"),
        ({"lora_alpha": True}, BrokenFile, "rank or alpha"),
        ({"alpha_pattern": {"(": 3}}, BrokenFile, "pattern that is none"),
    ],
)
def test_settings_that_are_not_read(
    made: Path, tmp_path: Path, changes: dict[str, Any], kind: type[CheckpointError], words: str
) -> None:
    path = edited(made, tmp_path / "a", **changes)
    with pytest.raises(kind, match=words.replace("(", r"\(")) as caught:
        checkpoints.open(str(path))
    assert type(caught.value) is kind


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], Any], type[CheckpointError], str]] = {
    "a factor is missing": (lambda s, k: s.pop(f"{k}A.weight"), BrokenFile, "lacks 'lora_A'"),
    "factors that do not fit": (lambda s, k: s.update({f"{k}A.weight": torch.ones(2, 12)}), BrokenFile, "for a rank of 3"),
    "a convolution": (lambda s, k: s.update({f"{k}A.weight": torch.ones(3, 12, 1, 1)}), UnsupportedFormat, "no matrix"),
    "an unknown part": (lambda s, k: s.update({f"{k}mystery": torch.ones(3)}), UnsupportedFormat, "lora_mystery"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(made: Path, tmp_path: Path, case: str) -> None:
    change, kind, words = BROKEN[case]
    path = edited(made, tmp_path / "a")
    stored = load_file(str(path / "adapter_model.safetensors"))
    change(stored, "base_model.model.model.layers.0.self_attn.q_proj.lora_")
    save_file(stored, str(path / "adapter_model.safetensors"))
    with pytest.raises(kind, match=words):
        checkpoints.open(str(path))


def test_an_adapter_without_settings(made: Path, tmp_path: Path) -> None:
    path = edited(made, tmp_path / "a")
    (path / "adapter_config.json").write_text("[]")
    with pytest.raises(BrokenFile, match="no JSON object"):
        checkpoints.open(str(path))


def test_what_does_not_fit_together(made: Path, tmp_path: Path) -> None:
    with pytest.raises(PairingError, match="is an adapter"):
        checkpoints.open_pair(str(made / "plain"), str(made / "base"))
    with pytest.raises(PairingError, match="DoRA"):
        checkpoints.open_pair(str(made / "dora"), str(made / "dora"))
    tensors = load_file(str(made / "base" / "model.safetensors"))
    for case, change in {
        "lacks": lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"),
        "where": lambda t: t.update({"model.layers.1.self_attn.q_proj.weight": torch.ones(12, 13)}),
    }.items():
        (tmp_path / case).mkdir()
        different = dict(tensors)
        change(different)
        save_file(different, str(tmp_path / case / "model.safetensors"))
        with pytest.raises(PairingError, match=case):
            checkpoints.open_pair(str(tmp_path / case), str(made / "plain"))


def test_the_command(made: Path) -> None:
    told = run_json("sparsity", made / "base", made / "plain")
    assert told["tensors"] == 27
    assert told["changed"] == 2 * (12 * 12 + 12 * 20)
    assert_sentence(run("sparsity", made / "plain", made / "base"), 2, "is an adapter")
    shown = run("inspect", made / "plain")
    assert "model.layers.0.self_attn.q_proj.weight" in shown.stdout


@pytest.mark.slow
def test_spectra_and_subspaces_through_the_command(made: Path) -> None:
    told = run_json("rank", made / "base", made / "plain")
    assert {m["name"]: m["numeric_rank"] for m in told["ranks_by_matrix"]}["model.layers.0.mlp.down_proj.weight"] == 3
    assert run("subspace", made / "base", made / "plain", "--k", "2").returncode == 0
