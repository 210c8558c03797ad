"""Between NumPy (with ml_dtypes) and torch, without a copy where memory allows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from step3_hetero.specs import HostArray

TORCH_DTYPE = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""torch's dtype by NumPy's name."""

_CARRIER = {"bfloat16": np.int16, "float8_e4m3fn": np.int8}
_ML_DTYPE = {
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
}


def to_torch(x: HostArray) -> torch.Tensor:
    """Return a host tensor with the content of ``x``, over its memory unless that is read-only.

    >>> to_torch(np.ones(2, ml_dtypes.bfloat16))
    tensor([1., 1.], dtype=torch.bfloat16)
    """
    whole = x if x.flags.writeable and x.flags.c_contiguous else np.array(x, order="C")
    carrier = _CARRIER.get(x.dtype.name)
    if carrier is None:
        return torch.from_numpy(whole)
    return torch.from_numpy(whole.view(carrier)).view(TORCH_DTYPE[x.dtype.name])


def to_host(x: torch.Tensor) -> HostArray:
    """Return a NumPy array with the content of a host tensor, sharing memory where it can.

    >>> to_host(torch.ones(2, dtype=torch.bfloat16)).dtype
    dtype(bfloat16)
    """
    x = x.detach().contiguous()
    if x.dtype in _ML_DTYPE:
        dtype = _ML_DTYPE[x.dtype]
        carried: HostArray = x.view(torch.int16 if dtype.itemsize == 2 else torch.int8).numpy()
        return carried.view(dtype)
    plain: HostArray = x.numpy()
    return plain
