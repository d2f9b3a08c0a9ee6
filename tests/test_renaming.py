"""Pairing rules on models that transformers itself saves in both ways, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import paramdiff
from paramdiff import checkpoints, renaming
from paramdiff.checkpoints import TensorInfo
from paramdiff.errors import OptionError, PairingError
from paramdiff.fusing import Part
from paramdiff.pairing import Aligned, Alignment, align
from tests.cli.helpers import assert_sentence, run, run_json
from tests.helpers import model_dir

W = torch.arange(12.0).reshape(4, 3)


def pair(
    path: Path, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], *configs: Any, **options: Any
) -> Alignment:
    for name, tensors, config in zip(("base", "tuned"), (base, tuned), (*configs, None, None), strict=False):
        model_dir(path / name, tensors, config)
    return align(checkpoints.open(str(path / "base")), checkpoints.open(str(path / "tuned")), **options)


def rules(plan: Alignment) -> dict[str, str]:
    return {tensor.name: tensor.rule for tensor in plan.tensors}


def read(plan: Alignment, tensor: Aligned, side: int) -> torch.Tensor:
    info = tensor.sides[side]
    raw = bytearray(info.nbytes)
    plan.checkpoints[side].read_into(info.name, 0, memoryview(raw))
    return torch.from_numpy(np.frombuffer(raw, dtype=np.float32).reshape(info.shape).copy())


def assert_equal_everywhere(plan: Alignment) -> None:
    """Both sides hold the same model, so every pair is equal, element by element."""
    for tensor in plan.tensors:
        assert torch.equal(read(plan, tensor, 0), read(plan, tensor, 1)), tensor.name


# --- experts -------------------------------------------------------------------------------------


def moe(kind: str) -> Any:
    import transformers

    small = {
        "vocab_size": 31, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "mixtral":
        config: Any = transformers.MixtralConfig(**small, num_local_experts=3, num_experts_per_tok=2)
    elif kind == "qwen2_moe":
        config = transformers.Qwen2MoeConfig(
            **small, num_experts=3, moe_intermediate_size=10, shared_expert_intermediate_size=14, num_experts_per_tok=2
        )
    else:
        config = transformers.Qwen3MoeConfig(**small, num_experts=3, moe_intermediate_size=10, num_experts_per_tok=2)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as it is published (per expert) and as transformers 5 holds it (fused)."""
    out = tmp_path_factory.mktemp("moe")
    for kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        model = moe(kind)
        model.save_pretrained(out / kind / "apart")
        model.save_pretrained(out / kind / "fused", save_original_format=False)
    return out


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("turned", [False, True])
def test_fused_experts_against_single_ones(fused: Path, kind: str, turned: bool) -> None:
    sides = [str(fused / kind / "apart"), str(fused / kind / "fused")]
    opened = [checkpoints.open(ref) for ref in (reversed(sides) if turned else sides)]
    plan = align(opened[0], opened[1])
    assert plan.coverage == []
    assert len(plan.tensors) == len(load_file(str(fused / kind / "apart" / "model.safetensors")))
    assert sum(t.numel for t in plan.tensors) == sum(t.numel for t in opened[0].tensors.values())
    split = [t for t in plan.tensors if "experts_split" in t.rule]
    assert len(split) == 2 * 3 * 3
    assert_equal_everywhere(plan)


def test_a_change_of_one_expert_is_counted_there(fused: Path, tmp_path: Path) -> None:
    tensors = load_file(str(fused / "qwen3_moe" / "fused" / "model.safetensors"))
    tensors["model.layers.1.mlp.experts.gate_up_proj"][2, 13, 5] += 1
    model_dir(tmp_path / "tuned", tensors)
    for threads in (1, 2):
        diff = paramdiff.compare(fused / "qwen3_moe" / "apart", tmp_path / "tuned", threads=threads)
        changed = diff.tensors.filter(diff.tensors["changed"] > 0)
        assert changed.select("name", "changed", "expert").row(0) == ("model.layers.1.mlp.experts.2.up_proj.weight", 1, 2)
        assert changed.height == 1


