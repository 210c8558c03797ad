"""The device: torch tensors on a card, or on the host where it is interpreted; the kernels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from step3_hetero.backend import (
    Array,
    BatchMeta,
    Device,
    DeviceInfo,
    Done,
    Dtypes,
    Event,
    Kernel,
    KVCache,
    Memory,
    Stage,
    Weights,
)
from step3_hetero.backends.cuda import attention, linear, moe, norm, rope, rows, sampling, vision
from step3_hetero.backends.cuda.cards import FP8_ARCH, STORED, WIRE, computed, described
from step3_hetero.backends.cuda.copies import CopyEvent, memory_for, pinned
from step3_hetero.backends.cuda.graphs import DecodeBatch, GraphedStage
from step3_hetero.backends.cuda.stages import CudaAttention, CudaFfn
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE, to_host, to_torch
from step3_hetero.composed import compose, invariant
from step3_hetero.errors import ConfigError, UnsupportedOp
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


def found_cards() -> Sequence[DeviceInfo]:
    """Describe every card that torch sees."""
    return [_info(index) for index in range(torch.cuda.device_count())]


def _info(index: int) -> DeviceInfo:
    card = torch.cuda.get_device_properties(index)
    arch = 10 * card.major + card.minor
    return DeviceInfo(
        f"cuda:{index}",
        described(card.name, arch),
        card.total_memory,
        Dtypes(STORED, computed(arch), WIRE),
        driver=f"CUDA {torch.version.cuda}",
    )


def _interpreted_info(arch: int) -> DeviceInfo:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceInfo(
        "cuda:0",
        f"sm_{arch} in Triton's interpreter, on the host",
        memory,
        Dtypes(STORED, computed(arch), WIRE),
        batch_invariant=True,
        memory_domain="host",
        tier="interpreted",
    )


def open_device(index: int, options: Mapping[str, Any]) -> CudaDevice:
    """Open a card, or the host where ``options`` say so.

    Raises:
        ConfigError: FP8 activations on a card without FP8 arithmetic.
    """
    interpreted = options["interpret"]
    info = _interpreted_info(options["arch"]) if interpreted else _info(index)
    place = torch.device("cpu") if interpreted else torch.device("cuda", index)
    return CudaDevice(info, place, options)


class CudaDevice(Device):
    """Kernels run in the order of the current stream; nothing here waits but ``to_host``."""

    kernels = KERNELS

    def __init__(self, info: DeviceInfo, place: torch.device, options: Mapping[str, Any]) -> None:
        self.info = info
        self.place = place
        self.options = options
        self.arch = _arch(place) if place.type == "cuda" else options["arch"]
        if options["graphs"] and place.type != "cuda":
            raise ConfigError("backend 'cuda', option graphs: needs a card, not the interpreter")
        if options["fp8_activations"] and self.arch < FP8_ARCH:
            raise ConfigError(
                f"backend 'cuda', option fp8_activations: refused on {info.description}; "
                "leave it out"
            )
        if place.type == "cuda":
            _keep_precision()
        self._batch: attention.Batch | None = None
        self._decoding: dict[int, DecodeBatch] = {}

    def from_host(self, x: HostArray, dtype: str | None = None) -> Tensor:
        """Copy, so that the caller's array and the device's are never one."""
        target = TORCH_DTYPE[dtype or x.dtype.name]
        return to_torch(x).to(self.place, target, copy=True)

    def to_host(self, x: Tensor) -> HostArray:
        """Copy back, once everything before it is done."""
        return to_host(x.cpu() if x.is_cuda else x.clone())

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return an uninitialised tensor."""
        return torch.empty(shape, dtype=TORCH_DTYPE[dtype], device=self.place)

    def owns(self, x: Any) -> bool:
        """Say whether x is a tensor in this device's memory."""
        return isinstance(x, Tensor) and x.device == self.place

    def memory(self) -> Memory:
        """Return the card's memory, or the machine's where the card is interpreted."""
        if self.place.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.place)
            return Memory(total, free)
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return Memory(self.info.memory_bytes, free)

    def prepare(self, op: str, tensors: Mapping[str, HostTensor], spec: OpSpec) -> Weights:
        """Cast, dequantise or keep the tensors as their op wants them."""
        with memory_for(f"weights {', '.join(t.name for t in tensors.values())}", self.place):
            return self._prepare(op, tensors, spec)

    def _prepare(self, op: str, tensors: Mapping[str, HostTensor], spec: OpSpec) -> Weights:
        if op == "conv2d":
            return vision.prepare_conv(tensors, spec, self.place)
        if op == "embed":
            return linear.prepare_table(tensors, spec, self.place)
        if op == "linear":
            return linear.prepare_linear(tensors, spec, self.place, self.arch)
        if op == "experts":
            quantised = self.options["fp8_activations"]
            return moe.prepare_experts(tensors, spec, self.place, self.arch, quantised)
        raise UnsupportedOp(f"cuda prepares conv2d, embed, experts, linear; asked for {op!r}")

    def open_cache(self, spec: CacheSpec) -> attention.CudaCache:
        """Return a zeroed cache."""
        checked = self.options["check_indices"]
        with memory_for(f"a KV cache of {spec.nbytes:,} bytes ({spec})", self.place):
            return attention.CudaCache(spec, self.place, self.arch, checked=checked)

    def batch(self, meta: BatchMeta) -> attention.Batch:
        """Return the batch as tensors, made once for all layers."""
        if self._batch is None or self._batch.meta is not meta:
            self._batch = attention.Batch(meta, self.place)
        return self._batch

    def build(
        self,
        spec: StageSpec,
        weights: Mapping[str, Weights | Array],
        cache: KVCache | None,
        limits: Limits,
    ) -> Stage:
        """Build fused attention and FFN stages; the others are composed."""
        stage: Stage
        if isinstance(spec, AttentionSpec) and isinstance(cache, attention.CudaCache):
            stage = CudaAttention(self, spec, weights, cache)
        elif isinstance(spec, FfnSpec):
            stage = CudaFfn(spec, weights)
        else:
            return compose(self, spec, weights, cache, limits)
        if self.options["graphs"] and not spec.batch_invariant:
            return GraphedStage(stage, limits, self.place, self._decoding)
        return invariant(self, stage)

    def host_buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return pinned memory, from which copies neither wait nor pass through another buffer."""
        return pinned(nbytes, self.place)

    def copy_in(self, host: HostArray, out: Tensor) -> Event:
        """Start copying ``host`` into ``out``; the event ends with the copy."""
        source = to_torch(host)
        out.copy_(source.view(out.dtype) if source.dtype != out.dtype else source,
                  non_blocking=True)  # fmt: skip
        return CopyEvent(self.place, keep=source) if out.is_cuda else Done()

    def copy_out(self, x: Tensor, host: HostArray) -> Event:
        """Start copying ``x`` into ``host``; wait for the event before reading it."""
        target = to_torch(host)
        target.copy_(x, non_blocking=True)
        return CopyEvent(self.place, keep=x) if x.is_cuda else Done()


def _arch(place: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(place)
    return 10 * major + minor


def _keep_precision() -> None:
    """Keep torch from rounding where the ops do not: TF32 products and bfloat16 partial sums."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False
