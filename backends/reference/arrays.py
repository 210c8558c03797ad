"""Array types, a kernel's two dtypes (the activation's and that of its sums), and the sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Float = npt.NDArray[Any]
"""float64, float32 or ml_dtypes.bfloat16."""

Int32 = npt.NDArray[np.int32]

NAMED = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the dtype of a name, ml_dtypes' own included."""
    return NAMED[name] if name in NAMED else np.dtype(name)


def widen(x: Float) -> Float:
    """Return x in promote_types(dtype, float32): the dtype in which every kernel here computes."""
    return x.astype(np.float64 if x.dtype == np.float64 else np.float32, copy=False)


_IN_ORDER: ContextVar[bool] = ContextVar("in_order", default=False)

CHUNK = 1 << 16
"""Products held at a time while they are added one after the other: they stay in the cache."""


@contextmanager
def in_order() -> Iterator[None]:
    """Add the terms of every sum and matrix product one after the other.

    NumPy and its BLAS add in blocks, which rounds less than the plain loop that a kernel may be:
    what rounding explains is told by the plain loop.
    """
    token = _IN_ORDER.set(True)
    try:
        yield
    finally:
        _IN_ORDER.reset(token)


def product(a: Float, b: Float) -> Float:
    """Return a @ b.

    Shapes: a (m, k), b (k, n) -> (m, n).

    >>> with in_order():
    ...     product(np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]]))
    array([[11.]])
    """
    if not _IN_ORDER.get():
        out: Float = a @ b
        return out
    out = np.zeros((len(a), b.shape[1]), np.promote_types(a.dtype, b.dtype))
    wide = max(1, CHUNK // (16 * max(1, len(a))))
    for start in range(0, b.shape[1], wide):
        columns = slice(start, start + wide)
        out[:, columns] = _summed(a, b[:, columns])
    return out


def _summed(a: Float, b: Float) -> Float:
    """Return a @ b, each sum in the order of its terms."""
    out = np.zeros((len(a), b.shape[1]), np.promote_types(a.dtype, b.dtype))
    step = max(1, CHUNK // max(1, out.size))
    for start in range(0, len(b), step):
        k = slice(start, start + step)
        terms = np.empty((len(b[k]) + 1, *out.shape), out.dtype)  # k first: added in its order
        terms[0] = out
        np.multiply(a.T[k, :, None], b[k, None, :], out=terms[1:])
        out = np.add.reduce(terms, axis=0)
    return out


def total(x: Float) -> Float:
    """Return the sum over the last axis, which stays with length 1.

    Shapes: x (..., n) -> (..., 1).

    >>> with in_order():
    ...     total(np.array([1.0, 2.0]))
    array([3.])
    """
    if not _IN_ORDER.get():
        out: Float = x.sum(axis=-1, keepdims=True)
        return out
    rows = np.ascontiguousarray(np.moveaxis(x, -1, 0)).reshape(x.shape[-1], -1, 1)
    wide = np.concatenate([rows, np.zeros_like(rows)], axis=-1)  # two columns: never one long sum
    summed: Float = np.add.reduce(wide, axis=0)[:, 0].reshape(*x.shape[:-1], 1)
    return summed


def mean(x: Float) -> Float:
    """Return the mean over the last axis, which stays with length 1.

    Shapes: x (..., n) -> (..., 1).
    """
    out: Float = total(x) / x.dtype.type(x.shape[-1])
    return out
