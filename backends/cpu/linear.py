"""Matrix products over weights packed once, at load. See ``reference.linear``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from step3_hetero.backend import Weights
from step3_hetero.backends.cpu.rows import quantise_runs
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE
from step3_hetero.backends.torch_common.weights import dense
from step3_hetero.specs import HostTensor, OpSpec


@cache
def native_bf16() -> bool:
    """Say whether oneDNN multiplies bfloat16 on this processor (AVX-512 or AVX-NE-CONVERT)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Matrix:
    """One matrix with its bias, ready to multiply from the right: x·Wᵀ + b.

    ``packed`` is oneDNN's own layout. Where the processor has no bfloat16 products, a single row
    takes the weights as stored (half the bytes, and memory is all that counts), several rows take
    them packed in float32: a bfloat16 GEMM in plain code is ten times slower.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        split = dtype == torch.bfloat16 and not native_bf16()
        self.dtype = torch.float32 if split else dtype
        self.row = weight.contiguous() if split else None
        self.row_bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(
            weight.to(self.dtype).contiguous(), None
        )
        self.bias = None if bias is None else bias.to(self.dtype)
        self.nbytes = weight.numel() * (self.dtype.itemsize + (dtype.itemsize if split else 0))

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply; the result has the dtype of ``x`` or of the packed weights."""
        if self.row is not None and x.shape[0] == 1:
            return F.linear(x, self.row, self.row_bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.packed, self.bias, "none", [], ""
        )
        return y


class IntegerMatrix:
    """One matrix as int8 codes (out, in) with a float32 scale for each output, and its bias.

    ``error`` and ``size`` are the squared error of code · scale against ``weight`` (out, in) in
    float32, and that weight's squared size.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.codes, self.scale = quantise_runs(weight, "int8")
        self.bias = None if bias is None else bias.float()
        self.nbytes = self.codes.nbytes + self.scale.nbytes + (0 if bias is None else bias.nbytes)
        wide = weight.double()
        self.error = float((self.codes * self.scale[:, None].double() - wide).square().sum())
        self.size = float(wide.square().sum())

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply rows rounded to int8, each with a scale of its own; the result is float32."""
        codes, row_scale = quantise_runs(x, "int8")
        summed: Tensor = torch._int_mm(codes, self.codes.t())
        y = summed.float() * row_scale[:, None] * self.scale
        return y if self.bias is None else y + self.bias


def int8_method(matrices: Sequence[IntegerMatrix], tensors: Mapping[str, HostTensor]) -> str:
    """Say how tensors are held, and how far from the checkpoint's own."""
    stored = ", ".join(sorted({t.dtype.name for t in tensors.values()}))
    size = sum(m.size for m in matrices)
    error = sum(m.error for m in matrices) / size if size else 0.0
    return f"int8 per output row from {stored}, squared relative error {error:.1e}"


@dataclass
class LinearWeights(Weights):
    """One matrix, several of the checkpoint's side by side."""

    matrix: Matrix | IntegerMatrix
    dtype: torch.dtype
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ + b in the dtype the weights were prepared for."""
        return self.matrix(x).to(self.dtype)


def prepare_linear(tensors: Mapping[str, HostTensor], spec: OpSpec) -> LinearWeights:
    """Join the matrices and pack them once.

    A result wider than the activations (the router's) needs weights just as wide.
    """
    dtype = TORCH_DTYPE[str(spec.parameters.get("out_dtype", spec.dtype))]
    bias = dense(tensors["bias"], dtype) if "bias" in tensors else None
    matrices = [t for n, t in tensors.items() if n != "bias"]
    if spec.weight_format == "int8":
        whole = IntegerMatrix(joined(matrices, torch.float32, None), bias)
        return LinearWeights(whole, dtype, tensors, int8_method([whole], tensors), whole.nbytes)
    matrix = Matrix(joined(matrices, dtype, spec.weight_format), bias, dtype)
    method = f"oneDNN-packed {str(matrix.dtype).removeprefix('torch.')}"
    return LinearWeights(matrix, dtype, tensors, method, matrix.nbytes)


def joined(tensors: Sequence[HostTensor], dtype: torch.dtype, weight_format: str | None) -> Tensor:
    """Return the matrices stacked by rows, rounded to ``weight_format`` first if there is one."""
    parts = [dense(t, dtype, weight_format) for t in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def linear(x: Tensor, weights: LinearWeights, *, out_dtype: str | None = None) -> Tensor:
    """See ``reference.linear.linear``. Sums are in float32, as oneDNN keeps them."""
    y = weights(x)
    return y.to(TORCH_DTYPE[out_dtype]) if out_dtype else y


@dataclass
class TableWeights(Weights):
    """An embedding table as it is."""

    table: Tensor
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int


def prepare_table(tensors: Mapping[str, HostTensor], spec: OpSpec) -> TableWeights:
    """Cast the table."""
    table = dense(tensors["table"], TORCH_DTYPE[spec.dtype])
    return TableWeights(table, tensors, spec.dtype, table.nbytes)


def embed(ids: Tensor, weights: TableWeights) -> Tensor:
    """See ``reference.linear.embed``."""
    return F.embedding(ids, weights.table)
