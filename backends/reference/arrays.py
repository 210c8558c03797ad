"""Array types, and a kernel's two dtypes: the activation's and that of its sums."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Float = npt.NDArray[Any]
"""float64, float32 or ml_dtypes.bfloat16."""

Int32 = npt.NDArray[np.int32]

NAMED = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the dtype of a name, ml_dtypes' own included."""
    return NAMED[name] if name in NAMED else np.dtype(name)


def widen(x: Float) -> Float:
    """Return x in promote_types(dtype, float32): the dtype in which every kernel here computes."""
    return x.astype(np.float64 if x.dtype == np.float64 else np.float32, copy=False)
