"""Train the small, real checkpoints under sample_data/ and measure them.

A Qwen2 of a third of a million parameters learns two-digit addition. A supervised warm-up gives a base that
is right part of the time; GRPO with AdamW, GRPO with plain SGD and further SFT with AdamW (all TRL's own
trainers) continue from its bf16 export. The learning rate of each is the best of a grid.

Run ``python sample_data/make_sample_data.py``: one CPU thread, no network. Everything is built in a temporary
folder and replaces the published files only once every check has passed.
"""

# Parts of the libraries used here carry no types.
# mypy: disable-error-code="import-untyped, no-untyped-call"

import contextlib
import copy
import json
import math
import os
import platform
import shutil
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before the imports below, which read the environment as they load. One thread fixes the order of every sum.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # type: ignore[attr-defined]

HERE = Path(__file__).resolve().parent
TABLES_BEGIN, TABLES_END = "<!-- tables: begin -->", "<!-- tables: end -->"

SEED = 20260207
PAD, EOS = "<pad>", "<eos>"
ANSWER_TOKENS = 4  # "198" and the end of sequence
SPLIT = {"train": 5100, "validation": 1000, "test": 2000}  # of the 8100 sums of two two-digit numbers
STEPS = 200
SERIES_EVERY = 25
THRESHOLDS = {"1e-05": 1e-5, "1e-08": 1e-8}

# fmt: off
# So small that two full Trainer checkpoints of two runs fit in the repository.
MODEL: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 16, "max_position_embeddings": 32, "tie_word_embeddings": True,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}
# The rate falls to 0, so that what the runs add to the base is more than the calming of a noisy last step.
WARM_UP: dict[str, Any] = {
    "optimizer": "AdamW", "steps": 1000, "batch_size": 128, "learning_rate": 1e-3, "schedule": "linear to 0",
    "weight_decay": 0.0, "max_grad_norm": 1.0, "carry_forgotten": 0.7, "seed": SEED,
}
# Weight decay is 0, so that a weight without a gradient stays untouched. The rate is constant after its
# warm-up, so that the last two saves differ by a step of full size.
COMMON: dict[str, Any] = {
    "max_steps": STEPS, "per_device_train_batch_size": 128, "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "weight_decay": 0.0,
    "max_grad_norm": 1.0, "seed": SEED,
}
GRPO: dict[str, Any] = {
    "num_generations": 8, "max_completion_length": ANSWER_TOKENS, "temperature": 1.0, "beta": 0.0,
    "num_iterations": 1, "loss_type": "dapo", "scale_rewards": "group",
}
# fmt: on
ADAMW = {"optim": "adamw_torch", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
SGD = {"optim": "sgd"}  # Trainer's "sgd" has no momentum
SETTINGS: dict[str, dict[str, Any]] = {
    "rl-adamw": {**COMMON, **GRPO, **ADAMW},
    "rl-sgd": {**COMMON, **GRPO, **SGD},
    "sft": {**COMMON, **ADAMW, "completion_only_loss": True},
}
RATES = {
    "rl-adamw": [1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3],
    "rl-sgd": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0],
    "sft": [1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3],
}
Problems = list[tuple[str, str]]  # prompt and answer


def main() -> None:
    """Make everything in a temporary folder, check it, put it in place and rewrite the README's tables."""
    started = time.monotonic()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # about calls among the libraries
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    # Relative paths inside the temporary folder keep this machine's paths out of what the trainers write.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        problems, tokenizer, out = split_problems(), make_tokenizer(), Path("out")
        export(warm_up(problems["train"], tokenizer), tokenizer, out / "base", torch.bfloat16)
        runs = {run: search(run, problems, tokenizer, out) for run in SETTINGS}
        saves = sorted(str(save.relative_to(out)) for save in out.glob("series/*/*"))
        compared = [*SETTINGS, "rl-adamw-fp32", *saves]
        packages = ["torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "safetensors"]
        facts = {
            "task": {"prompts": "a+b=, both from 10 to 99", "reward": "1 if right, else 0", **SPLIT},
            "model": {"model_type": "qwen2", **MODEL},
            "warm_up": WARM_UP,
            "runs": runs,
            "measured": {name: measure(out / "base", out / name) for name in compared},
            "checks": check(out),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        }
        (out / "runs.json").write_text(json.dumps(facts, indent=2) + "\n")
        publish(out)
    write_tables(facts)
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")


def split_problems() -> dict[str, Problems]:
    """All sums of two two-digit numbers, shuffled once and split without overlap."""
    everything = [(f"{a}+{b}=", str(a + b)) for a in range(10, 100) for b in range(10, 100)]
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(SEED)).tolist()
    assert sum(SPLIT.values()) == len(everything)
    shuffled = iter([everything[i] for i in order])
    return {name: [next(shuffled) for _ in range(count)] for name, count in SPLIT.items()}


