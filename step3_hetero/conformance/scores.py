"""When a row of attention may err by one score: the rounding of the key that tells most.

To first order a row errs by the sum of p · δs · (v - out) over its keys, δs being what their scores
err by. Over many keys this averages, and the reference's own error shows it. Where one key tells
most it is that score's rounding: a single number, which both of the reference's runs may hit near
zero by luck, and which a mean over rows of longer and shorter contexts does not bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from step3_hetero.backend import BatchMeta
from step3_hetero.conformance.tolerance import FACTOR, ROUNDOFF, Bool, Float64
from step3_hetero.specs import LOGICAL_BLOCK, HostArray


@dataclass(frozen=True)
class Heads:
    """The query heads of one sequence that read one KV head, beside its keys, in float64.

    Shapes: q (queries · group, head_dim), k, v (keys, head_dim), visible (queries · group, keys);
    ``where`` finds (queries, group) in an array (tokens, heads).
    """

    where: tuple[slice, slice]
    q: Float64
    k: Float64
    v: Float64
    visible: Bool


def heads_of(q: HostArray, cache: tuple[HostArray, HostArray], meta: BatchMeta) -> Iterator[Heads]:
    """Yield a batch's heads, sequence by sequence.

    Shapes: q (tokens, heads, head_dim), each of the cache (blocks, 128, kv_heads, head_dim).
    """
    head_dim, kv_heads = q.shape[-1], cache[0].shape[2]
    group = q.shape[1] // kv_heads
    for s, length in enumerate(meta.context_lens):
        rows = slice(int(meta.query_starts[s]), int(meta.query_starts[s + 1]))
        seen = np.arange(length)[None, :] <= meta.positions[rows, None]
        table = meta.block_tables[s, : -(-length // LOGICAL_BLOCK)]
        for n in range(kv_heads):
            heads = slice(n * group, (n + 1) * group)
            asked = q[rows, heads].reshape(-1, head_dim).astype(np.float64)
            k, v = (x[table, :, n].reshape(-1, head_dim)[:length].astype(np.float64) for x in cache)
            yield Heads((rows, heads), asked, k, v, np.repeat(seen, group, axis=0))


def score_slack(
    q: HostArray,
    cache: tuple[HostArray, HostArray],
    meta: BatchMeta,
    scale: float,
    *,
    scaled: bool,
) -> Float64:
    """Return what a head's row may err by through one key's score, squared and relative.

    Shapes: q (tokens, heads, head_dim) float32, each of the cache (blocks, 128, kv_heads, head_dim)
    -> (tokens, heads). ``scaled`` says that a scale stands beside each key of the cache.
    """
    slack = np.zeros(q.shape[:2])
    for h in heads_of(q, cache, meta):
        told = (_told(h, scale) * _rounding(h, scale, scaled=scaled)).max(-1)
        slack[h.where] = FACTOR * (told**2).reshape(slack[h.where].shape)
    return np.where(np.isfinite(slack), slack, 0)


def _rounding(h: Heads, scale: float, *, scaled: bool) -> Float64:
    """Return by how much rounding moves each score, with signs at random.

    Shapes: -> (queries · group, keys).

    Added term after term, a score is rounded at each product and at each sum, then by ``scale``,
    and its exponential once: the squares of the roundings' sizes add up. With ``scaled`` it may be
    rounded once more: the exact result is that of code · scale as rounded to float32; a kernel may
    multiply the sum by the scale instead.
    """
    squares = np.zeros((len(h.q), len(h.k)))
    partial = np.zeros_like(squares)
    for a, b in zip(h.q.T * scale, h.k.T, strict=True):
        term = np.multiply.outer(a, b)
        partial += term
        squares += term**2 + partial**2
    squares += partial**2 * (2 if scaled else 1) + 1
    return ROUNDOFF["float32"] * np.sqrt(squares)


def _told(h: Heads, scale: float) -> Float64:
    """Return what an error of 1 in each key's score makes of a row: p · |v - out| / |out|.

    Shapes: -> (queries · group, keys).
    """
    scores = np.where(h.visible, h.q @ h.k.T * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = p @ h.v
    size = (out**2).sum(-1, keepdims=True)
    away = (h.v**2).sum(-1) - 2 * out @ h.v.T + size
    told: Float64 = p * np.sqrt(np.maximum(away, 0) / np.where(size > 0, size, 1))
    return told
