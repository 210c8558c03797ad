"""Role processes on this machine: started, listened to, ended. Nothing of them outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

OnLine = Callable[[str, str], None]
"""Called with a process's name and a line that it wrote."""

GRACE_S = 3.0
"""How long a process may take to end when asked."""


@dataclass(eq=False)
class RoleProcess:
    """A role's process; ``report`` is the pipe on which it tells where it listens."""

    name: str
    popen: subprocess.Popen[bytes]
    report: IO[bytes]
    pidfd: int
    threads: list[threading.Thread] = field(default_factory=list)

    def fileno(self) -> int:
        """Return what ``select`` finds readable once the process has ended."""
        return self.pidfd

    def how_it_ended(self) -> str:
        """Say with which code or signal it ended."""
        code = self.popen.wait()
        if code < 0:
            names = {int(s): s.name for s in signal.Signals}
            return f"signal {names.get(-code, -code)}"
        return f"exit code {code}"

    def end(self, *, at_once: bool = False) -> None:
        """See to it that the process is no more."""
        if not at_once:
            try:
                self.popen.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                at_once = True
        if at_once:
            self.popen.kill()
            self.popen.wait()
        for thread in self.threads:
            thread.join(GRACE_S)
        self.report.close()
        if self.popen.stdin is not None:
            with suppress(BrokenPipeError):
                self.popen.stdin.close()
        os.close(self.pidfd)


def start(
    name: str, arguments: Sequence[str], settings: str, on_line: OnLine, cores: Sequence[int] = ()
) -> RoleProcess:
    """Start ``python -m step3_hetero.cli ARGUMENTS --report FD`` as a role.

    ``settings``, one line, are the first it reads from its standard input, which stays open: when
    it ends, so does the role. ``cores`` are those that it is kept on; all of them when empty.
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
    popen.stdin.write(settings.encode() + b"\n")
    popen.stdin.flush()
    process = RoleProcess(name, popen, os.fdopen(reading, "rb"), os.pidfd_open(popen.pid))
    lines = threading.Thread(target=_pass_on, args=(name, popen.stdout, on_line), daemon=True)
    lines.start()
    process.threads.append(lines)
    return process


def _pass_on(name: str, stream: IO[bytes], on_line: OnLine) -> None:
    with stream:
        for line in stream:
            on_line(name, line.decode(errors="replace").rstrip("\n"))


def end_with(lifeline: IO[str]) -> None:
    """End this process, whatever it does, once the file at the other end of which we hang ends."""

    def wait() -> None:
        while lifeline.read(1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
