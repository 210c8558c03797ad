"""Defects of fused stages whose ops are right, and of what a device does around its kernels."""

from dataclasses import replace

import numpy as np

from meta.twin import Defect, kernel
from step3_hetero.backends.reference.attention import Batch
from step3_hetero.backends.reference.device import KERNELS
from step3_hetero.composed import Attention, Embed, Ffn, Head, Vision, compose, invariant
from step3_hetero.registry import get_backend
from step3_hetero.specs import wide


def stage(op, what, cls):
    """Return the defect of a stage that a device builds for itself: ``cls`` in place of its base.

    Its own kernels, and what is composed of them, stay right.
    """

    def plant(device):
        def build(spec, weights, cache, limits):
            if f"{spec.kind}_stage" != op:
                return compose(device, spec, weights, cache, limits)
            bound = (device, spec, weights, cache) if cache is not None else (device, spec, weights)
            return invariant(device, cls(*bound))

        device.build = build

    return Defect(op, what, plant)


class Tiles:
    """Adds the terms of a product in another order from three rows on, as tiled kernels do."""

    def op(self, name, *arrays, **parameters):
        if name != "linear" or len(arrays[0]) < 3:
            return super().op(name, *arrays, **parameters)
        x, weights = arrays
        parts = {n: p if n == "bias" else p[:, ::-1] for n, p in weights.parts.items()}
        return super().op(name, x[:, ::-1], replace(weights, parts=parts), **parameters)


def by_kind(kind, what, mixin, base):
    """Return the defect of a built stage that does not heed the ``batch_invariant`` it claims."""
    cls = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})

    def plant(device):
        def build(spec, weights, cache, limits):
            if spec.kind == kind:
                return cls(device, spec, weights)
            return compose(device, spec, weights, cache, limits)

        device.build = build

    return Defect(f"{kind}_stage", what, plant)


class SharedExpertDropped(Ffn):
    def forward(self, inputs):
        if not self.spec.experts:
            return super().forward(inputs)
        routed = self.op("experts", inputs["u"], inputs["weights"], inputs["ids"],
                         self.w["experts"])  # fmt: skip
        return {"y": routed}


class SharedExpertWeighed(Ffn):
    """Weighs the shared expert as if it were the first of the routed ones."""

    def forward(self, inputs):
        if not self.spec.experts:
            return super().forward(inputs)
        routed = self.op("experts", inputs["u"], inputs["weights"], inputs["ids"],
                         self.w["experts"])  # fmt: skip
        shared = self._swiglu(inputs["u"], "shared_gate_up", "shared_down")
        return {"y": self.op("add", routed, shared * inputs["weights"][:, :1])}


class RoutedByIds(Ffn):
    """Forgets the routing weights."""

    def forward(self, inputs):
        if "weights" in inputs:
            inputs = {**inputs, "weights": np.ones_like(inputs["weights"])}
        return super().forward(inputs)


class CentredOverTheBatch(Ffn):
    """Takes a little of the batch's mean off every row: the result depends on who is beside it."""

    def forward(self, inputs):
        u = inputs["u"]
        mean = u.mean(0, keepdims=True) if len(u) > 1 else np.zeros_like(u)
        shifted = (u - mean * u.dtype.type(0.125)).astype(u.dtype)
        return super().forward({**inputs, "u": shifted})


class ResidualForgotten(Attention):
    def forward(self, inputs):
        s = self.spec
        x = self.op("add", inputs["x"], inputs["y"]) if s.adds else inputs["x"]
        h = self.op("rms_norm", x, self.w["input_norm"], eps=s.eps)
        x = self.op("linear", self._mfa(h), self.w["o_proj"])
        u = self.op("rms_norm", x, self.w["post_norm"], eps=s.eps)
        return {"x": x, "u": u, **self._route(u)}


class LastFfnForgotten(Attention):
    def forward(self, inputs):
        return super().forward({**inputs, "y": np.zeros_like(inputs["x"])})


class RoutingWeightsNotCast(Attention):
    def _route(self, u):
        routing = super()._route(u)
        if routing:
            routing["weights"] = routing["weights"].astype(wide(self.spec.dtype))
        return routing


class LogitsRounded(Attention):
    """Rounds the router's logits to bfloat16."""

    def _route(self, u):
        r = self.spec.router
        if r is None:
            return {}
        logits = self.op("linear", u, self.w["router"], out_dtype="bfloat16")
        weights, ids = self.op("route", logits.astype(np.float32), top_k=r.top_k,
                               renormalise=r.renormalise)  # fmt: skip
        return {"weights": self.op("cast", weights, dtype=self.spec.dtype), "ids": ids}


class KeysNotRotated(Attention):
    """Caches the keys before their rotation."""

    def op(self, name, *arrays, **parameters):
        if name == "rope" and arrays[0].shape[1] == self.spec.kv_heads:
            return arrays[0]
        return super().op(name, *arrays, **parameters)


class InterNormLeftOut(Attention):
    """Takes the low-rank queries as they come from the fused projection."""

    def op(self, name, *arrays, **parameters):
        if name == "rms_norm" and arrays[1] is self.w["inter_norm"]:
            return arrays[0].copy()
        return super().op(name, *arrays, **parameters)


class PaddingCached(Attention):
    """Writes padded rows to slot 0."""

    def plan(self, meta):
        super().plan(meta)
        slots = meta.slots.copy()
        slots[int(meta.query_starts[-1]) :] = 0
        self.batch = Batch(replace(meta, slots=slots))


