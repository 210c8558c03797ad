"""When another code in a cache is no error: the quotient's distance from a tie against rounding.

Keys and values that a stage computes are rounded before they are quantised, so that two honest
devices may give codes that differ by one. A float32 rounding of 1e-7 then becomes a step of 1e-2,
which the reference's own error shows only where the reference's code happens to turn too. One of
its two runs is therefore made to turn every code that rounding can turn.

Where no code turns, the whole row errs as its scale does, which is the rounding of one element, the
largest: the reference's own may be near zero by luck. The same run therefore moves every scale too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from step3_hetero.backend import Device, KVCache
from step3_hetero.conformance.tolerance import ROUNDOFF, judge
from step3_hetero.specs import CacheSpec, HostArray

Pair = tuple[HostArray, HostArray]
"""Keys and values of one write, each (tokens, kv_heads, head_dim)."""

SCALE_ROUNDING = 2 * ROUNDOFF["float32"]
"""What a scale errs by itself, relatively: its element is a float32, and so is its quotient."""


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

    It also moves every row's scale as far as rounding may carry the row's largest element. Both
    start from the exact rows, so that no rounding of the run's own stands against the move.
    ``exact`` and ``rounded`` are the same writes in float64 and in the case's dtype. Within
    rounding is as far as ``judge`` would let a row of them err.
    """
    carried: Iterator[Sequence[Pair]] = iter([
        [(x, _nudge(x, own)) for x, own in zip(want, got, strict=True)]
        for want, got in zip(exact, rounded, strict=True)
    ])  # fmt: skip

    def turn(cache: KVCache, write: Callable[..., None], k: Any, v: Any, batch: Any) -> None:
        rows = next(carried)
        write(*(x for x, _ in rows), batch)
        kept, slots = batch.meta.slots >= 0, batch.meta.slots[batch.meta.slots >= 0]
        moved = []
        for (x, nudge), stored in zip(rows, cache.read(range(cache.spec.blocks)), strict=True):
            code = stored.reshape(-1, *stored.shape[2:])[slots].astype(np.float64)
            far = x.copy()
            far[kept] = _carried(x[kept], code, nudge[kept], scaled=cache.spec.scaled)
            moved.append(far)
        write(*moved, batch)

    _on_write(device, turn)


def _carried(x: HostArray, code: HostArray, nudge: HostArray, *, scaled: bool) -> HostArray:
    """Return rows as far from ``x`` as rounding may carry them: codes turned, scales moved.

    Shapes: x, code (· scale) (tokens, kv_heads, head_dim), nudge (tokens, kv_heads, 1) -> as x.

    A quotient moves by the element's own rounding and, in proportion to its size, by that of the
    largest, which makes the scale. Moving the row as a whole then moves the scale alone.
    """
    toward_tie = np.sign(x - code)  # what is rounded lies between its code and the next tie
    if not scaled:
        turned: HostArray = x + toward_tie * nudge
        return turned
    top = np.abs(x).max(-1, keepdims=True)
    unit = np.where(top > 0, top, 1)
    turned = np.clip(x + toward_tie * nudge * (1 + np.abs(x) / unit), -top, top)
    kept: HostArray = np.where(np.abs(x) == top, x, turned)
    return kept * (1 + nudge / unit + SCALE_ROUNDING)


def _nudge(exact: HostArray, rounded: HostArray) -> HostArray:
    """Return how far rounding may carry each row: as far as ``judge`` lets a row err.

    Shapes: (..., n) -> (..., 1).
    """
    want, own = exact.astype(np.float64), rounded.astype(np.float64)
    allowed = judge(own, want, [rounded]).row_bound[..., None]
    error: HostArray = np.sqrt(allowed * (want**2).mean(-1, keepdims=True))
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