def test_stacks_of_another_layout_are_not_split(tmp_path: Path) -> None:
    """gpt-oss and llama 4 keep (experts, in, out): a square one would fit, and be compared with the wrong elements."""
    stack = {"model.layers.0.mlp.experts.down_proj": torch.randn(2, 4, 4), "model.norm.weight": torch.ones(4)}
    apart = {f"model.layers.0.mlp.experts.{n}.down_proj.weight": torch.randn(4, 4) for n in range(2)}
    plan = pair(tmp_path, stack, apart | {"model.norm.weight": torch.ones(4)}, {"model_type": "gpt_oss"})
    assert rules(plan) == {"model.norm.weight": "same_name"}
    assert {e.reason for e in plan.coverage} == {"only_base", "only_tuned"}
    assert "not compared with (out, in)" in next(e.detail for e in plan.coverage if e.side == "base")


# --- fused rows ----------------------------------------------------------------------------------


def test_qkv_and_gate_up_of_phi3(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q, k, v, gate, up = (torch.randn(n, 6) for n in (8, 4, 4, 10, 10))
    stem = "model.layers.0."
    whole = {
        f"{stem}self_attn.qkv_proj.weight": torch.cat([q, k, v]),
        f"{stem}mlp.gate_up_proj.weight": torch.cat([gate, up]),
    }
    attention = {f"{stem}self_attn.{n}_proj.weight": w for n, w in {"q": q, "k": k, "v": v}.items()}
    apart = attention | {f"{stem}mlp.{n}_proj.weight": w for n, w in {"gate": gate, "up": up}.items()}
    plan = pair(tmp_path, whole, apart)
    assert set(rules(plan).values()) == {"qkv_split", "gate_up_split"}
    assert len(plan.tensors) == 5
    assert plan.coverage == []
    assert_equal_everywhere(plan)
    for tensor in plan.tensors:
        assert torch.equal(read(plan, tensor, 0), apart[tensor.name])


def test_two_fused_sides_are_compared_as_they_are(tmp_path: Path) -> None:
    whole = {"model.layers.0.self_attn.qkv_proj.weight": W}
    assert rules(pair(tmp_path, whole, whole)) == {"model.layers.0.self_attn.qkv_proj.weight": "same_name"}


def megatron(layers: int = 2, groups: int = 2, heads: int = 4, size: int = 3, hidden: int = 6) -> tuple[Any, Any]:
    """A model under Hugging Face's names, and the same as Megatron keeps it, put together row by row."""
    torch.manual_seed(0)
    hf: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": torch.randn(11, hidden), "lm_head.weight": torch.randn(11, hidden),
        "model.norm.weight": torch.randn(hidden),
    }  # fmt: skip
    mcore = {
        "embedding.word_embeddings.weight": torch.cat([hf["model.embed_tokens.weight"], torch.zeros(5, hidden)]),
        "output_layer.weight": torch.cat([hf["lm_head.weight"], torch.zeros(5, hidden)]),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    for n in range(layers):
        here, there = f"model.layers.{n}.", f"decoder.layers.{n}."
        made = {
            "self_attn.q_proj": torch.randn(heads * size, hidden), "self_attn.k_proj": torch.randn(groups * size, hidden),
            "self_attn.v_proj": torch.randn(groups * size, hidden), "self_attn.o_proj": torch.randn(hidden, heads * size),
            "mlp.gate_proj": torch.randn(10, hidden), "mlp.up_proj": torch.randn(10, hidden),
            "mlp.down_proj": torch.randn(hidden, 10), "input_layernorm": torch.randn(hidden),
            "post_attention_layernorm": torch.randn(hidden),
        }  # fmt: skip
        hf |= {f"{here}{name}.weight": w for name, w in made.items()}
        rows = []
        each = heads // groups
        for group in range(groups):
            rows.append(made["self_attn.q_proj"][group * each * size : (group + 1) * each * size])
            rows += [made[f"self_attn.{x}_proj"][group * size : (group + 1) * size] for x in "kv"]
        mcore |= {
            f"{there}self_attention.linear_qkv.weight": torch.cat(rows),
            f"{there}self_attention.linear_qkv.layer_norm_weight": made["input_layernorm"],
            f"{there}self_attention.linear_proj.weight": made["self_attn.o_proj"],
            f"{there}mlp.linear_fc1.weight": torch.cat([made["mlp.gate_proj"], made["mlp.up_proj"]]),
            f"{there}mlp.linear_fc1.layer_norm_weight": made["post_attention_layernorm"],
            f"{there}mlp.linear_fc2.weight": made["mlp.down_proj"],
        }
    return hf, mcore


CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 11, "tie_word_embeddings": False}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_megatron(tmp_path: Path, stacked: bool, turned: bool) -> None:
    hf, mcore = megatron()
    if stacked:
        single = {n: w for n, w in mcore.items() if not n.startswith("decoder.layers.")}
        rest = {n.split(".", 3)[3] for n in mcore if n.startswith("decoder.layers.")}
        many = {f"decoder.layers.{r}": torch.stack([mcore[f"decoder.layers.{n}.{r}"] for n in range(2)]) for r in rest}
        mcore = single | many
    sides, configs = ((mcore, hf), (None, CONFIG)) if turned else ((hf, mcore), (CONFIG, None))
    plan = pair(tmp_path, *sides, *configs)
    assert {t.name for t in plan.tensors} == set(hf)
    for tensor in plan.tensors:
        expected = hf[tensor.name]
        assert tensor.shape == tuple(expected.shape)
        for side in (0, 1):
            assert torch.equal(read(plan, tensor, side)[: len(expected)], expected), tensor.name
    assert {e.reason for e in plan.coverage} == {"resized"}


