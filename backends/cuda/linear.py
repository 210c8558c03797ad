"""Matrix products: cuBLAS for weights in the activations' dtype, Triton for block FP8 and INT8.

See ``reference.linear``. FP8 weights stay one byte each, are widened in registers and scaled on
the float32 sums: nothing is rounded that the definition does not round. INT8 weights meet rows that
are rounded to int8 as they come; the sums of their products are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from step3_hetero.backend import Weights
from step3_hetero.backends.cuda.configurations import Configuration, configuration
from step3_hetero.backends.cuda.kernels import gemm as kernels
from step3_hetero.backends.cuda.kernels import numbers
from step3_hetero.backends.cuda.launch import launch
from step3_hetero.backends.cuda.rows import quantise_rows
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE, to_torch
from step3_hetero.backends.torch_common.weights import dense, strips
from step3_hetero.specs import FP8_BLOCK, HostTensor, OpSpec


@dataclass(eq=False)
class Codes:
    """One matrix, or a stack of experts', as e4m3 bytes.

    Shapes: codes (..., rows, columns) uint8, scales (..., ceil(rows / 128), ceil(columns / 128)).
    """

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


class Integers:
    """One matrix, or a stack of experts', as int8 codes with a scale for each output row.

    Shapes: codes (..., rows, columns) int8, scales (..., rows) float32. ``error`` and ``size`` are
    the squared error of what was filled in against the checkpoint's own, and that one's square.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.codes = torch.empty(shape, dtype=torch.int8, device=device)
        self.scales = torch.empty(shape[:-1], dtype=torch.float32, device=device)
        self.error = self.size = 0.0

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def fill(self, place: int | slice, tensor: HostTensor) -> None:
        """Round one matrix, on the device: expert ``place`` of a stack, or some of the rows.

        Strip by strip: the float64 of a head's whole matrix would take four times its bfloat16.
        """
        held, held_scales = self.codes[place], self.scales[place]
        for rows, strip in strips(tensor):
            wide = strip.to(self.codes.device)
            codes, scales = quantise_rows(wide)
            held[rows], held_scales[rows] = codes, scales
            found = codes.double() * scales.double()[:, None]
            self.error += float((found - wide.double()).square().sum())
            self.size += float(wide.double().square().sum())


Stored = Codes | Integers | Tensor
"""Weights as ``multiply`` takes them: FP8, INT8, or numbers in a dtype of the card's."""


@dataclass
class LinearWeights(Weights):
    """One dense matrix (several of the checkpoint's side by side), or quantised ones in order."""

    matrix: Tensor | None
    parts: Sequence[Codes | Integers]
    bias: Tensor | None
    dtype: torch.dtype
    arch: int
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int

    @property
    def rows(self) -> int:
        """Return the columns of the result."""
        return (
            len(self.matrix) if self.matrix is not None else sum(len(p.codes) for p in self.parts)
        )


def stays_fp8(tensors: Sequence[HostTensor], spec: OpSpec) -> bool:
    """Say whether weights are multiplied as stored: block FP8, not to be rounded to a dtype."""
    stored = all(t.scale_inv is not None and t.dtype.name == "float8_e4m3fn" for t in tensors)
    return spec.weight_format in (None, "auto") and stored


def codes_of(tensor: HostTensor, device: torch.device) -> Codes:
    """Bring block-FP8 weights to the device as they are."""
    assert tensor.scale_inv is not None, tensor.name
    codes = to_torch(tensor.data).view(torch.uint8)
    return Codes(codes.to(device), to_torch(tensor.scale_inv).float().to(device))


def prepare_linear(
    tensors: Mapping[str, HostTensor], spec: OpSpec, device: torch.device, arch: int
) -> LinearWeights:
    """Join dense matrices; keep FP8 ones apart where their blocks would not meet.

    A result wider than the activations (the router's) needs weights just as wide.
    """
    dtype = TORCH_DTYPE[str(spec.parameters.get("out_dtype", spec.dtype))]
    bias = dense(tensors["bias"], dtype).to(device) if "bias" in tensors else None
    matrices = [t for n, t in tensors.items() if n != "bias"]
    if spec.weight_format == "int8":
        whole = _joined_integers(matrices, device)
        method = int8_method([whole], tensors)
        return LinearWeights(None, [whole], bias, dtype, arch, tensors, method, whole.nbytes)
    if stays_fp8(matrices, spec):
        parts = _joined_codes([codes_of(t, device) for t in matrices])
        nbytes, method = sum(p.nbytes for p in parts), "block FP8 as stored"
        return LinearWeights(None, parts, bias, dtype, arch, tensors, method, nbytes)
    matrix = torch.cat([dense(t, dtype, spec.weight_format).to(device) for t in matrices])
    name = str(dtype).removeprefix("torch.")
    return LinearWeights(matrix, (), bias, dtype, arch, tensors, name, matrix.nbytes)


def _joined_codes(parts: Sequence[Codes]) -> list[Codes]:
    """Join matrices by rows where every one above ends at the end of a block: fewer launches."""
    if any(len(p.codes) % FP8_BLOCK for p in parts[:-1]):
        return list(parts)
    codes, scales = (torch.cat([getattr(p, n) for p in parts]) for n in ("codes", "scales"))
    return [Codes(codes, scales)]


