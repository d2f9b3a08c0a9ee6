"""Parts of fused tensors as tensors of their own, without copying: experts, query/key/value, gate/up, stacked layers.

Each function here looks at one tensor and says of which others it consists, as `Part`s: names, shapes, and the bytes of what
is stored. What a split needs to know is read off the other checkpoint's shapes, and how heads are interleaved off a config.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paramdiff.checkpoints import TensorInfo

Extents = tuple[tuple[str, int, int], ...]  # (stored tensor, first byte, bytes), one after the other
Shapes = Mapping[str, tuple[int, ...]]  # of the other checkpoint's tensors that have no partner yet
Config = Mapping[str, Any]

# Stacks of these are stored as (experts, in, out): their parts are transposed, and are not compared with (out, in).
TRANSPOSED = {"gpt_oss", "llama4", "llama4_text"}
EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor as it is compared: a whole stored one, or some bytes of one or several."""

    info: TensorInfo
    extents: Extents
    rules: tuple[str, ...] = ()

    @property
    def is_view(self) -> bool:
        return len(self.extents) != 1 or self.extents[0][0] != self.info.name

    def cut(self, name: str, shape: tuple[int, ...], ranges: Sequence[tuple[int, int]]) -> Part:
        """The part made of elements `ranges` of this one, first to last (exclusive), under another name and shape."""
        size = self.info.type.bits // 8
        extents = tuple(e for first, last in ranges for e in _sliced(self.extents, first * size, last * size))
        return Part(TensorInfo(name, self.info.dtype, shape), extents, self.rules)


def _sliced(extents: Extents, first: int, last: int) -> Iterator[tuple[str, int, int]]:
    at = 0
    for name, start, length in extents:
        low, high = max(at, first), min(at + length, last)
        if low < high:
            yield name, start + low - at, high - low
        at += length


def experts(name: str, part: Part, other: Shapes, config: Config) -> list[Part]:
    """`experts.gate_up_proj` (E, 2·I, H) and `experts.down_proj` (E, H, I) as the matrices of single experts.

    transformers 5 fuses them in memory: gate above up, along the rows (see transformers' conversion_mapping).
    """
    match = re.fullmatch(r"(?P<stem>.*\bexperts\.)(?P<kind>gate_up_proj|down_proj)(\.weight)?", name)
    if match is None or len(part.info.shape) != 3 or part.info.type.bits < 8 or config.get("model_type") in TRANSPOSED:
        return []
    count, rows, cols = part.info.shape
    stems = (match["stem"], match["stem"].replace(".mlp.", ".block_sparse_moe."))
    for stem, (gate, up, down) in itertools.product(stems, EXPERT_NAMES):
        wanted = (down,) if match["kind"] == "down_proj" else (gate, up)
        if f"{stem}0.{wanted[0]}.weight" not in other or rows % len(wanted):
            continue
        height = rows // len(wanted)
        return [
            part.cut(
                f"{stem}{expert}.{leaf}.weight",
                (height, cols),
                [((expert * len(wanted) + half) * height * cols, (expert * len(wanted) + half + 1) * height * cols)],
            )
            for expert in range(count)
            for half, leaf in enumerate(wanted)
        ]
    return []


def gate_up(name: str, part: Part, other: Shapes, config: Config) -> list[Part]:
    """`gate_up_proj` of Phi-3 and its like as `gate_proj` above `up_proj`."""
    del config
    match = re.fullmatch(r"(?P<stem>.*\.)gate_up_proj\.(?P<end>weight|bias)", name)
    if match is None:
        return []
    return _rows(part, [f"{match['stem']}{leaf}.{match['end']}" for leaf in ("gate_proj", "up_proj")], other)


def qkv(name: str, part: Part, other: Shapes, config: Config) -> list[Part]:
    """`qkv_proj` as queries above keys above values; `query_key_value`, `linear_qkv` with those of a group together."""
    match = re.fullmatch(r"(?P<stem>.*\.)(?P<kind>qkv_proj|query_key_value|linear_qkv)\.(?P<end>weight|bias)", name)
    if match is None:
        return []
    wanted = [f"{match['stem']}{leaf}.{match['end']}" for leaf in ("q_proj", "k_proj", "v_proj")]
    if match["kind"] == "qkv_proj":
        return _rows(part, wanted, other)
    return interleaved(part, wanted, other, config)


def _rows(part: Part, wanted: Sequence[str], other: Shapes) -> list[Part]:
    """The rows of a tensor dealt out to `wanted` in turn, as many to each as the other side has."""
    if not all(name in other and other[name][1:] == part.info.shape[1:] for name in wanted) or part.info.type.bits < 8:
        return []
    width, at, found = _width(part), 0, []
    for name in wanted:
        height = other[name][0]
        found.append(part.cut(name, other[name], [(at * width, (at + height) * width)]))
        at += height
    return found if at == part.info.shape[0] else []


