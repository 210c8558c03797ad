"""Attention whose tile is the query heads of one KV head: under MFA, 64 rows of a product."""

import triton
import triton.language as tl

from step3_hetero.backends.cuda.kernels.numbers import CODES, PLAIN, decode_e4m3, nearest_integer

LOG2_E = tl.constexpr(1.4426950408889634)

PAGE = tl.constexpr(128)
"""Tokens of a logical block; a tile of keys lies in one."""


@triton.jit
def attend(
    q, keys, values, key_scales, value_scales, out, partial, lse,
    tables, tile_seq, tile_row, starts, positions,
    tokens, kv_heads, splits, q_stride, table_stride, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend for BLOCK_M (query, head) rows of one sequence and KV head, over a split of its keys.

    Shapes: q (tokens, kv_heads · GROUP, head_dim), tokens ``q_stride`` apart; keys, values (slots,
    kv_heads, head_dim), scales (slots, kv_heads); out as q, contiguous; with SPLIT instead partial
    (splits, tokens, heads, head_dim) and lse (splits, tokens, heads), both float32; tables
    (seqs, blocks), tile_seq, tile_row (tiles,), starts (seqs + 1,), positions (tokens,), int32.

    A tile's rows are (query, head) in that order, from ``tile_row`` on: one decoding query's 64
    heads, or several queries of a prompt. A tile with sequence -1 is padding. WIDTH is head_dim or
    the power of two above.
    """
    seq = tl.load(tile_seq + tl.program_id(0))
    if seq < 0:
        return
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    start = tl.load(starts + seq)
    row = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    token = start + row // GROUP
    head = kv_head * GROUP + row % GROUP
    valid = token < tl.load(starts + seq + 1)
    seen = tl.load(positions + token, mask=valid, other=-1) + 1  # keys that a row may see
    last = tl.max(seen, 0)
    share = tl.cdiv(tl.cdiv(last, splits), BLOCK_N) * BLOCK_N
    low = split * share
    high = tl.minimum(low + share, last)

    column = tl.arange(0, WIDTH)
    wanted = column < HEAD_DIM
    at = token.to(tl.int64) * q_stride + head * HEAD_DIM
    rows = tl.load(
        q + at[:, None] + column[None, :], mask=valid[:, None] & wanted[None, :], other=0.0
    )
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for first in tl.range(low, high, BLOCK_N):
        block = tl.load(tables + seq * table_stride + first // PAGE).to(tl.int64)
        number = first + tl.arange(0, BLOCK_N)
        place = (block * PAGE + number % PAGE) * kv_heads + kv_head
        there = number < high
        offset = place[None, :] * HEAD_DIM + column[:, None]
        k = tl.load(keys + offset, mask=there[None, :] & wanted[:, None], other=0)
        offset = place[:, None] * HEAD_DIM + column[None, :]
        scores = tl.dot(rows, as_rows(k, rows.dtype, FORMAT), input_precision="ieee")
        scores = scores * scale
        if FORMAT != PLAIN:
            scores = scores * tl.load(key_scales + place, mask=there, other=0.0)[None, :]
        scores = tl.where(number[None, :] < seen[:, None], scores, -float("inf"))
        scores = tl.where(there[None, :], scores, -float("inf"))
        v = tl.load(values + offset, mask=there[:, None] & wanted[None, :], other=0)
        p, top, weight, shrink = weigh(scores, top, weight, rows.dtype == tl.float32)
        if FORMAT != PLAIN:
            p = p * tl.load(value_scales + place, mask=there, other=0.0)[None, :]
        v = as_rows(v, rows.dtype, FORMAT)
        total = folded(total * shrink[:, None], p.to(v.dtype), v)

    result = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    at = token.to(tl.int64) * (kv_heads * GROUP) + head
    if SPLIT:
        at += split.to(tl.int64) * tokens * (kv_heads * GROUP)
        known = tl.where(weight == 0.0, -float("inf"), top + tl.log(weight))
        tl.store(lse + at, known, mask=valid)
        target = partial + at[:, None] * HEAD_DIM + column[None, :]
        tl.store(target, result, mask=valid[:, None] & wanted[None, :])
    else:
        target = out + at[:, None] * HEAD_DIM + column[None, :]
        tl.store(target, result.to(rows.dtype), mask=valid[:, None] & wanted[None, :])


@triton.jit
def weigh(scores, top, weight, PRECISE: tl.constexpr):
    """Fold one tile of scores into a running softmax.

    Differences are taken before the change to base 2: the product of a large score with log2(e)
    would round off what tells it from the largest.

    Returns its weights, the maxima and sums so far, and what earlier sums shrink by. A row that
    has seen no key yet has maximum -inf; its weights are zero, not NaN.
    """
    higher = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(higher == -float("inf"), 0.0, higher)
    p = exponential(scores - safe[:, None], PRECISE)
    shrink = exponential(top - safe, PRECISE)
    return p, higher, weight * shrink + tl.sum(p, 1), shrink


@triton.jit
def folded(total, p, v):
    """Return total + p · v. In float32 each tile is summed by itself: one long chain of additions
    would round ten times more."""
    if v.dtype == tl.float32:
        return total + tl.dot(p, v, input_precision="ieee")
    else:
        return tl.dot(p, v, total)


@triton.jit
def exponential(x, PRECISE: tl.constexpr):
    """Return e to the power of x, at most zero; PRECISE, to the last bits of float32.

    A card raises 2 to a power. The product with log2(e) loses what x has too many bits for: enough
    to be seen beside a reference in float32, nothing beside bfloat16. PRECISE takes whole powers of
    two out first; ln(2) is subtracted in two parts, the first so short that its multiples are exact
    (Cody & Waite 1980).
    """
    if PRECISE:
        x = tl.maximum(x, -1000.0)  # e^-1000 is zero, and minus infinity has no remainder
        whole = nearest_integer(x * LOG2_E)
        rest = (x - whole * 0.693359375) + whole * 2.12194440e-4
        return tl.exp2(whole) * tl.exp2(rest * LOG2_E)
    else:
        return tl.exp2(x * LOG2_E)


@triton.jit
def as_rows(stored, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Return stored keys or values as operands of a product; scales are applied elsewhere."""
    if FORMAT == CODES:
        return decode_e4m3(stored).to(dtype)
    else:
        return stored.to(dtype)


@triton.jit
def combine(
    partial, lse, out, rows, splits,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weigh the splits' results by their sums; a row that no split has seen gives zeros.

    Shapes: partial (splits, rows, head_dim), lse (splits, rows), out (rows, head_dim); a row is a
    token's head. Splits are folded one after another: two reads of lse, one of each result.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    there = row < rows
    top = tl.full([ROWS], -float("inf"), tl.float32)
    for split in tl.range(0, splits):
        known = tl.load(lse + split * rows + row, mask=there, other=-float("inf"))
        top = tl.maximum(top, known)
    safe = tl.where(top == -float("inf"), 0.0, top)
    sums = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for split in tl.range(0, splits):
        known = tl.load(lse + split * rows + row, mask=there, other=-float("inf"))
        share = exponential(known - safe, True)
        at = partial + (split * rows + row)[:, None] * HEAD_DIM + column
        used = (share > 0.0)[:, None] & (column < HEAD_DIM)
        total += tl.load(at, mask=used, other=0.0) * share[:, None]
        sums += share
    result = total / tl.where(sums == 0.0, 1.0, sums)[:, None]
    target = out + row[:, None] * HEAD_DIM + column
    tl.store(target, result.to(out.dtype.element_ty), mask=there[:, None] & (column < HEAD_DIM))


@triton.jit
def attend_image(
    q, k, v, out, tokens, heads, image_stride, token_stride, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend from every token to every token of the same image.

    Shapes: q, k, v (images, tokens, heads, head_dim), images and tokens a stride apart, the same
    in all three; out (images, tokens, heads, head_dim).
    """
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, WIDTH)
    wanted = column < HEAD_DIM
    base = image * image_stride + head * HEAD_DIM
    offset = base + row.to(tl.int64)[:, None] * token_stride + column[None, :]
    rows = tl.load(q + offset, mask=(row < tokens)[:, None] & wanted[None, :], other=0.0)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for first in tl.range(0, tokens, BLOCK_N):
        number = first + tl.arange(0, BLOCK_N)
        there = number < tokens
        place = base + number.to(tl.int64) * token_stride
        offset = place[None, :] + column[:, None]
        keys = tl.load(k + offset, mask=there[None, :] & wanted[:, None], other=0.0)
        scores = tl.dot(rows, keys, input_precision="ieee") * scale
        scores = tl.where(there[None, :], scores, -float("inf"))
        p, top, weight, shrink = weigh(scores, top, weight, rows.dtype == tl.float32)
        offset = place[:, None] + column[None, :]
        values = tl.load(v + offset, mask=there[:, None] & wanted[None, :], other=0.0)
        total = folded(total * shrink[:, None], p.to(values.dtype), values)
    result = total / weight[:, None]
    at = (image * tokens + row) * (heads * HEAD_DIM) + head * HEAD_DIM
    target = out + at[:, None] + column[None, :]
    tl.store(target, result.to(rows.dtype), mask=(row < tokens)[:, None] & wanted[None, :])
