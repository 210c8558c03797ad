"""Defects of number formats: FP8 and INT8 caches."""

from dataclasses import replace

import numpy as np

from meta.twin import Defect
from step3_hetero.backends.reference.arrays import dtype_of
from step3_hetero.backends.reference.attention import ReferenceCache
from step3_hetero.backends.reference.quant import quantise_runs


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

DEFECTS = CACHES
