"""Checkpoint tensors as torch tensors, dequantised where they are block FP8."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE, to_torch
from step3_hetero.specs import FP8_BLOCK, HostTensor

STRIP_ROWS = 8 * FP8_BLOCK
"""Rows that are requantised at a time: whole blocks of a block-FP8 checkpoint."""


def dense(tensor: HostTensor, dtype: torch.dtype, weight_format: str | None = None) -> Tensor:
    """Return one weight in ``dtype``, never the checkpoint's memory; block FP8 times its scales.

    Shapes: (..., rows, columns) or (n,), as the tensor's own. With a ``weight_format`` other than
    ``auto`` the values are rounded to it first.
    """
    if weight_format not in (None, "auto"):
        return dense(tensor, TORCH_DTYPE[str(weight_format)]).to(dtype)
    if tensor.scale_inv is None:
        return to_torch(tensor.data).to(dtype, copy=tensor.data.flags.writeable)
    rows, columns = tensor.shape[-2:]
    scale = to_torch(tensor.scale_inv)
    spread = scale.repeat_interleave(FP8_BLOCK, -2)[..., :rows, :]
    spread = spread.repeat_interleave(FP8_BLOCK, -1)[..., :columns]
    return to_torch(tensor.data).to(torch.float32).mul_(spread).to(dtype)


def strips(tensor: HostTensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of a matrix in float32, some at a time."""
    for start in range(0, tensor.shape[0], STRIP_ROWS):
        rows = slice(start, min(start + STRIP_ROWS, tensor.shape[0]))
        scale = tensor.scale_inv
        if scale is not None:
            scale = scale[start // FP8_BLOCK : -(-rows.stop // FP8_BLOCK)]
        yield rows, dense(HostTensor(tensor.name, tensor.data[rows], scale), torch.float32)


def part(tensor: HostTensor, index: int) -> HostTensor:
    """Return one expert of a stack."""
    scale = None if tensor.scale_inv is None else tensor.scale_inv[index]
    return HostTensor(f"{tensor.name}[{index}]", tensor.data[index], scale)
