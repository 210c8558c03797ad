"""Matrix products, and the weights they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from step3_hetero.backend import Weights
from step3_hetero.backends.reference.arrays import Float, Int32, dtype_of, product, widen
from step3_hetero.backends.reference.quant import dequantise_blocks, quantise_runs
from step3_hetero.specs import HostTensor, wide


@dataclass
class ReferenceWeights(Weights):
    """Tensors widened once, at load: what every product here computes with.

    A part that has ``scales`` (..., rows) float32 holds int8 codes (..., rows, columns).
    """

    parts: Mapping[str, Float]
    dtype: str
    source: Mapping[str, HostTensor]
    method: str
    scales: Mapping[str, Float] = field(default_factory=dict)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        held = (*self.parts.values(), *self.scales.values())
        self.nbytes = sum(part.nbytes for part in held)


def widen_tensors(
    tensors: Mapping[str, HostTensor], dtype: str, weight_format: str | None = None
) -> ReferenceWeights:
    """Return each tensor in promote_types(dtype, float32), dequantised where it is block FP8.

    The values are rounded to ``weight_format`` first; ``auto`` and None stand for ``dtype``. With
    ``int8`` all but a bias become codes with a scale for each row.
    """
    if weight_format == "int8":
        return _quantised_tensors(tensors, dtype)
    target = dtype_of(wide(dtype))
    rounded = dtype_of(dtype if weight_format in (None, "auto") else str(weight_format))
    parts = {n: dequantise_blocks(t).astype(rounded).astype(target) for n, t in tensors.items()}
    stored = ", ".join(sorted({t.dtype.name for t in tensors.values()}))
    return ReferenceWeights(parts, dtype, tensors, f"{target.name} from {stored}")


def _quantised_tensors(tensors: Mapping[str, HostTensor], dtype: str) -> ReferenceWeights:
    bias = widen_tensors({n: t for n, t in tensors.items() if n == "bias"}, dtype).parts
    wide_of = {n: dequantise_blocks(t) for n, t in tensors.items() if n != "bias"}
    made = {n: quantise_runs(w, "int8") for n, w in wide_of.items()}
    error = size = 0.0
    for name, (codes, scale) in made.items():
        w = wide_of[name].astype(np.float64)
        error += float(((codes * scale[..., None].astype(np.float64) - w) ** 2).sum())
        size += float((w**2).sum())
    stored = ", ".join(sorted({t.dtype.name for t in tensors.values()}))
    parts = {name: codes for name, (codes, _) in made.items()} | dict(bias)
    scales = {name: scale for name, (_, scale) in made.items()}
    method = f"int8 per output row from {stored}, squared relative error "
    method += f"{error / size if size else 0.0:.1e}"
    return ReferenceWeights(parts, dtype, tensors, method, scales)


def multiply(x: Float, weights: ReferenceWeights, name: str, place: int | None = None) -> Float:
    """Return x·Wᵀ in promote_types(x's dtype, float32), W being one part or one of its stack.

    Shapes: x (tokens, in), part (out, in), or (stack, out, in) with ``place`` -> (tokens, out).

    >>> table = HostTensor("w", np.array([[1.0, -2.0], [0.5, 0.5]], np.float32))
    >>> multiply(np.ones((1, 2), np.float32), widen_tensors({"w": table}, "float32", "int8"), "w")
    array([[-0.992126,  1.      ]], dtype=float32)
    """
    w = weights.parts[name] if place is None else weights.parts[name][place]
    wide_x = widen(x)
    if name not in weights.scales:
        return product(wide_x, w.T)
    scale = weights.scales[name] if place is None else weights.scales[name][place]
    codes, row_scale = quantise_runs(x, "int8")
    summed = codes.astype(np.float64) @ w.astype(np.float64).T  # integers below 2^53: exact
    out: Float = summed.astype(wide_x.dtype) * row_scale[:, None] * scale
    return out


def linear(x: Float, weights: ReferenceWeights, *, out_dtype: str | None = None) -> Float:
    """Multiply each row by the matrices, whose outputs stand side by side, and add the bias.

    Shapes: x (tokens, in), matrices (out_i, in) -> (tokens, Σ out_i), dtype ``out_dtype`` or x's.

    >>> table = HostTensor("w", np.array([[1.0, 2.0]], np.float32))
    >>> w = widen_tensors({"w": table}, "float32")
    >>> linear(np.array([[3.0, 4.0]], np.float32), w)
    array([[11.]], dtype=float32)
    """
    matrices = [name for name in weights.parts if name != "bias"]
    out = np.concatenate([multiply(x, weights, name) for name in matrices], axis=-1)
    if "bias" in weights.parts:
        out = out + weights.parts["bias"]
    rounded: Float = out.astype(dtype_of(out_dtype) if out_dtype else x.dtype)
    return rounded


def embed(ids: Int32, weights: ReferenceWeights) -> Float:
    """Return the table's row of each id.

    Shapes: ids (tokens,) -> (tokens, hidden), in the dtype the table was prepared for.
    """
    rows: Float = weights.parts["table"][ids].astype(dtype_of(weights.dtype))
    return rows
