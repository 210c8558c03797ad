"""The reference's attention against oracles: paged, grouped, in chunks, padded, over images."""

from dataclasses import dataclass

import numpy as np
import pytest

from oracle import ops
from oracle.test_reference_ops import (
    REFERENCE,
    F,
    call,
    check,
    check_equal,
    draw,
    each_dtype,
    each_source,
    named,
    onnx_ops,
    torch,
    wide,
)
from step3_hetero.backend import BatchMeta
from step3_hetero.specs import CacheSpec

SCALE = 0.5625  # not 1 / sqrt(head_dim); 0.75², so that ONNX, which takes the root, is exact


@dataclass(frozen=True)
class Batch:
    """Lengths of this chunk and of the whole context, sequence by sequence; padded rows behind."""

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    padding: int = 0

    def __str__(self):
        return f"{self.lengths}of{self.contexts}+{self.padding}"

    def tables(self):
        """Return block tables from a permutation of the blocks, short ones filled with block 0."""
        counts = [-(-context // ops.BLOCK) for context in self.contexts]
        order = np.random.default_rng(7).permutation(sum(counts) + 2).astype(np.int32)
        tables = np.zeros((len(counts), max(counts, default=0)), np.int32)
        for s, count in enumerate(counts):
            tables[s, :count] = order[sum(counts[:s]) :][:count]
        return tables, len(order)

    def meta(self, tables):
        """Return the batch's places, the queries being the last tokens of each context."""
        both = list(zip(self.lengths, self.contexts, strict=True))
        spans = [np.arange(context - length, context) for length, context in both]
        positions = np.concatenate([*spans, np.zeros(self.padding)]).astype(np.int32)
        rows = [
            t[span // ops.BLOCK] * ops.BLOCK + span % ops.BLOCK
            for t, span in zip(tables, spans, strict=True)
        ]
        slots = np.concatenate([*rows, -np.ones(self.padding)]).astype(np.int32)
        starts = np.cumsum([0, *self.lengths]).astype(np.int32)
        return BatchMeta(positions, slots, starts, np.array(self.contexts, np.int32), tables)


BATCHES = [
    Batch((1,), (1,)),
    Batch((1, 1, 1), (5, 128, 129)),
    Batch((20, 1, 7), (20, 300, 140)),
    Batch((1, 3), (130, 3), padding=4),
    Batch((), (), padding=2),
    Batch((), ()),
]


def stored_batch(batch, dtype, kv_heads, head_dim):
    """Return slots of keys and values whose every place outside the contexts is NaN."""
    tables, blocks = batch.tables()
    stored = np.full((2, blocks * ops.BLOCK, kv_heads, head_dim), np.nan, named(dtype))
    for s, context in enumerate(batch.contexts):
        at = [int(tables[s, i // ops.BLOCK]) * ops.BLOCK + i % ops.BLOCK for i in range(context)]
        stored[:, at] = draw(f"kv{s}", (2, context, kv_heads, head_dim), dtype)
    return stored, tables, blocks


def filled_cache(stored, meta, blocks, dtype):
    """Return the reference's cache: history in one write, this chunk's in another."""
    slots = np.arange(stored.shape[1], dtype=np.int32)
    one = np.array([0, len(slots)], np.int32)
    everything = BatchMeta(slots, slots, one, one[1:], np.arange(blocks, dtype=np.int32)[None])
    cache = REFERENCE.open_cache(CacheSpec(*stored.shape[2:], blocks, dtype))
    history = stored.copy()
    history[:, meta.slots[meta.slots >= 0]] = np.nan
    cache.write(*history, REFERENCE.batch(everything))
    chunk = stored[:, meta.slots]  # a padded row, slot -1, brings the last slot's NaN
    cache.write(*chunk, REFERENCE.batch(meta))
    return cache


def exact_attention(source, q, k, v, visible):
    """Return float64 attention of one sequence. Shapes: q (queries, heads, d), k (keys, ...)."""
    if source == "loops":
        return ops.attend(q, k, v, visible, SCALE, "float64")[0]
    if source == "onnx":
        return onnx_ops.attention(q, k, v, visible, SCALE)
    heads_first = (torch.from_numpy(x).transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        *heads_first, attn_mask=torch.from_numpy(visible), scale=SCALE, enable_gqa=True
    )
    return out[0].transpose(0, 1).numpy()


def check_attention(source, dtype, batch, heads, kv_heads, head_dim):
    stored, tables, blocks = stored_batch(batch, dtype, kv_heads, head_dim)
    meta = batch.meta(tables)
    q = draw("q", (meta.tokens, heads, head_dim), dtype)
    cache = filled_cache(stored, meta, blocks, dtype)

    got = call("attention", q, cache, REFERENCE.batch(meta), scale=SCALE)

    exact, radius = np.zeros((2, *q.shape))
    for s, context in enumerate(batch.contexts):
        rows = slice(*meta.query_starts[s : s + 2])
        k, v = (ops.paged(wide(part), tables[s], context) for part in stored)
        visible = np.arange(context) <= np.arange(context - batch.lengths[s], context)[:, None]
        exact[rows] = exact_attention(source, wide(q[rows]), k, v, visible)
        radius[rows] = ops.attend(wide(q[rows]), k, v, visible, SCALE, dtype)[1]
    check(got, ops.Range.about(exact, radius).rounded(dtype), dtype)


@each_dtype
@each_source
@pytest.mark.parametrize("heads,kv_heads", [(4, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_attention_sees_its_own_sequence_up_to_itself(source, dtype, heads, kv_heads, batch):
    check_attention(source, dtype, batch, heads, kv_heads, 16)


@pytest.mark.parametrize("source", ["onnx", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_over_65536_tokens(source, dtype):
    check_attention(source, dtype, Batch((2,), (65536,)), 2, 1, 4)


@each_dtype
def test_attention_in_chunks_agrees_with_causal_attention_over_a_past(dtype):
    batch = Batch((9,), (150,))
    stored, tables, blocks = stored_batch(batch, dtype, 2, 16)
    meta = batch.meta(tables)
    q = draw("q", (9, 4, 16), dtype)

    cache = filled_cache(stored, meta, blocks, dtype)
    got = call("attention", q, cache, REFERENCE.batch(meta), scale=SCALE)

    k, v = (ops.paged(wide(part), tables[0], 150) for part in stored)
    visible = np.arange(150) <= np.arange(141, 150)[:, None]
    exact = onnx_ops.causal_attention(wide(q), k, v, SCALE)
    radius = ops.attend(wide(q), k, v, visible, SCALE, dtype)[1]
    check(got, ops.Range.about(exact, radius).rounded(dtype), dtype)


@each_dtype
def test_attention_whose_scores_are_far_apart_is_the_value_of_the_largest(dtype):
    batch = Batch((6,), (6,))
    stored, tables, blocks = stored_batch(batch, dtype, 1, 8)
    stored[0] = (wide(stored[0]) * 1e4).astype(named(dtype))
    meta = batch.meta(tables)
    q = draw("q", (6, 2, 8), dtype, 1e4)

    cache = filled_cache(stored, meta, blocks, dtype)
    got = call("attention", q, cache, REFERENCE.batch(meta), scale=SCALE)

    k, v = (ops.paged(wide(part), tables[0], 6)[:, 0] for part in stored)
    for i, h in np.ndindex(6, 2):
        ranked = np.argsort(k[: i + 1] @ wide(q[i, h]))
        check_equal(got[i, h], v[ranked[-1]], dtype)


@each_dtype
def test_attention_of_padded_rows_is_exactly_zero_whatever_they_hold(dtype):
    batch = Batch((1,), (3,), padding=3)
    stored, tables, blocks = stored_batch(batch, dtype, 1, 8)
    meta = batch.meta(tables)
    q = draw("q", (4, 2, 8), dtype)
    q[1:] = np.array([np.nan, np.inf, 1e30]).astype(named(dtype))[:, None, None]

    cache = filled_cache(stored, meta, blocks, dtype)
    got = call("attention", q, cache, REFERENCE.batch(meta), scale=SCALE)

    check_equal(got[1:], np.zeros((3, 2, 8)), dtype)
    assert np.isfinite(wide(got[0])).all()


@each_dtype
@each_source
@pytest.mark.parametrize("shape", [(2, 20, 4, 16), (1, 1, 1, 8), (0, 5, 2, 8)], ids=str)
@pytest.mark.parametrize("size", [1.0, 20.0])
def test_self_attention_sees_every_token_of_its_own_image(source, dtype, shape, size):
    q, k, v = (draw(name, shape, dtype, size) for name in "qkv")
    everything = np.ones((shape[1], shape[1]), bool)

    got = call("self_attention", q, k, v, scale=SCALE)

    exact, radius = np.zeros((2, *shape))
    for i, one in enumerate(zip(wide(q), wide(k), wide(v), strict=True)):
        exact[i] = exact_attention(source, *one, everything)
        radius[i] = ops.attend(*one, everything, SCALE, dtype)[1]
    check(got, ops.Range.about(exact, radius).rounded(dtype), dtype)
