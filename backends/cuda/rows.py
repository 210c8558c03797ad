"""Rows moved, cast and quantised. See ``reference.rows`` and ``reference.quant``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from step3_hetero.backends.cuda.kernels import numbers
from step3_hetero.backends.cuda.kernels import rows as kernels
from step3_hetero.backends.cuda.launch import WIDEST, launch, tile
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE
from step3_hetero.specs import FP8_BLOCK

FORMAT = {"float8_e4m3fn": numbers.CODES.value, "int8": numbers.INTEGERS.value}
"""How a kernel is told of a format that needs a scale; anything else is PLAIN."""


def merge_rows(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """See ``reference.rows.merge_rows``. Which rows are skipped the host never learns."""
    out = x.clone(memory_format=torch.contiguous_format)
    count, width = tile(min(x.shape[1], WIDEST))
    grid = (triton.cdiv(rows.shape[0], count), triton.cdiv(x.shape[1], width))
    launch(
        kernels.merge_rows, grid, out, rows.contiguous(), index, rows.shape[0], x.shape[1],
        ROWS=count, WIDTH=width,
    )  # fmt: skip
    return out


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
    runs = triton.cdiv(n, FP8_BLOCK)
    codes = torch.empty((tokens, n), dtype=TORCH_DTYPE[dtype], device=x.device)
    scales = torch.empty((tokens, runs), dtype=torch.float32, device=x.device)
    count, _ = tile(FP8_BLOCK)
    grid, held = (triton.cdiv(tokens, count), runs), as_bytes(codes)
    launch(
        kernels.quantise, grid, x.contiguous(), held, scales, tokens, n,
        E4M3=dtype == "float8_e4m3fn", ROWS=count,
    )  # fmt: skip
    return codes, scales


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and one scale for each whole row, as ``reference.quant.quantise_runs``.

    Shapes: x (tokens, n) -> codes (tokens, n) int8, scales (tokens,) float32.
    """
    tokens, n = x.shape
    codes = torch.empty((tokens, n), dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    count, width = tile(min(n, WIDEST))
    launch(
        kernels.quantise_rows, (triton.cdiv(tokens, count),), x.contiguous(), codes, scales,
        tokens, n, ROWS=count, WIDTH=width,
    )  # fmt: skip
    return codes, scales


def dequantise(q: Tensor, scale: Tensor, *, dtype: str) -> Tensor:
    """See ``reference.quant.dequantise``."""
    tokens, n = q.shape
    out = torch.empty((tokens, n), dtype=TORCH_DTYPE[dtype], device=q.device)
    held = FORMAT["int8" if q.dtype == torch.int8 else "float8_e4m3fn"]
    codes, scale = as_bytes(q.contiguous()), scale.contiguous()
    count, _ = tile(FP8_BLOCK)
    grid = (triton.cdiv(tokens, count), triton.cdiv(n, FP8_BLOCK))
    launch(kernels.dequantise, grid, codes, scale, out, tokens, n, FORMAT=held, ROWS=count)
    return out


def as_bytes(x: Tensor) -> Tensor:
    """Return e4m3 codes as the bytes that they are; anything else as it is."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
