"""Roles that are no process of ours: threads of this one, and roles that somebody else started."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from step3_hetero.afd.drain import Drain
from step3_hetero.afd.launcher import GRACE_S, START_S, Handle, Launcher, Member, Reports, tell
from step3_hetero.errors import RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.transport.base import Channel, FrameLimits, Transport

AGAIN_S = 0.1
"""The pause between two tries to reach a role."""


class Watched(Handle):
    """A role without a process of ours: a pipe for its facts, a descriptor that tells its end."""

    def __init__(self, name: str) -> None:
        self.name = name
        reading, self._telling = os.pipe()
        os.set_blocking(self._telling, False)
        self.reports = Reports(reading)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._how = "its connection lost"
        self._lock = threading.Lock()
        self._is_open = True

    def fileno(self) -> int:
        """See Handle.fileno."""
        return self._bell

    def how_it_ended(self) -> str:
        """See Handle.how_it_ended."""
        return self._how

    def ask(self) -> None:
        """See Handle.ask. What somebody else started is theirs to end."""

    def kill(self) -> None:
        """See Handle.kill."""
        self.ended()

    def end(self, *, at_once: bool = False) -> None:
        """See Handle.end."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                self.reports.close()
                os.close(self._telling)
                os.close(self._bell)

    def tells(self, **facts: object) -> None:
        """Pass on a fact of the role. From any thread."""
        with self._lock:
            if self._is_open:
                tell(self._telling, **facts)

    def ended(self, how: str | None = None) -> None:
        """Let it be seen that the role is no more. From any thread."""
        with self._lock:
            if self._is_open:
                self._how = how or self._how
                os.eventfd_write(self._bell, 1)


ServeInThread = Callable[[Member, Callable[..., None], Drain], None]
"""Is a role: told which, how it reports, and what asks it to end."""


class RoleThread(Watched):
    """A role in a thread of this process. It cannot be killed, only left alone and asked to end."""

    def __init__(self, member: Member, serve: ServeInThread) -> None:
        super().__init__(member.name)
        self._drain = Drain(0.0)
        self._thread = threading.Thread(
            target=self._run, args=(member, serve), name=f"role {member.name}", daemon=True
        )
        self._thread.start()

    def ask(self) -> None:
        """See Handle.ask."""
        self._drain.ask()

    def kill(self) -> None:
        """See Handle.kill."""
        self._drain.ask()
        self.ended("its thread left alone")

    def end(self, *, at_once: bool = False) -> None:
        """See Handle.end."""
        self._drain.ask()
        self._thread.join(GRACE_S)
        super().end()

    def _run(self, member: Member, serve: ServeInThread) -> None:
        try:
            serve(member, self.tells, self._drain)
            self.ended("its thread ended")
        except BaseException as cause:  # a process would print it and exit
            self.ended(f"{type(cause).__name__}: {cause}")


class Threads(Launcher):
    """Runs roles as threads of this process, over a transport that goes no further."""

    def __init__(self, serve: ServeInThread) -> None:
        self._serve = serve

    def launch(self, member: Member) -> Handle:
        """See Launcher.launch."""
        return RoleThread(member, self._serve)


class StandingRole(Watched):
    """A role at an address, started by somebody else; a thread tries until it can be reached."""

    returns = True

    def __init__(
        self, name: str, address: str, connect: Callable[[], Channel], *, again: bool
    ) -> None:
        super().__init__(name)
        self._address = address
        self._connect = connect
        self._again = again
        threading.Thread(target=self._reach, name=f"to {name}", daemon=True).start()

    def end(self, *, at_once: bool = False) -> None:
        """See Handle.end."""
        super().end()
        with self._lock:
            if self.channel is not None:
                self.channel.close()

    def _reach(self) -> None:
        until = time.monotonic() + START_S
        if self._again:  # its end, or that of its last front, may not have been seen there yet
            time.sleep(AGAIN_S)
        while self._is_open:
            try:
                channel = self._connect()
            except (TransportTimeout, RoleLost) as cause:
                if time.monotonic() > until:
                    self.ended(f"nobody at {self._address} within {START_S:g} s ({cause})")
                    return
                time.sleep(AGAIN_S)
            except Step3HeteroError as cause:  # the wrong key, other limits: trying cannot help
                self.error = type(cause)(f"{self.name} at {self._address}: {cause}")
                self.ended(str(cause))
                return
            else:
                self._reached(channel)
                return

    def _reached(self, channel: Channel) -> None:
        with self._lock:
            if self._is_open:
                self.channel = channel
                tell(self._telling, address=self._address)
                return
        channel.close()


class Standing(Launcher):
    """Reaches roles that stand, one address an instance."""

    def __init__(
        self,
        addresses: Mapping[str, Sequence[str]],
        transport: Transport,
        limits: FrameLimits,
        deadline_s: float,
        key: bytes | None,
    ) -> None:
        self._addresses = addresses
        self._transport, self._limits = transport, limits
        self._deadline_s, self._key = deadline_s, key
        self._launched: set[Member] = set()

    def launch(self, member: Member) -> Handle:
        """See Launcher.launch."""
        address = self._addresses[member.role][member.number]
        again = member in self._launched
        self._launched.add(member)

        def connect() -> Channel:
            return self._transport.connect(address, self._limits, self._deadline_s, self._key)

        return StandingRole(member.name, address, connect, again=again)
