"""Rotary position embedding. See ``reference.rope``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from step3_hetero.backends.cuda.kernels import rope as kernels
from step3_hetero.backends.cuda.launch import launch, tile


def rope(x: Tensor, positions: Tensor, *, theta: float) -> Tensor:
    """See ``reference.rope.rope``."""
    return rotate(x, *angles(positions, x.shape[-1], theta, x.dtype))


def angles(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine for each position, rounded to ``dtype`` and held in float32.

    Shapes: positions (tokens,) -> (tokens, head_dim / 2) twice. Angles are float64, on the device:
    once a batch for all layers.
    """
    half = head_dim // 2
    place = torch.arange(half, dtype=torch.float64, device=positions.device)
    angle = positions.to(torch.float64)[:, None] * theta ** (-place / half)
    return angle.cos().to(dtype).float(), angle.sin().to(dtype).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head. Shapes: x (tokens, heads, head_dim), tokens may lie apart -> the same."""
    tokens, heads, head_dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != head_dim:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count, half = tile(head_dim // 2)
    rows = tokens * heads
    launch(
        kernels.rope, (triton.cdiv(rows, count),), x, cos, sin, out, rows, heads, x.stride(0),
        HEAD_DIM=head_dim, HALF=half, ROWS=count,
    )  # fmt: skip
    return out
