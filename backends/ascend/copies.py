"""Copies between host and card: pinned memory, and events that can be waited for with a deadline.

Written for cards and never run on one.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from step3_hetero.backend import Event
from step3_hetero.backends.ascend import driver
from step3_hetero.errors import TransportTimeout

POLL_S = 0.0002
"""Pause between two looks at an event that has a deadline."""


class NpuEvent(Event):
    """The point that the device's queue had reached when this was made; ``keep`` lives until then.

    ``what`` ends there: it is named when the deadline passes.
    """

    def __init__(self, keep: Any = None, what: str = "a copy") -> None:
        self._event = driver.module().Event()
        self._event.record()
        self.keep = keep
        self.what = what

    def wait(self, deadline_s: float | None = None) -> None:
        """Block until the device has passed the point; see ``backend.Event``."""
        if deadline_s is None:
            self._event.synchronize()
        else:
            self._poll(deadline_s)
        self.keep = None

    def _poll(self, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        while not self._event.query():
            if time.monotonic() > end:
                raise TransportTimeout(
                    f"the NPU did not reach the end of {self.what} in {deadline_s:g} s"
                )
            time.sleep(POLL_S)


def pinned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Return page-locked host memory, from which the device copies without another buffer."""
    held: npt.NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return held
