"""MFA decode: one KV head read once for all query heads, which are the rows of two products.

Written for triton-ascend 3.2.0: products go to the cube unit, softmax to the vector units. Never
run on hardware.
"""

import triton
import triton.language as tl

COUNTS = ["table_stride", "share"]
"""Not specialised: what was compiled ahead of time is what a card runs."""


@triton.jit(do_not_specialize=COUNTS)
def attend(
    q, keys, values, out, lse, tables, contexts, table_stride, share, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Attend from one query of one sequence to keys ``share · split`` up to the next share's.

    Shapes: q (seqs, HEADS, HEAD_DIM), keys, values (blocks, PAGE, HEAD_DIM), tables (seqs, blocks),
    its rows ``table_stride`` apart, contexts (seqs,), int32; out as q in its dtype; with SPLIT
    (splits, seqs, HEADS, HEAD_DIM) float32 and lse (splits, seqs, HEADS) float32. Grid: (seqs,
    splits). Every split has a key to read; PAGE is a multiple of BLOCK_N, so that a tile lies in
    one block of the cache.
    """
    seq = tl.program_id(0)
    split = tl.program_id(1)
    low = split * share
    high = tl.minimum(low + share, tl.load(contexts + seq))
    head = tl.arange(0, HEADS)
    column = tl.arange(0, HEAD_DIM)
    key = tl.arange(0, BLOCK_N)
    cells = head[:, None] * HEAD_DIM + column[None, :]
    rows = tl.load(q + seq * HEADS * HEAD_DIM + cells)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    total = tl.zeros([HEADS, HEAD_DIM], tl.float32)
    for first in range(low, high, BLOCK_N):
        block = tl.load(tables + seq * table_stride + first // PAGE)
        start = (block * PAGE + first % PAGE) * HEAD_DIM
        there = (first + key)[:, None] < high
        at = start + key[:, None] * HEAD_DIM + column[None, :]
        k = tl.load(keys + at, mask=there, other=0.0)
        scores = tl.dot(rows, tl.trans(k)) * scale
        scores = tl.where((first + key)[None, :] < high, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        weight = weight * shrink + tl.sum(p, 1)
        v = tl.load(values + at, mask=there, other=0.0)
        total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = higher
    result = total / weight[:, None]
    if SPLIT:
        place = split * tl.num_programs(0) + seq
        tl.store(out + place * HEADS * HEAD_DIM + cells, result)
        tl.store(lse + place * HEADS + head, top + tl.log(weight))
    else:
        tl.store(out + seq * HEADS * HEAD_DIM + cells, result.to(rows.dtype))


@triton.jit(do_not_specialize=["splits"])
def combine(partial, lse, out, splits, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Weigh the splits' results by their sums.

    Shapes: partial (splits, rows, HEAD_DIM), lse (splits, rows), out (rows, HEAD_DIM); a row is a
    sequence's head. Grid: (rows / ROWS,).
    """
    rows = tl.num_programs(0) * ROWS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cells = row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for split in range(0, splits):
        known = tl.load(lse + split * rows + row)
        higher = tl.maximum(top, known)
        share = tl.exp(known - higher)
        shrink = tl.exp(top - higher)
        weight = weight * shrink + share
        found = tl.load(partial + split * rows * HEAD_DIM + cells)
        total = total * shrink[:, None] + found * share[:, None]
        top = higher
    tl.store(out + cells, (total / weight[:, None]).to(out.dtype.element_ty))
