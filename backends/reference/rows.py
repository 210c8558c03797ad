"""Moving rows about."""

from __future__ import annotations

import numpy as np

from step3_hetero.backends.reference.arrays import Float, Int32


def merge_rows(x: Float, rows: Float, index: Int32) -> Float:
    """Return a copy of ``x`` whose row index[i] is rows[i]; index -1 is skipped.

    Shapes: x (tokens, hidden), rows (n, hidden), index (n,) -> (tokens, hidden), dtype of x.

    >>> merge_rows(np.zeros((3, 1)), np.ones((2, 1)), np.array([2, -1], np.int32)).ravel()
    array([0., 0., 1.])
    """
    out = x.copy()
    kept = index >= 0
    out[index[kept]] = rows[kept].astype(x.dtype)
    return out


def select_rows(x: Float, rows: Int32) -> Float:
    """Return row rows[i] of ``x``, as a copy.

    Shapes: x (tokens, n), rows (k,) -> (k, n).

    >>> select_rows(np.array([[1.0], [2.0]]), np.array([1], np.int32))
    array([[2.]])
    """
    chosen: Float = x[rows]
    return chosen


def concat(*parts: Float) -> Float:
    """Return the arrays one after another along their first axis, as a copy.

    >>> concat(np.zeros((1, 1)), np.ones((1, 1))).ravel()
    array([0., 1.])
    """
    return np.concatenate(parts)
