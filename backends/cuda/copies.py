"""Copies between host and card: pinned memory, streams of their own, events with a deadline.

Written for cards and never run on one; tests/cuda/test_copies.py holds the order of the calls.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from step3_hetero.backend import Event
from step3_hetero.errors import TransportTimeout

POLL_S = 20e-6
"""Between two looks at an event: a transfer of a layer's activations takes several times that."""

SPIN_S = 1e-3
"""So long an event is looked at without a pause: a sleep costs more than a small copy."""

FETCH_S = 60.0
"""How long ``fetched`` waits for everything before it: a prompt's whole step takes seconds."""


class CopyEvent(Event):
    """The end of everything that a stream holds; ``keep`` lives until then."""

    def __init__(self, stream: Any, keep: Any = None) -> None:
        self.event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it without
        self.event.record(stream)
        self.keep = keep

    def wait(self, deadline_s: float | None = None) -> None:
        """Block until done; see ``backend.Event``."""
        if deadline_s is None:
            self.event.synchronize()
        else:
            self._poll(deadline_s)
        self.keep = None

    def _poll(self, deadline_s: float) -> None:
        start = time.monotonic()
        while not self.event.query():
            waited = time.monotonic() - start
            if waited > deadline_s:
                raise TransportTimeout(f"a copy did not end within {deadline_s:g} s")
            if waited > SPIN_S:
                time.sleep(POLL_S)


class Copies:
    """A card's copies, each way on a stream of its own: the kernels behind them need not wait."""

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self._streams: dict[str, Any] = {}

    def inward(self, source: Tensor, out: Tensor) -> CopyEvent:
        """Start copying ``source``, on the host, into ``out``.

        What is queued before may still read ``out``; what is queued afterwards sees the copy.
        """
        current, stream = torch.cuda.current_stream(self.place), self._stream("inward")
        stream.wait_stream(current)
        event = self._start(stream, source, out, keep=source)
        out.record_stream(stream)
        current.wait_event(event.event)
        return event

    def outward(self, x: Tensor, target: Tensor) -> CopyEvent:
        """Start copying ``x`` into ``target``, on the host, once it is computed.

        ``x`` must not be overwritten before the event; kernels that do not touch it run on.
        """
        stream = self._stream("outward")
        stream.wait_stream(torch.cuda.current_stream(self.place))
        event = self._start(stream, x, target, keep=(x, target))
        x.record_stream(stream)
        return event

    def _start(self, stream: Any, source: Tensor, target: Tensor, keep: Any) -> CopyEvent:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return CopyEvent(stream, keep)

    def _stream(self, way: str) -> Any:
        if way not in self._streams:
            self._streams[way] = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self._streams[way]

    def fetched(self, x: Tensor) -> Tensor:
        """Return a copy of ``x`` in page-locked memory, of which torch keeps what is given back.

        Raises:
            TransportTimeout: the card was not done with ``x`` in a minute.
        """
        held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        held.copy_(x, non_blocking=True)
        CopyEvent(torch.cuda.current_stream(self.place)).wait(FETCH_S)
        return held

    def placed(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of host tensor ``x`` on the card, by way of page-locked memory of its own.

        Returns before it is there; torch keeps the page-locked block until then. ``x`` may be
        written over at once, page-locked or not: ``pin_memory`` would copy only what is not.
        """
        held = torch.empty(x.shape, dtype=dtype, pin_memory=True)
        held.copy_(x)
        return held.to(self.place, non_blocking=True)


def pinned(nbytes: int, place: torch.device) -> npt.NDArray[np.uint8]:
    """Return page-locked host memory for a card; plain memory where the card is interpreted."""
    buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=place.type == "cuda")
    held: npt.NDArray[np.uint8] = buffer.numpy()
    return held
