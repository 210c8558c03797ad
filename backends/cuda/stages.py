"""Stages fused by hand: what the composed ones compute, in fewer passes. See ``composed``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from step3_hetero.backend import BatchMeta, Device, Reduce, Stage
from step3_hetero.backends.cuda import attention as att
from step3_hetero.backends.cuda import moe
from step3_hetero.backends.cuda.linear import linear
from step3_hetero.backends.cuda.norm import add_rms_norm, rms_norm
from step3_hetero.backends.cuda.rope import rotate
from step3_hetero.composed import deliver
from step3_hetero.specs import AttentionSpec, FfnSpec

Named = Mapping[str, Tensor]


class CudaAttention(Stage):
    """Residual and norm in one pass, RoPE and cache write in one pass, attention, router."""

    spec: AttentionSpec

    def __init__(
        self,
        device: Device,
        spec: AttentionSpec,
        weights: Mapping[str, Any],
        cache: att.CudaCache,
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
        x = inputs["x"]
        if s.adds:
            x, h = add_rms_norm(x, inputs["y"], w["input_norm"], eps=s.eps)
        else:
            h = rms_norm(x, w["input_norm"], eps=s.eps)
        attended = linear(self._mfa(h), w["o_proj"])
        if self.reduce is not None:
            attended = self.reduce(attended)
        x, u = add_rms_norm(x, attended, w["post_norm"], eps=s.eps)
        return deliver({"x": x, "u": u, **self._route(u)}, out)

    def _mfa(self, h: Tensor) -> Tensor:
        s, w, batch = self.spec, self.w, self.batch
        assert batch is not None, "plan comes before run"
        low, k, v = torch.split(linear(h, w["qkv"]), list(s.widths), -1)
        q = linear(rms_norm(low, w["inter_norm"], eps=s.eps), w["wq"])
        q = rotate(q.view(-1, s.heads, s.head_dim), *batch.angles(s.head_dim, s.theta, q.dtype))
        k, v = (x.view(-1, s.kv_heads, s.head_dim) for x in (k, v))
        self.cache.write_turned(k, v, batch, theta=s.theta)
        out = att.attention(q, self.cache, batch, scale=s.scale)
        return out.view(-1, s.heads * s.head_dim)

    def _route(self, u: Tensor) -> Named:
        r = self.spec.router
        if r is None:
            return {}
        logits = linear(u, self.w["router"], out_dtype=r.logits_dtype).float()
        weights, ids = moe.route(logits, top_k=r.top_k, renormalise=r.renormalise)
        return {"weights": weights.to(u.dtype), "ids": ids}


class CudaFfn(Stage):
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
            inner = moe.swiglu(linear(u, w["gate_up"]))
            return deliver({"y": linear(inner, w["down"])}, out)
        shared = linear(moe.swiglu(linear(u, w["shared_gate_up"])), w["shared_down"])
        routed = moe.experts(u, inputs["weights"], inputs["ids"], w["experts"])
        return deliver({"y": routed + shared}, out)
