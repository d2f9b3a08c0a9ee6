"""Rank files made by FSDP itself: `python -m tests.real.make_ranks DIR`, processes over gloo.

The layout is that of verl and SkyRL: `global_step_2/actor/model_world_size_W_rank_R.pt`, what `state_dict()` gives in each
process. Below DIR, one run for each of `KINDS`, and beside it `NAME.pt`, the same tensors whole as torch gathers them:
of FSDP2 and FSDP1 by `get_model_state_dict` and FULL_STATE_DICT, of tensors that were cut by hand the ones before the cut.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PORT = 29671
PLACED = {  # name → shape, and how it is cut over a mesh of 2 × 2; R is for Replicate
    "rows.weight": ((7, 5), (0, 0)),
    "few_rows.weight": ((3, 5), (0, 0)),
    "both.weight": ((7, 5), (0, 1)),
    "turned.weight": ((7, 5), (1, 0)),
    "columns.weight": ((4, 9), ("R", 1)),
    "last.weight": ((4, 3, 5), (-1, "R")),
    "one_row.weight": ((1, 6), (0, 1)),
    "same.weight": ((6,), ("R", "R")),
    "scalar": ((), ("R", "R")),
}


def qwen2(*, dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=101, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(dtype)


def train(model: Any, rank: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(100 + rank)
    tokens = torch.randint(0, 101, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def fsdp2(rank: int, size: int, *, names: tuple[str, ...] = ("fsdp",), **options: Any) -> tuple[Any, Any, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,) if len(names) == 1 else (2, size // 2), mesh_dim_names=names)
    model = qwen2(**options)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, rank)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return model.state_dict(), whole, model.config


def fsdp1(rank: int, size: int, *, names: tuple[str, ...] = (), **options: Any) -> tuple[Any, Any, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullStateDictConfig, ShardedStateDictConfig, ShardingStrategy, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    more: dict[str, Any] = {}
    if names:
        more["device_mesh"] = init_device_mesh("cpu", (size,) if len(names) == 1 else (2, size // 2), mesh_dim_names=names)
    if len(names) == 2:
        more["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={Qwen2DecoderLayer})
    model = FSDP(qwen2(**options), auto_wrap_policy=policy, device_id=torch.device("cpu"), **more)
    train(model, rank)
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=False)):
        parts = model.state_dict()
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        whole = model.state_dict()
    return parts, whole, None


def placed(rank: int, size: int) -> tuple[Any, Any, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    torch.manual_seed(0)
    whole = {name: torch.randn(shape) for name, (shape, _) in PLACED.items()}
    parts = {
        name: distribute_tensor(whole[name], mesh, [Replicate() if p == "R" else Shard(p) for p in how])
        for name, (_, how) in PLACED.items()
    }
    return parts, whole, None


def fsdp2_tp(rank: int, size: int) -> tuple[Any, Any, Any]:
    """FSDP2 over tensor parallelism: the column-wise weights are cut along rows twice, first by the inner dimension."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 10))
    plan: dict[str, Any] = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["fsdp"])
    return (
        model.state_dict(),
        get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)),
        None,
    )


KINDS: dict[str, tuple[int, Callable[..., tuple[Any, Any, Any]]]] = {
    "fsdp2": (2, fsdp2),
    "fsdp2_bf16": (2, partial(fsdp2, dtype=torch.bfloat16)),
    "fsdp2_tied": (2, partial(fsdp2, tied=True)),
    "fsdp2_one": (1, fsdp2),
    "fsdp1_mesh": (2, partial(fsdp1, names=("fsdp",))),
    "fsdp1_no_mesh": (2, fsdp1),
    "fsdp1_one": (1, partial(fsdp1, names=("fsdp",))),
    "hsdp": (4, partial(fsdp2, names=("ddp", "fsdp"))),
    "hsdp1": (4, partial(fsdp1, names=("ddp", "fsdp"))),
    "placed": (4, placed),
    "fsdp2_tp": (4, fsdp2_tp),
}


def work(rank: int, size: int, out: str) -> None:
    warnings.filterwarnings("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(PORT + size), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    for name, (needs, make) in KINDS.items():
        if needs != size:
            continue
        parts, whole, config = make(rank, size)
        actor = Path(out, name, "global_step_2", "actor")
        (actor / "huggingface").mkdir(parents=True, exist_ok=True)
        torch.save(parts, actor / f"model_world_size_{size}_rank_{rank}.pt")
        torch.save({"state": {}, "param_groups": []}, actor / f"optim_world_size_{size}_rank_{rank}.pt")
        torch.save({"lr_scheduler": {}}, actor / f"extra_state_world_size_{size}_rank_{rank}.pt")
        if rank == 0:
            torch.save(whole, Path(out, f"{name}.pt"))
            (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": size}))
            if config is not None:
                config.save_pretrained(actor / "huggingface")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    for size in (1, 2, 4):
        mp.spawn(work, (size, sys.argv[1]), nprocs=size)
