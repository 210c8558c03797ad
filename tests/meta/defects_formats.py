"""Defects of number formats: FP8 and INT8 caches, INT8 weights."""

from dataclasses import replace

import numpy as np

from meta.twin import Defect, kernel
from step3_hetero.backends.reference import linear, moe
from step3_hetero.backends.reference.arrays import dtype_of
from step3_hetero.backends.reference.attention import ReferenceCache
from step3_hetero.backends.reference.quant import dequantise_blocks, quantise_runs
from step3_hetero.specs import HostTensor


def cache(what, cls, *, op="kv_cache"):
    """Return the defect of a cache, seen in cases of ``op``."""
    return Defect(op, what, lambda device: setattr(device, "cache_class", cls))


class ScalesNotCopied(ReferenceCache):
    """Copies codes and leaves the scales of the target."""

    def copy_blocks(self, pairs):
        kept = self.k_scale.copy(), self.v_scale.copy()
        super().copy_blocks(pairs)
        self.k_scale, self.v_scale = kept


class OneScaleForAllHeads(ReferenceCache):
    """Takes the largest magnitude over all KV heads of a token."""

    def write(self, k, v, batch):
        super().write(k, v, batch)
        if not self.spec.scaled or not len(k):
            return
        kept = batch.meta.slots >= 0
        for x, stored, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            codes, scale = quantise_runs(x[kept].reshape(kept.sum(), -1), self.spec.dtype)
            stored[batch.meta.slots[kept]] = codes.reshape(x[kept].shape)
            scales[batch.meta.slots[kept]] = scale[:, None]


class CutsOff(ReferenceCache):
    """Cuts quotients off instead of rounding them."""

    def write(self, k, v, batch):
        super().write(k, v, batch)
        if self.spec.dtype != "int8":
            return
        kept = batch.meta.slots >= 0
        slots = batch.meta.slots[kept]
        for x, stored, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            stored[slots] = np.trunc(x[kept].astype(np.float32) / scales[slots][..., None])


class ScalesInBfloat16(ReferenceCache):
    """Keeps scales in bfloat16."""

    def write(self, k, v, batch):
        super().write(k, v, batch)
        narrow = dtype_of("bfloat16")
        self.k_scale = self.k_scale.astype(narrow).astype(np.float32)
        self.v_scale = self.v_scale.astype(narrow).astype(np.float32)


class ScaleOfTheKey(ReferenceCache):
    """Reads values with the scales of their keys."""

    def read(self, blocks):
        k, _ = super().read(blocks)
        return k, self._numbers(self.v, self.k_scale, np.asarray(blocks, np.intp))


class StaleScales(ReferenceCache):
    """Leaves the scale of a row that is written twice as it was the first time."""

    def write(self, k, v, batch):
        before = self.k_scale.copy()
        super().write(k, v, batch)
        self.k_scale = np.where(before != 1, before, self.k_scale)


class CodesAttended(ReferenceCache):
    """Gives attention the codes without their scales."""

    def gather(self, blocks, length):
        k, v = super().gather(blocks, length)
        if not self.spec.scaled:
            return k, v
        flat = (-1, self.spec.kv_heads, 1)
        scale = self._blocked(self.k_scale)[blocks].reshape(flat)[:length]
        return k / scale, v


class AttendedInBfloat16(ReferenceCache):
    """Rounds code times scale to bfloat16 before attention reads it."""

    def gather(self, blocks, length):
        found = super().gather(blocks, length)
        if not self.spec.scaled:
            return found
        return tuple(x.astype(dtype_of("bfloat16")) for x in found)


def format_ignored(device):
    """Open every cache in float32, whatever was asked for."""
    device.open_cache = lambda spec: ReferenceCache(
        replace(spec, dtype="float32") if spec.scaled else spec
    )


CACHES = (
    cache("scales not copied with their codes", ScalesNotCopied),
    cache("one scale for all KV heads", OneScaleForAllHeads),
    cache("quotients cut off", CutsOff),
    cache("scales rounded to bfloat16", ScalesInBfloat16),
    cache("values read with the keys' scales", ScaleOfTheKey),
    cache("scales of the first write stay", StaleScales),
    Defect("kv_cache", "format ignored", format_ignored),
    cache("keys' codes without scales", CodesAttended, op="attention"),
    cache("code times scale rounded to bfloat16", AttendedInBfloat16, op="attention"),
    cache("scales of the first write stay", StaleScales, op="attention_stage"),
    Defect("attention_stage", "cache format ignored", format_ignored),
)


