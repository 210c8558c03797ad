"""What every op means: shapes, dtypes, order of rounding. Backends implement these, nothing else.

An op is called with device arrays by position and parameters by keyword, and returns new arrays.
``T`` is the activation dtype, ``W = promote_types(T, float32)`` the dtype of sums. Unless an entry
says otherwise an op computes in W and rounds once, to T, at its end. Ids, slots, block tables and
lengths are int32. Zero tokens are legal everywhere. ``Weights`` stands for what the same device's
``prepare`` made of checkpoint tensors; every other operand is a plain device array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Op:
    """The meaning of one op.

    ``signature`` reads ``inputs -> outputs``, ``meaning`` says what a kernel may not change.
    Every OpSpec of the op carries its ``parameters`` and its ``dims``, by the names they have in
    the signature: sizes that are known before a batch is. ``out`` is the sum over the matrices.
    ``prepared`` ops take Weights; the result of an ``exact`` op is defined to the bit.
    """

    name: str
    signature: str
    meaning: str
    parameters: tuple[str, ...] = ()
    dims: tuple[str, ...] = ()
    prepared: bool = False
    exact: bool = False


_OPS = (
    Op(
        "embed",
        "ids (tokens,) int32, table Weights[vocab, hidden] -> (tokens, hidden) T",
        "Row ids[t] of the table. No scale.",
        prepared=True,
        exact=True,
        dims=("vocab", "hidden"),
    ),
    Op(
        "merge_rows",
        "x (tokens, hidden), rows (n, hidden), index (n,) int32 -> (tokens, hidden) T",
        "A copy of x whose row index[i] is rows[i]; index -1 is skipped.",
        exact=True,
        dims=("hidden",),
    ),
    Op(
        "rms_norm",
        "x (..., n), weight (n,) -> (..., n) T",
        "x / sqrt(mean(x²) + eps) in W, rounded to T, then times weight in T: two roundings.",
        ("eps",),
        dims=("n",),
    ),
    Op(
        "add",
        "x (tokens, hidden), y (tokens, hidden) -> (tokens, hidden) T",
        "x + y.",
        exact=True,
        dims=("hidden",),
    ),
    Op(
        "linear",
        "x (tokens, in), Weights[out, in] -> (tokens, out) out_dtype",
        "x·Wᵀ (+ bias); block FP8 is data · scale_inv in float32. With weights asked for as int8 "
        "every row of a matrix, and every row of x, which is finite, becomes codes with one "
        "float32 scale, as quantise rounds a run; the codes' products are summed as integers, the "
        "sum is multiplied by both scales in W. prepare takes one or several "
        "matrices, whose outputs stand side by side in the order given, and at most one bias. "
        "out_dtype (default T) is the dtype of the result: float32 for the router, whose logits "
        "are never rounded to T.",
        ("out_dtype",),
        prepared=True,
        dims=("in", "out"),
    ),
    Op(
        "rope",
        "x (tokens, heads, head_dim), positions (tokens,) int32 -> x's shape, T",
        "Rotates the halves [0:d/2], [d/2:d] of every head by position · theta^(-2i/d). Angles are "
        "float64; cosine and sine are rounded to T, the products and their sum are in W.",
        ("theta",),
        dims=("heads", "head_dim"),
    ),
    Op(
        "attention",
        "q (tokens, heads, head_dim), KVCache, batch -> (tokens, heads, head_dim) T",
        "softmax(scale · q·kᵀ)·v over the keys of the token's own sequence at its position and "
        "before. Query head h reads KV head h // (heads / kv_heads). Scores and sums are in W; the "
        "probabilities may be rounded to T before the product with v, with the scales of an FP8 or "
        "INT8 cache on them or not. Of such a cache keys and values are code · scale in float32, "
        "never rounded to T: it is written as quantise rounds, one run and one scale a token and "
        "KV head. Padded rows give zeros. "
        "Keys and values are finite: zero times infinity need not be zero.",
        ("scale",),
        dims=("heads", "kv_heads", "head_dim"),
    ),
    Op(
        "self_attention",
        "q, k, v (images, tokens, heads, head_dim) -> (images, tokens, heads, head_dim) T",
        "As attention, over all tokens of the same image, not causal.",
        ("scale",),
        dims=("heads", "head_dim"),
    ),
    Op(
        "swiglu",
        "gate_up (tokens, 2·inter) -> (tokens, inter) T",
        "silu(gate) · up in W; gate is the first half of the columns. silu(gate) may be rounded to "
        "T before the product.",
        dims=("inter",),
    ),
    Op(
        "route",
        "logits (tokens, experts) W -> weights (tokens, top_k) W, ids (tokens, top_k) int32",
        "Softmax over all experts, then the top_k largest probabilities, falling; of equal "
        "ones the lower expert first. Without renormalise the weights of a row sum to less than 1.",
        ("top_k", "renormalise"),
        dims=("experts",),
    ),
    Op(
        "experts",
        "u (tokens, hidden), weights (tokens, top_k) T, ids (tokens, top_k) int32, Weights[gate, "
        "up (experts, inter, hidden), down (experts, hidden, inter)] -> (tokens, hidden) T",
        "Σ_j weights[j] · down_j(silu(gate_j·u) · up_j·u). The products with gate, up and down are "
        "rounded to T as linear and swiglu do; the weighted sum is in W. Id -1 adds nothing. "
        "Weights asked for as int8 are multiplied as linear does.",
        prepared=True,
        dims=("experts", "top_k", "hidden", "inter"),
    ),
    Op(
        "cast",
        "x -> x's shape, dtype",
        "Rounds to nearest, ties to even, float64 by way of float32. To float32 or bfloat16: what "
        "needs a scale goes through quantise.",
        ("dtype",),
        exact=True,
    ),
    Op(
        "quantise",
        "x (tokens, n) -> q (tokens, n), scale (tokens, ceil(n / 128)) float32",
        "One scale per token and 128 columns: largest magnitude / the format's largest value "
        "(448 for float8_e4m3fn, 127 for int8), 1 where that is no normal float32; q = x / scale, "
        "rounded. x is finite.",
        ("dtype",),
        exact=True,
        dims=("n",),
    ),
    Op(
        "dequantise",
        "q (tokens, n), scale (tokens, ceil(n / 128)) float32 -> (tokens, n) dtype",
        "q · scale in float32, rounded to dtype.",
        ("dtype",),
        exact=True,
        dims=("n",),
    ),
    Op(
        "select_rows",
        "x (tokens, n), rows (k,) int32 -> (k, n) T",
        "Row rows[i] of x, a copy.",
        exact=True,
        dims=("n",),
    ),
    Op(
        "sample",
        "logits (rows, vocab) W, temperature (rows,), top_k (rows,) int32, top_p (rows,), "
        "uniform (rows,) -> ids (rows,) int32",
        "Temperature 0: the largest logit, of equal ones the lowest id. Otherwise softmax(logits / "
        "temperature), sorted falling (stable), cut to top_k (0: all) and to the shortest prefix "
        "whose sum reaches top_p; the first entry whose cumulative sum exceeds uniform · total, "
        "the last possible one for uniform 1. Sums are in float64. Id banned (-1: none) is never "
        "chosen.",
        ("banned",),
        dims=("vocab",),
    ),
    Op(
        "layer_norm",
        "x (..., n), weight (n,), bias (n,) -> (..., n) T",
        "(x - mean) / sqrt(var + eps) · weight + bias in W, rounded once.",
        ("eps",),
        dims=("n",),
    ),
    Op("quick_gelu", "x (..., n) -> x's shape, T", "x · sigmoid(1.702 x).", dims=("n",)),
    Op(
        "conv2d",
        "x (images, height, width, in), Weights[out, in, kernel, kernel] -> (images, h, w, out)",
        "Cross-correlation with bias, stride and zero padding alike on both axes; channels last.",
        ("stride", "padding"),
        prepared=True,
        dims=("in", "out", "kernel"),
    ),
    Op(
        "resize",
        "x (height, width, n) -> (size, size, n) W",
        "Bicubic (a = -0.5) with antialias and half-pixel centres, in W, not rounded to T.",
        ("size",),
        dims=("n",),
    ),
    Op(
        "concat",
        "arrays (k_i, n) -> (Σ k_i, n) T",
        "One after another, always a copy.",
        exact=True,
        dims=("n",),
    ),
)

OPS: Mapping[str, Op] = {op.name: op for op in _OPS}
"""Every op by name."""
