"""The device: host memory, and the kernels on one screen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import wraps
from typing import Any

import numpy as np

from step3_hetero.backend import (
    BatchMeta,
    Device,
    DeviceInfo,
    Done,
    Dtypes,
    Event,
    Kernel,
    Memory,
    Weights,
)
from step3_hetero.backends.reference import (
    attention,
    linear,
    moe,
    norm,
    quant,
    rope,
    rows,
    sampling,
    vision,
)
from step3_hetero.backends.reference.arrays import Float, dtype_of, in_order
from step3_hetero.specs import CacheSpec, HostArray, HostTensor, OpSpec

KERNELS: Mapping[str, Kernel] = {
    "add": norm.add,
    "attention": attention.attention,
    "cast": quant.cast,
    "concat": rows.concat,
    "conv2d": vision.conv2d,
    "dequantise": quant.dequantise,
    "embed": linear.embed,
    "experts": moe.experts,
    "layer_norm": norm.layer_norm,
    "linear": linear.linear,
    "merge_rows": rows.merge_rows,
    "quantise": quant.quantise,
    "quick_gelu": vision.quick_gelu,
    "resize": vision.resize,
    "rms_norm": norm.rms_norm,
    "rope": rope.rope,
    "route": moe.route,
    "sample": sampling.sample,
    "select_rows": rows.select_rows,
    "self_attention": attention.self_attention,
    "swiglu": moe.swiglu,
}

DTYPES = Dtypes(
    stored=("float64", "float32", "bfloat16", "float8_e4m3fn"),
    computed=("float64", "float32", "bfloat16"),
    wire=("float64", "float32", "bfloat16", "float8_e4m3fn", "int8"),
)


def host_memory_bytes() -> int:
    """Return the machine's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def info() -> DeviceInfo:
    """Describe this machine's processor as NumPy uses it."""
    return DeviceInfo(
        "reference:0",
        "NumPy, the definition",
        host_memory_bytes(),
        DTYPES,
        batch_invariant=True,
        memory_domain="host",
    )


def _in_order(kernel: Kernel) -> Kernel:
    @wraps(kernel)
    def summed(*args: Any, **parameters: Any) -> Any:
        with in_order():
            return kernel(*args, **parameters)

    return summed


class ReferenceDevice(Device):
    """Arrays are NumPy arrays, every kernel runs at once.

    With ``summation`` in order, the terms of every sum are added one after the other.
    """

    def __init__(self, summation: str = "blocked") -> None:
        self.info = info()
        ordered = {name: _in_order(kernel) for name, kernel in KERNELS.items()}
        self.kernels = ordered if summation == "in-order" else KERNELS

    def from_host(self, x: HostArray, dtype: str | None = None) -> Float:
        """Copy, so that the caller's array and the device's are never one."""
        return np.array(x, dtype=dtype_of(dtype) if dtype else x.dtype)

    def to_host(self, x: Float) -> HostArray:
        """Copy back."""
        return np.array(x)

    def copy_in(self, host: HostArray, out: Float) -> Event:
        """Copy at once, and once."""
        out[...] = host
        return Done()

    def copy_out(self, x: Float, host: HostArray) -> Event:
        """Copy at once, and once."""
        host[...] = x
        return Done()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Float:
        """Return an uninitialised array."""
        return np.empty(shape, dtype_of(dtype))

    def owns(self, x: Any) -> bool:
        """Say whether x is a NumPy array."""
        return isinstance(x, np.ndarray)

    def memory(self) -> Memory:
        """Return the machine's memory."""
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return Memory(self.info.memory_bytes, free)

    def prepare(self, op: str, tensors: Mapping[str, HostTensor], spec: OpSpec) -> Weights:
        """Widen the tensors: a weight is exact in float32 whatever it is stored in."""
        dtype = str(spec.parameters.get("out_dtype", spec.dtype))
        return linear.widen_tensors(tensors, dtype, spec.weight_format)

    def open_cache(self, spec: CacheSpec) -> attention.ReferenceCache:
        """Return a zeroed cache."""
        return attention.ReferenceCache(spec)

    def batch(self, meta: BatchMeta) -> attention.Batch:
        """Return the host's batch as it is."""
        return attention.Batch(meta)
