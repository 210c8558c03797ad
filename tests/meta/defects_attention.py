"""Defects of attention, of its cache, and of rotary embedding."""

from dataclasses import replace

import numpy as np

from meta.twin import Defect, kernel
from step3_hetero.backends.reference.arrays import dtype_of, widen
from step3_hetero.backends.reference.attention import Batch, ReferenceCache, attend
from step3_hetero.backends.reference.device import KERNELS


def pairs(x, positions, *, theta):
    """Rotate neighbours (0, 1), (2, 3) ... as GPT-J does."""
    halves = np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    turned = KERNELS["rope"](halves, positions, theta=theta)
    half = x.shape[-1] // 2
    return np.stack([turned[..., :half], turned[..., half:]], axis=-1).reshape(x.shape)


def angles_in_float32(x, positions, *, theta):
    half = x.shape[-1] // 2
    frequency = np.float32(theta) ** (-np.arange(half, dtype=np.float32) / np.float32(half))
    angle = positions[:, None, None].astype(np.float32) * frequency
    cos, sin = (widen(f(angle).astype(x.dtype)) for f in (np.cos, np.sin))
    a, b = widen(x[..., :half]), widen(x[..., half:])
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


ROPE = (
    kernel("rope", "pairs for halves", pairs),
    kernel("rope", "theta off", lambda x, at, *, theta: KERNELS["rope"](x, at, theta=1e4)),
    kernel("rope", "angles in float32", angles_in_float32),
    kernel("rope", "turned the other way",
           lambda x, at, *, theta: KERNELS["rope"](x, -at, theta=theta)),
    kernel("rope", "positions counted from the first row",
           lambda x, at, *, theta: KERNELS["rope"](x, np.arange(len(at)), theta=theta)),
)  # fmt: skip


def with_meta(change):
    """Return an attention kernel whose batch goes through ``change``."""

    def attention(q, cache, batch, *, scale):
        return KERNELS["attention"](q, cache, Batch(change(batch.meta)), scale=scale)

    return attention


def shifted(by):
    """Return an attention kernel that sees ``by`` keys more, or fewer, than it may."""
    return with_meta(lambda meta: replace(meta, positions=meta.positions + np.int32(by)))


def heads_in_turn(q, cache, batch, *, scale):
    """Read KV head h % kv_heads instead of h // group."""
    kv_heads = cache.spec.kv_heads
    order = np.argsort(np.arange(q.shape[1]) % kv_heads, kind="stable")
    out = np.empty_like(q)
    out[:, order] = KERNELS["attention"](q[:, order], cache, batch, scale=scale)
    return out


def one_block_after_the_other(meta):
    first = meta.block_tables[:, :1]
    run = first + np.arange(meta.block_tables.shape[1], dtype=np.int32)
    highest = max(meta.block_tables.max(initial=0), 0)
    return replace(meta, block_tables=np.minimum(run, highest).astype(np.int32))


def table_sorted(meta):
    return replace(meta, block_tables=np.sort(meta.block_tables, axis=1))


def first_table_for_all(meta):
    tables = np.repeat(meta.block_tables[:1], meta.seqs, axis=0)
    lengths = np.minimum(meta.context_lens, tables.shape[1] * 128)
    return replace(meta, block_tables=tables, context_lens=lengths)


def full_blocks_lose_a_key(q, cache, batch, *, scale):
    """Stop one key early where a context ends with its block."""
    meta = batch.meta
    ends = (meta.context_lens % 128 == 0).astype(np.int32)
    lengths = meta.context_lens - ends
    return KERNELS["attention"](q, cache, Batch(replace(meta, context_lens=lengths)), scale=scale)


def no_running_maximum(q, cache, batch, *, scale):
    """Take exponentials of the scores as they are: they overflow."""
    meta = batch.meta
    out = np.zeros_like(q)
    for s in range(meta.seqs):
        rows = slice(int(meta.query_starts[s]), int(meta.query_starts[s + 1]))
        k, v = cache.gather(meta.block_tables[s], int(meta.context_lens[s]))
        visible = np.arange(len(k)) <= meta.positions[rows, None]
        for head in range(q.shape[1]):
            kv = head // (q.shape[1] // k.shape[1])
            scores = widen(q[rows, head]) @ widen(k[:, kv]).T * np.float32(scale)
            p = np.where(visible, np.exp(scores), 0)
            out[rows, head] = (p @ widen(v[:, kv]) / p.sum(-1, keepdims=True)).astype(q.dtype)
    return out


