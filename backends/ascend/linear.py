"""Matrix products and the embedding table. See ``reference.linear``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from step3_hetero.backend import Weights
from step3_hetero.backends.ascend import vendor
from step3_hetero.backends.ascend.requantise import Requantised, load_int8, load_rows
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE
from step3_hetero.backends.torch_common.weights import dense
from step3_hetero.specs import HostTensor, OpSpec


@dataclass
class LinearWeights(Weights):
    """One matrix, several of the checkpoint's side by side.

    ``matrix`` is (out, in), or as INT8 (in, out) with a ``scale`` for each output.
    """

    matrix: Tensor
    bias: Tensor | None
    scale: Tensor | None
    manifest: Sequence[Requantised]
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ + b in the dtype the weights were prepared for."""
        if x.shape[0] == 0:
            return x.new_empty((0, self.outputs), dtype=self.dtype)
        if self.scale is None:
            return F.linear(x.to(self.matrix.dtype), self.matrix, self.bias)
        y = vendor.quantised_product(*self._quantised(x))
        return y if self.bias is None else y + self.bias

    @property
    def outputs(self) -> int:
        """Return the columns of the result."""
        return self.matrix.shape[0 if self.scale is None else 1]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the result."""
        return self.matrix.dtype if self.scale is None else torch.bfloat16

    def _quantised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.scale is not None
        codes, row_scale = vendor.quantise_rows(x)
        return codes, self.matrix, self.scale, row_scale


def prepare_linear(
    tensors: Mapping[str, HostTensor], spec: OpSpec, device: torch.device, *, nz: bool = False
) -> LinearWeights:
    """Write the matrices into one, as INT8 where the weight format says so.

    With ``nz`` bfloat16 and INT8 are held in the cube unit's format; float32 stays as it is.
    """
    matrices = [t for name, t in tensors.items() if name != "bias"]
    outputs, inputs = sum(t.shape[0] for t in matrices), matrices[0].shape[1]
    dtype = TORCH_DTYPE[str(spec.parameters.get("out_dtype", spec.dtype))]
    int8 = spec.weight_format == "int8"
    shape = (inputs, outputs) if int8 else (outputs, inputs)
    matrix = torch.empty(shape, dtype=torch.int8 if int8 else dtype, device=device)
    scale = torch.empty(outputs, dtype=torch.float32, device=device) if int8 else None
    manifest, start = [], 0
    for tensor in matrices:
        rows = slice(start, start + tensor.shape[0])
        start = rows.stop
        if scale is not None:
            manifest.append(load_int8(tensor, matrix[:, rows], scale[rows]))
        else:
            manifest.append(load_rows(tensor, matrix[rows], spec.weight_format))
    bias = dense(tensors["bias"], dtype).to(device) if "bias" in tensors else None
    held = [x for x in (matrix, bias, scale) if x is not None]
    method = manifest[0].method
    if nz and matrix.dtype != torch.float32:
        matrix, method = vendor.to_nz(matrix), f"{method}, NZ"
    nbytes = sum(x.nbytes for x in held)
    return LinearWeights(matrix, bias, scale, manifest, tensors, method, nbytes)


def linear(x: Tensor, weights: LinearWeights, *, out_dtype: str | None = None) -> Tensor:
    """See ``reference.linear.linear``. The cube unit adds bfloat16 products in float32.

    For a float32 result of bfloat16 rows the weights are held, and multiplied, in float32: torch
    has no product that takes one and gives the other.
    """
    y = weights(x)
    return y.to(TORCH_DTYPE[out_dtype]) if out_dtype else y


@dataclass
class TableWeights(Weights):
    """An embedding table as it is."""

    table: Tensor
    manifest: Sequence[Requantised]
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int


def prepare_table(
    tensors: Mapping[str, HostTensor], spec: OpSpec, device: torch.device
) -> TableWeights:
    """Cast the table."""
    source = tensors["table"]
    table = torch.empty(source.shape, dtype=TORCH_DTYPE[spec.dtype], device=device)
    entry = load_rows(source, table)
    return TableWeights(table, [entry], tensors, entry.method, table.nbytes)


def embed(ids: Tensor, weights: TableWeights) -> Tensor:
    """See ``reference.linear.embed``."""
    return weights.table.index_select(0, ids)
