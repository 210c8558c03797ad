"""What runs micro-batches: one process or many is its business alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from step3_hetero.backend import Array, BatchMeta, Device, KVCache, Stage
from step3_hetero.graph import GraphStage
from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.microbatch import Landed, MicroBatch, Ticket
from step3_hetero.runtime.paces import Paces
from step3_hetero.runtime.timeline import Timeline
from step3_hetero.specs import Limits


@dataclass(frozen=True, slots=True)
class LoadedStage:
    """A stage with its code, its device, the name of its role and, for attention, its cache."""

    node: GraphStage
    stage: Stage
    device: Device
    role: str
    cache: KVCache | None = None


class Observer(Protocol):
    """Is told of every stage's run, before and after, in the thread that runs it.

    The time it takes is the request's. What it wants to keep it copies: the arrays are the stages'
    own, and the residual ``x`` may be overwritten by the run.
    """

    def before(
        self, loaded: LoadedStage, meta: BatchMeta | None, inputs: Mapping[str, Array]
    ) -> None:
        """Look at what a stage is about to get; ``meta`` is None for the vision stage."""

    def after(self, loaded: LoadedStage, outputs: Mapping[str, Array], seconds: float) -> None:
        """Look at what the stage gave; the run is that of the last ``before``."""


class Executor(ABC):
    """Owns devices, weights and KV memory; knows nothing of requests.

    ``instances`` of the attention role each hold a cache of ``kv_blocks`` logical blocks and take
    ``microbatches`` at a time. ``timeline``, if there is one, holds what ran when; ``paces``, where
    a role may be several processes, which of them is slow.
    """

    limits: Limits
    kv_blocks: int
    clock: StageClock
    timeline: Timeline | None = None
    paces: Paces | None = None
    observers: Sequence[Observer] = ()
    instances: int = 1
    microbatches: int = 1

    @abstractmethod
    def submit(self, batch: MicroBatch, instance: int = 0) -> Ticket:
        """Start a micro-batch on one instance."""

    @abstractmethod
    def collect(self, deadline_s: float | None = None) -> Landed:
        """Return a micro-batch that has come back, of one instance in the order of submission.

        Raises:
            TransportTimeout: a role gave no sign of life within ``deadline_s``.
            RoleLost: a role died and nothing can take its place.
        """

    @abstractmethod
    def forget_image(self, key: int, instance: int = 0) -> None:
        """Drop the rows of an image; a key never seen is fine."""

    @abstractmethod
    def copy_blocks(self, pairs: Sequence[tuple[int, int]], instance: int = 0) -> None:
        """Copy logical KV blocks, (source, target), in every layer of one instance.

        Before any micro-batch that is submitted later; sources are not being written to.
        """

    def cache_epoch(self, instance: int = 0) -> int | None:
        """Return a number that changes whenever an instance's cache has begun anew.

        It changes within ``collect`` only, once the loss is known there. An instance that dies
        with nothing under way is seen by this alone: what its cache held would be taken for what
        the new one holds. None: this executor cannot tell, and no prefix is kept for it.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Release devices and memory."""
