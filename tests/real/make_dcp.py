"""Distributed checkpoints made by torch.distributed itself: `python -m tests.real.make_dcp DIR`, four processes over gloo.

Below DIR: `full.pt` (the tensors whole), `two/`, `four/` (DCP of two and of four ranks, cut along one and two axes),
`hf_two/`, `hf_four/` (the same as sharded safetensors) and `hf_whole/` (consolidated), `fsdp/` (accelerate's own
save_fsdp_model and save_fsdp_optimizer of a Qwen2 after one step, with `fsdp.pt`, the model whole).
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

PORT = 29571


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(101, 24),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(24, 37).bfloat16(),
        "model.norm.weight": torch.randn(7),
        "model.layers.0.mlp.experts.down_proj": torch.randn(4, 6, 10).half(),
    }


def work(rank: int, size: int, out: str) -> None:
    warnings.filterwarnings("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(PORT + size), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    word = {2: "two", 4: "four"}[size]
    mesh = init_device_mesh("cpu", (2, 2) if size == 4 else (2,))
    placements: list[list[Any]] = (
        [[Shard(0), Shard(1)], [Replicate(), Shard(1)], [Shard(0), Replicate()], [Shard(0), Shard(2)]]
        if size == 4
        else [[Shard(0)], [Shard(1)], [Shard(0)], [Shard(1)]]
    )
    full = tensors()
    model = {name: distribute_tensor(full[name], mesh, where) for name, where in zip(full, placements, strict=True)}
    dcp.save({"model": model, "step": 3}, checkpoint_id=f"{out}/{word}")
    dcp.save(model, storage_writer=HuggingFaceStorageWriter(path=f"{out}/hf_{word}", save_distributed=True))
    if size == 2:
        writer = HuggingFaceStorageWriter(path=f"{out}/hf_whole", save_distributed=True, enable_consolidation=True)
        dcp.save({name: value for name, value in model.items() if value.dtype != torch.float16}, storage_writer=writer)
        save_with_accelerate(rank, out)
    if rank == 0:
        torch.save(full, f"{out}/full.pt")
    dist.barrier()
    dist.destroy_process_group()


def save_with_accelerate(rank: int, out: str) -> None:
    import accelerate
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import (
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
        StateDictType,
        fully_shard,
    )
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=101, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, 101, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    accelerate.PartialState(cpu=True)
    accelerator = types.SimpleNamespace(num_processes=2, process_index=rank, is_main_process=rank == 0, is_fsdp2=True)
    plugin = types.SimpleNamespace(
        state_dict_type=StateDictType.SHARDED_STATE_DICT,
        state_dict_config=ShardedStateDictConfig(),
        optim_state_dict_config=ShardedOptimStateDictConfig(),
        fsdp_version=2,
    )
    save_fsdp_model(plugin, accelerator, model, f"{out}/fsdp")
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, f"{out}/fsdp")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(whole, f"{out}/fsdp.pt")
        config.save_pretrained(f"{out}/fsdp")


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    for size in (2, 4):
        mp.spawn(work, (size, sys.argv[1]), nprocs=size)
