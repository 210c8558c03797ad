"""Normalisation and the residual's addition."""

from __future__ import annotations

import numpy as np

from step3_hetero.backends.reference.arrays import Float, mean, widen


def rms_norm(x: Float, weight: Float, *, eps: float) -> Float:
    """Scale each row of ``x`` to unit root mean square, then by ``weight``.

    Shapes: x (..., n), weight (n,) -> (..., n), dtype of x.

    The mean is taken in float32 (float64 for float64), the product with ``weight`` in the dtype
    of x: the model's own code rounds before the weight, and one rounding later moves the last bit.

    Source: Zhang & Sennrich 2019, eq. 4; modeling_step3.py, Step3vRMSNorm.

    >>> rms_norm(np.array([[3.0, 4.0]], np.float32), np.ones(2, np.float32), eps=0.0).round(4)
    array([[0.8485, 1.1314]], dtype=float32)
    """
    w = widen(x)
    mean_square = mean(w * w)
    unit: Float = (w / np.sqrt(mean_square + w.dtype.type(eps))).astype(x.dtype)
    return unit * weight


def layer_norm(x: Float, weight: Float, bias: Float, *, eps: float) -> Float:
    """Shift and scale each row of ``x`` to mean 0 and variance 1, then by ``weight`` and ``bias``.

    Shapes: x (..., n), weight (n,), bias (n,) -> (..., n), dtype of x. Rounded once.

    Source: Ba et al. 2016, eq. 4; torch.nn.LayerNorm.

    >>> one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
    >>> layer_norm(np.array([[1.0, 3.0]], np.float32), one, zero, eps=0.0)
    array([[-1.,  1.]], dtype=float32)
    """
    w = widen(x)
    centred = w - mean(w)
    variance = mean(centred * centred)
    unit = centred / np.sqrt(variance + w.dtype.type(eps))
    out: Float = (unit * widen(weight) + widen(bias)).astype(x.dtype)
    return out


def add(x: Float, y: Float) -> Float:
    """Return x + y, rounded once.

    Shapes: x, y (tokens, hidden) -> (tokens, hidden), dtype of x.

    >>> add(np.array([[1.0]], np.float32), np.array([[2.0]], np.float32))
    array([[3.]], dtype=float32)
    """
    out: Float = (widen(x) + widen(y)).astype(x.dtype)
    return out
