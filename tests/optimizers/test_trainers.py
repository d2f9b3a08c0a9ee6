"""Checkpoints of transformers' own Trainer: every moment under the name that its parameter had in the model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import paramdiff
from paramdiff.checkpoints import TensorInfo
from paramdiff.errors import UnsupportedFormat
from paramdiff.optimizers import orders
from tests.cli.helpers import run

SMALL: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "tie_word_embeddings": False},
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "head_dim": 6, "tie_word_embeddings": True},
    "gemma2": {**SMALL, "head_dim": 6},
    "phi3": {**SMALL, "tie_word_embeddings": False},  # registers o_proj before qkv_proj
    "gpt2": {**dict.fromkeys(("n_layer", "n_head", "eos_token_id"), 2), "vocab_size": 31, "n_embd": 12, "n_positions": 32},
    "mixtral": {**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": False},  # saved otherwise
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What transformers remarks on is not under test."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def trained(model: Any, out: Path, **options: Any) -> Trainer:
    """A trainer after three steps, which has saved checkpoint-3."""
    torch.manual_seed(0)
    tokens = torch.randint(3, 31, (6, 8))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=3, save_steps=3, logging_steps=1, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, learning_rate=1e-3, lr_scheduler_type="linear", **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    return trainer


def optimizer_of(trainer: Trainer) -> Any:
    found: Any = trainer.optimizer
    return getattr(found, "optimizer", found)


def assert_every_moment(trainer: Trainer, state: paramdiff.OptimizerState, rename: Any = lambda name: name) -> None:
    kept = optimizer_of(trainer).state
    expected = {rename(name): kept[p] for name, p in trainer.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
    assert set(state) == set(expected)
    for name, moments in expected.items():
        for slot in ("exp_avg", "exp_avg_sq"):
            assert np.array_equal(state[name][slot], moments[slot].numpy()), (name, slot)
        assert state[name].step == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_moment_has_the_name_of_its_parameter(tmp_path: Path, kind: str, decay: float) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind]))
    trainer = trained(model, tmp_path, weight_decay=decay)
    state = paramdiff.optimizer(tmp_path / "checkpoint-3")
    assert_every_moment(trainer, state)
    assert "groups as Trainer makes them" in state.naming
    found = paramdiff.adam(tmp_path / "checkpoint-3")
    assert found.parameters["bf16_visible"].null_count() == 0  # weights were found for all, whatever their names on disk
    assert found.parameters["lr"].to_list() == pytest.approx([1e-3 / 3] * found.parameters.height)  # the group says 0.0
    assert "logged at step 3" in found.parameters["lr_source"][0]
    assert set(found.coverage["reason"]) <= {"not_optimized"}


@pytest.mark.slow
@pytest.mark.parametrize("shift", [1, 2])
def test_numbers_off_by_one_are_refused_or_show(tmp_path: Path, shift: int) -> None:
    """The control: the same file with the state of each number moved to a neighbour."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **MODELS["qwen2"]))
    trained(model, tmp_path)
    path = tmp_path / "checkpoint-3" / "optimizer.pt"
    kept = torch.load(path, weights_only=True)
    count = len(kept["state"])
    kept["state"] = {number: kept["state"][(number + shift) % count] for number in range(count)}
    torch.save(kept, path)
    with pytest.raises(UnsupportedFormat, match="fits their shapes"):
        paramdiff.optimizer(tmp_path / "checkpoint-3")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"bias": "lora_only"}])
def test_adapters(tmp_path: Path, more: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **{**SMALL, "tie_word_embeddings": False}))
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=targets, **more))
    trainer = trained(model, tmp_path)

    def saved(name: str) -> str:
        for part, other in ((".default", ""), (".modules_to_save", "")):
            name = name.replace(part, other)
        return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")

    assert_every_moment(trainer, paramdiff.optimizer(tmp_path / "checkpoint-3"), saved)
    found = paramdiff.adam(tmp_path / "checkpoint-3")
    assert found.parameters["bf16_visible"].null_count() == 0


@pytest.mark.slow
def test_a_frozen_embedding(tmp_path: Path) -> None:
    """Fewer numbers than parameters: named where there is only one way to leave some out."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODELS["llama"]))
    model.get_input_embeddings().weight.requires_grad_(False)
    trainer = trained(model, tmp_path)
    assert_every_moment(trainer, paramdiff.optimizer(tmp_path / "checkpoint-3"))
    found = paramdiff.adam(tmp_path / "checkpoint-3")
    assert found.coverage.filter(found.coverage["reason"] == "not_optimized")["name"].to_list() == [
        "model.embed_tokens.weight"
    ]


@pytest.mark.slow
def test_a_frozen_layer_is_refused(tmp_path: Path) -> None:
    """Which of two equal layers was frozen, shapes do not tell."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODELS["llama"]))
    for p in model.model.layers[1].parameters():
        p.requires_grad_(False)
    trained(model, tmp_path)
    with pytest.raises(UnsupportedFormat, match="in several ways"):
        paramdiff.optimizer(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("kind", sorted(orders.FAMILIES))
def test_decoders_register_their_modules_in_the_order_of_words(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    named = dict(model.named_parameters())

    tensors = {
        name: TensorInfo(name, "F32", tuple(named[name].shape)) for name in sorted(named)
    }  # as safetensors gives them
    (found,) = orders.of_words(tensors, {"model_type": kind})
    assert list(found.shapes) == list(named)


def test_models_that_are_not_of_these_families_have_no_order_of_words() -> None:
    tensors = {"model.layers.0.self_attn.q_proj.weight": TensorInfo("q", "F32", (2, 2))}
    assert list(orders.of_words(tensors, {"model_type": "phi3"})) == []
    tensors["model.layers.0.self_attn.strange.weight"] = TensorInfo("s", "F32", (2, 2))
    assert list(orders.of_words(tensors, {"model_type": "llama"})) == []
    assert list(orders.of_words(tensors, None)) == []


def test_a_config_that_transformers_does_not_know_gives_no_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "none_such"}')
    assert list(orders.of_transformers(str(tmp_path), {"model_type": "none_such"})) == []
    assert list(orders.of_transformers(str(tmp_path), None)) == []
    assert transformers.__version__


@pytest.mark.slow
def test_the_whole_command_on_a_checkpoint_of_trainer(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **MODELS["gpt2"]))
    trained(model, tmp_path)
    done = run("adam", tmp_path / "checkpoint-3")
    assert done.returncode == 0, done.stderr
    assert "named by the order of transformers' model, groups as Trainer makes them" in done.stdout
    assert "learning rate 0.000333333 (trainer_state.json, logged at step 3)" in done.stdout
    lost = run("adam", tmp_path)
    assert lost.returncode == 2
    assert "checkpoint-3" in lost.stderr
