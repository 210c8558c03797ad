"""Rotary position embedding, and the writing of keys and values into the cache."""

import triton
import triton.language as tl

from step3_hetero.backends.cuda.kernels.numbers import (
    CODES,
    PLAIN,
    encode_e4m3,
    nearest_integer,
)


@triton.jit
def rope(
    x, cos, sin, out, rows, heads, stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turn both halves of every head in float32, rounded once. A row is a token's head.

    Shapes: x (tokens, heads, head_dim), tokens ``stride`` apart; cos, sin (tokens, head_dim / 2)
    float32; out (rows, head_dim). HALF is head_dim / 2 or the power of two above.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // heads
    half: tl.constexpr = HEAD_DIM // 2
    column = tl.arange(0, HALF)[None, :]
    inside = (row < rows) & (column < half)
    c = tl.load(cos + token * half + column, mask=inside, other=0.0)
    s = tl.load(sin + token * half + column, mask=inside, other=0.0)
    source = x + token * stride + row % heads * HEAD_DIM + column
    a, b = turned(source, source + half, c, s, inside)
    tl.store(out + row * HEAD_DIM + column, a, mask=inside)
    tl.store(out + row * HEAD_DIM + half + column, b, mask=inside)


@triton.jit
def turned(first, second, c, s, inside):
    """Return both halves turned, in the dtype of what ``first`` and ``second`` point to."""
    a = tl.load(first, mask=inside, other=0.0)
    b = tl.load(second, mask=inside, other=0.0)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    return (wide_a * c - wide_b * s).to(a.dtype), (wide_b * c + wide_a * s).to(a.dtype)


@triton.jit
def write_kv(
    k, v, cos, sin, slots, keys, values, key_scales, value_scales,
    rows, kv_heads, k_stride, v_stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr, FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Store each row's key, turned if ROTATE, and value at its token's slot; a row is a KV head.

    Shapes: k, v (tokens, kv_heads, head_dim), tokens a stride apart; slots (tokens,) int32, -1
    writes nothing; keys, values (slots, kv_heads, head_dim); scales (slots, kv_heads) float32,
    one per token and KV head where FORMAT is not PLAIN.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // kv_heads
    head = row % kv_heads
    half: tl.constexpr = HEAD_DIM // 2
    slot = tl.load(slots + token, mask=row < rows, other=-1).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    inside = (column < half) & (slot >= 0)
    place = slot * kv_heads + head
    source = k + token * k_stride + head * HEAD_DIM + column
    if ROTATE:
        c = tl.load(cos + token * half + column, mask=inside, other=0.0)
        s = tl.load(sin + token * half + column, mask=inside, other=0.0)
        a, b = turned(source, source + half, c, s, inside)
    else:
        a = tl.load(source, mask=inside, other=0.0)
        b = tl.load(source + half, mask=inside, other=0.0)
    store_halves(keys, key_scales, place, a, b, column, inside, slot >= 0, HEAD_DIM, FORMAT)
    source = v + token * v_stride + head * HEAD_DIM + column
    a = tl.load(source, mask=inside, other=0.0)
    b = tl.load(source + half, mask=inside, other=0.0)
    store_halves(values, value_scales, place, a, b, column, inside, slot >= 0, HEAD_DIM, FORMAT)


@triton.jit
def store_halves(
    stored, scales, place, a, b, column, inside, kept,
    HEAD_DIM: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Store the halves a, b of each row, with a scale of its own unless FORMAT is PLAIN."""
    target = stored + place * HEAD_DIM + column
    half: tl.constexpr = HEAD_DIM // 2
    if FORMAT == PLAIN:
        tl.store(target, a.to(stored.dtype.element_ty), mask=inside)
        tl.store(target + half, b.to(stored.dtype.element_ty), mask=inside)
    else:
        largest: tl.constexpr = 448.0 if FORMAT == CODES else 127.0
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        top = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))
        scale = tl.div_rn(top, largest)
        scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)[:, None]
        a = tl.div_rn(a, tl.broadcast_to(scale, a.shape))
        b = tl.div_rn(b, tl.broadcast_to(scale, b.shape))
        if FORMAT == CODES:
            tl.store(target, encode_e4m3(a), mask=inside)
            tl.store(target + half, encode_e4m3(b), mask=inside)
        else:
            tl.store(target, nearest_integer(a).to(tl.int8), mask=inside)
            tl.store(target + half, nearest_integer(b).to(tl.int8), mask=inside)
        tl.store(scales + place, scale, mask=kept)
