"""Ops as ONNX defines them, run by onnx's own reference evaluator on one node at a time.

Shapes and axes are the package's; each function turns them into ONNX's. Everything is float64 but
ids. ONNX keeps float attributes, and the ratios of a resize, in float32: ``exact`` refuses others.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

Values = npt.NDArray[Any]

OPSET = 23
"""The first with Attention, RMSNormalization and RotaryEmbedding."""


def run(op_type: str, *inputs: Values | None, outputs: int = 1, **attributes: Any) -> list[Values]:
    """Return what one node gives; None stands for an optional input left out."""
    named = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    out = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, names, out, **attributes)
    typed = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in named.items()
    ]
    results = [helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in out]
    graph = helper.make_graph([node], op_type, typed, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    values: list[Values] = ReferenceEvaluator(model).run(None, named)
    return values


def exact(value: float) -> float:
    """Return a value that float32 holds, and refuse any other.

    Raises:
        ValueError: the evaluator would compute with another number than the caller's.
    """
    if float(np.float32(value)) != value:
        raise ValueError(f"{value} is not a float32, and ONNX would round it")
    return value


def attention(
    q: Values, k: Values, v: Values, visible: npt.NDArray[np.bool_], scale: float
) -> Values:
    """Attention with a mask. Shapes: q (queries, heads, d), k, v (keys, kv_heads, d).

    Both q and k are multiplied by the root of the scale, which is taken in float32.
    """
    exact(math.sqrt(scale))
    heads_first = [x.swapaxes(0, 1)[None] for x in (q, k, v)]
    return run("Attention", *heads_first, visible, scale=exact(scale))[0][0].swapaxes(0, 1)


def causal_attention(q: Values, k: Values, v: Values, scale: float) -> Values:
    """Causal attention whose queries are the last of the sequence; the keys before are the past."""
    exact(math.sqrt(scale))
    past = len(k) - len(q)
    old_k, old_v = (x[:past].swapaxes(0, 1)[None] for x in (k, v))
    new = [x.swapaxes(0, 1)[None] for x in (q, k[past:], v[past:])]
    out = run("Attention", *new, None, old_k, old_v, outputs=3, scale=exact(scale), is_causal=1)
    return out[0][0].swapaxes(0, 1)


def rms_norm(x: Values, eps: float) -> Values:
    """x / sqrt(mean(x²) + eps), without a weight."""
    return run("RMSNormalization", x, np.ones(x.shape[-1]), epsilon=exact(eps))[0]


def layer_norm(x: Values, weight: Values, bias: Values, eps: float) -> Values:
    """Over the last axis."""
    return run("LayerNormalization", x, weight, bias, axis=-1, epsilon=exact(eps))[0]


def rope(x: Values, cos: Values, sin: Values) -> Values:
    """Rotate halves. Shapes: x (tokens, heads, d), cos, sin (tokens, d / 2), a row a token."""
    at = np.arange(len(x), dtype=np.int64)[None]
    turned = run("RotaryEmbedding", x.swapaxes(0, 1)[None], cos, sin, at, interleaved=0)[0]
    return turned[0].swapaxes(0, 1)


def linear(x: Values, matrix: Values, bias: Values | None) -> Values:
    """x·Wᵀ + bias."""
    return run("Gemm", x, matrix, bias, transB=1)[0]


def conv2d(x: Values, weight: Values, bias: Values | None, stride: int, padding: int) -> Values:
    """Channels last outside, first inside."""
    maps = run(
        "Conv", x.transpose(0, 3, 1, 2), weight, bias, strides=[stride] * 2, pads=[padding] * 4
    )[0]
    return maps.transpose(0, 2, 3, 1)


def resize(x: Values, size: int) -> Values:
    """Bicubic with antialias; samples beyond the edge do not exist. Shapes: x (h, w, n)."""
    for side in x.shape[:2]:
        exact(size / side)
    sizes = np.array([x.shape[2], size, size], np.int64)
    options = {"mode": "cubic", "cubic_coeff_a": -0.5, "antialias": 1, "exclude_outside": 1}
    return run("Resize", x.transpose(2, 0, 1), None, None, sizes, **options)[0].transpose(1, 2, 0)


def swiglu(gate: Values, up: Values) -> Values:
    """gate · sigmoid(gate) · up, from Sigmoid and Mul."""
    with np.errstate(over="ignore", invalid="ignore"):  # its sigmoid computes both branches
        return run("Mul", run("Mul", gate, run("Sigmoid", gate)[0])[0], up)[0]


def route(logits: Values, top_k: int) -> tuple[Values, Values]:
    """Softmax, then TopK, which gives the lower index of equal values first."""
    p = run("Softmax", logits, axis=-1)[0]
    weights, ids = run("TopK", p, np.array([top_k], np.int64), outputs=2, axis=-1)
    return weights, ids


def gather(table: Values, ids: Values) -> Values:
    """Rows by number."""
    return run("Gather", table, ids, axis=0)[0]


def scatter_rows(x: Values, rows: Values, index: Values) -> Values:
    """A copy of x with rows replaced."""
    return run("ScatterND", x, index[:, None].astype(np.int64), rows)[0]


def concat(*parts: Values) -> Values:
    """Along the first axis."""
    return run("Concat", *parts, axis=0)[0]


def quantise(x: Values, scale: Values, zero: Values) -> Values:
    """x / scale, rounded to zero's type; a scale for 128 columns. x and scale are float32."""
    return run("QuantizeLinear", x, scale, zero, axis=1, block_size=128)[0]


def dequantise(q: Values, scale: Values) -> Values:
    """q · scale in float32, a scale for 128 columns."""
    return run("DequantizeLinear", q, scale, axis=1, block_size=128)[0]
