"""The weights of an antialiased resize, as plain matrices.

The image processor resizes pixels with them, the vision stage its position embedding: one
definition for both. Resizing a picture is two products, ``down @ x @ across.T``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Kind = Literal["bilinear", "bicubic"]

CUBIC_A = -0.5
"""The free parameter of the cubic filter; antialiased resizes use -0.5, plain ones -0.75."""


def resize_matrix(size_in: int, size_out: int, kind: Kind) -> Float64:
    """Return the matrix that resizes one axis, with antialiasing and ``align_corners`` false.

    Shapes: -> (size_out, size_in); each row sums to 1.

    Shrinking stretches the filter by the scale, so that every input sample counts; growing leaves
    it at its own width. Samples beyond the edge do not exist: the weights that remain are rescaled.

    Source: the antialiased path of torch.nn.functional.interpolate, which follows Pillow's resize.

    >>> resize_matrix(4, 2, "bilinear").round(4)
    array([[0.4286, 0.4286, 0.1429, 0.    ],
           [0.    , 0.1429, 0.4286, 0.4286]])
    """
    if size_in < 1 or size_out < 1:
        raise ValueError(f"cannot resize {size_in} samples to {size_out}: both must be at least 1")
    scale = size_in / size_out
    centres = scale * (np.arange(size_out) + 0.5)
    distance = np.arange(size_in) + 0.5 - centres[:, None]  # (size_out, size_in)
    weights = FILTERS[kind](np.abs(distance) / max(scale, 1.0))
    unit: Float64 = weights / weights.sum(axis=1, keepdims=True)
    return unit


def _triangle(x: Float64) -> Float64:
    return np.maximum(1.0 - x, 0.0)


def _cubic(x: Float64) -> Float64:
    near = ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC_A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


FILTERS = {"bilinear": _triangle, "bicubic": _cubic}
