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
    """See ``reference.sampling.sample``. All rows at once, greedy ones among them: no host sync.

    torch's own sort and sums, in float64: a row of logits is read a few times either way.
    """
    values = without(logits.double(), banned)
    greedy = values.argmax(-1)
    if logits.shape[0] == 0:
        return greedy.int()
    warm = torch.where(temperature == 0, 1.0, temperature.double())[:, None]
    p = ((values - values.amax(-1, keepdim=True)) / warm).softmax(-1)
    p, order = p.sort(dim=-1, descending=True, stable=True)
    cumulative, kept = _kept(p, top_k, top_p.double())
    share = uniform.double()[:, None] * cumulative.gather(1, kept - 1)
    place = torch.searchsorted(cumulative, share, right=True)
    number = torch.arange(p.shape[1], device=p.device)
    possible = ((p > 0) & (number < kept)).sum(-1, keepdim=True)
    drawn = order.gather(1, torch.minimum(place, possible - 1))[:, 0]
    return torch.where(temperature == 0, greedy, drawn).int()


def without(values: Tensor, banned: int) -> Tensor:
    """Return ``values`` with one column at minus infinity; none where ``banned`` is negative.

    Spelt so that the number goes to the card with a kernel: as an array it would be copied there,
    and the host would wait for the copy.
    """
    place = torch.arange(values.shape[1], device=values.device)
    return values.masked_fill(place == banned, -torch.inf)


def _kept(p: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cumulative sums of falling probabilities and how many entries are kept.

    Shapes: p (rows, vocab) -> (rows, vocab), (rows, 1). top_k 0 keeps all; top_p cuts to the
    shortest prefix that reaches it.
    """
    cumulative = p.cumsum(-1)
    kept = torch.where(top_k > 0, top_k, p.shape[1]).clamp(max=p.shape[1]).long()[:, None]
    reached = torch.searchsorted(cumulative, (top_p * (1 - 1e-12))[:, None]) + 1
    return cumulative, torch.where(top_p[:, None] < 1, torch.minimum(kept, reached), kept)
