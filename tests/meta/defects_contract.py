"""Defects against the contract rather than the numbers: aliases, buffers, caches, what is asked."""

import numpy as np

from meta.defects_attention import cache
from meta.defects_products import clipped_products
from meta.defects_stages import Tiles, by_kind, stage
from meta.twin import Defect, kernel
from step3_hetero.backends.reference import linear
from step3_hetero.backends.reference.arrays import dtype_of
from step3_hetero.backends.reference.attention import ReferenceCache
from step3_hetero.backends.reference.device import KERNELS
from step3_hetero.composed import Attention, Head, Vision


class PaddingInTheLastSlot(ReferenceCache):
    """Takes slot -1 as NumPy does."""

    def write(self, k, v, batch):
        self.k[batch.meta.slots], self.v[batch.meta.slots] = k, v


class PastTheBlock(ReferenceCache):
    """Clears the slot after the last one written."""

    def write(self, k, v, batch):
        super().write(k, v, batch)
        if batch.meta.slots.size and batch.meta.slots.max() >= 0:
            after = (batch.meta.slots.max() + 1) % len(self.k)
            if after not in batch.meta.slots:
                self.k[after] = self.v[after] = 0


class CopiesOfWhatWas(ReferenceCache):
    """Copies every pair from the cache as it was before the first."""

    def copy_blocks(self, pairs):
        before = ReferenceCache(self.spec)
        before.k[...], before.v[...] = self.k, self.v
        for source, target in pairs:
            for new, old in ((self.k, before.k), (self.v, before.v)):
                self._blocked(new)[target] = self._blocked(old)[source]


class OpenedWithJunk(ReferenceCache):
    """Holds what was in memory before it."""

    def __init__(self, spec):
        super().__init__(spec)
        self.k[...] = self.v[...] = np.nan


def reused(op):
    """Return a kernel whose results lie in one buffer for each shape, written anew by each call."""
    buffers = {}

    def run(*arrays, **parameters):
        result = KERNELS[op](*arrays, **parameters)
        buffer = buffers.setdefault((result.shape, result.dtype), np.empty_like(result))
        buffer[...] = result
        return buffer

    return run


def itself_when_cast_to_its_dtype(x, *, dtype):
    return x if x.dtype == dtype_of(dtype) else KERNELS["cast"](x, dtype=dtype)


def itself_when_alone(*parts):
    return parts[0] if len(parts) == 1 else KERNELS["concat"](*parts)


def itself_when_nothing_merges(x, rows, index):
    return x if len(rows) == 0 else KERNELS["merge_rows"](x, rows, index)


RESULTS = (
    kernel("cast", "returns its input where the dtype is right", itself_when_cast_to_its_dtype),
    kernel("concat", "returns its input where there is one", itself_when_alone),
    kernel("merge_rows", "returns its input where nothing merges", itself_when_nothing_merges),
    kernel("rms_norm", "the next call overwrites its result", reused("rms_norm")),
    kernel("linear", "the next call overwrites its result", reused("linear")),
)


def exponentials_overflow(logits, *, top_k, renormalise):
    e = np.exp(logits)
    p = e / e.sum(-1, keepdims=True)
    ids = np.argsort(-p, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
    weights = np.take_along_axis(p, ids, axis=-1)
    return weights / weights.sum(-1, keepdims=True) if renormalise else weights, ids


def ids_lost_in_a_slice(logits, *, top_k, renormalise):
    weights, ids = KERNELS["route"](logits, top_k=top_k, renormalise=renormalise)
    return weights, ids if logits.base is None else 0 * ids


def greedy_ignores_the_ban(logits, temperature, top_k, top_p, uniform, *, banned=-1):
    operands = (logits, temperature, top_k, top_p, uniform)
    free, held = KERNELS["sample"](*operands), KERNELS["sample"](*operands, banned=banned)
    return np.where(temperature == 0, free, held).astype(np.int32)


def format_ignored(device):
    """Keep weights in the activation's dtype where another was asked for."""
    device.prepare = lambda op, tensors, spec: linear.widen_tensors(
        tensors, str(spec.parameters.get("out_dtype", spec.dtype))
    )


CHOICE = (
    kernel("route", "exponentials overflow", exponentials_overflow),
    kernel("route", "wrong ids for an array that is a slice", ids_lost_in_a_slice),
    kernel("sample", "greedy rows choose the banned id", greedy_ignores_the_ban),
    kernel("linear", "overflow clipped", clipped_products),
    Defect("linear", "weight_format ignored", format_ignored),
)

CACHE = (
    cache("a padded row is written at slot -1", PaddingInTheLastSlot),
    cache("the slot after the last is cleared", PastTheBlock),
    cache("copies see the cache as it was before the first", CopiesOfWhatWas),
    cache("opened with junk", OpenedWithJunk),
)


class IdsLeftOut(Attention):
    """Writes every result but the ids into the caller's buffers."""

    def run(self, inputs, out=None):
        results = self.forward(inputs)
        if out is None:
            return results
        for name in results.keys() - {"ids"}:
            out[name][...] = results[name]
        return out


STAGES = (
    stage("attention_stage", "ids not written to the caller's buffer", IdsLeftOut),
    by_kind("head", "deaf to batch invariance", Tiles, Head),
    by_kind("vision", "deaf to batch invariance", Tiles, Vision),
)

DEFECTS = (*RESULTS, *CHOICE, *CACHE, *STAGES)
