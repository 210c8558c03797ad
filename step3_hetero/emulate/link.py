"""How long bytes take from one device to another where a link is emulated."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from step3_hetero.backend import Device
from step3_hetero.config import Emulate
from step3_hetero.emulate.device import EmulatedDevice


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of an edge. Its latency is spent beside the bytes, not on them."""

    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    @classmethod
    def between(cls, *ends: Emulate | None) -> Link:
        """Return the link of two ends: latencies add up, the narrower end sets the rate."""
        asked = [end for end in ends if end is not None]
        rates = [end.bytes_per_s for end in asked if end.bytes_per_s is not None]
        return cls(sum(end.latency_s for end in asked), min(rates, default=math.inf))

    @property
    def slows(self) -> bool:
        """Say whether anything takes longer over it."""
        return self.latency_s > 0 or math.isfinite(self.bytes_per_s)

    def wire_s(self, nbytes: int) -> float:
        """Return the seconds for which so many bytes keep the wire busy."""
        return nbytes / self.bytes_per_s


def travel(source: Device, target: Device, nbytes: int) -> None:
    """Take the time that an edge's bytes take between two devices of one process."""
    ends = [d.card.asked for d in (source, target) if isinstance(d, EmulatedDevice)]
    link = Link.between(*ends)
    if link.slows:
        time.sleep(link.latency_s + link.wire_s(nbytes))
