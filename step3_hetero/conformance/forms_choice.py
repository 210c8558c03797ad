"""Inputs of the ops that choose: drawn so that rounding cannot change the choice."""

from __future__ import annotations

import numpy as np

from step3_hetero.conformance.case import Case, Inputs
from step3_hetero.conformance.draws import dtype_of, weight
from step3_hetero.specs import HostArray

Rng = np.random.Generator


def draw_route(case: Case, rng: Rng) -> Inputs:
    """Logits whose neighbours in rank stand clearly apart; ``offset`` lifts them all by 1000.

    ``ties``: equal logits in every row, among them rows that are equal throughout. ``underflow``:
    all but the first few probabilities are zero in float32, so that ranks below are ties at zero.
    """
    tokens, experts = case.size("tokens"), case.size("experts")
    ladder = np.linspace(-3, 3, experts)
    logits = np.array([rng.permutation(ladder) for _ in range(tokens)]).reshape(tokens, experts)
    if case.draw == "ties":
        logits = np.round(logits)
        logits[::4] = 0
    elif case.draw == "underflow":
        logits = np.array([rng.permutation(np.linspace(0, -110 * (experts - 1), experts))
                           for _ in range(tokens)]).reshape(tokens, experts)  # fmt: skip
    elif case.draw == "offset":
        logits = logits + 1000
    return Inputs({"logits": logits.astype(dtype_of(case.dtype))})


def draw_experts(case: Case, rng: Rng) -> Inputs:
    """Tokens, routing and stacked experts.

    By default the last expert gets no token and some places are empty (id -1); ``one-expert`` sends
    every token's first place to expert 1; ``one-expert-only`` leaves every other place empty.
    """
    tokens, experts, top_k = (case.size(n) for n in ("tokens", "experts", "top_k"))
    hidden, inter = case.size("hidden"), case.size("inter")
    ids = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens)], np.int32)
    ids = ids.reshape(tokens, top_k)
    if case.draw == "normal":
        ids[ids == experts - 1] = -1
    else:
        ids[ids == 1] = -1
        ids[:, 0] = 1
        ids[:, 1:] = -1 if case.draw == "one-expert-only" else ids[:, 1:]
    shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
    weights = {
        n: weight(rng, (experts, *shape), case.dtype, case.stored, n) for n, shape in shapes.items()
    }
    u = rng.standard_normal((tokens, hidden)).astype(dtype_of(case.dtype))
    share = rng.random((tokens, top_k)).astype(dtype_of(case.dtype))
    return Inputs({"u": u, "weights": share, "ids": ids}, weights)


def draw_sample(case: Case, rng: Rng) -> Inputs:
    """Logits and draws that fall in the middle of the chosen token's share of the whole.

    Rows take turns: greedy, plain, top-k, top-p, both. Near a boundary the last bit of a cumulative
    sum would decide, which is no property of a kernel. ``ties`` repeats the largest logit.
    """
    rows, vocab = case.size("rows"), case.size("vocab")
    logits = (rng.standard_normal((rows, vocab)) * 3).astype(dtype_of(case.dtype))
    if case.draw == "ties":
        logits = np.round(logits)
    banned = int(case.parameters.get("banned", -1))
    if banned >= 0 and rows:
        logits[:, banned] = logits.max(-1) + 1  # what may not be chosen is what would be
    kinds = np.arange(rows) % 5
    temperature = np.where(kinds == 0, 0.0, rng.choice([0.5, 1.0, 1.7], rows))
    top_k = np.where((kinds == 2) | (kinds == 4), min(20, vocab), 0).astype(np.int32)
    top_p, uniform = np.ones(rows), np.full(rows, 0.5)
    for row in np.nonzero(kinds)[0]:
        shares = _shares(logits[row], float(temperature[row]), int(top_k[row]), banned)
        if kinds[row] >= 3:
            sums = np.cumsum(shares)
            kept = int(np.searchsorted(sums, 0.8 * sums[-1])) + 1
            top_p[row] = sums[kept - 1] - shares[kept - 1] / 2
            shares = shares[:kept] / shares[:kept].sum()
        uniform[row] = _middle(rng, shares / shares.sum())
    return Inputs({"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                   "uniform": uniform})  # fmt: skip


def _shares(logits: HostArray, temperature: float, top_k: int, banned: int) -> HostArray:
    """Return the falling probabilities after top-k, not renormalised."""
    values = logits.astype(np.float64) / temperature
    if banned >= 0:
        values[banned] = -np.inf
    p = np.exp(values - values.max())
    falling = np.sort(p / p.sum())[::-1]
    return falling[: top_k or None]


def _middle(rng: Rng, shares: HostArray) -> float:
    """Return the middle of the interval of one of the tokens that hold at least a thousandth."""
    clear = np.nonzero(shares >= min(1e-3, shares.max()))[0]
    token = int(rng.choice(clear))
    return float(np.cumsum(shares)[token] - shares[token] / 2)
