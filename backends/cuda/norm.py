"""Normalisation. See ``reference.norm``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from step3_hetero.backends.cuda.configurations import configuration
from step3_hetero.backends.cuda.kernels import norm as kernels
from step3_hetero.backends.cuda.launch import arch_of, launch, tile


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """See ``reference.norm.rms_norm``. Rows may lie apart, as the columns of a fused product do."""
    rows = x if x.dim() == 2 and x.stride(-1) == 1 else x.reshape(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm(rows, rows, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + y, rounded, and its norm, reading each once. Shapes: (tokens, n) all."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _rms_norm(x, y, weight, total, out, eps, add=True)
    return total, out


def _rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float, *, add: bool
) -> None:
    tokens, n = x.shape
    chosen = configuration("rms_norm", arch=arch_of(x), numbers="any", size=n)
    count, width = tile(n)
    launch(
        kernels.rms_norm, (triton.cdiv(tokens, count),), x, y, weight, total, out,
        tokens, n, x.stride(0), eps, configuration=chosen, ADD=add, ROWS=count, WIDTH=width,
    )  # fmt: skip


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """See ``reference.norm.layer_norm``."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, n = rows.shape
    chosen = configuration("layer_norm", arch=arch_of(x), numbers="any", size=n)
    count, width = tile(n)
    launch(
        kernels.layer_norm, (triton.cdiv(tokens, count),), rows, weight, bias, out, tokens, n, eps,
        configuration=chosen, ROWS=count, WIDTH=width,
    )  # fmt: skip
    return out


def add(x: Tensor, y: Tensor) -> Tensor:
    """See ``reference.norm.add``. torch's own: one read of each, one write."""
    return x + y
