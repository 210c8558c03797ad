"""SwiGLU, router and experts. See ``reference.moe``.

Which tokens an expert gets is worked out on the device: slots (a token's choices, in order) are
counted and listed by expert, each expert's list from a tile of its own on. The host knows only how
many tiles there can be at most and starts that many; those without work return at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from step3_hetero.backend import Weights
from step3_hetero.backends.cuda.configurations import Configuration
from step3_hetero.backends.cuda.kernels import moe as kernels
from step3_hetero.backends.cuda.kernels import rows as row_kernels
from step3_hetero.backends.cuda.launch import WIDEST, launch, tile
from step3_hetero.backends.cuda.linear import (
    Codes,
    Integers,
    Stored,
    codes_of,
    gemm_configuration,
    int8_method,
    multiply,
    stays_fp8,
)
from step3_hetero.backends.cuda.rows import quantise, quantise_rows
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE
from step3_hetero.backends.torch_common.weights import dense, part
from step3_hetero.specs import HostTensor, OpSpec

SLOTS_AT_ONCE = 1024
"""Slots that a program of the counting and the listing looks at in one step."""


def swiglu(gate_up: Tensor) -> Tensor:
    """See ``reference.moe.swiglu``."""
    gate_up = gate_up.contiguous()
    tokens, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, n), dtype=gate_up.dtype, device=gate_up.device)
    count, width = tile(min(n, WIDEST))
    grid = (triton.cdiv(tokens, count), triton.cdiv(n, width))
    launch(row_kernels.swiglu, grid, gate_up, out, tokens, n, ROWS=count, WIDTH=width)
    return out


def route(logits: Tensor, *, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """See ``reference.moe.route``."""
    tokens, experts = logits.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    count, width = tile(experts)
    launch(
        kernels.route, (triton.cdiv(tokens, count),), logits.contiguous(), weights, ids, tokens,
        experts, TOP_K=top_k, RENORMALISE=renormalise, ROWS=count, WIDTH=width,
    )  # fmt: skip
    return weights, ids


@dataclass
class ExpertWeights(Weights):
    """Stacks of gate, up (experts, inter, hidden) and down (experts, hidden, inter)."""

    gate: Stored
    up: Stored
    down: Stored
    dtype: torch.dtype
    arch: int
    quantised: bool
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int

    @property
    def held(self) -> str:
        """Return the weights' format as ``gemm_configuration`` takes it."""
        if self.quantised:
            return "e4m3 x e4m3"
        if isinstance(self.gate, Integers):
            return "int8"
        return "e4m3" if isinstance(self.gate, Codes) else "plain"

    @property
    def experts(self) -> int:
        """Return how many experts there are."""
        return self._shape[0]

    @property
    def inter(self) -> int:
        """Return the width of one expert."""
        return self._shape[1]

    @property
    def _shape(self) -> torch.Size:
        return self.gate.shape if isinstance(self.gate, Tensor) else self.gate.codes.shape


def prepare_experts(
    tensors: Mapping[str, HostTensor],
    spec: OpSpec,
    device: torch.device,
    arch: int,
    quantised: bool = False,
) -> ExpertWeights:
    """Bring the stacks to the device, block FP8 as stored, anything else in the op's dtype.

    With weights asked for as int8 they are rounded there, expert by expert. ``quantised``: multiply
    FP8 by FP8, activations quantised per token and 128 columns.
    """
    dtype = TORCH_DTYPE[spec.dtype]
    parts = {n: tensors[n] for n in ("gate", "up", "down")}
    if spec.weight_format == "int8":
        rounded = {n: _rounded(t, device) for n, t in parts.items()}
        every = list(rounded.values())
        return ExpertWeights(
            **rounded, dtype=dtype, arch=arch, quantised=False, source=tensors,
            method=int8_method(every, tensors), nbytes=sum(w.nbytes for w in every),
        )  # fmt: skip
    if stays_fp8(list(parts.values()), spec):
        codes = {n: codes_of(t, device) for n, t in parts.items()}
        method = "block FP8 as stored" + (", activations in FP8" if quantised else "")
        nbytes = sum(c.nbytes for c in codes.values())
        return ExpertWeights(
            **codes, dtype=dtype, arch=arch, quantised=quantised,
            source=tensors, method=method, nbytes=nbytes,
        )  # fmt: skip
    plain = {n: dense(t, dtype, spec.weight_format).to(device) for n, t in parts.items()}
    return ExpertWeights(
        **plain, dtype=dtype, arch=arch, quantised=False, source=tensors,
        method=spec.dtype, nbytes=sum(t.nbytes for t in plain.values()),
    )  # fmt: skip


def _rounded(stack: HostTensor, device: torch.device) -> Integers:
    rounded = Integers(stack.shape, device)
    for number in range(stack.shape[0]):
        rounded.fill(number, part(stack, number))
    return rounded


def experts(
    u: Tensor,
    weights: Tensor,
    ids: Tensor,
    stack: ExpertWeights,
    *,
    chosen: Configuration | None = None,
) -> Tensor:
    """See ``reference.moe.experts``. ``chosen`` stands in for the table's configuration."""
    tokens, hidden = u.shape
    top_k = ids.shape[1]
    out = torch.empty((tokens, hidden), dtype=u.dtype, device=u.device)
    if tokens == 0:
        return out
    slots = tokens * top_k
    rows_each = triton.cdiv(slots, stack.experts)
    chosen = chosen or gemm_configuration(stack.arch, u.dtype, stack.held, rows_each)
    ids, weights = ids.contiguous(), weights.contiguous()
    rows, tile_expert = by_expert(ids, stack.experts, chosen)
    given, scale = _operand(u.contiguous(), stack)
    inner = torch.empty((slots, stack.inter), dtype=u.dtype, device=u.device)
    multiply(
        given, stack.gate, inner, rows, tile_expert, chosen,
        up=stack.up, divisor=top_k, x_scale=scale,
    )  # fmt: skip
    given, scale = _operand(inner, stack)
    found = torch.empty((slots, hidden), dtype=u.dtype, device=u.device)
    multiply(given, stack.down, found, rows, tile_expert, chosen, x_scale=scale)
    _mix(found, weights, ids, out)
    return out


def by_expert(ids: Tensor, experts: int, chosen: Configuration) -> tuple[Tensor, Tensor]:
    """List slots by expert, in tiles of one expert each, without asking the device anything.

    Shapes: ids (tokens, top_k) -> rows (tiles · BLOCK_M,), tile_expert (tiles,), -1 where empty.
    """
    slots, block = ids.numel(), chosen.block("BLOCK_M")
    tiles = min(slots, slots // block + experts)  # every expert may leave a tile half empty
    counts = torch.empty(experts, dtype=torch.int32, device=ids.device)
    rows = torch.full((tiles * block,), -1, dtype=torch.int32, device=ids.device)
    tile_expert = torch.full((tiles,), -1, dtype=torch.int32, device=ids.device)
    launch(kernels.count_slots, (experts,), ids, counts, slots, BLOCK=SLOTS_AT_ONCE)
    launch(
        kernels.place_slots, (experts,), ids, counts, rows, tile_expert, slots, experts,
        WIDTH=max(16, triton.next_power_of_2(experts)), BLOCK=SLOTS_AT_ONCE, BLOCK_M=block,
    )  # fmt: skip
    return rows, tile_expert


def _operand(x: Tensor, stack: ExpertWeights) -> tuple[Tensor, Tensor | None]:
    """Return rows as the product takes them: as they are, or in INT8 or FP8 with their scales."""
    if isinstance(stack.gate, Integers):
        return quantise_rows(x)
    return quantise(x, dtype="float8_e4m3fn") if stack.quantised else (x, None)


def _mix(found: Tensor, weights: Tensor, ids: Tensor, out: Tensor) -> None:
    tokens, top_k = ids.shape
    n = out.shape[1]
    count, width = tile(min(n, WIDEST))
    grid = (triton.cdiv(tokens, count), triton.cdiv(n, width))
    launch(
        kernels.mix, grid, found, weights, ids, out, tokens, n,
        TOP_K=top_k, ROWS=count, WIDTH=width,
    )  # fmt: skip
