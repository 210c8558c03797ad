"""Rows moved, cast and quantised. See ``reference.rows`` and ``reference.quant``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE
from step3_hetero.specs import FP8_BLOCK

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}


def merge_rows(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """See ``reference.rows.merge_rows``."""
    kept = index >= 0
    return x.index_copy(0, index[kept].long(), rows[kept].to(x.dtype))


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """See ``reference.rows.select_rows``."""
    return x.index_select(0, rows)


def concat(*parts: Tensor) -> Tensor:
    """See ``reference.rows.concat``."""
    return torch.cat(parts)


def cast(x: Tensor, *, dtype: str) -> Tensor:
    """See ``reference.quant.cast``."""
    return x.to(TORCH_DTYPE[dtype], copy=True)


def quantise(x: Tensor, *, dtype: str) -> tuple[Tensor, Tensor]:
    """See ``reference.quant.quantise``."""
    tokens, n = x.shape
    runs = -(-n // FP8_BLOCK)
    split = F.pad(x.float(), (0, runs * FP8_BLOCK - n)).view(tokens, runs, FP8_BLOCK)
    q, scale = quantise_runs(split, dtype)
    return q.view(tokens, runs * FP8_BLOCK)[:, :n], scale


def quantise_runs(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """See ``reference.quant.quantise_runs``: codes (..., n) and scales (...,) of x (..., n)."""
    single = x.float()
    scale = single.abs().amax(-1) / LARGEST[dtype]
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    q = single / scale[..., None]
    return (q.round() if dtype == "int8" else q).to(TORCH_DTYPE[dtype]), scale


def dequantise(q: Tensor, scale: Tensor, *, dtype: str) -> Tensor:
    """See ``reference.quant.dequantise``."""
    spread = scale.repeat_interleave(FP8_BLOCK, -1)[:, : q.shape[-1]]
    return (q.float() * spread).to(TORCH_DTYPE[dtype])
