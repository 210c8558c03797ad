"""What a vendor implements: ``Backend`` finds devices, ``Device`` holds arrays, kernels and stages.

A backend is registered under the entry-point group ``step3_hetero.backends``. It brings kernels for
the ops of ops.py; stages come composed from them unless the device builds its own, faster ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from step3_hetero.collective import Collective as Collective
from step3_hetero.collective import Reduce as Reduce
from step3_hetero.collective import Rendezvous as Rendezvous
from step3_hetero.errors import ConfigError, UnsupportedOp
from step3_hetero.specs import (
    LOGICAL_BLOCK,
    CacheSpec,
    HostArray,
    HostTensor,
    Limits,
    OpSpec,
    StageSpec,
)

API_VERSION = 1
"""Raised by one whenever an existing backend would have to change."""

Array = Any
"""A device array. Only the device that made it knows its type.

Composed stages ask of it: ``shape``; slices along any axis and the rows of its first, by iteration
too; ``reshape`` with at most one -1; ``out[...] = x`` from an array of its shape and dtype. Slices
and reshapes may be views, so that kernels get operands that are not contiguous.
"""

Kernel = Callable[..., Any]

Int32 = npt.NDArray[np.int32]

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Dtypes:
    """What a device can do with each dtype: an A800 stores FP8 but computes in bfloat16."""

    stored: tuple[str, ...]
    computed: tuple[str, ...]
    wire: tuple[str, ...]


Tier = Literal["device", "interpreted", "host stand-in", "emulated"]
"""What runs a backend's code: its own hardware, an interpreter of its kernels, host code that
stands in for the vendor's library, or an emulator of the hardware."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What is known of a device without opening it. None: not measured, not published.

    Devices with one ``memory_domain`` share their memory; empty, the device has its own.
    """

    name: str
    description: str
    memory_bytes: int
    dtypes: Dtypes
    bandwidth_bytes_per_s: float | None = None
    flops_per_s: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[str, float] = field(default_factory=dict)
    batch_invariant: bool = False
    memory_domain: str = ""
    tier: Tier = "device"
    driver: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """A device's memory at one moment, in bytes."""

    total_bytes: int
    free_bytes: int


class Weights(ABC):
    """Checkpoint tensors as the device wants them: packed, fused, dequantised. Opaque outside.

    ``method`` says what was done ("packed fp32"); ``source`` are the tensors it was done to, still
    mapped from the checkpoint's file and so no memory of ours.
    """

    nbytes: int
    method: str
    source: Mapping[str, HostTensor]

    @cached_property
    def digest(self) -> str:
        """Return a SHA-256 over names, dtypes, shapes and bytes of the source, when first asked."""
        seen = sha256()
        for key, tensor in self.source.items():
            seen.update(f"{key}:{tensor.name}:{tensor.dtype}:{tensor.shape}".encode())
            for part in (tensor.data, tensor.scale_inv):
                if part is not None:
                    seen.update(np.ascontiguousarray(part).view(np.uint8).data)
        return seen.hexdigest()


class Event(ABC):
    """The end of an asynchronous copy or launch."""

    @abstractmethod
    def wait(self, deadline_s: float | None = None) -> None:
        """Block until done.

        Raises:
            TransportTimeout: ``deadline_s`` seconds passed.
        """


