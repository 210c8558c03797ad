"""What runs micro-batches: one process or many is its business alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

from step3_hetero.backend import Array
from step3_hetero.graph import GraphStage
from step3_hetero.runtime.microbatch import BatchResult, MicroBatch, StageClock, Ticket
from step3_hetero.specs import Limits


class Observer(Protocol):
    """Sees every stage as it runs; conformance installs its shadow check through this."""

    def stage(
        self,
        stage: GraphStage,
        role: str,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        seconds: float,
    ) -> None:
        """Take note of one stage's run."""


class Executor(ABC):
    """Owns devices, weights and KV memory; knows nothing of requests."""

    limits: Limits
    kv_blocks: int
    clock: StageClock

    @abstractmethod
    def submit(self, batch: MicroBatch) -> Ticket:
        """Start a micro-batch."""

    @abstractmethod
    def collect(self, deadline_s: float | None = None) -> BatchResult:
        """Return the result of the oldest ticket not yet collected.

        Raises:
            TransportTimeout: a role gave no sign of life within ``deadline_s``.
            RoleLost: a role died and nothing can take its place.
        """

    @abstractmethod
    def forget_image(self, key: int) -> None:
        """Drop the rows of an image; a key never seen is fine."""

    @abstractmethod
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy logical KV blocks, (source, target), in every layer."""

    @abstractmethod
    def close(self) -> None:
        """Release devices and memory."""
