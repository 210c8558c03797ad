"""Defects of a kernel as text replaced in its source, and the case that must find each.

None writes or reads out of its arrays: a defect that crashes is found by any case.
"""

from __future__ import annotations

from dataclasses import dataclass

from step3_hetero.conformance.case import Case

SMALL = {"heads": 8, "kv_heads": 1, "head_dim": 16}
ONE = {"queries": (1,), "contexts": (130,), "blocks": 3, "padding": 0}
PROMPT = {"queries": (9,), "contexts": (70,), "blocks": 3, "padding": 0}
LONG = {"queries": (1,), "contexts": (1100,), "blocks": 10, "padding": 0}
EXPERTS = {"tokens": 40, "experts": 5, "top_k": 2, "hidden": 32, "inter": 48}
FP8 = "float8_e4m3fn"


def attention(dims, kv="", **heads):
    """Return a case of attention; each sequence adds queries[s] tokens to reach contexts[s]."""
    return Case("attention", "float32", {**SMALL, **heads, **dims}, {"scale": 0.25}, kv=kv)


def rows(op, tokens, n, dtype="float32", draw="normal", **parameters):
    """Return a case of an op over rows."""
    columns = "inter" if op == "swiglu" else "n"
    return Case(op, dtype, {"tokens": tokens, columns: n}, parameters, draw)


def route(experts, top_k, draw="normal", *, renormalise=False):
    """Return a case of the router."""
    parameters = {"top_k": top_k, "renormalise": renormalise}
    return Case("route", "float32", {"tokens": 16, "experts": experts}, parameters, draw)


EXPERTS_FP8 = Case("experts", "float32", {"tokens": 9, "experts": 3, "top_k": 2, "hidden": 130,
                                          "inter": 140}, stored=FP8)  # fmt: skip
LINEAR_INT8 = Case("linear", "float32", {"tokens": 7, "in": 1100, "out": (70,)}, held="int8")
EXPERTS_INT8 = Case("experts", "float32", {"tokens": 9, "experts": 3, "top_k": 2, "hidden": 130,
                                           "inter": 140}, held="int8")  # fmt: skip
LINEAR_FP8 = Case("linear", "float32", {"tokens": 7, "in": 257, "out": (130,)}, stored=FP8)
CACHE = Case("kv_cache", "float32", {"tokens": 200, "blocks": 5, "kv_heads": 1, "head_dim": 24})
IMAGE = Case("self_attention", "float32", {"images": 2, "tokens": 20, "heads": 4, "head_dim": 16},
             {"scale": 0.25})  # fmt: skip
ROPE = Case("rope", "float32", {"tokens": 9, "heads": 3, "head_dim": 16, "last": 511},
            {"theta": 1e4})  # fmt: skip