def interleaved(part: Part, wanted: Sequence[str], other: Shapes, config: Config) -> list[Part]:
    """Rows in groups of heads: in each, the queries that share a key, the key, the value (Megatron, GPT-NeoX, Falcon)."""
    groups = config.get("num_key_value_heads") or config.get("num_attention_heads")
    known = all(name in other and other[name][1:] == part.info.shape[1:] for name in wanted) and part.info.type.bits >= 8
    if not known or not isinstance(groups, int) or groups < 1 or any(other[name][0] % groups for name in wanted):
        return []
    heights = [other[name][0] // groups for name in wanted]
    together, width, found = sum(heights), _width(part), []
    if together * groups != part.info.shape[0]:
        return []
    for number, name in enumerate(wanted):
        before = sum(heights[:number])
        ranges = [
            ((group * together + before) * width, (group * together + before + heights[number]) * width)
            for group in range(groups)
        ]
        found.append(part.cut(name, other[name], ranges))
    return found


def _width(part: Part) -> int:
    return part.info.numel // part.info.shape[0] if part.info.shape and part.info.shape[0] else 0


# --- Megatron-Core --------------------------------------------------------------------------------

MEGATRON = {  # a pattern → the Hugging Face name; layers are numbered already (megatron_bridge's mapping of llama and qwen)
    r"embedding\.word_embeddings\.weight": "model.embed_tokens.weight",
    r"output_layer\.weight": "lm_head.weight",
    r"decoder\.final_layernorm\.weight": "model.norm.weight",
    r"decoder\.layers\.(\d+)\.(?:self_attention\.linear_qkv\.layer_norm_weight|input_layernorm\.weight)":
        r"model.layers.\1.input_layernorm.weight",
    r"decoder\.layers\.(\d+)\.(?:mlp\.linear_fc1\.layer_norm_weight|pre_mlp_layernorm\.weight)":
        r"model.layers.\1.post_attention_layernorm.weight",
    r"decoder\.layers\.(\d+)\.self_attention\.linear_proj\.(weight|bias)": r"model.layers.\1.self_attn.o_proj.\2",
    r"decoder\.layers\.(\d+)\.self_attention\.(q|k)_layernorm\.weight": r"model.layers.\1.self_attn.\2_norm.weight",
    r"decoder\.layers\.(\d+)\.mlp\.linear_fc2\.(weight|bias)": r"model.layers.\1.mlp.down_proj.\2",
    r"decoder\.layers\.(\d+)\.mlp\.router\.weight": r"model.layers.\1.mlp.gate.weight",
    r"decoder\.layers\.(\d+)\.mlp\.experts\.linear_fc2\.weight(\d+)": r"model.layers.\1.mlp.experts.\2.down_proj.weight",
}  # fmt: skip
MEGATRON_SPLIT: dict[str, tuple[Callable[..., list[Part]], tuple[str, ...]]] = {
    r"decoder\.layers\.(\d+)\.self_attention\.linear_qkv\.(weight|bias)": (
        interleaved, tuple(rf"model.layers.\1.self_attn.{leaf}_proj.\2" for leaf in "qkv"),
    ),
    r"decoder\.layers\.(\d+)\.mlp\.linear_fc1\.(weight|bias)": (
        _rows, tuple(rf"model.layers.\1.mlp.{leaf}_proj.\2" for leaf in ("gate", "up")),
    ),
    r"decoder\.layers\.(\d+)\.mlp\.experts\.linear_fc1\.weight(\d+)": (
        _rows, tuple(rf"model.layers.\1.mlp.experts.\2.{leaf}_proj.weight" for leaf in ("gate", "up")),
    ),
}  # fmt: skip


def megatron(name: str, part: Part, other: Shapes, config: Config) -> list[Part]:
    """Megatron-Core's names as Hugging Face's, with layers that are stacked under one key taken apart."""
    name = re.sub(r"^(module|model)\.", "", name)
    stacked = re.fullmatch(r"decoder\.layers\.(?P<rest>\D.*)", name)
    if stacked is None:
        return _of_megatron(name, part, other, config)
    found: list[Part] = []
    shape = part.info.shape
    for layer in range(shape[0] if len(shape) > 1 and part.info.type.bits >= 8 else 0):
        size = part.info.numel // shape[0]
        one = part.cut(f"decoder.layers.{layer}.{stacked['rest']}", shape[1:], [(layer * size, (layer + 1) * size)])
        made = _of_megatron(one.info.name, one, other, config)
        if not made:
            return []
        found += made
    return found


def _of_megatron(name: str, part: Part, other: Shapes, config: Config) -> list[Part]:
    for pattern, new in MEGATRON.items():
        if match := re.fullmatch(pattern, name):
            return [part.cut(match.expand(new), part.info.shape, [(0, part.info.numel)])]
    for pattern, (split, leaves) in MEGATRON_SPLIT.items():
        if match := re.fullmatch(pattern, name):
            wanted = [match.expand(leaf) for leaf in leaves]
            return split(part, wanted, other, config) if split is interleaved else split(part, wanted, other)
    return []
