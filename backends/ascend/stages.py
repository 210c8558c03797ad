"""Stages with the vendor's fused norms: what the composed ones compute, in fewer calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from step3_hetero.backend import BatchMeta, Reduce, Stage
from step3_hetero.backends.ascend import attention as att
from step3_hetero.backends.ascend import limits, moe, vendor
from step3_hetero.backends.ascend.norm import rms_norm
from step3_hetero.backends.ascend.rope import rotate
from step3_hetero.composed import deliver
from step3_hetero.specs import AttentionSpec, FfnSpec

if TYPE_CHECKING:
    from step3_hetero.backends.ascend.device import AscendDevice

Named = Mapping[str, Tensor]


def _add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x + y, and x + y."""
    if x.numel() == 0:
        return x.clone(), x.clone()
    return vendor.add_rms_norm(x, y, weight, eps)


class AscendAttention(Stage):
    """Sum and norm in one call, fused q|k|v, one rotation over query heads and key, router."""

    spec: AttentionSpec

    def __init__(
        self,
        device: AscendDevice,
        spec: AttentionSpec,
        weights: Mapping[str, Any],
        cache: att.AscendCache,
        reduce: Reduce | None = None,
    ) -> None:
        limits.positions(spec.max_positions - 1)
        if device.triton:
            limits.decode_heads(spec.heads)
        self.device = device
        self.spec = spec
        self.w = weights
        self.cache = cache
        self.reduce = reduce
        self.batch: att.Batch | None = None

    def plan(self, meta: BatchMeta) -> None:
        """Share the batch with every other layer of the device; its tables go to the device."""
        batch: att.Batch = self.device.batch(meta)
        self.batch = batch if batch.groups is not None else None

    def run(self, inputs: Named, out: Named | None = None) -> Named:
        """See ``composed.Attention``."""
        s, w, x = self.spec, self.w, inputs["x"]
        if s.adds:
            h, x = _add_norm(x, inputs["y"], w["input_norm"], s.eps)
        else:
            h = rms_norm(x, w["input_norm"], eps=s.eps)
        attended = w["o_proj"](self._mfa(h))
        if self.reduce is not None:
            attended = self.reduce(attended)
        u, x = _add_norm(x, attended, w["post_norm"], s.eps)
        return deliver({"x": x, "u": u, **self._route(u)}, out)

    def _mfa(self, h: Tensor) -> Tensor:
        s, w, batch = self.spec, self.w, self.batch
        assert batch is not None, "plan comes before run"
        low, k, v = w["qkv"](h).split(s.widths, -1)
        q = w["wq"](rms_norm(low.contiguous(), w["inter_norm"], eps=s.eps))
        q, k = (x.reshape(-1, n, s.head_dim) for x, n in ((q, s.heads), (k, s.kv_heads)))
        if len(h):
            cos, sin = batch.angles(s.head_dim, s.theta, h.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        self.cache.write(k, v.reshape(-1, s.kv_heads, s.head_dim), batch)
        o = att.attention(q, self.cache, batch, scale=s.scale)
        return o.view(-1, s.heads * s.head_dim)

    def _route(self, u: Tensor) -> Named:
        r = self.spec.router
        if r is None:
            return {}
        logits = self.w["router"](u).float()
        weights, ids = moe.route(logits, top_k=r.top_k, renormalise=r.renormalise)
        return {"weights": weights.to(u.dtype), "ids": ids}


class AscendFfn(Stage):
    """Dense SwiGLU, or the grouped experts with the shared one beside them."""

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
        routed = moe.experts(u, inputs["weights"], inputs["ids"], w["experts"])
        shared = w["shared_down"](moe.swiglu(w["shared_gate_up"](u)))
        return deliver({"y": routed + shared}, out)
