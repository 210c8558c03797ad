"""What starts the roles of a config, and what is left in the hand of whoever started one."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from step3_hetero.errors import Step3HeteroError
from step3_hetero.transport.base import Channel

START_S = 300.0
"""How long a role may take to import its backend and load its weights, or to come back."""

GRACE_S = 3.0
"""How long a role may take to end when asked."""

MOST_LINE_BYTES = 4096
"""A report is an address or a count; a pipe takes so much at once or not at all."""


@dataclass(frozen=True)
class Member:
    """One process of one role; ``leads``: it takes micro-batches for its instance, as rank 0.

    ``number`` counts the ranks of all instances, then the spares: instance · tp + rank.
    """

    role: str
    number: int
    leads: bool
    tp: int = 1

    @property
    def name(self) -> str:
        """Return ``a:0``."""
        return f"{self.role}:{self.number}"


class Reports:
    """The reading end of a pipe on which a role tells facts, a JSON object a line.

    ``address`` says where it listens, ``state`` how far it is (loading, ready, serving, leaving),
    ``loaded`` how many of its stages are loaded, ``pace`` how long a kind of work took while a
    front was served, an entry of `StageClock.to_wire`.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self.is_open = True
        self._descriptor = descriptor
        self._rest = b""

    def fileno(self) -> int:
        """Return what ``select`` finds readable when there is a fact, or no more to come."""
        return self._descriptor

    def read(self) -> list[dict[str, Any]]:
        """Return the facts that have come; what is no fact is left out."""
        with suppress(BlockingIOError):
            said = os.read(self._descriptor, 1 << 16)
            if not said:
                self.close()
            self._rest += said
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest[-MOST_LINE_BYTES:]
        return [fact for line in lines if (fact := _fact(line)) is not None]

    def close(self) -> None:
        """Listen no more. May be called twice."""
        if self.is_open:
            self.is_open = False
            os.close(self._descriptor)


def _fact(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def tell(descriptor: int, **facts: Any) -> None:
    """Write one fact to the pipe of a `Reports`; nobody who listens too slowly is waited for."""
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(descriptor, json.dumps(facts).encode()[: MOST_LINE_BYTES - 1] + b"\n")


class Handle(ABC):
    """A role that was started, or that somebody else started, as its launcher holds it."""

    name: str
    reports: Reports
    pid: int | None = None
    """Its process on this machine; None where there is none, or it is another's."""
    channel: Channel | None = None
    """The connection to it, where the launcher has one already."""
    error: Step3HeteroError | None = None
    """Why it cannot be had at all, whatever is tried."""
    returns: bool = False
    """Somebody else starts it again: its place is held until `START_S` have passed."""

    @abstractmethod
    def fileno(self) -> int:
        """Return what ``select`` finds readable once the role has ended."""

    @abstractmethod
    def how_it_ended(self) -> str:
        """Say how a role that has ended did so, as in ``exit code 1``."""

    def was_killed(self) -> bool:
        """Say whether a role that has ended did so by no doing of its own: a signal ended it."""
        return False

    @abstractmethod
    def ask(self) -> None:
        """Ask the role to finish what is under way and end. Never waits."""

    @abstractmethod
    def kill(self) -> None:
        """Let go of the role at once, whatever it does; its end is seen next. Never waits."""

    @abstractmethod
    def end(self, *, at_once: bool = False) -> None:
        """See to it that nothing of the role is left here; it has been asked to end, or has."""


class Launcher(ABC):
    """One way of starting roles."""

    @abstractmethod
    def launch(self, member: Member) -> Handle:
        """Start an instance of a role. Its handle reports where it listens.

        Raises:
            Step3HeteroError: it cannot be started.
        """

    def close(self) -> None:
        """Let go of what belongs to no role in particular; every handle has ended."""
        return


class Launchers(Launcher):
    """Some roles by one launcher, the others by another."""

    def __init__(self, by_role: dict[str, Launcher], otherwise: Launcher) -> None:
        self._by_role = by_role
        self._otherwise = otherwise

    def launch(self, member: Member) -> Handle:
        """See Launcher.launch."""
        return self._by_role.get(member.role, self._otherwise).launch(member)

    def close(self) -> None:
        """See Launcher.close."""
        for launcher in self._distinct():
            launcher.close()

    def _distinct(self) -> Iterable[Launcher]:
        return {id(x): x for x in (*self._by_role.values(), self._otherwise)}.values()
