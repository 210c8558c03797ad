"""Antialiased resizing as Pillow and torchvision do it, in float64.

Each output sample is a weighted mean of the inputs under the kernel, which is centred on the output
sample and, when shrinking, widened by the scale. At the borders the weights are cut and sum to 1.
"""

from collections.abc import Callable

import numpy as np

from oracle.checkpoint import Array

Kernel = Callable[[Array], Array]


def triangle(x: Array) -> Array:
    """The bilinear kernel: 1 at 0, 0 from 1 on."""
    return np.maximum(1 - np.abs(x), 0)


def cubic(x: Array) -> Array:
    """Keys' cubic kernel with a = -1/2: 1 at 0, 0 at 1 and from 2 on."""
    a, x = -0.5, np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def weights(size: int, new_size: int, kernel: Kernel) -> Array:
    """Return the matrix that resizes one axis. Shape: (new_size, size)."""
    scale = size / new_size
    centre = (np.arange(new_size) + 0.5) * scale
    distance = np.arange(size) + 0.5 - centre[:, None]
    w = kernel(distance / max(scale, 1))
    return w / w.sum(axis=1, keepdims=True)


def resize(planes: Array, height: int, width: int, kernel: Kernel) -> Array:
    """Shapes: planes (..., h, w) -> (..., height, width)."""
    h, w = planes.shape[-2:]
    return weights(h, height, kernel) @ planes @ weights(w, width, kernel).T
