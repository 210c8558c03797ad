"""The device: tensors in NPU memory, and the kernels on one screen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
    Event,
    Kernel,
    KVCache,
    Memory,
    Reduce,
    Rendezvous,
    Stage,
    Weights,
)
from step3_hetero.backends.ascend import (
    attention,
    copies,
    decode,
    driver,
    limits,
    linear,
    moe,
    norm,
    rope,
    rows,
    sampling,
    vision,
)
from step3_hetero.backends.ascend.graphs import SPARE_BLOCKS, DecodeBatch, OnCard, graphed
from step3_hetero.backends.ascend.requantise import Requantised
from step3_hetero.backends.ascend.stages import AscendAttention, AscendFfn
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE, to_host, to_torch
from step3_hetero.backends.torch_common.batches import Recent
from step3_hetero.backends.torch_common.weights import dense
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


LARGE_BYTES = 2 * copies.PIECE_BYTES
"""Smaller arrays are copied in one go: there is nothing to overlap."""


class AscendDevice(Device):
    """One NPU. Kernels are queued; ``to_host`` and events wait.

    ``kv_split`` cuts the contexts of decoding sequences into parts of that many tokens; ``nz``
    holds matrices in the cube unit's own format; ``triton`` launches the decode kernel, which is
    used where it is given; ``graphs`` captures decode steps. ``manifest`` lists every tensor that
    was requantised on its way here.
    """

    kernels = KERNELS

    def __init__(
        self,
        info: DeviceInfo,
        index: int,
        *,
        kv_split: int = 0,
        nz: bool = False,
        triton: decode.Launch | None = None,
        graphs: bool = False,
    ) -> None:
        self.info = info
        self.index = index
        self.kv_split = kv_split
        self.nz = nz
        self.triton = triton
        self.graphs = graphs
        self.manifest: list[Requantised] = []
        driver.module().set_device(index)
        driver.exact_products()
        if nz:
            driver.allow_internal_formats()
        self._staging: copies.Staging | None = None
        self.device = torch.device("npu", index)
        self._batches = Recent(
            partial(attention.Batch, device=self.device, split_tokens=kv_split, triton=triton)
        )
        self._decoding: dict[int, dict[tuple[int, int], DecodeBatch]] = defaultdict(dict)
        self._capture = OnCard(self.device)

    def from_host(self, x: HostArray, dtype: str | None = None) -> Tensor:
        """Copy to the device, large arrays in pieces through pinned memory."""
        host = to_torch(x).to(TORCH_DTYPE[dtype or x.dtype.name])
        if host.nbytes < LARGE_BYTES:
            return host.to(self.device)
        out = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self.staging.copy_in(host, out)
        return out

    def to_host(self, x: Tensor) -> HostArray:
        """Wait and copy back, large arrays in pieces through pinned memory."""
        if x.nbytes < LARGE_BYTES:
            return to_host(x.cpu())
        host = torch.empty(x.shape, dtype=x.dtype)
        self.staging.copy_out(x.contiguous(), host)
        return to_host(host)

    @property
    def staging(self) -> copies.Staging:
        """Return the pinned buffers of large copies, made when the first one comes."""
        self._staging = self._staging or copies.Staging()
        return self._staging

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return an uninitialised tensor."""
        return torch.empty(shape, dtype=TORCH_DTYPE[dtype], device=self.device)

    def owns(self, x: Any) -> bool:
        """Say whether x is a tensor in this NPU's memory."""
        return isinstance(x, Tensor) and x.device == self.device

    def memory(self) -> Memory:
        """Return the NPU's memory."""
        free, total = driver.memory(self.index)
        return Memory(total, free)

    def prepare(self, op: str, tensors: Mapping[str, HostTensor], spec: OpSpec) -> Weights:
        """Write the tensors to the device for their op, requantised where they are FP8."""
        made: Mapping[str, Callable[..., Weights]] = {
            "conv2d": self._prepare_conv,
            "embed": partial(linear.prepare_table, device=self.device),
            "experts": partial(moe.prepare_experts, device=self.device, nz=self.nz),
            "linear": partial(linear.prepare_linear, device=self.device, nz=self.nz),
        }
        if op not in made:
            raise UnsupportedOp(f"ascend prepares {', '.join(sorted(made))}; asked for {op!r}")
        limits.weights(spec.weight_format, spec.dtype, op)
        weights = made[op](tensors, spec)
        entries = getattr(weights, "manifest", ())
        self.manifest += [e for e in entries if e.tensor.scale_inv is not None]
        return weights

    def _prepare_conv(self, tensors: Mapping[str, HostTensor], spec: OpSpec) -> vision.ConvWeights:
        kernel, bias = (
            dense(tensors[n], TORCH_DTYPE[spec.dtype]).to(self.device) if n in tensors else None
            for n in ("weight", "bias")
        )
        assert kernel is not None
        nbytes = kernel.nbytes + (0 if bias is None else bias.nbytes)
        return vision.ConvWeights(kernel, bias, tensors, spec.dtype, nbytes)

    def open_cache(self, spec: CacheSpec) -> attention.AscendCache:
        """Return a zeroed cache."""
        if self.triton:
            limits.decode_cache(spec.kv_heads, spec.head_dim, spec.dtype)
        spare = SPARE_BLOCKS if self.graphs else 0
        return attention.AscendCache(spec, self.device, spare)

    def batch(self, meta: BatchMeta) -> attention.Batch:
        """Return the batch as tensors, made once for all layers."""
        return self._batches.of(meta)

    def group(self, ranks: Sequence[int], rendezvous: Rendezvous) -> Collective:
        """Join a group over HCCL; cards of one node.

        Raises:
            UnsupportedOp: on the host stand-in, which has none.
        """
        if driver.stand_in():
            raise UnsupportedOp(
                f"{self.info.name}: the host stand-in has no HCCL, asked for ranks {list(ranks)}; "
                "use backend cpu, whose groups run over gloo"
            )
        from step3_hetero.backends.ascend.collective import hccl
        from step3_hetero.backends.torch_common.collective import join

        return join(ranks, rendezvous, hccl)

    def build(
        self,
        spec: StageSpec,
        weights: Mapping[str, Weights | Array],
        cache: KVCache | None,
        limits: Limits,
        reduce: Reduce | None = None,
    ) -> Stage:
        """Build fused attention and FFN stages; the others are composed."""
        stage: AscendAttention | AscendFfn
        if isinstance(spec, AttentionSpec) and isinstance(cache, attention.AscendCache):
            stage = AscendAttention(self, spec, weights, cache, reduce)
        elif isinstance(spec, FfnSpec):
            stage = AscendFfn(spec, weights)
        else:
            return compose(self, spec, weights, cache, limits, reduce)
        if self.graphs and not spec.batch_invariant and reduce is None:
            batches = self._decoding[limits.blocks_per_seq]  # their tables are as wide as that
            return graphed(stage, limits, batches, self._capture)
        return invariant(self, stage)

    def host_buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return pinned memory."""
        return copies.pinned(nbytes)

    def copy_in(self, host: HostArray, out: Tensor) -> Event:
        """Queue a copy to the device; pinned memory is read while the host goes on."""
        source = to_torch(host)
        out.copy_(source, non_blocking=True)
        return copies.NpuEvent(self.device, keep=source)

    def copy_out(self, x: Tensor, host: HostArray) -> Event:
        """Queue a copy to the host; at once where ``host`` is not one run of memory."""
        if not host.flags.c_contiguous:
            host[...] = self.to_host(x)
            return Done()
        target = to_torch(host)
        target.copy_(x, non_blocking=True)
        return copies.NpuEvent(self.device, keep=(x, target))