class Done(Event):
    """An event that lies in the past: what a device that runs at once returns."""

    def wait(self, deadline_s: float | None = None) -> None:
        """Return at once."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchMeta:
    """Where the tokens of one micro-batch stand, on the host.

    Shapes: positions, slots (tokens,); query_starts (seqs + 1,); context_lens (seqs,);
    block_tables (seqs, blocks): all int32. Tokens of sequence s are rows query_starts[s] to
    query_starts[s + 1]; rows beyond the last are padding. A slot is block · 128 + offset in logical
    blocks; slot -1 writes nothing. context_lens counts the tokens of this batch too.
    """

    positions: Int32
    slots: Int32
    query_starts: Int32
    context_lens: Int32
    block_tables: Int32

    @property
    def tokens(self) -> int:
        """Return the number of rows, padding included."""
        return len(self.positions)

    @property
    def seqs(self) -> int:
        """Return the number of sequences."""
        return len(self.context_lens)

    def named_slots(self, blocks: int) -> npt.NDArray[np.bool_]:
        """Return which of ``blocks`` · 128 rows of a cache this batch writes: (blocks, 128)."""
        named = np.zeros(blocks * LOGICAL_BLOCK, bool)
        named[self.slots[self.slots >= 0]] = True
        return named.reshape(blocks, LOGICAL_BLOCK)

    def token(self, row: int) -> BatchMeta:
        """Return the batch that holds row ``row`` alone, its context ending at the row itself."""
        seq = int(np.searchsorted(self.query_starts, row, side="right")) - 1
        if seq >= self.seqs:
            return self._padding()
        context = int(self.positions[row]) + 1
        blocks = -(-context // LOGICAL_BLOCK)
        return BatchMeta(
            self.positions[row : row + 1],
            self.slots[row : row + 1],
            np.array([0, 1], np.int32),
            np.array([context], np.int32),
            self.block_tables[seq : seq + 1, :blocks],
        )

    @staticmethod
    def _padding() -> BatchMeta:
        none = np.zeros(0, np.int32)
        one = np.zeros(1, np.int32)
        return BatchMeta(one, one - 1, one, none, none.reshape(0, 0))


class KVCache(ABC):
    """Keys and values of one layer, in the backend's own layout, addressed by logical slot."""

    spec: CacheSpec
    nbytes: int

    @abstractmethod
    def write(self, k: Array, v: Array, batch: Any) -> None:
        """Store k, v (tokens, kv_heads, head_dim) at the batch's slots; slot -1 writes nothing.

        Rounded to the cache's dtype: see ``CacheSpec``.
        """

    @abstractmethod
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy logical blocks, (source, target) by (source, target)."""

    @abstractmethod
    def read(self, blocks: Sequence[int]) -> tuple[HostArray, HostArray]:
        """Return keys and values, each (blocks, 128, kv_heads, head_dim), on the host.

        In the cache's dtype; of FP8 and INT8 code · scale, in float32.
        """


class Stage(ABC):
    """One stage of one layer with its weights and cache bound."""

    spec: StageSpec

    @abstractmethod
    def plan(self, meta: BatchMeta) -> None:
        """Take in the next batch's shape on the host, outside any graph capture."""

    @abstractmethod
    def run(
        self, inputs: Mapping[str, Array], out: Mapping[str, Array] | None = None
    ) -> Mapping[str, Array]:
        """Compute the stage's outputs by name, without waiting for the host.

        With ``out`` the results are written there. Without, they are the stage's own arrays, valid
        until its next run. Input ``x``, the residual, is given away: a stage may overwrite it.
        """


