"""Which ops a 910B can be asked for: the limits of the operators each kernel will call.

Pure: neither torch nor a device is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from step3_hetero.backends.ascend import limits
from step3_hetero.ops import OPS
from step3_hetero.specs import OpSpec


def check(spec: OpSpec) -> None:
    """Refuse an op that a kernel here would refuse.

    Raises:
        LimitExceeded: with the limit's name, value, source and what to change.
    """
    if spec.op not in OPS:
        raise limits.LimitExceeded("op", spec.op, "those of ops.py", "this backend", "name another")
    limits.computed(spec.dtype)
    limits.weights(spec.weight_format, spec.dtype, spec.op)
    if spec.op in _CHECKS:
        _CHECKS[spec.op](spec)


def _attention(spec: OpSpec) -> None:
    kv_heads = spec.dims.get("kv_heads", 1)
    heads = spec.dims.get("heads", kv_heads)
    limits.kv_format(spec.kv_format, spec.dtype)
    if spec.dtype != "bfloat16":  # composed of plain products, which have no such limits
        return
    limits.query_heads(heads)
    limits.head_ratio(heads, kv_heads)
    kv = spec.kv_format or spec.dtype
    size = limits.padded_head_dim(spec.dims.get("head_dim", limits.FRACTAL), kv)
    limits.head_dim(size, kv)
    if kv_heads > 1:
        limits.flat_cache(kv_heads, size)


def _self_attention(spec: OpSpec) -> None:
    if spec.dtype == "bfloat16":
        limits.query_heads(spec.dims.get("heads", 1))
        limits.head_dim(limits.padded_head_dim(spec.dims.get("head_dim", limits.FRACTAL)))


def _rope(spec: OpSpec) -> None:
    limits.rotary(spec.dims.get("head_dim", 2), spec.dims.get("heads", 1))
    limits.positions(spec.dims.get("last", 0))


def _route(spec: OpSpec) -> None:
    limits.router(spec.dims.get("experts", 3), int(spec.parameters.get("top_k", 1)))


def _experts(spec: OpSpec) -> None:
    dims = spec.dims
    limits.routing(dims.get("experts", 2) + 1)
    limits.groups(dims.get("experts", 2), "int64")
    limits.unpermuted(dims.get("top_k", 1))
    width = max(dims.get("hidden", 1), 2 * dims.get("inter", 1))
    limits.inner_axis("npu_grouped_matmul", width)


def _linear(spec: OpSpec) -> None:
    if spec.weight_format == "int8":
        width = max(spec.dims.get("in", 1), spec.dims.get("out", 1))
        limits.inner_axis("npu_quant_matmul", width)


def _quantise(spec: OpSpec) -> None:
    limits.wire(spec.parameters.get("dtype", "int8"))


_CHECKS: Mapping[str, Callable[[OpSpec], None]] = MappingProxyType({
    "attention": _attention,
    "experts": _experts,
    "linear": _linear,
    "quantise": _quantise,
    "rope": _rope,
    "route": _route,
    "self_attention": _self_attention,
})  # fmt: skip