def test_megatron_against_megatron_keeps_its_names(tmp_path: Path) -> None:
    _, mcore = megatron()
    assert rules(pair(tmp_path, mcore, mcore)) == dict.fromkeys(mcore, "same_name")


def test_heads_in_groups_need_a_config(tmp_path: Path) -> None:
    hf, mcore = megatron()
    plan = pair(tmp_path, hf, mcore)
    left = [e for e in plan.coverage if "linear_qkv.weight" in e.name]
    assert len(left) == 2
    assert "head counts" in left[0].detail


def test_padding_rows_are_called_so(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    plan = pair(tmp_path / "a", {name: W}, {name: torch.cat([W, W])}, None, {"vocab_size": 4})
    assert (rules(plan)[name], plan.coverage[0].detail) == ("padded_vocabulary", "padding rows 4 to 7")
    plan = pair(tmp_path / "b", {name: W}, {name: torch.cat([W, W])}, {"vocab_size": 4}, {"vocab_size": 8})
    assert (rules(plan)[name], plan.coverage[0].detail) == ("resized_vocabulary", "rows 4 to 7")


# --- prefixes and names --------------------------------------------------------------------------

MODEL = {
    "model.embed_tokens.weight": W, "model.layers.0.self_attn.q_proj.weight": W + 1, "model.norm.weight": W[0],
    "lm_head.weight": W + 2,
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["model.", "app.model.", "dcp.model.", "actor.", "a.b.c.d."])
@pytest.mark.parametrize("turned", [False, True])
def test_container_prefixes(tmp_path: Path, prefix: str, turned: bool) -> None:
    put = {prefix + name: weight for name, weight in MODEL.items()}
    plan = pair(tmp_path, *((put, MODEL) if turned else (MODEL, put)))
    assert rules(plan) == dict.fromkeys(MODEL, "container_prefix")
    assert plan.coverage == []
    assert_equal_everywhere(plan)


def test_a_model_without_its_head(tmp_path: Path) -> None:
    inner = {name.removeprefix("model."): weight for name, weight in MODEL.items() if name.startswith("model.")}
    plan = pair(tmp_path, MODEL, inner, {"tie_word_embeddings": False}, {"tie_word_embeddings": False})
    assert rules(plan) == {name: "container_prefix" for name in MODEL if name != "lm_head.weight"}
    assert [(e.name, e.reason) for e in plan.coverage] == [("lm_head.weight", "only_base")]


def test_a_prefix_that_leads_to_little_is_not_taken(tmp_path: Path) -> None:
    """Of a vision tower's many tensors one happens to be named as one of the language model."""
    tower = {f"vision.blocks.{n}.weight": W for n in range(5)} | {"vision.norm.weight": W[0]}
    model = {"norm.weight": W[0], "blocks.0.weight": W, "head.weight": W}
    plan = pair(tmp_path, model, tower | {"head.weight": W})
    assert rules(plan) == {"head.weight": "same_name"}
    assert len(plan.coverage) == 2 + 6


def test_the_wrappers_and_the_prefix(tmp_path: Path) -> None:
    put = {"module._orig_mod.actor." + name: weight for name, weight in MODEL.items()}
    assert set(rules(pair(tmp_path, MODEL, put)).values()) == {"wrapper_stripped+container_prefix"}


def test_a_wrapped_peft_model(tmp_path: Path) -> None:
    put = {
        "base_model.model.model.embed_tokens.weight": W, "base_model.model.model.norm.weight": W[0],
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": W + 1,
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": W,
        "base_model.model.lm_head.modules_to_save.default.weight": W + 2,
        "base_model.model.lm_head.original_module.weight": W + 3,
    }  # fmt: skip
    plan = pair(tmp_path, MODEL, put)
    assert rules(plan) == dict.fromkeys(MODEL, "peft_prefix")
    assert_equal_everywhere(plan)
    assert sorted(e.detail for e in plan.coverage) == [
        "a factor of an adapter that was not merged", "the untrained copy that PEFT keeps of a module it saves",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ("model.language_model.", "language_model.model."),
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_moves_of_vision_language_models(tmp_path: Path, one: str, another: str, turned: bool) -> None:
    def under(prefix: str, visual: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}layers.{n}.w.weight": W + n for n in range(3)} | {
            f"{visual}blocks.{n}.weight": W * n for n in range(4)
        }

    sides = under(one, "model.visual."), under(another, "visual.")
    plan = pair(tmp_path, *(reversed(sides) if turned else sides))
    assert len(plan.tensors) == 7
    assert plan.coverage == []
    assert_equal_everywhere(plan)


def test_parts_of_another_shape_are_not_moved(tmp_path: Path) -> None:
    plan = pair(tmp_path, {"model.visual.w": W, "x": W}, {"visual.w": W[:2], "x": W})
    assert rules(plan) == {"x": "same_name"}
    assert {e.reason for e in plan.coverage} == {"only_base", "only_tuned"}


def test_gamma_and_beta(tmp_path: Path) -> None:
    old = {"bert.LayerNorm.gamma": W[0], "bert.LayerNorm.beta": W[1]}
    plan = pair(tmp_path, old, {"bert.LayerNorm.weight": W[0], "bert.LayerNorm.bias": W[1]})
    assert set(rules(plan).values()) == {"legacy_name"}
    assert_equal_everywhere(plan)


def test_buffers_are_called_so(tmp_path: Path) -> None:
    plan = pair(tmp_path, MODEL, MODEL | {"model.layers.0.self_attn.rotary_emb.inv_freq": W[0]})
    assert [(e.reason, e.detail) for e in plan.coverage] == [("only_tuned", "a buffer, which is not trained")]


def test_what_would_get_one_name_is_refused(tmp_path: Path) -> None:
    base = {"norm.weight": W, "x.weight": W}
    tuned = {"a.base_layer.norm.weight": W, "x.weight": W}
    plan = pair(tmp_path, base, tuned)
    assert rules(plan) == {"x.weight": "same_name"}
    twice = {"base_model.model.w.base_layer.weight": W, "base_model.model.w.modules_to_save.default.weight": W, "x": W}
    with pytest.raises(PairingError, match=r"would be compared as 'w.weight' \(peft_prefix\)"):
        pair(tmp_path / "b", {"w.weight": W, "x": W}, twice)


# --- --map ---------------------------------------------------------------------------------------


def test_map(tmp_path: Path) -> None:
    base = {"model.layers.0.q.weight": W, "model.layers.1.q.weight": W + 1}
    tuned = {"blocks.0.attention.query.weight": W, "blocks.1.attention.query.weight": W + 1}
    plan = pair(tmp_path, base, tuned, renames=[r"^blocks\.(\d+)\.attention\.query=model.layers.\1.q"])
    assert rules(plan) == dict.fromkeys(base, "map")
    assert_equal_everywhere(plan)
    assert rules(pair(tmp_path / "b", {"xc": W}, {"xb": W}, renames=["(?<=x)b=c"])) == {"xc": "map"}


def test_the_first_rule_of_map_that_matches_is_taken(tmp_path: Path) -> None:
    plan = pair(tmp_path, {"a.w": W}, {"b.w": W}, renames=["^b=a", "^b=c"])
    assert rules(plan) == {"a.w": "map"}


def test_map_that_gives_two_one_name(tmp_path: Path) -> None:
    with pytest.raises(PairingError, match="--map gives both"):
        pair(tmp_path, {"a.w": W, "b.w": W}, {"a.w": W}, renames=["^b=a"])


@pytest.mark.parametrize("bad", ["x", "=a", "(=a", r"(x)=\2", r"(x)=\g<name>"])
def test_bad_maps(tmp_path: Path, bad: str) -> None:
    with pytest.raises(OptionError, match="--map"):
        pair(tmp_path, {"a": W}, {"a": W}, renames=[bad])


def test_the_commands_take_map(tmp_path: Path) -> None:
    model_dir(tmp_path / "base", {"a.weight": W})
    model_dir(tmp_path / "tuned", {"z.weight": W + 1})
    for command in ("sparsity", "layers", "rank", "subspace"):
        done = run(command, tmp_path / "base", tmp_path / "tuned", "--map", "^z=a", "--quiet")
        assert done.returncode == 0, done.stderr
    told = run_json("sparsity", tmp_path / "base", tmp_path / "tuned", "--map", "^z=a")
    assert told["changed"] == 12
    assert_sentence(run("sparsity", tmp_path / "base", tmp_path / "tuned", "--map", "z"), 2, "--map", "OLD=NEW")


# --- in general ----------------------------------------------------------------------------------


def parts(names: list[str]) -> dict[str, Part]:
    return {name: Part(TensorInfo(name, "F32", (2,)), ((name, 0, 8),)) for name in names}


NAMES = st.lists(
    st.lists(st.sampled_from(["model", "a", "b", "layers", "0", "1", "base_layer", "w", "weight"]), min_size=1, max_size=5)
    .map(".".join),
    unique=True, max_size=12,
)  # fmt: skip


@given(NAMES, NAMES)
def test_no_tensor_is_lost_or_doubled(base: list[str], tuned: list[str]) -> None:
    try:
        sides = renaming.reconcile(parts(base), parts(tuned), ({}, {}))
    except PairingError:
        return
    for side, stored in zip(sides, (base, tuned), strict=True):
        assert sorted(part.info.name for part in side.values()) == sorted(stored)
    common = set(base) & set(tuned)
    assert common <= sides[0].keys() & sides[1].keys()
    assert all(sides[n][name].info.name == name for n in (0, 1) for name in common)  # what fits already is left alone


def test_thirty_thousand_names() -> None:
    """A loop over pairs of them would not end."""
    stored = [
        f"model.layers.{n}.mlp.experts.{k}.{w}_proj.weight" for n in range(60) for k in range(250) for w in ("up", "down")
    ]
    sides = renaming.reconcile(parts(stored), parts([f"app.{name}" for name in stored]), ({}, {}))
    assert sides[0].keys() == sides[1].keys()


def test_json_says_which_rules(tmp_path: Path) -> None:
    model_dir(tmp_path / "base", MODEL)
    save_file({f"actor.{name}": weight.clone() for name, weight in MODEL.items()}, str(tmp_path / "run.safetensors"))
    diff = paramdiff.compare(tmp_path / "base", tmp_path / "run.safetensors")
    assert set(diff.tensors["pairing_rule"]) == {"container_prefix"}
    assert diff.tensors["name_tuned"].to_list() == [f"actor.{name}" for name in diff.tensors["name"]]
    diff.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["renames"] == []
