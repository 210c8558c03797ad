"""How long bytes take from one device to another where a link is emulated."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from step3_hetero.backend import Device
from step3_hetero.config import Emulate
from step3_hetero.emulate.device import EmulatedDevice


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of an edge. Its latency is spent beside the bytes, not on them.

    ``corrupt_every``, ``cut_every``: of the frames with parts that come, which one arrives damaged,
    and after which one the connection is cut; 0 never.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    corrupt_every: int = 0
    cut_every: int = 0

    @classmethod
    def between(cls, *ends: Emulate | None) -> Link:
        """Return the link of two ends: latencies add up, else the worse end is the link's."""
        asked = [end for end in ends if end is not None]

        def worst(key: str, none: float) -> Any:
            return min((v for end in asked if (v := getattr(end, key)) is not None), default=none)

        return cls(
            sum(end.latency_s for end in asked),
            worst("bytes_per_s", math.inf),
            worst("corrupt_every", 0),
            worst("cut_every", 0),
        )

    @property
    def slows(self) -> bool:
        """Say whether anything takes longer over it."""
        return self.latency_s > 0 or math.isfinite(self.bytes_per_s)

    @property
    def harms(self) -> bool:
        """Say whether anything is done to frames."""
        return bool(self.corrupt_every or self.cut_every)

    def wire_s(self, nbytes: int) -> float:
        """Return the seconds for which so many bytes keep the wire busy."""
        return nbytes / self.bytes_per_s


def travel(source: Device, target: Device, nbytes: int) -> None:
    """Take the time that an edge's bytes take between two devices of one process."""
    ends = [d.card.asked for d in (source, target) if isinstance(d, EmulatedDevice)]
    link = Link.between(*ends)
    if link.slows:
        time.sleep(link.latency_s + link.wire_s(nbytes))
