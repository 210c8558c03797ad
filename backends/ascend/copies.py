"""Copies between host and card: pinned memory, and events that can be waited for with a deadline.

Written for cards and never run on one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from step3_hetero.backend import Event
from step3_hetero.backends.ascend import driver
from step3_hetero.backends.torch_common.arrays import to_torch
from step3_hetero.errors import TransportTimeout

POLL_S = 0.0002
"""Pause between two looks at an event that has a deadline."""

PIECE_BYTES = 1 << 20
"""One piece of a large copy: some forty microseconds of a PCIe link of 25 GB/s (not measured)."""

COPY_S = 60.0
"""Deadline of one piece: a million times what it takes."""


class NpuEvent(Event):
    """The point that a device's queue had reached when this was made; ``keep`` lives until then.

    ``what`` ends there: it is named when the deadline passes. The queue is that of ``place``: which
    device a thread has as its current one says nothing of where an array lies.
    """

    def __init__(self, place: torch.device, keep: Any = None, what: str = "a copy") -> None:
        npu = driver.module()
        self._event = npu.Event()
        self._event.record(npu.current_stream(place))
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


class Staging:
    """Two pinned buffers through which large arrays pass in pieces.

    While the card moves one piece the host fills, or empties, the other buffer: pageable memory
    would be copied whole before the first byte moves.
    """

    def __init__(self, piece_bytes: int = PIECE_BYTES) -> None:
        self.buffers = [to_torch(pinned(piece_bytes)) for _ in range(2)]
        self.piece_bytes = piece_bytes

    def copy_in(self, host: Tensor, out: Tensor) -> None:
        """Copy a contiguous host array into a contiguous array of the device; wait for the end.

        Raises:
            TransportTimeout: a piece did not arrive.
        """
        source, target = as_bytes(host), as_bytes(out)
        pending: list[NpuEvent | None] = [None, None]
        for number, piece in self._pieces(len(source)):
            buffer = self._free(number, pending)[: piece.stop - piece.start]
            buffer.copy_(source[piece])
            target[piece].copy_(buffer, non_blocking=True)
            pending[number % 2] = NpuEvent(out.device, keep=buffer)
        self._wait(pending)

    def copy_out(self, x: Tensor, host: Tensor) -> None:
        """Copy a contiguous array of the device into a contiguous host array; wait for the end.

        Raises:
            TransportTimeout: a piece did not arrive.
        """
        source, target = as_bytes(x), as_bytes(host)
        started: list[tuple[slice, Tensor, NpuEvent]] = []
        for number, piece in self._pieces(len(source)):
            if len(started) == len(self.buffers):
                _arrived(*started.pop(0), target)
            buffer = self.buffers[number % 2][: piece.stop - piece.start]
            buffer.copy_(source[piece], non_blocking=True)
            started.append((piece, buffer, NpuEvent(x.device)))
        for piece, buffer, event in started:
            _arrived(piece, buffer, event, target)

    def _pieces(self, nbytes: int) -> Iterator[tuple[int, slice]]:
        starts = range(0, nbytes, self.piece_bytes)
        return enumerate(slice(a, min(a + self.piece_bytes, nbytes)) for a in starts)

    def _free(self, number: int, pending: list[NpuEvent | None]) -> Tensor:
        event = pending[number % 2]
        if event is not None:
            event.wait(COPY_S)
        return self.buffers[number % 2]

    @staticmethod
    def _wait(pending: list[NpuEvent | None]) -> None:
        for event in pending:
            if event is not None:
                event.wait(COPY_S)


def _arrived(piece: slice, buffer: Tensor, event: NpuEvent, target: Tensor) -> None:
    event.wait(COPY_S)
    target[piece].copy_(buffer)


def as_bytes(x: Tensor) -> Tensor:
    """Return a contiguous array's bytes. Shapes: -> (nbytes,) uint8."""
    return x.reshape(-1).view(torch.uint8)
