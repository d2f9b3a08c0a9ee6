"""The order of `model.named_parameters()`, without the model: from a state dict, a table of words, or transformers' code.

safetensors files are sorted by name, so they give shapes but no order. Files of torch.save keep the state dict's order,
which is that of the parameters with buffers in between.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paramdiff import names
from paramdiff.checkpoints import Checkpoint, TensorInfo
from paramdiff.optimizers.naming import Order, Shape

# Decoders of transformers that register their modules in the order of WORDS; tests hold each to the model itself.
FAMILIES = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3", "smollm3", "granite",
    "cohere", "cohere2", "stablelm", "exaone4", "ernie4_5", "starcoder2", "glm", "glm4",
}  # fmt: skip
WORDS = {
    word: number
    for number, word in enumerate((
        "model", "embed_tokens", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm",
        "mlp", "gate_up_proj", "gate_proj", "up_proj", "down_proj", "c_fc", "c_proj",
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        "post_self_attn_layernorm", "post_mlp_layernorm", "norm", "lm_head", "score",
        "base_layer", "weight", "bias", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
        "default",
    ))
}  # fmt: skip
PEFT = "base_model.model."
BUFFER = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked|inv_freq|position_ids|\w*_buffer)$")


def of_state_dict(checkpoint: Checkpoint, source: str) -> Iterator[Order]:
    """The order in which a file of torch.save holds tensors, without buffers and second names of the same tensor; then the
    same without a head that may be tied to the embedding, though it was saved apart."""
    shapes: dict[str, Shape] = {}
    places = set()
    for name, info in checkpoint.tensors.items():
        place = checkpoint.position(name)
        if BUFFER.search(name) or info.type.kind != "float" or (place in places and info.numel):
            continue
        places.add(place)
        shapes[name] = info.shape
    yield Order(source, shapes)
    embeddings = {shape for name, shape in shapes.items() if names.is_input_embedding(name)}
    untied = {name: shape for name, shape in shapes.items() if not (names.is_head(name) and shape in embeddings)}
    if len(untied) < len(shapes):
        yield Order(source, untied)


def below(order: Order, prefix: str) -> Order:
    """Only the parameters whose names begin with `prefix`."""
    return Order(order.source, {name: shape for name, shape in order.shapes.items() if name.startswith(prefix)}, order.norms)


def of_words(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None) -> Iterator[Order]:
    """The order of decoders of `FAMILIES` by the words in their names, none for other names. Without a config, only that of
    adapters, whose directory has none; models of other families use other words for what their adapters adapt."""
    if config is not None and config.get("model_type") not in FAMILIES:
        return
    if config is None and not all(name.startswith(PEFT) for name in tensors):
        return
    keys: dict[str, tuple[int, ...]] = {}
    for name in tensors:
        words = names.strip_wrappers(name).removeprefix(PEFT).split(".")
        if any(word not in WORDS and not names.is_number(word) for word in words):
            return
        keys[name] = tuple(WORDS[word] if word in WORDS else int(word) for word in words)
    if (config or {}).get("tie_word_embeddings") is True:
        keys = {name: key for name, key in keys.items() if not names.is_head(name)}
    ordered = sorted(keys, key=keys.__getitem__)
    yield Order("a decoder's layers", {name: tensors[name].shape for name in ordered})


def of_transformers(directory: str, config: Mapping[str, Any] | None) -> Iterator[Order]:
    """The order of the model that transformers makes of config.json, without weights; none where it is not installed or does
    not know the model."""
    if config is None or importlib.util.find_spec("transformers") is None:
        return
    made = _made(Path(directory), config)
    if made is not None:
        import torch

        norms = frozenset(
            f"{path}.{name}" if path else name
            for path, module in made.named_modules()
            if isinstance(module, torch.nn.LayerNorm)
            for name, _ in module.named_parameters(recurse=False)
        )
        yield Order("transformers' model", {name: tuple(p.shape) for name, p in made.named_parameters()}, norms)


def _made(directory: Path, config: Mapping[str, Any]) -> Any:
    """The model on torch's meta device, or None. No code from the checkpoint is run, nothing is downloaded."""
    import torch
    import transformers

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # transformers remarks on much that does not matter here
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            read = transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
            named = config.get("architectures")
            architecture = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
            with torch.device("meta"):
                if isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel):
                    return architecture(read)
                return transformers.AutoModelForCausalLM.from_config(read)  # type: ignore[no-untyped-call]
    except Exception:  # a config that transformers does not take fails in any way there is; other orders are tried
        return None
    finally:
        logging.disable(before)
