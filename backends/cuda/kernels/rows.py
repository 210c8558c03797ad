"""Rows moved, quantised, and passed through a function of one element."""

import triton
import triton.language as tl

from step3_hetero.backends.cuda.kernels.numbers import (
    CODES,
    decode_e4m3,
    encode_e4m3,
    nearest_integer,
)

RUN = tl.constexpr(128)
"""Columns that share a scale."""


@triton.jit
def merge_rows(out, rows, index, count, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write rows[i] to out[index[i]]; index -1 writes nothing.

    Shapes: out (tokens, n), rows (count, n), index (count,) int32.
    """
    source = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    target = tl.load(index + source, mask=source < count, other=-1).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (column < n) & (target >= 0)
    values = tl.load(rows + source * n + column, mask=inside, other=0.0)
    tl.store(out + target * n + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(gate_up, out, tokens, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """silu(gate) · up in float32, rounded once. Shapes: gate_up (tokens, 2n), out (tokens, n)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < tokens) & (column < n)
    inner = gated(gate_up + row * 2 * n + column, n, inside)
    tl.store(out + row * n + column, inner.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_quantise(gate_up, codes, scales, tokens, n, E4M3: tl.constexpr, ROWS: tl.constexpr):
    """SwiGLU, rounded as ``swiglu`` rounds it, and quantised as ``quantise`` does.

    Shapes: gate_up (tokens, 2n), codes (tokens, n) bytes, scales (tokens, ceil(n / 128)).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * RUN + tl.arange(0, RUN)[None, :]
    inside = (row < tokens) & (column < n)
    inner = gated(gate_up + row * 2 * n + column, n, inside)
    inner = inner.to(gate_up.dtype.element_ty).to(tl.float32)
    store_run(inner, codes, scales, row, column, inside, row < tokens, n, E4M3)


@triton.jit
def gated(gate, n, inside):
    """Return silu(gate) · up, up lying n columns behind; gate is a block of pointers."""
    g = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate + n, mask=inside, other=0.0).to(tl.float32)
    return g * tl.sigmoid(g) * up


@triton.jit
def quick_gelu(x, out, n, BLOCK: tl.constexpr):
    """x · sigmoid(1.702 x) of n elements, in float32, rounded once."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (wide * tl.sigmoid(1.702 * wide)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantise(x, codes, scales, tokens, n, E4M3: tl.constexpr, ROWS: tl.constexpr):
    """Quantise one run of 128 columns of each of ROWS rows with a scale of its own.

    Shapes: x (tokens, n), codes (tokens, n) bytes, scales (tokens, ceil(n / 128)) float32.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * RUN + tl.arange(0, RUN)[None, :]
    inside = (row < tokens) & (column < n)
    values = tl.load(x + row * n + column, mask=inside, other=0.0).to(tl.float32)
    store_run(values, codes, scales, row, column, inside, row < tokens, n, E4M3)


@triton.jit
def store_run(values, codes, scales, row, column, inside, there, n, E4M3: tl.constexpr):
    """Store the codes of one run a row, and its scale: 1 where that is no normal float32."""
    largest: tl.constexpr = 448.0 if E4M3 else 127.0
    scale = tl.div_rn(tl.max(tl.abs(values), 1), largest)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)[:, None]
    ratio = tl.div_rn(values, tl.broadcast_to(scale, values.shape))
    if E4M3:
        tl.store(codes + row * n + column, encode_e4m3(ratio), mask=inside)
    else:
        tl.store(codes + row * n + column, nearest_integer(ratio).to(tl.int8), mask=inside)
    tl.store(scales + row * tl.cdiv(n, RUN) + tl.program_id(1), scale, mask=there)


@triton.jit
def quantise_rows(x, codes, scales, tokens, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Quantise ROWS whole rows to int8, each with one scale: 1 where that is no normal float32.

    Shapes: x, codes (tokens, n), scales (tokens,) float32. A row is read twice, WIDTH columns at a
    time, and may be of any length.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    largest = tl.zeros([ROWS], tl.float32)
    for first in tl.range(0, n, WIDTH):
        inside = (row < tokens) & (first + column < n)
        values = tl.load(x + row * n + first + column, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(values), 1))
    scale = tl.div_rn(largest, 127.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)[:, None]
    for first in tl.range(0, n, WIDTH):
        inside = (row < tokens) & (first + column < n)
        values = tl.load(x + row * n + first + column, mask=inside, other=0.0).to(tl.float32)
        ratio = tl.div_rn(values, tl.broadcast_to(scale, values.shape))
        target = codes + row * n + first + column
        tl.store(target, nearest_integer(ratio).to(tl.int8), mask=inside)
    tl.store(scales + row, scale, mask=row < tokens)


@triton.jit
def dequantise(codes, scales, out, tokens, n, FORMAT: tl.constexpr, ROWS: tl.constexpr):
    """q · scale in float32, rounded to the dtype of ``out``. Shapes as in ``quantise``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * RUN + tl.arange(0, RUN)[None, :]
    inside = (row < tokens) & (column < n)
    code = tl.load(codes + row * n + column, mask=inside, other=0)
    value = decode_e4m3(code) if FORMAT == CODES else code.to(tl.float32)
    at = scales + row * tl.cdiv(n, RUN) + tl.program_id(1)
    value = value * tl.load(at, mask=row < tokens, other=0.0)
    tl.store(out + row * n + column, value.to(out.dtype.element_ty), mask=inside)