def padding(value):
    """Return an attention kernel that leaves ``value`` in padded rows."""

    def attention(q, cache, batch, *, scale):
        out = KERNELS["attention"](q, cache, batch, scale=scale)
        out[int(batch.meta.query_starts[-1]) :] = value
        return out

    return attention


def tile_shares_its_maximum(q, cache, batch, *, scale):
    """Subtract one maximum for eight rows: those far below it lose their probabilities."""
    meta = batch.meta
    out = np.zeros_like(q)
    for s in range(meta.seqs):
        rows = slice(int(meta.query_starts[s]), int(meta.query_starts[s + 1]))
        k, v = cache.gather(meta.block_tables[s], int(meta.context_lens[s]))
        visible = np.arange(len(k)) <= meta.positions[rows, None]
        coarse = widen(q[rows]).astype(np.float16).astype(q.dtype)
        out[rows] = attend(coarse, k, v, visible, scale)
    return out


def sums_over_whole_blocks(q, cache, batch, *, scale):
    """Let a row see what else lies in its last block."""
    meta = batch.meta
    whole = (-(-meta.context_lens // 128) * 128).astype(np.int32)
    last = np.repeat(whole, np.diff(meta.query_starts)) - 1
    positions = meta.positions.copy()
    positions[: len(last)] = last
    wide = replace(meta, context_lens=whole, positions=positions)
    return KERNELS["attention"](q, cache, Batch(wide), scale=scale)


ATTENTION = (
    kernel("attention", "scale left out",
           lambda q, cache, batch, *, scale: KERNELS["attention"](q, cache, batch, scale=1.0)),
    kernel("attention", "mask hides the token itself", shifted(-1)),
    kernel("attention", "mask shows one key of the future", shifted(1)),
    kernel("attention", "query heads given to KV heads in turn", heads_in_turn),
    kernel("attention", "blocks taken as neighbours", with_meta(one_block_after_the_other)),
    kernel("attention", "block table in rising order", with_meta(table_sorted)),
    kernel("attention", "every sequence reads the first one's blocks",
           with_meta(first_table_for_all)),
    kernel("attention", "a full last block loses its last key", full_blocks_lose_a_key),
    kernel("attention", "the rest of the last block is seen", sums_over_whole_blocks),
    kernel("attention", "exponentials overflow", no_running_maximum),
    kernel("attention", "queries rounded to float16", tile_shares_its_maximum),
    kernel("attention", "NaN in padded rows", padding(np.nan)),
    kernel("attention", "junk in padded rows", padding(1e-20)),
)  # fmt: skip


def images_joined(q, k, v, *, scale):
    one = [x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v)]
    return KERNELS["self_attention"](*one, scale=scale).reshape(q.shape)


def causal(q, k, v, *, scale):
    visible = np.tri(q.shape[1], dtype=bool)
    return np.stack([attend(*image, visible, scale) for image in zip(q, k, v, strict=True)])


SELF_ATTENTION = (
    kernel("self_attention", "images see each other", images_joined),
    kernel("self_attention", "causal", causal),
)


class LastRowStale(ReferenceCache):
    """Leaves the last row of a batch unwritten."""

    def write(self, k, v, batch):
        meta = batch.meta
        super().write(k[:-1], v[:-1], Batch(replace(meta, slots=meta.slots[:-1])))


class KeysAsValues(ReferenceCache):
    """Stores the keys twice."""

    def write(self, k, v, batch):
        super().write(k, k, batch)


class CopiesBackwards(ReferenceCache):
    """Copies the pairs from last to first."""

    def copy_blocks(self, pairs):
        super().copy_blocks(pairs[::-1])


class CopiesKeysOnly(ReferenceCache):
    """Leaves the values of a copied block as they were."""

    def copy_blocks(self, pairs):
        values = self.v.copy()
        super().copy_blocks(pairs)
        self.v = values


class StoresHalf(ReferenceCache):
    """Keeps rows in bfloat16 whatever was asked for."""

    def write(self, k, v, batch):
        narrow = dtype_of("bfloat16")
        super().write(k.astype(narrow), v.astype(narrow), batch)


def cache(what, cls):
    """Return the defect of a cache."""
    return Defect("kv_cache", what, lambda device: setattr(device, "cache_class", cls))


CACHE = (
    cache("the last row stays stale", LastRowStale),
    cache("keys in place of values", KeysAsValues),
    cache("blocks copied in falling order", CopiesBackwards),
    cache("values not copied", CopiesKeysOnly),
    cache("rows rounded to bfloat16", StoresHalf),
)

DEFECTS = (*ROPE, *ATTENTION, *SELF_ATTENTION, *CACHE)
