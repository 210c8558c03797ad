"""Every case of the suite. Adding one is adding a line."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from step3_hetero.conformance.case import Sizes, op
from step3_hetero.conformance.forms import OpTrial
from step3_hetero.conformance.models import kept_experts
from step3_hetero.conformance.stages import StageCase
from step3_hetero.conformance.trial import Trial
from step3_hetero.conformance.whole_model import ModelCase

FP8 = "float8_e4m3fn"
WIRE = ("float8_e4m3fn", "int8")
INT8 = "int8"
FP32 = ("float32",)
REAL = f"step3-{kept_experts()}-experts"
DEEP: Sizes = {"heads": 64, "kv_heads": 1, "head_dim": 256}
SMALL: Sizes = {"heads": 8, "kv_heads": 1, "head_dim": 16}

NORMS = (
    *op("rms_norm", {"tokens": 7, "n": 96}, eps=1e-5),
    *op("rms_norm", {"tokens": 33, "n": 64}, eps=1e-5, draw="tiny"),
    *op("rms_norm", {"tokens": 9, "n": 64}, eps=1e-5, draw="minute"),
    *op("rms_norm", {"tokens": 9, "n": 64}, eps=1e-5, draw="huge"),
    *op("rms_norm", {"tokens": 16, "n": 65}, eps=1e-5, draw="spread"),
    *op("rms_norm", {"tokens": 6, "n": 64}, eps=1e-5, draw="zero-rows"),
    *op("rms_norm", {"tokens": 32, "n": 64}, eps=1e-5, draw="infinities"),
    *op("rms_norm", {"tokens": 0, "n": 64}, eps=1e-5),
    *op("rms_norm", {"tokens": 1, "n": 2048}, eps=1e-5),
    *op("rms_norm", {"tokens": 7, "n": 7168}, eps=1e-5),
    *op("rms_norm", {"tokens": 10000, "n": 96}, eps=1e-5),
    *op("layer_norm", {"tokens": 5, "n": 64}, eps=1e-6),
    *op("layer_norm", {"tokens": 33, "n": 64}, eps=1e-6, draw="tiny"),
    *op("layer_norm", {"tokens": 17, "n": 63}, eps=1e-6, draw="offset"),
    *op("layer_norm", {"tokens": 0, "n": 64}, eps=1e-6),
    *op("layer_norm", {"tokens": 173, "n": 1792}, eps=1e-6, full=True),
)

ROWS = (
    *op("add", {"tokens": 5, "hidden": 64}),
    *op("add", {"tokens": 0, "hidden": 64}),
    *op("add", {"tokens": 9, "hidden": 65}, draw="infinities"),
    *op("add", {"tokens": 64, "hidden": 7168}),
    *op("add", {"tokens": 9, "hidden": 64}, draw="overflowing"),
    *op("cast", {"tokens": 16, "n": 96}, dtype="bfloat16"),
    *op("cast", {"tokens": 16, "n": 96}, dtype="bfloat16", draw="halfway", dtypes=FP32),
    *op("cast", {"tokens": 16, "n": 96}, dtype="bfloat16", draw="overflowing", dtypes=FP32),
    *op("cast", {"tokens": 16, "n": 96}, dtype="float32", dtypes=("bfloat16",)),
    *op("cast", {"tokens": 16, "n": 96}, dtype="bfloat16", draw="infinities", dtypes=FP32),
    *op("cast", {"tokens": 0, "n": 96}, dtype="bfloat16", dtypes=FP32),
    *op("concat", {"rows": (3, 0, 5), "n": 40}),
    *op("concat", {"rows": (1,), "n": 40}),
    *op("embed", {"tokens": 9, "vocab": 67, "hidden": 40}),
    *op("embed", {"tokens": 0, "vocab": 67, "hidden": 40}),
    *op("embed", {"tokens": 64, "vocab": 4096, "hidden": 7168}, full=True),
    *op("merge_rows", {"tokens": 11, "rows": 6, "hidden": 40}),
    *op("merge_rows", {"tokens": 11, "rows": 0, "hidden": 40}),
    *op("merge_rows", {"tokens": 600, "rows": 169, "hidden": 7168}, full=True),
    *op("select_rows", {"tokens": 11, "rows": 6, "n": 40}),
    *op("select_rows", {"tokens": 11, "rows": 0, "n": 40}),
)

QUANTISATION = (
    *(c for w in WIRE for c in op("quantise", {"tokens": 7, "n": 300}, dtype=w)),
    *(c for w in WIRE for c in op("quantise", {"tokens": 7, "n": 300}, dtype=w, draw="zero-rows")),
    *(c for w in WIRE for c in op("quantise", {"tokens": 7, "n": 300}, dtype=w, draw="spread")),
    *(c for w in WIRE for c in op("quantise", {"tokens": 5, "n": 128}, dtype=w, draw="halfway")),
    *(c for w in WIRE for c in op("quantise", {"tokens": 0, "n": 256}, dtype=w)),
    *(c for w in WIRE for c in op("quantise", {"tokens": 40, "n": 256}, dtype=w, draw="extremes")),
    *(c for w in WIRE for c in op("quantise", {"tokens": 64, "n": 7168}, dtype=w)),
    *(c for w in WIRE for d in ("float32", "bfloat16")
      for c in op("dequantise", {"tokens": 7, "n": 300}, dtype=d, stored=w, dtypes=FP32)),
)  # fmt: skip

LINEAR = (
    *op("linear", {"tokens": 1, "in": 96, "out": (40, 8)}),
    *op("linear", {"tokens": 17, "in": 96, "out": (40,)}, draw="biased"),
    *op("linear", {"tokens": 0, "in": 96, "out": (40,)}),
    *op("linear", {"tokens": 33, "in": 95, "out": (39,)}),
    *op("linear", {"tokens": 9, "in": 96, "out": (40,)}, draw="overflow"),
    *op("linear", {"tokens": 9, "in": 96, "out": (40,)}, held="bfloat16", dtypes=FP32),
    *op("linear", {"tokens": 5, "in": 96, "out": (6,)}, out_dtype="float32"),
    *op("linear", {"tokens": 7, "in": 257, "out": (130,)}, stored=FP8),
    *op("linear", {"tokens": 7, "in": 128, "out": (128,)}, stored=FP8),
    *op("linear", {"tokens": 3, "in": 200, "out": (129, 127)}, stored=FP8),
    *op("linear", {"tokens": 16, "in": 64, "out": (64,)}, draw="spread"),
    *op("linear", {"tokens": 8, "in": 7168, "out": (2048, 256, 256)}, full=True),
    *op("linear", {"tokens": 128, "in": 1024, "out": (256,)}),
    *op("linear", {"tokens": 8, "in": 2048, "out": (16384,)}, full=True),
    *op("linear", {"tokens": 8, "in": 16384, "out": (7168,)}, full=True),
    *op("linear", {"tokens": 3, "in": 7168, "out": (18432, 18432)}, full=True),
    *op("linear", {"tokens": 64, "in": 7168, "out": (48,)}, out_dtype="float32"),
    *op("linear", {"tokens": 8, "in": 7168, "out": (2048, 256, 256)}, stored=FP8, full=True),
    *op("linear", {"tokens": 1, "in": 32768, "out": (64,)}),
    *op("linear", {"tokens": 173, "in": 1792, "out": (5376,)}, draw="biased", full=True),
    *op("linear", {"tokens": 1, "in": 96, "out": (40, 8)}, held=INT8),
    *op("linear", {"tokens": 0, "in": 96, "out": (40,)}, held=INT8),
    *op("linear", {"tokens": 33, "in": 95, "out": (39,)}, held=INT8),
    *op("linear", {"tokens": 17, "in": 96, "out": (40,)}, held=INT8, draw="biased"),
    *op("linear", {"tokens": 16, "in": 64, "out": (64,)}, held=INT8, draw="spread"),
    *op("linear", {"tokens": 6, "in": 64, "out": (40,)}, held=INT8, draw="zero-rows"),
    *op("linear", {"tokens": 3, "in": 200, "out": (129, 127)}, held=INT8, stored=FP8),
    *op("linear", {"tokens": 5, "in": 7168, "out": (256,)}, held=INT8),
    *op("linear", {"tokens": 8, "in": 2048, "out": (16384,)}, held=INT8, full=True),
)

ACTIVATION = (
    *op("swiglu", {"tokens": 5, "inter": 80}),
    *op("swiglu", {"tokens": 9, "inter": 80}, draw="large"),
    *op("swiglu", {"tokens": 9, "inter": 80}, draw="tiny"),
    *op("swiglu", {"tokens": 0, "inter": 80}),
    *op("swiglu", {"tokens": 16, "inter": 18432}),
    *op("quick_gelu", {"tokens": 5, "n": 64}),
    *op("quick_gelu", {"tokens": 9, "n": 64}, draw="large"),
    *op("quick_gelu", {"tokens": 173, "n": 15360}, full=True),
)

ROPE = (
    *op("rope", {"tokens": 9, "heads": 3, "head_dim": 16, "last": 511}, theta=1e4),
    *op("rope", {"tokens": 33, "heads": 2, "head_dim": 24, "last": 65535}, theta=5e5),
    *op("rope", {"tokens": 0, "heads": 3, "head_dim": 16, "last": 1}, theta=5e5),
    *op("rope", {"tokens": 16, "heads": 64, "head_dim": 256, "last": 65535}, theta=5e5),
    *op("rope", {"tokens": 64, "heads": 1, "head_dim": 256, "last": 65535}, theta=5e5),
)

RAGGED: Sizes = {"queries": (40, 1, 1, 7), "contexts": (40, 300, 17, 200), "blocks": 12}
DECODE: Sizes = {"queries": (1, 1, 1), "contexts": (5, 128, 129), "blocks": 8}

ATTENTION = (
    *op("attention", {**SMALL, "queries": (1,), "contexts": (1,), "blocks": 2, "padding": 0},
        scale=0.25),
    *op("attention", {**SMALL, **DECODE, "padding": 0}, scale=0.25),
    *op("attention", {**SMALL, **RAGGED, "padding": 0}, scale=0.25),
    *op("attention", {**SMALL, **RAGGED, "padding": 4}, scale=0.25),
    *op("attention", {**SMALL, **RAGGED, "padding": 0}, scale=0.25, draw="large"),
    *op("attention", {**SMALL, **DECODE, "padding": 0}, scale=0.25, draw="focused"),
    *op("attention", {**SMALL, "queries": (), "contexts": (), "blocks": 2, "padding": 2},
        scale=0.25),
    *op("attention", {**SMALL, "queries": (), "contexts": (), "blocks": 2, "padding": 0},
        scale=0.25),
    *op("attention", {"heads": 8, "kv_heads": 2, "head_dim": 24, **RAGGED, "padding": 1},
        scale=0.2),
    *op("attention", {"heads": 4, "kv_heads": 4, "head_dim": 16, **RAGGED, "padding": 0},
        scale=0.25),
    *op("attention", {**DEEP, "queries": (1, 1, 5), "contexts": (128, 700, 261), "blocks": 12,
                      "padding": 1}, scale=0.0625),
    *op("attention", {**DEEP, "queries": (1,) * 16, "contexts": tuple(range(64, 1088, 64)),
                      "blocks": 80, "padding": 0}, scale=0.0625, full=True),
    *op("attention", {**DEEP, "queries": (192,), "contexts": (320,), "blocks": 4, "padding": 0},
        scale=0.0625, full=True),
    *op("attention", {**SMALL, "queries": (1,), "contexts": (65536,), "blocks": 512, "padding": 0},
        scale=0.25, draw="focused"),
    *op("attention", {**DEEP, "queries": (1, 2), "contexts": (65536, 129), "blocks": 516,
                      "padding": 0}, scale=0.0625, full=True),
    *op("self_attention", {"images": 2, "tokens": 20, "heads": 4, "head_dim": 16}, scale=0.25),
    *op("self_attention", {"images": 1, "tokens": 1, "heads": 2, "head_dim": 8}, scale=0.25),
    *op("self_attention", {"images": 1, "tokens": 173, "heads": 16, "head_dim": 112},
        scale=112**-0.5, full=True),
    *op("kv_cache", {"tokens": 200, "blocks": 5, "kv_heads": 1, "head_dim": 24}),
    *op("kv_cache", {"tokens": 0, "blocks": 4, "kv_heads": 2, "head_dim": 16}),
    *op("kv_cache", {"tokens": 64, "blocks": 9, "kv_heads": 1, "head_dim": 256}),
)  # fmt: skip

NARROW_CACHE = (
    *op("kv_cache", {"tokens": 64, "blocks": 4, "kv_heads": 2, "head_dim": 24}, kv="bfloat16",
        dtypes=FP32),
    *(c for w in WIRE for c in (
        *op("kv_cache", {"tokens": 200, "blocks": 5, "kv_heads": 2, "head_dim": 24}, kv=w),
        *op("kv_cache", {"tokens": 64, "blocks": 4, "kv_heads": 1, "head_dim": 256}, kv=w,
            draw="spread"),
        *op("kv_cache", {"tokens": 0, "blocks": 4, "kv_heads": 2, "head_dim": 16}, kv=w),
        *op("attention", {**SMALL, **DECODE, "padding": 0}, scale=0.25, kv=w),
        *op("attention", {**SMALL, "queries": (192,), "contexts": (320,), "blocks": 4,
                          "padding": 0}, scale=0.25, kv=w),
        *op("attention", {"heads": 8, "kv_heads": 2, "head_dim": 24, **RAGGED, "padding": 1},
            scale=0.2, kv=w),
        *op("attention", {**SMALL, **RAGGED, "padding": 0}, scale=0.25, kv=w, draw="focused"),
        # In float32 two scores of hundreds that nearly tie may both be off: one does not bound it.
        *op("attention", {**SMALL, **RAGGED, "padding": 0}, scale=0.25, kv=w, draw="large",
            dtypes=("bfloat16",)),
        *op("attention", {**DEEP, "queries": (1, 1, 5), "contexts": (128, 700, 261), "blocks": 12,
                          "padding": 1}, scale=0.0625, kv=w),
    )),
)  # fmt: skip

ROUTING = (
    *op("route", {"tokens": 64, "experts": 48}, top_k=3, renormalise=False, dtypes=FP32),
    *op("route", {"tokens": 64, "experts": 48}, top_k=3, renormalise=True, dtypes=FP32),
    *op("route", {"tokens": 16, "experts": 48}, top_k=3, renormalise=False, dtypes=FP32,
        draw="ties"),
    *op("route", {"tokens": 16, "experts": 48}, top_k=3, renormalise=False, dtypes=FP32,
        draw="underflow"),
    *op("route", {"tokens": 16, "experts": 48}, top_k=3, renormalise=False, dtypes=FP32,
        draw="offset"),
    *op("route", {"tokens": 0, "experts": 48}, top_k=3, renormalise=False, dtypes=FP32),
    *op("route", {"tokens": 1, "experts": 5}, top_k=5, renormalise=True, dtypes=FP32),
    *op("sample", {"rows": 40, "vocab": 67}, banned=3, dtypes=FP32),
    *op("sample", {"rows": 20, "vocab": 67}, banned=-1, dtypes=FP32, draw="ties"),
    *op("sample", {"rows": 0, "vocab": 67}, banned=-1, dtypes=FP32),
    *op("sample", {"rows": 20, "vocab": 128815}, banned=128001, dtypes=FP32),
)  # fmt: skip

EXPERTS = (
    *op("experts", {"tokens": 9, "experts": 5, "top_k": 3, "hidden": 32, "inter": 80}, held=INT8),
    *op("experts", {"tokens": 1, "experts": 5, "top_k": 3, "hidden": 32, "inter": 80}, held=INT8),
    *op("experts", {"tokens": 0, "experts": 5, "top_k": 3, "hidden": 32, "inter": 80}, held=INT8),
    *op("experts", {"tokens": 5, "experts": 4, "top_k": 2, "hidden": 128, "inter": 130},
        held=INT8, stored=FP8),
    *op("experts", {"tokens": 9, "experts": 5, "top_k": 3, "hidden": 32, "inter": 80}),
    *op("experts", {"tokens": 1, "experts": 5, "top_k": 3, "hidden": 32, "inter": 80}),
    *op("experts", {"tokens": 0, "experts": 5, "top_k": 3, "hidden": 32, "inter": 80}),
    *op("experts", {"tokens": 33, "experts": 48, "top_k": 3, "hidden": 40, "inter": 24}),
    *op("experts", {"tokens": 40, "experts": 5, "top_k": 2, "hidden": 32, "inter": 48},
        draw="one-expert"),
    *op("experts", {"tokens": 9, "experts": 5, "top_k": 2, "hidden": 32, "inter": 48},
        draw="one-expert-only"),
    *op("experts", {"tokens": 9, "experts": 5, "top_k": 2, "hidden": 32, "inter": 48},
        held="bfloat16", dtypes=FP32),
    *op("experts", {"tokens": 9, "experts": 3, "top_k": 2, "hidden": 130, "inter": 140},
        stored=FP8),
    *op("experts", {"tokens": 6, "experts": kept_experts(), "top_k": 3, "hidden": 7168,
                    "inter": 5120}, full=True, dtypes=("bfloat16",)),
)  # fmt: skip

VISION = (
    *op("conv2d", {"images": 2, "height": 8, "width": 9, "in": 6, "out": 10, "kernel": 2},
        stride=2, padding=0),
    *op("conv2d", {"images": 1, "height": 9, "width": 10, "in": 6, "out": 4, "kernel": 3},
        stride=2, padding=1),
    *op("conv2d", {"images": 1, "height": 56, "width": 57, "in": 3, "out": 1792, "kernel": 14},
        stride=14, padding=0, full=True),
    *op("resize", {"side": 8, "n": 48}, size=5),
    *op("resize", {"side": 8, "n": 48}, size=11),
    *op("resize", {"side": 52, "n": 96}, size=36, full=True),
)  # fmt: skip

OPS_CASES = (*NORMS, *ROWS, *QUANTISATION, *LINEAR, *ACTIVATION, *ROPE, *ATTENTION, *ROUTING,
             *EXPERTS, *VISION, *NARROW_CACHE)  # fmt: skip

MIXED: Mapping[str, Any] = {"queries": (6, 1, 1), "contexts": (106, 129, 1)}
BOTH = ("float32", "bfloat16")

STAGE_CASES = (
    *(StageCase(kind, d, "odd", layer, **MIXED)
      for kind in ("attention", "ffn", "layer") for layer in (0, 1) for d in BOTH),
    *(StageCase(kind, d, "odd", 1, (1,), (1,)) for kind in ("attention", "ffn") for d in BOTH),
    *(StageCase(kind, d, "odd", 1, (), ()) for kind in ("attention", "ffn") for d in BOTH),
    *(StageCase(kind, d, "odd", 1, **MIXED, stored=FP8)
      for kind in ("attention", "ffn") for d in BOTH),
    *(StageCase(kind, d, "odd", 1, **MIXED, kv=w)
      for kind in ("attention", "layer") for w in WIRE for d in BOTH),
    *(StageCase("attention", d, "odd", 1, q, c, kv=w)
      for q, c in (((1, 1), (128, 40)), ((1, 1, 1, 1), (128, 40, 129, 5)), ((40,), (168,)))
      for w in WIRE for d in BOTH),
    StageCase("attention", "float32", "odd", 1, **MIXED, kv="bfloat16"),
    *(StageCase(kind, d, "odd", **MIXED)
      for kind in ("embed", "head") for d in BOTH),
    *(StageCase("vision", d, "odd", images=2, side=side) for side in (24, 16) for d in BOTH),
    *(StageCase("attention", d, REAL, 1, (1, 1, 3), (1, 300, 129), full=True) for d in BOTH),
    StageCase("ffn", "bfloat16", REAL, 0, (1, 3), (1, 3), full=True),
    StageCase("ffn", "bfloat16", REAL, 1, (1, 3), (1, 3), full=True),
)  # fmt: skip

MODEL_CASES = (
    *(ModelCase(d, 4) for d in BOTH),
    *(ModelCase(d, 40, full=True) for d in BOTH),
)


@cache
def trials() -> dict[str, Trial | ModelCase]:
    """Return every case by its id, ready to be run."""
    cases: list[Trial | ModelCase] = [OpTrial(c) for c in OPS_CASES]
    cases += [*STAGE_CASES, *MODEL_CASES]
    found = {c.id: c for c in cases}
    assert len(found) == len(cases), "two cases share an id"
    return found
