"""Which ops the kernels here take, and why not: asked before anything is opened."""

from __future__ import annotations

from step3_hetero.backend import DeviceInfo
from step3_hetero.ops import OPS
from step3_hetero.specs import INT8_OPS, OpSpec

ACTIVATIONS = ("float32", "bfloat16")
WEIGHT_FORMATS = ("auto", "float32", "bfloat16")
KV_FORMATS = (*ACTIVATIONS, "float8_e4m3fn", "int8")

LARGEST_ROW = 32768
"""Columns of a row that one program normalises: what its registers hold."""

LARGEST_HEAD = 256
MOST_HEADS = 64
LONGEST_SUM = (2**31 - 1) // 127**2
"""Columns of a matrix in INT8: more products of codes do not fit into an int32."""

MOST_EXPERTS = 1024
MOST_CHOSEN = 64


def refused(info: DeviceInfo, spec: OpSpec) -> str | None:
    """Return why an op cannot run, naming what was asked and what there is; None if it can."""
    if spec.op not in OPS:
        return f"no kernel for {spec.op!r}"
    if spec.dtype not in ACTIVATIONS:
        return f"no arithmetic in {spec.dtype}; computes in {', '.join(ACTIVATIONS)}"
    formats = (*WEIGHT_FORMATS, "int8") if spec.op in INT8_OPS else WEIGHT_FORMATS
    if spec.weight_format not in (None, *formats):
        allowed = ", ".join(formats)
        return f"weights of {spec.op} cannot be held as {spec.weight_format}; allowed: {allowed}"
    caches = [f for f in KV_FORMATS if (spec.dtype, f) != ("bfloat16", "float32")]
    if spec.kv_format not in (None, *caches):
        return f"no KV cache in {spec.kv_format} for {spec.dtype}; allowed: {', '.join(caches)}"
    if spec.op in ("attention", "self_attention", "rope"):
        return _heads_refused(spec)
    return _sizes_refused(spec)


def _heads_refused(spec: OpSpec) -> str | None:
    head_dim = spec.dims.get("head_dim", 16)
    if spec.op == "rope":
        return f"head_dim {head_dim} is odd; RoPE turns halves" if head_dim % 2 else None
    if head_dim % 8 or not 0 < head_dim <= LARGEST_HEAD:
        return f"head_dim {head_dim}; allowed: multiples of 8 up to {LARGEST_HEAD}"
    heads, kv_heads = spec.dims.get("heads", 1), spec.dims.get("kv_heads", 1)
    if min(heads, kv_heads) < 1:
        return f"{heads} query heads on {kv_heads} KV heads; allowed: 1 and more"
    if spec.op == "self_attention" or "heads" not in spec.dims:
        return None
    if heads % kv_heads:
        return f"{heads} query heads do not divide over {kv_heads} KV heads"
    if heads // kv_heads > MOST_HEADS:
        return f"{heads // kv_heads} query heads on one KV head; allowed: up to {MOST_HEADS}"
    return None


def _sizes_refused(spec: OpSpec) -> str | None:
    rows = {"rms_norm": ("n", "hidden"), "layer_norm": ("n", "width")}
    for name in rows.get(spec.op, ()):
        if spec.dims.get(name, 0) > LARGEST_ROW:
            return f"rows of {spec.dims[name]}; a program normalises up to {LARGEST_ROW} columns"
    if spec.op in ("route", "experts"):
        experts = spec.dims.get("experts", 1)
        top_k = int(spec.parameters.get("top_k", spec.dims.get("top_k", 1)))
        if experts > MOST_EXPERTS:
            return f"{experts} experts; allowed: up to {MOST_EXPERTS}"
        if not 1 <= top_k <= min(MOST_CHOSEN, experts):
            return f"top_k {top_k} of {experts} experts; allowed: 1 to {min(MOST_CHOSEN, experts)}"
    if spec.weight_format == "int8":
        columns = max(spec.dims.get(name, 0) for name in ("in", "hidden", "inter"))
        if columns > LONGEST_SUM:
            return f"INT8 matrices of {columns} columns; sums in int32 allow up to {LONGEST_SUM}"
    return None
