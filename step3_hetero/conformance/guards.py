"""Sentinels: an array as a slice of a larger one, whose rows around it must stay as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from step3_hetero.backend import Array, Device
from step3_hetero.conformance.tolerance import same_bits
from step3_hetero.specs import HostArray

ALIGNMENT = 512
"""Guard rows fill a multiple of this many bytes, so that the slice is aligned as an array is."""

SENTINEL_INTEGER = 2**30
"""Used as an index it is out of every array."""


@dataclass(frozen=True)
class Guarded:
    """A device array between guard rows; ``view`` is what a kernel gets."""

    whole: Array
    view: Array
    before: HostArray
    guard: int

    def disturbed(self, device: Device) -> bool:
        """Say whether a guard row has changed."""
        after = device.to_host(self.whole)
        rows = len(self.before) - self.guard
        ends = (slice(0, self.guard), slice(rows, None))
        return any(not same_bits(after[end], self.before[end]) for end in ends)


def guarded(device: Device, x: HostArray) -> Guarded:
    """Bring ``x`` (at least one axis) into device memory between rows of NaN."""
    row_bytes = max(1, math.prod(x.shape[1:])) * x.dtype.itemsize
    guard = ALIGNMENT // math.gcd(ALIGNMENT, row_bytes)
    whole = np.empty((len(x) + 2 * guard, *x.shape[1:]), x.dtype)
    whole[:] = _sentinel(x.dtype)
    whole[guard : guard + len(x)] = x
    placed = device.from_host(whole)
    return Guarded(placed, placed[guard : guard + len(x)], whole, guard)


def _sentinel(dtype: np.dtype[Any]) -> float | int:
    if dtype.kind in "iu":
        return min(SENTINEL_INTEGER, int(np.iinfo(dtype).max))
    return float("nan")
