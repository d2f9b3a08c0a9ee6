"""Checkpoints of ZeRO-1, 2 and 3 and universal ones, written by DeepSpeed itself on a CPU: tests/real/zero.

In an environment with deepspeed (0.19.8), torch and safetensors, once for each run of `RUNS`, NAME with as many processes as
it says, then the conversions:

    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 tests/real/make_zero.py DIR NAME
    DS_ACCELERATOR=cpu python tests/real/make_zero.py DIR universal

Below DIR: `NAME/` as `save_checkpoint` leaves it, without the scripts that DeepSpeed copies there, and
`expected/NAME.safetensors`: masters as the engine itself gathers them (but for one run), everything else as the
module holds it. Before anything is written, that is compared with what DeepSpeed's `zero_to_fp32` makes of the files.
`expected/NAME_moments.safetensors`: Adam's moments as the conversion to universal checkpoints finds them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

VOCABULARY, HIDDEN, INNER = 61, 9, 13  # odd, so that nothing divides evenly among the ranks
TAG = "global_step2"
BF16 = {"bf16": {"enabled": True}}
RUNS: dict[str, dict[str, Any]] = {  # name → what is special about its configuration; processes in front of it
    "stage1": {"processes": 2, "zero_optimization": {"stage": 1}, **BF16},
    # float32 gradients make DeepSpeed take another optimizer, which does not write the stage
    "stage1_f32_grads": {
        "processes": 2, "zero_optimization": {"stage": 1}, **BF16, "data_types": {"grad_accum_dtype": "fp32"},
    },
    "stage2": {"processes": 3, "zero_optimization": {"stage": 2}, **BF16},
    "stage2_f32": {"processes": 2, "zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "stage3": {"processes": 2, "zero_optimization": {"stage": 3}, **BF16},
    "stage3_groups": {"processes": 3, "zero_optimization": {"stage": 3, "sub_group_size": 40}, **BF16},
}  # fmt: skip
PATTERNS = {"universal_checkpoint_info": {"tp_replicated_parameter_patterns": [".*"]}, "iteration": 2}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)
        self.gate = nn.Parameter(torch.full((1,), 0.7))  # fewer elements than ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate * self.down_proj(torch.tanh(self.up_proj(torch.tanh(self.q_proj(x)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("inv_freq", torch.rand(5))
        self.register_buffer("seen", torch.arange(7))
        self.register_buffer("mask", torch.ones(3), persistent=False)
        for frozen in (self.layers[0].up_proj.weight, self.layers[1].q_proj.bias):
            frozen.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.lm_head(self.norm(x))
        return nn.functional.cross_entropy(x.flatten(0, 1).float(), tokens.flatten())


def make(out: Path, name: str) -> None:
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    settings = dict(RUNS[name])
    processes = settings.pop("processes")
    deepspeed.init_distributed("gloo")
    assert dist.get_world_size() == processes
    torch.manual_seed(0)
    model = Model()
    whole = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}  # before it is cut
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        **settings,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=groups)
    for step in range(2):
        torch.manual_seed(10 * step + dist.get_rank())
        engine.backward(engine(torch.randint(0, VOCABULARY, (2, 8))))
        engine.step()
    engine.save_checkpoint(str(out / name), tag=TAG, client_state=PATTERNS)
    if name == "stage2_f32":  # there the model itself is in float32; and the engine looks for masters in the wrong place
        expected = {n: p.detach().clone() for n, p in trained.items()}
    else:
        expected = {n: safe_get_full_fp32_param(p).detach().clone() for n, p in trained.items()}
    dist.barrier()
    if dist.get_rank():
        return
    kind = torch.bfloat16 if "bf16" in settings else torch.float32
    expected["lm_head.weight"] = expected["embed_tokens.weight"].clone()
    expected.update({n: whole[n].to(kind) for n in whole if n not in expected})
    expected.update({n: b.clone() for n, b in model.state_dict().items() if n in ("inv_freq", "seen")})
    if name != "stage1_f32_grads":
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(out / name), tag=TAG)
        left_out = set(expected) - set(theirs)
        assert left_out == ({"layers.0.up_proj.weight", "layers.1.q_proj.bias"} if name == "stage1" else set()), left_out
        for n, tensor in theirs.items():
            assert torch.equal(tensor.float(), expected[n].float()), n
    for script in (out / name).glob("zero_to_*.py"):
        script.unlink()
    (out / "expected").mkdir(exist_ok=True)
    save_file(expected, out / "expected" / f"{name}.safetensors")


def convert(out: Path) -> None:
    """Universal checkpoints of two runs, and from DeepSpeed's conversion the moments of all runs but the one whose slices it
    takes from the wrong place (`round_robin_gradients`)."""
    from deepspeed.checkpoint import ds_to_universal

    for name in RUNS:
        target = out / f"{name}_universal"
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(out / name / TAG),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )
        moments = {}
        for path in target.glob("zero/*/exp_avg*.pt"):
            found = torch.load(path)
            moments[f"{path.stem}/{path.parent.name}"] = found["param"] if isinstance(found, dict) else found
        if name != "stage2_f32":
            save_file(moments, out / "expected" / f"{name}_moments.safetensors")
        if name not in ("stage2", "stage3_groups"):
            shutil.rmtree(target)
    (out / "latest_universal").unlink()


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    if sys.argv[2] == "universal":
        convert(directory)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        shutil.rmtree(directory / sys.argv[2], ignore_errors=True)
        make(directory, sys.argv[2])
