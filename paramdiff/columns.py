"""What every column means: the one place where it is written down. Tables are built from it, and tests hold them to it.

Types are polars type names. `above[τ]` and `sparsity[τ]` exist once for each tolerance, with τ as Python writes the float
(`above[1e-05]`).
"""

from __future__ import annotations

IDENTITY = {
    "name": ("String", "parameter, without the prefixes of wrappers"),
    "layer": ("Int64", "number of the layer; null outside layers"),
    "module": ("String", "the part that holds the parameter: q_proj, gate_proj, experts.down_proj, …"),
    "kind": ("String", "embedding, attention, mlp, norm, head or other"),
    "expert": ("Int64", "number of the expert; null outside experts and for stacks of all experts"),
    "shape": ("List(Int64)", "shape that was compared: the common part where a vocabulary was resized"),
    "dtype_base": ("String", "stored element type of the base, as safetensors names it"),
    "dtype_tuned": ("String", "stored element type of the tuned side"),
    "stored_base": (
        "String",
        "format that the base's values are worked out from while they are read (fp8_block, nf4, lora)",
    ),
    "stored_tuned": ("String", "the same of the tuned side"),
    "compared_in": ("String", "arithmetic of the comparison: float32, float64 or int64"),
    "numel": ("Int64", "compared elements, n"),
    "pairing_rule": ("String", "how the two were found: same_name, or rules of docs/pairing.md joined by +"),
    "name_base": ("String", "name under which the base stores it"),
    "name_tuned": ("String", "name under which the tuned side stores it"),
    "duplicate_of": ("String", "the parameter that this one is tied to; such rows are left out of every total"),
}

CHANGE = {
    "changed": ("Int64", "elements whose value differs; ±0 are equal, NaN equals NaN"),
    "sparsity": ("Float64", "unchanged share, 1 − changed/n"),
    "changed_bits": ("Int64", "elements whose stored bit pattern differs; null where the stored types differ"),
    "sparsity_bits": ("Float64", "1 − changed_bits/n"),
    "changed_bf16": (
        "Int64",
        "elements whose value differs after both sides are rounded to bf16, ties to even (float64 by way of float32); "
        "of integers, which no export rounds, `changed`",
    ),
    "sparsity_bf16": ("Float64", "1 − changed_bf16/n; the probe of arXiv 2511.08567, Def. 2.1"),
    "above[τ]": (
        "Int64",
        "elements with |Δ| > τ, strictly, so never where Δ is NaN; Δ in float32 for 8- to 32-bit floats "
        "(with --compat: as the script counts)",
    ),
    "sparsity[τ]": ("Float64", "1 − above[τ]/n"),
    "sign_flips": ("Int64", "elements with base · tuned < 0"),
    "nonfinite_base": ("Int64", "NaN and infinite elements of the base"),
    "nonfinite_tuned": ("Int64", "NaN and infinite elements of the tuned side"),
}

MAGNITUDE = {
    "finite": ("Int64", "elements that are finite on both sides: those in the sums below"),
    "max_abs_delta": ("Float64", "largest |Δ|"),
    "l2_base": ("Float64", "Euclidean norm of the base"),
    "l2_tuned": ("Float64", "Euclidean norm of the tuned side"),
    "l2_delta": ("Float64", "Euclidean norm of Δ"),
    "rel_l2": ("Float64", "l2_delta / l2_base; null for a base of zeros"),
    "mean_abs_delta": ("Float64", "mean of |Δ|"),
    "mean_delta": ("Float64", "mean of Δ, signed"),
    "dot": ("Float64", "inner product of base and tuned"),
    "cosine": ("Float64", "dot / (l2_base · l2_tuned); null where a norm is zero or beyond float64"),
}

ROWS = {
    "rows": ("Int64", "rows of the matrix view; null for vectors and scalars"),
    "rows_touched": ("Int64", "rows with at least one changed element"),
    "top1pct_rows_share": ("Float64", "share of all changes that the 1 % of rows with most of them hold"),
    "cols": ("Int64", "columns of the matrix view"),
    "cols_touched": ("Int64", "columns with at least one changed element"),
    "top1pct_cols_share": ("Float64", "share of all changes that the 1 % of columns with most of them hold"),
}

