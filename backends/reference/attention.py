"""Attention over a paged cache, attention over an image, and the cache itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from step3_hetero.backend import BatchMeta, KVCache
from step3_hetero.backends.reference.arrays import Float, Int32, dtype_of, product, total, widen
from step3_hetero.backends.reference.quant import quantise_runs
from step3_hetero.specs import LOGICAL_BLOCK, CacheSpec, HostArray


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch as the kernels here take it: the host's own, positions beside it."""

    meta: BatchMeta

    @property
    def positions(self) -> Int32:
        """Return the position of each row."""
        return self.meta.positions


class ReferenceCache(KVCache):
    """Keys and values by slot: two arrays (slots, kv_heads, head_dim).

    Of FP8 and INT8 these hold codes, and beside them stand scales (slots, kv_heads) float32, one
    for each token's key, and value, of a KV head: what is stored is code · scale in float32.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.nbytes = spec.nbytes
        shape = (spec.blocks * LOGICAL_BLOCK, spec.kv_heads, spec.head_dim)
        self.k: Float = np.zeros(shape, dtype_of(spec.dtype))
        self.v: Float = np.zeros(shape, dtype_of(spec.dtype))
        self.k_scale: Float = np.ones(shape[:2] if spec.scaled else (0, 0), np.float32)
        self.v_scale: Float = np.ones(self.k_scale.shape, np.float32)

    def write(self, k: Float, v: Float, batch: Batch) -> None:
        """Store each row at its slot, quantised as the cache is."""
        kept = batch.meta.slots >= 0
        slots = batch.meta.slots[kept]
        if not self.spec.scaled:
            self.k[slots], self.v[slots] = k[kept], v[kept]
            return
        self.k[slots], self.k_scale[slots] = quantise_runs(k[kept], self.spec.dtype)
        self.v[slots], self.v_scale[slots] = quantise_runs(v[kept], self.spec.dtype)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy one block after another, scales along with their codes."""
        scales = (self.k_scale, self.v_scale) if self.spec.scaled else ()
        for source, target in pairs:
            for stored in (self.k, self.v, *scales):
                blocked = self._blocked(stored)
                blocked[target] = blocked[source]

    def read(self, blocks: Sequence[int]) -> tuple[HostArray, HostArray]:
        """Return copies of whole blocks; of FP8 and INT8 code · scale in float32."""
        chosen = np.asarray(blocks, np.intp)
        return self._numbers(self.k, self.k_scale, chosen), self._numbers(
            self.v, self.v_scale, chosen
        )

    def _numbers(self, stored: Float, scale: Float, blocks: HostArray) -> Float:
        found: Float = self._blocked(stored)[blocks]
        if self.spec.scaled:
            found = found.astype(np.float32) * self._blocked(scale)[blocks][..., None]
        return found

    def gather(self, blocks: Int32, length: int) -> tuple[Float, Float]:
        """Return a sequence's first keys and values, each (length, kv_heads, head_dim)."""
        k, v = self.read(blocks.tolist())
        flat = (-1, self.spec.kv_heads, self.spec.head_dim)
        return k.reshape(flat)[:length], v.reshape(flat)[:length]

    @staticmethod
    def _blocked(stored: Float) -> Float:
        return stored.reshape(-1, LOGICAL_BLOCK, *stored.shape[1:])


def attention(q: Float, cache: ReferenceCache, batch: Batch, *, scale: float) -> Float:
    """Attend, for each token, to the keys of its own sequence up to its own position.

    Shapes: q (tokens, heads, head_dim) -> (tokens, heads, head_dim), dtype of q. Padded rows give
    zeros.

    Source: Step-3 paper, section 3 (MFA: every query head reads one KV head); Shazeer 2019.
    """
    meta = batch.meta
    out: Float = np.zeros(q.shape, q.dtype)
    for s in range(meta.seqs):
        rows = slice(int(meta.query_starts[s]), int(meta.query_starts[s + 1]))
        k, v = cache.gather(meta.block_tables[s], int(meta.context_lens[s]))
        visible = np.arange(len(k))[None, :] <= meta.positions[rows, None]  # (queries, keys)
        out[rows] = attend(q[rows], k, v, visible, scale)
    return out


def self_attention(q: Float, k: Float, v: Float, *, scale: float) -> Float:
    """Attend, within each image, from every token to every token.

    Shapes: q, k, v (images, tokens, heads, head_dim) -> (images, tokens, heads, head_dim).

    Source: Vaswani et al. 2017, eq. 1; modeling_step3.py, Step3VisionAttention.
    """
    out = np.zeros(q.shape, q.dtype)
    everything = np.ones((q.shape[1], k.shape[1]), bool)
    for image in range(len(q)):
        out[image] = attend(q[image], k[image], v[image], everything, scale)
    return out


def attend(q: Float, k: Float, v: Float, visible: HostArray, scale: float) -> Float:
    """Return softmax(scale · q·kᵀ)·v over the visible keys; a row that sees none gives zeros.

    Shapes: q (queries, heads, head_dim), k, v (keys, kv_heads, head_dim), visible (queries, keys)
    bool -> (queries, heads, head_dim), dtype of q.

    >>> q = k = np.ones((1, 1, 1), np.float32)
    >>> attend(q, k, 3 * k, np.ones((1, 1), bool), 1.0)
    array([[[3.]]], dtype=float32)
    """
    group = q.shape[1] // k.shape[1]
    out = np.zeros(q.shape, q.dtype)
    for head in range(q.shape[1]):
        rows = widen(q[:, head])
        keys, values = (x[:, head // group].astype(rows.dtype, copy=False) for x in (k, v))
        scores = product(rows, keys.T) * rows.dtype.type(scale)  # (queries, keys)
        p = softmax(np.where(visible, scores, -np.inf))
        out[:, head] = product(p, values).astype(q.dtype)
    return out


def softmax(scores: Float) -> Float:
    """Return the softmax of each row; rows of -inf give zeros.

    >>> softmax(np.array([[0.0, -np.inf], [-np.inf, -np.inf]]))
    array([[1., 0.],
           [0., 0.]])
    """
    if scores.shape[-1] == 0:
        return scores
    top = scores.max(axis=-1, keepdims=True)
    shifted = np.exp(scores - np.where(np.isfinite(top), top, 0))
    summed = total(shifted)
    p: Float = shifted / np.where(summed == 0, 1, summed)
    return p