def prepared(op, what, change):
    """Return the defect of ``prepare`` where int8 is asked for: ``change`` gets op's weights."""

    def plant(device):
        def prepare(asked, tensors, spec):
            dtype = str(spec.parameters.get("out_dtype", spec.dtype))
            weights = linear.widen_tensors(tensors, dtype, spec.weight_format)
            return change(weights) if asked == op and weights.scales else weights

        device.prepare = prepare

    return Defect(op, what, plant)


def widened(weights):
    """Keep int8's rounding of the weights and leave the activations as they are."""
    parts = {
        n: p.astype(np.float32) * weights.scales[n][..., None] if n in weights.scales else p
        for n, p in weights.parts.items()
    }
    return linear.ReferenceWeights(parts, weights.dtype, weights.source, weights.method)


def one_scale(weights):
    """Give every row of a matrix the scale of its largest."""
    parts, scales = dict(weights.parts), {}
    for name in weights.scales:
        w = dequantise_blocks(weights.source[name]).astype(np.float32)
        top = np.abs(w).max(axis=(-2, -1), keepdims=True) / np.float32(127)
        parts[name] = np.rint(w / top).astype(np.int8)
        scales[name] = np.broadcast_to(top[..., 0], w.shape[:-1])
    return linear.ReferenceWeights(parts, weights.dtype, weights.source, weights.method, scales)


def scales_by_column(weights):
    """Take the scales of a matrix in falling order."""
    scales = {n: s[..., ::-1] for n, s in weights.scales.items()}
    return replace(weights, scales=scales)


def rounded_to_bfloat16_first(weights):
    """Round what the checkpoint means to bfloat16 before it becomes int8."""
    tensors = {}
    for name, t in weights.source.items():
        w = dequantise_blocks(t).astype(np.float32)
        tensors[name] = HostTensor(name, w.astype(dtype_of("bfloat16")))
    return linear.widen_tensors(tensors, weights.dtype, "int8")


def activations_by(rounding):
    """Return a kernel that turns x into what ``rounding`` makes of it wherever int8 is asked."""

    def product(x, weights, *, out_dtype=None):
        if not weights.scales or not len(x):
            return linear.linear(x, weights, out_dtype=out_dtype)
        return linear.linear(rounding(x), weights, out_dtype=out_dtype)

    return product


def one_scale_for_the_batch(x):
    top = np.abs(x.astype(np.float32)).max() / np.float32(127)
    return (np.rint(x.astype(np.float32) / top) * top).astype(x.dtype)


def cut_off(x):
    scale = quantise_runs(x, "int8")[1]
    exact = x.astype(np.float32) / scale[:, None]
    return (np.trunc(exact) * scale[:, None]).astype(x.dtype)


def nan_for_zero_rows(x, weights, *, out_dtype=None):
    out = linear.linear(x, weights, out_dtype=out_dtype)
    if weights.scales:
        out[~x.astype(np.float32).any(-1)] = np.nan
    return out


def inner_not_quantised(u, weights, ids, stack):
    """Multiply by down with the inner rows as they are."""
    if not stack.scales:
        return moe.experts(u, weights, ids, stack)
    wide = stack.parts["down"].astype(np.float32) * stack.scales["down"][..., None]
    scales = {n: s for n, s in stack.scales.items() if n != "down"}
    mixed = replace(stack, parts={**stack.parts, "down": wide}, scales=scales)
    return moe.experts(u, weights, ids, mixed)


WEIGHTS = (
    prepared("linear", "activations of int8 weights not rounded", widened),
    prepared("linear", "one int8 scale a matrix", one_scale),
    prepared("linear", "int8 scales of other rows", scales_by_column),
    prepared("linear", "int8 by way of bfloat16", rounded_to_bfloat16_first),
    kernel("linear", "one int8 scale for the batch", activations_by(one_scale_for_the_batch)),
    kernel("linear", "int8 activations cut off", activations_by(cut_off)),
    kernel("linear", "zero rows divided by zero", nan_for_zero_rows),
    prepared("experts", "activations of int8 weights not rounded", widened),
    prepared("experts", "one int8 scale a matrix", one_scale),
    prepared("experts", "int8 scales of other rows", scales_by_column),
    kernel("experts", "inner rows not quantised", inner_not_quantised),
)

DEFECTS = (*CACHES, *WEIGHTS)
