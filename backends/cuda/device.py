"""The device: torch tensors on a card, or on the host where it is interpreted; the kernels."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from step3_hetero.backend import (
    Array,
    BatchMeta,
    Collective,
    Device,
    DeviceInfo,
    Done,
    Dtypes,
    Event,
    Kernel,
    KVCache,
    Memory,
    Reduce,
    Rendezvous,
    Stage,
    Weights,
)
from step3_hetero.backends.cuda import attention, linear, moe, norm, rope, rows, sampling, vision
from step3_hetero.backends.cuda.cards import (
    FP8_ARCH,
    OLDEST_ARCH,
    STORED,
    WIRE,
    computed,
    described,
)
from step3_hetero.backends.cuda.copies import Copies, pinned
from step3_hetero.backends.cuda.graphs import CudaGraphedStage, DecodeBatch, OnCard
from step3_hetero.backends.cuda.memory import Watched, memory_for, stage_name
from step3_hetero.backends.cuda.stages import CudaAttention, CudaFfn
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE, to_host, to_torch
from step3_hetero.backends.torch_common.batches import Recent
from step3_hetero.composed import PerRow, compose, invariant
from step3_hetero.errors import ConfigError, PlacementError, UnsupportedOp
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
        PlacementError: the card is older than the kernels.
    """
    interpreted = options["interpret"]
    if not interpreted:
        _refuse_older(torch.device("cuda", index))
    info = _interpreted_info(options["arch"]) if interpreted else _info(index)
    place = torch.device("cpu") if interpreted else torch.device("cuda", index)
    return CudaDevice(info, place, options)


def _refuse_older(place: torch.device) -> None:
    arch = _arch(place)
    if arch < OLDEST_ARCH:
        raise PlacementError(
            f"{place} is an {torch.cuda.get_device_name(place)}, compute capability "
            f"{arch // 10}.{arch % 10}: no bfloat16 tensor cores; the kernels need "
            f"{OLDEST_ARCH // 10}.{OLDEST_ARCH % 10} (A800, A100) or newer"
        )


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
        self.copies = Copies(place)
        self._prepared = "no stage yet"
        self._batches = Recent(partial(attention.Batch, device=place))
        self._decoding: dict[int, dict[int, DecodeBatch]] = defaultdict(dict)
        self._capture = OnCard(place)

    def from_host(self, x: HostArray, dtype: str | None = None) -> Tensor:
        """Copy, so that the caller's array and the device's are never one."""
        target = TORCH_DTYPE[dtype or x.dtype.name]
        with memory_for(lambda: f"an array {x.shape} in {dtype or x.dtype.name}", self.place):
            if self.place.type == "cuda":
                return self.copies.placed(to_torch(x), target)
            return to_torch(x).to(target, copy=True)

    def to_host(self, x: Tensor) -> HostArray:
        """Copy back, once everything before it is done."""
        return to_host(self.copies.fetched(x) if x.is_cuda else x.clone())

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
        self._prepared = ", ".join(t.name for t in tensors.values())
        with memory_for(f"weights {self._prepared}", self.place):
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
        """Return a zeroed cache. Its stage's weights are prepared before it: they say which."""
        checked = self.options["check_indices"]
        what = f"a KV cache of {spec.nbytes:,} bytes ({spec}) after the weights {self._prepared}"
        with memory_for(what, self.place):
            return attention.CudaCache(spec, self.place, self.arch, checked=checked)

    def batch(self, meta: BatchMeta) -> attention.Batch:
        """Return the batch as tensors, made once for all layers."""
        return self._batches.of(meta)

    def build(
        self,
        spec: StageSpec,
        weights: Mapping[str, Weights | Array],
        cache: KVCache | None,
        limits: Limits,
        reduce: Reduce | None = None,
    ) -> Stage:
        """Build fused attention and FFN stages; the others are composed."""
        stage = self._build(spec, weights, cache, limits, reduce)
        if isinstance(stage, PerRow):  # only the interpreter claims invariance: no card's memory
            return stage
        return invariant(self, Watched(stage, stage_name(spec.kind, weights), self.place))

    def _build(
        self,
        spec: StageSpec,
        weights: Mapping[str, Weights | Array],
        cache: KVCache | None,
        limits: Limits,
        reduce: Reduce | None = None,
    ) -> Stage:
        stage: Stage
        if isinstance(spec, AttentionSpec) and isinstance(cache, attention.CudaCache):
            stage = CudaAttention(self, spec, weights, cache, reduce)
        elif isinstance(spec, FfnSpec):
            stage = CudaFfn(spec, weights)
        else:
            return compose(self, spec, weights, cache, limits, reduce)
        if self.options["graphs"] and not spec.batch_invariant and reduce is None:
            batches = self._decoding[limits.blocks_per_seq]  # their tables are as wide as that
            return CudaGraphedStage(stage, limits, self.place, batches, self._capture)
        return stage

    def group(self, ranks: Sequence[int], rendezvous: Rendezvous) -> Collective:
        """Join a group over NCCL, never run on hardware; interpreted, over gloo.

        Raises:
            UnsupportedOp: torch is built without NCCL.
        """
        from step3_hetero.backends.torch_common import collective

        if self.place.type != "cuda":
            return collective.join(ranks, rendezvous)
        if not torch.distributed.is_nccl_available():
            raise UnsupportedOp(
                f"torch {torch.__version__} is built without NCCL: no group of ranks {list(ranks)}"
            )
        with torch.cuda.device(self.place):
            return collective.join(ranks, rendezvous, collective.nccl)

    def host_buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return pinned memory, from which copies neither wait nor pass through another buffer."""
        return pinned(nbytes, self.place)

    def copy_in(self, host: HostArray, out: Tensor) -> Event:
        """Start copying ``host`` into ``out``; see ``Copies.inward``."""
        source = to_torch(host)
        source = source.view(out.dtype) if source.dtype != out.dtype else source
        if self.place.type == "cuda":
            return self.copies.inward(source, out)
        out.copy_(source)
        return Done()

    def copy_out(self, x: Tensor, host: HostArray) -> Event:
        """Start copying ``x`` into ``host``; see ``Copies.outward``."""
        target = to_torch(host)
        if self.place.type == "cuda":
            return self.copies.outward(x, target)
        target.copy_(x)
        return Done()


def _arch(place: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(place)
    return 10 * major + minor


def _keep_precision() -> None:
    """Keep torch from rounding where the ops do not: TF32 products and bfloat16 partial sums."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False
