"""Attention over a paged cache. See ``reference.attention``.

All query heads of a KV head are the rows of one matrix: with one KV head under 64 query heads that
layout is worth a factor of 100 over torch's grouped attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from step3_hetero.backend import BatchMeta, KVCache
from step3_hetero.backends.cpu.rope import angles
from step3_hetero.backends.cpu.rows import quantise_runs
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE, to_host, to_torch
from step3_hetero.specs import LOGICAL_BLOCK, CacheSpec, HostArray

KEYS_AT_ONCE = 4096
"""Keys of one pass; longer contexts are folded pass by pass so that scores stay in cache."""

KEYS_IN_A_ROW = LOGICAL_BLOCK
"""Of float32 inputs the values of so many keys are added up by themselves, then the sums: a plain
product over hundreds of keys errs by more than float32's own rounding explains."""

KEYS_OF_A_GROUP = 8192
"""Keys of all sequences that decode together: widened to float32 they are still in cache when they
are multiplied, in memory that the allocator hands out again instead of fresh pages."""

SCORES_AT_ONCE = 1 << 22
"""Scores of one prefill pass."""


@dataclass(eq=False, slots=True)
class Group:
    """Queries that attend together: one of each of several sequences, or several of one.

    Shapes: rows (seqs · queries,), blocks (seqs, n), positions (seqs, queries).
    """

    rows: Tensor | slice
    blocks: Tensor
    positions: Tensor
    context: int


