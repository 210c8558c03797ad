"""One role's process: listens, agrees, loads, serves one front or one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from step3_hetero.afd.contract import Contract
from step3_hetero.afd.doorman import Doorman
from step3_hetero.afd.drain import Drain, Service
from step3_hetero.afd.driver import Driver
from step3_hetero.afd.emulated import over
from step3_hetero.afd.follower import Follower
from step3_hetero.afd.greeting import say_hello, take_agreed
from step3_hetero.afd.launcher import START_S
from step3_hetero.afd.leaving import check_copies
from step3_hetero.afd.link import SEND_DEADLINE_S, Heart, Link
from step3_hetero.afd.messages import Kind
from step3_hetero.afd.ranks import LedStage, Ranks, Reduction
from step3_hetero.afd.remote import Connect, Remote
from step3_hetero.afd.wire import Wire
from step3_hetero.afd.worker import Greet, Worker
from step3_hetero.backend import KVCache
from step3_hetero.emulate.link import Link as EmulatedLink
from step3_hetero.errors import EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.graph import StageGraph
from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.executor import LoadedStage
from step3_hetero.runtime.program import KINDS, Program
from step3_hetero.runtime.timeline import Timeline
from step3_hetero.specs import Limits
from step3_hetero.transport.base import (
    CopyFailed,
    CorruptFrame,
    FrameLimits,
    Listener,
    Transport,
)

FRONT_S = START_S
"""How long the front may take to come, and to ask for weights."""

Loaded = tuple[Mapping[str, LoadedStage], Sequence[KVCache]]
Load = Callable[[], Loaded]
"""Loads the role's stages."""

Tell = Callable[..., Any]
"""Told facts for whoever started the role, as keywords: see `launcher.Reports`."""


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
    batch: Limits
    deadline_s: float
    a2f: Wire
    f2a: Wire
    reduction: Reduction | None = None
    """Of one of several ranks of an attention instance."""
    key: bytes | None = None
    links: Mapping[str, EmulatedLink] = field(default_factory=dict)

    @property
    def instance(self) -> int:
        """Return which instance of its role it belongs to."""
        return self.number // (self.reduction.size if self.reduction else 1)

    @property
    def label(self) -> str:
        """Return ``f:0``."""
        return f"{self.name}:{self.number}"


def serve(
    settings: RoleProcessSettings, listener: Listener, load: Load, drain: Drain, tell: Tell
) -> None:
    """Serve one front until it says stop or is gone. Weights are loaded once it has agreed.

    Raises:
        TransportTimeout: nobody came.
    """
    doorman = Doorman(settings.label, settings.contract, listener)
    try:
        with drain.idle():
            front, traced = doorman.front(drain, FRONT_S)
            heart = Heart(settings.deadline_s)
            heart.watch(front, patient=True)  # Ctrl-Z stops it and not its roles
            front.wants(Kind.LOAD, FRONT_S)
            tell(state="loading")
            loaded = load()
        tell(state="ready")
        front.send(Kind.READY)
        forever = Service(front, drain, float("inf"))  # the lifeline tells of the front's end
        _serve_front(settings, front, doorman, heart, loaded, forever, traced, StageClock())
        heart.stop()
        front.close()
    finally:
        doorman.close()


def stand(
    settings: RoleProcessSettings, listener: Listener, load: Load, drain: Drain, tell: Tell
) -> None:
    """Load, then serve one front after another, until the drain is asked for.

    A front that says nothing for two deadlines is given up: the way to it may be cut. So is one
    for which a copy between host and device failed: it comes again, and asks again for what was
    under way.

    Raises:
        DeviceLost: a device copies nothing any more.
    """
    doorman = Doorman(settings.label, settings.contract, listener)
    try:
        with drain.idle():
            tell(state="loading")
            loaded = load()
        while not drain.asked:
            tell(state="ready")
            with drain.idle():
                front, traced = doorman.front(drain)
            tell(state="serving")
            clock = StageClock()
            try:
                _one_of_many(settings, front, doorman, loaded, drain, traced, clock)
            except (EdgeMismatch, RoleLost, TransportTimeout, CorruptFrame, CopyFailed) as cause:
                tell(said=f"a front is served no longer: {cause}")
                if isinstance(cause, CopyFailed):
                    for device in {stage.device for stage in loaded[0].values()}:
                        check_copies(device)
            for entry in clock.only(settings.name, KINDS, settings.label).to_wire():
                tell(pace=entry)
        tell(state="leaving")
    finally:
        doorman.close()


