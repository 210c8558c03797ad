"""Role processes on this machine: started, listened to, ended. Nothing of them outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from step3_hetero.afd.launcher import GRACE_S, Handle, Launcher, Member, Reports
from step3_hetero.afd.loglines import LogLines, OnLine


@dataclass(eq=False)
class RoleProcess(Handle):
    """A role's process. ``pidfd`` names it for good, its number may be another's tomorrow."""

    name: str
    popen: subprocess.Popen[bytes]
    reports: Reports
    pidfd: int
    lines: threading.Thread

    def __post_init__(self) -> None:
        self.pid = self.popen.pid

    def fileno(self) -> int:
        """See Handle.fileno."""
        return self.pidfd

    def how_it_ended(self) -> str:
        """See Handle.how_it_ended."""
        code = self.popen.wait()
        if code < 0:
            names = {int(s): s.name for s in signal.Signals}
            return f"signal {names.get(-code, -code)}"
        return f"exit code {code}"

    def was_killed(self) -> bool:
        """See Handle.was_killed."""
        return self.popen.wait() < 0

    def kill(self) -> None:
        """See Handle.kill."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def ask(self) -> None:
        """See Handle.ask."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)

    def end(self, *, at_once: bool = False) -> None:
        """See Handle.end."""
        if not at_once:
            try:
                self.popen.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                at_once = True
        if at_once:
            self.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver may hold it; it ends, unseen
                self.popen.wait(GRACE_S)
        self.lines.join(GRACE_S)
        self.reports.close()
        if self.popen.stdin is not None:
            with suppress(BrokenPipeError):
                self.popen.stdin.close()
        os.close(self.pidfd)


class LocalProcesses(Launcher):
    """Starts ``step3-hetero role`` on this machine, each on the cores that it is given."""

    def __init__(
        self,
        settings: str,
        cores: Callable[[Member], Sequence[int]],
        on_line: OnLine,
        listen: Callable[[Member], Sequence[str]] = lambda member: (),
    ) -> None:
        """``settings``, one line, are the first that a role reads; ``listen`` are more options."""
        self._settings = settings
        self._cores = cores
        self._listen = listen
        self._lines = LogLines(on_line)

    def launch(self, member: Member) -> RoleProcess:
        """See Launcher.launch."""
        arguments = ["role", "-", "--name", member.role, "--number", str(member.number)]
        arguments += self._listen(member)
        return start(member.name, arguments, self._settings, self._lines, self._cores(member))

    def close(self) -> None:
        """See Launcher.close."""
        self._lines.close()


def start(
    name: str, arguments: Sequence[str], settings: str, lines: LogLines, cores: Sequence[int] = ()
) -> RoleProcess:
    """Start ``python -m step3_hetero.cli ARGUMENTS --report FD`` as a role.

    ``settings`` go to its standard input, which stays open: when it ends, so does the role.
    ``cores`` are those that it is kept on; all of them when empty.
    """
    reading, writing = os.pipe()
    kept = ["--cores", ",".join(map(str, cores))] if cores else []
    popen = subprocess.Popen(
        [sys.executable, "-m", "step3_hetero.cli", *arguments, *kept, "--report", str(writing)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(writing,),
        env={"OMP_NUM_THREADS": str(len(cores)), **os.environ} if cores else None,
        start_new_session=True,  # Ctrl-C is the front's to handle
    )
    os.close(writing)
    assert popen.stdin is not None and popen.stdout is not None
    with suppress(BrokenPipeError):  # its end, seen next, says more than that nobody reads
        popen.stdin.write(settings.encode() + b"\n")
        popen.stdin.flush()
    followed = lines.follow(name, popen.stdout)
    return RoleProcess(name, popen, Reports(reading), os.pidfd_open(popen.pid), followed)


def end_with(lifeline: IO[str]) -> None:
    """End this process, whatever it does, once the file at the other end of which we hang ends."""

    def wait() -> None:
        while lifeline.read(1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
