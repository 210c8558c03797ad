"""The ranks of an attention instance: rank 0 leads, the others hold their heads and follow it."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Mapping, Sequence
from functools import cached_property

from step3_hetero.afd.link import GONE, SEND_DEADLINE_S, Link
from step3_hetero.afd.messages import Kind, meta_arrays
from step3_hetero.afd.remote import Connect
from step3_hetero.backend import Array, BatchMeta, Collective, Device, Rendezvous, Stage
from step3_hetero.errors import EdgeMismatch, RoleLost
from step3_hetero.runtime.executor import LoadedStage
from step3_hetero.transport.base import CorruptFrame
from step3_hetero.transport.sockets import is_gone

RANKS_S = SEND_DEADLINE_S / 1.5
"""How long one rank may be ahead of another: kernels are compiled at first use. Whoever sends to a
rank that waits so long has more patience. One that died is seen at once, as its connections close;
one that is silent is ended by the front before that."""

HOST = "127.0.0.1"
"""Where ranks meet: cards of one machine."""


class Reduction:
    """Adds up what the ranks of an instance bring, in whichever group they form now.

    It lives as long as its process, and so does the address at which rank 0 has them meet.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._group: Collective | None = None
        self._epochs = itertools.count(1)

    def __call__(self, x: Array) -> Array:
        """See ``Collective.all_reduce``.

        Raises:
            TransportTimeout: a rank is gone, or did not come.
            RoleLost: there is no group.
        """
        if self._group is None:
            raise RoleLost(f"rank {self.rank} of {self.size} is in no group")
        return self._group.all_reduce(x)

    def next_meeting(self) -> tuple[str, int]:
        """Return where the ranks are to meet now, and the epoch of their group. Of rank 0."""
        return self._address, next(self._epochs)

    @cached_property
    def _address(self) -> str:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            return f"{HOST}:{probe.getsockname()[1]}"

    def join(self, device: Device, address: str, epoch: int, links: Sequence[Link]) -> None:
        """Leave the group there was, if any, and form another with those behind ``links``.

        Raises:
            TransportTimeout: a rank did not come, or is gone.
        """
        self.leave()
        meeting = Rendezvous(
            address, self.rank, epoch, RANKS_S, lambda: any(is_gone(link) for link in links)
        )
        self._group = device.group(range(self.size), meeting)

    def leave(self) -> None:
        """End the group for all of its ranks."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


class Ranks:
    """The other ranks of an instance as rank 0 sees them: told what to run, met in the sums.

    They keep the residual, so that only what rank 0 alone knows crosses: where a micro-batch's
    tokens stand, once; x once, then each layer's y. All ranks run the same stages in the order in
    which rank 0 tells them. An instance is whole or it is lost: without any one rank rank 0 ends,
    and what it had under way is computed again from its tokens.
    """

    def __init__(
        self,
        role: str,
        number: int,
        reduction: Reduction,
        connect: Connect,
        stages: Sequence[LoadedStage],
    ) -> None:
        """``number`` is that of rank 0; ``stages`` are its stages of attention, in their order."""
        self.is_whole = False
        self._names = {number + r: f"{role}:{number + r}" for r in range(1, reduction.size)}
        self._reduction = reduction
        self._connect = connect
        self._device = stages[-1].device
        self._last = stages[-1].node.name
        self._links: dict[int, Link] = {}
        self._lost: set[int] = set()
        self._told: dict[BatchMeta, int] = {}
        self._batches = itertools.count(1)

    @property
    def links(self) -> list[Link]:
        """Return the links to the ranks that are there."""
        return list(self._links.values())

    def point(self, addresses: Mapping[int, str]) -> None:
        """Take in where the ranks listen now; once all are there, form a group.

        Raises:
            RoleLost, TransportTimeout: one of them is gone again.
        """
        for number, name in self._names.items():
            if number in addresses and number not in self._links:
                try:
                    self._links[number] = self._connect(name, addresses[number])
                except (*GONE, CorruptFrame):
                    self._lost.add(number)
        if not self.is_whole and len(self._links) == len(self._names):
            self._meet()

    def read(self, link: Link) -> None:
        """Take in a sign of life.

        Raises:
            RoleLost: the rank is gone, and the instance with it.
            EdgeMismatch: it refuses what it was told, in its own words.
        """
        try:
            message = link.receive(RANKS_S)
        except (*GONE, CorruptFrame) as cause:
            raise RoleLost(f"{link.name} is gone, its instance begins anew: {cause}") from cause
        if message.kind == Kind.REFUSED:
            raise EdgeMismatch(str(message.said.get("why")))

    def run(self, stage: str, meta: BatchMeta, inputs: Mapping[str, Array]) -> None:
        """Have the other ranks run a stage of attention."""
        number = self._told.get(meta)
        if number is None:
            number = self._told[meta] = next(self._batches)
            self._tell(Kind.BATCH, number, arrays=meta_arrays(meta))
        else:
            inputs = {"y": inputs["y"]}
        if stage == self._last:
            del self._told[meta]
        arrays = {name: self._device.to_host(x) for name, x in inputs.items()}
        self._tell(Kind.CALL, number, {"stage": stage}, arrays)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Have the other ranks copy blocks."""
        self._tell(Kind.COPY, 0, {"pairs": list(pairs)})

    def lost(self) -> list[int]:
        """Return the ranks that could not be reached since the last time."""
        found, self._lost = sorted(self._lost), set()
        return found

    def close(self) -> None:
        """Let go of the other ranks."""
        self._reduction.leave()
        for link in self._links.values():
            link.close()

    def _meet(self) -> None:
        address, epoch = self._reduction.next_meeting()
        self._tell(Kind.MEET, 0, {"address": address, "epoch": epoch})
        self._reduction.join(self._device, address, epoch, self.links)
        self.is_whole = True

    def _tell(self, kind: Kind, seq: int, said: Mapping[str, object] | None = None,
              arrays: Mapping[str, Array] | None = None) -> None:  # fmt: skip
        for link in self._links.values():
            link.post(kind, seq, said, arrays)


class LedStage(Stage):
    """A stage of attention on rank 0: the other ranks are told, then it runs here."""

    def __init__(self, loaded: LoadedStage, ranks: Ranks) -> None:
        self.spec = loaded.stage.spec
        self._loaded = loaded
        self._ranks = ranks
        self._meta: BatchMeta | None = None

    def plan(self, meta: BatchMeta) -> None:
        """Take in the batch, which tells one pass from another."""
        self._meta = meta
        self._loaded.stage.plan(meta)

    def run(
        self, inputs: Mapping[str, Array], out: Mapping[str, Array] | None = None
    ) -> Mapping[str, Array]:
        """Run it on all ranks."""
        assert self._meta is not None, "plan comes before run"
        self._ranks.run(self._loaded.node.name, self._meta, inputs)
        return self._loaded.stage.run(inputs, out)