RANKS = {
    "name": ("String", "parameter"),
    "layer": ("Int64", "number of the layer; null outside layers"),
    "module": ("String", "the part that holds the parameter"),
    "kind": ("String", "embedding, attention, mlp, norm, head or other"),
    "expert": ("Int64", "number of the expert, one row each where all are stored in one tensor; null outside experts"),
    "rows": ("Int64", "m, rows of the matrix (of a convolution: output channels)"),
    "cols": ("Int64", "n, columns"),
    "full_rank": ("Int64", "min(m, n); null where there is no spectrum"),
    "numeric_rank": (
        "Int64",
        "singular values above σ₁·max(m, n)·2⁻²³: `torch.linalg.matrix_rank` of a float32 Δ (arXiv 2505.11711, Table 2)",
    ),
    "numeric_rank_percent": ("Float64", "% of min(m, n)"),
    "rank_at_1e-2": ("Int64", "singular values above σ₁/100"),
    "rank_at_1e-3": ("Int64", "singular values above σ₁/1000"),
    "energy_rank_90": ("Int64", "smallest k whose k largest σ² hold 90 % of their sum"),
    "energy_rank_90_percent": ("Float64", "% of min(m, n)"),
    "energy_rank_95": ("Int64", "the same for 95 %"),
    "energy_rank_95_percent": ("Float64", "% of min(m, n)"),
    "energy_rank_99": ("Int64", "the same for 99 % (arXiv 2602.07729)"),
    "energy_rank_99_percent": ("Float64", "% of min(m, n)"),
    "stable_rank": ("Float64", "‖Δ‖_F²/σ₁²"),
    "entropy_rank": ("Float64", "exp(−Σ p log p), p = σ/Σσ (Roy & Vetterli 2007)"),
    "sigma_1": ("Float64", "largest singular value, the spectral norm of Δ"),
    "frobenius": ("Float64", "‖Δ‖_F, from the elements"),
    "top1_share": ("Float64", "σ₁/‖Δ‖_F: how far one direction dominates (arXiv 2510.00553); null for a zero update"),
    "energy_error": (
        "Float64",
        "|Σσ² − ‖Δ‖_F²|/‖Δ‖_F², a check, below 1e-5; null for a zero update and a sketch",
    ),
    "rank_uncertain": ("Boolean", "a σ lies within the arithmetic's error of the cut of numeric_rank; null for a sketch"),
    "resolution": (
        "Float64",
        "size below which a σ is as good as zero (of a sketch: each σ is this near to a true one)",
    ),
    "structural_rank": (
        "Int64",
        "bound on the rank by where the entries are; for method sparse, which a GPU does not use",
    ),
    "components": ("Int64", "connected parts into which the entries fall; known for method sparse"),
    "method": ("String", "how the spectrum was found: svd, gram, sparse or sketch; null where there is none"),
    "duplicate_of": ("String", "the parameter that this one is tied to; such rows are left out of roll-ups"),
    "note": ("String", "why there is no spectrum, or what went other than planned; else null"),
}

SUBSPACES = {
    "name": ("String", "parameter"),
    "layer": ("Int64", "number of the layer; null outside layers"),
    "module": ("String", "the part that holds the parameter"),
    "kind": ("String", "embedding, attention, mlp, norm, head or other"),
    "expert": ("Int64", "number of the expert, one row each where all are stored in one tensor; null outside experts"),
    "rows": ("Int64", "m, rows of the matrix"),
    "cols": ("Int64", "n, columns"),
    "k": ("Int64", "how many leading directions are compared"),
    "angle_u_max": (
        "Float64",
        "largest principal angle between the k leading left singular vectors of both sides, in degrees",
    ),
    "angle_u_mean": ("Float64", "mean of the k angles, in degrees"),
    "overlap_u": ("Float64", "mean of cos² of the k angles: 1 for the same subspace"),
    "chance_u": ("Float64", "overlap of two random subspaces, k/m"),
    "angle_v_max": ("Float64", "the same for right singular vectors"),
    "angle_v_mean": ("Float64", "the same for right singular vectors"),
    "overlap_v": ("Float64", "the same for right singular vectors"),
    "chance_v": ("Float64", "k/n"),
    "gap": ("Float64", "(σ_k − σ_k+1)/σ₁ of the base; angles mean little where it is small"),
    "nss": ("Float64", "spectrum drift ‖σ(W₊) − σ(W₀)‖₂/‖σ(W₀)‖₂ over all singular values (arXiv 2511.08567)"),
    "largest_sigma_shift": ("Float64", "largest |σ_i(W₊) − σ_i(W₀)|; at most ‖Δ‖₂ (Weyl)"),
    "sigma_shift_share": (
        "Float64",
        "‖σ(W₊) − σ(W₀)‖₂/‖Δ‖_F, at most 1 (Mirsky): how much of the update went into the spectrum",
    ),
    "changed_bf16": ("Int64", "elements that differ after rounding to bf16, |M|"),
    "alpha": ("Float64", "share of elements in each mask"),
    "principal_overlap": ("Float64", "|M ∩ principal|/|M|: top α of the rank-k part of |W₀|; null where nothing changed"),
    "low_overlap": ("Float64", "|M ∩ low|/|M|: bottom α of |W₀|, ties in proportion; null where nothing changed"),
    "chance": ("Float64", "overlap of an update that does not care, α"),
    "duplicate_of": ("String", "the parameter that this one is tied to; such rows are left out of roll-ups"),
    "note": ("String", "why there is nothing to compare; else null"),
}

