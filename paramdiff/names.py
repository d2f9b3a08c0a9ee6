"""Names of parameters: what wrappers add to them, and which layer, module and kind they speak of.

Both are data: a new wrapper or architecture is one more line in a table here.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_forward_module.")
LEADING_WRAPPERS = ("module.",)  # DistributedDataParallel, DeepSpeed; only in front, where no model's own name has it

KINDS = ("embedding", "attention", "mlp", "norm", "head", "other")  # in the order in which they are told
PARAMETER_SUFFIXES = {"weight", "bias", "gamma", "beta", "scale", "weight_scale", "weight_scale_inv"}
HEADS = {"lm_head", "embed_out", "score", "classifier", "v_head", "value_head", "output"}
EMBEDDINGS = {"embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "position_embeddings", "token_type_embeddings"}
EMBEDDINGS |= {"tok_embeddings", "embed_positions", "shared", "patch_embed", "patch_embedding", "position_embedding"}
EXPERTS = {"experts", "shared_expert", "shared_experts"}
NORM = re.compile(r"norm|^ln(_|\d|$)|(^|_)rms", re.IGNORECASE)
ATTENTION = re.compile(
    r"att(n|ention)|^(q|k|v|o|qkv|kv|query|key|value|out)_proj$|^query_key_value$|^w[qkvo]$", re.IGNORECASE
)
MLP = re.compile(
    r"mlp|moe|^ff(n|_|$)|ffn|feed_?forward|intermediate|experts?|^(gate|up|down|gate_up)_proj$|^w[123]$|^fc[12]?$"
    r"|^dense_(4h|h)|^dense(relu|act|gated)|router",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter sits. `layer` and `expert` are None where its name has no such number."""

    layer: int | None
    module: str
    kind: str
    expert: int | None = None


def strip_wrappers(name: str) -> str:
    """The name without what FSDP, torch.compile, DDP and activation checkpointing put into it.

    >>> strip_wrappers("module._orig_mod.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    before = None
    while name != before:
        before = name
        for wrapper in WRAPPERS:
            if name.startswith(wrapper) or f".{wrapper}" in name:
                name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
        for wrapper in LEADING_WRAPPERS:
            name = name.removeprefix(wrapper)
    return name


def place(name: str) -> Place:
    """Layer, module, kind and expert number of a parameter, read off its name.

    `layer` is the first number in the name, `module` the last part that names something (with `experts.` before it
    where it is one expert's), `kind` one of embedding, attention, mlp, norm, head, other.

    >>> place("model.layers.3.self_attn.q_proj.weight")
    Place(layer=3, module='q_proj', kind='attention', expert=None)
    >>> place("model.layers.7.mlp.experts.12.down_proj.weight")
    Place(layer=7, module='experts.down_proj', kind='mlp', expert=12)
    """
    parts = name.split(".")
    words = [part for part in parts if not part.isdecimal()]
    if len(words) > 1 and words[-1] in PARAMETER_SUFFIXES:
        words.pop()
    leaf = words[-1] if words else name
    expert = _number_after(parts, "experts")
    layer = next((int(p) for i, p in enumerate(parts) if is_number(p) and (i == 0 or parts[i - 1] != "experts")), None)
    owner = next((word for word in words[:-1] if word in EXPERTS), None)
    return Place(layer, f"{owner}.{leaf}" if owner else leaf, _kind(words, leaf), expert)


def is_number(part: str) -> bool:
    """True for a part of a name that counts layers or experts."""
    return part.isdecimal() and len(part) < 10  # longer ones are no layer, and Python refuses to read very long ones


def _number_after(parts: list[str], word: str) -> int | None:
    return next((int(b) for a, b in itertools.pairwise(parts) if a == word and is_number(b)), None)


def _kind(words: list[str], leaf: str) -> str:
    if NORM.search(leaf):
        return "norm"
    if leaf in EMBEDDINGS or "embeddings" in words:
        return "embedding"
    if leaf in ("lm_head", "embed_out") or (leaf in HEADS and len(words) <= 2):
        return "head"
    for word in reversed(words):  # the innermost part that says something
        if ATTENTION.search(word):
            return "attention"
        if MLP.search(word):
            return "mlp"
    return "mlp" if "output" in words else "other"  # BERT's feed-forward: layer.N.intermediate, layer.N.output


def is_head(name: str) -> bool:
    """True for the output projection that many models tie to their input embedding."""
    return name.split(".")[-2:] in (["lm_head", "weight"], ["embed_out", "weight"])


def is_input_embedding(name: str) -> bool:
    """True for the table of token embeddings."""
    parts = name.split(".")
    tables = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared")
    return len(parts) >= 2 and parts[-1] == "weight" and parts[-2] in tables
