"""Attention and its cache as the vendor documents them.

Source: ``_op_plugin_docs.py`` in the wheel that schemas.json names, entries of the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import require, require_contiguous, require_default, require_dtype, require_some

FIA = "npu_fused_infer_attention_score"
LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND", "TND")
MASK_SIDE = 2048
INT32_MAX = 2**31 - 1
PER_TOKEN_HEAD_PAGED = 5
DEFAULTS = {"pre_tokens": INT32_MAX, "next_tokens": INT32_MAX, "inner_precise": 0,
            "antiquant_mode": 0}  # fmt: skip


def fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
    key_antiquant_scale: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(scale·q·kᵀ + mask)·v, and max + log Σ exp of the scores.

    Shapes: query (B, N, S, D); key, value (B, kv, S, D), or with a block table (blocks, kv, block,
    D) or (blocks, block, kv·D). INT8 keys and values mean code · scale, for one query a sequence
    with scales in pages (mode 5), (blocks, kv, block) float32. Only BNSD is implemented; the limits
    of the others are held. Assumed: sums in float32, rounded once.
    """
    require_default(FIA, rest, DEFAULTS)
    kv_heads = num_key_value_heads or num_heads
    scales = (key_antiquant_scale, value_antiquant_scale)
    _check_query(query, key, value, input_layout, num_heads, kv_heads, block_table)
    _check_scales(query, key, kv_heads, block_table, block_size, scales,
                  (key_antiquant_mode, value_antiquant_mode))  # fmt: skip
    batch, _, queries, head_dim = query.shape
    lens = list(actual_seq_lengths or [queries] * batch)
    require(FIA, len(lens) in (1, batch), f"{len(lens)} query lengths for {batch} sequences")
    lens = lens * batch if len(lens) == 1 else lens
    require(FIA, max(lens) <= queries, f"a query length of {max(lens)} in an axis of {queries}")
    causal = _is_causal(queries, sparse_mode, atten_mask)
    if block_table is None:
        kv_lens = list(actual_seq_lengths_kv or [key.shape[2]] * batch)
        pages = [(key[b], value[b]) for b in range(batch)]
    else:
        kv_lens = _check_paged(key, value, block_table, actual_seq_lengths_kv, block_size, query,
                               kv_heads)  # fmt: skip
        pages = [tuple(_pages(x, block_table[b], kv_heads, head_dim, s)
                       for x, s in zip((key, value), scales, strict=True))
                 for b in range(batch)]  # fmt: skip
    out = torch.zeros_like(query)
    lse = torch.full((batch, num_heads, queries, 1), torch.inf)
    for b, (k, v) in enumerate(pages):
        n, length = lens[b] if queries > 1 else 1, kv_lens[b]
        found = _attend(query[b, :, :n], k[:, :length], v[:, :length], scale, causal)
        out[b, :, :n], lse[b, :, :n] = found[0].to(out.dtype), found[1]
    return out, lse if softmax_lse_flag else torch.zeros(1)


def _check_query(query: Tensor, key: Tensor, value: Tensor, layout: str, heads: int, kv_heads: int,
                 table: Tensor | None) -> None:  # fmt: skip
    real = (torch.float16, torch.bfloat16)
    require_dtype(FIA, "query", query, real)
    for name, x in (("key", key), ("value", value)):
        require_dtype(FIA, name, x, (query.dtype, torch.int8))
    require(FIA, key.dtype == value.dtype, "key and value differ in dtype")
    require_contiguous(FIA, query=query, key=key, value=value)
    require(FIA, layout in LAYOUTS, f"layout {layout!r} is none of {LAYOUTS}")
    require(FIA, heads % kv_heads == 0 and heads // kv_heads <= 64,
            f"{heads} query heads over {kv_heads} KV heads: at most 64 to 1")  # fmt: skip
    if layout == "TND":
        require(FIA, table is None, "TND takes no block table")
        require(FIA, query.shape[-1] == 192, f"TND takes head dim 192, not {query.shape[-1]}")
    require(FIA, layout == "BNSD", f"layout {layout} has no implementation here")
    require(FIA, query.dim() == 4 and query.shape[1] == heads, f"{query.shape} with {heads} heads")
    batch, _, queries, head_dim = query.shape
    require(FIA, 0 < batch <= 65536 and heads <= 256, f"{batch} sequences, {heads} heads")
    require(FIA, queries <= 20971520, f"{queries} queries")
    step = 32 if key.dtype == torch.int8 else 16
    fits = head_dim <= 512 and head_dim % step == 0
    require(FIA, fits, f"head dim {head_dim}: to 512, by {step}")


