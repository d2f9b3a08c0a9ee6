"""How fast is each container, against safetensors? The same two models in all of them, one run.

    python benchmarks/containers.py DIR [--kind rl] [--repeat 3] [--json FILE]

DIR is what make_pair.py wrote. The first run converts `base` and the kind to the other containers below DIR/containers, with
torch's own writers: torch files, DCP and its sharded safetensors, and rank files of FSDP2 (two processes over gloo, every
matrix cut along its rows); ZeRO-3 and FP8 blocks are laid out by hand. Every comparison is a process of its own, start-up
included; the best of the rounds counts; all must count the same changes. No time is a pass or a fail.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import peers
from run import machine, progress

RANKS = 2
CONTAINERS = ("safetensors", "torch", "dcp", "dcp_hf", "ranks", "zero3", "fp8_block")


def converted(source: Path, target: Path) -> None:
    """Write a model of make_pair.py in all containers below `target`, once."""
    if (target / "complete").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    made = subprocess.run([sys.executable, __file__, "--convert", str(source), str(target)], check=False)
    if made.returncode:
        raise SystemExit(f"could not convert {source}")
    (target / "complete").touch()


def convert(source: Path, target: Path) -> None:
    import torch
    from torch.multiprocessing.spawn import spawn

    weights = loaded(source)
    (target / "torch").mkdir(parents=True)
    torch.save(weights, target / "torch" / "pytorch_model.bin")
    write_zero3(weights, target / "zero3" / "global_step1")
    write_fp8(weights, target / "fp8_block")
    del weights
    spawn(write_sharded, (str(source), str(target)), nprocs=RANKS)  # type: ignore[no-untyped-call]
    for directory in ("torch", "dcp", "dcp_hf", "ranks", "zero3", "fp8_block"):
        shutil.copy(source / "config.json", target / directory / "config.json")


def loaded(source: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(str(file)).items()}


def write_sharded(rank: int, source: str, target: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    warnings.filterwarnings("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29583", RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    parts = {}
    for name, tensor in loaded(Path(source)).items():
        mine = tensor.chunk(RANKS, 0)[rank].clone()
        parts[name] = DTensor.from_local(mine, mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride())
    (Path(target) / "ranks").mkdir(exist_ok=True)
    torch.save(parts, f"{target}/ranks/model_world_size_{RANKS}_rank_{rank}.pt")
    save({"model": parts}, checkpoint_id=f"{target}/dcp")
    save(parts, storage_writer=HuggingFaceStorageWriter(path=f"{target}/dcp_hf", save_distributed=True))
    dist.barrier()
    dist.destroy_process_group()


def write_zero3(weights: dict[str, Any], target: Path) -> None:
    """As DeepSpeed lays them out: every parameter cut into equal parts, the parts of one rank in one flat float32 vector."""
    import torch

    target.mkdir(parents=True)
    shapes = {name: weight.shape for name, weight in weights.items()}
    for rank in range(RANKS):
        parts = []
        for weight in weights.values():
            length = -(-weight.numel() // RANKS)
            part = torch.zeros(length)
            mine = weight.reshape(-1)[rank * length : (rank + 1) * length].float()
            part[: mine.numel()] = mine
            parts.append(part)
        state = {"zero_stage": 3, "partition_count": RANKS, "fp32_flat_groups": [torch.cat(parts)]}
        torch.save({"optimizer_state_dict": state}, target / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        facts = {"module": {}, "param_shapes": [shapes], "buffer_names": [], "shared_params": {}, "dp_world_size": RANKS}
        torch.save(facts, target / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


def write_fp8(weights: dict[str, Any], target: Path, block: int = 128) -> None:
    """Matrices in blocks of 128 × 128 with a scale each, as DeepSeek-V3 is published."""
    import torch
    from safetensors.torch import save_file

    target.mkdir(parents=True)
    stored = {}
    for name, weight in weights.items():
        if weight.ndim != 2 or "embed" in name:
            stored[name] = weight
            continue
        rows, cols = weight.shape
        padded = torch.zeros(-(-rows // block) * block, -(-cols // block) * block)
        padded[:rows, :cols] = weight.float()
        blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
        scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows, :cols].contiguous()
        stored[name] = codes.to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
    save_file(stored, str(target / "model.safetensors"))


def compared(base: Path, tuned: Path) -> tuple[float, dict[str, Any]]:
    """Seconds of a whole process, and what it counted."""
    command = [str(peers.paramdiff_command()), "sparsity", str(base), str(tuned), "--json"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{base} against {tuned}: {done.stderr}")
    return seconds, json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="what make_pair.py wrote")
    parser.add_argument("--kind", default="rl")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    options = parser.parse_args()
    sides = ("base", options.kind)
    for side in sides:
        progress(f"converting {side}")
        converted(options.directory / side, options.directory / "containers" / side)
    best: dict[str, float] = {}
    changed: dict[str, int] = {}
    names = [
        name for name in CONTAINERS if name == "safetensors" or (options.directory / "containers" / "base" / name).exists()
    ]
    for turn in range(options.repeat + 1):
        for name in names:
            progress(f"round {turn}: {name}")
            root = options.directory if name == "safetensors" else options.directory / "containers"
            below = "" if name == "safetensors" else name
            seconds, said = compared(root / sides[0] / below, root / sides[1] / below)
            changed[name] = said["changed"]
            if turn:  # the first fills the page cache
                best[name] = min(best.get(name, seconds), seconds)
    progress("")
    print(machine())
    for name in names:
        print(f"{name:12} {best[name]:6.2f} s  {best[name] / best['safetensors']:5.2f} ×  {changed[name]:,} changed")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "seconds": best, "changed": changed}, indent=1))
    same = {changed[name] for name in names if name != "fp8_block"}  # which rounds both sides
    return 0 if len(same) == 1 else 1


if __name__ == "__main__":
    if "--convert" in sys.argv:
        convert(*map(Path, sys.argv[2:4]))
    else:
        sys.exit(main())