ADAM = {
    "name": ("String", "parameter, as the weights name it; without them, as the state does, without prefixes of wrappers"),
    "side": ("String", "first or second checkpoint of the command"),
    "layer": ("Int64", "number of the layer; null outside layers"),
    "module": ("String", "the part that holds the parameter"),
    "kind": ("String", "embedding, attention, mlp, norm, head or other"),
    "expert": ("Int64", "number of the expert; null outside experts and for stacks of all experts"),
    "shape": ("List(Int64)", "shape; null where nothing says"),
    "numel": ("Int64", "elements, n"),
    "has_state": ("Boolean", "false: never stepped, frozen, or trained by plain SGD"),
    "optimizer": ("String", "AdamW, Adam, AMSGrad, SGD with momentum, RMSprop, …, by what is kept and the settings"),
    "dtype_m": ("String", "stored element type of the first moment m; bnb_8bit: worked out of bitsandbytes' codes"),
    "dtype_v": ("String", "the same of the second moment v"),
    "step_min": ("Int64", "fewest steps t that any part has taken"),
    "step_max": ("Int64", "most steps, used for bias correction"),
    "lr": ("Float64", "learning rate η in force at the save"),
    "lr_source": ("String", "where η was found"),
    "beta1": ("Float64", "β₁ (of SGD: momentum)"),
    "beta2": ("Float64", "β₂ (of RMSprop: alpha)"),
    "eps": ("Float64", "ε"),
    "weight_decay": ("Float64", "weight decay of the group"),
    "finite": ("Int64", "elements in the numbers below: moments finite, v not negative"),
    "nonfinite": ("Int64", "elements left out for that"),
    "v_mean": ("Float64", "mean of v"),
    "v_std": ("Float64", "population standard deviation of v over elements"),
    "sqrt_v_mean": ("Float64", "mean of √v"),
    "sqrt_v_std": ("Float64", "standard deviation of √v"),
    "vhat_mean": ("Float64", "mean of v̂ = v/(1 − β₂ᵗ)"),
    "vhat_std": ("Float64", "standard deviation of v̂"),
    "sqrt_vhat_mean": ("Float64", "mean of √v̂"),
    "sqrt_vhat_std": ("Float64", "standard deviation of √v̂"),
    "v_zero": ("Float64", "share of elements with v = 0"),
    "eff_lr_p1": ("Float64", "1st percentile of η/(√v̂ + ε), from a histogram whose bins are at most 1.6 % wide"),
    "eff_lr_p50": ("Float64", "median of it"),
    "eff_lr_p99": ("Float64", "99th percentile of it"),
    "log10_eff_lr_mean": ("Float64", "mean of log10 of the effective learning rate"),
    "log10_eff_lr_std": ("Float64", "standard deviation of it, in decades: how adaptive Adam is here"),
    "u_norm": ("Float64", "‖u‖, u = m̂/(√v̂ + ε); of SGD: u = m"),
    "mhat_norm": ("Float64", "‖m̂‖, m̂ = m/(1 − β₁ᵗ)"),
    "u_dot_mhat": ("Float64", "⟨u, m̂⟩"),
    "update_rms": ("Float64", "root mean square of η·u"),
    "update_max": ("Float64", "largest |η·u|"),
    "update_saturated": ("Float64", "share with |u| > 0.9, nearly a step by sign"),
    "update_small": ("Float64", "share with |u| < 0.1"),
    "adaptivity": ("Float64", "1 − cos(u, m̂): 0 where dividing by √v̂ only rescaled the step"),
    "equivalent_sgd_lr": ("Float64", "η·⟨u, m̂⟩/⟨m̂, m̂⟩: the rate of SGD whose step is nearest to Adam's"),
    "bf16_visible": ("Float64", "share of weights w with bf16(w − η·u) ≠ bf16(w), decoupled weight decay included"),
    "grad_norm": ("Float64", "‖g‖, g = (m₊ − β₁m)/(1 − β₁): the gradient as Adam saw it in the step between two saves"),
    "momentum_norm": ("Float64", "‖m‖ before that step"),
    "momentum_dot_grad": ("Float64", "⟨m, g⟩"),
    "momentum_grad_cosine": ("Float64", "cos(m, g): 1 where momentum points along the gradient (arXiv 2602.07729)"),
    "grad_check": ("Float64", "Σ|v₊ − β₂v − (1 − β₂)g²|/Σv₊, a check: rounding only"),
    "note": ("String", "what is not defined for this optimizer, and why; else null"),
}