def without_carry(prompt: str, answer: str) -> str:
    """The answer of someone who forgets to carry from the last digits."""
    a, b = prompt.rstrip("=").split("+")
    return str(int(answer) - 10) if int(a[-1]) + int(b[-1]) >= 10 else answer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; nothing is added before or after a text."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, "<unk>", *"0123456789", "+", "="])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()  # without it decoding would put spaces between the digits
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token="<unk>")


def encode(problems: Problems, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts, all of one length, and answers with the end of sequence, padded to ANSWER_TOKENS."""
    prompts = torch.tensor([tokenizer.encode(prompt) for prompt, _ in problems])
    answers = torch.full((len(problems), ANSWER_TOKENS), tokenizer.pad_token_id)
    for row, (_, answer) in zip(answers, problems, strict=True):
        ids = tokenizer.encode(answer + EOS)
        row[: len(ids)] = torch.tensor(ids)
    return prompts, answers


def warm_up(problems: Problems, tokenizer: Any) -> Any:
    """Train from random weights, in fp32, on data with a common mistake: the base is right part of the time.

    Where the last digits carry, most of the answers shown forget the carry (47+38=75). The base learns to
    answer either way, which gives the reward something to choose between from the first step.
    """
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**MODEL), dtype=torch.float32)
    rate, decay = WARM_UP["learning_rate"], WARM_UP["weight_decay"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=WARM_UP["steps"])
    prompts, right = encode(problems, tokenizer)
    _, mistaken = encode([(prompt, without_carry(prompt, answer)) for prompt, answer in problems], tokenizer)
    for step in range(1, WARM_UP["steps"] + 1):
        batch = torch.randint(len(problems), (WARM_UP["batch_size"],))
        forgotten = torch.rand(len(batch), 1) < WARM_UP["carry_forgotten"]
        answers = torch.where(forgotten, mistaken[batch], right[batch])
        logits = model(torch.cat([prompts[batch], answers], dim=1)[:, :-1]).logits[:, prompts.shape[1] - 1 :]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), answers.flatten(), ignore_index=tokenizer.pad_token_id
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), WARM_UP["max_grad_norm"])
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"warm-up step {step}: loss {loss.item():.3f}", flush=True)
    return model


def search(run: str, problems: dict[str, Problems], tokenizer: Any, out: Path) -> dict[str, Any]:
    """Try every learning rate of a run, export the best by validation accuracy (the lowest, if equal)."""
    grid: list[dict[str, Any]] = []
    for rate in RATES[run]:
        started = time.monotonic()
        folder = Path(run, f"{rate:g}")
        train(run, rate, folder, problems["train"], tokenizer)
        model = load(folder / f"checkpoint-{STEPS}", torch.float32)
        export(model, tokenizer, folder / "bf16", torch.bfloat16, "200KB" if run == "rl-sgd" else "5GB")
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
        result = accuracy(folder / "bf16", problems["validation"], tokenizer)
        changed = measure(Path("out/base"), folder / "bf16")["changed"]
        row = {"learning_rate": rate, "finite_weights": finite, "changed": changed, "validation": result}
        grid.append(row)
        took = time.monotonic() - started
        print(f"{run}, rate {rate:g}: {result['accuracy']:.1%} of validation, {took:.0f} s", flush=True)
    usable = [row for row in grid if row["finite_weights"]]
    best = max(usable, key=lambda row: row["validation"]["correct"])
    winner = Path(run, f"{best['learning_rate']:g}")
    last = winner / f"checkpoint-{STEPS}"
    shutil.copytree(winner / "bf16", out / run)
    if run == "rl-adamw":
        export(load(last, torch.float32), tokenizer, out / f"{run}-fp32", torch.float32)
        shutil.copytree(winner / "series", out / "series" / run)
    if run != "rl-sgd":  # without momentum, SGD has no state worth publishing
        for checkpoint in (winner / f"checkpoint-{STEPS - 1}", last):
            shutil.copytree(checkpoint, out / "checkpoints" / run / checkpoint.name)
    return {
        "trainer": "trl.SFTTrainer" if run == "sft" else "trl.GRPOTrainer",
        "settings": SETTINGS[run],
        "learning_rate": best["learning_rate"],
        "grid": grid,
        "accuracy": {
            f"{split}_{when}": accuracy(out / name, problems[split], tokenizer)
            for split in ("validation", "test")
            for when, name in (("before", "base"), ("after", run))
        },
        "fp32_master_weights": measure(out / "base", last),
    }


def train(run: str, rate: float, folder: Path, problems: Problems, tokenizer: Any) -> None:
    """Continue from the bf16 base with fp32 master weights, which begin exactly at its values."""
    settings = {
        **SETTINGS[run],
        "output_dir": str(folder),
        "learning_rate": rate,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",  # the callback asks for the saves
        "logging_steps": 25,
        "report_to": "none",
        "disable_tqdm": True,
    }
    common = {"model": load(Path("out/base"), torch.float32), "processing_class": tokenizer}
    columns = {
        "prompt": [prompt for prompt, _ in problems],
        "completion" if run == "sft" else "answer": [answer for _, answer in problems],
    }
    common["train_dataset"] = datasets.Dataset.from_dict(columns)
    trainer: Any
    if run == "sft":
        trainer = SFTTrainer(args=SFTConfig(**settings), **common)
    else:
        trainer = GRPOTrainer(args=GRPOConfig(**settings), reward_funcs=right_answer, **common)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Saves(folder / "series" if run == "rl-adamw" else None))
    trainer.train()


def right_answer(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """The verifiable reward: 1 for exactly the right digits, else 0."""
    return [float(given == wanted) for given, wanted in zip(completions, answer, strict=True)]


def load(folder: Path, dtype: torch.dtype) -> Any:
    """A model from its folder."""
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)


def export(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, shard_size: str = "5GB") -> None:
    """A Hugging Face folder with the weights rounded to dtype, and the tokenizer."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def accuracy(folder: Path, problems: Problems, tokenizer: Any) -> dict[str, Any]:
    """Greedy exact-match accuracy of the weights as saved, computed in fp32."""
    model = load(folder, torch.float32).eval()
    prompts, answers = encode(problems, tokenizer)
    text = prompts
    for _ in range(ANSWER_TOKENS):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    # Whatever follows the end of sequence is not part of the answer.
    wrong = (text[:, prompts.shape[1] :] != answers) & (answers != tokenizer.pad_token_id)
    correct, count = int((~wrong.any(dim=1)).sum()), len(problems)
    error = math.sqrt(correct / count * (1 - correct / count) / count)
    return {"correct": correct, "problems": count, "accuracy": correct / count, "standard_error": error}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, sharded or not, as stored."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def measure(base: Path, other: Path) -> dict[str, Any]:
    """Exact counts of the weights whose values differ, in float64 and without any of paramdiff's code."""
    left, right = weights(base), weights(other)
    assert left.keys() == right.keys()
    rounded = 0
    counts: dict[str, Any] = {"numel": 0, "changed": 0, "above": dict.fromkeys(THRESHOLDS, 0)}
    for name, stored in right.items():
        a, b = left[name].double(), stored.double()
        counts["numel"] += b.numel()
        counts["changed"] += int((b != a).sum())
        rounded += int((stored.bfloat16().double() != a).sum())
        for label, threshold in THRESHOLDS.items():
            counts["above"][label] += int(((b - a).abs() > threshold).sum())
    if all(t.dtype == torch.float32 for t in right.values()):
        counts["changed_after_bf16_rounding"] = rounded
    return counts


def check(out: Path) -> dict[str, Any]:
    """Load what was written the way a user would, and hold it to what the README says of it."""
    for name in ("base", *SETTINGS, "rl-adamw-fp32"):
        tokenizer: Any = AutoTokenizer.from_pretrained(str(out / name))
        model: Any = AutoModelForCausalLM.from_pretrained(str(out / name))
        assert model.dtype == (torch.float32 if name.endswith("fp32") else torch.bfloat16)
        prompt = tokenizer("47+38=", return_tensors="pt")
        answer = model.generate(**prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        print(f"{name}: {tokenizer.decode(answer[0])}")
    rounded = [("rl-adamw-fp32", "rl-adamw"), (f"series/rl-adamw/step-{STEPS:04d}", "rl-adamw")]
    rounded += [(f"checkpoints/{run}/checkpoint-{STEPS}", run) for run in ("rl-adamw", "sft")]
    for wide, narrow in rounded:
        left, right = weights(out / wide), weights(out / narrow)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k].bfloat16(), right[k]) for k in left)
    assert len(list((out / "rl-sgd").glob("*.safetensors"))) >= 3
    errors = {run: moment_error(out / "checkpoints" / run) for run in ("rl-adamw", "sft")}
    return {"second_moment_max_relative_error": errors}


