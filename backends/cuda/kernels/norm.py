"""Normalisation: a program takes whole rows, several where they are short."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x, y, weight, total, out, tokens, n, stride, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Normalise each row of ``x`` (of x + y, which goes to ``total``), then scale it.

    Shapes: x, y (tokens, n), rows ``stride`` apart in x; weight (n,); total, out (tokens, n).
    WIDTH is n or the power of two above. Two roundings: to the activation's dtype before the
    weight, and after it.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < tokens) & (column < n)
    values = tl.load(x + row * stride + column, mask=inside, other=0.0)
    if ADD:
        more = tl.load(y + row * n + column, mask=inside, other=0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(values.dtype)
        tl.store(total + row * n + column, values, mask=inside)
    wide = values.to(tl.float32)
    mean_square = tl.div_rn(tl.sum(wide * wide, 1), n.to(tl.float32))
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    unit = (wide * inverse[:, None]).to(values.dtype)
    scale = tl.load(weight + column, mask=column < n, other=0.0)
    scaled = unit.to(tl.float32) * scale.to(tl.float32)
    tl.store(out + row * n + column, scaled.to(values.dtype), mask=inside)


@triton.jit
def layer_norm(x, weight, bias, out, tokens, n, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Shift and scale each row to mean 0 and variance 1, then by weight and bias. Rounds once.

    Shapes: x, out (tokens, n); weight, bias (n,). WIDTH as in ``rms_norm``.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < tokens) & (column < n)
    values = tl.load(x + row * n + column, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    mean = tl.div_rn(tl.sum(wide, 1), n.to(tl.float32))
    centred = tl.where(inside, wide - mean[:, None], 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, 1), n.to(tl.float32))
    unit = centred * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]
    scale = tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
    tl.store(out + row * n + column, (unit * scale + shift).to(values.dtype), mask=inside)
