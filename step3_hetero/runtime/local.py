"""The executor of one process: every stage runs here, on the device its role names."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from step3_hetero.backend import KVCache
from step3_hetero.graph import StageGraph
from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.executor import Executor, LoadedStage, Observer
from step3_hetero.runtime.microbatch import BatchResult, Landed, MicroBatch, Ticket
from step3_hetero.runtime.program import Program
from step3_hetero.runtime.timeline import Timeline
from step3_hetero.specs import Limits


class LocalExecutor(Executor):
    """Runs the stages one after another; arrays cross devices through host memory."""

    def __init__(
        self,
        graph: StageGraph,
        stages: Mapping[str, LoadedStage],
        caches: Sequence[KVCache],
        limits: Limits,
        observers: Sequence[Observer] = (),
        timeline: Timeline | None = None,
    ) -> None:
        self.limits = limits
        self.kv_blocks = caches[0].spec.blocks
        self.clock = StageClock()
        self.observers = observers
        self.timeline = timeline
        self._program = Program(graph, stages, self.clock, observers, timeline)
        self._caches = caches
        self._landed: deque[Landed] = deque()
        self._submitted = 0

    def submit(self, batch: MicroBatch, instance: int = 0) -> Ticket:
        """Run the micro-batch at once; its result waits for ``collect``."""
        self._submitted += 1
        ticket = Ticket(self._submitted)
        if self.timeline is not None:
            self.timeline.batch = ticket.number
        self._landed.append(Landed(ticket, self._run(batch)))
        return ticket

    def collect(self, deadline_s: float | None = None) -> Landed:
        """Return the oldest result."""
        return self._landed.popleft()

    def forget_image(self, key: int, instance: int = 0) -> None:
        """Drop the rows of an image."""
        self._program.forget_image(key)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], instance: int = 0) -> None:
        """Copy logical KV blocks in every layer."""
        for cache in self._caches:
            cache.copy_blocks(pairs)

    def cache_epoch(self, instance: int = 0) -> int:
        """Return 0: a cache of this process is lost with the engine only."""
        return 0

    def close(self) -> None:
        """Forget results and images; devices go with the last reference."""
        self._landed.clear()
        self._program.forget()

    def _run(self, batch: MicroBatch) -> BatchResult:
        passing = self._program.run(batch)
        try:
            call = next(passing)
        except StopIteration as done:
            result: BatchResult = done.value
            return result
        raise AssertionError(f"{call.node.name} is not here")
