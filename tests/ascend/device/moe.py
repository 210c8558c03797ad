"""Router, routing and grouped products as the vendor documents them.

Source: ``_op_plugin_docs.py`` in the wheel that schemas.json names, entries of the same names; the
two collective ops have none there, their limits are those of CANN's aclnnMoeDistributeDispatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import CODES, REAL, require, require_default, require_dtype, require_some


def gating_top_k(
    x: Tensor, k: int, *, renorm: int = 0, norm_type: int = 0, out_flag: bool = False, **rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax over all experts, then the k largest; ids int32, and all probabilities in float32.

    Assumed: of equal probabilities the lower expert first.
    """
    op = "npu_moe_gating_top_k"
    neutral = {"k_group": 1, "group_count": 1, "group_select_mode": 0,
               "routed_scaling_factor": 1.0, "eps": 1e-20}  # fmt: skip
    require_default(op, rest, neutral)
    require_some(op, x=x)
    require_dtype(op, "x", x, REAL)
    require(op, x.dim() == 2 and 2 < x.shape[1] <= 2048, f"{tuple(x.shape)}: 3 to 2048 experts")
    require(op, 1 <= k <= x.shape[1], f"k {k} of {x.shape[1]}")
    require(op, renorm == 0 and norm_type == 0, f"renorm {renorm}, norm_type {norm_type}")
    p = x.float().softmax(-1)
    y, ids = p.sort(dim=-1, descending=True, stable=True)
    norm = p if out_flag else torch.zeros_like(p)
    return y[:, :k].to(x.dtype).contiguous(), ids[:, :k].int().contiguous(), norm


