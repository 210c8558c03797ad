"""Ranks of a collective in processes of their own, each doing what it is told over a pipe."""

import multiprocessing
import socket
import time
from contextlib import suppress
from pathlib import Path

from step3_hetero.backend import Rendezvous
from step3_hetero.errors import Step3HeteroError
from step3_hetero.registry import get_backend

ANSWER_S = 120.0
"""A machine that does much else at a time imports torch slowly."""


class Rank:
    """One process; ``ask`` tells it what to do, ``answer`` is what came of it."""

    def __init__(self, number):
        spawn = multiprocessing.get_context("spawn")
        self.number = number
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=obey, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, what, *values):
        self.pipe.send((what, *values))

    def answer(self):
        """Return the result, or the words of the error, and the seconds it took."""
        if not self.pipe.poll(ANSWER_S):
            raise TimeoutError(f"rank {self.number} does not answer")
        return self.pipe.recv()

    def end(self):
        with suppress(ValueError, ProcessLookupError):
            self.process.kill()
            self.process.join()


def obey(pipe):
    """Serve one rank: join groups, run their operations, tell what happens."""
    device, group = get_backend("cpu").open(0), None
    while True:
        try:
            what, *values = pipe.recv()
        except EOFError:
            return
        start = time.monotonic()
        try:
            if what == "join":
                ranks, address, rank, epoch, deadline_s = values
                group = device.group(ranks, Rendezvous(address, rank, epoch, deadline_s))
                said = (group.ranks, group.place, group.epoch, group.size)
            elif what == "listening":
                said = listening()
            else:
                said = device.to_host(getattr(group, what)(device.from_host(*values)))
        except Step3HeteroError as error:
            said = f"{type(error).__name__}: {error}"
        pipe.send((said, time.monotonic() - start))


def listening():
    """Return the addresses on which this process listens, as /proc writes them."""
    mine = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            mine.add(str(entry.readlink()))
    found = []
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                    found.append(fields[1].split(":")[0])
    return found


def free_address():
    """Return a loopback address on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
