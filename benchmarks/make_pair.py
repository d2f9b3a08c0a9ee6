"""Make checkpoints to compare: a base in the shape of Qwen2, and copies changed the way each kind of training does it.

    python benchmarks/make_pair.py OUT --params 0.8e9 --kind base,same,sgd,rl,sft --shards 2

Writes OUT/base, OUT/same, …: bfloat16 safetensors shards, their index and a config.json. The same arguments give the same
bytes, and a kind made on its own fits a base made earlier. Memory stays at a few hundred MB whatever the size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint16]  # bfloat16 numbers as they are stored
Shape = tuple[int, ...]

CHUNK = 1 << 21  # elements made at a time
STD = 0.02
NOISE = 3e-4  # of the dense update


@dataclass(frozen=True)
class Model:
    """The sizes of a Qwen2 model; `layers` is left to `fitted`."""

    hidden: int
    intermediate: int
    kv: int
    vocab: int
    heads: int
    layers: int = 0

    def outside(self) -> list[tuple[str, Shape]]:
        return [("model.embed_tokens.weight", (self.vocab, self.hidden)), ("model.norm.weight", (self.hidden,))]

    def layer(self, number: int) -> list[tuple[str, Shape]]:
        h, i, kv = self.hidden, self.intermediate, self.kv
        shapes: dict[str, Shape] = {
            "input_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (h, h),
            "self_attn.q_proj.bias": (h,),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (h, h),
            "post_attention_layernorm.weight": (h,),
            "mlp.gate_proj.weight": (i, h),
            "mlp.up_proj.weight": (i, h),
            "mlp.down_proj.weight": (h, i),
        }
        return [(f"model.layers.{number}.{name}", shape) for name, shape in shapes.items()]

    def tensors(self) -> list[tuple[str, Shape]]:
        embedding, norm = self.outside()
        return [embedding, *(tensor for number in range(self.layers) for tensor in self.layer(number)), norm]

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv * self.heads // self.hidden,
            "vocab_size": self.vocab,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }


MODELS = (
    Model(hidden=1536, intermediate=8960, kv=256, vocab=151936, heads=12),
    Model(hidden=896, intermediate=4864, kv=128, vocab=151936, heads=14),
    Model(hidden=256, intermediate=1408, kv=64, vocab=32000, heads=4),
    Model(hidden=64, intermediate=352, kv=32, vocab=2048, heads=2),
)


def count(tensors: list[tuple[str, Shape]]) -> int:
    return sum(int(np.prod(shape)) for _, shape in tensors)


def fitted(params: float) -> Model:
    """The widest model that comes to about `params` parameters with four layers or more."""
    for model in MODELS:
        layers = round((params - count(model.outside())) / count(model.layer(0)))
        if layers >= 4:
            break
    sizes = {k: v for k, v in vars(model).items() if k != "layers"}
    return Model(**sizes, layers=max(layers, 1))


def rounded(values: npt.NDArray[np.float32]) -> Bits:
    """float32 → bfloat16, to nearest, ties to even. Overwrites `values`."""
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16)


def widened(bits: Bits) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def one_ulp(base: Bits, share: float, rng: np.random.Generator) -> Bits:
    """Move a share of the elements to the next bfloat16 number, away from zero or towards it."""
    if share < 0.01:  # choose places instead of asking every element
        gaps = rng.geometric(share, size=int(base.size * share * 1.5) + 100)
        places = np.cumsum(gaps) - 1
        chosen = places[places < base.size]
        coin = rng.integers(0, 2, size=chosen.size, dtype=np.uint16)
    else:
        draw = rng.integers(0, 1 << 16, size=base.size, dtype=np.uint16)
        chosen = np.flatnonzero(draw < round(share * (1 << 16)))
        coin = draw[chosen] & np.uint16(1)
    step = np.where((base[chosen] & 0x7FFF == 0) | (coin == 1), 1, 0xFFFF).astype(np.uint16)  # 0 has no number below it
    tuned = base.copy()
    tuned[chosen] += step
    return tuned


def dense(base: Bits, rng: np.random.Generator) -> Bits:
    """Add noise to every element; what rounds back to the old number stays unchanged, as in training."""
    noise = rng.standard_normal(base.size, dtype=np.float32)
    noise *= np.float32(NOISE)
    noise += widened(base)
    return rounded(noise)


UPDATES: dict[str, Callable[[Bits, np.random.Generator], Bits]] = {
    "base": lambda base, _: base,
    "same": lambda base, _: base,
    "sgd": lambda base, rng: one_ulp(base, 0.0004, rng),
    "rl": lambda base, rng: one_ulp(base, 0.2, rng),
    "sft": dense,
}


def chunks(tensor: int, name: str, shape: Shape, kinds: list[str], seed: int) -> Iterator[dict[str, Bits]]:
    """The numbers of one tensor for every kind, a piece at a time; each kind has its own stream of random numbers."""
    numel = int(np.prod(shape))
    for start in range(0, numel, CHUNK):
        rngs = {k: np.random.Generator(np.random.SFC64([seed, tensor, start, n])) for n, k in enumerate(UPDATES)}
        values = rngs["base"].standard_normal(min(CHUNK, numel - start), dtype=np.float32)
        values *= np.float32(STD)
        if name.endswith("norm.weight"):
            values += np.float32(1)
        base = rounded(values)
        yield {kind: UPDATES[kind](base, rngs[kind]) for kind in kinds}


def split(tensors: list[tuple[str, Shape]], shards: int) -> list[list[int]]:
    """Numbers of the tensors of each shard, in order, shards of about equal size."""
    total, done = count(tensors), 0
    groups: list[list[int]] = [[] for _ in range(shards)]
    for number, tensor in enumerate(tensors):
        numel = count([tensor])
        groups[min(shards - 1, (done + numel // 2) * shards // total)].append(number)
        done += numel
    return [group for group in groups if group]


def header(tensors: list[tuple[str, Shape]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def make(out: Path, model: Model, kinds: list[str], shards: int, seed: int) -> None:
    tensors = model.tensors()
    groups = split(tensors, shards)
    files: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        files |= dict.fromkeys((tensors[i][0] for i in group), file)
        with ExitStack() as stack:
            handles = {}
            for kind in kinds:
                (out / kind).mkdir(parents=True, exist_ok=True)
                handles[kind] = stack.enter_context(open(out / kind / file, "wb"))
                handles[kind].write(header([tensors[i] for i in group]))
            for i in group:
                for piece in chunks(i, *tensors[i], kinds, seed):
                    for kind, bits in piece.items():
                        handles[kind].write(bits.astype("<u2", copy=False).data)
    index = {"metadata": {"total_size": 2 * count(tensors)}, "weight_map": files}
    for kind in kinds:
        (out / kind / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        (out / kind / "config.json").write_text(json.dumps(model.config(), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--params", type=float, default=0.8e9, help="about this many parameters (default: 0.8e9)")
    parser.add_argument("--kind", default=",".join(UPDATES), help=f"any of {','.join(UPDATES)} (default: all)")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = options.kind.split(",")
    if unknown := [kind for kind in kinds if kind not in UPDATES]:
        parser.error(f"no kind {unknown[0]!r}; there are {', '.join(UPDATES)}")
    if options.shards < 1:
        parser.error("--shards must be 1 or more")
    model = fitted(options.params)
    began = time.perf_counter()
    make(options.out, model, kinds, options.shards, options.seed)
    print(
        f"{options.out}: {', '.join(kinds)}, {count(model.tensors()):,} parameters each (hidden {model.hidden}, "
        f"{model.layers} layers), {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
