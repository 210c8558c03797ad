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
    """See ``reference.sampling.sample``. Probabilities and their sums are in float64."""
    if banned >= 0:
        logits = logits.index_fill(1, torch.tensor([banned]), -torch.inf)
    chosen = logits.argmax(-1).int()
    for row in (temperature > 0).nonzero()[:, 0].tolist():
        wide = (logits[row].double() - logits[row].max()) / temperature[row]
        chosen[row] = _draw(wide, int(top_k[row]), float(top_p[row]), float(uniform[row]))
    return chosen


def _draw(logits: Tensor, top_k: int, top_p: float, uniform: float) -> int:
    p, order = logits.softmax(-1).sort(descending=True, stable=True)
    cumulative = p[: top_k or None].cumsum(0)
    if top_p < 1:
        kept = int(torch.searchsorted(cumulative, top_p * (1 - 1e-12))) + 1
        cumulative = cumulative[:kept]
    place = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    possible = int(p[: len(cumulative)].count_nonzero())
    return int(order[min(place, possible - 1)])
