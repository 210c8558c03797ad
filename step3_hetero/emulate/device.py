"""A host device in a card's place: it computes as the host does, and refuses what the card does."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from functools import wraps
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from step3_hetero.backend import (
    Array,
    BatchMeta,
    Collective,
    Device,
    Event,
    Kernel,
    KVCache,
    Memory,
    Reduce,
    Rendezvous,
    Stage,
    Weights,
)
from step3_hetero.emulate.card import FP8, EmulatedCard
from step3_hetero.emulate.copies import Lane, nothing
from step3_hetero.errors import PlacementError, UnsupportedOp
from step3_hetero.specs import (
    CacheSpec,
    HostArray,
    HostTensor,
    Limits,
    OpSpec,
    StageSpec,
    weight_bytes,
)

Made = TypeVar("Made", Weights, KVCache)


class EmulatedDevice(Device):
    """Wraps a host device. Weights and caches count in the card's formats, not in the host's.

    Activations are not counted, nor are norm scales: the planner's margin is for those.
    """

    def __init__(self, inner: Device, card: EmulatedCard) -> None:
        self.inner = inner
        self.card = card
        self.info = card.info(inner.info)
        moved = {*card.dtypes.computed, *card.dtypes.stored, *card.dtypes.wire}
        checked = {"cast": moved, "quantise": card.dtypes.wire}
        self.kernels = {
            op: _checked(op, kernel, checked[op], card.name) if op in checked else kernel
            for op, kernel in inner.kernels.items()
        }
        self._held_bytes = 0
        self._lock = Lock()
        rate = card.asked.copy_bytes_per_s
        self._inward: Lane | None = None if rate is None else Lane(rate)
        self._outward: Lane | None = None if rate is None else Lane(rate)

    def from_host(self, x: HostArray, dtype: str | None = None) -> Array:
        """Copy as the host does; FP8 only where the card has it."""
        self._check_held(dtype or x.dtype.name)
        if self._inward is not None:
            self._inward.start(x.nbytes, nothing).wait()
        return self.inner.from_host(x, dtype)

    def to_host(self, x: Array) -> HostArray:
        """See Device.to_host."""
        host = self.inner.to_host(x)
        if self._outward is not None:
            self._outward.start(host.nbytes, nothing).wait()
        return host

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """See Device.empty; FP8 only where the card has it."""
        self._check_held(dtype)
        return self.inner.empty(shape, dtype)

    def owns(self, x: Any) -> bool:
        """See Device.owns; the host's memory is the card's."""
        return self.inner.owns(x)

    def memory(self) -> Memory:
        """Return the card's memory, and what weights and caches have left of it."""
        total = self.card.memory_bytes
        return Memory(total, max(0, total - self._held_bytes))

    def prepare(self, op: str, tensors: Mapping[str, HostTensor], spec: OpSpec) -> Weights:
        """Prepare on the host what has room on the card.

        Raises:
            UnsupportedOp: the card cannot compute with weights in this format.
            PlacementError: it has less memory left than they take.
        """
        if reason := self.card.refuses(spec):
            raise UnsupportedOp(f"{self.info.name}: {spec}: {reason}")
        names = sorted({t.name for t in tensors.values()})
        nbytes = _bytes_of(tensors, spec)
        self._take(nbytes, f"weights ({names[0]}{' …' if len(names) > 1 else ''})")
        return self._counted(self.inner.prepare(op, tensors, spec), nbytes)

    def open_cache(self, spec: CacheSpec) -> KVCache:
        """Open on the host a cache that has room on the card. Raises as ``prepare``."""
        if spec.dtype not in self.card.dtypes.stored:
            raise UnsupportedOp(f"{self.info.name} has no KV cache in {spec.dtype}")
        self._take(spec.nbytes, f"a KV cache of {spec.blocks} blocks")
        return self._counted(self.inner.open_cache(spec), spec.nbytes)

    def batch(self, meta: BatchMeta) -> Any:
        """See Device.batch."""
        return self.inner.batch(meta)

    def build(
        self,
        spec: StageSpec,
        weights: Mapping[str, Weights | Array],
        cache: KVCache | None,
        limits: Limits,
        reduce: Reduce | None = None,
    ) -> Stage:
        """Build the host's stage, slowed if so asked."""
        stage = self.inner.build(spec, weights, cache, limits, reduce)
        return SlowStage(stage, self.card.asked.slow) if self.card.asked.slow > 1 else stage

    def host_buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """See Device.host_buffer."""
        return self.inner.host_buffer(nbytes)

    def copy_in(self, host: HostArray, out: Array) -> Event:
        """See Device.copy_in."""
        if self._inward is None:
            return self.inner.copy_in(host, out)
        event = self._inward.start(host.nbytes, nothing)
        self.inner.copy_in(host, out).wait()  # now: whoever receives has time while more comes
        return event

    def copy_out(self, x: Array, host: HostArray) -> Event:
        """See Device.copy_out."""
        if self._outward is None:
            return self.inner.copy_out(x, host)
        return self._outward.start(host.nbytes, lambda: self.inner.copy_out(x, host).wait())

    def group(self, ranks: Sequence[int], rendezvous: Rendezvous) -> Collective:
        """See Device.group."""
        return self.inner.group(ranks, rendezvous)

    def _check_held(self, dtype: str) -> None:
        if dtype == FP8 and FP8 not in {*self.card.dtypes.stored, *self.card.dtypes.wire}:
            raise UnsupportedOp(f"{self.info.name} holds no {FP8}; send bfloat16 or int8")

    def _take(self, nbytes: int, what: str) -> None:
        with self._lock:
            free = self.card.memory_bytes - self._held_bytes
            if nbytes > free:
                raise PlacementError(
                    f"{self.info.name} has {free:,} bytes free of {self.card.memory_bytes:,}, "
                    f"asked for {nbytes:,} for {what}; raise emulate.memory or place less on it"
                )
            self._held_bytes += nbytes

    def _counted(self, made: Made, nbytes: int) -> Made:
        """Give the bytes back once nobody holds what was made of them."""
        weakref.finalize(made, self._give_back, nbytes)
        return made

    def _give_back(self, nbytes: int) -> None:
        with self._lock:
            self._held_bytes -= nbytes


