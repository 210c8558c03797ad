"""Rows moved, cast and quantised. See ``reference.rows`` and ``reference.quant``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from step3_hetero.backends.ascend import limits
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE
from step3_hetero.specs import FP8_BLOCK

LARGEST_INT8 = 127.0


def merge_rows(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """See ``reference.rows.merge_rows``. Skipped rows go to a spare row that is cut off again."""
    if rows.shape[0] == 0:
        return x.clone()
    spare = torch.cat((x, x.new_zeros(1, x.shape[1])))
    places = torch.where(index < 0, x.shape[0], index).long()
    return spare.index_copy_(0, places, rows.to(x.dtype))[:-1].clone()


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
    """See ``reference.quant.quantise``. Spelt out: npu_dynamic_quant takes no float32."""
    limits.wire(dtype)
    tokens, n = x.shape
    runs = -(-n // FP8_BLOCK)
    split = F.pad(x.float(), (0, runs * FP8_BLOCK - n)).view(tokens, runs, FP8_BLOCK)
    codes, scale = quantise_runs(split)
    return codes.view(tokens, runs * FP8_BLOCK)[:, :n], scale


def quantise_runs(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.quant.quantise_runs``; to INT8."""
    wide = x.float()
    scale = wide.abs().amax(-1) / LARGEST_INT8
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return (wide / scale[..., None]).round().to(torch.int8), scale


def dequantise(q: Tensor, scale: Tensor, *, dtype: str) -> Tensor:
    """See ``reference.quant.dequantise``."""
    tokens, n = q.shape
    spread = scale[..., None].expand(-1, -1, FP8_BLOCK).reshape(tokens, -1)[:, :n]
    return (q.float() * spread).to(TORCH_DTYPE[dtype])