def moment_error(folder: Path) -> float:
    """How far v_N is from b2 v_(N-1) + (1 - b2) g^2, with g from m_N and m_(N-1); 0 but for rounding."""
    files = [folder / f"checkpoint-{step}" / "optimizer.pt" for step in (STEPS - 1, STEPS)]
    before, after = (torch.load(file, weights_only=True) for file in files)
    worst = 0.0
    for group in after["param_groups"]:
        b1, b2 = group["betas"]
        for i in group["params"]:
            old, new = before["state"][i], after["state"][i]
            assert (int(old["step"]), int(new["step"])) == (STEPS - 1, STEPS)
            gradient = (new["exp_avg"].double() - b1 * old["exp_avg"].double()) / (1 - b1)
            expected = b2 * old["exp_avg_sq"].double() + (1 - b2) * gradient**2
            v = new["exp_avg_sq"].double()
            worst = max(worst, float(((expected - v).abs()[v > 0] / v[v > 0]).max()))
    return worst


def publish(out: Path) -> None:
    """Refuse files that name this machine, then replace the published ones."""
    private = {platform.node(), str(Path.home()), str(HERE.parent), tempfile.gettempdir()}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        # A text of two or three letters turns up by chance among millions of random bytes.
        if found := [text for text in private if len(text) > 3 and text.encode() in file.read_bytes()]:
            raise RuntimeError(f"{file} names this machine: {found}")
        file.chmod(0o644)  # safetensors' own files are for their owner alone
    for made in out.iterdir():
        if (HERE / made.name).is_dir():
            shutil.rmtree(HERE / made.name)
        shutil.move(made, HERE / made.name)


