"""Number formats in integer arithmetic, the same on every card: sm_80 has no e4m3 of its own."""

import triton
import triton.language as tl

PLAIN = tl.constexpr(0)
"""Stored in the dtype of the activations, or one that converts to it."""

CODES = tl.constexpr(1)
"""e4m3 as bytes, decoded by ``decode_e4m3``."""

INTEGERS = tl.constexpr(2)
"""int8 with a scale beside it."""


@triton.jit
def decode_e4m3(code):
    """Return the values of e4m3 bytes in float32. The two NaN codes give ±480.

    Sign, exponent and fraction are moved to where float32 has them; 2^120 makes up for the
    difference of the biases, subnormals included.
    """
    wide = code.to(tl.uint32)
    bits = ((wide & 0x7F) << 20) | ((wide & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def encode_e4m3(x):
    """Return the e4m3 bytes nearest to float32 ``x``, ties to even, saturating at ±448.

    Normal values are rounded by adding half of the last kept bit; subnormal ones by the addition
    of 2^14, whose last bit in float32 is 2^-9, the smallest e4m3.
    """
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # (127 - 7) << 3
    magnitude = size.to(tl.float32, bitcast=True)
    subnormal = (magnitude + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, subnormal, tl.minimum(normal, 0x7E))
    return (code | sign).to(tl.uint8)


@triton.jit
def nearest_integer(x):
    """Return float32 ``x``, below 2^22 in size, rounded to an integer, ties to even."""
    return (x + 12582912.0) - 12582912.0