def init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    **rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows once for each of their experts, expert after expert, and where each of them went.

    Rows beyond the last active one are undefined: NaN here. Assumed: within an expert rows keep
    their order, and place (row · K + column) of expanded_row_idx names the row of expanded_x.
    """
    op = "npu_moe_init_routing_v2"
    require_default(op, rest, {"expert_capacity": -1})
    require_some(op, x=x, expert_idx=expert_idx)
    require_dtype(op, "x", x, (*REAL, torch.int8))
    require_dtype(op, "expert_idx", expert_idx, (torch.int32,))
    require(op, expert_idx.dim() == 2 and len(expert_idx) == len(x), f"{expert_idx.shape}")
    require(op, 0 < expert_num <= 10240, f"expert_num {expert_num}")
    require(op, drop_pad_mode == 0, f"drop_pad_mode {drop_pad_mode}: only 0")
    require(op, expert_tokens_num_type == 1 and expert_tokens_num_flag, "only counts")
    require(op, quant_mode == -1 and row_idx_type == 0, "only without quantisation, gathered")
    flat = expert_idx.flatten().long()
    require(op, active_num in (-1, 0, flat.numel()), f"active_num {active_num}")
    require(op, flat.min() >= 0 and flat.max() < expert_num, "an expert id out of range")
    first, last = active_expert_range
    require(op, 0 <= first < last <= expert_num, f"active_expert_range {active_expert_range}")
    active = (flat >= first) & (flat < last)
    order = torch.where(active, flat, expert_num).argsort(stable=True)[: int(active.sum())]
    expanded = torch.full((flat.numel(), x.shape[1]), torch.nan).to(x.dtype)
    expanded[: len(order)] = x[order // expert_idx.shape[1]]
    places = torch.full((flat.numel(),), -1, dtype=torch.int32)
    places[order] = torch.arange(len(order), dtype=torch.int32)
    counts = torch.bincount(flat[active] - first, minlength=last - first)
    return expanded, places, counts, torch.zeros(flat.numel())


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    scale: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    output_dtype: int | None = None,
    **rest: Any,
) -> list[Tensor]:
    """Each run of rows times its own matrix. Shapes: x (m, k), weight (groups, k, n) -> (m, n).

    Rows beyond the last group are undefined: NaN here.
    """
    op = "npu_grouped_matmul"
    require_default(op, rest, {"act_type": 0})
    one = len(x) == len(weight) == 1 and split_item in (2, 3) and group_type == 0
    require(op, one and group_list_type == 1, "only one array, one stack, counts of rows")
    rows, stack = x[0], weight[0]
    require_some(op, x=rows)
    require(op, rows.dim() == 2 and stack.dim() == 3, f"{rows.dim()} and {stack.dim()} axes")
    require(op, rows.shape[1] == stack.shape[1], f"{tuple(rows.shape)} times {tuple(stack.shape)}")
    inner = max(rows.shape[-1], stack.shape[-1])
    require(op, inner < 65536, f"an inner axis of {inner}: under 65536")
    require(op, group_list is not None, "no group_list")
    assert group_list is not None
    require_dtype(op, "group_list", group_list, (torch.int64,))
    require(op, group_list.shape == stack.shape[:1], f"{group_list.shape} groups")
    require(op, len(group_list) > 1, "counts of one group are not documented")
    require(op, bool((group_list >= 0).all()), "a negative count")
    require(op, int(group_list.sum()) <= len(rows), "more rows counted than there are")
    target = _product_dtype(op, rows, stack, scale, per_token_scale, output_dtype)
    out = torch.full((len(rows), stack.shape[2]), torch.nan).to(target)
    start = 0
    for group, count in enumerate(group_list.tolist()):
        part = slice(start, start + count)
        start += count
        if not count:
            continue
        if scale is None or per_token_scale is None:
            out[part] = rows[part] @ stack[group]
        else:
            product = (rows[part].double() @ stack[group].double()).float()
            out[part] = (product * scale[0][group].float() * per_token_scale[0][part, None]).to(
                target
            )
    return [out]


def _product_dtype(
    op: str,
    rows: Tensor,
    stack: Tensor,
    scale: Sequence[Tensor] | None,
    per_token_scale: Sequence[Tensor] | None,
    output_dtype: int | None,
) -> torch.dtype:
    require(op, rows.dtype == stack.dtype, f"{rows.dtype} times {stack.dtype}")
    if rows.dtype != torch.int8:
        require_dtype(op, "x", rows, REAL)
        wanted = CODES.get(output_dtype) if output_dtype is not None else rows.dtype
        require(op, scale is None and wanted == rows.dtype, "scales or another dtype asked")
        return rows.dtype
    require(op, scale is not None and per_token_scale is not None, "int8 needs both scales")
    assert scale is not None and per_token_scale is not None
    require_dtype(op, "scale", scale[0], (torch.float32, torch.bfloat16))
    require_dtype(op, "per_token_scale", per_token_scale[0], (torch.float32,))
    require(op, scale[0].shape == (len(stack), stack.shape[2]), f"{scale[0].shape}")
    require(op, CODES.get(output_dtype or 1) == torch.bfloat16, f"output_dtype {output_dtype}")
    return torch.bfloat16


def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
) -> Tensor:
    """Add up, for each token, its rows times their probabilities. Assumed: in float32."""
    op = "npu_moe_token_unpermute"
    require_some(op, permuted_tokens=permuted_tokens)
    require(op, not padded_mode and restore_shape is None, "padded_mode is not supported")
    require_dtype(op, "permuted_tokens", permuted_tokens, REAL)
    require_dtype(op, "sorted_indices", sorted_indices, (torch.int32,))
    require(op, probs is not None and probs.dim() == 2, "probs (tokens, top_k) are needed here")
    assert probs is not None
    require_dtype(op, "probs", probs, REAL)
    require(op, probs.shape[1] <= 512, f"top_k {probs.shape[1]}: to 512")
    require(op, sorted_indices.shape == (probs.numel(),), f"{sorted_indices.shape}")
    flat = sorted_indices.long()
    good = flat.min() >= 0 and flat.max() < len(permuted_tokens) and len(flat.unique()) == len(flat)
    require(op, good, "indices out of range, or one twice")
    chosen = permuted_tokens[flat].float().view(*probs.shape, -1)
    return (chosen * probs.float()[..., None]).sum(1).to(permuted_tokens.dtype)


def distribute(op: str) -> Any:
    """Return an op that refuses what the documents refuse; it needs peers, and there are none."""

    def call(x: Tensor, expert_ids: Tensor, *rest: Any, **_: Any) -> Any:
        require_dtype(op, "expert_ids", expert_ids, (torch.int32,))
        require(op, len(expert_ids) <= 256, f"{len(expert_ids)} tokens: to 256")
        raise RuntimeError(f"{op}: no implementation in the stand-in")

    return call


OPS: Mapping[str, Any] = {
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_distribute_combine": distribute("npu_moe_distribute_combine"),
    "npu_moe_distribute_dispatch": distribute("npu_moe_distribute_dispatch"),
    "npu_moe_gating_top_k": gating_top_k,
    "npu_moe_init_routing_v2": init_routing_v2,
    "npu_moe_token_unpermute": token_unpermute,
}