def write_tables(facts: dict[str, Any]) -> None:
    """Replace the README's text between its two markers by the numbers of runs.json."""
    runs, measured = facts["runs"], facts["measured"]
    total = measured["sft"]["numel"]
    keys = dict.fromkeys(key for row in runs.values() for key in row["settings"])
    settings = [[key, *(str(row["settings"].get(key, "")) for row in runs.values())] for key in keys]
    results, tried = [], []
    for run, row in runs.items():
        results.append([run, f"{row['learning_rate']:g}", *map(share_and_error, row["accuracy"].values())])
        for line in row["grid"]:
            remark = "chosen" if line["learning_rate"] == row["learning_rate"] else ""
            remark = remark if line["finite_weights"] else "weights not finite"
            cells = [share_and_error(line["validation"]), f"{line['changed'] / total:.2%}", remark]
            tried.append([run, f"{line['learning_rate']:g}", *cells])
    masters = {f"{run}, fp32 master weights": row["fp32_master_weights"] for run, row in runs.items()}
    differing = []
    for name, counts in {**measured, **masters}.items():
        after = counts.get("changed_after_bf16_rounding", counts["changed"])
        cells = [f"{count:,} ({count / total:.3%})" for count in (counts["changed"], after)]
        differing.append([name, *cells, *(f"{1 - n / total:.3%}" for n in counts["above"].values())])
    held_out = runs["sft"]["accuracy"].items()
    split = [f"{key.replace('_', ' ')} (of {cell['problems']})" for key, cell in held_out]
    unchanged = [f"unchanged at {label}" for label in THRESHOLDS]
    ratio = measured["rl-adamw"]["changed"] / measured["rl-sgd"]["changed"]
    errors = facts["checks"]["second_moment_max_relative_error"].items()
    listed = ("task", "model", "warm_up", "versions")
    parts = [
        *(f"- {part}: " + ", ".join(f"{k} {v}" for k, v in facts[part].items()) for part in listed),
        "### Settings\n\n" + table(["setting", *runs], settings),
        "### Accuracy\n\n" + table(["run", "learning rate", *split], results),
        "### Every learning rate tried\n\n"
        + table(["run", "learning rate", "validation", "bf16 weights changed", ""], tried),
        f"### Weights that differ from base, of {total:,}\n\n"
        + table(["weights", "changed", "changed, rounded to bf16", *unchanged], differing),
        f"GRPO with AdamW changed {ratio:.2f} times as many bf16 weights as GRPO with plain SGD.",
        "Largest relative error of the second moments worked out from the save one step before: "
        + ", ".join(f"{run} {error:.1e}" for run, error in errors)
        + ".",
    ]
    readme = HERE / "README.md"
    head, rest = readme.read_text().split(TABLES_BEGIN)
    tail = rest.split(TABLES_END)[1]
    readme.write_text(head + "\n\n".join([TABLES_BEGIN, *parts, TABLES_END]) + tail)


def share_and_error(result: dict[str, Any]) -> str:
    """An accuracy with its standard error."""
    return f"{result['accuracy']:.1%} ± {result['standard_error']:.1%}"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [titles, ["---"] * len(titles), *rows])


class Saves(transformers.TrainerCallback):
    """Full checkpoints at the last two steps and, given a folder, weight-only bf16 saves along the way."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's own save_steps would write every checkpoint to get the last two."""
        if state.global_step >= STEPS - 1:
            control.should_save = True
        if self.folder is not None and state.global_step % SERIES_EVERY == 0:
            save = self.folder / f"step-{state.global_step:04d}"
            copy.deepcopy(kwargs["model"]).to(torch.bfloat16).save_pretrained(save)
            (save / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
