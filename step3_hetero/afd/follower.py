"""A rank of an attention instance that does not lead: its heads, and a cache of the same blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from step3_hetero.afd.link import Link, Message
from step3_hetero.afd.messages import Kind, meta_of
from step3_hetero.afd.ranks import Reduction
from step3_hetero.afd.wire import Wire
from step3_hetero.afd.worker import Called
from step3_hetero.backend import BatchMeta, KVCache
from step3_hetero.errors import RoleLost
from step3_hetero.runtime.executor import LoadedStage
from step3_hetero.transport.base import CorruptFrame


@dataclass(eq=False)
class Underway:
    """A micro-batch between two stages of attention: its tokens, and the residual."""

    meta: BatchMeta
    x: Any = None


class Follower(Called):
    """Runs the stages that rank 0 names, in its order; nothing but the sums goes back.

    A rank 0 that comes anew begins anew: what an earlier one had under way is forgotten. Rank 0 is
    let go when it says what cannot be, or when a sum fails; then it begins anew, too.
    """

    def __init__(
        self,
        stages: Mapping[str, LoadedStage],
        caches: Sequence[KVCache],
        reduction: Reduction,
        leader: str,
    ) -> None:
        """``leader`` is rank 0's name: nobody else is listened to."""
        self._stages = stages
        self._caches = caches
        self._reduction = reduction
        self._leader = leader
        self._last = list(stages)[-1]
        self._link: Link | None = None
        self._underway: dict[int, Underway] = {}

    @property
    def is_busy(self) -> bool:
        """Say whether a micro-batch is between two stages."""
        return bool(self._underway)

    def close(self) -> None:
        """Leave the group."""
        self._reduction.leave()

    def _from_caller(self, link: Link) -> bool:
        stays = super()._from_caller(link)
        if not stays and link is self._link:
            self._link = None
            self._begin_anew()
        return stays

    def _begin_anew(self) -> None:
        self._underway.clear()
        self._reduction.leave()

    def _take(self, link: Link) -> None:
        try:
            message = link.receive(1.0)
            self._obey(link, message)
        except (CorruptFrame, KeyError, ValueError, TypeError) as cause:
            raise RoleLost(f"{link.name} said what cannot be: {cause!r}") from cause

    def _obey(self, link: Link, message: Message) -> None:
        if message.kind == Kind.MEET and link.name == self._leader:
            self._begin_anew()
            self._link = link
            device = self._stages[self._last].device
            self._reduction.join(device, str(message.said["address"]), int(message.said["epoch"]))
        elif message.kind == Kind.BEAT:
            return
        elif link is not self._link:
            raise RoleLost(f"{link.name} does not lead here; {self._leader} does")
        elif message.kind == Kind.BATCH:
            self._underway[message.seq] = Underway(meta_of(message.arrays))
        elif message.kind == Kind.CALL:
            self._run(message)
        elif message.kind == Kind.COPY:
            pairs = [(int(a), int(b)) for a, b in message.said["pairs"]]
            for cache in self._caches:
                cache.copy_blocks(pairs)

    def _run(self, message: Message) -> None:
        batch, loaded = self._underway[message.seq], self._stages[message.said["stage"]]
        takes = {t.name: t for t in loaded.node.takes}
        inputs = Wire().to_device(loaded.device, message.arrays, takes)
        loaded.stage.plan(batch.meta)
        batch.x = loaded.stage.run({"x": batch.x, **inputs})["x"]
        if loaded.node.name == self._last:
            del self._underway[message.seq]
