"""Choosing the next token. See ``reference.sampling``."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    uniform: Tensor,
    *,
    banned: int = -1,
) -> Tensor:
    """See ``reference.sampling.sample``. All rows at once, without asking the host.

    Sums are in float64, which the device computes in software: assumed of every operator here.
    """
    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.int32, device=logits.device)
    wide = logits.double()
    if banned >= 0:
        wide[:, banned] = -torch.inf
    vocab = torch.arange(wide.shape[1], dtype=torch.int32, device=wide.device)
    top = wide.amax(-1, keepdim=True)
    greedy = torch.where(wide == top, vocab, wide.shape[1]).amin(-1)
    hot = temperature > 0
    unit = torch.where(hot, temperature, 1.0).double()[:, None]
    drawn = _draw((wide - top) / unit, top_k, top_p.double(), uniform.double())
    return torch.where(hot, drawn, greedy).int()


def _draw(wide: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Return the drawn id of each row. Shapes: wide (rows, vocab), the others (rows,)."""
    p, order = wide.softmax(-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(p.shape[1], device=p.device)
    limit = torch.where(top_k > 0, top_k, p.shape[1]).clamp(max=p.shape[1])
    p = torch.where(rank < limit[:, None], p, 0.0)
    cumulative = p.cumsum(-1)
    short = (cumulative < (top_p * (1 - 1e-12))[:, None]).sum(-1) + 1
    kept = torch.where(top_p < 1, torch.minimum(short, limit), limit)
    total = cumulative.gather(1, (kept - 1)[:, None])
    inside = rank < kept[:, None]
    place = ((cumulative <= uniform[:, None] * total) & inside).sum(-1)
    possible = ((p > 0) & inside).sum(-1)
    return order.gather(1, torch.minimum(place, possible - 1)[:, None])[:, 0]
