"""Every call of a vendor operator, each behind the limits it would fail at.

One function for each operator: it asks limits.py, then calls. Signatures are those of torch_npu
2.13.0; operators are looked up when they are called, so that importing this needs no driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from step3_hetero.backends.ascend import limits


def _npu() -> Any:
    return torch.ops.npu


def dtype_name(x: Tensor) -> str:
    """Return an array's dtype by NumPy's name."""
    return str(x.dtype).removeprefix("torch.")


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kv_heads: int,
    scale: float,
    layout: str = "BNSD",
    mask: Tensor | None = None,
    sparse_mode: int = 0,
    block_table: Tensor | None = None,
    block_size: int = 0,
    kv_lengths: Sequence[int] | None = None,
    lse: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """npu_fused_infer_attention_score.

    Shapes: query (seqs, heads, queries, head_dim), key, value (seqs, kv_heads, keys, head_dim), or
    with a block table (blocks, kv_heads, block, head_dim) or (blocks, block, kv_heads · head_dim)
    -> query's shape, log-sum-exp (seqs, heads, queries, 1) float32. INT8 keys and values need their
    scales, each (blocks, kv_heads, block) float32.
    """
    seqs, heads, queries, head_dim = query.shape
    limits.layout(layout, head_dim, paged=block_table is not None)
    limits.sequences(seqs)
    limits.query_heads(heads)
    limits.head_ratio(heads, kv_heads)
    limits.head_dim(head_dim, dtype_name(key))
    if queries > 1:
        shape = None if mask is None else tuple(mask.shape)
        limits.mask(shape, None if mask is None else dtype_name(mask), sparse_mode)
    if block_table is not None:
        limits.block_size(block_size, queries, dtype_name(key))
        limits.kv_lengths(kv_lengths, seqs, queries)
        longest = -(-max(kv_lengths or [0]) // block_size)
        limits.block_table(tuple(block_table.shape), dtype_name(block_table), seqs, longest)
        limits.cache_elements(key.numel())
    if key.dtype == torch.int8:
        cache = (key.shape[0], kv_heads, block_size)
        for held in scales or (None, None):
            shape = None if held is None else tuple(held.shape)
            form = "none" if held is None else dtype_name(held)
            limits.kv_scales(shape, form, dtype_name(query), cache, queries)
    key_scale, value_scale = scales or (None, None)
    mode = 0 if scales is None else limits.PER_TOKEN_HEAD_PAGED
    out, sums = _npu().npu_fused_infer_attention_score(
        query,
        key,
        value,
        atten_mask=mask,
        actual_seq_lengths_kv=kv_lengths,
        block_table=block_table,
        num_heads=heads,
        scale=scale,
        input_layout=layout,
        num_key_value_heads=kv_heads,
        sparse_mode=sparse_mode,
        block_size=block_size,
        softmax_lse_flag=lse,
        key_antiquant_scale=key_scale,
        value_antiquant_scale=value_scale,
        key_antiquant_mode=mode,
        value_antiquant_mode=mode,
    )
    return out, sums


def merge_parts(sums: Sequence[Tensor], outs: Sequence[Tensor]) -> Tensor:
    """npu_attention_update: one result from results over parts of the keys.

    Shapes: sums (rows,) float32, outs (rows, head_dim) -> (rows, head_dim).
    """
    out: Tensor = _npu().npu_attention_update(list(sums), list(outs), 0)[0]
    return out


def write_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    cache_mode: str = "Norm",
) -> None:
    """npu_scatter_pa_kv_cache.

    Shapes: key (rows, kv_heads, d), key_cache (blocks, block, kv_heads, d), slots (rows,).
    """
    limits.cache_mode(cache_mode)
    limits.slots(dtype_name(slots))
    _npu().npu_scatter_pa_kv_cache(key, value, key_cache, value_cache, slots, cache_mode=cache_mode)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, op: str = "npu_rotary_mul", mode: str = "half"
) -> Tensor:
    """npu_rotary_mul. Shapes: x (1, tokens, heads, head_dim), cos, sin (1, tokens, 1, head_dim)."""
    limits.rotary(x.shape[-1], x.shape[2], op)
    out: Tensor = getattr(_npu(), op)(x, cos, sin, rotary_mode=mode)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """npu_rms_norm."""
    limits.axes("npu_rms_norm", x.dim())
    out: Tensor = _npu().npu_rms_norm(x, weight, epsilon=eps)[0]
    return out


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """npu_add_rms_norm: the norm of x + y, and x + y."""
    limits.axes("npu_rms_norm", x.dim())
    normed, _, summed = _npu().npu_add_rms_norm(x, y, weight, epsilon=eps)
    return normed, summed


def swiglu(gate_up: Tensor) -> Tensor:
    """npu_swiglu over the last axis."""
    limits.axes("npu_swiglu", gate_up.dim())
    out: Tensor = _npu().npu_swiglu(gate_up, dim=-1)
    return out


def top_experts(
    logits: Tensor, top_k: int, *, norm_type: int = 0, renorm: int = 0
) -> tuple[Tensor, Tensor]:
    """npu_moe_gating_top_k: ids (tokens, top_k) int32, and all probabilities in float32.

    The weights are looked up among the probabilities: what the operator returns as such is scaled
    by a formula that the documents give as a picture only.
    """
    limits.router(logits.shape[1], top_k, norm_type=norm_type, renorm=renorm)
    _, ids, p = _npu().npu_moe_gating_top_k(
        logits, top_k, renorm=renorm, norm_type=norm_type, out_flag=True
    )
    return ids, p


def gather_by_expert(
    x: Tensor, ids: Tensor, experts: int, *, drop_pad_mode: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """npu_moe_init_routing_v2: rows expert after expert, each row's place, each expert's count.

    Shapes: x (tokens, n), ids (tokens, top_k) int32 -> (tokens · top_k, n), (tokens · top_k,)
    int32, (experts,) int64.
    """
    limits.expert_ids(dtype_name(ids))
    limits.routing(experts, drop_pad_mode=drop_pad_mode)
    rows, places, counts, _ = _npu().npu_moe_init_routing_v2(
        x,
        ids,
        active_num=ids.numel(),
        expert_num=experts,
        drop_pad_mode=drop_pad_mode,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, experts],
        row_idx_type=0,
    )
    return rows, places, counts


def grouped_product(
    x: Tensor,
    stack: Tensor,
    counts: Tensor,
    *,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """npu_grouped_matmul: the first counts[0] rows times stack[0], and so on.

    Shapes: x (rows, k), stack (groups, k, n), counts (groups,) int64 -> (rows, n); rows beyond the
    last group hold anything. INT8 operands need scale (groups, n) and row_scale (rows,), float32,
    and give bfloat16.
    """
    limits.groups(stack.shape[0], dtype_name(counts))
    limits.inner_axis("npu_grouped_matmul", max(x.shape[1], stack.shape[2]))
    quantised = scale is not None
    found = _npu().npu_grouped_matmul(
        [x],
        [stack],
        scale=[scale] if quantised else None,
        per_token_scale=[row_scale] if quantised else None,
        group_list=counts,
        split_item=2,
        group_type=0,
        group_list_type=1,
        output_dtype=torch.bfloat16 if quantised else None,
    )
    out: Tensor = found[0]
    return out


def gather_by_token(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """npu_moe_token_unpermute: for each token the weighted sum of its rows.

    Shapes: rows (tokens · top_k, n), places (tokens · top_k,), weights (tokens, top_k) -> (tokens,
    n).
    """
    limits.unpermuted(weights.shape[1])
    limits.expert_ids(dtype_name(places))
    out: Tensor = _npu().npu_moe_token_unpermute(rows, places, probs=weights)
    return out


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """npu_dynamic_quant: INT8 rows, and a float32 scale for each."""
    q, scale = _npu().npu_dynamic_quant(x)
    return q, scale


def quantised_product(x: Tensor, weight: Tensor, scale: Tensor, row_scale: Tensor) -> Tensor:
    """npu_quant_matmul in bfloat16. Shapes: x (rows, k), weight (k, n) int8, scale (n,)."""
    limits.inner_axis("npu_quant_matmul", max(x.shape[1], weight.shape[1]))
    out: Tensor = _npu().npu_quant_matmul(
        x, weight, scale, pertoken_scale=row_scale, output_dtype=torch.bfloat16
    )
    return out


def to_nz(weight: Tensor) -> Tensor:
    """npu_format_cast to the fractal format. Shapes: (..., rows, columns) -> the same."""
    limits.fractal(*weight.shape[-2:])
    out: Tensor = _npu().npu_format_cast(weight, limits.NZ)
    limits.fractal_format(int(_npu().get_npu_format(out)))
    return out
