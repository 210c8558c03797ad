"""Block FP8 of checkpoints, and the quantisation of what crosses an edge."""

from __future__ import annotations

import numpy as np

from step3_hetero.backends.reference.arrays import Float, dtype_of, widen
from step3_hetero.specs import FP8_BLOCK, HostTensor

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
"""The largest magnitude of each wire format."""

SMALLEST_SCALE = np.finfo(np.float32).tiny
"""Below it a scale has lost bits; all its run is then under half a code, and zero."""


def dequantise_blocks(tensor: HostTensor) -> Float:
    """Return the weight itself: data · scale_inv per block of 128 × 128, data alone without scales.

    Shapes: data (..., rows, columns), scale_inv (..., ceil(rows/128), ceil(columns/128)).

    >>> e4m3 = np.ones((1, 130)).astype(dtype_of("float8_e4m3fn"))
    >>> w = dequantise_blocks(HostTensor("w", e4m3, np.array([[2.0, 3.0]], np.float32)))
    >>> w[0, 127], w[0, 128]
    (np.float32(2.0), np.float32(3.0))
    """
    if tensor.scale_inv is None:
        return tensor.data
    rows, columns = tensor.shape[-2:]
    spread = np.repeat(tensor.scale_inv, FP8_BLOCK, axis=-2)[..., :rows, :]
    spread = np.repeat(spread, FP8_BLOCK, axis=-1)[..., :columns]
    weight: Float = tensor.data.astype(np.float32) * spread
    return weight


def quantise(x: Float, *, dtype: str) -> tuple[Float, Float]:
    """Quantise each run of 128 columns of each row with a scale of its own.

    Shapes: x (tokens, n) -> q (tokens, n), scale (tokens, ceil(n / 128)) float32.

    >>> q, scale = quantise(np.array([[2.0, -4.0]], np.float32), dtype="int8")
    >>> q.tolist(), scale.round(4).tolist()
    ([[64, -127]], [[0.03150000050663948]])
    """
    tokens, n = x.shape
    runs = -(-n // FP8_BLOCK)
    padded = np.zeros((tokens, runs * FP8_BLOCK), np.float32)
    padded[:, :n] = widen(x)
    q, scale = quantise_runs(padded.reshape(tokens, runs, FP8_BLOCK), dtype)
    return q.reshape(padded.shape)[:, :n], scale


def quantise_runs(x: Float, dtype: str) -> tuple[Float, Float]:
    """Quantise each row of the last axis with a scale of its own, in float32.

    Shapes: x (..., n) -> codes (..., n), scale (...,) float32.

    >>> codes, scale = quantise_runs(np.array([[2.0, -4.0], [0.0, 0.0]]), "float8_e4m3fn")
    >>> codes.astype(float).tolist(), scale.round(4).tolist()
    ([[224.0, -448.0], [0.0, 0.0]], [0.008899999782443047, 1.0])
    """
    single = x.astype(np.float32)
    scale = np.abs(single).max(axis=-1, initial=0) / np.float32(LARGEST[dtype])
    scale = np.where(scale < SMALLEST_SCALE, np.float32(1), scale)
    q = single / scale[..., None]
    rounded = np.rint(q) if dtype == "int8" else q
    return rounded.astype(dtype_of(dtype)), scale


def dequantise(q: Float, scale: Float, *, dtype: str) -> Float:
    """Undo ``quantise``, up to its rounding.

    Shapes: q (tokens, n), scale (tokens, ceil(n / 128)) float32 -> (tokens, n).

    >>> dequantise(np.array([[2]], np.int8), np.array([[0.5]], np.float32), dtype="float32")
    array([[1.]], dtype=float32)
    """
    spread = np.repeat(scale, FP8_BLOCK, axis=-1)[:, : q.shape[-1]]
    x: Float = (q.astype(np.float32) * spread).astype(dtype_of(dtype))
    return x


def cast(x: Float, *, dtype: str) -> Float:
    """Round to nearest, ties to even.

    >>> cast(np.array([1.00390625]), dtype="bfloat16").astype(float)
    array([1.])
    """
    return x.astype(dtype_of(dtype))