ADAM_HISTOGRAMS = "histograms, from `paramdiff adam`"  # the same file name as those of a comparison

TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "tensors": {**IDENTITY, **CHANGE, **MAGNITUDE, **ROWS},
    "histograms": {
        "name": ("String", "parameter"),
        "histogram": ("String", "ulp, log2_abs_delta or log2_rel_delta (of |Δ|/|base|)"),
        "lower": ("Float64", "lower edge: distance in ulps, or exponent of two; included"),
        "upper": ("Float64", "upper edge: included for ulp, excluded for exponents; both +inf: left zero"),
        "count": ("Int64", "elements; Δ = 0 is in ulp 0 and in no exponent bin"),
    },
    "rows": {
        "name": ("String", "parameter"),
        "axis": ("String", "rows or cols"),
        "length": ("Int64", "how many rows (columns) there are"),
        "across": ("Int64", "elements in each"),
        "changed": ("List(UInt32)", "changed elements of each row (column), in order"),
    },
    "adam": ADAM,
    ADAM_HISTOGRAMS: {
        "name": ("String", "parameter"),
        "side": ("String", "first or second checkpoint"),
        "histogram": ("String", "log10_sqrt_vhat (of √v̂) or log10_eff_lr (of the effective learning rate)"),
        "lower": ("Float64", "log10 of the lower edge, included; −inf: zeros are in this bin"),
        "upper": ("Float64", "log10 of the upper edge, excluded; both +inf: infinite or beyond float32"),
        "count": ("Int64", "elements"),
    },
    "ranks": RANKS,
    "spectra": {
        "name": ("String", "parameter"),
        "expert": ("Int64", "number of the expert; null outside experts"),
        "index": ("Int64", "1 for the largest"),
        "sigma": ("Float64", "singular value of Δ, zeros included; see `resolution` of ranks.parquet"),
    },
    "subspaces": SUBSPACES,
    "angles": {
        "name": ("String", "parameter"),
        "expert": ("Int64", "number of the expert; null outside experts"),
        "k": ("Int64", "dimension of the two subspaces"),
        "side": ("String", "u: left singular vectors, of the rows; v: right, of the columns"),
        "index": ("Int64", "1 for the smallest"),
        "degrees": ("Float64", "principal angle"),
    },
    "weight_spectra": {
        "name": ("String", "parameter"),
        "expert": ("Int64", "number of the expert; null outside experts"),
        "index": ("Int64", "1 for the largest"),
        "sigma_base": ("Float64", "singular value of the base"),
        "sigma_tuned": ("Float64", "singular value of the tuned side"),
    },
    "coverage": {
        "name": ("String", "parameter"),
        "side": ("String", "base or tuned; of `paramdiff adam` first or second"),
        "reason": (
            "String",
            "only_base, only_tuned, shape_mismatch, resized, not_numeric or excluded; of `paramdiff adam` no_state, "
            "not_optimized, no_weights, not_measured, only_first, only_second or excluded",
        ),
        "detail": ("String", "the two shapes or types, the rows left over, or why"),
        "shape": ("List(Int64)", "stored shape"),
        "dtype": ("String", "stored element type"),
        "numel": ("Int64", "elements that were not compared"),
    },
}


def meaning(table: str, column: str) -> tuple[str, str]:
    """(type, meaning) of a column.

    >>> meaning("tensors", "above[1e-05]")[0]
    'Int64'
    """
    head, bracket, _ = column.partition("[")
    return TABLES[table][f"{head}[τ]" if bracket else column]


def markdown() -> str:
    """All tables as Markdown, for docs/columns.md."""
    lines = ["# What the columns mean", "", "Generated from `paramdiff/columns.py` by `make docs`.", ""]
    for table, columns in TABLES.items():
        file, comma, whence = table.partition(",")
        lines += [f"## {file}.parquet{comma}{whence}", "", "| column | type | meaning |", "|---|---|---|"]
        for name, (kind, text) in columns.items():
            escaped = text.replace("|", "\\|")
            lines.append(f"| `{name}` | {kind} | {escaped} |")
        lines.append("")
    return "\n".join(lines)
