"""Matrix products over weights as the checkpoint stores them, one matrix or a stack of experts."""

import triton
import triton.language as tl

from step3_hetero.backends.cuda.kernels.numbers import CODES, INTEGERS, decode_e4m3

SCALE_BLOCK = tl.constexpr(128)
"""Rows and columns of a weight that share a scale; columns of an activation that do."""


@triton.jit
def gemm(
    a, a_scale, b, b_scale, up, up_scale, bias, out, rows, tile_expert,
    m, n, k, a_stride, out_stride,
    DIVISOR: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, FORMAT: tl.constexpr,
    QUANTISED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of a · bᵀ, sums in float32, rounded once; GATED: silu(a · bᵀ) · (a · upᵀ).

    Shapes: a (m / DIVISOR, k), rows ``a_stride`` apart; b, up (experts, n, k); out (m, n), rows
    ``out_stride`` apart; rows (tiles · BLOCK_M,) which rows of ``out`` a tile computes, from row
    // DIVISOR of ``a``, -1 none; tile_expert (tiles,), -1 for a tile without work. Scales: b, up
    (experts, ceil(n / 128), ceil(k / 128)) where FORMAT is CODES; a (m / DIVISOR, ceil(k / 128))
    where QUANTISED: then a and b are e4m3 and multiplied as such. Where FORMAT is INTEGERS a and b
    are int8, their products are summed as int32, and scales are a row's: b, up (experts, n), a
    (m / DIVISOR,).
    """
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(rows + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    valid = row >= 0
    source = row // DIVISOR
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < n
    k_runs = tl.cdiv(k, SCALE_BLOCK)
    scale_row = (
        expert * tl.cdiv(n, SCALE_BLOCK) + tl.program_id(1) * BLOCK_N // SCALE_BLOCK
    ) * k_runs
    base = expert * n * k
    counted: tl.constexpr = tl.int32 if FORMAT == INTEGERS else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_N], counted)
    total_up = tl.zeros([BLOCK_M, BLOCK_N], counted)
    for first in tl.range(0, k, BLOCK_K):
        depth = first + tl.arange(0, BLOCK_K)
        there = depth < k
        run = first // SCALE_BLOCK
        x = tl.load(
            a + source[:, None] * a_stride + depth[None, :],
            mask=valid[:, None] & there[None, :],
            other=0.0,
        )
        factor = tl.full([BLOCK_M, 1], 1.0, tl.float32)
        if QUANTISED:
            factor = tl.load(a_scale + source * k_runs + run, mask=valid, other=0.0)[:, None]
        offset = base + column.to(tl.int64)[None, :] * k + depth[:, None]
        mask = inside[None, :] & there[:, None]
        total = add_product(
            total, x, factor, b + offset, mask, b_scale + scale_row + run, FORMAT, QUANTISED
        )
        if GATED:
            total_up = add_product(
                total_up,
                x,
                factor,
                up + offset,
                mask,
                up_scale + scale_row + run,
                FORMAT,
                QUANTISED,
            )
    result = total
    result_up = total_up
    if FORMAT == INTEGERS:
        factor = tl.load(a_scale + source, mask=valid, other=0.0)[:, None]
        at = expert * n + column
        scale = tl.load(b_scale + at, mask=inside, other=0.0)[None, :]
        result = total.to(tl.float32) * factor * scale
        scale = tl.load(up_scale + at, mask=inside, other=0.0)[None, :]
        result_up = total_up.to(tl.float32) * factor * scale
    if BIASED:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate = result.to(out.dtype.element_ty).to(tl.float32)
        result = gate * tl.sigmoid(gate) * result_up.to(out.dtype.element_ty).to(tl.float32)
    target = out + row[:, None] * out_stride + column[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit
def add_product(total, x, factor, b, mask, scale, FORMAT: tl.constexpr, QUANTISED: tl.constexpr):
    """Return total + x · b, times the scales of both; of integers the sum alone.

    Shapes: total (BLOCK_M, BLOCK_N), x (BLOCK_M, BLOCK_K), factor (BLOCK_M, 1), b a block of
    pointers (BLOCK_K, BLOCK_N), scale a pointer to one number.
    """
    if QUANTISED:
        w = tl.load(b, mask=mask, other=0.0)
        return total + tl.dot(x, w) * (factor * tl.load(scale))
    elif FORMAT == CODES:
        w = decode_e4m3(tl.load(b, mask=mask, other=0)).to(x.dtype)
        return total + tl.dot(x, w, input_precision="ieee") * tl.load(scale)
    elif FORMAT == INTEGERS:
        return tl.dot(x, tl.load(b, mask=mask, other=0), total, out_dtype=tl.int32)
    else:
        w = tl.load(b, mask=mask, other=0.0).to(x.dtype)
        if x.dtype == tl.float32:  # tile by tile: one long chain of additions would round more
            return total + tl.dot(x, w, input_precision="ieee")
        else:
            return tl.dot(x, w, total)
