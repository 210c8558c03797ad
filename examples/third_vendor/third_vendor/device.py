"""The device: the lender's memory, and a table of kernels with one of our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from step3_hetero.backend import Array, BatchMeta, Device, DeviceInfo, KVCache, Memory, Weights
from step3_hetero.specs import CacheSpec, HostArray, HostTensor, OpSpec
from third_vendor import UNCLAIMED, norm

OWN = {"rms_norm": norm.rms_norm}
"""Kernels that this package brings."""


class ThirdVendorDevice(Device):
    """Arrays, weights and caches are the lender's, so that its kernels can take them."""

    def __init__(self, info: DeviceInfo, lender: Device) -> None:
        self.info = info
        self.lender = lender
        lent = {op: kernel for op, kernel in lender.kernels.items() if op not in UNCLAIMED}
        self.kernels = {**lent, **OWN}

    def from_host(self, x: HostArray, dtype: str | None = None) -> Array:
        """Copy to the lender's memory."""
        return self.lender.from_host(x, dtype)

    def to_host(self, x: Array) -> HostArray:
        """Copy back."""
        return self.lender.to_host(x)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Return an array of any content."""
        return self.lender.empty(shape, dtype)

    def owns(self, x: Any) -> bool:
        """Say whether x lies in the lender's memory."""
        return self.lender.owns(x)

    def memory(self) -> Memory:
        """Return the lender's memory."""
        return self.lender.memory()

    def prepare(self, op: str, tensors: Mapping[str, HostTensor], spec: OpSpec) -> Weights:
        """Return weights in the form that the lender's kernels take."""
        return self.lender.prepare(op, tensors, spec)

    def open_cache(self, spec: CacheSpec) -> KVCache:
        """Return a cache that the lender's attention reads."""
        return self.lender.open_cache(spec)

    def batch(self, meta: BatchMeta) -> Any:
        """Return a batch as the lender's attention takes it."""
        return self.lender.batch(meta)
