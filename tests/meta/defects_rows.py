"""Defects of the ops that take rows one by one: norms, activations, copies, quantisation."""

import numpy as np

from meta.twin import kernel, wrapped
from step3_hetero.backends.reference.arrays import dtype_of, widen
from step3_hetero.backends.reference.device import KERNELS
from step3_hetero.backends.reference.moe import sigmoid
from step3_hetero.backends.reference.quant import LARGEST


def truncated(x):
    """Return float32 values cut, not rounded, to bfloat16; infinities and NaN stay."""
    bits = x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(dtype_of("bfloat16"))


def eps_outside_the_root(x, weight, *, eps):
    w = widen(x)
    root = np.sqrt((w * w).mean(-1, keepdims=True)) + w.dtype.type(eps)
    return (w / root).astype(x.dtype) * weight


def square_of_the_mean(x, weight, bias, *, eps):
    w = widen(x)
    mean = w.mean(-1, keepdims=True)
    variance = np.maximum((w * w).mean(-1, keepdims=True) - mean * mean, 0)
    unit = (w - mean) / np.sqrt(variance + w.dtype.type(eps))
    return (unit * widen(weight) + widen(bias)).astype(x.dtype)


def unbiased_variance(x, weight, bias, *, eps):
    w = widen(x)
    unit = (w - w.mean(-1, keepdims=True)) / np.sqrt(w.var(-1, ddof=1, keepdims=True) + eps)
    return (unit * widen(weight) + widen(bias)).astype(x.dtype)


def flushed(x, weight, *, eps):
    below_float16 = np.abs(widen(x)) < np.finfo(np.float16).smallest_subnormal
    return KERNELS["rms_norm"](np.where(below_float16, x.dtype.type(0), x), weight, eps=eps)


def wrong_row_in_ten_thousand(out):
    if len(out) >= 10_000:
        out[6_789] = out[6_788]
    return out


def wrong_element(out):
    if out.shape[-1:] == (7168,):
        out[3, 4_321] *= out.dtype.type(1.25)
    return out


def refuses_zero_tokens(x, weight, *, eps):
    if len(x) == 0:
        raise ValueError("cannot launch a grid of 0 blocks")
    return KERNELS["rms_norm"](x, weight, eps=eps)


def squares_in_place(x, weight, *, eps):
    out = KERNELS["rms_norm"](x, weight, eps=eps)
    x *= x
    return out


def writes_past_the_end(x, weight, *, eps):
    if x.base is not None and len(x.base) > len(x):
        start = (x.ctypes.data - x.base.ctypes.data) // x.strides[0]
        x.base[start + len(x)] = 0
    return KERNELS["rms_norm"](x, weight, eps=eps)


def clipped(x, y):
    largest = float(np.finfo(np.float32).max if x.dtype == np.float32 else dtype_max(x.dtype))
    return np.clip(widen(x) + widen(y), -largest, largest).astype(x.dtype)


def dtype_max(dtype):
    """Return bfloat16's largest finite value, or that of NumPy's own dtype."""
    return 2.0**128 * (1 - 2.0**-8) if dtype == dtype_of("bfloat16") else np.finfo(dtype).max


def infinity_as_nan(out):
    return np.where(np.isinf(widen(out)), out.dtype.type(np.nan), out)


def added_in_half_precision(x, y):
    narrow = dtype_of("bfloat16")
    return (x.astype(narrow).astype(np.float32) + y.astype(narrow).astype(np.float32)).astype(
        x.dtype
    )


def truncating_cast(x, *, dtype):
    return truncated(x) if dtype == "bfloat16" else KERNELS["cast"](x, dtype=dtype)


def ties_away(x, *, dtype):
    if dtype != "bfloat16":
        return KERNELS["cast"](x, dtype=dtype)
    bits = x.astype(np.float32).view(np.uint32)
    up = np.where(np.isfinite(widen(x)), bits + np.uint32(0x8000), bits)
    return truncated(up.view(np.float32))