def _one_of_many(
    settings: RoleProcessSettings,
    front: Link,
    doorman: Doorman,
    loaded: Loaded,
    drain: Drain,
    traced: bool,
    clock: StageClock,
) -> None:
    heart = Heart(settings.deadline_s)
    heart.watch(front)
    try:
        front.wants(Kind.LOAD, FRONT_S)
        front.send(Kind.READY)
        service = Service(front, drain, 2 * settings.deadline_s)
        _serve_front(settings, front, doorman, heart, loaded, service, traced, clock)
    finally:
        heart.stop()
        front.close()
        doorman.front_left()


def _serve_front(
    settings: RoleProcessSettings,
    front: Link,
    doorman: Doorman,
    heart: Heart,
    loaded: Loaded,
    service: Service,
    traced: bool,
    clock: StageClock,
) -> None:
    timeline = Timeline(settings.label) if traced else None
    if settings.leads:
        _lead(settings, front, heart, loaded, service, timeline, clock)
        return

    def greet() -> Link | None:
        link = doorman.caller()
        if link is not None:
            heart.watch(link)
        return link

    if settings.reduction is not None:
        _follow(settings, front, doorman, loaded, service, greet)
        return
    worker = Worker(loaded[0], settings.a2f, settings.f2a, settings.batch.tokens, timeline, clock)
    worker.serve(front, doorman, greet, service.is_over)


def _follow(
    settings: RoleProcessSettings,
    front: Link,
    doorman: Doorman,
    loaded: Loaded,
    service: Service,
    greet: Greet,
) -> None:
    reduction = settings.reduction
    assert reduction is not None, "a rank that follows is one of several"
    leader = f"{settings.name}:{settings.number - reduction.rank}"
    follower = Follower(*loaded, reduction, leader, settings.batch, settings.label)
    try:
        follower.serve(front, doorman, greet, service.is_over)
    finally:
        follower.close()


def _agree_with(settings: RoleProcessSettings, link: Link, name: str, address: str) -> None:
    """Greet the instance ``name``; in a set it has to be that one and no other."""
    asked_s = say_hello(link, settings.contract, settings.label)
    agreed = link.wants(Kind.AGREED, settings.deadline_s)
    take_agreed(link, agreed, settings.contract, settings.label, asked_s)
    shares = settings.set_of[name.partition(":")[0]] > 1
    if shares and (there := agreed.said.get("name")) != name:
        raise EdgeMismatch(f"{address}: {there!r} listens there; expected {name!r}")


def _lead(
    settings: RoleProcessSettings,
    front: Link,
    heart: Heart,
    loaded: Loaded,
    service: Service,
    timeline: Timeline | None,
    clock: StageClock,
) -> None:
    def connect(name: str, address: str) -> Link:
        channel = settings.transport.connect(
            address, settings.limits, settings.deadline_s, settings.key
        )
        link = Link(over(settings.links, name, channel), name)
        try:
            _agree_with(settings, link, name, address)
        except BaseException:
            link.close()
            raise
        link.land_on(program.home)
        heart.watch(link)
        return link

    stages, caches = loaded
    ranks = _other_ranks(settings, stages, connect)
    if ranks is not None:
        stages = {name: _led(stage, ranks) for name, stage in stages.items()}
    program = Program(settings.graph, stages, clock, timeline=timeline)
    elsewhere = sorted(set(settings.role_of.values()) - {settings.name})
    number = settings.instance
    remotes = {
        role: Remote(role, number, connect, settings.deadline_s, settings.set_of[role])
        for role in elsewhere
    }
    driver = Driver(
        program,
        caches,
        settings.role_of,
        remotes,
        settings.a2f,
        settings.f2a,
        number,
        ranks,
        settings.label,
    )
    try:
        driver.serve(front, service.is_over)
        front.flush(SEND_DEADLINE_S)
    finally:
        if ranks is not None:
            ranks.close()
        for remote in remotes.values():
            remote.close()


def _other_ranks(
    settings: RoleProcessSettings, stages: Mapping[str, LoadedStage], connect: Connect
) -> Ranks | None:
    if settings.reduction is None:
        return None
    attention = [stage for stage in stages.values() if stage.node.kind == "attention"]
    return Ranks(settings.name, settings.number, settings.reduction, connect, attention)


def _led(loaded: LoadedStage, ranks: Ranks) -> LoadedStage:
    led = loaded.node.kind == "attention"
    return replace(loaded, stage=LedStage(loaded, ranks)) if led else loaded
