"""What crosses between attention and FFN, and how long it takes: per direction, hop by hop.

Cards of one vendor speak over their own NICs. Between vendors, and where a card has no NIC, a row
goes card -> host memory -> the server's host NICs, shared by its cards -> host memory -> card:
three hops. A message goes in pieces of ``PIECE_BYTES``, each of which takes its next hop as soon as
it is there: the first takes the sum of the hops, every later one adds the slowest (decision 0015).
A link is busy for its own hop only; NICs carry both directions at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from step3_hetero.placement.catalogue import BITS_PER_BYTE, GIGA, Card, Server
from step3_hetero.placement.workload import ELEMENT_BYTES, Workload
from step3_hetero.specs import FP8_BLOCK
from step3_hetero.transport.base import PIECE_BYTES, Channel
from step3_hetero.transport.tcp import TcpChannel, TcpTransport

EDGES = TcpTransport.name
"""The transport of every edge that is planned: the only stable one between hosts."""

CARD, HOST = "card", "host"
"""The two kinds of wire: the cards' own NICs, or the servers' host NICs."""

ASSUMED_PCIE_BYTES_PER_S = 20e9
"""Where the catalogue has no PCIe rate: the one of the host-bounce estimate in docs/planner.md.

Unlike the host NICs it is assumed, and the plan says so: a hop over the NIC that eight cards share
is several times as long.
"""

SCALE_BYTES = 4
ID_BYTES = 4
ROUTE_WEIGHT_BYTES = 2


Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Hop:
    """One part of the way, as one card has it."""

    name: str
    s_per_byte: float


@dataclass(frozen=True, slots=True)
class Wire:
    """The way between two kinds of card, per byte that one card sends or takes."""

    kind: str
    message_s_per_byte: float  # all hops
    busy_s_per_byte: float  # the slowest hop
    hidden_s_per_byte: float = 0.0
    """What a byte behind the first piece takes less, for other hops go on meanwhile."""
    hops: tuple[Hop, ...] = field(default=(), compare=False)

    @property
    def slowest(self) -> str:
        """Return the name of the hop that binds a long message."""
        return max(self.hops, key=lambda hop: hop.s_per_byte).name

    def message_s(self, nbytes: float) -> float:
        """Return the seconds of one message over all hops.

        >>> wire = Wire(HOST, 3.0, 1.5, hidden_s_per_byte=1.5)
        >>> [wire.message_s(pieces * PIECE_BYTES) / PIECE_BYTES for pieces in (1, 2, 4)]
        [3.0, 4.5, 7.5]
        """
        behind = max(0.0, nbytes - PIECE_BYTES)
        return nbytes * self.message_s_per_byte - behind * self.hidden_s_per_byte

    def row_s(self, rows: Seconds, out_bytes: float, back_bytes: float) -> Seconds:
        """Return the seconds there and back of each of ``rows`` rows, each way in one message."""
        total = np.zeros_like(rows)
        for row_bytes in (out_bytes, back_bytes):
            behind = np.maximum(rows - PIECE_BYTES / row_bytes, 0) / np.maximum(rows, 1e-300)
            total += row_bytes * (self.message_s_per_byte - behind * self.hidden_s_per_byte)
        return total

    def rows(self, seconds: Seconds, out_bytes: float, back_bytes: float) -> Seconds:
        """Return how many rows go there and back within ``seconds``, each way in one message.

        The inverse of `message_s`, whose straight parts each hold from a number of whole pieces on;
        the one that allows the most is the one that applies, for none lies below the curve.
        """
        each = self.message_s_per_byte * (out_bytes + back_bytes)
        most, longer = seconds / each, sorted((out_bytes, back_bytes), reverse=True)
        for cut in (longer[:1], longer):  # the ways on which a message is longer than a piece
            late_s = seconds - self.hidden_s_per_byte * PIECE_BYTES * len(cut)
            most = np.maximum(most, late_s / (each - self.hidden_s_per_byte * sum(cut)))
        return np.asarray(most)


@dataclass(frozen=True, slots=True)
class NoWire:
    """Why there is no wire: a figure that is missing, or a pair that is excluded."""

    reason: str


def a2f_bytes(workload: Workload, dtype: str) -> float:
    """Return the bytes of one token from attention to one FFN instance.

    Eight-bit rows carry one fp32 scale for each 128 columns; MoE tokens their experts.
    """
    row = workload.hidden * ELEMENT_BYTES[dtype]
    scales = -(-workload.hidden // FP8_BLOCK) * SCALE_BYTES if ELEMENT_BYTES[dtype] == 1 else 0
    top_k = max((part.top_k for part in workload.parts), default=0)
    return row + scales + top_k * (ROUTE_WEIGHT_BYTES + ID_BYTES)


def f2a_bytes(workload: Workload) -> float:
    """Return the bytes of one token from one FFN instance: partial sums in bf16."""
    return workload.hidden * ELEMENT_BYTES["bf16"]


def wire_between(a: Card, b: Card) -> Wire | NoWire:
    """Return the wire between two cards of different servers, the same in both directions."""
    if a.vendor == b.vendor and a.nic_bytes_per_s and b.nic_bytes_per_s:
        slower = min(a, b, key=lambda card: card.nic_bytes_per_s or 0.0)
        s_per_byte = 1 / min(a.nic_bytes_per_s, b.nic_bytes_per_s)
        hops = (Hop(f"the NIC of {slower.name}", s_per_byte),)
        return Wire(CARD, s_per_byte, s_per_byte, hops=hops)
    missing = [figure for card in (a, b) for figure in missing_figures(card)]
    if missing:
        why = f"{a.name} and {b.name} meet only over host NICs; not known: "
        return NoWire(why + ", ".join(dict.fromkeys(missing)))
    return bounced(a, b, TcpChannel)


def bounced(a: Card, b: Card, channel: type[Channel]) -> Wire:
    """Return the wire over host NICs whose figures are known, carried by such a channel."""
    slower = min(a, b, key=lambda card: host_share(card.server))
    out, wire, into = 1 / _pcie(a), 1 / host_share(slower.server), 1 / _pcie(b)
    hops = (
        Hop(f"PCIe of {a.name}", out),
        Hop(f"the host NICs of {slower.name}", wire),
        Hop(f"PCIe of {b.name}", into),
    )
    hidden = hidden_s_per_byte(out, wire, into, channel)
    return Wire(HOST, out + wire + into, max(out, wire, into), hidden, hops)


def hidden_s_per_byte(out: float, wire: float, into: float, channel: type[Channel]) -> float:
    """Return what a byte behind the first piece takes less than all hops, one after the other.

    A channel that sends in pieces has the sender's copy go on beside the wire, one that lands them
    the receiver's copy: of hops side by side only the slowest counts.

    >>> from step3_hetero.transport.shm import ShmChannel
    >>> [hidden_s_per_byte(1, 4, 2, channel) for channel in (TcpChannel, ShmChannel, Channel)]
    [3, 1, 0.0]
    """
    if channel.in_pieces and channel.lands:
        return out + wire + into - max(out, wire, into)
    if channel.in_pieces:
        return min(out, wire)
    return min(wire, into) if channel.lands else 0.0


def missing_figures(card: Card) -> list[str]:
    """Return the figures that a wire over the host NICs needs of a card and has not."""
    server = card.server
    figures = {
        "server.host_nics": server.host_nics,
        "server.host_nic_gbit_per_s": server.host_nic_bytes_per_s,
    }
    return [f"cards.{card.name}.{key}" for key, value in figures.items() if not value]


def host_share(server: Server) -> float:
    """Return the bytes per second, each way, of the host NICs that fall to one card."""
    assert server.host_nics and server.host_nic_bytes_per_s, "asked after missing_figures"
    return server.host_nics * server.host_nic_bytes_per_s / server.cards


def _pcie(card: Card) -> float:
    return card.server.pcie_bytes_per_s or ASSUMED_PCIE_BYTES_PER_S


def with_host_nics(
    card: Card, gbit_per_s: float | None, nics: int | None, pcie_gbytes_per_s: float | None = None
) -> Card:
    """Return a card whose server has these host NICs and PCIe; None: the catalogue's figure."""
    server = card.server
    rate = server.host_nic_bytes_per_s if gbit_per_s is None else gbit_per_s * GIGA / BITS_PER_BYTE
    count = server.host_nics if nics is None else nics
    pcie = server.pcie_bytes_per_s if pcie_gbytes_per_s is None else pcie_gbytes_per_s * GIGA
    server = replace(server, host_nics=count, host_nic_bytes_per_s=rate, pcie_bytes_per_s=pcie)
    return replace(card, server=server)


def message_s(nbytes: float, hops_bytes_per_s: Sequence[float]) -> float:
    """Return the seconds of one message over its hops, one after another: a copy not cut.

    From an H800 over 20 GB/s of PCIe, one 200 Gb/s NIC and PCIe again: 128 rows of 7168 bytes out
    and twice that back. In pieces it is 232 us (`Wire.message_s`).

    >>> bounced = [20e9, 25e9, 20e9]
    >>> round((message_s(917_504, bounced) + message_s(1_835_008, bounced)) * 1e6)
    385
    """
    return sum(nbytes / rate for rate in hops_bytes_per_s)


def shared_nic_s(nbytes: float, cards: int, nics: int, nic_bytes_per_s: float) -> float:
    """Return how long ``cards`` that each send ``nbytes`` keep their server's NICs busy.

    >>> round(shared_nic_s(1.8e6, 8, 1, 400e9 / 8) * 1e6)
    288
    """
    return nbytes * cards / (nics * nic_bytes_per_s)


def stage_budget_s(tpot_s: float, stages: int) -> float:
    """Return the seconds of one stage through all layers.

    >>> round(stage_budget_s(0.050, 3) * 1e3, 1)
    16.7
    """
    return tpot_s / stages
