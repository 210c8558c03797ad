"""Choosing the next token."""

from __future__ import annotations

import numpy as np

from step3_hetero.backends.reference.arrays import Float, Int32
from step3_hetero.backends.reference.attention import softmax


def sample(
    logits: Float,
    temperature: Float,
    top_k: Int32,
    top_p: Float,
    uniform: Float,
    *,
    banned: int = -1,
) -> Int32:
    """Choose one id a row: the largest logit at temperature 0, else by the row's uniform draw.

    Shapes: logits (rows, vocab), the others (rows,) -> (rows,) int32.

    The draw walks the cumulative sums of the kept probabilities in falling order, so that the same
    draw gives the same token on every vendor unless it lies within rounding of a boundary. Id
    ``banned`` is never chosen.

    Source: Holtzman et al. 2020 (top-p); inverse transform sampling.

    >>> one = np.ones(1)
    >>> sample(np.array([[0.0, 2.0, 2.0]]), 0 * one, np.zeros(1, np.int32), one, one / 2)
    array([1], dtype=int32)
    """
    chosen = np.zeros(len(logits), np.int32)
    for row, raw in enumerate(logits):
        values = raw.astype(np.float64)
        if banned >= 0:
            values[banned] = -np.inf
        if temperature[row] == 0:
            chosen[row] = int(np.argmax(values))
        else:
            wide = (values - values.max()) / temperature[row]
            chosen[row] = _draw(wide, int(top_k[row]), float(top_p[row]), float(uniform[row]))
    return chosen


def _draw(logits: Float, top_k: int, top_p: float, uniform: float) -> int:
    p = softmax(logits)
    order = np.argsort(-p, kind="stable")[: top_k or None]
    cumulative = np.cumsum(p[order])
    kept = int(np.searchsorted(cumulative, top_p * (1 - 1e-12))) + 1 if top_p < 1 else len(order)
    cumulative = cumulative[:kept]
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    possible = int(np.count_nonzero(p[order[: len(cumulative)]]))
    return int(order[min(place, possible - 1)])