MERGE = Case("merge_rows", "float32", {"tokens": 11, "rows": 11, "hidden": 40})
MIXED = Case("experts", "float32", EXPERTS, draw="one-expert")
NORM = rows("rms_norm", 7, 96, eps=1e-5)


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in kernels/``file``.py; ``case`` must fail of it."""

    name: str
    file: str
    old: str
    new: str
    case: Case

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


MUTANTS = (
    Mutant("a query sees the next key", "attention", "number[None, :] < seen[:, None]",
           "number[None, :] <= seen[:, None]", attention(PROMPT)),
    Mutant("sums are not rescaled", "attention", "folded(total * shrink[:, None]", "folded(total",
           attention(ONE)),
    Mutant("the next block is read", "attention", "first // PAGE)", "(first + 64) // PAGE)",
           attention(ONE)),
    Mutant("scores are not scaled", "attention", "scores = scores * scale", "scores = scores",
           attention(ONE)),
    Mutant("splits overlap by a key", "attention", "tl.minimum(low + share, last)",
           "tl.minimum(low + share + 1, last)", attention(LONG)),
    Mutant("sums of splits in another base", "attention", "top + tl.log(weight)",
           "top + tl.log2(weight)", attention(LONG)),
    Mutant("splits weigh alike", "attention", "share = exponential(known - safe, True)",
           "share = tl.where(known > -float('inf'), 1.0, 0.0)", attention(LONG)),
    Mutant("every head reads KV head 0", "attention", "* kv_heads + kv_head\n", "* kv_heads\n",
           attention(PROMPT, kv_heads=2)),
    Mutant("values have their keys' scales", "attention", "tl.load(value_scales + place",
           "tl.load(key_scales + place", attention(ONE, "int8")),
    Mutant("keys share a scale in pairs", "attention", "tl.load(key_scales + place",
           "tl.load(key_scales + place // 2 * 2", attention(PROMPT, FP8)),
    Mutant("scores are rounded to tf32", "attention", "scores = scores * scale",
           "scores = (scores.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)"
           " * scale", attention(PROMPT, "int8")),
    Mutant("log2(e) to five digits", "attention", "1.4426950408889634", "1.4427",
           attention(PROMPT, "int8")),
    Mutant("an image attends to what lies behind it", "attention",
           "scores = tl.where(there[None, :], scores, -float(\"inf\"))\n        p, top",
           "scores = scores\n        p, top", IMAGE),
    Mutant("mean over the padded width", "norm", "tl.sum(wide * wide, 1), n.to(tl.float32)",
           "tl.sum(wide * wide, 1), WIDTH * 1.0", NORM),
    Mutant("eps outside the root", "norm", "tl.sqrt_rn(mean_square + eps)",
           "(tl.sqrt_rn(mean_square) + eps)", rows("rms_norm", 9, 64, draw="minute", eps=1e-5)),
    Mutant("variance over the padded width", "norm", "tl.where(inside, wide - mean[:, None], 0.0)",
           "wide - mean[:, None]", rows("layer_norm", 17, 63, draw="offset", eps=1e-6)),
    Mutant("the bias is added before the weight", "norm", "unit * scale + shift",
           "(unit + shift) * scale", rows("layer_norm", 5, 64, eps=1e-6)),
    Mutant("rotation the other way", "rope", "wide_a * c - wide_b * s", "wide_a * c + wide_b * s",
           ROPE),
    Mutant("sines are those of half the pair", "rope", "sin + token * half + column",
           "sin + token * half + column // 2", ROPE),
    Mutant("slot 0 is never written", "rope", "inside = (column < half) & (slot >= 0)",
           "inside = (column < half) & (slot > 0)", Case("kv_cache", "float32", {
               "tokens": 640, "blocks": 5, "kv_heads": 1, "head_dim": 24})),
    Mutant("halves of a key change places", "rope",
           "tl.store(target, a.to(stored.dtype.element_ty)",
           "tl.store(target, b.to(stored.dtype.element_ty)", CACHE),
    Mutant("of equal experts the last wins", "moe",
           "best = tl.argmax(left, 1)\n        weight",
           "best = tl.argmax(left, 1, tie_break_left=False)\n        weight",
           route(48, 3, draw="ties")),
    Mutant("renormalised when not asked", "moe", "if RENORMALISE:", "if not RENORMALISE:",
           route(48, 3)),
    Mutant("padding takes part in the softmax", "moe", "other=-float(\"inf\"))\n    row",
           "other=0.0)\n    row", route(48, 3)),
    Mutant("one choice too few is normalised by", "moe", "chosen += tl.max(left, 1)",
           "chosen = tl.max(left, 1)", route(5, 5, renormalise=True)),
    Mutant("slots are swapped in pairs", "moe", "rows + placed + rank, slot,",
           "rows + placed + rank, slot ^ 1,", MIXED),
    Mutant("every expert has the first one's weight", "moe", "tl.load(weights + slot,",
           "tl.load(weights + token * TOP_K,", MIXED),
    Mutant("a slot reads another token", "gemm", "row // DIVISOR", "row % (m // DIVISOR)", MIXED),
    Mutant("the first scale for all columns", "gemm", "run = first // SCALE_BLOCK", "run = 0",
           LINEAR_FP8),
    Mutant("the first scale for all rows", "gemm", "* BLOCK_N // SCALE_BLOCK", "* BLOCK_N // 1024",
           LINEAR_FP8),
    Mutant("up is scaled as gate", "gemm", "up_scale + scale_row", "b_scale + scale_row",
           EXPERTS_FP8),
    Mutant("the end of a row is left out", "gemm", "tl.range(0, k, BLOCK_K)",
           "tl.range(0, k - BLOCK_K + 1, BLOCK_K)", LINEAR_FP8),
    Mutant("integers are not scaled by their row", "gemm", "result = total.to(tl.float32) * factor",
           "result = total.to(tl.float32)", LINEAR_INT8),
    Mutant("integers are not scaled by their column", "gemm",
           "result = total.to(tl.float32) * factor * scale",
           "result = total.to(tl.float32) * factor", LINEAR_INT8),
    Mutant("integers of all columns share a scale", "gemm", "at = expert * n + column",
           "at = expert * n + column * 0", LINEAR_INT8),
    Mutant("integers have the first expert's scales", "gemm", "at = expert * n + column",
           "at = column", EXPERTS_INT8),
    Mutant("integers of up are scaled as gate's", "gemm", "tl.load(up_scale + at",
           "tl.load(b_scale + at", EXPERTS_INT8),
    Mutant("the last columns alone give a row's scale", "rows",
           "largest = tl.maximum(largest, tl.max(tl.abs(values), 1))",
           "largest = tl.max(tl.abs(values), 1)", LINEAR_INT8),
    Mutant("a row's integers use half their range", "rows", "tl.div_rn(largest, 127.0)",
           "tl.div_rn(largest, 63.0)", LINEAR_INT8),
    Mutant("sigmoid for silu in the product", "gemm", "gate * tl.sigmoid(gate)", "tl.sigmoid(gate)",
           MIXED),
    Mutant("sigmoid for silu", "rows", "return g * tl.sigmoid(g)", "return tl.sigmoid(g)",
           rows("swiglu", 5, 80)),
    Mutant("row 1 is never merged", "rows", "(target >= 0)", "(target > 1)", MERGE),
    Mutant("the largest code is another format's", "rows", "448.0 if E4M3", "240.0 if E4M3",
           Case("quantise", "float32", {"tokens": 7, "n": 300}, {"dtype": FP8})),
    Mutant("scales of the next run", "rows", "scales + row * tl.cdiv(n, RUN) + tl.program_id(1)\n",
           "scales + row * tl.cdiv(n, RUN) + tl.program_id(1) * 0\n",
           Case("dequantise", "float32", {"tokens": 7, "n": 300}, {"dtype": "float32"},
                stored="int8")),
    Mutant("GELU's own factor", "rows", "1.702 * wide", "1.7 * wide", rows("quick_gelu", 5, 64)),
    Mutant("codes are cut off", "numbers", " + 0x7FFFF + ((size >> 20) & 1)", " ",
           Case("quantise", "float32", {"tokens": 7, "n": 300}, {"dtype": FP8})),
    Mutant("integers are cut off", "numbers", "(x + 12582912.0) - 12582912.0",
           "x.to(tl.int32).to(tl.float32)",
           Case("quantise", "float32", {"tokens": 7, "n": 300}, {"dtype": "int8"})),
    Mutant("subnormal codes are dropped", "numbers", "0x46800000", "0x46800000 + 1",
           Case("quantise", "float32", {"tokens": 7, "n": 300}, {"dtype": FP8})),
)  # fmt: skip
