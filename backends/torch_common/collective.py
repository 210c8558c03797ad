"""Collectives over torch.distributed: gloo for host memory, NCCL (never run on hardware).

A group has a store and a process group of its own, none of torch's global ones, so that it can be
ended and built again while the process lives. A backend whose library torch does not bring, as
HCCL, passes a ``Make`` of its own to ``join``.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from step3_hetero.backend import Collective, Rendezvous
from step3_hetero.errors import PlacementError, TransportTimeout, UnsupportedOp

dist: Any = torch.distributed
"""Untyped: its stubs do not export what it exports."""

POLL_S = 0.02
"""How often is looked whether the other ranks have come. Who waited inside the library could not be
called off."""

MEET_S = 10.0
"""How long gloo's own meeting may take, of ranks that are all there: milliseconds as a rule."""

KNOCK_S = 1.0
"""How long one try to reach the first rank may take."""

Make = Callable[[Any, int, int, str, timedelta], Any]
"""Makes a process group: store, this rank's place, size, host of the rendezvous, deadline."""


def gloo(store: Any, place: int, size: int, host: str, deadline: timedelta) -> Any:
    """Return gloo's process group; it listens where the rendezvous does, loopback as a rule."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(host))]
    options._timeout = min(deadline, timedelta(seconds=MEET_S))
    group = dist.ProcessGroupGloo(store, place, size, options)
    group._set_default_timeout(deadline)
    return group


NCCL_BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"
"""With it a wait holds the host and ends at the deadline. Without it a watchdog has the same
deadline, and by default ends the process where a rank is gone (torch, ProcessGroupNCCL)."""


def nccl(store: Any, place: int, size: int, host: str, deadline: timedelta) -> Any:
    """Return NCCL's process group, for backend cuda. Never run on hardware."""
    os.environ.setdefault(NCCL_BLOCKING, "1")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = deadline
    return dist.ProcessGroupNCCL(store, place, size, options)


def join(ranks: Sequence[int], meeting: Rendezvous, make: Make = gloo) -> TorchCollective:
    """Wait for the other ranks and return the group.

    Raises:
        PlacementError: this rank is none of ``ranks``, or they are named twice.
        TransportTimeout: another rank did not come within the deadline, or is gone.
    """
    if meeting.rank not in ranks or len(set(ranks)) != len(ranks):
        raise PlacementError(f"rank {meeting.rank} in a group of ranks {list(ranks)}: no such one")
    place, deadline = list(ranks).index(meeting.rank), timedelta(seconds=meeting.deadline_s)
    host, _, port = meeting.address.rpartition(":")
    try:
        if place == 0:
            _server(host, int(port))
        tries = _tries(meeting)
        _knock(host, int(port), tries)
        store = dist.TCPStore(host, int(port), timeout=deadline, wait_for_workers=False)
        own = dist.PrefixStore(f"epoch {meeting.epoch}", store)
        _await_all(own, place, len(ranks), tries)
        group = make(own, place, len(ranks), host, deadline)
    except (RuntimeError, OSError) as cause:
        raise TransportTimeout(
            f"ranks {list(ranks)} did not all come to {meeting.address} for epoch {meeting.epoch} "
            f"within {meeting.deadline_s:g} s: {_first_line(cause)}"
        ) from cause
    return TorchCollective(tuple(ranks), place, meeting, group)


def _tries(meeting: Rendezvous) -> Iterator[None]:
    """Yield again and again, as long as the others may still come.

    Raises:
        OSError: one of them is gone, or the deadline has passed.
    """
    until = time.monotonic() + meeting.deadline_s
    while True:
        yield
        if meeting.is_off():
            raise ConnectionError("one of them is gone")
        if time.monotonic() > until:
            raise TimeoutError("nobody else comes")
        time.sleep(POLL_S)


def _knock(host: str, port: int, tries: Iterator[None]) -> None:
    """Return once the first rank listens: torch's own client prints every try that fails."""
    for _ in tries:
        with suppress(OSError):
            socket.create_connection((host, port), KNOCK_S).close()
            return


def _await_all(store: Any, place: int, size: int, tries: Iterator[None]) -> None:
    """Return once all ranks have come to the store: what is left of their meeting is short."""
    store.set(f"here {place}", b"")
    for _ in tries:
        if store.check([f"here {i}" for i in range(size)]):
            return


class TorchCollective(Collective):
    """One life of a group. Sums are gathered and added here, in order: torch leaves it open."""

    def __init__(self, ranks: tuple[int, ...], place: int, meeting: Rendezvous, group: Any) -> None:
        self.ranks = ranks
        self.place = place
        self.epoch = meeting.epoch
        self.deadline_s = meeting.deadline_s
        self._group: Any = group

    def all_reduce(self, x: Tensor) -> Tensor:
        """See ``Collective.all_reduce``. Each rank gets every other's whole array."""
        wide = torch.promote_types(x.dtype, torch.float32)
        total, *others = (part.to(wide) for part in self._gather("all_reduce", x))
        for other in others:
            total = total + other
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """See ``Collective.all_gather``."""
        return torch.cat(self._gather("all_gather", x))

    def all_to_all(self, x: Tensor) -> Tensor:
        """See ``Collective.all_to_all``."""
        if x.shape[0] % self.size:
            raise UnsupportedOp(f"{x.shape[0]} rows over {self.size} ranks; allowed: multiples")
        given = _bytes(x)
        taken = torch.empty_like(given)
        if x.numel():
            self._run("all_to_all", lambda group: group.alltoall_base(taken, given, [], []))
        return taken.view(x.dtype).view(x.shape)

    def abort(self) -> None:
        """See ``Collective.abort``."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _gather(self, op: str, x: Tensor) -> list[Tensor]:
        """Return every rank's array, as bytes on the way: not every library knows every dtype."""
        given = _bytes(x)
        taken = [torch.empty_like(given) for _ in self.ranks]
        if x.numel():
            self._run(op, lambda group: group.allgather([taken], [given]))
        return [part.view(x.dtype).view(x.shape) for part in taken]

    def _run(self, op: str, start: Callable[[Any], Any]) -> None:
        others = [rank for i, rank in enumerate(self.ranks) if i != self.place]
        who = f"{op} with ranks {others}, epoch {self.epoch}"
        if self._group is None:
            raise TransportTimeout(f"{who}: the group has ended; build it again, epoch higher")
        try:
            start(self._group).wait(timedelta(seconds=self.deadline_s))
        except RuntimeError as cause:
            self.abort()
            raise TransportTimeout(
                f"{who}: one is gone or did not come within {self.deadline_s:g} s; build the group "
                f"again, epoch higher ({_first_line(cause)})"
            ) from cause


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


@cache
def _server(host: str, port: int) -> Any:
    """Return the store at which the ranks meet, kept while the process lives: epochs share it.

    It listens on the address given alone; torch by itself would on every one.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen()
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _own_address(meeting_host: str) -> str:
    """Return the address of ours from which ``meeting_host`` is reached."""
    family = socket.AF_INET6 if ":" in meeting_host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((meeting_host, 9))  # sends nothing: it asks for the route
        return str(probe.getsockname()[0])


def _first_line(cause: BaseException) -> str:
    return str(cause).partition("\n")[0]
