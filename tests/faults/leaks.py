"""What this process holds of the machine, and what of it is left over later."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

PATIENCE_S = 5.0
"""A socket that was closed, and a process that was killed, may still be on their way out."""


@dataclass(frozen=True)
class Standing:
    """Children, segments of shared memory, and open sockets of this process at one time."""

    children: frozenset[str]
    segments: frozenset[str]
    sockets: int

    @classmethod
    def now(cls) -> Self:
        """Look."""
        return cls(
            frozenset(_children()),
            frozenset(p.name for p in Path("/dev/shm").iterdir()),
            _sockets(),
        )

    def left_over(self) -> list[str]:
        """Return what has come since and does not go away within `PATIENCE_S`, in words."""
        until = time.monotonic() + PATIENCE_S
        while (found := self._more(type(self).now())) and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def _more(self, now: Standing) -> list[str]:
        found = [f"process {line}" for line in sorted(now.children - self.children)]
        found += [f"/dev/shm/{name}" for name in sorted(now.segments - self.segments)]
        if now.sockets > self.sockets:
            found.append(f"{now.sockets - self.sockets} open sockets")
        return found


def _children() -> list[str]:
    """Return number and command line of every process that we started, or that one of them did."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text()
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        number = int(path.name)
        parents[number] = int(stat.rpartition(")")[2].split()[1])
        commands[number] = f"{number} {command}"
    ours, found = {os.getpid()}, []
    while more := {n for n, parent in parents.items() if parent in ours and n not in ours}:
        ours |= more
        found += [commands[n] for n in more]
    return found


def _sockets() -> int:
    count = 0
    for path in Path("/proc/self/fd").iterdir():
        try:
            count += str(path.readlink()).startswith("socket:")
        except OSError:  # the folder's own, or closed meanwhile
            continue
    return count
