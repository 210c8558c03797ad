"""Rotary position embedding. See ``reference.rope``."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, positions: Tensor, *, theta: float) -> Tensor:
    """See ``reference.rope.rope``."""
    return rotate(x, *angles(positions, x.shape[-1], theta, x.dtype))


def angles(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine for each position, rounded to ``dtype`` and held in float32.

    Shapes: positions (tokens,) -> (tokens, 1, head_dim / 2) twice. Angles are float64.
    """
    half = head_dim // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.to(torch.float64)[:, None, None] * frequency
    return angle.cos().to(dtype).float(), angle.sin().to(dtype).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn both halves of every head in float32 and round once.

    Shapes: x (tokens, heads, head_dim), cos, sin (tokens, 1, head_dim / 2) -> x's shape and dtype.
    """
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