class Device(ABC):
    """One accelerator: memory, kernels, stages."""

    info: DeviceInfo
    kernels: Mapping[str, Kernel]

    @abstractmethod
    def from_host(self, x: HostArray, dtype: str | None = None) -> Array:
        """Copy a host array to the device, as ``dtype`` when given."""

    @abstractmethod
    def to_host(self, x: Array) -> HostArray:
        """Wait for ``x`` and copy it to the host."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Return an array of any content."""

    @abstractmethod
    def owns(self, x: Any) -> bool:
        """Say whether ``x`` is an array in this device's memory."""

    @abstractmethod
    def memory(self) -> Memory:
        """Return the memory in total and free."""

    @abstractmethod
    def prepare(self, op: str, tensors: Mapping[str, HostTensor], spec: OpSpec) -> Weights:
        """Turn checkpoint tensors into what the device's kernel for ``op`` takes.

        Ops: linear (matrices side by side, at most one bias named ``bias``), experts (``gate``,
        ``up``, ``down``), embed (``table``), conv2d (``weight``, ``bias``).

        Raises:
            UnsupportedOp: the tensors' dtype cannot be held in this form.
        """

    @abstractmethod
    def open_cache(self, spec: CacheSpec) -> KVCache:
        """Reserve the KV cache of one layer, zeroed."""

    @abstractmethod
    def batch(self, meta: BatchMeta) -> Any:
        """Return ``meta`` in the form that ``KVCache.write`` and the attention kernel take.

        Composed stages read ``positions`` of it, a device array (tokens,) int32, for op rope.
        Called once per stage with the same object, micro-batches in turn: keep the last few.
        """

    def build(
        self,
        spec: StageSpec,
        weights: Mapping[str, Weights | Array],
        cache: KVCache | None,
        limits: Limits,
        reduce: Reduce | None = None,
    ) -> Stage:
        """Build one layer's stage. By default it is composed of this device's kernels.

        ``reduce`` is given to an attention stage that holds some of the heads alone: it is called
        with the output projection's result (tokens, hidden), before the residual is added. It waits
        for other ranks and is no part of a captured graph. Backends without ``group`` never see it.
        """
        from step3_hetero.composed import compose

        return compose(self, spec, weights, cache, limits, reduce)

    def host_buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return host memory from which copies to the device are fastest: pinned, if it matters."""
        return np.empty(nbytes, np.uint8)

    def copy_in(self, host: HostArray, out: Array) -> Event:
        """Start copying ``host`` into the device array ``out``."""
        out[...] = self.from_host(host)
        return Done()

    def copy_out(self, x: Array, host: HostArray) -> Event:
        """Start copying ``x`` into host memory."""
        host[...] = self.to_host(x)
        return Done()

    def group(self, ranks: Sequence[int], rendezvous: Rendezvous) -> Collective:
        """Join a collective over ``ranks`` of this backend, in their order.

        Raises:
            UnsupportedOp: the backend has no collectives.
            TransportTimeout: another rank did not come within the deadline.
        """
        raise UnsupportedOp(f"{self.info.name} has no collectives, asked for ranks {list(ranks)}")

    def kernel(self, op: str) -> Kernel:
        """Return the kernel for ``op``.

        Raises:
            UnsupportedOp: the device has none; the message names those it has.
        """
        try:
            return self.kernels[op]
        except KeyError:
            has = ", ".join(sorted(self.kernels))
            raise UnsupportedOp(
                f"{self.info.name} has no kernel for {op!r}; it has {has}"
            ) from None


class Backend(ABC):
    """One vendor. Importing its module must not import the vendor's driver.

    ``borrows`` names the backends whose kernels work for this one; what is not declared there is a
    silent fallback, and conformance fails it.
    """

    name: ClassVar[str]
    api_versions: ClassVar[range] = range(1, API_VERSION + 1)
    borrows: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def devices(self) -> Sequence[DeviceInfo]:
        """List this machine's devices; empty, never an error, when the driver is missing."""

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """Say why ``devices`` is empty, or None when it is not."""

    @abstractmethod
    def open(self, index: int, options: Mapping[str, Any] = NO_OPTIONS) -> Device:
        """Open the ``index``-th device of ``devices()``.

        ``options`` are a role's, straight from the config file: the backend checks them.

        Raises:
            PlacementError: there is no such device on this machine.
            ConfigError: an option is unknown or has a bad value.
        """

    @abstractmethod
    def supports(self, info: DeviceInfo, spec: OpSpec) -> str | None:
        """Return why a device cannot run an op, or None. Pure: needs neither device nor library."""

    @abstractmethod
    def reference_info(self, card: str | None) -> DeviceInfo:
        """Describe a device that need not be here, so that a placement can be checked on a laptop.

        Raises:
            PlacementError: ``card`` is not one of this backend's.
        """

    def why_no_group(self, info: DeviceInfo) -> str | None:
        """Say why such devices join no ``Device.group``, or None when they do. Pure."""
        return "it brings no collectives"

    def version(self) -> str:
        """Return the version of the vendor's library, or why it is not known."""
        return "built in"


def check_options(backend: str, options: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Refuse options that a backend does not know; ``known`` says what each means.

    Raises:
        ConfigError: naming the option and those there are.
    """
    for name in options:
        if name not in known:
            listed = "; ".join(f"{n}: {meaning}" for n, meaning in known.items()) or "none"
            raise ConfigError(f"backend {backend!r} has no option {name!r}; options: {listed}")
