"""When another code in a cache is no error: the quotient's distance from a tie against rounding.

Keys and values that a stage computes are rounded before they are quantised, so that two honest
devices may give codes that differ by one. A float32 rounding of 1e-7 then becomes a step of 1e-2,
which the reference's own error shows only where the reference's code happens to turn too. One of
its two runs is therefore made to turn every code that rounding can turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from step3_hetero.backend import Device, KVCache
from step3_hetero.conformance.tolerance import FACTOR
from step3_hetero.specs import CacheSpec, HostArray

Pair = tuple[HostArray, HostArray]
"""Keys and values of one write, each (tokens, kv_heads, head_dim)."""


class Writes:
    """Keeps what the reference writes into the caches it opens, in order: ``seen``."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.seen: list[Pair] = []

        def note(cache: KVCache, write: Callable[..., None], k: Any, v: Any, batch: Any) -> None:
            self.seen.append((k.copy(), v.copy()))
            write(k, v, batch)

        _on_write(device, note)


def turn_codes(device: Device, exact: Sequence[Pair], rounded: Sequence[Pair]) -> None:
    """Have the reference turn every code that lies within rounding of a tie to its other side.

    ``exact`` and ``rounded`` are the same writes in float64 and in the case's dtype. Within
    rounding is twice the root mean square of what separates them in a row: a kernel may err by
    FACTOR times the reference's squared error.
    """
    nudges: Iterator[Pair] = iter([
        (_nudge(k, own_k), _nudge(v, own_v))
        for (k, v), (own_k, own_v) in zip(exact, rounded, strict=True)
    ])  # fmt: skip

    def turn(cache: KVCache, write: Callable[..., None], k: Any, v: Any, batch: Any) -> None:
        write(k, v, batch)
        kept, slots = batch.meta.slots >= 0, batch.meta.slots[batch.meta.slots >= 0]
        blocks = range(cache.spec.blocks)
        moved = []
        for x, stored, nudge in zip((k, v), cache.read(blocks), next(nudges), strict=True):
            wide = x.astype(np.float32)
            code = stored.reshape(-1, *stored.shape[2:])[slots]
            side = np.sign(wide[kept] - code)  # a quotient lies between its code and the next tie
            wide[kept] += side * nudge[kept].astype(np.float32)
            moved.append(wide)
        write(*moved, batch)

    _on_write(device, turn)


def _nudge(exact: HostArray, rounded: HostArray) -> HostArray:
    """Return how far rounding may carry each row. Shapes: (..., n) -> (..., 1)."""
    squared = (rounded.astype(np.float64) - exact.astype(np.float64)) ** 2
    error: HostArray = np.sqrt(FACTOR * squared.mean(-1, keepdims=True))
    return error


def _on_write(device: Device, instead: Callable[..., None]) -> None:
    """Call ``instead`` with the cache, its own write and the operands in the place of a write."""
    opened = device.open_cache

    def open_cache(spec: CacheSpec) -> KVCache:
        cache = opened(spec)
        write = cache.write
        watched: Any = cache  # a method of one object alone, which no type can say
        watched.write = lambda k, v, batch: instead(cache, write, k, v, batch)
        return cache

    opening: Any = device
    opening.open_cache = open_cache
