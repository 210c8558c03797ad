"""Attention over a paged cache. See ``reference.attention``.

bfloat16 goes through the vendor's fused operator, decoding sequences in one call, each prompt in
one of its own; with option ``triton`` decoding sequences go through decode.py instead. float32,
which that operator does not take, is composed of products and softmax. Of an INT8 cache the
operator reads codes and scales for decoding sequences; for prompts it takes no scales from pages,
and code · scale in bfloat16 errs beyond what rounding explains, so those are composed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from step3_hetero.backend import BatchMeta, KVCache
from step3_hetero.backends.ascend import decode, limits, vendor
from step3_hetero.backends.ascend.rope import looked_up
from step3_hetero.backends.ascend.rows import quantise_runs
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE, to_host
from step3_hetero.errors import UnsupportedOp
from step3_hetero.specs import LOGICAL_BLOCK, CacheSpec, HostArray

SCORES_AT_ONCE = 1 << 28
"""Scores of one pass of the composed attention: 1 GiB in float32."""


@dataclass(eq=False, slots=True)
class Group:
    """Sequences that one call attends: many with one query each, or one with several.

    Shapes: rows (seqs · queries,), table (seqs, blocks) int32. ``parts`` is how many pieces each
    context is cut into.
    """

    rows: Tensor | slice
    table: Tensor
    contexts: list[int]
    queries: int
    parts: int
    lengths: Tensor | None = None  # contexts on the device, where a Triton kernel reads them


class Batch:
    """A batch as the kernels here take it, built once and shared by all layers."""

    def __init__(
        self,
        meta: BatchMeta,
        device: torch.device,
        split_tokens: int = 0,
        triton: decode.Launch | None = None,
    ) -> None:
        self.meta = meta
        self.device = device
        self.split_tokens = split_tokens
        self.triton = triton
        self.positions = torch.from_numpy(meta.positions).to(device)
        kept = np.flatnonzero(meta.slots >= 0)
        self.writes = len(kept)
        whole = len(kept) == meta.tokens
        self.kept = None if whole else torch.from_numpy(kept.astype(np.int32)).to(device)
        self.slots = torch.from_numpy(meta.slots if whole else meta.slots[kept]).to(device)
        self.padded = int(meta.query_starts[-1]) < meta.tokens
        self._angles: dict[tuple[int, float, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._scale_places: dict[int, Tensor] = {}

    @cached_property
    def groups(self) -> list[Group]:
        """Return what is attended together."""
        groups = _groups(self.meta, self.device, self.split_tokens)
        for group in groups if self.triton else ():
            group.lengths = torch.tensor(group.contexts, dtype=torch.int32).to(self.device)
        return groups

    def scale_places(self, kv_heads: int) -> Tensor:
        """Return where each written row's scales lie in (blocks, kv_heads, 128), flattened.

        Shapes: -> (rows · kv_heads,) int64.
        """
        if kv_heads not in self._scale_places:
            slots = self.meta.slots[self.meta.slots >= 0].astype(np.int64)
            self._scale_places[kv_heads] = torch.from_numpy(places(slots, kv_heads)).to(self.device)
        return self._scale_places[kv_heads]

    def angles(self, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rotary cosines and sines of the batch's positions."""
        key = (head_dim, theta, dtype)
        if key not in self._angles:
            limits.positions(int(self.meta.positions.max(initial=0)))
            self._angles[key] = looked_up(self.positions, *key)
        return self._angles[key]


def places(slots: HostArray, kv_heads: int) -> HostArray:
    """Return each slot's places in (blocks, kv_heads, 128), head by head.

    >>> places(np.array([0, 129]), 2).tolist()
    [0, 128, 257, 385]
    """
    block, offset = np.divmod(slots, LOGICAL_BLOCK)
    heads = np.arange(kv_heads, dtype=slots.dtype)
    flat: HostArray = (block[:, None] * kv_heads + heads) * LOGICAL_BLOCK + offset[:, None]
    return flat.ravel()