def _check_scales(query: Tensor, key: Tensor, kv_heads: int, table: Tensor | None, block_size: int,
                  scales: tuple[Tensor | None, Tensor | None],
                  modes: tuple[int, int]) -> None:  # fmt: skip
    if key.dtype != torch.int8:
        require(FIA, scales == (None, None) and modes == (0, 0), "scales, and no INT8 keys")
        return
    known = query.shape[2] == 1 and table is not None
    require(FIA, known, "INT8 keys of a prompt have no scales in pages; without pages they have no "
            "implementation here")  # fmt: skip
    same = modes == (PER_TOKEN_HEAD_PAGED,) * 2
    require(FIA, same, f"antiquant modes {modes}: only 5 is implemented here, for both")
    require(FIA, block_size % 32 == 0, f"block size {block_size}: by 32 for INT8")
    for name, scale in zip(("key", "value"), scales, strict=True):
        require(FIA, scale is not None, f"INT8 keys and values, and no {name}_antiquant_scale")
        assert scale is not None
        require_dtype(FIA, f"{name}_antiquant_scale", scale, (torch.float32,))
        require_contiguous(FIA, **{f"{name}_antiquant_scale": scale})
        shape = (len(key), kv_heads, block_size)
        require(FIA, tuple(scale.shape) == shape, f"{tuple(scale.shape)}, documented: {shape}")


def _is_causal(queries: int, sparse_mode: int, mask: Tensor | None) -> bool:
    require(FIA, sparse_mode in (0, 1, 2, 3, 4), f"sparse_mode {sparse_mode} is not implemented")
    if queries == 1 or sparse_mode < 2:
        require(FIA, mask is None or queries == 1, "a full mask has no implementation here")
        return False
    require(FIA, sparse_mode == 3, f"sparse_mode {sparse_mode} has no implementation here")
    _check_mask(mask)
    return True


def _check_mask(mask: Tensor | None) -> None:
    require(FIA, mask is not None, "sparse_mode 3 needs the 2048 x 2048 mask")
    assert mask is not None
    require_dtype(FIA, "atten_mask", mask, (torch.bool, torch.int8, torch.uint8))
    require_contiguous(FIA, atten_mask=mask)
    side = (MASK_SIDE, MASK_SIDE)
    shapes = (side, (1, *side), (1, 1, *side))
    require(FIA, tuple(mask.shape) in shapes, f"mask {tuple(mask.shape)}; documented: {shapes}")
    above = torch.ones(side, dtype=torch.bool).triu(1)
    require(FIA, bool((mask.reshape(side).bool() == above).all()), "the mask is not triangular")


