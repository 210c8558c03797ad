"""What a device makes of a batch, kept while the batch comes by at one layer after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from step3_hetero.backend import BatchMeta

KEPT = 8
"""Micro-batches take turns at every layer; a plan has up to four of them."""

B = TypeVar("B")


class Recent(Generic[B]):
    """Makes a batch's form once, and keeps the last few."""

    def __init__(self, make: Callable[[BatchMeta], B]) -> None:
        self._make = make
        self._kept: deque[tuple[BatchMeta, B]] = deque(maxlen=KEPT)

    def of(self, meta: BatchMeta) -> B:
        """Return the form of ``meta``, the same one for the same object."""
        for known, form in self._kept:
            if known is meta:
                return form
        form = self._make(meta)
        self._kept.append((meta, form))
        return form