class PositionsOfTheFirstBatch(Attention):
    """Keeps what it worked out of the first batch's positions later ones no longer than it."""

    first = None

    def plan(self, meta):
        super().plan(meta)
        if self.spec.batch_invariant:
            return
        if self.first is None:
            self.first = meta.positions
        if len(self.first) >= meta.tokens:
            self.batch = Batch(replace(meta, positions=self.first[: meta.tokens]))


class WiderWithPadding(Attention):
    """Forgets to round where it cuts rows off."""

    padded = False

    def plan(self, meta):
        super().plan(meta)
        self.padded = int(meta.query_starts[-1]) < meta.tokens

    def forward(self, inputs):
        results = super().forward(inputs)
        return {**results, "u": results["u"].astype(np.float64)} if self.padded else results


class FetchesForTheCaller(Ffn):
    """Brings its result through the host into buffers that the caller gives."""

    def run(self, inputs, out=None):
        results = self.forward(inputs)
        if out is None:
            return results
        out["y"][...] = self.device.from_host(self.device.to_host(results["y"]))
        return out


class FirstRowsOnly(Head):
    """Takes the first rows, however they are chosen."""

    def forward(self, inputs):
        return super().forward({**inputs, "rows": np.sort(inputs["rows"])})


class NormLeftOut(Head):
    def op(self, name, *arrays, **parameters):
        return arrays[0] if name == "rms_norm" else super().op(name, *arrays, **parameters)


class ImageRowsLeftOut(Embed):
    def forward(self, inputs):
        return super().forward({"token_ids": inputs["token_ids"]})


class NormsTheInput(Vision):
    """Normalises the input of the MLP, as most towers do, instead of its output."""

    def _block(self, x, layer, images):
        x = self.op("add", x, self._norm(self._attend(x, layer, images), f"{layer}.norm1"))
        normed = self._norm(x, f"{layer}.norm2")
        inner = self.op("quick_gelu", self.op("linear", normed, self.w[f"{layer}.fc1"]))
        return self.op("add", x, self.op("linear", inner, self.w[f"{layer}.fc2"]))


class PositionsCropped(Vision):
    """Takes the first positions for a smaller image instead of resizing the table."""

    def _grid_positions(self, places, grid):
        return places[: grid * grid]


STAGES = (
    stage("ffn_stage", "shared expert dropped", SharedExpertDropped),
    stage("ffn_stage", "shared expert weighed", SharedExpertWeighed),
    stage("ffn_stage", "routing weights forgotten", RoutedByIds),
    stage("ffn_stage", "result depends on the batch", CentredOverTheBatch),
    stage("attention_stage", "residual forgotten", ResidualForgotten),
    stage("attention_stage", "output of the last FFN forgotten", LastFfnForgotten),
    stage("attention_stage", "routing weights not cast", RoutingWeightsNotCast),
    stage("attention_stage", "router logits rounded", LogitsRounded),
    stage("attention_stage", "keys not rotated", KeysNotRotated),
    stage("attention_stage", "query norm left out", InterNormLeftOut),
    stage("attention_stage", "padded rows written to the cache", PaddingCached),
    stage("attention_stage", "positions of the first batch", PositionsOfTheFirstBatch),
    stage("attention_stage", "float64 with padding", WiderWithPadding),
    stage("ffn_stage", "the caller's buffers filled from the host", FetchesForTheCaller),
    stage("head_stage", "rows in rising order", FirstRowsOnly),
    stage("head_stage", "final norm left out", NormLeftOut),
    stage("embed_stage", "image rows left out", ImageRowsLeftOut),
    stage("vision_stage", "norm before the MLP", NormsTheInput),
    stage("vision_stage", "positions cropped", PositionsCropped),
)


def noise():
    """Return a kernel that adds its terms in another order every time."""
    rng = np.random.default_rng(0)

    def linear(x, weights, *, out_dtype=None):
        order = rng.permutation(x.shape[-1])
        parts = {n: p if n == "bias" else p[:, order] for n, p in weights.parts.items()}
        turned = replace(weights, parts=parts)
        return KERNELS["linear"](x[:, order], turned, out_dtype=out_dtype)

    return linear


def accumulating():
    """Return a kernel that adds to its workspace and never clears it."""
    workspace = {}

    def experts(u, weights, ids, stack):
        out = KERNELS["experts"](u, weights, ids, stack)
        workspace[u.shape, u.dtype] = workspace.get((u.shape, u.dtype), 0) + out
        return workspace[u.shape, u.dtype].copy()

    return experts


def falls_back(device):
    """Let torch's kernels of another backend do float32 norms."""
    import torch

    other = get_backend("cpu").open(0).kernel("rms_norm")

    def rms_norm(x, weight, *, eps):
        if x.dtype != np.float32:
            return KERNELS["rms_norm"](x, weight, eps=eps)
        return other(*map(torch.from_numpy, (x, weight)), eps=eps).numpy()

    device.kernels["rms_norm"] = rms_norm


def through_the_host(device):
    """Fetch the operands, work on them, bring the result back."""

    def swiglu(gate_up):
        return device.from_host(KERNELS["swiglu"](device.to_host(gate_up)))

    device.kernels["swiglu"] = swiglu


class Elsewhere:
    """An array that lies in no memory of the device."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


AROUND = (
    kernel("linear", "terms added in another order each time", noise()),
    kernel("experts", "workspace not cleared", accumulating()),
    Defect("rms_norm", "silent fallback to another backend", falls_back),
    Defect("swiglu", "data goes through the host", through_the_host),
    kernel("quick_gelu", "result outside the device's memory",
           lambda x: Elsewhere(KERNELS["quick_gelu"](x))),
)  # fmt: skip

DEFECTS = (*STAGES, *AROUND)
