"""Rotary position embedding. See ``reference.rope``."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from step3_hetero.backends.ascend import vendor
from step3_hetero.backends.ascend.limits import MOST_POSITIONS


def rope(x: Tensor, positions: Tensor, *, theta: float) -> Tensor:
    """See ``reference.rope.rope``. Angles come from a table: the device has no float64 cosine."""
    if x.numel() == 0:
        return x.clone()
    return rotate(x, *looked_up(positions, x.shape[-1], theta, x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate all heads of all tokens.

    Shapes: x (tokens, heads, head_dim), cos, sin (1, tokens, 1, head_dim) -> x's shape.
    """
    return vendor.rotate(x[None], cos, sin)[0]


def looked_up(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine for each position. Shapes: (tokens,) -> (1, tokens, 1, head_dim)."""
    cos, sin = table(head_dim, theta, dtype, positions.device)
    return cos.index_select(0, positions)[None, :, None], sin.index_select(0, positions)[
        None, :, None
    ]


@lru_cache(maxsize=8)
def table(
    head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position, both halves alike, on the device.

    Shapes: -> (MOST_POSITIONS, head_dim) twice. Angles are float64, on the host, once.
    """
    half = head_dim // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(MOST_POSITIONS, dtype=torch.float64)[:, None] * frequency
    cos, sin = (f(angle).to(dtype).repeat(1, 2).to(device) for f in (torch.cos, torch.sin))
    return cos, sin
