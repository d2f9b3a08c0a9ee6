"""Rank files made by FSDP itself: `python -m tests.real.make_ranks DIR`, processes over gloo.

The layout is that of verl and SkyRL: `global_step_2/actor/model_world_size_W_rank_R.pt`, what `state_dict()` gives in
each process, and `optim_…`, the same of the optimizer. Below DIR, one run for each of `KINDS`, and beside it `NAME.pt`, the
same tensors whole as torch gathers them: of FSDP2 and FSDP1 by `get_model_state_dict` and FULL_STATE_DICT, of tensors that
were cut by hand the ones before the cut; `NAME_moments.pt`: Adam's moments by name, as torch gathers them.
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
NOTHING: dict[str, Any] = {"state": {}, "param_groups": []}
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


def train(model: Any, rank: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(100 + rank)
    for _ in range(2):
        tokens = torch.randint(0, 101, (2, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def moments(model: Any, optimizer: torch.optim.Optimizer, *, fsdp1: bool = False, orig: bool = False) -> dict[str, Any]:
    """Adam's moments by name, whole, as the framework gathers them: `exp_avg/NAME`."""
    if fsdp1:
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
        from torch.distributed.fsdp import StateDictType

        if orig:  # of which torch 2.13 gathers exp_avg into the memory of exp_avg_sq
            with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
                state = FSDP.optim_state_dict(model, optimizer)["state"]
            for kept in state.values():
                kept.update({slot: v.full_tensor() for slot, v in kept.items() if hasattr(v, "full_tensor")})
        else:
            state = FSDP.full_optim_state_dict(model, optimizer, rank0_only=False)["state"]
    else:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=False)
        state = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    return {f"{slot}/{name}": value for name, kept in state.items() for slot, value in kept.items() if slot != "step"}


Made = tuple[Any, Any, Any, Any, Any]  # parts, the same whole, config, the optimizer's state, moments by name


def fsdp2(rank: int, size: int, *, names: tuple[str, ...] = ("fsdp",), frozen: str = "", **options: Any) -> Made:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,) if len(names) == 1 else (2, size // 2), mesh_dim_names=names)
    model = qwen2(**options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and frozen in name))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = train(model, rank)
    kept = optimizer.state_dict()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return model.state_dict(), whole, model.config, kept, moments(model, optimizer)


def fsdp1(
    rank: int, size: int, *, names: tuple[str, ...] = (), orig: bool = False, wrap: bool = True, **options: Any
) -> Made:
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
    more |= {"auto_wrap_policy": policy if wrap else None, "use_orig_params": orig}
    model = FSDP(qwen2(**options), device_id=torch.device("cpu"), **more)
    optimizer = train(model, rank)
    kept = optimizer.state_dict()
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=False)):
        parts = model.state_dict()
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        whole = model.state_dict()
    return parts, whole, None, kept, moments(model, optimizer, fsdp1=True, orig=orig)


def plain(rank: int, size: int) -> Made:
    """One process without FSDP."""
    model = qwen2(tied=True)
    optimizer = train(model, rank)
    return model.state_dict(), model.state_dict(), model.config, optimizer.state_dict(), moments(model, optimizer)


def placed(rank: int, size: int) -> Made:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    torch.manual_seed(0)
    whole = {name: torch.randn(shape) for name, (shape, _) in PLACED.items()}
    parts = {
        name: distribute_tensor(whole[name], mesh, [Replicate() if p == "R" else Shard(p) for p in how])
        for name, (_, how) in PLACED.items()
    }
    return parts, whole, None, NOTHING, {}


def fsdp2_tp(rank: int, size: int) -> Made:
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
        NOTHING,
        {},
    )


KINDS: dict[str, tuple[int, Callable[..., Made]]] = {
    "fsdp2": (2, fsdp2),
    "fsdp2_bf16": (2, partial(fsdp2, dtype=torch.bfloat16)),
    "fsdp2_tied": (2, partial(fsdp2, tied=True)),
    "fsdp2_frozen": (2, partial(fsdp2, frozen="embed_tokens")),
    "fsdp2_one": (1, fsdp2),
    "plain_one": (1, plain),
    "fsdp1_mesh": (2, partial(fsdp1, names=("fsdp",))),
    "fsdp1_no_mesh": (2, fsdp1),
    "fsdp1_tied": (2, partial(fsdp1, names=("fsdp",), tied=True)),
    "fsdp1_orig": (2, partial(fsdp1, names=("fsdp",), orig=True)),
    "fsdp1_orig_tied": (2, partial(fsdp1, names=("fsdp",), orig=True, tied=True)),
    "fsdp1_unwrapped": (2, partial(fsdp1, names=("fsdp",), wrap=False)),
    "fsdp1_one": (1, partial(fsdp1, names=("fsdp",))),
    "hsdp": (4, partial(fsdp2, names=("ddp", "fsdp"))),
    "hsdp1_orig": (4, partial(fsdp1, names=("ddp", "fsdp"), orig=True)),
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
        parts, whole, config, kept, whole_moments = make(rank, size)
        actor = Path(out, name, "global_step_2", "actor")
        (actor / "huggingface").mkdir(parents=True, exist_ok=True)
        torch.save(parts, actor / f"model_world_size_{size}_rank_{rank}.pt")
        torch.save(kept, actor / f"optim_world_size_{size}_rank_{rank}.pt")
        torch.save({"lr_scheduler": {}}, actor / f"extra_state_world_size_{size}_rank_{rank}.pt")
        if rank == 0:
            torch.save(whole, Path(out, f"{name}.pt"))
            torch.save(whole_moments, Path(out, f"{name}_moments.pt"))
            (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": size}))
            if config is not None:
                config.save_pretrained(actor / "huggingface")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    for size in (1, 2, 4):
        mp.spawn(work, (size, sys.argv[1]), nprocs=size)
