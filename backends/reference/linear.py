"""Matrix products, and the weights they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from step3_hetero.backend import Weights
from step3_hetero.backends.reference.arrays import Float, Int32, dtype_of, product, widen
from step3_hetero.backends.reference.quant import dequantise_blocks
from step3_hetero.specs import HostTensor, wide


@dataclass
class ReferenceWeights(Weights):
    """Tensors widened once, at load: what every product here computes with."""

    parts: Mapping[str, Float]
    dtype: str
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(part.nbytes for part in self.parts.values())


def widen_tensors(
    tensors: Mapping[str, HostTensor], dtype: str, weight_format: str | None = None
) -> ReferenceWeights:
    """Return each tensor in promote_types(dtype, float32), dequantised where it is block FP8.

    The values are rounded to ``weight_format`` first; ``auto`` and None stand for ``dtype``.
    """
    target = dtype_of(wide(dtype))
    rounded = dtype_of(dtype if weight_format in (None, "auto") else str(weight_format))
    parts = {n: dequantise_blocks(t).astype(rounded).astype(target) for n, t in tensors.items()}
    stored = ", ".join(sorted({t.dtype.name for t in tensors.values()}))
    return ReferenceWeights(parts, dtype, tensors, f"{target.name} from {stored}")


def linear(x: Float, weights: ReferenceWeights, *, out_dtype: str | None = None) -> Float:
    """Multiply each row by the matrices, whose outputs stand side by side, and add the bias.

    Shapes: x (tokens, in), matrices (out_i, in) -> (tokens, Σ out_i), dtype ``out_dtype`` or x's.

    >>> table = HostTensor("w", np.array([[1.0, 2.0]], np.float32))
    >>> w = widen_tensors({"w": table}, "float32")
    >>> linear(np.array([[3.0, 4.0]], np.float32), w)
    array([[11.]], dtype=float32)
    """
    wide_x = widen(x)
    matrices = [part for name, part in weights.parts.items() if name != "bias"]
    out = np.concatenate([product(wide_x, m.T) for m in matrices], axis=-1)
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