def _check_paged(key: Tensor, value: Tensor, table: Tensor, kv_lens: Sequence[int] | None,
                 block_size: int, query: Tensor, kv_heads: int) -> list[int]:  # fmt: skip
    batch, _, queries, head_dim = query.shape
    require(FIA, kv_lens is not None, "a block table needs actual_seq_lengths_kv")
    assert kv_lens is not None
    require_dtype(FIA, "block_table", table, (torch.int32,))
    require(FIA, table.dim() == 2 and len(table) == batch, f"block table {tuple(table.shape)}")
    step = 16 if queries == 1 else 128
    fits = 0 < block_size <= 512 and block_size % step == 0
    require(FIA, fits, f"block size {block_size}: to 512, by {step}")
    require(FIA, key.shape == value.shape, "key and value caches differ in shape")
    flat, split = (block_size, kv_heads * head_dim), (kv_heads, block_size, head_dim)
    require(FIA, tuple(key.shape[1:]) in (flat, split), f"cache {tuple(key.shape)}")
    require(FIA, key.dim() == 4 or kv_heads * head_dim <= 65535, "KV_N·D beyond 65535")
    require(FIA, key.numel() <= INT32_MAX, f"a cache of {key.numel()} elements: int32 counts them")
    require(FIA, len(kv_lens) >= batch, f"{len(kv_lens)} KV lengths for {batch} sequences")
    require(FIA, queries > 1 or max(kv_lens) <= 262144, f"{max(kv_lens)} keys")
    wanted = -(-max(kv_lens) // block_size)
    require(FIA, table.shape[1] >= wanted, f"{table.shape[1]} blocks a row, {wanted} needed")
    return list(kv_lens)


def _pages(cache: Tensor, row: Tensor, kv_heads: int, head_dim: int,
           scale: Tensor | None) -> Tensor:  # fmt: skip
    """Return one sequence's keys or values, (kv_heads, blocks · block_size, head_dim)."""
    chosen = row.long().clamp(0, len(cache) - 1)
    found = cache[chosen]
    if found.dim() == 3:
        found = found.unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)
    if scale is not None:
        found = found.float() * scale[chosen][..., None]  # (blocks, kv_heads, block, head_dim)
    return found.transpose(0, 1).reshape(kv_heads, -1, head_dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    heads, queries, head_dim = q.shape
    rows = q.float().reshape(len(k), -1, head_dim)  # (kv_heads, group · queries, head_dim)
    scores = (rows @ k.float().transpose(1, 2) * scale).view(heads, queries, -1)
    if causal:
        hidden = torch.ones(queries, scores.shape[-1], dtype=torch.bool)
        scores.masked_fill_(hidden.triu(1 + scores.shape[-1] - queries), -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse).exp().view(len(k), -1, scores.shape[-1])
    return (p @ v.float()).view(heads, queries, head_dim), lse


def attention_update(
    lse: Sequence[Tensor], local_out: Sequence[Tensor], update_type: int
) -> tuple[Tensor, Tensor]:
    """Merge partial results of split keys. Shapes: lse (rows,) float32, local_out (rows, D)."""
    op = "npu_attention_update"
    require(op, len(lse) == len(local_out) and update_type in (0, 1), "lists of unlike length")
    for sums, out in zip(lse, local_out, strict=True):
        require_dtype(op, "lse", sums, (torch.float32,))
        fits = sums.dim() == 1 and out.shape[:1] == sums.shape
        require(op, fits, f"{sums.shape} beside {out.shape}")
    both = torch.stack(list(lse))
    total = both.logsumexp(0)
    parts = torch.stack([o.float() for o in local_out])
    out = (parts * (both - total).exp()[..., None]).sum(0)
    return out.to(local_out[0].dtype), total


def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    cache_mode: str | None = "PA_NZ",
    **rest: Any,
) -> None:
    """Write rows at their slots. Shapes: key (rows, N, D), cache (blocks, block, N, D)."""
    op = "npu_scatter_pa_kv_cache"
    require_default(op, rest, {})
    require(op, cache_mode in (None, "Norm"), f"cache_mode {cache_mode!r} on a cache held as ND")
    require_some(op, key=key, slot_mapping=slot_mapping)
    require_contiguous(op, key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    same = key.dtype == value.dtype == key_cache.dtype == value_cache.dtype
    require(op, same, "key, value and their caches differ in dtype")
    require_dtype(op, "slot_mapping", slot_mapping, (torch.int32, torch.int64))
    require(op, key.dim() == 3 and key_cache.dim() == 4, f"{key.dim()} and {key_cache.dim()} axes")
    require(op, key_cache.shape[2:] == key.shape[1:], f"{key_cache.shape} takes no {key.shape}")
    flat = slot_mapping.long()
    slots = key_cache.shape[0] * key_cache.shape[1]
    require(op, flat.min() >= 0 and flat.max() < slots, f"a slot outside 0..{slots - 1}")
    require(op, len(flat.unique()) == len(flat), "a slot twice")
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *cache.shape[2:])[flat] = rows


OPS: Mapping[str, Any] = {
    FIA: fused_infer_attention_score,
    "npu_attention_update": attention_update,
    "npu_scatter_pa_kv_cache": scatter_pa_kv_cache,
}
