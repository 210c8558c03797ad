"""One role's process: listens, agrees, loads, serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from step3_hetero.afd.contract import Contract, agree
from step3_hetero.afd.driver import Driver
from step3_hetero.afd.link import Heart, Link
from step3_hetero.afd.messages import Kind
from step3_hetero.afd.remote import Remote
from step3_hetero.afd.wire import Wire
from step3_hetero.afd.worker import Worker
from step3_hetero.backend import KVCache
from step3_hetero.emulate.channel import over
from step3_hetero.emulate.link import Link as EmulatedLink
from step3_hetero.errors import EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.graph import StageGraph
from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.executor import LoadedStage
from step3_hetero.runtime.program import Program
from step3_hetero.runtime.timeline import Timeline
from step3_hetero.transport.base import CorruptFrame, FrameLimits, Listener, Transport

GREETING_S = 10.0
"""How long a peer may take to say who it is."""

FRONT_S = 300.0
"""How long the front may take to come, and to ask for weights."""

Load = Callable[[], tuple[Mapping[str, LoadedStage], Sequence[KVCache]]]
"""Loads the role's stages."""


@dataclass(frozen=True)
class RoleProcessSettings:
    """What a role's process is and whom it talks to."""

    name: str
    number: int
    leads: bool
    graph: StageGraph
    role_of: Mapping[str, str]
    set_of: Mapping[str, int]
    contract: Contract
    transport: Transport
    limits: FrameLimits
    tokens: int
    deadline_s: float
    a2f: Wire
    f2a: Wire
    key: bytes | None = None
    traced: bool = False
    links: Mapping[str, EmulatedLink] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return ``f:0``."""
        return f"{self.name}:{self.number}"

    def timeline(self) -> Timeline | None:
        """Return what takes the spans of this process, if they are wanted."""
        return Timeline(self.label) if self.traced else None


def serve(settings: RoleProcessSettings, listener: Listener, load: Load) -> None:
    """Serve one front until it says stop or is gone.

    Raises:
        EdgeMismatch: the front reads the config, or has a checkpoint, other than ours.
        TransportTimeout: nobody came.
    """
    front = _front(settings, listener)
    heart = Heart(settings.deadline_s)
    heart.watch(front)
    front.wants(Kind.LOAD, FRONT_S)
    stages, caches = load()
    front.send(Kind.READY)
    if settings.leads:
        _lead(settings, front, heart, stages, caches)
    else:
        _work(settings, front, listener, heart, stages)
    heart.stop()


def _front(settings: RoleProcessSettings, listener: Listener) -> Link:
    link = Link(listener.accept(FRONT_S), "the front")
    _agree(settings, link)
    return link


def _agree(settings: RoleProcessSettings, link: Link) -> None:
    hello = link.wants(Kind.HELLO, GREETING_S)
    link.name = str(hello.said.get("from", link.name))
    try:
        agree(settings.contract, hello.said["contract"], settings.label, link.name)
    except EdgeMismatch as mismatch:
        link.send(Kind.REFUSED, said={"why": str(mismatch)})
        raise
    said = {"contract": dict(settings.contract), "name": settings.label, "now": time.monotonic()}
    link.send(Kind.AGREED, said=said)


def _lead(
    settings: RoleProcessSettings,
    front: Link,
    heart: Heart,
    stages: Mapping[str, LoadedStage],
    caches: Sequence[KVCache],
) -> None:
    def connect(name: str, address: str) -> Link:
        channel = settings.transport.connect(
            address, settings.limits, settings.deadline_s, settings.key
        )
        link = Link(over(settings.links, name, channel), name)
        hello = {"contract": dict(settings.contract), "from": settings.label}
        asked = time.monotonic()
        link.send(Kind.HELLO, said=hello)
        agreed = link.wants(Kind.AGREED, settings.deadline_s)
        agree(settings.contract, agreed.said["contract"], settings.label, name)
        if (there := agreed.said.get("name")) != name:
            raise EdgeMismatch(f"{address}: {there!r} listens there; expected {name!r}")
        link.compare_clocks(asked, float(agreed.said.get("now", asked)))
        heart.watch(link)
        return link

    program = Program(settings.graph, stages, StageClock(), timeline=settings.timeline())
    elsewhere = sorted(set(settings.role_of.values()) - {settings.name})
    remotes = {
        role: Remote(role, settings.number, connect, settings.deadline_s, settings.set_of[role])
        for role in elsewhere
    }
    driver = Driver(
        program, caches, settings.role_of, remotes, settings.a2f, settings.f2a, settings.number
    )
    driver.serve(front)
    for remote in remotes.values():
        remote.close()


def _work(
    settings: RoleProcessSettings,
    front: Link,
    listener: Listener,
    heart: Heart,
    stages: Mapping[str, LoadedStage],
) -> None:
    def greet(waiting: Listener) -> Link | None:
        try:
            link = Link(waiting.accept(GREETING_S), "a caller")
            _agree(settings, link)
        except (EdgeMismatch, RoleLost, TransportTimeout, CorruptFrame, KeyError):
            return None
        heart.watch(link)
        return link

    worker = Worker(stages, settings.a2f, settings.f2a, settings.tokens, settings.timeline())
    worker.serve(front, listener, greet)
