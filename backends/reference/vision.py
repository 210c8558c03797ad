"""What the vision tower needs beyond the language model's ops."""

from __future__ import annotations

import numpy as np

from step3_hetero.backends.reference.arrays import Float, product, widen
from step3_hetero.backends.reference.linear import ReferenceWeights
from step3_hetero.backends.reference.moe import sigmoid
from step3_hetero.resample import resize_matrix


def quick_gelu(x: Float) -> Float:
    """Return x · sigmoid(1.702 x), rounded once.

    Source: Hendrycks & Gimpel 2016, section 2.

    >>> quick_gelu(np.array([0.0, 1.0], np.float32)).round(4)
    array([0.    , 0.8458], dtype=float32)
    """
    w = widen(x)
    out: Float = (w * sigmoid(w * w.dtype.type(1.702))).astype(x.dtype)
    return out


def conv2d(x: Float, weights: ReferenceWeights, *, stride: int, padding: int) -> Float:
    """Cross-correlate each image with the kernels and add the bias.

    Shapes: x (images, height, width, channels), weight (out, channels, k, k), bias (out,)
    -> (images, h, w, out), dtype of x; h = (height + 2·padding - k) // stride + 1.

    Source: torch.nn.Conv2d, with channels last.
    """
    weight = weights.parts["weight"]
    out_channels, _, size, _ = weight.shape
    edge = (padding, padding)
    padded = np.pad(widen(x), ((0, 0), edge, edge, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
    windows = windows[:, ::stride, ::stride]  # (images, h, w, channels, k, k)
    images, h, w = windows.shape[:3]
    flat = product(
        windows.reshape(images * h * w, weight[0].size), weight.reshape(out_channels, -1).T
    )
    if "bias" in weights.parts:
        flat = flat + weights.parts["bias"]
    out: Float = flat.reshape(images, h, w, out_channels).astype(x.dtype)
    return out


def resize(x: Float, *, size: int) -> Float:
    """Resize a square of rows, bicubic with antialias, without rounding to x's dtype.

    Shapes: x (height, width, n) -> (size, size, n) in promote_types(dtype, float32).

    Source: torch.nn.functional.interpolate(mode="bicubic", antialias=True, align_corners=False).
    """
    w = widen(x)
    down = resize_matrix(w.shape[0], size, "bicubic").astype(w.dtype)
    across = resize_matrix(w.shape[1], size, "bicubic").astype(w.dtype)
    rows = product(down, w.reshape(w.shape[0], -1)).reshape(size, *w.shape[1:])  # (size, width, n)
    turned = np.swapaxes(rows, 0, 1).reshape(w.shape[1], -1)  # (width, size · n)
    out: Float = np.swapaxes(product(across, turned).reshape(size, size, -1), 0, 1)
    return np.ascontiguousarray(out)
