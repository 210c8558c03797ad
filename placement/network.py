"""What crosses between attention and FFN, and how long it takes: per direction, hop by hop.

Cards of one vendor speak over their own NICs. Between vendors, and where a card has no NIC, a row
goes card -> host memory -> the server's host NICs, shared by its cards -> host memory -> card. Each
hop starts when the one before has ended, so the seconds of a message are the sum of its hops, while
a link is busy for its own hop only; NICs carry both directions at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from step3_hetero.placement.catalogue import BITS_PER_BYTE, GIGA, Card, Server
from step3_hetero.placement.workload import ELEMENT_BYTES, Workload
from step3_hetero.specs import FP8_BLOCK

CARD, HOST = "card", "host"
"""The two kinds of wire: the cards' own NICs, or the servers' host NICs."""

ASSUMED_PCIE_BYTES_PER_S = 20e9
"""Where the catalogue has no PCIe rate: the one of the host-bounce estimate in docs/calibration.md.

Unlike the host NICs it is assumed, and the plan says so: a hop over the NIC that eight cards share
is several times as long.
"""

SCALE_BYTES = 4
ID_BYTES = 4
ROUTE_WEIGHT_BYTES = 2


@dataclass(frozen=True, slots=True)
class Wire:
    """The way between two kinds of card, per byte that one card sends or takes."""

    kind: str
    message_s_per_byte: float  # all hops
    busy_s_per_byte: float  # the slowest hop


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
        s_per_byte = 1 / min(a.nic_bytes_per_s, b.nic_bytes_per_s)
        return Wire(CARD, s_per_byte, s_per_byte)
    missing = [figure for card in (a, b) for figure in missing_figures(card)]
    if missing:
        why = f"{a.name} and {b.name} meet only over host NICs; not known: "
        return NoWire(why + ", ".join(dict.fromkeys(missing)))
    hops = [1 / _pcie(a), 1 / min(host_share(a.server), host_share(b.server)), 1 / _pcie(b)]
    return Wire(HOST, sum(hops), max(hops))


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
    """Return the seconds of one message over its hops, one after another.

    From an H800 over 20 GB/s of PCIe, one 200 Gb/s NIC and PCIe again: 128 rows of 7168 bytes out
    and twice that back.

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