class SlowStage(Stage):
    """Takes ``slow`` times the seconds of another stage, asleep for the rest.

    Signs of life come from a thread of their own, so that a role that sleeps is not taken for dead.
    """

    def __init__(self, inner: Stage, slow: float) -> None:
        self.inner = inner
        self.slow = slow
        self.spec = inner.spec

    def plan(self, meta: BatchMeta) -> None:
        """See Stage.plan."""
        self.inner.plan(meta)

    def run(
        self, inputs: Mapping[str, Array], out: Mapping[str, Array] | None = None
    ) -> Mapping[str, Array]:
        """Run the stage, then wait."""
        start = time.monotonic()
        outputs = self.inner.run(inputs, out)
        time.sleep((self.slow - 1) * (time.monotonic() - start))
        return outputs


def _bytes_of(tensors: Mapping[str, HostTensor], spec: OpSpec) -> int:
    """Return what an op's weights take in the card's memory; as ``check`` counts a stage."""
    held = spec.weight_format
    plain = str(spec.parameters.get("out_dtype", spec.dtype))
    dtype = plain if held in (None, "auto") else str(held)
    shapes = [tensor.shape for tensor in tensors.values()]
    rows = sum(math.prod(shape[:-1]) for shape in shapes)
    return weight_bytes(sum(map(math.prod, shapes)), rows, dtype)


def _checked(op: str, kernel: Kernel, allowed: Collection[str], card: str) -> Kernel:
    """Return a kernel that refuses to make a dtype which the card does not have."""

    @wraps(kernel)
    def checked(*arrays: Any, dtype: str, **parameters: Any) -> Any:
        if dtype not in allowed:
            has = ", ".join(sorted(allowed))
            raise UnsupportedOp(f"{card}: op {op} to {dtype} refused; the card has {has}")
        return kernel(*arrays, dtype=dtype, **parameters)

    return checked