class Batch:
    """A batch as the kernels here take it, built once and shared by all layers."""

    def __init__(self, meta: BatchMeta) -> None:
        self.meta = meta
        self.positions = torch.from_numpy(meta.positions)
        kept = np.flatnonzero(meta.slots >= 0)
        whole = len(kept) == meta.tokens
        self.kept = None if whole else torch.from_numpy(kept)
        self.slots = torch.from_numpy(meta.slots if whole else meta.slots[kept]).long()
        self.padded = int(meta.query_starts[-1]) < meta.tokens
        self.groups = _groups(meta)
        self._angles: dict[tuple[int, float, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._hidden: dict[tuple[int, int, int], Tensor | None] = {}

    def angles(self, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rotary cosines and sines of the batch's positions."""
        key = (head_dim, theta, dtype)
        if key not in self._angles:
            self._angles[key] = angles(self.positions, head_dim, theta, dtype)
        return self._angles[key]

    def hidden(self, number: int, queries: slice, start: int, stop: int) -> Tensor | None:
        """Return which of the keys start..stop a group's queries may not see, None if they see all.

        Shapes: (seqs, queries, keys) bool. Kept for the other layers.
        """
        key = (number, queries.start, start)
        if key not in self._hidden:
            places = self.groups[number].positions[:, queries, None]
            hidden = torch.arange(start, stop) > places
            self._hidden[key] = hidden if bool(hidden.any()) else None
        return self._hidden[key]


def _groups(meta: BatchMeta) -> list[Group]:
    """Put decoding sequences of like length together, each prompt by itself."""
    lengths = np.diff(meta.query_starts)
    groups = [_group(meta, np.array([s])) for s in np.flatnonzero(lengths > 1)]
    single = np.flatnonzero(lengths == 1)
    blocks = -(-meta.context_lens[single] // LOGICAL_BLOCK)
    sizes = np.ceil(np.log2(np.maximum(blocks, 1))).astype(int)
    for size in np.unique(sizes):
        alike = single[sizes == size]
        most = max(1, KEYS_OF_A_GROUP // max(1, int(meta.context_lens[alike].max())))
        groups += [_group(meta, alike[i : i + most]) for i in range(0, len(alike), most)]
    return groups


def _group(meta: BatchMeta, seqs: HostArray) -> Group:
    starts, stops = meta.query_starts[seqs], meta.query_starts[seqs + 1]
    rows = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
    context = int(meta.context_lens[seqs].max())
    blocks = meta.block_tables[seqs, : -(-context // LOGICAL_BLOCK)]
    together = len(rows) == rows[-1] - rows[0] + 1
    return Group(
        slice(int(rows[0]), int(rows[-1]) + 1) if together else torch.from_numpy(rows),
        torch.from_numpy(np.ascontiguousarray(blocks)).long(),
        torch.from_numpy(meta.positions[rows].reshape(len(seqs), -1)),
        context,
    )


class CpuCache(KVCache):
    """Keys and values by slot: two tensors (slots, kv_heads, head_dim).

    Of FP8 and INT8 they hold codes, and scales (slots, kv_heads) stand beside them.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.nbytes = spec.nbytes
        shape = (spec.blocks * LOGICAL_BLOCK, spec.kv_heads, spec.head_dim)
        self.k, self.v = _lazy_zeros(shape, spec.dtype), _lazy_zeros(shape, spec.dtype)
        beside = shape[:2] if spec.scaled else (0, 0)  # a scale of 0 too makes a number of 0
        self.k_scale, self.v_scale = (_lazy_zeros(beside, "float32") for _ in "kv")

    def write(self, k: Tensor, v: Tensor, batch: Batch) -> None:
        """Store each row at its slot, quantised as the cache is."""
        if batch.kept is not None:
            k, v = k.index_select(0, batch.kept), v.index_select(0, batch.kept)
        for x, stored, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            if self.spec.scaled:
                x, scale = quantise_runs(x, self.spec.dtype)
                scales.index_copy_(0, batch.slots, scale)
            _bytes(stored).index_copy_(0, batch.slots, _bytes(x.to(stored.dtype)))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy one block after another, scales along with their codes."""
        scales = (self.k_scale, self.v_scale) if self.spec.scaled else ()
        for source, target in pairs:
            for stored in (self.k, self.v, *scales):
                blocked = _blocked(stored)
                blocked[target] = blocked[source]

    def read(self, blocks: Sequence[int]) -> tuple[HostArray, HostArray]:
        """Return copies of whole blocks; of FP8 and INT8 code · scale in float32."""
        chosen = torch.tensor(list(blocks), dtype=torch.long)
        k, v = self.numbers("k", chosen), self.numbers("v", chosen)
        return to_host(k), to_host(v)

    def numbers(self, which: str, blocks: Tensor, keys: int = LOGICAL_BLOCK) -> Tensor:
        """Return the first ``keys`` rows of blocks (n,) of the keys, or values, as numbers.

        Shapes: -> (n, keys, kv_heads, head_dim) in the cache's dtype, float32 for FP8 and INT8.
        """
        stored: Tensor = getattr(self, which)
        found = _blocked(_bytes(stored))[:, :keys].index_select(0, blocks).view(stored.dtype)
        if not self.spec.scaled:
            return found
        scales: Tensor = getattr(self, f"{which}_scale")
        return found.float() * _blocked(scales)[:, :keys].index_select(0, blocks)[..., None]


def _lazy_zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Return zeros whose pages the system hands out at first use: torch.zeros would touch them."""
    target = TORCH_DTYPE[dtype]
    if 0 in shape:
        return torch.zeros(shape, dtype=target)
    size = int(np.prod(shape)) * target.itemsize
    return to_torch(np.zeros(size, np.uint8)).view(target).view(shape)


def _bytes(stored: Tensor) -> Tensor:
    """Return FP8 codes as the bytes they are: torch has no indexing for float8; others as given."""
    return stored.view(torch.uint8) if stored.dtype == torch.float8_e4m3fn else stored


def _blocked(stored: Tensor) -> Tensor:
    return stored.view(-1, LOGICAL_BLOCK, *stored.shape[1:])


def attention(q: Tensor, cache: CpuCache, batch: Batch, *, scale: float) -> Tensor:
    """See ``reference.attention.attention``."""
    out = torch.zeros_like(q) if batch.padded or not batch.groups else torch.empty_like(q)
    for number, group in enumerate(batch.groups):
        out[group.rows] = _attend(q[group.rows], cache, batch, number, scale)
    return out


def _attend(q: Tensor, cache: CpuCache, batch: Batch, number: int, scale: float) -> Tensor:
    """Attend for one group, as many queries at once as keep the scores small."""
    group = batch.groups[number]
    seqs, queries = group.positions.shape
    heads, head_dim = q.shape[1:]
    in_a_row = KEYS_IN_A_ROW if q.dtype == torch.float32 else KEYS_AT_ONCE
    rows = (q.float() * scale).view(seqs, queries, heads, head_dim)
    step = max(1, SCORES_AT_ONCE // (seqs * heads * min(group.context, KEYS_AT_ONCE)))
    parts = [
        _fold(rows[:, i : i + step], cache, batch, number, slice(i, i + step), in_a_row)
        for i in range(0, queries, step)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).reshape(q.shape).to(q.dtype)


def _fold(
    q: Tensor, cache: CpuCache, batch: Batch, number: int, chosen: slice, in_a_row: int
) -> Tensor:
    """Return softmax(q·kᵀ)·v, keys taken KEYS_AT_ONCE at a time with a running maximum.

    Shapes: q (seqs, queries, heads, head_dim) float32, scaled -> the same. All of it is float32:
    torch rounds a product of bfloat16 matrices to bfloat16, and neither scores nor probabilities
    may be.
    """
    group = batch.groups[number]
    seqs, queries, heads, head_dim = q.shape
    kv_heads = cache.spec.kv_heads
    rows = q.view(seqs, queries, kv_heads, -1, head_dim).transpose(1, 2)
    rows = rows.reshape(seqs * kv_heads, -1, head_dim)  # (seqs·kv_heads, queries·group, head_dim)
    last = int(group.positions[:, chosen].max()) + 1
    state: tuple[Tensor, Tensor, Tensor] | None = None
    for start in range(0, last, KEYS_AT_ONCE):
        stop = min(start + KEYS_AT_ONCE, last)
        k, v = _keys(cache, group, start, stop)
        scores = torch.bmm(rows, k.transpose(1, 2))
        hidden = batch.hidden(number, chosen, start, stop)
        if hidden is not None:
            _hide(scores, v, hidden)
        state = _merge(state, scores, v, in_a_row)
    assert state is not None
    total, _, weight = state
    out = (total / weight).view(seqs, kv_heads, queries, -1, head_dim).transpose(1, 2)
    return out.reshape(seqs, queries, heads, head_dim)


def _keys(cache: CpuCache, group: Group, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return keys and values start..stop of each sequence, (seqs · kv_heads, keys, head_dim)."""
    first, last = start // LOGICAL_BLOCK, -(-stop // LOGICAL_BLOCK)
    blocks = group.blocks[:, first:last]
    k, v = (_gather(cache, which, blocks, stop - start) for which in "kv")
    return k, v


def _gather(cache: CpuCache, which: str, blocks: Tensor, keys: int) -> Tensor:
    seqs, head_dim = blocks.shape[0], cache.spec.head_dim
    if blocks.shape[1] == 1:
        found = cache.numbers(which, blocks[:, 0], keys)
    else:
        found = cache.numbers(which, blocks.flatten())
        found = found.view(seqs, -1, cache.spec.kv_heads, head_dim)[:, :keys]
    found = found.float().transpose(1, 2)  # (seqs, kv_heads, keys, head_dim)
    return found.reshape(-1, keys, head_dim).contiguous()


def _hide(scores: Tensor, v: Tensor, hidden: Tensor) -> None:
    """Take hidden keys out of the scores, and values that no query sees out of the product.

    The tail of a sequence's last block may hold what its last owner left: 0 times infinity is NaN.
    """
    seqs, queries, keys = hidden.shape
    shaped = scores.view(seqs, -1, queries, scores.shape[1] // queries, keys)
    shaped.masked_fill_(hidden[:, None, :, None, :], -torch.inf)
    unseen = hidden.all(1)  # (seqs, keys)
    if bool(unseen.any()):
        v.view(seqs, -1, keys, v.shape[-1]).masked_fill_(unseen[:, None, :, None], 0)


def _merge(
    state: tuple[Tensor, Tensor, Tensor] | None, scores: Tensor, v: Tensor, in_a_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold one pass of keys in: (weighted values, maximum, sum of weights)."""
    top = scores.amax(-1, keepdim=True)
    if state is not None:
        top = torch.maximum(top, state[1])
    safe = top.clamp_min(torch.finfo(torch.float32).min)  # a pass may hold no visible key
    p = scores.sub_(safe).exp_()
    weight, total = p.sum(-1, keepdim=True), _weighted(p, v, in_a_row)
    if state is not None:
        shrink = (state[1] - safe).exp()
        total, weight = total + state[0] * shrink, weight + state[2] * shrink
    return total, top, weight


def _weighted(p: Tensor, v: Tensor, in_a_row: int) -> Tensor:
    """Return p·v, the sums over ``in_a_row`` keys each added up in order."""
    total = torch.bmm(p[..., :in_a_row], v[:, :in_a_row])
    for start in range(in_a_row, v.shape[1], in_a_row):
        keys = slice(start, start + in_a_row)
        total += torch.bmm(p[..., keys], v[:, keys])
    return total


def self_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """See ``reference.attention.self_attention``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).contiguous()
