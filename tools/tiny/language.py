"""The language model in torch, with the module names of the released checkpoint."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny.shape import TextShape


class RmsNorm(nn.Module):
    """Unit root mean square in float32, cast back, then the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., width) -> the same."""
        wide = x.float()
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return unit.to(x.dtype) * self.weight


@cache
def rotation(tokens: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles. Shapes: (tokens, width / 2) each, float32."""
    speeds = theta ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.arange(tokens).float()[:, None] * speeds
    return angles.cos(), angles.sin()


def rotate(x: Tensor, theta: float) -> Tensor:
    """Turn the two halves of each row by its position. Shapes: x (..., tokens, width) -> same."""
    cos, sin = (t.to(x.dtype) for t in rotation(x.shape[-2], x.shape[-1], theta))
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class MultiMatrixAttention(nn.Module):
    """MFA: a low-rank query of many heads against one key head and one value head."""

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        hidden, width = shape.hidden_size, shape.num_attention_heads * shape.head_dim
        self.heads, self.theta = shape.num_attention_heads, shape.rope_theta
        self.q_proj = nn.Linear(hidden, shape.share_q_dim, bias=False)
        self.k_proj = nn.Linear(hidden, shape.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, shape.head_dim, bias=False)
        self.inter_norm = RmsNorm(shape.share_q_dim, shape.rms_norm_eps)
        self.wq = nn.Linear(shape.share_q_dim, width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (seqs, tokens, hidden) -> the same; causal."""
        q = self.wq(self.inter_norm(self.q_proj(x))).unflatten(-1, (self.heads, -1))
        q = rotate(q.transpose(1, 2), self.theta)
        k, v = rotate(self.k_proj(x), self.theta)[:, None], self.v_proj(x)[:, None]
        mixed = F.scaled_dot_product_attention(
            q, k.expand_as(q), v.expand_as(q), is_causal=True
        )  # (seqs, heads, tokens, head_dim)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inter: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inter, bias=False)
        self.up_proj = nn.Linear(hidden, inter, bias=False)
        self.down_proj = nn.Linear(inter, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., hidden) -> the same."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Stacked(nn.Module):
    """One matrix per expert, in one tensor."""

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, rows, columns) / columns**0.5)


class Experts(nn.Module):
    """The routed experts.

    ``balance`` is the load-balance loss of the last call and ``load`` the share of the choices that
    each expert got in it.
    """

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        experts, inter = shape.moe_num_experts, shape.moe_intermediate_size
        self.top_k = shape.moe_top_k
        self.gate = nn.Linear(shape.hidden_size, experts, bias=False)
        self.gate_proj = Stacked(experts, inter, shape.hidden_size)
        self.up_proj = Stacked(experts, inter, shape.hidden_size)
        self.down_proj = Stacked(experts, shape.hidden_size, inter)
        self.balance, self.load = torch.zeros(()), torch.zeros(experts)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (seqs, tokens, hidden) -> the same."""
        rows = x.flatten(0, 1)
        weights, ids = self._route(rows)
        out = torch.zeros_like(rows)
        for expert in range(len(self.load)):
            row, rank = (ids == expert).nonzero(as_tuple=True)
            y = self._expert(expert, rows.index_select(0, row))
            out = out.index_add(0, row, y * weights[row, rank, None])
        return out.view_as(x)

    def _route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weights, ids) of the chosen experts; the weights are not renormalised.

        Shapes: rows (tokens, hidden) -> (tokens, top_k) each.
        """
        p = torch.softmax(self.gate(rows).float(), dim=-1)
        weights, ids = p.topk(self.top_k, dim=-1)
        self.load = torch.bincount(ids.flatten(), minlength=p.shape[-1]) / ids.numel()
        self.balance = p.shape[-1] * (self.load * p.mean(0)).sum()
        return weights.to(rows.dtype), ids

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        gate, up, down = (m.weight[expert] for m in (self.gate_proj, self.up_proj, self.down_proj))
        return F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)


class Block(nn.Module):
    """One layer: attention, then experts with a shared expert, or a dense SwiGLU."""

    def __init__(self, shape: TextShape, number: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = MultiMatrixAttention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.is_moe = number in shape.moe_layers
        if self.is_moe:
            self.moe = Experts(shape)
            self.share_expert = SwiGlu(shape.hidden_size, shape.share_expert_dim)
        else:
            self.mlp = SwiGlu(shape.hidden_size, shape.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (seqs, tokens, hidden) -> the same."""
        x = x + self.self_attn(self.input_layernorm(x))
        u = self.post_attention_layernorm(x)
        if self.is_moe:
            return x + self.moe(u) + self.share_expert(u)
        out: Tensor = x + self.mlp(u)
        return out


class LanguageModel(nn.Module):
    """Embedding, layers and the last norm; the head is a sibling."""

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, n) for n in range(shape.num_hidden_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (seqs, tokens, hidden) -> the same, ready for the head."""
        for block in self.layers:
            x = block(x)
        out: Tensor = self.norm(x)
        return out
