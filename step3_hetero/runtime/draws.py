"""Counter-based draws: no state to lose, the same number on every machine."""

from __future__ import annotations

import numpy as np


def uniform(seed: int, choice: int, position: int) -> float:
    """Return the draw in [0, 1) for one position of one choice of a request.

    Source: Salmon et al. 2011 (Philox), keyed by (seed, choice), counted by position.

    >>> uniform(7, 0, 12) == uniform(7, 0, 12) != uniform(7, 0, 13)
    True
    """
    key = np.array([seed & (2**64 - 1), choice], np.uint64)
    counter = np.array([position, 0, 0, 0], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())
