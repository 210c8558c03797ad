"""The device: torch tensors in host memory, and the kernels on one screen."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from step3_hetero.backend import (
    Array,
    BatchMeta,
    Collective,
    Device,
    DeviceInfo,
    Kernel,
    KVCache,
    Memory,
    Reduce,
    Rendezvous,
    Stage,
    Weights,
)
from step3_hetero.backends.cpu import attention, linear, moe, norm, rope, rows, sampling, vision
from step3_hetero.backends.cpu.stages import CpuAttention, CpuFfn
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE, to_host, to_torch
from step3_hetero.composed import compose, invariant
from step3_hetero.errors import UnsupportedOp
from step3_hetero.specs import (
    AttentionSpec,
    CacheSpec,
    FfnSpec,
    HostArray,
    HostTensor,
    Limits,
    OpSpec,
    StageSpec,
)

KERNELS: Mapping[str, Kernel] = {
    "add": norm.add,
    "attention": attention.attention,
    "cast": rows.cast,
    "concat": rows.concat,
    "conv2d": vision.conv2d,
    "dequantise": rows.dequantise,
    "embed": linear.embed,
    "experts": moe.experts,
    "layer_norm": norm.layer_norm,
    "linear": linear.linear,
    "merge_rows": rows.merge_rows,
    "quantise": rows.quantise,
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

PREPARE: Mapping[str, Callable[[Mapping[str, HostTensor], OpSpec], Weights]] = {
    "conv2d": vision.prepare_conv,
    "embed": linear.prepare_table,
    "experts": moe.prepare_experts,
    "linear": linear.prepare_linear,
}


def _return_freed_memory() -> None:
    """Give back to the system what loading freed; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class CpuDevice(Device):
    """Every kernel runs at once, on all cores."""

    kernels = KERNELS

    def __init__(self, info: DeviceInfo, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.info = info
        self._batch: attention.Batch | None = None

    def from_host(self, x: HostArray, dtype: str | None = None) -> Tensor:
        """Copy, so that the caller's array and the device's are never one."""
        return to_torch(x).to(TORCH_DTYPE[dtype or x.dtype.name], copy=True)

    def to_host(self, x: Tensor) -> HostArray:
        """Copy back."""
        return to_host(x.clone())

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return an uninitialised tensor."""
        return torch.empty(shape, dtype=TORCH_DTYPE[dtype])

    def owns(self, x: Any) -> bool:
        """Say whether x is a tensor in host memory."""
        return isinstance(x, Tensor) and x.device.type == "cpu"

    def memory(self) -> Memory:
        """Return the machine's memory."""
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return Memory(self.info.memory_bytes, free)

    def prepare(self, op: str, tensors: Mapping[str, HostTensor], spec: OpSpec) -> Weights:
        """Pack, cast or dequantise the tensors for their op."""
        if op not in PREPARE:
            raise UnsupportedOp(f"cpu prepares {', '.join(sorted(PREPARE))}; asked for {op!r}")
        return PREPARE[op](tensors, spec)

    def open_cache(self, spec: CacheSpec) -> attention.CpuCache:
        """Return a zeroed cache."""
        return attention.CpuCache(spec)

    def batch(self, meta: BatchMeta) -> attention.Batch:
        """Return the batch as tensors, made once for all layers."""
        if self._batch is None or self._batch.meta is not meta:
            self._batch = attention.Batch(meta)
        return self._batch

    def group(self, ranks: Sequence[int], rendezvous: Rendezvous) -> Collective:
        """Join a group over gloo."""
        from step3_hetero.backends.torch_common.collective import join

        return join(ranks, rendezvous)

    def build(
        self,
        spec: StageSpec,
        weights: Mapping[str, Weights | Array],
        cache: KVCache | None,
        limits: Limits,
        reduce: Reduce | None = None,
    ) -> Stage:
        """Build fused attention and FFN stages; the others are composed."""
        _return_freed_memory()
        if isinstance(spec, AttentionSpec) and isinstance(cache, attention.CpuCache):
            return invariant(self, CpuAttention(self, spec, weights, cache, reduce))
        if isinstance(spec, FfnSpec):
            return invariant(self, CpuFfn(spec, weights))
        return compose(self, spec, weights, cache, limits, reduce)
