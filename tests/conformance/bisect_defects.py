"""Defects of one layer, planted by building that layer over kernels of which one is wrong."""

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np

from step3_hetero.api import open_prompter
from step3_hetero.backend import Device
from step3_hetero.composed import Attention, compose
from step3_hetero.conformance.bisect_run import Subject
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig
from step3_hetero.registry import get_backend
from step3_hetero.runtime import resolving
from step3_hetero.specs import HostTensor


class View(Device):
    """A device with some kernels replaced; all else is the device's own."""

    def __init__(self, device, kernels):
        self.whole, self.info = device, device.info
        self.kernels = {**device.kernels, **kernels}

    def build(self, spec, weights, cache, limits):
        return compose(self, spec, weights, cache, limits)


for name in ("from_host", "to_host", "empty", "owns", "memory", "prepare", "open_cache", "batch"):
    setattr(View, name, lambda self, *a, _name=name, **k: getattr(self.whole, _name)(*a, **k))
View.__abstractmethods__ = frozenset()


class Planted(View):
    """A device that builds every stage well but some of one kind.

    ``plants`` has, by their number counted from 0, ``plant(device, spec, weights, cache, limits)``.
    """

    def __init__(self, device, kind, plants):
        super().__init__(device, {})
        self.kind, self.plants, self.seen = kind, plants, 0

    def build(self, spec, weights, cache, limits):
        number, self.seen = self.seen, self.seen + (spec.kind == self.kind)
        if spec.kind != self.kind or number % LAYERS not in self.plants:
            return self.whole.build(spec, weights, cache, limits)
        return self.plants[number % LAYERS](self.whole, spec, weights, cache, limits)


LAYERS = 4
"""Of the digit model; 1 and 2 are MoE."""


@dataclass(frozen=True)
class Defect:
    """``wrong(kernels, weights)`` returns the kernels to replace; ``call`` is what is to be named.

    ``layers`` are those that can have it.
    """

    name: str
    kind: str
    call: str
    wrong: object
    layers: tuple[int, ...] = (0, 1, 2, 3)

    def layer(self):
        """Draw the layer by the defect's name."""
        return random.Random(self.name).choice(self.layers)

    def plant(self, device, spec, weights, cache, limits):
        view = View(device, self.wrong(device.kernels, weights))
        return compose(view, spec, weights, cache, limits)


def second_norm(kernels, weights):
    """eps is 1e-3 in the norm before the FFN."""

    def rms_norm(x, weight, *, eps):
        wrong = 1e-3 if weight is weights["post_norm"] else eps
        return kernels["rms_norm"](x, weight, eps=wrong)

    return {"rms_norm": rms_norm}


def pairs_for_halves(kernels, weights):
    def rope(x, positions, *, theta):
        order = np.arange(x.shape[-1]).reshape(-1, 2).T.ravel()
        turned = kernels["rope"](x[..., order], positions, theta=theta)
        return turned[..., np.argsort(order)]

    return {"rope": rope}


def no_scale(kernels, weights):
    return {"attention": lambda *a, scale: kernels["attention"](*a, scale=1.0)}


def mask_off_by_one(kernels, weights):
    """The token before last is the last one seen."""

    def attention(q, cache, batch, *, scale):
        earlier = replace(batch.meta, positions=np.maximum(batch.meta.positions - 1, 0))
        return kernels["attention"](q, cache, type(batch)(earlier), scale=scale)

    return {"attention": attention}


def renormalised(kernels, weights):
    return {"route": lambda x, *, top_k, renormalise: kernels["route"](
        x, top_k=top_k, renormalise=not renormalise)}  # fmt: skip


def gate_for_up(kernels, weights):
    def swiglu(gate_up):
        half = gate_up.shape[-1] // 2
        order = np.r_[half : 2 * half, :half]
        return kernels["swiglu"](gate_up[:, order])

    return {"swiglu": swiglu}


def experts_in_another_order(kernels, weights):
    return {"experts": lambda u, share, ids, stack: kernels["experts"](u, share, 7 - ids, stack)}


def no_shared_expert(kernels, weights):
    return {"add": lambda x, y: x + 0 * y}


def other_o_proj(kernels, weights):
    def linear(x, held, **parameters):
        y = kernels["linear"](x, held, **parameters)
        if held is weights["o_proj"]:
            y[:, 0] = 1.01 * y[:, 0]
        return y

    return {"linear": linear}


def residual_twice(kernels, weights):
    return {"add": lambda x, y: kernels["add"](kernels["add"](x, x), y)}


MOE = (1, 2)
DEFECTS = [
    Defect("wrong eps in the second norm", "attention", "rms_norm post_norm", second_norm),
    Defect("RoPE over pairs", "attention", "rope", pairs_for_halves),
    Defect("scale missing", "attention", "attention", no_scale),
    Defect("mask off by one", "attention", "attention", mask_off_by_one),
    Defect("router renormalised", "attention", "route", renormalised, MOE),
    Defect("gate and up swapped", "ffn", "swiglu", gate_for_up),
    Defect("experts in another order", "ffn", "experts experts", experts_in_another_order, MOE),
    Defect("shared expert dropped", "ffn", "add", no_shared_expert, MOE),
    Defect("wrong o_proj weight", "attention", "linear o_proj", other_o_proj),
    Defect("residual counted twice", "attention", "add", residual_twice),
]


class Unscaled(Attention):
    """A composed stage wired wrongly: each of its ops is right."""

    def forward(self, inputs):
        results = dict(super().forward(inputs))
        results["u"] = self.op("add", results["u"], results["u"])
        return results


def wrong_weights(name, change):
    """Build a stage whose weight ``name`` was prepared of other numbers."""

    def plant(device, spec, weights, cache, limits):
        good = weights[name]
        spec_of = SimpleNamespace(dtype=spec.dtype, parameters={}, weight_format="auto")
        tensors = {k: HostTensor(t.name, change(t.data)) for k, t in good.source.items()}
        bad = {**weights, name: device.prepare("linear", tensors, spec_of)}
        return compose(View(device, {}), spec, bad, cache, limits)

    return plant


def subject_of(model, device=None, *, role="a", dtype="fp32", backend="cpu", **runtime):
    """Open a model as the command does; ``device`` takes the place of role ``role``'s."""
    roles = {
        "a": {"stages": ["embed", "attention", "head"], "backend": backend},
        "f": {"stages": ["ffn"], "backend": backend},
    }
    if ModelConfig.read(model).vision is not None:
        roles["a"]["stages"].append("vision")
    values = {"version": 1, "model": str(model), "roles": roles}
    config = resolving.read_config({**values, "runtime": {"dtype": dtype, **runtime}}, {})
    folder = resolving.checkpoint_folder(config)
    checkpoint = Checkpoint.open(folder, resolving.model_config(config))
    resolved = resolving.resolve(config, checkpoint.config)
    devices = resolving.stage_devices(resolved, resolving.open_devices(resolved))
    if device is not None:
        devices = {s: (r, device if r == role else d, f) for s, (r, d, f) in devices.items()}
    return Subject(
        resolved.model,
        resolved.placement,
        devices,
        checkpoint,
        open_prompter(resolved.model, folder),
        config.runtime.max_batch,
        config.runtime.prefill_chunk,
    )


def planted(kind, at, plant, backend="reference"):
    """Return a device of ``backend`` with one stage built wrongly."""
    return Planted(get_backend(backend).open(0), kind, {at: plant})
