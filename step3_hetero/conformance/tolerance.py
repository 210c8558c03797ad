"""How far a result may be from the exact one: as far as the reference's own rounding explains.

``want`` is the reference in float64 on the same, already quantised inputs, ``rounded`` the
reference in the case's dtype: once with sums in blocks, as its library adds, once term after term,
as the plainest loop does. What separates them is the rounding that any honest kernel makes; no
number here is tuned. Infinities and NaN are compared as such first and take no part in errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from step3_hetero.specs import HostArray

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

ROUNDOFF = {"bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
"""Unit roundoff: the largest relative error of one rounding to nearest."""

FACTOR = 4.0
"""A kernel may make four times the squared error of the reference: twice its size."""


@dataclass(frozen=True)
class Judged:
    """One output beside the exact result.

    Shapes: row_error, row_bound (...,) for a result of shape (..., n); element_error,
    element_bound (..., n).
    """

    row_error: Float64
    row_bound: Float64
    element_error: Float64
    element_bound: Float64


def row_nmse(got: Float64, want: Float64) -> Float64:
    """Return squared error over squared size for each row of the last axis.

    Shapes: got, want (..., n) -> (...,). 0 where both rows are zero, infinite where only ``want``
    is. Per row: over a whole tensor one wrong row among 12,288 stays under a bfloat16 bound.

    >>> row_nmse(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[3.0, 5.0], [0.0, 0.0]])).round(4)
    array([0.0294, 0.    ])
    """
    scale = np.max(np.abs(want), axis=-1, keepdims=True, initial=0)
    scale = np.where(scale > 0, scale, 1)  # squares of 1e-200 and of 1e200 are out of range
    error = (((got - want) / scale) ** 2).sum(-1)
    size = ((want / scale) ** 2).sum(-1)
    return np.where(size > 0, error / np.where(size > 0, size, 1), np.where(error > 0, np.inf, 0))


def judge(got: HostArray, want: HostArray, rounded: Sequence[HostArray]) -> Judged:
    """Hold a result of real numbers against the exact one; non-finite places count as agreed.

    So do rows that are zero in ``want``: they have no size to err by, and are asked to be zero.

    Shapes: all (..., n); ``rounded`` are the reference's results in the case's dtype. A row is
    allowed FACTOR times the reference's squared error in that row, or in the mean row of the case
    if that is more, plus the dtype's squared roundoff. An element is allowed the same multiple of
    the case's largest relative error, its size being that of the element and its row's root mean
    square together.
    """
    roundoff = ROUNDOFF[rounded[0].dtype.name]
    finite = np.isfinite(want)
    for x in (got, *rounded):
        finite &= np.isfinite(x.astype(np.float64))
    g, w, *owns = (np.where(finite, x.astype(np.float64), 0.0) for x in (got, want, *rounded))
    size = np.abs(w) + _root_mean_square(w)
    unit = np.where(size > 0, size, 1)
    own_rows = np.maximum.reduce([_finite_or_zero(row_nmse(o, w)) for o in owns])
    own_worst = max(np.max(np.abs(o - w) / unit, initial=0.0) for o in owns)
    mean = own_rows.mean() if own_rows.size else 0.0
    sized = (w != 0).any(-1)
    return Judged(
        np.where(sized, row_nmse(g, w), 0),
        FACTOR * np.maximum(own_rows, mean) + roundoff**2,
        np.where(sized[..., None], np.abs(g - w), 0),
        (np.sqrt(FACTOR) * own_worst + roundoff) * size,
    )


def _finite_or_zero(x: Float64) -> Float64:
    return np.where(np.isfinite(x), x, 0)


def same_bits(got: HostArray, own: HostArray) -> bool:
    """Say whether two host arrays hold the same bytes; zeros of both signs are equal."""
    if got.shape != own.shape or got.dtype != own.dtype:
        return False
    if got.dtype.kind in "iub":
        return bool(np.array_equal(got, own))
    wide = np.float64 if got.dtype == np.float64 else np.float32
    return bool(np.array_equal(got.astype(wide), own.astype(wide), equal_nan=True))


def finite_pattern(x: HostArray) -> npt.NDArray[np.int8]:
    """Return 0 for finite values, 1 and -1 for infinities, 2 for NaN.

    >>> finite_pattern(np.array([1.0, -np.inf, np.nan])).tolist()
    [0, -1, 2]
    """
    wide = x.astype(np.float64)
    pattern = np.where(np.isnan(wide), 2, np.where(np.isinf(wide), np.sign(wide), 0))
    return pattern.astype(np.int8)


def _root_mean_square(x: Float64) -> Float64:
    top = np.max(np.abs(x), axis=-1, keepdims=True, initial=0)
    unit = x / np.where(top > 0, top, 1)
    rms: Float64 = top * np.sqrt(np.mean(unit**2, axis=-1, keepdims=True)) if x.size else top
    return rms
