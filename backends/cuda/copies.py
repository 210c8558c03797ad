"""Copies between host and card: pinned memory, and events that can be waited for with a deadline.

Written for cards and never run on one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from step3_hetero.backend import Event
from step3_hetero.errors import PlacementError, TransportTimeout

POLL_S = 20e-6
"""Between two looks at an event: a transfer of a layer's activations takes several times that."""


class CopyEvent(Event):
    """The end of everything that the current stream holds; ``keep`` lives until then."""

    def __init__(self, place: torch.device, keep: Any = None) -> None:
        self.event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it without
        self.event.record(torch.cuda.current_stream(place))
        self.keep = keep

    def wait(self, deadline_s: float | None = None) -> None:
        """Block until done; see ``backend.Event``."""
        if deadline_s is None:
            self.event.synchronize()
        else:
            self._poll(deadline_s)
        self.keep = None

    def _poll(self, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        while not self.event.query():
            if time.monotonic() > end:
                raise TransportTimeout(f"a copy did not end within {deadline_s:g} s")
            time.sleep(POLL_S)


@contextmanager
def memory_for(what: str, place: torch.device) -> Iterator[None]:
    """Say what a card was asked to hold when it cannot.

    Raises:
        PlacementError: the card's memory is full; with what was asked and what is free.
    """
    try:
        yield
    except torch.OutOfMemoryError as full:
        free, total = torch.cuda.mem_get_info(place)
        raise PlacementError(
            f"{place}: out of memory for {what}: {free:,} of {total:,} bytes free; give the role "
            "fewer stages or kv_blocks, or more cards"
        ) from full


def pinned(nbytes: int, place: torch.device) -> npt.NDArray[np.uint8]:
    """Return page-locked host memory for a card; plain memory where the card is interpreted."""
    buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=place.type == "cuda")
    held: npt.NDArray[np.uint8] = buffer.numpy()
    return held
