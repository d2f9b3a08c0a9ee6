"""A torch_dist checkpoint written by Megatron-Core's own dist_checkpointing, of two ranks on a CPU.

In an environment with torch and megatron-core:
`python -m torch.distributed.run --nproc_per_node 2 tests/real/make_megatron.py DIR`.
The keys and cuts are those of a GPT model with tensor parallelism (layers stacked under one key); the values are counted up,
so that the tests can say what they are.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

LAYERS, HIDDEN, VOCABULARY = 3, 4, 12


def main(out: str) -> None:
    torch.cuda.synchronize = lambda *_, **__: None  # which Megatron calls without asking whether there is a GPU
    torch.cuda.current_device = lambda: "cpu"
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    def part(key: str, whole: torch.Tensor, axis: int, layer: int | None = None) -> ShardedTensor:
        mine = whole.chunk(size, axis)[rank].clone()
        if layer is None:
            return ShardedTensor.from_rank_offsets(key, mine, (axis, rank, size))
        return ShardedTensor.from_rank_offsets(key, mine, (0, layer, LAYERS), (axis + 1, rank, size), prepend_axis_num=1)

    model = {"embedding": part("embedding.word_embeddings.weight", counted(VOCABULARY, HIDDEN, 0), 0)}
    for layer in range(LAYERS):
        key = "decoder.layers.mlp.linear_fc1.weight"
        model[f"fc1.{layer}"] = part(key, counted(2 * HIDDEN, HIDDEN, 1000 + 100 * layer), 0, layer)
        key = "decoder.layers.self_attention.linear_proj.weight"
        model[f"proj.{layer}"] = part(key, counted(HIDDEN, HIDDEN, 2000 + 100 * layer), 1, layer)
    moments = {
        "embedding": part("optimizer.state.exp_avg.embedding.word_embeddings.weight", counted(VOCABULARY, HIDDEN, 5000), 0)
    }
    if rank == 0:
        os.makedirs(out, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save({"model": model, "optimizer": moments, "iteration": 2, "args": {"tp": size}}, out)
    dist.barrier()
    dist.destroy_process_group()


def counted(rows: int, cols: int, first: int) -> torch.Tensor:
    return torch.arange(first, first + rows * cols, dtype=torch.float32).reshape(rows, cols)


if __name__ == "__main__":
    main(sys.argv[1])
