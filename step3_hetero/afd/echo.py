"""The way to a role, measured: frames there and back, before any contract."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from step3_hetero.afd.link import Link, Message
from step3_hetero.afd.messages import Kind
from step3_hetero.errors import EdgeMismatch
from step3_hetero.specs import HostArray

ECHO_S = 10.0
"""How long either side waits for the other's next frame."""

MOST_ECHOES = 10_000
"""Frames that one connection is answered."""

SMALL_BYTES = 64
TIMES_SMALL, TIMES_LARGE = 200, 20
WARM = 3
"""Round trips that are not counted: buffers grow, pages are touched, TCP opens its window."""


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    """A link as measured, each direction.

    ``message_s`` is half a small frame's round trip, ``bytes_per_s`` what a large frame's bytes
    add to it, ``nbytes`` their number.
    """

    message_s: float
    bytes_per_s: float
    nbytes: int


def echo_back(link: Link, message: Message) -> None:
    """Send back each frame as it came, until the peer closes.

    Raises:
        RoleLost, TransportTimeout: the peer has gone, or says nothing for `ECHO_S`.
        EdgeMismatch: it says something else.
    """
    for _ in range(MOST_ECHOES):
        if message.kind != Kind.ECHO:
            raise EdgeMismatch(f"{link.name} said {message.kind} while it measures")
        link.send(Kind.ECHO, message.seq, arrays=message.arrays)
        message = link.receive(ECHO_S)


def measure_link(link: Link, nbytes: int) -> LinkMeasured:
    """Measure the way to a role with frames of ``nbytes`` there, and as many back.

    Raises:
        RoleLost, TransportTimeout: it went, or does not answer.
        EdgeMismatch: it does not echo now; its own words.
    """
    small = _round_trip_s(link, SMALL_BYTES, TIMES_SMALL)
    large = _round_trip_s(link, nbytes, TIMES_LARGE)
    added_s = max(large - small, 1e-9)
    return LinkMeasured(small / 2, 2 * (nbytes - SMALL_BYTES) / added_s, nbytes)


def _round_trip_s(link: Link, nbytes: int, times: int) -> float:
    payload: HostArray = np.zeros(nbytes, np.uint8)
    took = []
    for seq in range(WARM + times):
        start = time.perf_counter()
        link.send(Kind.ECHO, seq, arrays={"x": payload})
        answer = link.wants(Kind.ECHO, ECHO_S)
        took.append(time.perf_counter() - start)
        if answer.seq != seq or answer.arrays["x"].nbytes != nbytes:
            raise EdgeMismatch(
                f"{link.name} echoed {answer.arrays['x'].nbytes:,} bytes of frame {answer.seq}, "
                f"expected {nbytes:,} of {seq}"
            )
    return statistics.median(took[WARM:])
