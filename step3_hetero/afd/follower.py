"""A rank of an attention instance that does not lead: its heads, and a cache of the same blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from step3_hetero.afd.asked import check_meta, taken
from step3_hetero.afd.link import GONE, Link, Message
from step3_hetero.afd.messages import Kind, meta_of, pairs_of, whole_of
from step3_hetero.afd.ranks import Reduction
from step3_hetero.afd.wire import Wire
from step3_hetero.afd.worker import MOST_WHY, Called
from step3_hetero.backend import BatchMeta, KVCache
from step3_hetero.composed import copied
from step3_hetero.errors import EdgeMismatch, RoleLost
from step3_hetero.runtime.executor import LoadedStage
from step3_hetero.specs import HostArray, Limits
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
        limits: Limits,
        label: str,
    ) -> None:
        """``leader`` is rank 0's name: nobody else is listened to. ``label`` is our own."""
        self._label = label
        self._limits = limits
        self._blocks = min(cache.spec.blocks for cache in caches)
        self._stages = stages
        self._caches = caches
        self._reduction = reduction
        self._leader = leader
        self._last = list(stages)[-1]
        self._dtype = {t.name: t.dtype for t in stages[self._last].node.takes}["x"]
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
            work = self._asked(link, link.receive(1.0))
        except (CorruptFrame, EdgeMismatch, KeyError, TypeError, ValueError) as cause:
            why = f"{self._label} refuses what {link.name} says: {cause}"
            with suppress(*GONE):
                link.send(Kind.REFUSED, said={"why": why[:MOST_WHY]})
            raise RoleLost(why) from cause
        work()

    def _asked(self, link: Link, message: Message) -> Callable[[], None]:
        """Return the work that a message asks for.

        Raises:
            EdgeMismatch, KeyError, TypeError, ValueError: there is no such work.
        """
        said = message.said
        if message.kind == Kind.BEAT:
            return lambda: None
        if message.kind == Kind.MEET and link.name == self._leader:
            address = str(said["address"])
            int(address.rpartition(":")[2])  # a port, before the work begins
            return partial(self._meet, link, address, whole_of(said, "epoch"))
        if link is not self._link:
            raise EdgeMismatch(
                f"{link.name} does not lead here; {self._leader} does, once it meets"
            )
        if message.kind == Kind.BATCH:
            started = Underway(meta_of(message.arrays))
            check_meta(started.meta, self._limits, self._blocks)
            return partial(self._underway.__setitem__, message.seq, started)
        if message.kind == Kind.CALL:
            loaded, batch = self._stages[said["stage"]], self._underway[message.seq]
            _check(loaded, batch, message.arrays)
            return partial(self._run, loaded, batch, message)
        if message.kind == Kind.COPY:
            return partial(self._copy, pairs_of(said, self._blocks))
        raise EdgeMismatch(f"a message of kind {message.kind}")

    def _meet(self, link: Link, address: str, epoch: int) -> None:
        self._begin_anew()
        self._link = link
        self._reduction.join(self._stages[self._last].device, address, epoch, [link])

    def _run(self, loaded: LoadedStage, batch: Underway, message: Message) -> None:
        takes = taken(loaded.node)
        inputs = Wire().to_device(loaded.device, message.arrays, takes, message.landed)
        loaded.stage.plan(batch.meta)
        x = loaded.stage.run({"x": batch.x, **inputs})["x"]
        batch.x = copied(loaded.device, x, self._dtype)
        if loaded.node.name == self._last:
            del self._underway[message.seq]

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        for cache in self._caches:
            cache.copy_blocks(pairs)


def _check(loaded: LoadedStage, batch: Underway, arrays: Mapping[str, HostArray]) -> None:
    """Refuse what a stage does not take: x comes with the first one, y with those that add it."""
    shape = (batch.meta.tokens, loaded.node.spec.hidden)
    missing = (t for t in loaded.node.takes if t.name != "x" or batch.x is None)
    wanted = {t.name: (shape, t.dtype) for t in missing}
    came = {name: (x.shape, x.dtype.name) for name, x in arrays.items()}
    if came != wanted:
        raise EdgeMismatch(f"{loaded.node.name}: {came} refused; it takes {wanted}")
