"""Checkpoint tensors as torch tensors, dequantised where they are block FP8."""

from __future__ import annotations

import torch
from torch import Tensor

from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE, to_torch
from step3_hetero.specs import FP8_BLOCK, HostTensor


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


def part(tensor: HostTensor, index: int) -> HostTensor:
    """Return one expert of a stack."""
    scale = None if tensor.scale_inv is None else tensor.scale_inv[index]
    return HostTensor(f"{tensor.name}[{index}]", tensor.data[index], scale)
