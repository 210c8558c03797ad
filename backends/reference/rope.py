"""Rotary position embedding."""

from __future__ import annotations

import numpy as np

from step3_hetero.backends.reference.arrays import Float, Int32, widen


def rope(x: Float, positions: Int32, *, theta: float) -> Float:
    """Rotate the two halves of every head by an angle that grows with the position.

    Shapes: x (tokens, heads, head_dim), positions (tokens,) -> x's shape and dtype.

    Angle i is position · theta^(-2i/head_dim), in float64, so that every vendor has the same table
    at position 65,535; cosine and sine are rounded to x's dtype as the model's code does.

    Source: Su et al. 2021, eq. 34, in the halves layout; modeling_step3.py, apply_rotary_pos_emb.

    >>> x = np.array([[[1.0, 0.0]]], np.float32)
    >>> rope(x, np.array([1], np.int32), theta=10000.0).round(4)
    array([[[0.5403, 0.8415]]], dtype=float32)
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half) / half)
    angle = positions[:, None, None] * frequency  # (tokens, 1, half)
    cos, sin = (widen(f(angle).astype(x.dtype)) for f in (np.cos, np.sin))
    a, b = widen(x[..., :half]), widen(x[..., half:])
    turned: Float = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned
