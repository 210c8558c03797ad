"""SwiGLU, router and experts. See ``reference.moe``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from step3_hetero.backend import Weights
from step3_hetero.backends.cpu.linear import IntegerMatrix, Matrix, int8_method, joined
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE
from step3_hetero.backends.torch_common.weights import part
from step3_hetero.specs import HostTensor, OpSpec


def swiglu(gate_up: Tensor) -> Tensor:
    """See ``reference.moe.swiglu``."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate.float()).mul_(up).to(gate_up.dtype)


def route(logits: Tensor, *, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """See ``reference.moe.route``. A stable sort, since topk leaves the order of ties open."""
    p, ids = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights = p[:, :top_k]
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids[:, :top_k].int()


@dataclass
class ExpertWeights(Weights):
    """For each expert gate and up side by side, and down."""

    gate_up: Sequence[Matrix | IntegerMatrix]
    down: Sequence[Matrix | IntegerMatrix]
    dtype: torch.dtype
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int

    def expert(self, u: Tensor, number: int) -> Tensor:
        """Return one expert's output, (tokens, hidden)."""
        inner = swiglu(self.gate_up[number](u).to(self.dtype))
        return self.down[number](inner).to(self.dtype)


def prepare_experts(tensors: Mapping[str, HostTensor], spec: OpSpec) -> ExpertWeights:
    """Pack expert by expert, so that no second copy of the stack is ever held."""
    target, held = TORCH_DTYPE[spec.dtype], spec.weight_format
    gate, up, down = (tensors[name] for name in ("gate", "up", "down"))
    numbers = range(gate.shape[0])
    if held == "int8":
        return _prepare_int8(tensors, target)
    both = [
        Matrix(joined([part(gate, e), part(up, e)], target, held), None, target) for e in numbers
    ]
    back = [Matrix(joined([part(down, e)], target, held), None, target) for e in numbers]
    nbytes = sum(m.nbytes for m in (*both, *back))
    method = f"oneDNN-packed {str(both[0].dtype).removeprefix('torch.')}, expert by expert"
    return ExpertWeights(both, back, target, tensors, method, nbytes)


def _prepare_int8(tensors: Mapping[str, HostTensor], target: torch.dtype) -> ExpertWeights:
    gate, up, down = (tensors[name] for name in ("gate", "up", "down"))
    both, back = [], []
    for e in range(gate.shape[0]):
        halves = [part(gate, e), part(up, e)]
        both.append(IntegerMatrix(joined(halves, torch.float32, None), None))
        back.append(IntegerMatrix(joined([part(down, e)], torch.float32, None), None))
    every = [*both, *back]
    method, nbytes = int8_method(every, tensors), sum(m.nbytes for m in every)
    return ExpertWeights(both, back, target, tensors, method, nbytes)


def experts(u: Tensor, weights: Tensor, ids: Tensor, stack: ExpertWeights) -> Tensor:
    """See ``reference.moe.experts``. Only experts that got tokens run, each once."""
    if u.shape[0] == 0:
        return torch.empty_like(u)
    if u.shape[0] == 1:
        return _one_token(u, weights, ids[0].tolist(), stack)
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=len(stack.down) + 1).tolist()
    token = order // ids.shape[1]
    chosen = u.new_zeros(flat.shape[0], u.shape[1])
    start = counts[0]
    for number, count in enumerate(counts[1:]):
        if count:
            rows = slice(start, start + count)
            chosen[order[rows]] = stack.expert(u.index_select(0, token[rows]), number)
            start += count
    mix = weights.float()[:, None, :] @ chosen.view(*ids.shape, -1).float()
    return mix[:, 0].to(u.dtype)


def _one_token(u: Tensor, weights: Tensor, ids: list[int], stack: ExpertWeights) -> Tensor:
    total = torch.zeros(u.shape, dtype=torch.float32)
    for number, weight in zip(ids, weights[0].tolist(), strict=True):
        if number >= 0:
            total.add_(stack.expert(u, number).float(), alpha=weight)
    return total.to(u.dtype)
