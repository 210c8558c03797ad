"""Stages fused by hand: what the composed ones compute, in fewer passes. See ``composed``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from step3_hetero.backend import BatchMeta, Device, Reduce, Stage
from step3_hetero.backends.cpu import attention as att
from step3_hetero.backends.cpu import moe
from step3_hetero.backends.cpu.norm import rms_norm
from step3_hetero.backends.cpu.rope import rotate
from step3_hetero.composed import deliver
from step3_hetero.specs import AttentionSpec, FfnSpec

Named = Mapping[str, Tensor]


class CpuAttention(Stage):
    """Norm, fused q|k|v, one rotation over query heads and key together, attention, router."""

    spec: AttentionSpec

    def __init__(
        self,
        device: Device,
        spec: AttentionSpec,
        weights: Mapping[str, Any],
        cache: att.CpuCache,
        reduce: Reduce | None = None,
    ) -> None:
        self.device = device
        self.spec = spec
        self.w = weights
        self.cache = cache
        self.reduce = reduce
        self.batch: att.Batch | None = None

    def plan(self, meta: BatchMeta) -> None:
        """Share the batch with every other layer of the device."""
        self.batch = self.device.batch(meta)

    def run(self, inputs: Named, out: Named | None = None) -> Named:
        """See ``composed.Attention``."""
        s, w = self.spec, self.w
        x = inputs["x"] + inputs["y"] if s.adds else inputs["x"]
        attended = w["o_proj"](self._mfa(rms_norm(x, w["input_norm"], eps=s.eps)))
        x = x + (self.reduce(attended) if self.reduce else attended)
        u = rms_norm(x, w["post_norm"], eps=s.eps)
        return deliver({"x": x, "u": u, **self._route(u)}, out)

    def _mfa(self, h: Tensor) -> Tensor:
        s, w, batch = self.spec, self.w, self.batch
        assert batch is not None, "plan comes before run"
        low, k, v = w["qkv"](h).split(s.widths, -1)
        q = w["wq"](rms_norm(low, w["inter_norm"], eps=s.eps))
        both = torch.cat((q, k), -1).view(-1, s.heads + s.kv_heads, s.head_dim)
        both = rotate(both, *batch.angles(s.head_dim, s.theta, both.dtype))
        q, k = both[:, : s.heads], both[:, s.heads :]
        self.cache.write(k, v.view(-1, s.kv_heads, s.head_dim), batch)
        out = att.attention(q, self.cache, batch, scale=s.scale)
        return out.view(-1, s.heads * s.head_dim)

    def _route(self, u: Tensor) -> Named:
        r = self.spec.router
        if r is None:
            return {}
        logits = self.w["router"](u).float()
        weights, ids = moe.route(logits, top_k=r.top_k, renormalise=r.renormalise)
        return {"weights": weights.to(u.dtype), "ids": ids}


class CpuFfn(Stage):
    """Dense SwiGLU, or the experts that got tokens plus the shared one."""

    spec: FfnSpec

    def __init__(self, spec: FfnSpec, weights: Mapping[str, Any]) -> None:
        self.spec = spec
        self.w = weights

    def plan(self, meta: BatchMeta) -> None:
        """Nothing depends on the batch but its rows."""

    def run(self, inputs: Named, out: Named | None = None) -> Named:
        """See ``composed.Ffn``."""
        u, w = inputs["u"], self.w
        if not self.spec.experts:
            return deliver({"y": w["down"](moe.swiglu(w["gate_up"](u)))}, out)
        shared = w["shared_down"](moe.swiglu(w["shared_gate_up"](u)))
        routed = moe.experts(u, inputs["weights"], inputs["ids"], w["experts"])
        return deliver({"y": routed + shared}, out)