def swapped_halves(gate_up):
    return KERNELS["swiglu"](np.roll(gate_up, gate_up.shape[-1] // 2, axis=-1))


def interleaved(gate_up):
    return KERNELS["swiglu"](np.concatenate([gate_up[:, ::2], gate_up[:, 1::2]], axis=-1))


def tanh_gelu(x):
    w = widen(x).astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (w + 0.044715 * w**3)
    return (0.5 * w * (1 + np.tanh(inner))).astype(x.dtype)


def gelu_of_1_7(x):
    w = widen(x)
    return (w * sigmoid(w * w.dtype.type(1.7))).astype(x.dtype)


def int8_towards_zero(x, *, dtype):
    q, scale = KERNELS["quantise"](x, dtype=dtype)
    if dtype == "int8":
        spread = np.repeat(scale, 128, axis=-1)[:, : x.shape[-1]]
        q = np.trunc(widen(x) / spread).astype(np.int8)
    return q, scale


def int8_wraps(x, *, dtype):
    """Scale to 128 instead of 127: without saturation the largest value becomes -128."""
    if dtype != "int8":
        return KERNELS["quantise"](x, dtype=dtype)
    _, scale = KERNELS["quantise"](x, dtype=dtype)
    spread = np.repeat(scale, 128, axis=-1)[:, : x.shape[-1]] * np.float32(127 / 128)
    return np.rint(widen(x) / spread).astype(np.int32).astype(np.int8), scale


def e4m3_saturates_to_nan(x, *, dtype):
    q, scale = KERNELS["quantise"](x, dtype=dtype)
    if dtype == "int8":
        return q, scale
    return np.where(np.abs(q.astype(np.float32)) >= LARGEST[dtype], q.dtype.type(np.nan), q), scale


def one_scale_a_row(x, *, dtype):
    _, scale = KERNELS["quantise"](x, dtype=dtype)
    whole = np.repeat(scale.max(-1, keepdims=True, initial=0), scale.shape[-1], axis=-1)
    q = widen(x) / np.repeat(whole, 128, axis=-1)[:, : x.shape[-1]]
    return (np.rint(q) if dtype == "int8" else q).astype(dtype_of(dtype)), whole


def scale_of_zero(x, *, dtype):
    q, scale = KERNELS["quantise"](x, dtype=dtype)
    spread = np.repeat(scale, 128, axis=-1)[:, : x.shape[-1]]
    largest = np.abs(q.astype(np.float32) * spread)
    return q, np.where(largest.max(-1, keepdims=True, initial=0) == 0, np.float32(0), scale)


def scale_twice(q, scale, *, dtype):
    return KERNELS["dequantise"](q, scale * scale, dtype=dtype)


def product_in_bfloat16(q, scale, *, dtype):
    narrow = dtype_of("bfloat16")
    return KERNELS["dequantise"](q, scale.astype(narrow).astype(np.float32), dtype=dtype)


def last_row_for_minus_one(x, rows, index):
    out = x.copy()
    out[index] = rows
    return out


NORMS = (
    kernel("rms_norm", "a tenth of eps",
           lambda x, w, *, eps: KERNELS["rms_norm"](x, w, eps=eps / 10)),
    kernel("rms_norm", "eps outside the root", eps_outside_the_root),
    kernel("rms_norm", "tiny values flushed to zero", flushed),
    kernel("rms_norm", "raises for zero tokens", refuses_zero_tokens),
    kernel("rms_norm", "changes its input in place", squares_in_place),
    kernel("rms_norm", "writes past the end of its input", writes_past_the_end),
    wrapped("rms_norm", "one wrong row in ten thousand", wrong_row_in_ten_thousand),
    wrapped("rms_norm", "one wrong element", wrong_element),
    wrapped("rms_norm", "float32 whatever was asked for", lambda out: out.astype(np.float32)),
    wrapped("rms_norm", "one axis too many", lambda out: out[None]),
    wrapped("rms_norm", "zero rows not zero", lambda out: out + out.dtype.type(1e-30)),
    kernel("layer_norm", "a tenth of eps",
           lambda x, w, b, *, eps: KERNELS["layer_norm"](x, w, b, eps=eps / 10)),
    kernel("layer_norm", "variance from the mean of squares", square_of_the_mean),
    kernel("layer_norm", "variance over n - 1", unbiased_variance),
    kernel("layer_norm", "bias forgotten",
           lambda x, w, b, *, eps: KERNELS["layer_norm"](x, w, 0 * b, eps=eps)),
)  # fmt: skip

ELEMENTS = (
    kernel("add", "overflow clipped", clipped),
    wrapped("add", "infinity turned into NaN", infinity_as_nan),
    kernel("add", "summed in bfloat16", added_in_half_precision),
    kernel("cast", "truncates", truncating_cast),
    kernel("cast", "ties away from zero", ties_away),
    kernel("swiglu", "gate and up swapped", swapped_halves),
    kernel("swiglu", "gate and up interleaved", interleaved),
    kernel("quick_gelu", "the tanh approximation of another GELU", tanh_gelu),
    kernel("quick_gelu", "1.7 for 1.702", gelu_of_1_7),
)

QUANTISATION = (
    kernel("quantise", "int8 rounded towards zero", int8_towards_zero),
    kernel("quantise", "int8 not saturated", int8_wraps),
    kernel("quantise", "e4m3 saturates to NaN", e4m3_saturates_to_nan),
    kernel("quantise", "one scale for the whole row", one_scale_a_row),
    kernel("quantise", "a scale of zero for zeros", scale_of_zero),
    kernel("dequantise", "scale applied twice", scale_twice),
    kernel("dequantise", "scale rounded to bfloat16", product_in_bfloat16),
)

COPIES = (
    kernel("embed", "the row after", lambda ids, w: KERNELS["embed"](np.maximum(ids - 1, 0), w)),
    wrapped("embed", "scaled as other models do", lambda out: out * out.dtype.type(np.sqrt(40))),
    kernel("merge_rows", "index -1 taken for the last row", last_row_for_minus_one),
    kernel("select_rows", "rows in falling order", lambda x, rows: x[np.sort(rows)[::-1]]),
    kernel("concat", "the last array left out",
           lambda *parts: np.concatenate(parts[:-1] or [parts[0][:0]])),
)  # fmt: skip

DEFECTS = (*NORMS, *ELEMENTS, *QUANTISATION, *COPIES)
