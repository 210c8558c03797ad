"""Checkpoint tensors into device memory, strip by strip; block FP8 becomes what a 910B computes in.

Nothing larger than a strip is ever held beside the checkpoint's mapped file and the device's copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE
from step3_hetero.backends.torch_common.weights import strips
from step3_hetero.specs import HostTensor

LARGEST = 127.0


@dataclass(frozen=True)
class Requantised:
    """What became of one tensor: an entry of the manifest.

    ``error`` is the squared error over the squared size of the weight as the checkpoint means it.
    """

    tensor: HostTensor
    method: str
    error: float

    @cached_property
    def source_sha256(self) -> str:
        """Return the SHA-256 of the source's bytes, scales after numbers: as Checkpoint.digest."""
        seen = sha256()
        for part in (self.tensor.data, self.tensor.scale_inv):
            if part is not None:
                seen.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        return seen.hexdigest()

    def to_json(self) -> dict[str, object]:
        """Return the entry as it is written."""
        return {
            "tensor": self.tensor.name,
            "stored": self.tensor.dtype.name,
            "method": self.method,
            "squared_relative_error": self.error,
            "source_sha256": self.source_sha256,
        }


def method_of(tensor: HostTensor, form: str) -> str:
    """Say in words how a tensor is held.

    >>> method_of(HostTensor("w", np.zeros((2, 2), np.float32)), "bfloat16")
    'bfloat16 from float32'
    """
    how = " per output row" if form == "int8" else ""
    blocks = "block " if tensor.scale_inv is not None else ""
    return f"{form}{how} from {blocks}{tensor.dtype.name}"


def load_rows(tensor: HostTensor, target: Tensor, weight_format: str | None = None) -> Requantised:
    """Write a matrix into ``target`` (rows, columns) on the device, rounded to its dtype.

    With a ``weight_format`` other than ``auto`` the values are rounded to that first.
    """
    form = TORCH_DTYPE[str(weight_format)] if weight_format not in (None, "auto") else target.dtype
    error = size = 0.0
    for rows, wide in strips(tensor):
        rounded = wide.to(form).to(target.dtype)
        target[rows].copy_(rounded)
        error += float((rounded.float() - wide).square().sum(dtype=torch.float64))
        size += float(wide.square().sum(dtype=torch.float64))
    name = str(target.dtype).removeprefix("torch.")
    return Requantised(tensor, method_of(tensor, name), error / size if size else 0.0)


def load_int8(tensor: HostTensor, target: Tensor, scale: Tensor) -> Requantised:
    """Write a matrix as INT8 codes with one scale for each of its rows (outputs).

    Shapes: target (columns, rows) int8, the transpose; scale (rows,) float32.
    """
    error = size = 0.0
    for rows, wide in strips(tensor):
        unit = wide.abs().amax(-1) / LARGEST
        unit = torch.where(unit < torch.finfo(torch.float32).tiny, 1.0, unit)
        codes = (wide / unit[:, None]).round()
        target[:, rows].copy_(codes.to(torch.int8).t())
        scale[rows].copy_(unit)
        error += float((codes * unit[:, None] - wide).square().sum(dtype=torch.float64))
        size += float(wide.square().sum(dtype=torch.float64))
    return Requantised(tensor, method_of(tensor, "int8"), error / size if size else 0.0)