def _groups(meta: BatchMeta, device: torch.device, split: int) -> list[Group]:
    lengths = np.diff(meta.query_starts)
    check_last(meta, lengths)
    groups = [
        _group(meta, np.array([s]), device, int(lengths[s]), 1) for s in np.flatnonzero(lengths > 1)
    ]
    single = np.flatnonzero(lengths == 1)
    parts = -(-meta.context_lens[single] // split) if split else np.ones(len(single), int)
    groups += [_group(meta, single[parts == n], device, 1, int(n)) for n in np.unique(parts)]
    return groups


def check_last(meta: BatchMeta, lengths: HostArray) -> None:
    """Refuse queries that are not the last tokens of their context: the mask could not say so."""
    for s in np.flatnonzero(lengths > 0):
        rows = slice(int(meta.query_starts[s]), int(meta.query_starts[s + 1]))
        wanted = np.arange(meta.context_lens[s] - lengths[s], meta.context_lens[s])
        if not np.array_equal(meta.positions[rows], wanted):
            raise UnsupportedOp(
                f"sequence {s} of a batch: positions {meta.positions[rows].tolist()} refused; "
                f"allowed: the last {lengths[s]} of its {meta.context_lens[s]} tokens"
            )


def _group(
    meta: BatchMeta, seqs: HostArray, device: torch.device, queries: int, parts: int
) -> Group:
    starts = meta.query_starts[seqs]
    rows = (starts[:, None] + np.arange(queries)).ravel().astype(np.int32)
    contexts = [int(n) for n in meta.context_lens[seqs]]
    table = meta.block_tables[seqs, : -(-max(contexts) // LOGICAL_BLOCK)]
    together = len(rows) == rows[-1] - rows[0] + 1
    return Group(
        slice(int(rows[0]), int(rows[-1]) + 1) if together else torch.from_numpy(rows).to(device),
        torch.from_numpy(np.ascontiguousarray(table)).to(device),
        contexts,
        queries,
        parts,
    )


class AscendCache(KVCache):
    """Keys and values (blocks, 128, kv_heads, head_dim), heads padded to 16 columns, INT8's to 32.

    Of INT8 these are codes, and scales (blocks, kv_heads, 128) float32 stand beside them: one for
    each token's key, and value, of a KV head. ``spare`` blocks follow those of the spec.
    """

    def __init__(self, spec: CacheSpec, device: torch.device, spare: int = 0) -> None:
        limits.kv_format(spec.dtype, "float32")
        self.spec = spec
        fused = spec.dtype != "float32"
        self.columns = limits.padded_head_dim(spec.head_dim, spec.dtype) if fused else spec.head_dim
        if fused and spec.kv_heads > 1:
            limits.flat_cache(spec.kv_heads, self.columns)
        blocks = spec.blocks + spare
        shape = (blocks, LOGICAL_BLOCK, spec.kv_heads, self.columns)
        self.k = torch.zeros(shape, dtype=TORCH_DTYPE[spec.dtype], device=device)
        self.v = torch.zeros_like(self.k)
        self.scales: tuple[Tensor, Tensor] | None = None
        if spec.scaled:
            beside = (blocks, spec.kv_heads, LOGICAL_BLOCK)
            self.scales = (torch.zeros(beside, device=device), torch.zeros(beside, device=device))
        self.nbytes = sum(x.nbytes for x in self._stored())

    def write(self, k: Tensor, v: Tensor, batch: Batch) -> None:
        """Store each row at its slot."""
        if batch.writes == 0:
            return
        if batch.kept is not None:
            k, v = k.index_select(0, batch.kept), v.index_select(0, batch.kept)
        if self.scales is not None:
            k, v = (self._quantised(x, held, batch) for x, held in zip((k, v), self.scales,
                                                                       strict=True))  # fmt: skip
        k, v = (widened(x.to(self.k.dtype), self.columns).contiguous() for x in (k, v))
        vendor.write_cache(k, v, self.k, self.v, batch.slots)

    def _quantised(self, x: Tensor, scales: Tensor, batch: Batch) -> Tensor:
        """Return codes of x (rows, kv_heads, head_dim) and store their scales."""
        codes, scale = quantise_runs(x)
        scales.view(-1).index_copy_(0, batch.scale_places(self.spec.kv_heads), scale.view(-1))
        return codes

    def _stored(self) -> tuple[Tensor, ...]:
        return (self.k, self.v, *(self.scales or ()))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy one block after another."""
        for source, target in pairs:
            for stored in self._stored():
                stored[target].copy_(stored[source])

    def read(self, blocks: Sequence[int]) -> tuple[HostArray, HostArray]:
        """Return copies of whole blocks, without the padding; of INT8 code · scale in float32."""
        chosen = torch.tensor(list(blocks), dtype=torch.int32).to(self.k.device)
        found = [x.index_select(0, chosen).cpu() for x in self._stored()]
        k, v = (x[..., : self.spec.head_dim] for x in found[:2])
        if self.scales is not None:
            k, v = (x.float() * s.transpose(1, 2)[..., None]
                    for x, s in zip((k, v), found[2:], strict=True))  # fmt: skip
        return to_host(k), to_host(v)

    def paged(self, stored: Tensor) -> Tensor:
        """Return keys or values as ``vendor.fused_attention`` reads them."""
        blocks, block, kv_heads, columns = stored.shape
        if kv_heads == 1:
            return stored.view(blocks, 1, block, columns)
        return stored.view(blocks, block, kv_heads * columns)

    def gather(self, table: Tensor, length: int) -> list[Tensor]:
        """Return a sequence's first keys and values in float32, the padding's columns too.

        Shapes: table (blocks,) -> (kv_heads, length, columns) twice.
        """
        found = []
        for number, stored in enumerate((self.k, self.v)):
            x = stored.index_select(0, table).float()  # (blocks, 128, kv_heads, columns)
            if self.scales is not None:
                scale = self.scales[number].index_select(0, table)
                x = x * scale.transpose(1, 2)[..., None]
            found.append(x.flatten(0, 1)[:length].transpose(0, 1))
        return found


def widened(x: Tensor, columns: int) -> Tensor:
    """Return ``x`` with zeros added to its last axis."""
    return F.pad(x, (0, columns - x.shape[-1])) if x.shape[-1] < columns else x


@lru_cache(maxsize=4)
def causal_mask(device: torch.device) -> Tensor:
    """Return the compressed causal mask: true where a key is hidden."""
    side = limits.MASK_SIDE
    return torch.ones(side, side, dtype=torch.bool).triu(1).to(device)


def attention(q: Tensor, cache: AscendCache, batch: Batch, *, scale: float) -> Tensor:
    """See ``reference.attention.attention``."""
    out = torch.zeros_like(q) if batch.padded or not batch.groups else torch.empty_like(q)
    for group in batch.groups:
        rows, split = q[group.rows], batch.split_tokens
        if batch.triton and group.queries == 1:
            out[group.rows] = _decoded(batch.triton, rows, cache, group, scale, split)
        elif q.dtype == torch.bfloat16 and not (cache.scales and group.queries > 1):
            out[group.rows] = _fused(rows, cache, group, scale, split)
        else:
            out[group.rows] = _composed(rows.float(), cache, group, scale).to(q.dtype)
    return out


def _decoded(
    launch: decode.Launch, q: Tensor, cache: AscendCache, group: Group, scale: float, split: int
) -> Tensor:
    """Attend for decoding sequences by the Triton kernel. Shapes: q (seqs, heads, d) -> q's."""
    spec = cache.spec
    limits.decode_cache(spec.kv_heads, spec.head_dim, spec.dtype)
    assert group.lengths is not None, "a batch with a launcher has them"
    return decode.attend(launch, q, cache.k, cache.v, group.table, group.lengths,
                         scale=scale, parts=group.parts, split=split)  # fmt: skip


def _fused(q: Tensor, cache: AscendCache, group: Group, scale: float, split: int) -> Tensor:
    """Attend for one group by the vendor's operator. Shapes: q (rows, heads, d) -> the same."""
    rows, heads, head_dim = q.shape
    seqs, queries = len(group.contexts), group.queries
    wide = widened(q, cache.columns).view(seqs, queries, heads, -1)
    wide = wide.transpose(1, 2).contiguous()  # (seqs, heads, queries, columns)
    if group.parts > 1:
        out = _in_parts(wide, cache, group, scale, split)
    else:
        out = _part(wide, cache, group, scale, group.table, group.contexts)[0]
    return out.transpose(1, 2).reshape(rows, heads, -1)[..., :head_dim]


def _part(
    q: Tensor,
    cache: AscendCache,
    group: Group,
    scale: float,
    table: Tensor,
    contexts: list[int],
    *,
    lse: bool = False,
) -> tuple[Tensor, Tensor]:
    several = group.queries > 1
    return vendor.fused_attention(
        q,
        cache.paged(cache.k),
        cache.paged(cache.v),
        kv_heads=cache.spec.kv_heads,
        scale=scale,
        mask=causal_mask(q.device) if several else None,
        sparse_mode=3 if several else 0,
        block_table=table,
        block_size=LOGICAL_BLOCK,
        kv_lengths=contexts,
        lse=lse,
        scales=cache.scales,
    )


def _in_parts(q: Tensor, cache: AscendCache, group: Group, scale: float, split: int) -> Tensor:
    """Attend to each piece of the contexts and merge. Shapes: q (seqs, heads, 1, d) -> the same."""
    outs, sums = [], []
    for part in range(group.parts):
        blocks = slice(part * split // LOGICAL_BLOCK, (part + 1) * split // LOGICAL_BLOCK)
        contexts = [min(split, n - part * split) for n in group.contexts]
        table = group.table[:, blocks].contiguous()
        out, lse = _part(q, cache, group, scale, table, contexts, lse=True)
        outs.append(out.view(-1, q.shape[-1]))
        sums.append(lse.view(-1))
    return vendor.merge_parts(sums, outs).view(q.shape)


def _composed(q: Tensor, cache: AscendCache, group: Group, scale: float) -> Tensor:
    """Attend sequence by sequence in float32. Shapes: q (rows, heads, d) -> the same."""
    parts = []
    for s, context in enumerate(group.contexts):
        used = group.table[s, : -(-context // LOGICAL_BLOCK)]
        k, v = (x[..., : q.shape[-1]] for x in cache.gather(used, context))
        rows = q[s * group.queries : (s + 1) * group.queries]
        step = max(1, SCORES_AT_ONCE // (q.shape[1] * context))
        for start in range(0, group.queries, step):
            first = context - group.queries + start
            parts.append(softmax_sum(rows[start : start + step], k, v, scale, first))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def softmax_sum(q: Tensor, k: Tensor, v: Tensor, scale: float, first: int | None) -> Tensor:
    """Return softmax(scale · q·kᵀ)·v, the queries standing at ``first`` and on; None sees all.

    Shapes: q (queries, heads, d), k, v (kv_heads, keys, d) -> q's.
    """
    queries, heads, head_dim = q.shape
    kv_heads, keys, _ = k.shape
    rows = q.view(queries, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    rows = rows.reshape(kv_heads, -1, head_dim)  # (kv_heads, group · queries, d)
    scores = torch.bmm(rows, k.transpose(1, 2)) * scale
    if first is not None and first + 1 < keys:
        places = torch.arange(first, first + queries, device=q.device)
        hidden = torch.arange(keys, device=q.device) > places[:, None]  # (queries, keys)
        scores = scores.view(kv_heads, -1, queries, keys).masked_fill(hidden, -torch.inf)
        scores = scores.view(kv_heads, -1, keys)
    out = torch.bmm(scores.softmax(-1), v).view(kv_heads, -1, queries, head_dim)
    return out.permute(2, 0, 1, 3).reshape(queries, heads, head_dim)


def self_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """See ``reference.attention.self_attention``."""
    images, _, heads, head_dim = q.shape
    if q.dtype == torch.bfloat16:
        columns = limits.padded_head_dim(head_dim)
        wide = [widened(x, columns).transpose(1, 2).contiguous() for x in (q, k, v)]
        out = vendor.fused_attention(*wide, kv_heads=heads, scale=scale)[0]
        return out.transpose(1, 2)[..., :head_dim].contiguous()
    rows = [
        softmax_sum(q[i], k[i].transpose(0, 1), v[i].transpose(0, 1), scale, None)
        for i in range(images)
    ]
    return torch.stack(rows)
