"""Arrays on their way from a device to a channel: large ones in pieces, sent as they come."""

from __future__ import annotations

import math
import secrets
import threading
from collections import deque
from collections.abc import Iterator

import ml_dtypes  # noqa: F401  registers bfloat16 and float8 under their names
import numpy as np

from step3_hetero.backend import Array, Device, Event
from step3_hetero.errors import Step3HeteroError
from step3_hetero.specs import HostArray
from step3_hetero.transport.base import PIECE_BYTES, CopyFailed

WORD_BYTES = 256

WORD_S = 10.0
"""How long a device may take to copy a few bytes that wait for nothing."""

COPY_S = 60.0
"""How long a piece may take, with the kernels before it: a prompt's whole step takes seconds."""


class DeviceLost(Step3HeteroError):
    """A device copies nothing any more: whoever stands on it cannot go on."""


def check_copies(device: Device) -> None:
    """Copy a few bytes, others each time, to a device and back.

    Raises:
        DeviceLost: they did not come back as they were.
    """
    name, word = (
        device.info.name,
        np.frombuffer(bytearray(secrets.token_bytes(WORD_BYTES)), np.int32),
    )
    came = device.host_buffer(WORD_BYTES)[:WORD_BYTES].view(np.int32)
    try:
        there = device.empty(word.shape, "int32")
        device.copy_in(word, there).wait(WORD_S)
        device.copy_out(there, came).wait(WORD_S)
    except (Step3HeteroError, RuntimeError) as cause:  # torch's are RuntimeErrors
        raise DeviceLost(f"{name} is gone, it copies nothing any more: {cause}") from cause
    if not np.array_equal(came, word):
        raise DeviceLost(f"{name} is gone: what it copies is not what it was given")


def is_apart(device: Device) -> bool:
    """Say whether the host cannot read a device's memory, so that it takes copies at all."""
    return device.info.memory_domain != "host"


def is_large(nbytes: int) -> bool:
    """Say whether an array is cut: a single piece would wait for itself."""
    return nbytes > PIECE_BYTES


def pieces(nbytes: int, itemsize: int) -> Iterator[slice]:
    """Cut an array's items, laid in a row, into pieces of ``PIECE_BYTES``.

    >>> list(pieces(3 << 18, 2))
    [slice(0, 262144, None), slice(262144, 393216, None)]
    """
    step, count = PIECE_BYTES // itemsize, nbytes // itemsize
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


class Leaving(dict[str, HostArray]):
    """Arrays on the host by name, in the order in which they travel.

    Those larger than a piece may be incomplete until ``ready``, or ``wait``, has returned: their
    copies go on meanwhile, and what they are copied from must stay as it is. Once a piece has
    failed the whole has: what a late copy brings is not what was to be sent.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device
        self._is_apart = is_apart(device)
        self._nbytes = 0
        self._started: deque[tuple[int, Event]] = deque()  # where a piece begins, and its end
        self._waiting = threading.Lock()
        self._failed = ""

    def add(self, name: str, x: Array, dtype: str) -> None:
        """Fetch an array of the device, which has this dtype; start to, if it is large."""
        kind = np.dtype(dtype)
        nbytes = math.prod(x.shape) * kind.itemsize
        if self._is_apart and is_large(nbytes):
            self[name] = self._start(x, kind, nbytes)
        else:
            self[name] = self._device.to_host(x)
        self._nbytes += self[name].nbytes

    @property
    def is_pending(self) -> bool:
        """Say whether a copy has been started that nobody has waited for."""
        return bool(self._started)

    def ready(self, nbytes: int) -> None:
        """Return once the first ``nbytes`` of the arrays are there; see ``transport.base.Ready``.

        Raises:
            CopyFailed: the device did not copy them.
        """
        with self._waiting:
            while self._started and self._started[0][0] < nbytes:
                if self._failed:
                    raise CopyFailed(self._failed)
                try:
                    self._started[0][1].wait(COPY_S)
                except (Step3HeteroError, RuntimeError) as cause:  # torch's are RuntimeErrors
                    name = self._device.info.name
                    self._failed = f"{name} did not copy what is to be sent: {cause}"
                    raise CopyFailed(self._failed) from cause
                self._started.popleft()

    def wait(self) -> None:
        """Return once all is there. Raises as ``ready``."""
        self.ready(self._nbytes)

    def _start(self, x: Array, kind: np.dtype[np.generic], nbytes: int) -> HostArray:
        host: HostArray = self._device.host_buffer(nbytes)[:nbytes].view(kind)
        flat = x.reshape(-1)
        for piece in pieces(nbytes, kind.itemsize):
            event = self._device.copy_out(flat[piece], host[piece])
            self._started.append((self._nbytes + piece.start * kind.itemsize, event))
        return host.reshape(x.shape)
