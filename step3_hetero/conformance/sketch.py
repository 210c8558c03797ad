"""Results in eight numbers: enough to estimate how far two devices are apart without either."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from step3_hetero.conformance.case import seeded
from step3_hetero.specs import HostArray

PROJECTIONS = 8
"""The estimate's relative standard deviation is sqrt(2 / 8): a half."""

SLICE = 1 << 20
"""Values taken at a time."""


def sketch_of(name: str, got: HostArray, want: HostArray) -> list[float]:
    """Return random projections of the error, relative to the size of the exact result.

    Shapes: got, want alike. The signs are drawn from ``name``, the same on every machine, so that
    the squared distance of two sketches estimates the squared distance of the results (Johnson and
    Lindenstrauss 1984). Integers count as they are; non-finite places count as agreed.
    """
    g, w = (np.nan_to_num(x.astype(np.float64), nan=0, posinf=0, neginf=0).ravel()
            for x in (got, want))  # fmt: skip
    scale = float(np.abs(w).max(initial=0.0)) or 1.0
    size = float(np.sqrt(np.sum((w / scale) ** 2))) or 1.0
    rng = seeded(name)
    sums = np.zeros(PROJECTIONS)
    for start in range(0, g.size, SLICE):
        part = (g[start : start + SLICE] - w[start : start + SLICE]) / scale / size
        signs = rng.integers(0, 2, (PROJECTIONS, part.size), dtype=np.int8) * 2 - 1
        sums += signs @ part
    return [float(x) for x in sums]


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the estimated squared distance of two results over the squared size of the exact one.

    >>> distance([1.0, 1.0], [0.0, 2.0])
    1.0
    """
    return float(np.mean((np.asarray(one) - np.asarray(other)) ** 2))