def _joined_integers(matrices: Sequence[HostTensor], device: torch.device) -> Integers:
    whole = Integers((sum(t.shape[0] for t in matrices), matrices[0].shape[1]), device)
    first = 0
    for tensor in matrices:
        whole.fill(slice(first, first + tensor.shape[0]), tensor)
        first += tensor.shape[0]
    return whole


def int8_method(parts: Sequence[Integers], tensors: Mapping[str, HostTensor]) -> str:
    """Say how tensors are held, and how far from the checkpoint's own."""
    stored = ", ".join(sorted({t.dtype.name for t in tensors.values()}))
    size = sum(p.size for p in parts)
    error = sum(p.error for p in parts) / size if size else 0.0
    return f"int8 per output row from {stored}, squared relative error {error:.1e}"


def linear(x: Tensor, weights: LinearWeights, *, out_dtype: str | None = None) -> Tensor:
    """See ``reference.linear.linear``."""
    x = x.to(weights.dtype)
    if weights.matrix is not None:
        y = F.linear(x, weights.matrix, weights.bias)
    else:
        y = torch.empty((x.shape[0], weights.rows), dtype=x.dtype, device=x.device)
        _multiply_codes(x, weights, y)
    return y.to(TORCH_DTYPE[out_dtype]) if out_dtype else y


def _multiply_codes(x: Tensor, weights: LinearWeights, y: Tensor) -> None:
    """Write each part's product into its own columns of ``y``."""
    first = 0
    for part in weights.parts:
        last = first + len(part.codes)
        bias = None if weights.bias is None else weights.bias[first:last]
        held = "int8" if isinstance(part, Integers) else "e4m3"
        chosen = gemm_configuration(weights.arch, x.dtype, held, x.shape[0])
        rows, tiles = every_row(x.shape[0], chosen.block("BLOCK_M"), x.device)
        given, scale = quantise_rows(x) if isinstance(part, Integers) else (x, None)
        target = y[:, first:last]
        multiply(given, part, target, rows, tiles, chosen, bias=bias, x_scale=scale)
        first = last


def gemm_configuration(arch: int, dtype: torch.dtype, held: str, rows: int) -> Configuration:
    """Return how to multiply about ``rows`` rows by weights in the format ``held``.

    ``held``: ``plain`` (the activations' dtype), ``e4m3``, ``e4m3 x e4m3`` or ``int8``, whose rows
    are int8 too.
    """
    wide = dtype == torch.float32
    said = {"plain": "float32" if wide else "bfloat16", "e4m3": "float32 e4m3" if wide else "e4m3"}
    return configuration("gemm", arch=arch, numbers=said.get(held, held), size=rows)


def every_row(m: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows 0 to m in tiles of ``block``, -1 behind them, all of one matrix."""
    tiles = triton.cdiv(m, block)
    rows = torch.arange(tiles * block, dtype=torch.int32, device=device)
    return torch.where(rows < m, rows, -1), torch.zeros(tiles, dtype=torch.int32, device=device)


def multiply(
    x: Tensor,
    w: Stored,
    out: Tensor,
    rows: Tensor,
    tile_expert: Tensor,
    chosen: Configuration,
    *,
    up: Stored | None = None,
    bias: Tensor | None = None,
    divisor: int = 1,
    x_scale: Tensor | None = None,
) -> None:
    """Start ``kernels.gemm.gemm``: ``out`` rows ``rows`` from x by the matrices of their tiles.

    ``x_scale`` are the scales of an ``x`` in e4m3 or int8, ``up`` the other half of a gated
    product.
    """
    quantised = x_scale is not None and isinstance(w, Codes)
    gate_codes, gate_scale = _parts(w, quantised)
    up_codes, up_scale = (gate_codes, gate_scale) if up is None else _parts(up, quantised)
    n, k = gate_codes.shape[-2:]
    grid = (len(tile_expert), triton.cdiv(n, chosen.block("BLOCK_N")))
    launch(
        kernels.gemm, grid, x, x if x_scale is None else x_scale,
        gate_codes, gate_scale, up_codes, up_scale, x if bias is None else bias, out,
        rows, tile_expert, out.shape[0], n, k, x.stride(0), out.stride(0),
        configuration=chosen, DIVISOR=divisor, GATED=up is not None, BIASED=bias is not None,
        FORMAT=_format(w), QUANTISED=quantised,
    )  # fmt: skip


def _format(w: Stored) -> int:
    """Return how a kernel is told of weights."""
    kinds = {Codes: numbers.CODES, Integers: numbers.INTEGERS}
    return int(kinds.get(type(w), numbers.PLAIN).value)


def _parts(w: Stored, quantised: bool) -> tuple[Tensor, Tensor]:
    """Return what a kernel is given of weights: numbers and scales (or the numbers again)."""
    if isinstance(w, Tensor):
        return w, w
    return w.codes.view(torch.float8_e4m3fn) if quantised else w.codes, w.scales


@dataclass
class TableWeights(Weights):
    """An embedding table as it is."""

    table: Tensor
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int


def prepare_table(
    tensors: Mapping[str, HostTensor], spec: OpSpec, device: torch.device
) -> TableWeights:
    """Cast the table and bring it to the device."""
    table = dense(tensors["table"], TORCH_DTYPE[spec.dtype]).to(device)
    return TableWeights(table, tensors, spec.dtype, table.nbytes)


def embed(ids: Tensor, weights: TableWeights) -> Tensor:
    """See ``reference.linear.embed``."""
    return F.embedding(ids, weights.table)
