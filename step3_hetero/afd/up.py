"""A config's roles kept standing: started, watched, started again, until somebody asks to end."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from step3_hetero.afd.launcher import GRACE_S, Handle, Launcher, Member
from step3_hetero.afd.link import ready
from step3_hetero.config import Config
from step3_hetero.errors import ConfigError, RoleLost
from step3_hetero.placement.written import write_whole
from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.paces import Paces

ATTACH_VERSION = 1

TICK_S = 0.5
PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before a role that died is started again: by how often it did without having been ready."""


@dataclass(eq=False)
class Kept:
    """One role, and how it fares."""

    member: Member
    handle: Handle | None = None
    state: str = "starting"
    address: str = ""
    loaded: int = 0
    restarts: int = 0
    failed: int = 0
    was_ready: bool = False
    """Since it was started last."""
    was_ever_ready: bool = False
    clock: StageClock = field(default_factory=StageClock)
    """Of all fronts that it has served."""
    start_at_s: float = 0.0
    since_s: float = field(default_factory=time.monotonic)

    @property
    def is_up(self) -> bool:
        """Say whether a front may come, or has."""
        return self.state in ("ready", "serving")

    def to_json(self) -> dict[str, Any]:
        """Return how it stands."""
        return {
            "role": self.member.name,
            "state": self.state,
            "pid": self.handle.pid if self.handle else None,
            "address": self.address,
            "restarts": self.restarts,
        }


OnEvent = Callable[[Kept, str], None]
"""Called with a role whose state has changed, and what there is to say about it."""


class Supervisor:
    """Keeps roles standing. ``where`` is told to the launcher: a role comes back at its address."""

    def __init__(
        self,
        members: Sequence[Member],
        launcher: Launcher,
        where: dict[str, str],
        deadline_s: float,
        on_event: OnEvent,
    ) -> None:
        self.roles = [Kept(m) for m in members]
        self.paces = Paces(look_s=0.0)  # told of when a front leaves, seldom
        self._launcher = launcher
        self._where = where
        self._deadline_s = deadline_s
        self._on_event = on_event
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._asked = False

    def ask(self) -> None:
        """Wish the end. From any thread, and from a signal's handler."""
        self._asked = True
        os.eventfd_write(self._bell, 1)

    def run(self, on_up: Callable[[], None]) -> None:
        """Start the roles, call ``on_up`` once all are ready, and keep them until asked to end.

        Raises:
            RoleLost: a role ended before it was ready for the first time.
        """
        told = False
        try:
            while not self._asked:
                self._start_due()
                self._attend()
                if not told and all(r.is_up for r in self.roles):
                    told = True
                    on_up()
        finally:
            self._end()

    def _start_due(self) -> None:
        now = time.monotonic()
        for role in self.roles:
            if role.handle is None and now >= role.start_at_s:
                role.handle = self._launcher.launch(role.member)
                role.loaded, role.was_ready = 0, False
                self._moves(role, "starting")

    def _attend(self) -> None:
        watched: dict[int, Kept] = {}
        for role in self.roles:
            if role.handle is not None:
                watched[role.handle.fileno()] = role
                if role.handle.reports.is_open:
                    watched[role.handle.reports.fileno()] = role
        found = ready([self._bell, *watched], TICK_S)
        for role in {id(watched[f]): watched[f] for f in found if f in watched}.values():
            handle = role.handle
            assert handle is not None
            for fact in handle.reports.read() if handle.reports.is_open else ():
                self._hear(role, fact)
            if handle.fileno() in found:
                self._died(role, handle)

    def _hear(self, role: Kept, fact: Mapping[str, Any]) -> None:
        if "address" in fact:
            role.address = self._where[role.member.name] = str(fact["address"])
        if "pace" in fact:
            self._paced(role, fact["pace"])
        if "loaded" in fact:
            role.loaded = int(fact["loaded"])
            self._on_event(role, "")
        if "said" in fact:
            self._on_event(role, str(fact["said"]))
        if "state" in fact:
            if fact["state"] == "ready":
                role.was_ready = role.was_ever_ready = True
            self._moves(role, str(fact["state"]))

    def _paced(self, role: Kept, said: Sequence[Any]) -> None:
        """Take in how long a role's work took for a front that it has served."""
        role.clock.join(StageClock.of_wire([said]))
        for member, line in self.paces.take(role.member.name, role.clock):
            self._on_event(next(r for r in self.roles if r.member.name == member), line)

    def _died(self, role: Kept, handle: Handle) -> None:
        how = handle.how_it_ended()
        handle.end(at_once=True)
        role.handle = None
        role.failed = 0 if role.was_ready else role.failed + 1
        if not role.was_ever_ready:
            raise RoleLost(
                f"{role.member.name} ended with {how} before it was ready; its log says why"
            )
        role.restarts += 1
        pause_s = PAUSES_S[min(role.failed, len(PAUSES_S) - 1)]
        role.start_at_s = time.monotonic() + pause_s
        self._moves(role, "ended", f"with {how}" + (f", again in {pause_s:g} s" * (pause_s > 0)))

    def _moves(self, role: Kept, state: str, said: str = "") -> None:
        role.state, role.since_s = state, time.monotonic()
        self._on_event(role, said)

    def _end(self) -> None:
        """Ask the roles that lead to end, then those that they call; end them at the deadline."""
        for leads in (True, False):
            asked = [r for r in self.roles if r.member.leads is leads and r.handle is not None]
            for role, handle in _handles(asked):
                handle.ask()
                self._moves(role, "leaving")
            until = time.monotonic() + self._deadline_s + GRACE_S
            waiting = {handle.fileno() for _, handle in _handles(asked)}
            while waiting and (left := until - time.monotonic()) > 0:
                waiting -= set(ready(waiting, left))
            for role, handle in _handles(asked):
                in_time = handle.fileno() not in waiting
                for fact in handle.reports.read() if handle.reports.is_open else ():
                    if "pace" in fact:
                        self._paced(role, fact["pace"])
                handle.end(at_once=True)
                role.handle = None
                self._moves(role, "ended", f"with {handle.how_it_ended()}" if in_time else "killed")
        self._launcher.close()
        os.close(self._bell)


