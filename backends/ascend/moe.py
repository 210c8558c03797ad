"""SwiGLU, router and experts. See ``reference.moe``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from step3_hetero.backend import Weights
from step3_hetero.backends.ascend import vendor
from step3_hetero.backends.ascend.requantise import Requantised, load_int8, load_rows
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE
from step3_hetero.backends.torch_common.weights import part
from step3_hetero.specs import HostTensor, OpSpec


def swiglu(gate_up: Tensor) -> Tensor:
    """See ``reference.moe.swiglu``."""
    if gate_up.shape[0] == 0:
        return gate_up[:, : gate_up.shape[1] // 2].clone()
    return vendor.swiglu(gate_up)


def route(logits: Tensor, *, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """See ``reference.moe.route``. That ties go to the lower expert is assumed of the operator."""
    if logits.shape[0] == 0:
        none = logits.new_empty((0, top_k))
        return none, none.int()
    ids, p = vendor.top_experts(logits, top_k)
    weights = p.gather(1, ids.long())
    return weights / weights.sum(-1, keepdim=True) if renormalise else weights, ids


@dataclass
class ExpertWeights(Weights):
    """Stacks ready to be multiplied from the right.

    Shapes: gate_up (experts, hidden, 2·inter), down (experts, inter, hidden); as INT8 each with
    scales (experts, columns).
    """

    gate_up: Tensor
    down: Tensor
    scales: tuple[Tensor, Tensor] | None
    manifest: Sequence[Requantised]
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int

    @property
    def experts(self) -> int:
        """Return how many there are."""
        return self.gate_up.shape[0]

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Run each expert on its run of rows. Shapes: rows (n, hidden) -> (n, hidden)."""
        inner = vendor.swiglu(self._product(rows, self.gate_up, counts, 0))
        return self._product(inner, self.down, counts, 1)

    def _product(self, rows: Tensor, stack: Tensor, counts: Tensor, place: int) -> Tensor:
        if self.scales is None:
            return vendor.grouped_product(rows, stack, counts)
        codes, row_scale = vendor.quantise_rows(rows)
        scale = self.scales[place]
        return vendor.grouped_product(codes, stack, counts, scale=scale, row_scale=row_scale)


def prepare_experts(
    tensors: Mapping[str, HostTensor], spec: OpSpec, device: torch.device, *, nz: bool = False
) -> ExpertWeights:
    """Write gate beside up and down, transposed, expert by expert; ``nz`` as for linear."""
    experts, inter, hidden = tensors["gate"].shape
    int8 = spec.weight_format == "int8"
    dtype = torch.int8 if int8 else TORCH_DTYPE[spec.dtype]
    both = torch.empty((experts, hidden, 2 * inter), dtype=dtype, device=device)
    back = torch.empty((experts, inter, hidden), dtype=dtype, device=device)
    scales = None
    if int8:
        scales = (torch.empty((experts, 2 * inter), dtype=torch.float32, device=device),
                  torch.empty((experts, hidden), dtype=torch.float32, device=device))  # fmt: skip
    places = (("gate", both, 0, slice(0, inter)), ("up", both, 0, slice(inter, 2 * inter)),
              ("down", back, 1, slice(0, hidden)))  # fmt: skip
    manifest = []
    for expert in range(experts):
        for name, stack, number, columns in places:
            tensor, target = part(tensors[name], expert), stack[expert, :, columns]
            if scales is None:
                manifest.append(load_rows(tensor, target.t(), spec.weight_format))
            else:
                manifest.append(load_int8(tensor, target, scales[number][expert, columns]))
    nbytes = sum(x.nbytes for x in (both, back, *(scales or ())))
    method = manifest[0].method + ", transposed"
    if nz and dtype != torch.float32:
        both, back, method = vendor.to_nz(both), vendor.to_nz(back), f"{method}, NZ"
    return ExpertWeights(both, back, scales, manifest, tensors, method, nbytes)


def experts(u: Tensor, weights: Tensor, ids: Tensor, stack: ExpertWeights) -> Tensor:
    """See ``reference.moe.experts``.

    Empty places (id -1) go to one expert more than there are, whose rows come last, are multiplied
    by nothing and count as zeros.
    """
    if u.shape[0] == 0:
        return torch.empty_like(u)
    spare = stack.experts
    rows, places, counts = vendor.gather_by_expert(
        u, torch.where(ids < 0, spare, ids).int(), spare + 1
    )
    counts = counts[:spare]
    out = stack(rows, counts)
    filled = torch.arange(out.shape[0], device=out.device) < counts.sum()
    out = torch.where(filled[:, None], out, 0.0).to(u.dtype)
    return vendor.gather_by_token(out, places, weights)
