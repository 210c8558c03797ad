"""A role without a cache, FFN or vision: runs one stage when called, and keeps nothing.

A member of a set holds a share of each FFN, and answers its partial sums.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Protocol

from step3_hetero.afd.asked import rows_asked, taken
from step3_hetero.afd.link import GONE, Link, Message, ready
from step3_hetero.afd.messages import Kind, Said, number_of, rows_only, total_bytes
from step3_hetero.afd.partials import own_experts
from step3_hetero.afd.wire import Wire
from step3_hetero.backend import Array
from step3_hetero.errors import EdgeMismatch, Step3HeteroError
from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.executor import LoadedStage
from step3_hetero.runtime.timeline import SEND, TAKE, Timeline
from step3_hetero.transport.base import CopyFailed, CorruptFrame

Greet = Callable[[], Link | None]
"""Returns a peer that has agreed on the contract; None when there is none after all."""

IsOver = Callable[..., bool]
"""`Service.is_over`: told the links, it says whether to serve no longer."""

TICK_S = 0.2
"""How often the end is looked for while nothing comes."""


class Door(Protocol):
    """What ``select`` can wait for."""

    def fileno(self) -> int:
        """Return the descriptor."""


MOST_WHY = 2000
"""Characters of an answer that refuses: what a caller said may come back in it."""


class Called(ABC):
    """Does what its callers say until the front says stop or is gone."""

    _stages: Mapping[str, LoadedStage]

    @property
    def is_busy(self) -> bool:
        """Say whether something that a caller began is not at its end."""
        return False

    def serve(self, front: Link, door: Door, greet: Greet, is_over: IsOver) -> None:
        """Serve until told to stop. ``door`` is ready to read when somebody can be greeted."""
        links: list[Link] = []
        while not is_over([front, *links], busy=self.is_busy):
            for one in ready([front, door, *links], TICK_S):
                if one is front:
                    if not self._from_front(front):
                        return
                elif one is door:
                    if (link := greet()) is not None:
                        link.land_on(next(iter(self._stages.values())).device)
                        links.append(link)
                elif not self._from_caller(one):
                    links.remove(one)
                    one.close()

    def _from_front(self, front: Link) -> bool:
        """Read one message of the front; say whether to go on."""
        try:
            return front.receive(1.0).kind != Kind.STOP
        except GONE:
            return False
        except CorruptFrame:  # a sign of life; or the wish to stop: the front sees to our end, too
            return True

    def _from_caller(self, link: Link) -> bool:
        """Take one message; say whether the caller is still there."""
        try:
            self._take(link)
        except GONE:
            return False
        return True

    @abstractmethod
    def _take(self, link: Link) -> None:
        """Read one message of a caller and do what it says.

        Raises:
            RoleLost, TransportTimeout: the caller is gone, or is to be.
        """


class Worker(Called):
    """Answers calls of any number of attention instances."""

    def __init__(
        self,
        stages: Mapping[str, LoadedStage],
        a2f: Wire,
        f2a: Wire,
        tokens: int,
        timeline: Timeline | None = None,
        clock: StageClock | None = None,
    ) -> None:
        """``clock`` counts the runs of stages, by role and kind."""
        self._timeline = timeline
        self._clock = StageClock() if clock is None else clock
        self._idle_since: float | None = None
        self._sent_s = 0.0
        self._stages = stages
        self._a2f = a2f
        self._f2a = f2a
        self._tokens = tokens

    def _take(self, link: Link) -> None:
        start = time.monotonic()
        try:
            message = link.receive(1.0)
        except CorruptFrame:
            link.send(Kind.AGAIN)
            return
        if message.kind == Kind.CALL:
            self._called(link, message, start)

    def _called(self, link: Link, message: Message, start_s: float) -> None:
        """Answer a call, and tell how long it was waited for, taken in, run, and sent before.

        How long the sending of an answer took is told with the next one.
        """
        waited_s = 0.0 if self._idle_since is None else start_s - self._idle_since
        try:
            call = int(number_of(message.said, "call"))
            if self._timeline is not None:
                self._timeline.batch = int(number_of(message.said, "batch"))
            run = self._answer(message, start_s, call)
        except CopyFailed:  # the call may be another's to answer; ours is to look at the device
            raise
        except Step3HeteroError as error:
            link.send(Kind.FAILED, message.seq, {"why": str(error)[:MOST_WHY]})
            return
        loaded, outputs, said = run
        said |= {"waited_s": waited_s, "sent_s": self._sent_s, "call": call}
        if self._timeline is not None:
            said["spans"] = self._timeline.drain()
        start = time.monotonic()
        gives = {t.name: t for t in loaded.node.gives}
        arrays = self._f2a.to_host(loaded.device, outputs, gives)
        link.send(Kind.ANSWER, message.seq, said, arrays, epoch=message.epoch)
        self._idle_since = end = time.monotonic()
        self._sent_s = end - start
        if self._timeline is not None:
            self._timeline.add(
                SEND, loaded.node.name, start, end, total_bytes(arrays), call + 1 if call else 0
            )

    def _answer(
        self, message: Message, start_s: float, call: int
    ) -> tuple[LoadedStage, Mapping[str, Array], Said]:
        name = str(message.said.get("stage"))
        loaded = self._stages.get(name)
        if loaded is None:
            raise EdgeMismatch(f"asked for {name!r}; here: {', '.join(self._stages)}")
        device, takes = loaded.device, taken(loaded.node)
        rows = rows_asked(loaded.node, message.arrays, self._a2f, self._tokens)
        own = own_experts(loaded.node, message.arrays)
        inputs = self._a2f.to_device(device, own, takes, message.landed)
        if loaded.node.kind != "vision":
            loaded.stage.plan(rows_only(rows))
        start = time.monotonic()
        outputs = loaded.stage.run(inputs)
        end = time.monotonic()
        self._clock.add(loaded.role, loaded.node.kind, end - start)
        if self._timeline is not None:
            size = total_bytes(message.arrays)
            self._timeline.add(TAKE, name, start_s, start, size, call)
            self._timeline.add(loaded.node.kind, name, start, end)
        return loaded, outputs, {"seconds": end - start, "taken_s": start - start_s}
