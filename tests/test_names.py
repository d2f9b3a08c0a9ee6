"""Names of real models, and what wrappers make of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramdiff.names import LEADING_WRAPPERS, WRAPPERS, Place, is_head, is_input_embedding, place, strip_wrappers

# name → layer, module, kind, expert
PLACES = {
    # Llama, Qwen2, Qwen3
    "model.embed_tokens.weight": (None, "embed_tokens", "embedding", None),
    "model.layers.0.self_attn.q_proj.weight": (0, "q_proj", "attention", None),
    "model.layers.31.self_attn.o_proj.weight": (31, "o_proj", "attention", None),
    "model.layers.3.self_attn.k_proj.bias": (3, "k_proj", "attention", None),
    "model.layers.3.self_attn.q_norm.weight": (3, "q_norm", "norm", None),
    "model.layers.3.self_attn.rotary_emb.inv_freq": (3, "inv_freq", "attention", None),
    "model.layers.12.mlp.gate_proj.weight": (12, "gate_proj", "mlp", None),
    "model.layers.12.mlp.down_proj.weight_scale_inv": (12, "down_proj", "mlp", None),
    "model.layers.12.input_layernorm.weight": (12, "input_layernorm", "norm", None),
    "model.layers.12.post_attention_layernorm.weight": (12, "post_attention_layernorm", "norm", None),
    "model.norm.weight": (None, "norm", "norm", None),
    "lm_head.weight": (None, "lm_head", "head", None),
    # Mixtral, Qwen2-MoE, DeepSeek
    "model.layers.5.block_sparse_moe.experts.7.w1.weight": (5, "experts.w1", "mlp", 7),
    "model.layers.5.block_sparse_moe.gate.weight": (5, "gate", "mlp", None),
    "model.layers.5.mlp.gate.weight": (5, "gate", "mlp", None),
    "model.layers.5.mlp.experts.63.up_proj.weight": (5, "experts.up_proj", "mlp", 63),
    "model.layers.5.mlp.shared_expert.down_proj.weight": (5, "shared_expert.down_proj", "mlp", None),
    "model.layers.5.mlp.experts.gate_up_proj": (5, "experts.gate_up_proj", "mlp", None),
    # GPT-2
    "wte.weight": (None, "wte", "embedding", None),
    "transformer.wpe.weight": (None, "wpe", "embedding", None),
    "h.0.attn.c_attn.weight": (0, "c_attn", "attention", None),
    "h.0.attn.c_proj.bias": (0, "c_proj", "attention", None),
    "transformer.h.11.mlp.c_fc.weight": (11, "c_fc", "mlp", None),
    "h.0.ln_1.weight": (0, "ln_1", "norm", None),
    "ln_f.bias": (None, "ln_f", "norm", None),
    # GPT-NeoX
    "gpt_neox.embed_in.weight": (None, "embed_in", "embedding", None),
    "gpt_neox.layers.2.attention.query_key_value.weight": (2, "query_key_value", "attention", None),
    "gpt_neox.layers.2.attention.dense.weight": (2, "dense", "attention", None),
    "gpt_neox.layers.2.mlp.dense_h_to_4h.weight": (2, "dense_h_to_4h", "mlp", None),
    "gpt_neox.final_layer_norm.weight": (None, "final_layer_norm", "norm", None),
    "embed_out.weight": (None, "embed_out", "head", None),
    # BERT
    "bert.embeddings.word_embeddings.weight": (None, "word_embeddings", "embedding", None),
    "bert.embeddings.token_type_embeddings.weight": (None, "token_type_embeddings", "embedding", None),
    "bert.embeddings.LayerNorm.gamma": (None, "LayerNorm", "norm", None),
    "bert.encoder.layer.4.attention.self.query.weight": (4, "query", "attention", None),
    "bert.encoder.layer.4.attention.output.dense.weight": (4, "dense", "attention", None),
    "bert.encoder.layer.4.intermediate.dense.weight": (4, "dense", "mlp", None),
    "bert.encoder.layer.4.output.dense.weight": (4, "dense", "mlp", None),
    "bert.encoder.layer.4.output.LayerNorm.weight": (4, "LayerNorm", "norm", None),
    "classifier.bias": (None, "classifier", "head", None),
    # diffusers (UNet2DConditionModel)
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight": (0, "to_q", "attention", None),
    "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.2.weight": (0, "net", "mlp", None),
    "down_blocks.0.attentions.1.transformer_blocks.0.norm1.weight": (0, "norm1", "norm", None),
    "conv_norm_out.weight": (None, "conv_norm_out", "norm", None),
    "down_blocks.2.resnets.0.conv1.weight": (2, "conv1", "other", None),
    "time_embedding.linear_1.weight": (None, "linear_1", "other", None),
    # odd ones
    "weight": (None, "weight", "other", None),
    "0.weight": (0, "weight", "other", None),
    "": (None, "", "other", None),
}


@pytest.mark.parametrize("name", PLACES)
def test_place(name):
    assert place(name) == Place(*PLACES[name])


STRIPPED = {
    "module.model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    "_orig_mod.model.norm.weight": "model.norm.weight",
    "module._orig_mod.lm_head.weight": "lm_head.weight",
    "_orig_mod.module.lm_head.weight": "lm_head.weight",
    "module.module.lm_head.weight": "lm_head.weight",
    "_fsdp_wrapped_module.model._fsdp_wrapped_module.layers.3._fsdp_wrapped_module._orig_mod.x": "model.layers.3.x",
    "model.layers.1._checkpoint_wrapped_module.mlp.w": "model.layers.1.mlp.w",
    "_forward_module.lm_head.weight": "lm_head.weight",
    "model.layers.0._orig_mod._orig_mod.w": "model.layers.0.w",
    # not wrappers
    "encoder.module.weight": "encoder.module.weight",
    "my_orig_mod.weight": "my_orig_mod.weight",
    "modules.0.weight": "modules.0.weight",
    "model.layers.0._orig_mod": "model.layers.0._orig_mod",
}


@pytest.mark.parametrize("name", STRIPPED)
def test_strip_wrappers(name):
    assert strip_wrappers(name) == STRIPPED[name]


@pytest.mark.parametrize("name", [name for name in PLACES if name])
def test_names_of_real_models_are_left_alone(name):
    assert strip_wrappers(name) == name


PARTS = st.lists(
    st.sampled_from(
        ["model", "layers", "0", "weight", "module", "x", "", *(w.rstrip(".") for w in (*WRAPPERS, *LEADING_WRAPPERS))]
    )
    | st.text(max_size=4),
    max_size=8,
).map(".".join)


@given(PARTS)
def test_stripping_twice_is_stripping_once(name):
    once = strip_wrappers(name)
    assert strip_wrappers(once) == once
    assert len(once) <= len(name)


@given(PARTS, st.lists(st.sampled_from([*WRAPPERS, *LEADING_WRAPPERS]), max_size=4))
def test_wrappers_in_front_do_not_matter(name, wrappers):
    assert strip_wrappers("".join(wrappers) + name) == strip_wrappers(name)


@given(PARTS | st.text() | st.integers(0, 9).map(lambda d: f"layers.{d}" + "1" * 5000 + ".weight"))
def test_any_name_has_a_place(name):
    found = place(name)
    assert isinstance(found.module, str)
    assert found.kind in {"embedding", "attention", "mlp", "norm", "head", "other"}


def test_heads_and_embeddings():
    heads = ["lm_head.weight", "model.lm_head.weight", "embed_out.weight"]
    tables = [
        "model.embed_tokens.weight",
        "wte.weight",
        "transformer.wte.weight",
        "gpt_neox.embed_in.weight",
        "shared.weight",
    ]
    neither = ["lm_head.bias", "lm_head", "score.weight", "embed_tokens", "wpe.weight", "weight", "", "xlm_head.weight"]
    assert [is_head(n) for n in heads + tables + neither] == [True] * 3 + [False] * 13
    assert [is_input_embedding(n) for n in heads + tables + neither] == [False] * 3 + [True] * 5 + [False] * 8