def _handles(roles: Sequence[Kept]) -> Iterator[tuple[Kept, Handle]]:
    for role in roles:
        if role.handle is not None:
            yield role, role.handle


def first_addresses(members: Sequence[Member], kind: str) -> dict[str, str]:
    """Return addresses that roles keep when they come back; one of tcp is found at the first start.

    >>> sorted(first_addresses([Member("f", 0, False)], "tcp"))
    []
    """
    if kind != "shm":
        return {}
    token = secrets.token_hex(8)
    return {m.name: f"@step3-hetero-{token}-{m.role}-{m.number}" for m in members}


def write_attach(path: Path, config: Config, roles: Sequence[Kept]) -> None:
    """Write where roles stand, for ``--attach``."""
    where: dict[str, list[str]] = {}
    for role in roles:
        where.setdefault(role.member.role, []).append(role.address)
    said = {
        "version": ATTACH_VERSION,
        "pid": os.getpid(),
        "transport": config.transport.kind,
        "roles": where,
    }
    write_whole(path, json.dumps(said, indent=2) + "\n")


def read_attach(path: Path, config: Config) -> dict[str, list[str]]:
    """Return where the roles of a config stand, as `write_attach` wrote it.

    Raises:
        ConfigError: there is no such file, or it is of another config.
    """
    try:
        said = json.loads(path.read_text())
        version, kind, where = said["version"], said["transport"], dict(said["roles"])
        found = {str(r): [str(a) for a in addresses] for r, addresses in where.items()}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file: is step3-hetero up running?") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as cause:
        raise ConfigError(
            f"{path}: no file of step3-hetero up; give what `step3-hetero up --attach` wrote"
        ) from cause
    if version != ATTACH_VERSION:
        raise ConfigError(f"{path}: version {version!r} refused; expected {ATTACH_VERSION}")
    wanted = {name: r.processes + r.spares for name, r in config.roles.items()}
    has = {name: len(addresses) for name, addresses in found.items()}
    if (kind, has) != (config.transport.kind, wanted):
        raise ConfigError(
            f"{path}: roles {has} over {kind} stand, the config has {wanted} over "
            f"{config.transport.kind}; give the config that step3-hetero up was given"
        )
    return found
